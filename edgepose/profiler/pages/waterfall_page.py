"""The waterfall as sections of a page: accuracy step by step, costs, joints, slices, what was recorded before.

Invariant: every figure is the `Waterfall`'s; a step without one shows a dash here and its reason below the table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from edgepose.profiler.pages.charts import joint_chart
from edgepose.profiler.pages.markup import section, table
from edgepose.profiler.pages.step_charts import Bar, waterfall_chart
from edgepose.profiler.waterfall import Change, Latency, SliceFigures, Step, Waterfall
from edgepose.stats import Interval

_OPEN = 2  # metrics whose chart and table are not folded

DASH = "–"


def waterfall_sections(found: Waterfall) -> tuple[str, ...]:
    """The sections, without those that there is nothing to say in."""
    return tuple(
        part for part in (_accuracy(found), _costs(found), _joints(found), _slices(found), _recorded(found)) if part
    )


def _accuracy(found: Waterfall) -> str:
    if not any(step.measured for step in found.steps):
        missing = _unmeasured(found)
        return (
            section("Accuracy, step by step", "<p>Nobody was measured for this page.</p>", missing) if missing else ""
        )
    parts = [_summary(found)]
    for place, metric in enumerate(found.metrics):
        whole = _chart(found, metric) + _metric_table(found, metric)
        parts.append(whole if place < _OPEN else f"<details><summary>{escape(metric)}</summary>{whole}</details>")
    return section("Accuracy, step by step", *parts, _unmeasured(found))


def _summary(found: Waterfall) -> str:
    people = found.people
    who = (
        f"{people.persons} persons of {people.name}, {people.torso_persons} of them with a whole torso. "
        if people
        else ""
    )
    words = (
        "Changes are in points, over the same persons; their 95 % bounds come from a bootstrap over photographs. So "
        "many persons show a change of the detectable size nine times in ten; a smaller one says nothing either way."
    )
    lines = [f"<p>{escape(who)}{words}</p>"]
    if found.compressed and found.reference:
        step, base = found.step(found.compressed), found.step(found.reference)
        change = step.totals.get(found.metrics[0])
        if change is not None:
            lines.append(
                f"<p><strong>{escape(step.title)}: {_points(change.points)} points of {escape(found.metrics[0])}"
                f"</strong> against {escape(base.title)} (95 % bounds {_bounds(change)}); detectable "
                f"from {_detectable(change)}.</p>"
            )
    if found.reference and any(step.kind == "control" for step in found.steps):
        better = escape(found.step(found.reference).title)
        lines.append(f"<p>Totals are against the better of float network and control: {better}.</p>")
    return "".join(lines)


def _chart(found: Waterfall, metric: str) -> str:
    bars = []
    for step in found.steps:
        if metric not in step.metrics:
            continue
        change = step.changes.get(metric)
        percent = 100 * step.metrics[metric]
        bars.append(
            Bar(
                step.title,
                percent,
                None if change is None else percent - change.points,
                None if change is None or change.low is None or change.high is None else (change.low, change.high),
                None if change is None else change.detectable_points,
            )
        )
    base = found.step(found.reference).metrics.get(metric) if found.reference else None
    return waterfall_chart(metric, bars, None if base is None or not math.isfinite(base) else 100 * base)


def _metric_table(found: Waterfall, metric: str) -> str:
    head = ("step", metric, "change", "95 % bounds", "detectable", "total", "95 % bounds", "detectable")
    rows = []
    for step in found.steps:
        change, total = step.changes.get(metric), step.totals.get(metric)
        rows.append(
            (
                escape(step.title),
                percent(step.metrics.get(metric)),
                *(_change_cells(change)),
                *(_change_cells(total)),
            )
        )
    against = f"; totals are against {found.step(found.reference).title}" if found.reference else ""
    return table(head, rows, caption=f"{metric}: change against the step before, in points{against}")


def _change_cells(change: Change | None) -> tuple[str, str, str]:
    if change is None:
        return DASH, DASH, DASH
    return (
        f'<span title="against {escape(change.against)}">{_points(change.points)}</span>',
        _bounds(change),
        _detectable(change),
    )


def _unmeasured(found: Waterfall) -> str:
    rows = [f"<li>{escape(step.title)}: {escape(step.why)}</li>" for step in found.steps if step.why]
    return f"<h3>Not measured</h3><ul>{''.join(rows)}</ul>" if rows else ""


# --------------------------------------------------------------------------------------------------------------- costs


def _costs(found: Waterfall) -> str:
    rows = [
        (
            f"{escape(step.title)}<br><small>{escape(step.runs_in)}</small>",
            _scaled(step.costs.macs, 1e6, 1),
            _scaled(step.costs.params, 1e6, 3),
            _scaled(step.costs.size_bytes, 1e6, 2),
            DASH if step.costs.int8_share is None else f"{100 * step.costs.int8_share:.1f} %",
            *_latency_cells(step.costs.latency),
        )
        for step in found.steps
    ]
    if not any(cell != DASH for row in rows for cell in row[1:]):
        return ""
    head = ("step", "MMAC", "M parameters", "MB", "MACs in INT8", "ms", "times faster", "95 % bounds")
    parts = [table(head, rows, caption="One person per inference")]
    timed = [step.costs.latency for step in found.steps if step.costs.latency]
    if timed:
        first = next((latency.against for latency in timed if latency.against), "")
        base = f" Times faster than {found.step(first).title}." if first else ""
        parts.append(
            f"<p>Medians of {timed[0].processes} fresh processes each, which took turns on this machine, "
            f"threads: {timed[0].threads}.{escape(base)}</p>"
        )
    return section("Cost, step by step", *parts)


def _latency_cells(latency: Latency | None) -> tuple[str, str, str]:
    if latency is None:
        return DASH, DASH, DASH
    speed, low, high = latency.speedup, latency.low, latency.high
    return (
        f"{latency.median_ms:.3f}",
        DASH if speed is None else f"{speed:.2f}",
        DASH if low is None or high is None else f"{low:.2f} … {high:.2f}",
    )


def _scaled(value: float | None, unit: float, digits: int) -> str:
    return DASH if value is None else f"{value / unit:.{digits}f}"


# --------------------------------------------------------------------------------------------------- joints and slices


def _joints(found: Waterfall) -> str:
    if not found.joints:
        return ""
    measured = [step for step in found.steps if step.measured]
    span = max(1.0, *(abs(bound) for joint in found.joints for bound in joint.ci95))
    rows = [
        (
            escape(joint.joint.replace("_", " ")),
            f"{joint.labelled}",
            *(percent(step.joints.get(joint.joint)) for step in measured),
            _points(joint.diff_points),
            f"{joint.ci95[0]:+.2f} … {joint.ci95[1]:+.2f}",
            joint_chart(joint, span),
            f"{joint.p_holm:.3g}",
        )
        for joint in found.joints
    ]
    pair = f"{found.step(found.compressed).title} against {found.step(found.reference).title}"
    head = (
        "joint",
        "labelled",
        *(step.title for step in measured),
        "change",
        "95 % bounds",
        f"± {span:.1f} points",
        "p (Holm)",
    )
    return section("Joint by joint", table(head, rows, caption=f"{found.metrics[0]}; the change is that of {pair}"))


def _slices(found: Waterfall) -> str:
    measured = [step for step in found.steps if step.slices]
    if not measured:
        return ""
    parts = []
    for place, metric in enumerate(found.metrics):
        whole = _slice_table(found, measured, metric) + _slice_changes(measured, metric)
        parts.append(whole if place < _OPEN else f"<details><summary>{escape(metric)}</summary>{whole}</details>")
    words = "<p>The same persons, their photographs changed on purpose; ± is half of the 95 % interval.</p>"
    return section("Slice by slice", words, *parts)


def _slice_table(found: Waterfall, measured: Sequence[Step], metric: str) -> str:
    last = next((step for step in measured if step.name == found.compressed), measured[-1])
    base = found.step(found.reference).title if found.reference else "nothing"
    rows = []
    for row in last.slices:
        total = row.totals.get(metric)
        cells = [_interval(there.metrics.get(metric)) if (there := _same(step, row)) else DASH for step in measured]
        change = (DASH, DASH) if total is None else (_points(total.estimate), _ends(total))
        rows.append((_slice_name(row), f"{row.counted_joints}", *cells, *change))
    head = ("slice", "joints", *(step.title for step in measured), "total", "95 % bounds")
    return table(head, rows, caption=f"{metric}, %; the total is the change of {last.title} against {base}")


def _slice_changes(measured: Sequence[Step], metric: str) -> str:
    steps = [step for step in measured if any(row.changes for row in step.slices)]
    if not steps:
        return ""
    rows = []
    for row in steps[-1].slices:
        cells = []
        for step in steps:
            there = _same(step, row)
            change = there.changes.get(metric) if there else None
            cells.append(DASH if change is None else f"{_points(change.estimate)} ({_ends(change)})")
        rows.append((_slice_name(row), *cells))
    whole = table(
        ("slice", *(step.title for step in steps)), rows, caption=f"{metric}: change against the step before, points"
    )
    return f"<details><summary>{escape(metric)}, change of each step</summary>{whole}</details>"


def _same(step: Step, row: SliceFigures) -> SliceFigures | None:
    return next((there for there in step.slices if (there.slice, there.joints) == (row.slice, row.joints)), None)


def _slice_name(row: SliceFigures) -> str:
    return escape(row.slice.replace("_", " ")) + (" · hidden joints" if row.joints == "hidden" else "")


# ------------------------------------------------------------------------------------------------------------ recorded


def _recorded(found: Waterfall) -> str:
    steps = [step for step in found.steps if step.recorded]
    if not steps:
        return ""
    names = list(dict.fromkeys(name for step in steps for name in step.recorded))
    rows = [(escape(step.title), *(_figure(name, step.recorded.get(name)) for name in names)) for step in steps]
    words = (
        "<p>Measured on dev, the part of the training split held out for choices, by the stage that made each step: "
        "other persons than those above, unless these are dev as well, and without bounds.</p>"
    )
    bars = []
    if not any(step.measured for step in found.steps):
        before: float | None = None
        for step in steps:
            value = step.recorded.get(found.metrics[0], math.nan) if found.metrics else math.nan
            if math.isfinite(value):
                bars.append(Bar(step.title, 100 * value, before))
                before = 100 * value
    chart = waterfall_chart(f"{found.metrics[0]} on dev, as recorded", bars) if bars else ""
    return section("Recorded when it was made", words, chart, table(("step", *names), rows, caption="dev, as recorded"))


# --------------------------------------------------------------------------------------------------------------- cells


def percent(value: float | None) -> str:
    """A share as per cent; a dash for none."""
    return DASH if value is None or not math.isfinite(value) else f"{100 * value:.2f} %"


def _figure(name: str, value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:.2f} px" if name.endswith("_px") else percent(value)


def _points(value: float) -> str:
    return f"{value:+.2f}" if math.isfinite(value) else DASH


def _bounds(change: Change) -> str:
    return DASH if change.low is None or change.high is None else f"{change.low:+.2f} … {change.high:+.2f}"


def _detectable(change: Change) -> str:
    return DASH if change.detectable_points is None else f"{change.detectable_points:.2f}"


def _ends(interval: Interval) -> str:
    finite = math.isfinite(interval.low) and math.isfinite(interval.high)
    return f"{interval.low:+.2f} … {interval.high:+.2f}" if finite else DASH


def _interval(interval: Interval | None) -> str:
    if interval is None or not math.isfinite(interval.estimate):
        return DASH
    half = 100 * (interval.high - interval.low) / 2
    return f"{100 * interval.estimate:.1f}" + (f" ± {half:.1f}" if math.isfinite(half) else "")
