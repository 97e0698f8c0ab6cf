"""From torch to engines: ONNX, lossless Q/DQ per backend, OpenVINO IR, and parity after every step.

Invariant: every step reads a file and writes a file, atomically, and its result is checked before anybody uses it.
"""

from __future__ import annotations

from edgepose.telemetry import block_telemetry

block_telemetry()
