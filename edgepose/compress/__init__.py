"""Making a trained network smaller: structured pruning (plan, apply) and quantisation (prepare, convert, restore).

Invariant: nothing here changes the module it is given; plans and ranges are JSON, weights are plain tensors.
"""

from __future__ import annotations

from edgepose.telemetry import block_telemetry

block_telemetry()
