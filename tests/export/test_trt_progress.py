"""How far a builder is, and what happens to exceptions in its callbacks."""

from __future__ import annotations

import pytest

from edgepose.export.trt_progress import Phases


def walk(phases: Phases) -> None:
    """As TensorRT-RTX tells it: a root of 2 steps, the second with a phase of 4 inside."""
    phases.start("Building engine", None, 2)
    phases.start("Preparing", "Building engine", 1)
    phases.step("Preparing", 0)
    phases.finish("Preparing")
    phases.step("Building engine", 0)
    phases.start("Optimizing", "Building engine", 4)
    for step in range(4):
        phases.step("Optimizing", step)
    phases.finish("Optimizing")
    phases.step("Building engine", 1)
    phases.finish("Building engine")


def test_share_rises_to_the_whole_and_never_falls() -> None:
    seen: list[tuple[str, int]] = []
    walk(Phases(lambda what, done, whole: seen.append((what, 100 * done // whole))))
    shares = [share for _, share in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert ("Optimizing", 62) in seen  # one step of two, and one of four of the other
    assert seen[-1][0] == "Building engine"


def test_ctrl_c_is_kept_and_stops_the_builder() -> None:
    def interrupt(what: str, done: int, whole: int) -> None:
        raise KeyboardInterrupt

    phases = Phases(interrupt)
    phases.start("Building engine", None, 3)
    assert not phases.step("Building engine", 0)
    phases.finish("Building engine")  # nothing leaves any callback
    with pytest.raises(KeyboardInterrupt):
        phases.raise_fault()


def test_first_fault_is_the_one_that_is_raised() -> None:
    faults = iter([BrokenPipeError("gone"), OSError("later")])

    def fail(what: str, done: int, whole: int) -> None:
        raise next(faults)

    phases = Phases(fail)
    phases.start("Building engine", None, 3)
    phases.step("Building engine", 0)
    phases.step("Building engine", 1)
    with pytest.raises(BrokenPipeError):
        phases.raise_fault()


def test_steps_of_phases_that_were_never_started_change_nothing() -> None:
    seen: list[int] = []
    phases = Phases(lambda what, done, whole: seen.append(done))
    assert phases.step("unknown", 3)
    phases.finish("unknown")
    phases.raise_fault()
    assert seen == []
