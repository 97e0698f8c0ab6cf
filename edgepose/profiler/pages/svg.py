"""Marks and axes that the charts are drawn with, as text.

Invariant: marks are made of numbers and class names; words are escaped, and colours and fonts are the page's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH = 720
"""Of every chart, in its own units; the page scales it."""

Scale = Callable[[float], float]
"""From a value to a place in the chart."""


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """Maps the values `low` to `high` to the places `start` to `end`."""
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def ticks(left: float, right: float) -> list[float]:
    """Round numbers inside an interval, five or so."""
    step = 10 ** math.floor(math.log10(max(right - left, 1e-12) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (right - left) / (step * factor) <= 7)
    first = math.ceil(left / step)
    return [round(number * step, 12) for number in range(first, math.floor(right / step) + 1)]


def rect(x: float, y: float, width: float, height: float, name: str) -> str:
    """A rectangle of the class `name`."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" class="{name}"/>'


def line(x1: float, y1: float, x2: float, y2: float, name: str) -> str:
    """A line of the class `name`."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{name}"/>'


def path(points: Sequence[tuple[float, float]], name: str) -> str:
    """Straight lines from point to point."""
    places = " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<path d="M{places}" class="{name}"/>'


def dot(x: float, y: float, name: str) -> str:
    """A mark at a point."""
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{name}"/>'


def text(x: float, y: float, words: str, name: str) -> str:
    """Words; the class says where they are anchored: "end", "middle", or the start."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{name}">{escape(words)}</text>'


def titled(title: str, *parts: str) -> str:
    """Marks that say `title` when pointed at."""
    return f"<g><title>{escape(title)}</title>{''.join(parts)}</g>"


def svg(height: float, parts: Sequence[str], label: str) -> str:
    """A whole chart; `label` says in words what it shows."""
    body = "".join(parts)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" class="chart" role="img" aria-label="{escape(label)}">{body}</svg>'
