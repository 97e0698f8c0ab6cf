"""A verdict as SARIF 2.1.0, the format that code scanning services read (OASIS, 2020).

Invariant: every check is a result. What failed or is worth a warning is of kind "fail"; what could not be decided is of
kind "open" and also a notification of level "error", because viewers hide results that are not failures, and an
undecided check must not look like a pass.
"""

from __future__ import annotations

import hashlib
from typing import Any

from edgepose import __version__
from edgepose.profiler.gate.files import check_name
from edgepose.profiler.gate.verdict import AccuracyOutcome, Check, LatencyOutcome, Verdict, word_of
from edgepose.storage import json_bytes

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_RULES = {
    "edgepose/fact": "A fact of the files, or memory, became worse than the rules allow",
    "edgepose/accuracy": "The candidate is less accurate on the same people",
    "edgepose/joint": "A joint was lost beyond doubt",
    "edgepose/latency": "The candidate is slower in paired processes",
}
_ORDER = list(_RULES)


def sarif_from_verdict(verdict: Verdict, location: str = "manifest.json") -> bytes:
    """SARIF with one result per check and one per joint that was lost.

    Args:
        verdict: The verdict.
        location: Relative path of a file that stands for the candidate; services refuse results without a place.
    """
    results = [_result(check, verdict, location) for check in verdict.checks]
    results += [
        _described(
            "edgepose/joint",
            joint.joint,
            f"{joint.joint} {joint.diff_points:+.2f} points (p {joint.p_holm:.2g} after Holm)",
            location,
            {"kind": "fail", "level": "warning"},
        )
        for joint in verdict.joints
        if joint.lost
    ]
    run = {
        "tool": {
            "driver": {
                "name": "edgepose",
                "version": __version__,
                "rules": [{"id": name, "shortDescription": {"text": text}} for name, text in _RULES.items()],
            }
        },
        "invocations": [
            {
                "executionSuccessful": verdict.verdict != "inconclusive",
                "exitCode": verdict.exit_code,
                "toolExecutionNotifications": _notifications(verdict),
            }
        ],
        "results": results,
        "properties": {
            "verdict": verdict.verdict,
            "baseline": verdict.baseline,
            "candidate": verdict.candidate,
            "rules": verdict.rules,
            "seed": verdict.seed,
        },
    }
    return json_bytes({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]})


def _notifications(verdict: Verdict) -> list[dict[str, Any]]:
    undecided = [
        {
            "level": "error",
            "message": {"text": f"{word_of(check)}: {check.text}"},
            "associatedRule": {"id": _rule_of(check), "index": _ORDER.index(_rule_of(check))},
        }
        for check in verdict.checks
        if check.outcome == "inconclusive"
    ]
    return undecided + [{"level": "note", "message": {"text": text}} for text in verdict.skipped]


def _result(check: Check, verdict: Verdict, location: str) -> dict[str, Any]:
    states = {
        "pass": {"kind": "pass", "level": "none"},
        "warn": {"kind": "fail", "level": "warning"},
        "fail": {"kind": "fail", "level": "error"},
        "inconclusive": {"kind": "open", "level": "none"},
    }
    text = f"{word_of(check)}: {check.text} ({verdict.candidate} against {verdict.baseline})"
    return _described(_rule_of(check), check_name(check), text, location, states[check.outcome])


def _described(rule: str, name: str, text: str, location: str, state: dict[str, str]) -> dict[str, Any]:
    physical = {"artifactLocation": {"uri": location}, "region": {"startLine": 1}}
    return {
        "ruleId": rule,
        "ruleIndex": _ORDER.index(rule),
        **state,
        "message": {"text": text},
        "locations": [{"physicalLocation": physical, "logicalLocations": [{"fullyQualifiedName": name}]}],
        # Tells a service that the finding of today is the one of yesterday: the check, not its numbers.
        "partialFingerprints": {"edgepose/v1": hashlib.sha256(f"{rule} {name}".encode()).hexdigest()},
    }


def _rule_of(check: Check) -> str:
    match check:
        case AccuracyOutcome():
            return "edgepose/accuracy"
        case LatencyOutcome():
            return "edgepose/latency"
        case _:
            return "edgepose/fact"
