"""Slow creep: what a series of accepted changes adds up to, and which of them did it.

Each change was small enough to pass its gate; against a frozen reference they add up. A series creeps when its present
level is surely further from the reference than the rules allow, however small the steps were.

Invariant: pure. Levels come from medians, and only from points that may be compared with each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose import stats
from edgepose.errors import AccuracyRegression, BadInput, LatencyRegression, MissingDependency
from edgepose.profiler.facts import FACTS
from edgepose.profiler.gate.rules import TrendRule
from edgepose.profiler.history.baselines import Key, Point, Scale, comparable

Tendency = Literal["steady", "watch", "creep"]

_TWO_SIDED_95 = NormalDist().inv_cdf(0.975)  # what a point's bounds are away from it


class Step(msgspec.Struct, frozen=True):
    """A place where the level changed.

    Attributes:
        index: Of the first point of the new level.
        commit: Of that point; the change lies between it and the one before.
        before: Level before, on the series' scale.
        after: Level after.
    """

    index: int
    commit: str
    before: float
    after: float


class Trend(msgspec.Struct, frozen=True):
    """What became of one metric.

    Attributes:
        branch: Branch.
        device: Device.
        metric: Metric.
        tendency: "creep": surely worse than allowed; "watch": worse than allowed, but not surely; else "steady".
        exit_code: 3 for accuracy that creeps, 4 for anything else that does, else 0.
        scale: Of all levels below.
        points: How many were looked at.
        level: How much worse than the reference it is now; negative is better.
        surely: Lower bound of that, at the rule's alpha.
        allowed: The limit.
        noise: Standard deviation of a point about its level.
        steps: Where the level changed; None where there are too few points to say.
        values: `worse` of the points looked at, in order.
        text: One line for people.
    """

    branch: str
    device: str
    metric: str
    tendency: Tendency
    exit_code: int
    scale: Scale
    points: int
    level: float
    surely: float
    allowed: float
    noise: float
    steps: tuple[Step, ...] | None
    values: tuple[float, ...]
    text: str


def trend_of(key: Key, points: Sequence[Point], rule: TrendRule) -> Trend:
    """Finds the levels of a series and holds the last one against the reference.

    Args:
        key: Which series it is.
        points: Its points since it began, at least one.
        rule: The limits.

    Raises:
        BadInput: No points, or points that may not be compared with each other.
        MissingDependency: ruptures is not installed, and there are enough points to look for changes.
    """
    _require_comparable(key, points)
    window = list(points)[-rule.window :]
    scale, fact = window[-1].scale, FACTS.get(key.metric)
    values = np.array([point.worse for point in window])
    allowed, least = _limits(scale, rule, memory=fact is not None and fact.measured)
    noise = max(_noise(values), least / 3)  # what is exact would otherwise change with every byte
    steps, first = None, len(window) - 1
    if len(window) >= rule.least_points:
        stretches = _segments(values, noise, rule.penalty)
        steps, first = _steps(window, values, stretches), stretches[-1][0]
    level = float(np.median(values[first:]))
    # The bounds of a single point, not those of their mean: people and machine are the same for all of them.
    spread = float(np.median([(point.high - point.low) / 2 for point in window[first:]]))
    surely = level - spread * NormalDist().inv_cdf(1 - rule.alpha) / _TWO_SIDED_95
    tendency: Tendency = "creep" if surely > allowed else "watch" if level > allowed else "steady"
    accuracy = key.metric.startswith("accuracy ")
    code = (AccuracyRegression if accuracy else LatencyRegression).exit_code if tendency == "creep" else 0
    return Trend(
        branch=key.branch,
        device=key.device,
        metric=key.metric,
        tendency=tendency,
        exit_code=code,
        scale=scale,
        points=len(window),
        level=level,
        surely=surely,
        allowed=allowed,
        noise=noise,
        steps=steps,
        values=tuple(values.tolist()),
        text=_text(key, level, allowed, scale, steps),
    )


def spelt_worse(level: float, scale: Scale) -> str:
    """A level for people: "2.1 % worse", "0.40 points better"."""
    figure = f"{100 * abs(math.expm1(level)):.1f} %" if scale == "log-ratio" else f"{abs(level):.2f} points"
    return f"{figure} {'better' if level < 0 else 'worse'}"


def _require_comparable(key: Key, points: Sequence[Point]) -> None:
    if not points:
        raise BadInput(f"baseline of {key.branch}: {key.metric}", found="no points", expected="an accepted candidate")
    for point in points[1:]:
        differing = comparable(key.metric, points[0].conditions, point.conditions)
        if differing or point.scale != points[0].scale:
            raise BadInput(
                f"baseline of {key.branch} on {key.device}: {key.metric}",
                found=f"points of another {' and '.join(differing).replace('_', ' ') or 'scale'}",
                expected="one reference and one set of conditions in a series",
                fix="accept the first of them with --new-series",
            )


def _limits(scale: Scale, rule: TrendRule, *, memory: bool) -> tuple[float, float]:
    """How far a series may creep, and the least step worth finding, on its scale."""
    if scale == "points":
        return rule.creep_above_points, rule.least_step_points
    return math.log1p(rule.creep_above_memory if memory else rule.creep_above), math.log1p(rule.least_step)


def _noise(values: NDArray[np.float64]) -> float:
    """From differences of neighbours, which steps touch only once."""
    return stats.robust_spread(np.diff(values)) / math.sqrt(2) if len(values) > 2 else 0.0


def _segments(values: NDArray[np.float64], noise: float, penalty: float) -> list[tuple[int, int]]:
    try:
        from edgepose.profiler.history.change_points import segments
    except ImportError as err:
        raise MissingDependency("ruptures", extra="trend", needed_for="finding where a series changed") from err
    return segments(values, noise=noise, penalty=penalty)


def _steps(
    points: Sequence[Point], values: NDArray[np.float64], stretches: Sequence[tuple[int, int]]
) -> tuple[Step, ...]:
    levels = [float(np.median(values[first:end])) for first, end in stretches]
    return tuple(
        Step(first, points[first].commit, before, after)
        for (first, _), before, after in zip(stretches[1:], levels, levels[1:], strict=False)
    )


def _text(key: Key, level: float, allowed: float, scale: Scale, steps: Sequence[Step] | None) -> str:
    """How much worse, and which steps towards worse led there, the largest first."""
    text = f"{key.metric}: {spelt_worse(level, scale)} than the reference, allowed {spelt_worse(allowed, scale)}"
    if steps is None:
        return f"{text}; too few points to say where it changed"
    worse = sorted((step for step in steps if step.after > step.before), key=lambda s: s.before - s.after)
    named = [
        f"{step.commit[:12] or f'point {step.index + 1}'} ({spelt_worse(step.after - step.before, scale)})"
        for step in worse[:3]
    ]
    return f"{text}; stepped at {', '.join(named)}" if named else text
