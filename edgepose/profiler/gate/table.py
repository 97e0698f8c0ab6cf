"""A verdict as rows: the table of terminals, the Markdown of pull requests and step summaries, and annotations.

Invariant: every form is made from the same `Verdict` and computes no number of its own; names from outside cannot break
out of the cell they stand in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from edgepose.profiler.facts import allowance, spelt
from edgepose.profiler.gate.files import check_name
from edgepose.profiler.gate.verdict import (
    AccuracyOutcome,
    Check,
    Conditions,
    FactPair,
    JointOutcome,
    LatencyOutcome,
    LimitOutcome,
    Verdict,
    word_of,
)
from edgepose.timing.record import change_percent

HEAD = ("", "check", "baseline", "candidate", "change", "95 % bounds", "allowed")
_FACTS_SHOWN = 40  # of those that differ: a summary is read by people


class Row(NamedTuple):
    """One check, each cell as text; the names are those of `HEAD`."""

    outcome: str
    check: str
    baseline: str
    candidate: str
    change: str
    bounds: str
    allowed: str


class Annotation(NamedTuple):
    """What is shown beside a pull request."""

    level: Literal["notice", "warning", "error"]
    title: str
    text: str


def rows_from_verdict(verdict: Verdict) -> list[Row]:
    """One row per check, in the order of `Verdict.checks`."""
    return [_row(check) for check in verdict.checks]


def annotations_from_verdict(verdict: Verdict) -> list[Annotation]:
    """One annotation per check that is not a plain pass, and one per rule that was left out.

    An undecided check ends the program with an error code, and so is an error here.
    """
    found = [
        Annotation("warning" if check.outcome == "warn" else "error", f"edgepose gate: {word_of(check)}", check.text)
        for check in verdict.checks
        if check.outcome != "pass"
    ]
    return found + [Annotation("notice", "edgepose gate: not checked", text) for text in verdict.skipped]


def markdown_from_verdict(verdict: Verdict) -> str:
    """GitHub-flavoured Markdown: the verdict, every check, what lies behind it folded away."""
    names = f"{_code(verdict.candidate)} against {_code(verdict.baseline)}, rules {_code(verdict.rules)}"
    parts = [
        f"### edgepose gate: {verdict.verdict}",
        f"{names}, seed {verdict.seed}, exit code {verdict.exit_code}",
        _table(
            HEAD,
            [(f"**{row.outcome}**", _code(row.check), *map(_plain, row[2:])) for row in rows_from_verdict(verdict)],
        ),
    ]
    if verdict.reasons or verdict.skipped:
        parts.append("\n".join(f"- {_plain(text)}" for text in (*verdict.reasons, *verdict.skipped)))
    if verdict.joints:
        parts.append(_fold("Joint by joint", _joint_table(verdict.joints)))
    changed = [fact for fact in verdict.facts if fact.baseline != fact.candidate]
    if changed:
        parts.append(_fold(f"Facts of the files that differ: {len(changed)}", _fact_table(changed)))
    if verdict.conditions is not None:
        parts.append(_fold("Conditions", _condition_list(verdict.conditions)))
    return "\n\n".join(parts) + "\n"


def _row(check: Check) -> Row:
    word, name = word_of(check), check_name(check)
    match check:
        case AccuracyOutcome():
            return Row(
                word,
                name,
                f"{100 * check.baseline:.2f} %",
                f"{100 * check.candidate:.2f} %",
                f"{check.diff_points:+.2f} points",
                f"{check.ci95[0]:+.2f} to {check.ci95[1]:+.2f}",
                f"loss surely below {check.margin_points:.2f}; shows losses from {check.detectable_points:.2f}",
            )
        case LatencyOutcome():
            return Row(
                word,
                name,
                f"{check.baseline_ms:.3f} ms",
                f"{check.candidate_ms:.3f} ms",
                change_percent(check.ratio),
                f"{change_percent(check.ci95[0])} to {change_percent(check.ci95[1])}",
                f"surely below {change_percent(1 + check.pass_below)}",
            )
        case LimitOutcome():
            return Row(
                word,
                name,
                spelt(check.baseline, check.unit),
                spelt(check.candidate, check.unit),
                change_percent(check.candidate / check.baseline if check.baseline else math.nan),
                "median of processes" if check.measured else "exact",
                allowance(check.better, check.unit, check.fail_above, check.fail_above_absolute),
            )


def _joint_table(joints: Sequence[JointOutcome]) -> str:
    head = ("joint", "labelled", "baseline", "candidate", "points", "95 % bounds", "p (Holm)")
    rows = [
        (
            f"**{_plain(joint.joint)}**, lost" if joint.lost else _plain(joint.joint),
            f"{joint.labelled}",
            f"{100 * joint.baseline:.1f} %",
            f"{100 * joint.candidate:.1f} %",
            f"{joint.diff_points:+.2f}",
            f"{joint.ci95[0]:+.2f} to {joint.ci95[1]:+.2f}",
            f"{joint.p_holm:.3g}",
        )
        for joint in joints
    ]
    return _table(head, rows)


def _fact_table(facts: Sequence[FactPair]) -> str:
    rows = [
        (_code(fact.name), *("–" if value is None else spelt(value, fact.unit) for value in pair))
        for fact in facts[:_FACTS_SHOWN]
        for pair in [(fact.baseline, fact.candidate)]
    ]
    more = len(facts) - len(rows)
    text = _table(("fact", "baseline", "candidate"), rows)
    return f"{text}\n\nand {more} more in the JSON" if more > 0 else text


def _condition_list(conditions: Conditions) -> str:
    protocol = conditions.protocol
    lines = [
        f"baseline {_code(conditions.baseline_digest[:16])} on {_plain(conditions.baseline_engine)}",
        f"candidate {_code(conditions.candidate_digest[:16])} on {_plain(conditions.candidate_engine)}",
        f"host {_code(conditions.host[:16])}: {_plain(conditions.device)}, {conditions.cores} cores",
    ]
    if protocol is not None:
        lines.append(
            f"timed {_plain(conditions.timed or 'callables')}: threads {protocol.threads or 'all'}, batch "
            f"{protocol.batch}, {protocol.blocks} blocks of at least {protocol.block_ms:g} ms"
        )
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{_plain(title)}</summary>\n\n{body}\n\n</details>"


def _code(text: str) -> str:
    """A code span: nothing in it is markup, and no @name in it calls anybody."""
    return "`" + _one_line(text).replace("`", "'").replace("|", r"\|") + "`"


def _plain(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|#~@])", r"\\\1", _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(re.sub(r"[\x00-\x1f\x7f]", " ", text).split())
