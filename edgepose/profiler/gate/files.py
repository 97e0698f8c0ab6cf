"""A verdict for people and for machines: terminal lines, JSON, JUnit XML.

Invariant: every form is made from the same `Verdict`, names every check, and computes no number of its own.
"""

from __future__ import annotations

import re
from typing import Any
from xml.etree import ElementTree as ET

import msgspec

from edgepose.profiler.gate.verdict import AccuracyOutcome, Check, LatencyOutcome, LimitOutcome, Verdict, word_of
from edgepose.storage import json_bytes

_MARKS = {"pass": "PASS", "warn": "WARN", "fail": "FAIL", "inconclusive": "????"}
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def json_from_verdict(verdict: Verdict) -> bytes:
    """Indented JSON with the fields of `Verdict`; what cannot be a JSON number is null."""
    return json_bytes(verdict)


def verdict_from_json(data: bytes) -> Verdict:
    """Reads back what `json_from_verdict` wrote.

    Raises:
        msgspec.DecodeError: It is something else.
    """
    return msgspec.json.decode(data, type=Verdict)


def lines_from_verdict(verdict: Verdict) -> list[str]:
    """Lines for a terminal: one per check, then the lost joints, then the verdict."""
    lines = [f"{verdict.candidate} against {verdict.baseline}, rules {verdict.rules}, seed {verdict.seed}"]
    lines += [f"{_MARKS[check.outcome]}  {check.text}" for check in verdict.checks]
    lost = [f"{joint.joint} {joint.diff_points:+.1f}" for joint in verdict.joints if joint.lost]
    if lost:
        lines.append(f"      joints lost beyond doubt, in points: {', '.join(lost)}")
    lines += [f"      {text}" for text in verdict.skipped]
    lines.append(f"verdict: {verdict.verdict} (exit code {verdict.exit_code})")
    return lines


def junit_from_verdict(verdict: Verdict) -> bytes:
    """JUnit XML with one test case per check.

    A failed check is a failure, and an undecided one an error, since CI systems count a skipped test as good.
    """
    checks = verdict.checks
    failed = sum(check.outcome == "fail" for check in checks)
    undecided = sum(check.outcome == "inconclusive" for check in checks)
    totals = {"tests": str(len(checks)), "failures": str(failed), "errors": str(undecided)}
    root = ET.Element("testsuites", totals)
    suite = ET.SubElement(root, "testsuite", {"name": "edgepose gate", **totals})
    properties = ET.SubElement(suite, "properties")
    for name in ("baseline", "candidate", "rules", "seed", "verdict", "exit_code"):
        value = _xml_text(str(getattr(verdict, name)))
        ET.SubElement(properties, "property", {"name": name, "value": value})
    for check in checks:
        _test_case(suite, check, _xml_text(f"{verdict.candidate} against {verdict.baseline}"))
    if verdict.skipped:
        ET.SubElement(suite, "system-out").text = _xml_text("\n".join(verdict.skipped))
    ET.indent(root)
    return bytes(ET.tostring(root, encoding="utf-8", xml_declaration=True)) + b"\n"


def _test_case(suite: ET.Element, check: Check, classname: str) -> None:
    case = ET.SubElement(suite, "testcase", {"name": check_name(check), "classname": classname})
    text = _xml_text(check.text)
    match check.outcome:
        case "fail":
            ET.SubElement(case, "failure", {"message": text, "type": "regression"}).text = _details(check)
        case "inconclusive":
            ET.SubElement(case, "error", {"message": text, "type": word_of(check)}).text = _details(check)
        case "warn" | "pass":
            word = "warning: " if check.outcome == "warn" else ""
            ET.SubElement(case, "system-out").text = f"{word}{text}"


def check_name(check: Check) -> str:
    """The name of a check in reports: "accuracy pck_torso_0.2", "latency", "limit engine_bytes"."""
    match check:
        case AccuracyOutcome():
            return f"accuracy {check.metric}"
        case LatencyOutcome():
            return "latency"
        case LimitOutcome():
            return f"limit {check.metric}"


def _details(check: Check) -> str:
    fields: dict[str, Any] = msgspec.to_builtins(check)
    return "\n".join(f"{name}: {_xml_text(str(value))}" for name, value in fields.items())


def _xml_text(text: str) -> str:
    """Without the control characters that XML 1.0 cannot hold; they come in with file names."""
    return _NOT_XML.sub("�", text)
