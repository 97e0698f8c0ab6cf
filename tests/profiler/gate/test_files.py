"""Forms of a verdict: each names every check, and none turns an undecided one into a pass."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import msgspec
import pytest

from edgepose.profiler.gate.files import json_from_verdict, junit_from_verdict, lines_from_verdict, verdict_from_json
from edgepose.profiler.gate.judge import ArmEvidence, PairEvidence, decide
from edgepose.profiler.gate.rules import AccuracyRule, GateRules, LimitRule
from edgepose.profiler.gate.run import gather_latency
from edgepose.profiler.gate.verdict import Verdict
from tests.profiler.simulated import KEYPOINTS, Machine, record

RULES = GateRules("r", accuracy=(AccuracyRule(), AccuracyRule("auc")), limits=(LimitRule("engine_bytes", 0.05),))


def verdict(*, slow_down: float = 0.0, lost: float = 0.0, engine: float = 1e6, name: str = "after") -> Verdict:
    assert RULES.latency is not None
    latency, confirmation = gather_latency(Machine(slow_down, 0), RULES.latency)
    before = ArmEvidence("before", record(300), {"engine_bytes": 1e6})
    after = ArmEvidence(name, record(300, lost=lost), {"engine_bytes": engine})
    return decide(before, after, PairEvidence(KEYPOINTS, latency, confirmation), RULES)


@pytest.fixture(scope="module")
def bad() -> Verdict:
    return verdict(slow_down=0.1, lost=0.1, engine=2e6)


def test_json_holds_the_published_fields(bad: Verdict) -> None:
    written = msgspec.json.decode(json_from_verdict(bad))
    assert written["verdict"] == "fail"
    assert written["exit_code"] == 3
    accuracy, latency = written["accuracy"], written["latency"]
    assert accuracy["diff_points"] < 0
    assert accuracy["ci95"][0] < accuracy["diff_points"] < accuracy["ci95"][1]
    assert accuracy["detectable_points"] > 0
    assert latency["ci95"][0] < latency["ratio"] < latency["ci95"][1]


def test_json_reads_back_as_the_same_verdict(bad: Verdict) -> None:
    assert verdict_from_json(json_from_verdict(bad)) == bad


def test_terminal_lines_name_every_check_and_the_seed(bad: Verdict) -> None:
    lines = lines_from_verdict(bad)
    assert [line[:4] for line in lines[1:5]] == ["FAIL"] * 4
    assert "seed 0" in lines[0]
    assert lines[-1] == "verdict: fail (exit code 3)"


def test_junit_counts_failures_and_is_well_formed(bad: Verdict) -> None:
    root = ET.fromstring(junit_from_verdict(bad))
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("4", "4", "0")
    cases = [case.get("name") for case in root.iter("testcase")]
    assert cases == ["limit engine_bytes", "accuracy pck_torso_0.2", "accuracy auc", "latency"]
    details = {case.get("name"): case.findtext("failure") or "" for case in root.iter("testcase")}
    assert "diff_points" in details["accuracy auc"]
    assert "unit: bytes" in details["limit engine_bytes"]


def test_junit_of_a_pass_has_no_failures_and_says_what_was_found() -> None:
    root = ET.fromstring(junit_from_verdict(verdict()))
    assert (root.get("failures"), root.get("errors")) == ("0", "0")
    assert len(root.findall(".//system-out")) == 4


def test_an_undecided_check_is_an_error_in_junit_not_a_pass() -> None:
    few = ArmEvidence("x", record(10))
    undecided = decide(few, few, PairEvidence(KEYPOINTS), GateRules("r", latency=None))
    root = ET.fromstring(junit_from_verdict(undecided))
    assert (root.get("failures"), root.get("errors")) == ("0", "1")
    assert root.find(".//error") is not None


def test_names_with_control_characters_do_not_break_the_xml() -> None:
    root = ET.fromstring(junit_from_verdict(verdict(name='a<b>&"\x00\x1b')))
    assert "a<b>&" in (root.find(".//testcase").get("classname") or "")  # type: ignore[union-attr]
