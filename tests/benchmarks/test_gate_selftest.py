"""The gate's test of itself: verdicts from the rounds on record are the gate's own, records are never mixed or lost."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from benchmarks import gate_accuracy, gate_selftest
from benchmarks.areas.gate import CLAIMS, EXIT_TESTS
from benchmarks.gate_selftest import Arms, Gate, append, counted, read_gates, verdict_of
from edgepose.errors import IntegrityError, UsageError
from edgepose.profiler.gate.judge import judge_accuracy, judge_latency
from edgepose.profiler.gate.rules import AccuracyRule, LatencyRule, load_rules
from edgepose.profiler.gate.run import gather_latency
from edgepose.timing.record import ModelArm
from tests.conftest import REPOSITORY
from tests.profiler.simulated import KEYPOINTS, Machine, record

RULE = load_rules("default").latency or LatencyRule()
ARM = ModelArm("the engine", "nowhere.onnx", "onnxruntime", "int8")
ARMS = Arms(ARM, ARM, {"kind": "aa", "network": "nowhere.onnx", "threads": 1, "host": "h", "cost": 0.0})


def gated(slow_down: float, seed: int) -> tuple[Gate, str]:
    """A gate on a simulated machine, and what the gate itself says of it."""
    machine = Machine(slow_down, seed)
    sample, again = gather_latency(machine, RULE)
    rounds = [[] if found is None else [list(pair) for pair in found.log_ratios()] for found in (sample, again)]
    gate = Gate(sample.protocol.seed, 1.0, rounds[0], rounds[1])
    return gate, judge_latency(sample, again, RULE).outcome


@pytest.mark.parametrize("slow_down", [0.0, 0.03, 0.05, 0.1])
def test_a_verdict_from_the_record_is_the_gates_own(slow_down: float) -> None:
    for seed in range(6):
        gate, said = gated(slow_down, seed)
        assert verdict_of(gate, RULE) == said


def test_gates_are_appended_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "aa.jsonl"
    said = []
    for seed in range(3):
        gate, outcome = gated(0.0 if seed else 0.1, seed)
        append(path, ARMS, RULE, gate)
        said.append(outcome)
    head, gates = read_gates(path)
    assert head["kind"] == "aa"
    assert len(gates) == 3
    found = counted("aa", RULE, tmp_path)
    assert found.gates == 3
    assert found.outcomes == {outcome: said.count(outcome) for outcome in set(said)}
    assert found.text.startswith("3 gates: ")


def test_gates_of_another_machine_or_rule_are_not_mixed_in(tmp_path: Path) -> None:
    gate, _ = gated(0.0, 0)
    append(tmp_path / "aa.jsonl", ARMS, RULE, gate)
    before = (tmp_path / "aa.jsonl").read_bytes()
    elsewhere = Arms(ARM, ARM, {**ARMS.head, "host": "another"})
    with pytest.raises(UsageError, match="gates under another host"):
        append(tmp_path / "aa.jsonl", elsewhere, RULE, gate)
    with pytest.raises(UsageError, match="gates under another rule"):
        append(tmp_path / "aa.jsonl", ARMS, msgspec.structs.replace(RULE, alpha=0.01), gate)
    assert (tmp_path / "aa.jsonl").read_bytes() == before


def test_a_file_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "aa.jsonl").write_text(json.dumps({"kind": "aa"}) + '\n{"number": "x"}\n')
    with pytest.raises(IntegrityError, match="a line that is no gate"):
        counted("aa", RULE, tmp_path)


def used(pid: int) -> float:
    """Seconds of processor time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_load_ends_with_the_block() -> None:
    with gate_selftest.loaded() as process:
        before = used(process.pid)
        time.sleep(0.5)
        assert process.poll() is None
        assert used(process.pid) - before > 0.1  # it does compute, as far as other work lets it
    assert process.poll() is not None


# Accuracy


def test_arms_that_change_places_differ_by_nothing_on_the_whole() -> None:
    first, second = record(300), record(300, lost=0.2, gained=0.2)
    rng = np.random.default_rng(0)
    a, b = gate_accuracy.swapped(first, second, rng)
    assert np.array_equal(np.nan_to_num(a.errors_px + b.errors_px), np.nan_to_num(first.errors_px + second.errors_px))
    changed = (a.errors_px != first.errors_px) & ~np.isnan(first.errors_px)
    assert 0.3 < changed.any(axis=1).mean() < 0.7  # of half the people, some joints differ


def test_people_of_a_photograph_are_drawn_together() -> None:
    first, second = record(300), record(300, lost=0.2, gained=0.2)
    a, b = gate_accuracy.drawn_again(first, second, np.random.default_rng(0))
    assert np.array_equal(a.image_id, b.image_id)
    assert np.array_equal(np.isnan(a.errors_px), np.isnan(b.errors_px))
    assert len(np.unique(a.image_id)) == len(np.unique(first.image_id))


def test_spoilt_records_lose_what_was_asked_for() -> None:
    base = record(300)
    base = replace(base, scores=np.random.default_rng(0).random(base.scores.shape))
    rule = AccuracyRule(metric="pck_torso_0.2")
    lost = gate_accuracy.without_joint(base, 3, 1.0, np.random.default_rng(0))
    judged = judge_accuracy(base, lost, KEYPOINTS, rule)
    assert judged.diff_points < -3
    assert gate_accuracy.predicted_power(judged, rule) > 0.99
    same = judge_accuracy(base, base, KEYPOINTS, rule)
    assert gate_accuracy.predicted_power(same, rule) < 0.01
    unsure = gate_accuracy.without_unsure(base, 0.2)
    assert np.isinf(unsure.errors_px).sum() > 0.1 * np.isfinite(base.errors_px).sum()


# Claims


def test_bars_are_those_of_the_issue() -> None:
    bars = {claim.name.partition(".")[2]: claim.bar for claim in CLAIMS}
    assert bars.pop("power_prediction_error") == "<= 0.15"  # "agrees with", in numbers
    assert bars.pop("exit_codes") == f">= {len(EXIT_TESTS)}"
    assert bars == {
        "aa_fail": "== 0", "aa_pass_share": ">= 0.9", "power_5pct": ">= 0.95", "power_10pct": ">= 1.0",
        "pass_at_3pct": "== 0", "accuracy_null_fail": "== 0", "accuracy_pass_share": ">= 0.8", "cell_s": "<= 60",
    }  # fmt: skip


def test_tests_of_exit_codes_exist() -> None:
    assert sorted(EXIT_TESTS) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 130]
    for test in EXIT_TESTS.values():
        file, _, name = test.partition("::")
        assert f"def {name}(" in (REPOSITORY / "tests" / "cli" / file).read_text(encoding="utf-8")
