"""Sections of a page made from what stages reported: shapes timed, precisions compared, layers restored or scanned.

Invariant: reports are plain JSON from any version, and searched by shape: one that does not look as expected is left
out here (the page shows it whole elsewhere), never guessed at.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, TypeVar

import msgspec

from edgepose.profiler.pages.markup import section, table
from edgepose.profiler.pages.step_charts import Curve, Stair, sensitivity_chart, staircase_chart

T = TypeVar("T")

_LEVELS = 3  # of a report that are searched


class _Timing(msgspec.Struct):
    speedup: float
    low: float
    high: float
    ms: float
    pairs: int


class _Stair(msgspec.Struct):
    macs_left: float
    timing: _Timing
    chosen: bool = False


class _Staircase(msgspec.Struct):
    asked_speedup: float
    stairs: list[_Stair]


class _Achieved(msgspec.Struct):
    achieved: _Timing
    predicted: _Timing
    text: str


class _Precisions(msgspec.Struct):
    kept: str
    text: str
    absent: dict[str, str]
    compared: list[dict[str, Any]] = []


class _Trial(msgspec.Struct):
    layer: str
    gain: float
    cost: float


class _Given(msgspec.Struct):
    layer: str
    lost: float


class _Restoration(msgspec.Struct):
    unit: str | None
    lost: float
    trials: list[_Trial]
    path: list[_Given]
    met: bool


def stage_sections(reports: Mapping[str, Any]) -> tuple[str, ...]:
    """All sections that a bundle's reports have something for."""
    parts = (_staircases(reports), _precisions(reports), _restorations(reports))
    return tuple(part for part in parts if part)


def _found(reports: Mapping[str, Any], kind: type[T]) -> Iterator[tuple[str, T]]:
    """Everything in the reports that looks like a `kind`, with the name of the report it is in."""
    for name, report in reports.items():
        for value in _mappings(report, _LEVELS):
            try:
                yield name, msgspec.convert(value, kind)
            except msgspec.ValidationError:
                continue


def _mappings(value: Any, levels: int) -> Iterator[Mapping[str, Any]]:
    if isinstance(value, Mapping) and levels:
        yield value
        for inner in value.values():
            yield from _mappings(inner, levels - 1)


# -------------------------------------------------------------------------------------------------------------- speed


def _staircases(reports: Mapping[str, Any]) -> str:
    parts = []
    for _, found in _found(reports, _Staircase):
        stairs = [
            Stair(1 - stair.macs_left, stair.timing.speedup, stair.timing.low, stair.timing.high, stair.chosen)
            for stair in found.stairs
        ]
        rows = [
            (
                f"{100 * (1 - stair.macs_left):.1f} %",
                f"{stair.timing.ms:.3f}",
                f"{stair.timing.speedup:.2f}",
                f"{stair.timing.low:.2f} … {stair.timing.high:.2f}",
                f"{stair.timing.pairs}",
                "taken" if stair.chosen else "",
            )
            for stair in found.stairs
        ]
        head = ("MACs removed", "ms", "times faster", "95 % bounds", "pairs", "")
        parts += [
            staircase_chart(stairs, found.asked_speedup),
            table(head, rows, caption="Pruned shapes that were timed"),
        ]
    parts += [f"<p>{escape(found.text)}</p>" for _, found in _found(reports, _Achieved)]
    return section("Aiming at a latency", *parts) if parts else ""


def _precisions(reports: Mapping[str, Any]) -> str:
    parts = []
    for name, found in _found(reports, _Precisions):
        parts.append(f"<h3>{escape(name)}</h3><p>{escape(found.text)}</p>")
        rows = [_precision_row(row, found.kept) for row in found.compared]
        if rows:
            head = ("precision", "MB", "MACs in INT8", "shift px", "time over the most accurate", "95 % bounds", "")
            parts.append(table(head, rows, caption=f"{name}: engines of one network, timed in turns"))
        parts += [f"<p>No {escape(what)}: {escape(why)}</p>" for what, why in found.absent.items()]
    return section("Precisions compared", *parts) if parts else ""


