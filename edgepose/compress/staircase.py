"""Finding the widest shape that is as fast as asked, where only a stopwatch knows how fast a shape is.

Invariant: pure. Shapes are numbers, from the widest to the narrowest; times come from the `measure` that is handed
over, and equal measurements lead to equal questions and an equal answer, which is what makes a search resumable.

Latency over channels is a staircase with noise on it: kernels work in tiles, and a step down in channels may even cost
time. So nothing here believes that narrower is faster. The search keeps two neighbours apart: the first shape known to
reach the goal, and the narrowest wider one that is known not to; both are timed more closely as long as it is unclear
on which side they are, and a shape that changes sides moves the bracket.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from edgepose.errors import BadInput

TOLERANCE = 0.10
"""A speed-up that is so far from what was asked for, as a share of it, still is what was asked for."""

_SLACK = 0.02  # what falls short by less reaches the goal: nobody feels it, and few machines can tell
_NEAR = 0.04  # a shape that overshoots by less is not worth looking for a wider one
_PROCESS_SPREAD = 0.04  # how much fresh processes differ beyond what the rounds inside one show, on a busy machine
_GUESSES = 4  # shapes chosen by interpolation; then the bracket is halved, which no odd staircase can delay


class Timing(msgspec.Struct, frozen=True):
    """How fast a shape is, beside the unpruned network in the same form.

    Attributes:
        speedup: Time of the unpruned network over time of the shape.
        low: Lower end of the two-sided 95 % bounds of the speed-up.
        high: Upper end.
        pairs: Pairs of fresh processes that it was seen in.
        ms: Median call of the shape.
        unpruned_ms: Median call of the unpruned network beside it.
    """

    speedup: float
    low: float
    high: float
    pairs: int
    ms: float
    unpruned_ms: float


Measure = Callable[[int, int], Timing]
"""Given the number of a shape and how many pairs of processes it is to be seen in, all of them in one timing."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much timing a search may do.

    Attributes:
        looks: Pairs of processes behind a first glance, a closer look, …, the closest; ascending.
        most_shapes: Shapes that are timed before the search is content with what it has.
    """

    looks: tuple[int, ...] = (1, 3, 6)
    most_shapes: int = 12

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in itertools.pairwise((0, *self.looks)))
        if not self.looks or not ascending or self.most_shapes < 1:
            raise BadInput(
                "effort of a search for a shape",
                found=f"looks {self.looks} at {self.most_shapes} shapes",
                expected="ascending numbers of pairs, and a shape at least",
            )


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came to.

    Attributes:
        shape: The number of the chosen shape; of the fastest that was seen where none reaches the goal.
        reached: Whether one does.
        timings: All that was timed, by number.
    """

    shape: int
    reached: bool
    timings: Mapping[int, Timing]


def find_shape(macs_left: Sequence[float], asked: float, measure: Measure, effort: Effort | None = None) -> Found:
    """The widest shape that is `asked` times as fast as the unpruned network, among those that have to be timed.

    Where the step of the staircase at the goal is so high that this one overshoots by more than `TOLERANCE`, the
    nearer of the two at the step is taken.

    Args:
        macs_left: Share of the multiply-accumulates that each shape keeps, strictly descending, all below 1.
        asked: Speed-up over the unpruned network, above 1.
        measure: The stopwatch; asked for one shape again, for more pairs, it counts in what it saw before.
        effort: How much to time.

    Raises:
        BadInput: No shapes, shapes out of order, or a speed-up of 1 or less.
    """
    effort = effort or Effort()
    widths = (1.0, *macs_left)
    if len(widths) < 2 or any(b >= a for a, b in itertools.pairwise(widths)) or not 1 < asked < math.inf:
        raise BadInput(
            "search for a shape",
            found=f"{len(macs_left)} shapes for a speed-up of {asked:g}",
            expected="shapes from wide to narrow, and a speed-up above 1",
        )
    count, seen = len(macs_left), dict[int, Timing]()
    while True:
        low, high = _bracket(seen, asked, count)
        unclear = next((shape for shape in (high, low) if shape in seen and _unclear(seen[shape], asked, effort)), None)
        if unclear is not None:
            seen[unclear] = measure(unclear, _closer(seen[unclear], effort))
        elif (following := _following(low, high, widths, asked, (seen, effort))) is not None:
            seen[following] = measure(following, effort.looks[0])
        elif high == count:
            return Found(max(seen, key=lambda shape: seen[shape].speedup), False, dict(sorted(seen.items())))
        else:
            chosen = _nearer(low, high, seen, asked)
            if seen[chosen].pairs >= effort.looks[-1]:
                return Found(chosen, True, dict(sorted(seen.items())))
            seen[chosen] = measure(chosen, effort.looks[-1])


