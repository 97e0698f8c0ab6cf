"""Charts of the report as inline SVG: ratio with bounds, histograms of latency, a bar of stages, per-joint differences.

Invariant: charts are text made of numbers alone; colours and fonts come from the page's classes, so that one chart
suits light and dark, and every mark carries a <title> that says its number in words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from edgepose.profiler.gate.verdict import JointOutcome, LatencyOutcome
from edgepose.profiler.pages.svg import WIDTH, Scale, line, rect, scale, svg, text, ticks
from edgepose.timing.record import LatencyComparison, change_percent

_BINS = 60
_SHOWN_QUANTILE = 0.99  # histograms end here; what lies beyond is counted in words


def ratio_chart(comparison: LatencyComparison, outcome: LatencyOutcome) -> str:
    """The median change of every process pair, and the overall change with the bounds that decide."""
    medians = [math.expm1(float(np.median(pair))) for pair in comparison.log_ratios()]
    low, high = (bound - 1 for bound in outcome.bounds)
    thresholds = (outcome.fail_above, outcome.pass_below)
    ends = [*medians, low, high, 0.0, *thresholds]
    pad = 0.08 * (max(ends) - min(ends))
    left, right = min(ends) - pad, max(ends) + pad
    rows = len(medians)
    height = 74 + 13 * rows
    x = scale(left, right, 96, WIDTH - 16)
    parts = [
        rect(x(left), 10, x(thresholds[0]) - x(left), height - 34, "zone-good"),
        rect(x(thresholds[0]), 10, x(thresholds[1]) - x(thresholds[0]), height - 34, "zone-warn"),
        rect(x(thresholds[1]), 10, x(right) - x(thresholds[1]), height - 34, "zone-bad"),
        line(x(0), 10, x(0), height - 24, "zero"),
    ]
    for row, value in enumerate(medians):
        y = 24 + 13 * row
        label = f"pair {row + 1}: {change_percent(1 + value)}"
        parts.append(text(88, y + 4, f"pair {row + 1}", "axis end"))
        parts.append(f'<circle cx="{x(value):.1f}" cy="{y}" r="4" class="mark a"><title>{label}</title></circle>')
    y = 34 + 13 * rows
    label = f"overall {change_percent(outcome.ratio)}, bounds {change_percent(1 + low)} to {change_percent(1 + high)}"
    parts.append(text(88, y + 4, "overall", "axis end strong"))
    parts.append(line(x(low), y, x(high), y, "bounds"))
    centre = x(outcome.ratio - 1)
    diamond = f"{centre - 6:.1f},{y} {centre:.1f},{y - 6} {centre + 6:.1f},{y} {centre:.1f},{y + 6}"
    parts.append(f'<polygon points="{diamond}" class="overall"><title>{label}</title></polygon>')
    parts += _percent_axis(x, left, right, height - 8)
    return svg(height, parts, f"Change of latency: {label}")


def histogram_chart(series: Sequence[tuple[str, NDArray[np.floating]]], unit: str = "ms") -> str:
    """Overlaid histograms, each with its median marked.

    Args:
        series: One or two (label, (N,) values).
        unit: Printed on the axis.
    """
    filled = [(label, np.asarray(values, np.float64)) for label, values in series if len(values)]
    if not filled:
        return ""
    right = max(float(np.quantile(values, _SHOWN_QUANTILE)) for _, values in filled)
    left = min(float(values.min()) for _, values in filled)
    right = max(right, left * 1.02 + 1e-9)
    edges = np.linspace(left, right, _BINS + 1)
    shares = [np.histogram(values, edges)[0] / len(values) for _, values in filled]
    height, base = 210, 170
    x, y = scale(left, right, 16, WIDTH - 16), scale(0, max(float(s.max()) for s in shares), base, 24)
    parts = [line(16, base, WIDTH - 16, base, "frame")]
    for (label, values), share, name in zip(filled, shares, "ab", strict=False):
        parts.append(_steps(edges, share, x, y, name))
        median = float(np.median(values))
        beyond = int((values > right).sum())
        title = f"{label}: median {median:.3f} {unit}, {len(values)} calls, {beyond} beyond the right edge"
        parts.append(f"<g><title>{escape(title)}</title>{line(x(median), 18, x(median), base, f'median {name}')}</g>")
    parts += [text(x(t), base + 16, f"{t:g}", "axis middle") for t in ticks(left, right)]
    parts.append(text(WIDTH - 16, base + 32, f"{unit} per call; the slowest 1 % lie outside", "axis end"))
    return svg(height, parts, "Histogram of latency")


def stage_chart(names: Sequence[str], values_ms: Sequence[float]) -> str:
    """One bar cut into the stages of a call."""
    whole = sum(values_ms)
    if whole <= 0:
        return ""
    parts, left = [], 0.0
    for number, (name, value) in enumerate(zip(names, values_ms, strict=True)):
        width = value / whole * WIDTH
        title = f"{escape(name)} {value:.3f} ms ({100 * value / whole:.0f} %)"
        parts.append(f"<g><title>{title}</title>{rect(left, 6, max(width - 2, 1), 30, f'stage s{number % 4}')}</g>")
        if width > 6 * len(f"{name} {value:.2f} ms"):
            parts.append(text(left + 8, 25, f"{name} {value:.2f} ms", "inside"))
        left += width
    label = ", ".join(f"{name} {value:.3f} ms" for name, value in zip(names, values_ms, strict=True))
    keys = "".join(f'<span class="key s{n % 4}">{escape(part)}</span>' for n, part in enumerate(label.split(", ")))
    return f'<p class="legend">{keys}</p>{svg(42, parts, f"Time per stage: {label}")}'


def joint_chart(joint: JointOutcome, span: float) -> str:
    """The difference of one joint with its 95 % bounds, on an axis of ±`span` points shared by all rows."""
    x, width = scale(-span, span, 4, 176), 180
    low, high = (min(max(bound, -span), span) for bound in joint.ci95)
    name = "lost" if joint.lost else "kept"
    title = f"{joint.joint} {joint.diff_points:+.2f} points, {joint.ci95[0]:+.2f} to {joint.ci95[1]:+.2f}"
    centre = x(min(max(joint.diff_points, -span), span))
    return (
        f'<svg viewBox="0 0 {width} 18" class="spark" role="img" aria-label="{escape(title)}"><title>{escape(title)}'
        f"</title>{line(x(0), 0, x(0), 18, 'zero')}{line(x(low), 9, x(high), 9, f'bounds {name}')}"
        f'<circle cx="{centre:.1f}" cy="9" r="4" class="mark {name}"/></svg>'
    )


def _steps(edges: NDArray[np.float64], share: NDArray[np.float64], x: Scale, y: Scale, name: str) -> str:
    points = [f"M{x(edges[0]):.1f},{y(0):.1f}"]
    for value, left, right in zip(share, edges[:-1], edges[1:], strict=True):
        points.append(f"L{x(left):.1f},{y(value):.1f} L{x(right):.1f},{y(value):.1f}")
    points.append(f"L{x(edges[-1]):.1f},{y(0):.1f} Z")
    return f'<path d="{" ".join(points)}" class="area {name}"/>'


def _percent_axis(x: Scale, left: float, right: float, y: float) -> list[str]:
    return [
        text(x(tick / 100), y, f"{tick:+g} %" if tick else "0 %", "axis middle")
        for tick in ticks(100 * left, 100 * right)
    ]
