"""The report: verdict, tables, charts and pictures in one HTML file that needs nothing else and no network.

Invariant: text from outside (names, paths, error texts) is escaped, and the page loads nothing: style, charts and
pictures are all inside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import resources
from string import Template
from typing import Any

import numpy as np

from edgepose.profiler.gate.files import check_name
from edgepose.profiler.gate.verdict import AccuracyOutcome, JointOutcome, LatencyOutcome, Verdict
from edgepose.profiler.pages.charts import histogram_chart, joint_chart, ratio_chart, stage_chart
from edgepose.profiler.pages.markup import badge, data_uri, section, table
from edgepose.profiler.pages.waterfall_page import waterfall_sections
from edgepose.profiler.waterfall import Waterfall
from edgepose.timing.record import LatencyComparison, ProfileRecord, call_times_ms, change_percent

_WORDS = {
    "pass": "Pass",
    "warn": "Pass, with a warning",
    "fail": "Regression",
    "inconclusive": "Inconclusive",
}
_DEPTH = 4  # levels of a stage's report that are unfolded


@dataclass(frozen=True, slots=True)
class Picture:
    """Pictures shown side by side.

    Attributes:
        caption: One line about them.
        panels: (label, PNG or JPEG bytes), left to right.
    """

    caption: str
    panels: Sequence[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Report:
    """What goes on the page; sections without content are left out.

    Attributes:
        title: Heading.
        subtitle: One line below it.
        facts: Short facts about the bundle: name → value.
        verdict: The gate's verdict.
        latency: The timings behind it.
        profiles: Engines profiled alone.
        metrics: Rows of the accuracy table: what was evaluated → metric → value.
        stages: Reports of the stages of a compilation, as the bundle's manifest holds them.
        pictures: Photographs with poses drawn on them.
        pictures_heading: What stands above them.
        waterfall: What every step from the float network to the engines cost.
        extra: Further sections, HTML.
    """

    title: str
    subtitle: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    verdict: Verdict | None = None
    latency: LatencyComparison | None = None
    profiles: Sequence[ProfileRecord] = ()
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    stages: Mapping[str, Any] = field(default_factory=dict)
    pictures: Sequence[Picture] = ()
    pictures_heading: str = "Pictures"
    waterfall: Waterfall | None = None
    extra: Sequence[str] = ()


def render_report(report: Report) -> str:
    """The whole page.

    Raises:
        ImageError: A picture is neither PNG nor JPEG.
    """
    sections = [
        _verdict(report.verdict) if report.verdict else "",
        *(waterfall_sections(report.waterfall) if report.waterfall else ()),
        _facts(report.facts),
        _metrics(report.metrics),
        _accuracy(report.verdict) if report.verdict else "",
        _latency(report.latency, report.verdict.latency if report.verdict else None) if report.latency else "",
        *(_profile(record) for record in report.profiles),
        *report.extra,
        _pictures(report.pictures_heading, report.pictures),
        _stages(report.stages),
    ]
    template = resources.files("edgepose.profiler.pages").joinpath("templates/report.html")
    page = Template(template.read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(report.title), subtitle=escape(report.subtitle), body="\n".join(part for part in sections if part)
    )


def _verdict(verdict: Verdict) -> str:
    rows = [(badge(check.outcome), escape(check_name(check)), escape(check.text)) for check in verdict.checks]
    return (
        f'<section class="verdict {verdict.verdict}"><p class="word">{_WORDS[verdict.verdict]}</p>'
        f"<p>{escape(verdict.candidate)} against {escape(verdict.baseline)} · rules {escape(verdict.rules)} · "
        f"seed {verdict.seed} · exit code {verdict.exit_code}</p>"
        f"{table(('outcome', 'check', 'what was found'), rows, 'text')}</section>"
    )


def _facts(facts: Mapping[str, str]) -> str:
    if not facts:
        return ""
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return section("What this is", f"<dl>{items}</dl>")


def _metrics(metrics: Mapping[str, Mapping[str, float]]) -> str:
    if not metrics:
        return ""
    names = list(dict.fromkeys(name for row in metrics.values() for name in row))
    rows = [
        (escape(label), *(_metric(name, values.get(name, math.nan)) for name in names))
        for label, values in metrics.items()
    ]
    return section("Accuracy", table(("", *names), rows))


def _metric(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:.2f} px" if name.endswith("_px") else f"{100 * value:.2f} %"


def _accuracy(verdict: Verdict) -> str:
    outcomes = [outcome for outcome in (verdict.accuracy, *verdict.other_accuracy) if outcome]
    if not outcomes:
        return ""
    rows = [_accuracy_row(outcome) for outcome in outcomes]
    head = ("metric", "baseline", "candidate", "difference", "95 % bounds", "detectable loss", "pass below", "")
    note = (
        "<p>Differences are candidate minus baseline in points, over the same people; bounds come from a bootstrap "
        "over people. A loss smaller than the detectable one would probably not have been noticed on this data.</p>"
    )
    return section("Accuracy, candidate against baseline", table(head, rows), note, _joints(verdict.joints))


def _accuracy_row(outcome: AccuracyOutcome) -> Sequence[str]:
    return (
        escape(outcome.metric),
        f"{100 * outcome.baseline:.2f} %",
        f"{100 * outcome.candidate:.2f} %",
        f"{outcome.diff_points:+.2f}",
        f"{outcome.ci95[0]:+.2f} … {outcome.ci95[1]:+.2f}",
        f"{outcome.detectable_points:.2f}",
        f"{outcome.margin_points:.2f}",
        badge(outcome.outcome),
    )


def _joints(joints: Sequence[JointOutcome]) -> str:
    if not joints:
        return ""
    span = max(1.0, *(abs(bound) for joint in joints for bound in joint.ci95))
    rows = [
        (
            escape(joint.joint.replace("_", " ")),
            f"{joint.labelled}",
            f"{100 * joint.baseline:.1f} %",
            f"{100 * joint.candidate:.1f} %",
            f"{joint.diff_points:+.2f}",
            f"{joint.ci95[0]:+.2f} … {joint.ci95[1]:+.2f}",
            joint_chart(joint, span),
            f"{joint.p_holm:.3g}",
        )
        for joint in joints
    ]
    head = (
        "joint",
        "labelled",
        "baseline",
        "candidate",
        "difference",
        "95 % bounds",
        f"± {span:.1f} points",
        "p (Holm)",
    )
    return f"<h3>Joint by joint</h3>{table(head, rows)}"


def _latency(comparison: LatencyComparison, outcome: LatencyOutcome | None) -> str:
    traces = [
        (arm.label, np.concatenate([call_times_ms(trace, comparison.protocol) for trace in traces]))
        for arm, traces in (
            (comparison.a, [pair.a for pair in comparison.pairs]),
            (comparison.b, [pair.b for pair in comparison.pairs]),
        )
    ]
    protocol, low, high = comparison.protocol, *comparison.ci95
    summary = (
        f"<p>Candidate over baseline: <strong>{change_percent(comparison.ratio)}</strong> "
        f"(95 % bounds {change_percent(low)} to {change_percent(high)}), {comparison.a_ms:.3f} ms to "
        f"{comparison.b_ms:.3f} ms. {len(comparison.pairs)} pairs of fresh processes took turns in {protocol.blocks} "
        f"rounds each, blocks of at least {protocol.block_ms:g} ms in random order; rounds spread by "
        f"{100 * comparison.pair_spread:.1f} %.</p>"
    )
    chart = ratio_chart(comparison, outcome) if outcome and outcome.pairs == len(comparison.pairs) else ""
    legend = "".join(
        f'<span class="key {name}">{escape(label)}</span>' for name, (label, _) in zip("ab", traces, strict=True)
    )
    return section(
        "Latency, candidate against baseline",
        summary,
        chart,
        f'<h3>Every call</h3><p class="legend">{legend}</p>{histogram_chart(traces)}',
        f"<p>{_host_line(comparison.host)}</p>",
    )


def _profile(record: ProfileRecord) -> str:
    whole_ms = record.samples_ns.array().sum(axis=1) / 1e6
    rows = [
        (
            escape(percentile.name),
            "–" if percentile.value_ms is None else f"{percentile.value_ms:.3f} ms",
            f"needs {percentile.needed} calls"
            if percentile.low_ms is None
            else f"{percentile.low_ms:.3f} … {percentile.high_ms:.3f}",
        )
        for percentile in record.latency
    ]
    facts, protocol = record.facts, record.protocol
    details = {
        "throughput": f"{record.persons_per_s:.1f} people per second, {record.people} per frame",
        "protocol": f"{len(whole_ms)} calls in {protocol.duration_s:g} s, {facts.threads} threads, frames of "
        f"{protocol.frame_hw[1]} × {protocol.frame_hw[0]}",
        "start": f"{facts.load_ms:.0f} ms to load, first frame {facts.first_call_ms:.2f} ms",
        "memory": f"peak {facts.peak_rss_bytes / 1e6:.0f} MB, steady {facts.steady_rss_bytes / 1e6:.0f} MB",
        "processor": f"{record.cpu_share:.2f} cores busy, load average {record.load_average[0]:.1f} to "
        f"{record.load_average[1]:.1f}",
        "disturbances": f"{facts.preemptions} preemptions, {facts.page_faults} page faults from disk",
        "host": _host_line(record.host),
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in details.items())
    return section(
        f"Profile of {record.label}: {record.backend} {record.precision}",
        table(("frame to poses", "time", "95 % bounds"), rows),
        "<h3>Time per stage</h3>",
        stage_chart(record.stages, record.stage_ms),
        f"<h3>Every call</h3>{histogram_chart([(record.label, whole_ms)])}<dl>{items}</dl>",
    )


def _host_line(host: Any) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in host.libraries.items())
    return f"{host.cpu}, {host.physical_cores} cores, {host.os}; {libraries}"


def _pictures(heading: str, pictures: Sequence[Picture]) -> str:
    if not pictures:
        return ""
    figures = []
    for picture in pictures:
        panels = "".join(
            f'<div><img src="{data_uri(content)}" alt="{escape(label)}"><span>{escape(label)}</span></div>'
            for label, content in picture.panels
        )
        caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
        figures.append(f'<figure><div class="panels">{panels}</div>{caption}</figure>')
    return section(heading, *figures)


def _stages(stages: Mapping[str, Any]) -> str:
    if not stages:
        return ""
    folds = [
        f"<details><summary>{escape(name)}</summary>{_value(value, _DEPTH)}</details>" for name, value in stages.items()
    ]
    return section("How it was made", *folds)


def _value(value: Any, depth: int) -> str:
    """Any JSON value as nested definition lists."""
    if isinstance(value, Mapping) and depth and value:
        items = "".join(f"<dt>{escape(str(key))}</dt><dd>{_value(item, depth - 1)}</dd>" for key, item in value.items())
        return f"<dl>{items}</dl>"
    if isinstance(value, list | tuple) and depth and any(isinstance(item, Mapping | list | tuple) for item in value):
        return "<ol>" + "".join(f"<li>{_value(item, depth - 1)}</li>" for item in value) + "</ol>"
    if isinstance(value, list | tuple):
        return escape(", ".join(_scalar(item) for item in value))
    return escape(_scalar(value))


def _scalar(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
