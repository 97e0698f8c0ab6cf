"""The code in docs/runtime.md runs as it stands, on a bundle and a photograph of the names that it uses."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import cv2
import pytest

from edgepose.estimator import PoseEstimator
from tests.cli.conftest import write_video
from tests.fakes import spot_frame
from tests.tiny_network import spot_bundle

PAGE = Path(__file__).resolve().parents[2] / "docs" / "runtime.md"


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    spot_bundle(tmp_path).root.rename(tmp_path / "small.bundle")
    frame = spot_frame((80, 60), (200, 150), (400, 320))
    cv2.imwrite(str(tmp_path / "photo.jpg"), frame)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S):
        exec(compile(block, str(PAGE), "exec"), found)
    assert capsys.readouterr().out.startswith("onnxruntime 1 all ")
    with PoseEstimator.from_bundle("small.bundle") as estimator:
        assert [len(poses) for poses in found["burst"](estimator, [frame] * 3)] == [1, 1, 1]
        asyncio.run(found["watch"](estimator, [frame] * 3))
        assert capsys.readouterr().out == "1 False\n" * 3
        found["follow"](estimator, str(write_video(tmp_path / "match.avi", 4, "MJPG")))
        assert capsys.readouterr().out == "".join(f"{number} [1]\n" for number in range(4))
