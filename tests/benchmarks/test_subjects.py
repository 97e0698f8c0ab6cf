"""What claims are measured on: nothing is trained behind anybody's back."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.context import Context
from benchmarks.subjects import _Watcher
from edgepose.errors import CheckpointError


@pytest.mark.parametrize("stage", ["sparse", "prune", "prune-1", "recover", "recover-2", "qat"])
def test_a_stage_that_changes_a_network_is_refused_without_full(stage: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"stage {stage}: found no committed checkpoint"):
        _Watcher(Context(tmp_path, tmp_path), may_train=False).started(stage)
    _Watcher(Context(tmp_path, tmp_path), may_train=True).started(stage)


@pytest.mark.parametrize("stage", ["reference", "ptq", "export", "engine-openvino", "accuracy"])
def test_all_other_stages_run(stage: str, tmp_path: Path) -> None:
    _Watcher(Context(tmp_path, tmp_path), may_train=False).started(stage)
