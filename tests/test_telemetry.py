from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    "module", ["edgepose.runtime.openvino", "edgepose.export.openvino", "edgepose.compress.coverage"]
)
def test_no_library_can_phone_home(module: str) -> None:
    """In a fresh process: nncf switches its telemetry off by itself under pytest."""
    code = f"import sys, {module}; print(sys.modules.get('openvino_telemetry', 'unblocked'))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "None"