def _precision_row(row: Mapping[str, Any], kept: str) -> tuple[str, ...]:
    bounds = row.get("ci95_to_first")
    ends = [_number(end, ".2f") for end in bounds] if isinstance(bounds, list) else []
    return (
        escape(str(row.get("precision", ""))),
        _number(row.get("bytes"), ".2f", 1e-6),
        _number(row.get("int8_share"), ".1f", 100) + " %",
        _number(row.get("shift_px"), ".3f"),
        _number(row.get("ratio_to_first", 1.0), ".2f"),
        " … ".join(ends) or "–",
        "kept" if row.get("precision") == kept else "",
    )


def _number(value: Any, form: str, factor: float = 1.0) -> str:
    return f"{factor * value:{form}}" if isinstance(value, int | float) and math.isfinite(value) else "–"


# ------------------------------------------------------------------------------------------------------------- layers


def _restorations(reports: Mapping[str, Any]) -> str:
    parts = []
    for name, found in _found(reports, _Restoration):
        end = "the budget holds" if found.met else "the budget does not hold"
        words = f"{name}: {found.lost:.2f} points lost with all layers integer; {len(found.path)} given back, {end}."
        parts.append(f"<p>{escape(words)}</p>")
        given = [(escape(step.layer), f"{step.lost:.2f}") for step in found.path]
        if given:
            parts.append(table(("layer", "points lost from there on"), given, caption="Given back to float, in order"))
        rows = [(escape(trial.layer), f"{trial.gain:+.2f}", f"{trial.cost:.4g}") for trial in found.trials]
        if rows:
            whole = table(
                ("layer", "points gained", f"costs, {found.unit}"), rows, caption="Each layer given back by itself"
            )
            parts.append(f"<details><summary>{len(rows)} layers tried</summary>{whole}</details>")
    return section("Layers given back to float", *parts) if parts else ""


class ScanRow(msgspec.Struct, frozen=True):
    """One layer pruned alone.

    Attributes:
        layer: Its name.
        ratio: Share of it that was removed, 0..1.
        pck: What the network reached then, 0..1; None where nobody could be measured.
    """

    layer: str
    ratio: float
    pck: float | None


class Scan(msgspec.Struct, frozen=True):
    """A sensitivity scan as its file holds it; what else stands in the file is not needed here.

    Attributes:
        metric: Name of `pck`.
        base: The whole network's, 0..1; None where nobody could be measured.
        rows: One per layer and ratio.
    """

    metric: str
    base: float | None
    rows: tuple[ScanRow, ...]


def sensitivity_section(scan: Scan, source: str) -> str:
    """What pruning each layer alone costs.

    Args:
        scan: The figures.
        source: Where they come from, a file's name for instance.
    """
    if scan.base is None:
        words = f"{source}: nobody could be measured by {scan.metric}."
        return section("Sensitivity of layers", f"<p>{escape(words)}</p>")
    base = 100 * scan.base
    points: dict[str, dict[float, float]] = {}
    for row in scan.rows:
        if row.pck is not None and math.isfinite(row.pck):
            points.setdefault(row.layer, {})[row.ratio] = 100 * row.pck
    curves = [Curve(layer, tuple(sorted(there.items()))) for layer, there in points.items()]
    curves.sort(key=lambda curve: -curve.lost(base))
    shares = sorted({share for there in points.values() for share in there})
    rows = [
        (
            escape(curve.layer),
            *(f"{points[curve.layer][share] - base:+.2f}" if share in points[curve.layer] else "–" for share in shares),
        )
        for curve in curves
    ]
    head = ("layer", *(f"{100 * share:g} % removed" for share in shares))
    caption = f"Change of {scan.metric} in points when one layer alone is pruned; the most sensitive first"
    words = (
        f"{source}: the whole network has {base:.2f} % {scan.metric}. One layer pruned at a time, nothing fine-tuned."
    )
    fold = f"<details><summary>{len(rows)} layers as a table</summary>{table(head, rows, caption=caption)}</details>"
    return section(
        "Sensitivity of layers", f"<p>{escape(words)}</p>", sensitivity_chart(scan.metric, base, curves), fold
    )
