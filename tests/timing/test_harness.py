"""The harness with a fake clock: what it times, when it stops, and what it leaves alone."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from edgepose.errors import BadInput
from edgepose.timing import harness


class FakeClock:
    """Moves only when a workload says that time has passed."""

    def __init__(self) -> None:
        self.now_ns = 1_000

    def __call__(self) -> int:
        return self.now_ns

    def work(self, *durations_ns: int) -> harness.Stage:
        """A stage that takes the given durations in turn, the last one for ever."""
        queue = list(durations_ns)

        def stage() -> None:
            self.now_ns += queue.pop(0) if len(queue) > 1 else queue[0]

        return stage


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_every_stage_of_every_call_is_timed(clock: FakeClock) -> None:
    stages = [clock.work(5, 6, 7), clock.work(100)]
    np.testing.assert_array_equal(harness.time_calls(stages, calls=3, clock=clock), [[5, 100], [6, 100], [7, 100]])


def test_sampling_ends_when_the_time_is_up(clock: FakeClock) -> None:
    assert len(harness.sample([clock.work(30)], harness.Budget(100), clock=clock)) == 4


def test_sampling_makes_the_least_number_of_calls_however_slow_they_are(clock: FakeClock) -> None:
    assert len(harness.sample([clock.work(1_000)], harness.Budget(100, least_calls=3), clock=clock)) == 3


def test_sampling_never_makes_more_calls_than_allowed(clock: FakeClock) -> None:
    assert len(harness.sample([clock.work(0)], harness.Budget(100, most_calls=7), clock=clock)) == 7


def test_warm_up_goes_by_time_not_by_calls(clock: FakeClock) -> None:
    slow_start = harness.warm_up([clock.work(80, 10)], harness.Budget(100), clock=clock)
    assert slow_start[:, 0].tolist() == [80, 10, 10]


def test_collector_is_off_while_timing_and_back_afterwards(clock: FakeClock) -> None:
    seen = []
    harness.time_calls([lambda: seen.append(gc.isenabled())], calls=2, clock=clock)
    assert seen == [False, False]
    assert gc.isenabled()


def test_collector_comes_back_when_a_call_raises(clock: FakeClock) -> None:
    def broken() -> None:
        raise ValueError("engine")

    with pytest.raises(ValueError, match="engine"):
        harness.time_calls([broken], calls=1, clock=clock)
    assert gc.isenabled()


def test_collector_that_was_off_stays_off_and_collects_nothing(clock: FakeClock) -> None:
    collections: list[str] = []

    def watch(phase: str, _info: dict[str, int]) -> None:
        collections.append(phase)

    gc.disable()
    gc.callbacks.append(watch)
    try:
        harness.time_calls([clock.work(1)], calls=1, clock=clock)
        assert not gc.isenabled()
        assert not collections
    finally:
        gc.callbacks.remove(watch)
        gc.enable()


@pytest.mark.parametrize(("call_ns", "calls"), [(1_000_000, 20), (3_000_000, 7), (50_000_000, 1)])
def test_blocks_last_at_least_as_long_as_asked(call_ns: int, calls: int) -> None:
    assert harness.calls_per_block(call_ns, 20_000_000) == calls


@pytest.mark.parametrize("call_ns", [0.0, -1.0, float("nan"), float("inf")])
def test_a_clock_that_stands_still_is_an_error(call_ns: float) -> None:
    with pytest.raises(BadInput, match="clock"):
        harness.calls_per_block(call_ns, 20_000_000)


@pytest.mark.parametrize("budget", [(-1, 1, 1), (0, 0, 1), (0, 5, 4)])
def test_impossible_budgets_are_refused(budget: tuple[int, int, int]) -> None:
    with pytest.raises(BadInput, match="budget"):
        harness.Budget(*budget)


def test_a_workload_without_stages_is_refused(clock: FakeClock) -> None:
    with pytest.raises(BadInput, match="without stages"):
        harness.time_calls([], calls=1, clock=clock)
