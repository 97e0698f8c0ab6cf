"""Timing callables: warm-up by time, garbage collector off, every sample kept in nanoseconds.

Invariant: the harness knows nothing of what it times, and takes time only from the clock it is given. A workload is one
or more stages, callables without arguments that are run one after the other; one run of all of them is a call.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import BadInput

Clock = Callable[[], int]
"""Nanoseconds that only grow, such as `time.perf_counter_ns`."""

Stage = Callable[[], object]
Nanoseconds = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Budget:
    """When sampling ends: after `duration_ns`, but not before `least_calls` and never after `most_calls`."""

    duration_ns: int
    least_calls: int = 1
    most_calls: int = 1_000_000

    def __post_init__(self) -> None:
        if self.duration_ns < 0 or not 1 <= self.least_calls <= self.most_calls:
            raise BadInput(
                "timing budget",
                found=f"{self.duration_ns} ns, {self.least_calls} to {self.most_calls} calls",
                expected="a duration of 0 ns or more, and 1 <= least calls <= most calls",
            )


@contextlib.contextmanager
def collector_off() -> Iterator[None]:
    """Keeps Python's garbage collector from running in the middle of a sample; collects once before.

    Where it is off already, nothing is collected: whoever turned it off chose the moment, and a collection just before
    a sample would push the workload out of the processor's caches.
    """
    if not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def time_calls(stages: Sequence[Stage], *, calls: int, clock: Clock) -> Nanoseconds:
    """Times a fixed number of calls.

    Returns:
        (calls, S) int64, nanoseconds of each stage.
    """
    return _durations(stages, _marks(stages, Budget(0, calls, calls), clock))


def sample(stages: Sequence[Stage], budget: Budget, *, clock: Clock) -> Nanoseconds:
    """Times calls until the budget is used up.

    Returns:
        (calls, S) int64, nanoseconds of each stage.
    """
    return _durations(stages, _marks(stages, budget, clock))


def warm_up(stages: Sequence[Stage], budget: Budget, *, clock: Clock) -> Nanoseconds:
    """Runs until caches, thread pools and clocks have settled; the same as `sample`, and its samples may be looked at.

    Warm-up goes by time, not by a number of calls, since clocks and caches settle in time.
    """
    return sample(stages, budget, clock=clock)


def calls_per_block(call_ns: float, block_ns: int) -> int:
    """Calls in a block that lasts at least `block_ns`.

    Raises:
        BadInput: The clock did not move during a call.
    """
    if not math.isfinite(call_ns) or call_ns <= 0:
        raise BadInput("timing", found=f"calls of {call_ns} ns", expected="calls that take time", fix="check the clock")
    return max(1, math.ceil(block_ns / call_ns))


def _marks(stages: Sequence[Stage], budget: Budget, clock: Clock) -> list[int]:
    """Clock readings: one before the first stage and one after each stage of every call."""
    if not stages:
        raise BadInput("timing", found="a workload without stages", expected="at least one")
    with collector_off():
        start = clock()
        marks, end = [start], start + budget.duration_ns
        append = marks.append
        for count in range(budget.most_calls):
            if count >= budget.least_calls and marks[-1] >= end:
                break
            for stage in stages:
                stage()
                append(clock())
    return marks


def _durations(stages: Sequence[Stage], marks: Sequence[int]) -> Nanoseconds:
    readings = np.asarray(marks, np.int64)
    return (readings[1:] - readings[:-1]).reshape(-1, len(stages))
