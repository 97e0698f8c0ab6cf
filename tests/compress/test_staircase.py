"""The search for a shape on staircases whose latency is known: it converges, cheaply, whatever the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.compress.staircase import TOLERANCE, Effort, Timing, find_shape
from edgepose.errors import BadInput

LEFT = tuple(0.97**step for step in range(1, 80))
QUIET, BUSY = 0.003, 0.04

Latency = Callable[[float], float]


def tiles(left: float) -> float:
    """Kernels in 24 tiles and a part that does not shrink: flat steps, and none of them below 15 %."""
    return 0.15 + 0.85 * math.ceil(24 * left) / 24


def sawtooth(left: float) -> float:
    """Odd widths run slower than the wider ones before them."""
    return 0.1 + 0.9 * left * (1.12 if int(40 * left) % 2 else 1.0)


@dataclass
class Stopwatch:
    """A noisy machine: every pair of processes has a level of its own, and now and then one is far off.

    Attributes:
        latency: Time of a shape by the share of multiply-accumulates it keeps; 1 for the unpruned network.
        noise: Spread of the processes.
        asked: Every question so far.
    """

    latency: Latency
    noise: float = QUIET
    left: Sequence[float] = LEFT
    seed: int = 0
    asked: list[tuple[int, int]] = field(default_factory=list)

    def __call__(self, shape: int, pairs: int) -> Timing:
        self.asked.append((shape, pairs))
        ratios = []
        for pair in range(pairs):  # the same pairs again, and new ones
            rng = np.random.default_rng([self.seed, shape, pair])
            ratios.append(math.log(self.latency(self.left[shape])) + self.noise * float(rng.standard_t(4)))
        middle, spread = float(np.median(ratios)), self.noise / math.sqrt(pairs)
        speedup = math.exp(-middle)
        return Timing(speedup, speedup * math.exp(-spread), speedup * math.exp(spread), pairs, 1 / speedup, 1.0)

    @property
    def shapes(self) -> set[int]:
        return {shape for shape, _ in self.asked}


def truth(latency: Latency, shape: int) -> float:
    return 1 / latency(LEFT[shape])


@pytest.mark.parametrize("noise", [QUIET, BUSY])
@pytest.mark.parametrize("latency", [tiles, sawtooth, lambda left: left])
@pytest.mark.parametrize("asked", [1.2, 1.5, 2.0, 3.0])
def test_what_is_found_is_as_fast_as_asked(latency: Latency, noise: float, asked: float) -> None:
    found = find_shape(LEFT, asked, Stopwatch(latency, noise))
    assert found.reached
    assert abs(truth(latency, found.shape) / asked - 1) < TOLERANCE
    assert found.timings[found.shape].pairs == 6


@settings(max_examples=60, deadline=None)
@given(asked=st.floats(1.1, 2.8), seed=st.integers(0, 2**31), fixed=st.floats(0.0, 0.2), steps=st.integers(8, 64))
def test_the_search_is_cheap_and_ends_on_every_staircase(asked: float, seed: int, fixed: float, steps: int) -> None:
    watch = Stopwatch(lambda left: fixed + (1 - fixed) * math.ceil(steps * left) / steps, BUSY, seed=seed)
    found = find_shape(LEFT, asked, watch)
    assert found.reached
    assert len(watch.shapes) <= Effort().most_shapes
    assert len(watch.asked) == len(set(watch.asked))  # no question twice
    assert set(found.timings) == watch.shapes


def test_nothing_wider_that_was_seen_is_as_fast() -> None:
    found = find_shape(LEFT, 2.0, Stopwatch(sawtooth))
    wider = [timing.speedup for shape, timing in found.timings.items() if shape < found.shape]
    assert wider
    assert max(wider) < 2.0


def test_a_first_glance_is_not_believed_near_the_goal() -> None:
    watch = Stopwatch(lambda left: left)
    find_shape(LEFT, 2.0, watch)
    closer = {shape for shape, pairs in watch.asked if pairs == 6}
    far = watch.shapes - closer
    assert all(abs(math.log(LEFT[shape] * 2.0)) < 0.15 for shape in closer)
    assert all((shape, 1) in watch.asked for shape in far | closer)


def test_a_wrong_first_glance_is_taken_back() -> None:
    """The first look at the right shape says that it is slow; a closer look brings the search back to it."""
    honest = Stopwatch(lambda left: left)

    def lies_at_first(shape: int, pairs: int) -> Timing:
        timing = honest(shape, pairs)
        if pairs > 1:
            return timing
        slow = timing.speedup * 0.95
        return Timing(slow, slow * 0.99, slow * 1.01, pairs, 1 / slow, 1.0)

    found = find_shape(LEFT, 2.0, lies_at_first)
    assert abs(1 / LEFT[found.shape] / 2.0 - 1) < TOLERANCE


def test_at_a_high_step_the_nearer_side_is_taken() -> None:
    """1.45 x or 3 x, nothing between: for 1.5 x the step before the goal is what was asked for."""
    watch = Stopwatch(lambda left: 1 / 1.45 if left > 0.5 else 1 / 3)
    found = find_shape(LEFT, 1.5, watch)
    assert truth(watch.latency, found.shape) == pytest.approx(1.45)
    assert truth(watch.latency, find_shape(LEFT, 2.9, watch).shape) == pytest.approx(3.0)


def test_where_the_goal_is_out_of_reach_the_fastest_shape_is_named() -> None:
    watch = Stopwatch(lambda left: 0.6 + 0.4 * left)
    found = find_shape(LEFT, 2.0, watch)
    assert not found.reached
    assert len(LEFT) - 1 in watch.shapes
    assert found.shape == max(found.timings, key=lambda shape: found.timings[shape].speedup)
    assert len(watch.shapes) < 6


def test_a_network_that_pruning_makes_slower_is_out_of_reach() -> None:
    assert not find_shape(LEFT, 1.5, Stopwatch(lambda _left: 1.3)).reached


def test_equal_measurements_lead_to_equal_questions() -> None:
    first, again = Stopwatch(tiles, BUSY), Stopwatch(tiles, BUSY)
    assert find_shape(LEFT, 2.0, first) == find_shape(LEFT, 2.0, again)
    assert first.asked == again.asked


def test_a_single_shape_is_taken_or_not() -> None:
    watch = Stopwatch(lambda left: left, left=(0.5,))
    assert find_shape((0.5,), 2.0, watch).reached
    assert not find_shape((0.5,), 3.0, watch).reached


@pytest.mark.parametrize(("left", "asked"), [((), 2.0), ((0.5, 0.6), 2.0), ((1.0,), 2.0), ((0.5,), 1.0)])
def test_what_cannot_be_searched_is_refused(left: tuple[float, ...], asked: float) -> None:
    with pytest.raises(BadInput, match="search for a shape"):
        find_shape(left, asked, Stopwatch(tiles))


@pytest.mark.parametrize("looks", [(), (3, 1), (0, 2)])
def test_looks_grow(looks: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="ascending"):
        Effort(looks)
