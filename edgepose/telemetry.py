"""Keeps third-party libraries from phoning home.

Invariant: after `block_telemetry()` neither openvino nor nncf, imported later, sends anything or leaves an identity.

`import openvino` alone sends an event to its maker's statistics server and writes ~/intel/; nncf does the same on every
call. Both fall back to a stub where the package openvino_telemetry cannot be imported, which is what this arranges, for
this process only and without touching the user's consent file. Packages whose leaves import either call it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast


def block_telemetry() -> None:
    """Makes `import openvino_telemetry` fail; call it before the first import of openvino or nncf."""
    # None in sys.modules is Python's own way of saying "not to be found"; a telemetry already loaded stays as it is.
    sys.modules.setdefault("openvino_telemetry", cast("ModuleType", None))
