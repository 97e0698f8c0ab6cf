"""SARIF: what the standard requires is there, nothing undecided looks like a pass, and nothing else is in it."""

from __future__ import annotations

from typing import Literal

import msgspec
import pytest

from edgepose import __version__
from edgepose.profiler.gate.sarif import sarif_from_verdict
from edgepose.profiler.gate.verdict import Verdict
from tests.conftest import Golden
from tests.profiler.verdicts import BAD, GOOD, HOSTILE, REFUSED, UNDECIDED

# The objects of SARIF 2.1.0 that are used, as its schema has them: required properties, enumerations, nothing besides.


class Strict(msgspec.Struct, forbid_unknown_fields=True, rename="camel"):
    pass


class Message(Strict):
    text: str


class ArtifactLocation(Strict):
    uri: str


class Region(Strict):
    start_line: int


class PhysicalLocation(Strict):
    artifact_location: ArtifactLocation
    region: Region


class LogicalLocation(Strict):
    fully_qualified_name: str


class Location(Strict):
    physical_location: PhysicalLocation
    logical_locations: list[LogicalLocation]


Level = Literal["none", "note", "warning", "error"]


class Result(Strict):
    message: Message
    rule_id: str
    rule_index: int
    kind: Literal["notApplicable", "pass", "fail", "review", "open", "informational"]
    level: Level
    locations: list[Location]
    partial_fingerprints: dict[str, str]


class RuleReference(Strict):
    id: str
    index: int


class Notification(Strict):
    message: Message
    level: Level
    associated_rule: RuleReference | None = None


class Invocation(Strict):
    execution_successful: bool
    exit_code: int
    tool_execution_notifications: list[Notification]


class Descriptor(Strict):
    id: str
    short_description: Message


class Driver(Strict):
    name: str
    version: str
    rules: list[Descriptor]


class Tool(Strict):
    driver: Driver


class Run(Strict):
    tool: Tool
    invocations: list[Invocation]
    results: list[Result]
    properties: dict[str, str | int]


class Log(msgspec.Struct, forbid_unknown_fields=True):
    version: Literal["2.1.0"]
    runs: list[Run]
    schema: str = msgspec.field(name="$schema")


def run_of(verdict: Verdict) -> Run:
    (run,) = msgspec.json.decode(sarif_from_verdict(verdict, "bundles/after/manifest.json"), type=Log).runs
    return run


@pytest.mark.parametrize("verdict", [GOOD, BAD, UNDECIDED, REFUSED, HOSTILE])
def test_every_form_of_verdict_is_valid(verdict: Verdict) -> None:
    run = run_of(verdict)
    rules = [rule.id for rule in run.tool.driver.rules]
    assert len(run.results) == len(verdict.checks) + sum(joint.lost for joint in verdict.joints)
    assert len({result.partial_fingerprints["edgepose/v1"] for result in run.results}) == len(run.results)
    for result in run.results:
        assert rules[result.rule_index] == result.rule_id
        # Section 3.27.10: a kind other than "fail" has the level "none".
        assert (result.kind == "fail") == (result.level != "none")
    assert run.invocations[0].exit_code == verdict.exit_code


def test_regressions_are_errors_and_lost_joints_are_named() -> None:
    results = {r.locations[0].logical_locations[0].fully_qualified_name: r for r in run_of(BAD).results}
    assert [results[name].level for name in ("limit engine_bytes", "accuracy pck_torso_0.2", "latency")] == [
        "error"
    ] * 3
    assert results["left_wrist"].rule_id == "edgepose/joint"
    assert "neck" not in results


@pytest.mark.parametrize(("verdict", "word"), [(UNDECIDED, "inconclusive"), (REFUSED, "refused")])
def test_what_is_undecided_is_open_and_a_notification_of_an_error(verdict: Verdict, word: str) -> None:
    run = run_of(verdict)
    assert [result.kind for result in run.results].count("open") == 1
    assert not run.invocations[0].execution_successful
    errors = [n for n in run.invocations[0].tool_execution_notifications if n.level == "error"]
    assert [note.message.text.split(":")[0] for note in errors] == [word]


def test_the_same_finding_keeps_its_fingerprint_whatever_the_numbers() -> None:
    before, after = (run_of(verdict).results[0].partial_fingerprints for verdict in (GOOD, BAD))
    assert before == after


@pytest.mark.parametrize(("name", "verdict"), [("inconclusive", UNDECIDED), ("refused", REFUSED), ("fail", BAD)])
def test_sarif_to_the_letter(golden: Golden, name: str, verdict: Verdict) -> None:
    text = sarif_from_verdict(verdict).decode().replace(f'"version": "{__version__}"', '"version": "0"')
    golden(f"gate/{name}.sarif", text)
