"""The benchmark of aiming: a whole question with a clock that knows the answer, and what it cannot answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.context import Context
from benchmarks.latency_target import COLUMNS, Question, answer, main
from benchmarks.subjects import empty_cache
from edgepose.blocks.checkpoint import load_checkpoint
from tests.stages.size_clock import SizeClock
from tests.tiny_checkpoint import Tiny


def test_a_question_is_answered_by_the_finished_engine(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "lspet").symlink_to(tiny.data)
    whole = sum(tensor.numel() for tensor in load_checkpoint(tiny.checkpoint).tensors.values() if tensor.dim() > 1)
    with empty_cache(tmp_path / "cache"):
        found = answer(Context(tmp_path, tmp_path), Question(str(tiny.checkpoint), 1.4, "fp32", 8), SizeClock(whole))
    assert found.achieved.achieved.speedup == pytest.approx(found.staircase.predicted.speedup, rel=0.05)
    assert found.achieved.precision == found.staircase.form.precision == "fp32"
    assert found.achieved.total == found.achieved.achieved
    assert len(found.row) == len(COLUMNS)


def test_a_network_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kpe-none"]) == 2
    assert "kpe-none" in capsys.readouterr().err