_Seen = Mapping[int, Timing]


def _bracket(seen: _Seen, asked: float, count: int) -> tuple[int, int]:
    """The narrowest shape seen that is wider than any that reaches the goal, and the widest seen that does.

    -1 stands for the unpruned network, `count` for what would be narrower than every shape.
    """
    high = next((shape for shape in sorted(seen) if _short(seen[shape], asked) <= 0), count)
    return max((shape for shape in seen if shape < high), default=-1), high


def _short(timing: Timing, asked: float) -> float:
    """By how much, as a logarithm, a shape misses the goal; not positive where it reaches it."""
    return math.log(asked * (1 - _SLACK) / timing.speedup)


def _unclear(timing: Timing, asked: float, effort: Effort) -> bool:
    """Whether a closer look could show that a shape is on the other side of the goal."""
    if timing.pairs >= effort.looks[-1]:
        return False
    short = _short(timing, asked)
    seen = math.log(timing.high / timing.speedup) if short > 0 else math.log(timing.speedup / timing.low)
    return abs(short) <= max(seen, 2 * _PROCESS_SPREAD / math.sqrt(timing.pairs))


def _closer(timing: Timing, effort: Effort) -> int:
    return next(look for look in effort.looks if look > timing.pairs)


def _following(low: int, high: int, widths: Sequence[float], asked: float, so_far: tuple[_Seen, Effort]) -> int | None:
    """The shape to look at next; None where the bracket cannot, or need not, become narrower."""
    seen, effort = so_far
    last = len(widths) - 2  # `widths` starts with the unpruned network
    full = len(seen) >= effort.most_shapes
    if high > last:
        if low == last:
            return None
        return last if full else _guess(low, high, widths, asked, seen)
    if full or high - low == 1 or seen[high].speedup <= asked * (1 + _NEAR):
        return None
    return _guess(low, high, widths, asked, seen)


def _guess(low: int, high: int, widths: Sequence[float], asked: float, seen: _Seen) -> int:
    """A shape inside the bracket: where a line through what was timed meets the goal, or half-way."""
    last = len(widths) - 2
    middle = (low + min(high, last + 1)) // 2
    if len(seen) >= _GUESSES:
        return last if high > last else middle
    left_low, time_low = widths[low + 1], 1 / seen[low].speedup if low in seen else 1.0
    if high in seen:
        left_high, time_high = widths[high + 1], 1 / seen[high].speedup
    elif low in seen:
        left_high, time_high = 1.0, 1.0  # go on along the line from the unpruned network
    else:
        left_high, time_high = 0.0, 0.0  # nothing is known: time as multiply-accumulates
    slope = (time_low - time_high) / (left_low - left_high)
    if slope <= 0:
        return middle
    left = left_low + (1 / asked - time_low) / slope
    inside = range(low + 1, min(high, last + 1))
    return min(inside, key=lambda shape: abs(widths[shape + 1] - left))


def _nearer(low: int, high: int, seen: _Seen, asked: float) -> int:
    """The shape that reaches the goal, unless it overshoots by far and the one before it is nearer."""
    over = math.log(seen[high].speedup / asked)
    if low not in seen or over <= math.log(1 + TOLERANCE):
        return high
    return low if abs(math.log(seen[low].speedup / asked)) < over else high
