"""Charts of a compression as inline SVG: the waterfall, sensitivity of layers, the staircase of latency.

Invariant: as in `edgepose.profiler.pages.charts`: numbers and class names only, axes carry their units, and every mark
says its number in words. Nothing is drawn for what was not measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from edgepose.profiler.pages.svg import WIDTH, Scale, dot, line, path, rect, scale, svg, text, ticks, titled

_LEFT, _RIGHT = 200, WIDTH - 150
_ROW = 30
_LONGEST = 32  # characters of a name that fit to the left of the axis
_NAMED = 4  # layers with a colour of their own: as many as the page has


@dataclass(frozen=True, slots=True)
class Bar:
    """One step of the waterfall, in per cent and points.

    Attributes:
        title: Name of the step.
        percent: Where it ended.
        before: Where the step that it is compared with ended; None for the first.
        bounds: 95 % bounds of the change in points; None where there are none.
        detectable: The smallest change that could have shown, points; None where that is not known.
    """

    title: str
    percent: float
    before: float | None = None
    bounds: tuple[float, float] | None = None
    detectable: float | None = None


def waterfall_chart(metric: str, bars: Sequence[Bar], reference: float | None = None) -> str:
    """Each step as a bar from the step before to itself, with bounds, over the band of changes that could not show.

    Args:
        metric: Name of what is shown.
        bars: The steps in order.
        reference: Where the reference ended, per cent.
    """
    drawn = [bar for bar in bars if math.isfinite(bar.percent)]
    if not drawn:
        return ""
    left, right = _span([*(end for bar in drawn for end in _ends(bar)), *([] if reference is None else [reference])])
    height = 46 + _ROW * len(drawn)
    x = scale(left, right, _LEFT, _RIGHT)
    parts = []
    if reference is not None:
        mark = line(x(reference), 8, x(reference), height - 34, "zero")
        parts.append(titled(f"reference: {reference:.2f} %", mark))
    for row, bar in enumerate(drawn):
        parts += _bar(bar, 8 + _ROW * row, x)
    parts.append(line(_LEFT, height - 34, _RIGHT, height - 34, "frame"))
    parts += [text(x(tick), height - 18, f"{tick:g}", "axis middle") for tick in ticks(left, right)]
    parts.append(text(_RIGHT + 12, height - 18, "%", "axis"))
    bounded = any(bar.bounds for bar in drawn)
    legend = "; whiskers: 95 % bounds of the change; band: less than detectable" if bounded else ""
    parts.append(text(16, height - 3, f"{metric}{legend}", "axis"))
    said = "; ".join(f"{bar.title} {bar.percent:.2f} %" for bar in drawn)
    return svg(height, parts, f"Waterfall of {metric}: {said}")


def _ends(bar: Bar) -> list[float]:
    if bar.before is None:
        return [bar.percent]
    return [
        bar.percent,
        bar.before,
        *(bar.before + bound for bound in bar.bounds or ()),
        *((bar.before - bar.detectable, bar.before + bar.detectable) if bar.detectable else ()),
    ]


def _bar(bar: Bar, y: float, x: Scale) -> list[str]:
    parts = [text(_LEFT - 10, y + 18, _short(bar.title), "axis end strong")]
    label = f"{bar.title}: {bar.percent:.2f} %"
    change = ""
    if bar.before is None:
        marks = [rect(x(bar.percent) - 2, y + 4, 4, _ROW - 10, "level")]
    else:
        difference = bar.percent - bar.before
        change = f"{difference:+.2f}"
        label += f", change {change} points"
        marks = []
        if bar.detectable:
            span = x(bar.before + bar.detectable) - x(bar.before - bar.detectable)
            marks.append(rect(x(bar.before - bar.detectable), y + 1, span, _ROW - 4, "unseen"))
            label += f"; {bar.detectable:.2f} points detectable"
        start, end = sorted((x(bar.before), x(bar.percent)))
        marks.append(
            rect(
                start,
                y + 7,
                max(end - start, 2),
                _ROW - 16,
                "loss" if difference < 0 else "gain" if difference > 0 else "level",
            )
        )
        if bar.bounds is not None:
            low, high = (x(bar.before + bound) for bound in bar.bounds)
            marks.append(line(low, y + _ROW / 2 - 1, high, y + _ROW / 2 - 1, "whisker"))
            label += f", 95 % bounds {bar.bounds[0]:+.2f} to {bar.bounds[1]:+.2f}"
    parts.append(titled(label, *marks))
    parts.append(text(_RIGHT + 12, y + 18, f"{bar.percent:.2f} %  {change}", "axis strong"))
    return parts


@dataclass(frozen=True, slots=True)
class Curve:
    """How accuracy falls as one layer is pruned.

    Attributes:
        layer: Its name.
        points: (share of the layer removed 0..1, metric in per cent), by share.
    """

    layer: str
    points: tuple[tuple[float, float], ...]

    def lost(self, base: float) -> float:
        """Points lost at worst against `base` per cent."""
        return max((base - percent for _, percent in self.points), default=0.0)


def sensitivity_chart(metric: str, base: float, curves: Sequence[Curve]) -> str:
    """Accuracy against the share that is removed, a line per layer; the most sensitive have colours.

    Args:
        metric: Name of what the curves show.
        base: The whole network's, per cent.
        curves: One per layer.
    """
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        return ""
    named = sorted(drawn, key=lambda curve: -curve.lost(base))[:_NAMED]
    low, high = _span([base, *(percent for curve in drawn for _, percent in curve.points)])
    most = max(share for curve in drawn for share, _ in curve.points)
    height, bottom = 300, 246
    x, y = scale(0, 100 * most, 56, WIDTH - 16), scale(low, high, bottom, 12)
    parts = [line(56, bottom, WIDTH - 16, bottom, "frame"), line(56, y(base), WIDTH - 16, y(base), "zero")]
    for curve in sorted(drawn, key=lambda curve: curve in named):  # coloured lines above the grey ones
        places = [(x(0), y(base)), *((x(100 * share), y(percent)) for share, percent in curve.points)]
        colour = f"s{named.index(curve)}" if curve in named else "other"
        parts.append(
            titled(f"{curve.layer}: loses {curve.lost(base):.2f} points at most", path(places, f"curve {colour}"))
        )
    parts += [text(x(tick), bottom + 16, f"{tick:g}", "axis middle") for tick in ticks(0, 100 * most)]
    parts += [text(48, y(tick) + 4, f"{tick:g}", "axis end") for tick in ticks(low, high)]
    parts.append(text(WIDTH - 16, bottom + 34, "% of the layer removed", "axis end"))
    parts.append(text(56, bottom + 34, f"{metric}, %", "axis"))
    keys = "".join(f'<span class="key s{n}">{escape(curve.layer)}</span>' for n, curve in enumerate(named))
    return (
        f'<p class="legend">{keys}</p>{svg(height, parts, f"{metric} against the share removed, {len(drawn)} layers")}'
    )


@dataclass(frozen=True, slots=True)
class Stair:
    """A pruned shape that was timed beside the unpruned network.

    Attributes:
        removed: Share of the multiply-accumulates that pruning removed, 0..1.
        speedup: How many times faster it is.
        low: Lower end of the 95 % bounds.
        high: Upper end.
        chosen: Whether it is the one that was taken.
    """

    removed: float
    speedup: float
    low: float
    high: float
    chosen: bool = False


def staircase_chart(stairs: Sequence[Stair], asked: float | None = None) -> str:
    """Speed-up against the share of multiply-accumulates removed, with what was asked for.

    Args:
        stairs: What was timed.
        asked: The speed-up that was asked for.
    """
    drawn = sorted(stairs, key=lambda stair: stair.removed)
    if not drawn:
        return ""
    low, high = _span([1.0, *(end for stair in drawn for end in (stair.low, stair.high)), *([asked] if asked else [])])
    right = 100 * drawn[-1].removed + 2
    height, bottom = 260, 206
    x, y = scale(0, right, 56, WIDTH - 16), scale(low, high, bottom, 12)
    parts = [line(56, bottom, WIDTH - 16, bottom, "frame")]
    if asked:
        parts.append(titled(f"asked for: {asked:.2f} times", line(56, y(asked), WIDTH - 16, y(asked), "zero")))
    parts.append(path([(x(0), y(1)), *((x(100 * stair.removed), y(stair.speedup)) for stair in drawn)], "curve s0"))
    for stair in drawn:
        place = x(100 * stair.removed)
        said = f"{100 * stair.removed:.1f} % removed: {stair.speedup:.2f} times faster"
        said += f" ({stair.low:.2f} to {stair.high:.2f})"
        whisker = line(place, y(stair.low), place, y(stair.high), "whisker")
        mark = dot(place, y(stair.speedup), "mark b" if stair.chosen else "mark a")
        parts.append(titled(f"{said}{', taken' if stair.chosen else ''}", whisker, mark))
    parts += [text(x(tick), bottom + 16, f"{tick:g}", "axis middle") for tick in ticks(0, right)]
    parts += [text(48, y(tick) + 4, f"{tick:g}", "axis end") for tick in ticks(low, high)]
    parts.append(text(WIDTH - 16, bottom + 34, "% of the multiply-accumulates removed", "axis end"))
    parts.append(text(56, bottom + 34, "times faster than unpruned", "axis"))
    return svg(height, parts, f"Speed-up of {len(drawn)} pruned shapes")


def _span(values: Sequence[float]) -> tuple[float, float]:
    """A little more than what the values cover, and never nothing."""
    low, high = min(values), max(values)
    pad = max(0.06 * (high - low), 0.05)
    return low - pad, high + pad


def _short(title: str) -> str:
    return title if len(title) <= _LONGEST else f"{title[: _LONGEST - 1]}…"
