"""The stage cache: a result is found again by everything it depends on, or made whole, or not at all."""

from __future__ import annotations

import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgepose.errors import StorageError, UsageError
from edgepose.stages import cache
from edgepose.stages.cache import StageKey, run_stage, run_state
from edgepose.training.config import TrainConfig

KEY = StageKey("train", {"data": "d1", "checkpoint": "c1"}, TrainConfig(epochs=3), ("numpy",))


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Work:
    """A stage that counts how often it ran."""

    def __init__(self, report: dict[str, Any] | None = None, fault: BaseException | None = None) -> None:
        self.runs, self.report, self.fault = 0, report or {"auc": 0.5}, fault

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.runs += 1
        assert list(folder.iterdir()) == []
        (folder / "weights").write_text(f"run {self.runs}")
        if self.fault is not None:
            raise self.fault
        return self.report


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_stage_runs_once(directory: Path) -> None:
    work = Work()
    made, found = run_stage(KEY, work), run_stage(KEY, work)
    assert work.runs == 1
    assert (made.reused, found.reused) == (False, True)
    assert msgspec.structs.replace(found, reused=False) == made
    assert made.path.is_relative_to(directory)
    assert (made.path / "weights").read_text() == "run 1"
    assert made.report == {"auc": 0.5}
    assert made.stage == "train"
    assert made.key == KEY.digest


@pytest.mark.parametrize(
    "other",
    [
        StageKey("recover", KEY.inputs, KEY.config, KEY.tools),
        StageKey("train", {**KEY.inputs, "data": "d2"}, KEY.config, KEY.tools),
        StageKey("train", {**KEY.inputs, "teacher": "t"}, KEY.config, KEY.tools),
        StageKey("train", KEY.inputs, TrainConfig(epochs=4), KEY.tools),
        StageKey("train", KEY.inputs, None, KEY.tools),
        StageKey("train", KEY.inputs, KEY.config, ("numpy", "msgspec")),
    ],
    ids=["stage", "digest", "role", "setting", "no settings", "tool"],
)
def test_everything_it_depends_on_counts(other: StageKey) -> None:
    work = Work()
    assert run_stage(KEY, work).key != run_stage(other, work).key
    assert work.runs == 2


def test_the_order_of_inputs_and_tools_does_not_count() -> None:
    shuffled = StageKey("train", {"checkpoint": "c1", "data": "d1"}, KEY.config, ("msgspec", "numpy"))
    assert shuffled.digest == StageKey("train", KEY.inputs, KEY.config, ("numpy", "msgspec")).digest


def test_versions_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KEY.digest
    monkeypatch.setattr(cache, "__version__", "99.0")
    assert KEY.digest != before


def test_a_tool_that_is_not_installed_makes_another_key() -> None:
    """Nothing is found under it, and the stage itself says what to install."""
    absent = StageKey("train", KEY.inputs, KEY.config, ("numpy", "no-such-distribution"))
    assert absent.digest != KEY.digest
    assert run_stage(absent, Work()).key == absent.digest


@pytest.mark.parametrize("fault", [ValueError("bad"), KeyboardInterrupt(), SystemExit(1)])
def test_a_stage_that_failed_leaves_nothing_and_runs_again(fault: BaseException, directory: Path) -> None:
    with pytest.raises(type(fault)):
        run_stage(KEY, Work(fault=fault))
    assert files_below(directory) == []
    assert run_stage(KEY, Work()).reused is False


@pytest.mark.parametrize("content", [None, b"", b"{half", b'{"key": "other", "report": {}, "seconds": 1}'])
def test_a_damaged_record_is_replaced(content: bytes | None, directory: Path) -> None:
    work = Work()
    made = run_stage(KEY, work)
    record = made.path / "stage.json"
    if content is None:
        record.unlink()
    else:
        record.write_bytes(content)
    again = run_stage(KEY, work)
    assert (again.reused, work.runs) == (False, 2)
    assert (again.path / "weights").read_text() == "run 2"
    assert len(files_below(directory)) == 2


def test_a_report_reads_the_same_fresh_and_reused() -> None:
    report = {"curve": ({"loss": np.float32(0.5)},), "shape": (1, 2), "auc": float("nan"), "at": Path("a/b")}
    made, found = run_stage(KEY, Work(report)), run_stage(KEY, Work(report))
    assert made.report == found.report == {"curve": [{"loss": 0.5}], "shape": [1, 2], "auc": None, "at": "a/b"}


def test_states_of_runs_lie_beside_the_stages(directory: Path) -> None:
    other = StageKey("train", {"data": "d2"}, KEY.config)
    assert run_state(KEY).is_relative_to(directory)
    assert run_state(KEY) == run_state(KEY) != run_state(other)
    assert not run_state(KEY).is_relative_to(run_stage(KEY, Work()).path)


def _fill(folder: Path) -> dict[str, Any]:
    (folder / "weights").write_bytes(bytes(100_000))
    return {}


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(directory: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StorageError, match="stages/train-"):
            run_stage(KEY, _fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert not directory.exists()
    assert run_stage(KEY, _fill).reused is False


def test_a_cache_that_cannot_be_a_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="a file where a directory is needed"):
        run_stage(KEY, Work())


def test_somebody_who_was_faster_is_replaced_whole(directory: Path) -> None:
    inner = Work({"who": "inner"})

    def outer(folder: Path) -> dict[str, Any]:
        run_stage(KEY, inner)  # another process, meanwhile
        (folder / "weights").write_text("outer")
        return {"who": "outer"}

    slow: Callable[[Path], dict[str, Any]] = outer
    assert run_stage(KEY, slow).report == {"who": "outer"}
    found = run_stage(KEY, inner)
    assert (found.reused, found.report, inner.runs) == (True, {"who": "outer"}, 1)
    assert len(files_below(directory)) == 2
