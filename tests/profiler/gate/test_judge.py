"""The gate as a pure function: right verdicts on simulated evidence, clear errors on evidence that does not fit."""

from __future__ import annotations

import dataclasses

import msgspec
import numpy as np
import pytest

from edgepose.errors import BadInput, RecipeError, SpecError
from edgepose.profiler.gate.judge import ArmEvidence, PairEvidence, decide, judge_accuracy, judge_latency
from edgepose.profiler.gate.rules import AccuracyRule, GateRules, LatencyRule, LimitRule, load_rules
from edgepose.profiler.gate.run import gather_latency
from edgepose.profiler.gate.verdict import LatencyOutcome, Verdict, overall
from tests.profiler.simulated import KEYPOINTS, Machine, record

RULE = LatencyRule()


def outcome_of(machine: Machine, rule: LatencyRule = RULE) -> LatencyOutcome:
    return judge_latency(*gather_latency(machine, rule), rule)


# ----------------------------------------------------------------------------------------------------------- latency


def test_no_slow_down_never_fails_under_heavy_tails() -> None:
    outcomes = [outcome_of(Machine(0.0, seed)).outcome for seed in range(40)]
    assert "fail" not in outcomes
    assert outcomes.count("pass") >= 38


@pytest.mark.parametrize("slow_down", [0.06, 0.10])
def test_real_slow_down_fails(slow_down: float) -> None:
    outcomes = [outcome_of(Machine(slow_down, seed)) for seed in range(10)]
    assert all(outcome.outcome == "fail" and outcome.confirmed for outcome in outcomes)


def test_five_per_cent_fails_nearly_always() -> None:
    outcomes = [outcome_of(Machine(0.05, seed)).outcome for seed in range(25)]
    assert outcomes.count("fail") >= 23
    assert "pass" not in outcomes


def test_three_per_cent_is_never_a_plain_pass() -> None:
    assert "pass" not in [outcome_of(Machine(0.03, seed)).outcome for seed in range(25)]


def test_a_speed_up_passes() -> None:
    assert outcome_of(Machine(-0.3, 0)).outcome == "pass"


def test_sample_grows_only_while_nothing_is_decided() -> None:
    calm, jumpy = Machine(0.0, 1), Machine(0.0, 2, between=0.08)
    assert outcome_of(calm).pairs == 6
    assert calm.asked == [(0, 6)]
    outcome_of(jumpy)
    assert jumpy.asked[:3] == [(0, 6), (6, 6), (12, 12)]


def test_processes_that_differ_wildly_end_inconclusive_not_in_an_alarm() -> None:
    outcomes = [outcome_of(Machine(0.0, seed, between=0.15)).outcome for seed in range(10)]
    assert "fail" not in outcomes
    assert outcomes.count("inconclusive") >= 8


def test_an_undecided_noisy_machine_says_that_it_is_noisy() -> None:
    outcome = outcome_of(Machine(0.02, 3, spread=0.6, between=0.1))
    assert (outcome.outcome, outcome.noisy) == ("inconclusive", True)
    assert "too noisy" in outcome.text
    assert overall([outcome]) == ("inconclusive", 6)


def test_an_alarm_that_does_not_repeat_is_no_fail() -> None:
    machine = Machine(0.10, 4, shift_after=6, shift=-0.095)
    outcome = outcome_of(machine)
    assert machine.asked == [(0, 6), (6, 6)]
    assert outcome.outcome != "fail"
    assert outcome.confirmed is False
    assert "did not repeat" in outcome.text


def test_an_alarm_without_fresh_pairs_is_inconclusive() -> None:
    outcome = judge_latency(Machine(0.1, 5)(0, 6), None, RULE)
    assert outcome.outcome == "inconclusive"


def test_bounds_widen_with_the_number_of_looks() -> None:
    comparison = Machine(0.0, 6, between=0.01)(0, 24)
    once = judge_latency(comparison, None, msgspec.structs.replace(RULE, looks=(24,)))
    thrice = judge_latency(comparison, None, RULE)
    assert thrice.bounds[0] < once.bounds[0]
    assert thrice.bounds[1] > once.bounds[1]


def test_samples_of_different_hosts_are_not_mixed() -> None:
    machine = Machine(0.1, 7)
    first, fresh = machine(0, 6), machine(6, 6)
    elsewhere = msgspec.structs.replace(fresh, host=msgspec.structs.replace(fresh.host, cpu="another"))
    with pytest.raises(BadInput, match="hosts"):
        judge_latency(first, elsewhere, RULE)


# ---------------------------------------------------------------------------------------------------------- accuracy


def test_a_record_against_itself_passes_without_any_difference() -> None:
    same = record(556)
    outcome = judge_accuracy(same, same, KEYPOINTS, AccuracyRule())
    assert outcome.outcome == "pass"
    assert outcome.diff_points == 0
    assert outcome.ci95 == (0, 0)
    assert outcome.margin_points == 0.5


def test_discordance_without_loss_does_not_fail() -> None:
    """Arms err on different joints; swapping them at random per person makes the true difference exactly zero."""
    before, after = record(556, lost=0.05), record(556, gained=0.06, lost_seed=9)
    outcomes = []
    for seed in range(40):
        swap = np.random.default_rng(seed).random(556) < 0.5
        first = np.where(swap[:, None], after.errors_px, before.errors_px)
        second = np.where(swap[:, None], before.errors_px, after.errors_px)
        arms = (dataclasses.replace(before, errors_px=first), dataclasses.replace(before, errors_px=second))
        outcomes.append(judge_accuracy(*arms, KEYPOINTS, AccuracyRule(draws=2000), seed=seed).outcome)
    assert "fail" not in outcomes
    assert outcomes.count("pass") >= 32


def test_five_points_lost_fail() -> None:
    outcome = judge_accuracy(record(556), record(556, lost=0.09), KEYPOINTS, AccuracyRule())
    assert outcome.outcome == "fail"
    assert -6 < outcome.diff_points < -4
    assert outcome.ci95[0] < outcome.diff_points < outcome.ci95[1] < 0


def test_predicted_power_is_the_observed_power() -> None:
    """Losses of just the size that the gate calls detectable are found about as often as it says."""
    rule = AccuracyRule(draws=2000)
    typical = judge_accuracy(record(300), record(300, lost=0.055, gained=0.03), KEYPOINTS, rule).detectable_points
    share = (typical / 100 + 0.45 * 0.03) / 0.55
    outcomes = [
        judge_accuracy(
            record(300, seed=s), record(300, seed=s, lost=share, gained=0.03, lost_seed=s + 99), KEYPOINTS, rule
        )
        for s in range(60)
    ]
    found = sum(outcome.outcome == "fail" for outcome in outcomes) / 60
    assert 0.75 <= found <= 1.0


def test_margin_grows_to_what_the_data_can_show_and_no_further() -> None:
    small = judge_accuracy(record(60), record(60, lost=0.03, gained=0.03), KEYPOINTS, AccuracyRule())
    assert small.margin_points == pytest.approx(small.detectable_points)
    assert 0.5 < small.margin_points < 5.0
    capped = judge_accuracy(
        record(60), record(60, lost=0.03, gained=0.03), KEYPOINTS, AccuracyRule(widest_pass_points=0.5)
    )
    assert capped.margin_points == 0.5
    assert capped.outcome == "inconclusive"


def test_few_people_decide_nothing_even_without_a_difference() -> None:
    assert judge_accuracy(record(10), record(10), KEYPOINTS, AccuracyRule()).outcome == "inconclusive"
    assert judge_accuracy(record(30), record(30), KEYPOINTS, AccuracyRule()).detectable_points > 1


def test_different_people_are_an_error() -> None:
    with pytest.raises(SpecError, match="same persons"):
        judge_accuracy(record(50), record(51), KEYPOINTS, AccuracyRule())


def test_nobody_is_an_error() -> None:
    with pytest.raises((BadInput, SpecError)):
        judge_accuracy(record(0), record(0), KEYPOINTS, AccuracyRule())


def test_a_prediction_that_is_not_a_number_is_wrong_not_left_out() -> None:
    before = record(100)
    errors = before.errors_px.copy()
    errors[:50][~np.isnan(errors[:50])] = np.inf
    outcome = judge_accuracy(before, dataclasses.replace(before, errors_px=errors), KEYPOINTS, AccuracyRule())
    assert outcome.outcome == "fail"
    assert outcome.joints == judge_accuracy(before, before, KEYPOINTS, AccuracyRule()).joints


def test_an_error_that_hides_as_unlabelled_is_noticed() -> None:
    before = record(100)
    errors = before.errors_px.copy()
    errors[3] = np.nan
    with pytest.raises(SpecError, match="same labels"):
        judge_accuracy(before, dataclasses.replace(before, errors_px=errors), KEYPOINTS, AccuracyRule())


# ----------------------------------------------------------------------------------------------------------- verdict

ACCURACY_ONLY = GateRules("accuracy-only", latency=None)


def verdict_of(after: ArmEvidence, rules: GateRules, *, slow_down: float = 0.0) -> Verdict:
    latency = confirmation = None
    if rules.latency is not None:
        latency, confirmation = gather_latency(Machine(slow_down, 0), rules.latency)
    before = ArmEvidence("before", record(556), {"engine_bytes": 1e6, "peak_memory_bytes": 1e8})
    return decide(before, after, PairEvidence(KEYPOINTS, latency, confirmation), rules)


def facts(engine: float = 1e6, memory: float = 1e8) -> dict[str, float]:
    return {"engine_bytes": engine, "peak_memory_bytes": memory}


@pytest.mark.parametrize("name", ["default", "ci-quick"])
def test_shipped_rules_pass_an_unchanged_candidate(name: str) -> None:
    verdict = verdict_of(ArmEvidence("after", record(556), facts()), load_rules(name))
    assert (verdict.verdict, verdict.exit_code, verdict.reasons) == ("pass", 0, ())


@pytest.mark.parametrize("name", ["default", "ci-quick"])
def test_shipped_rules_name_every_regression_and_exit_with_the_lowest_code(name: str) -> None:
    after = ArmEvidence("after", record(556, lost=0.1), facts(engine=2e6))
    verdict = verdict_of(after, load_rules(name), slow_down=0.3)
    assert (verdict.verdict, verdict.exit_code) == ("fail", 3)
    assert [reason.split()[0] for reason in verdict.reasons] == ["engine_bytes", "pck_torso_0.2", "latency"]


def test_slower_alone_exits_with_four() -> None:
    verdict = verdict_of(ArmEvidence("after", record(556), facts()), GateRules("r"), slow_down=0.1)
    assert (verdict.verdict, verdict.exit_code) == ("fail", 4)


def test_a_regression_is_not_hidden_by_an_undecided_check() -> None:
    rules = GateRules("r", accuracy=(AccuracyRule(widest_pass_points=0.5),))
    after = ArmEvidence("after", record(556, lost=0.04, gained=0.05), facts())
    verdict = verdict_of(after, rules, slow_down=0.1)
    assert verdict.accuracy is not None
    assert verdict.accuracy.outcome == "inconclusive"
    assert (verdict.verdict, verdict.exit_code) == ("fail", 4)


def test_undecided_never_becomes_a_pass() -> None:
    rules = msgspec.structs.replace(ACCURACY_ONLY, accuracy=(AccuracyRule(widest_pass_points=0.5),))
    verdict = verdict_of(ArmEvidence("after", record(556, lost=0.04, gained=0.05)), rules)
    assert (verdict.verdict, verdict.exit_code) == ("inconclusive", 7)


def test_one_joint_lost_is_a_warning_that_names_it() -> None:
    after = ArmEvidence("after", record(556, lost=0.12, joint="left_wrist"))
    rules = msgspec.structs.replace(
        ACCURACY_ONLY, accuracy=(AccuracyRule(fail_above_points=1.5, pass_below_points=2.0),)
    )
    verdict = verdict_of(after, rules)
    assert (verdict.verdict, verdict.exit_code) == ("warn", 0)
    assert [joint.joint for joint in verdict.joints if joint.lost] == ["left_wrist"]
    assert "left_wrist" in verdict.reasons[0]


def test_growth_has_to_pass_both_limits_to_fail() -> None:
    rules = GateRules("r", accuracy=(), latency=None, limits=(LimitRule("engine_bytes", 0.05, 200_000),))
    assert verdict_of(ArmEvidence("after", None, facts(engine=1.1e6)), rules).exit_code == 0
    assert verdict_of(ArmEvidence("after", None, facts(engine=1.3e6)), rules).exit_code == 4


LIMITS = GateRules("r", accuracy=(), latency=None)


def limited(before: dict[str, float], after: dict[str, float], *rules: LimitRule) -> Verdict:
    arms = ArmEvidence("before", facts=before), ArmEvidence("after", facts=after)
    return decide(*arms, PairEvidence(), msgspec.structs.replace(LIMITS, limits=rules))


@pytest.mark.parametrize(("after", "code"), [(0.99, 0), (0.985, 0), (0.97, 4), (1.0, 0)])
def test_where_more_is_better_less_is_what_fails(after: float, code: int) -> None:
    rule = LimitRule("executed_int8_share", 0.0, 0.01)
    verdict = limited({"executed_int8_share": 0.99}, {"executed_int8_share": after}, rule)
    assert verdict.exit_code == code
    assert "-0.0 % or 1.0 %, whichever is more" in verdict.limits[0].text


def test_fewer_multiplications_are_no_regression() -> None:
    verdict = limited({"macs": 2e8}, {"macs": 1e8}, LimitRule("macs", 0.005))
    assert verdict.exit_code == 0
    assert "200.0 M to 100.0 M (-50.0 %)" in verdict.limits[0].text


def test_a_precision_that_was_not_there_before_can_be_forbidden() -> None:
    verdict = limited({"macs.int8": 5e8}, {"macs.int8": 4e8, "macs.fp32": 1e8}, LimitRule("macs.fp32", 0.0))
    assert (verdict.exit_code, verdict.limits[0].baseline) == (4, 0)


def test_an_optional_rule_without_evidence_is_left_out_and_said_so() -> None:
    verdict = limited({"macs": 1e8}, {}, LimitRule("macs", 0.0, optional=True))
    assert (verdict.verdict, verdict.limits) == ("pass", ())
    assert verdict.skipped == ("macs was not checked: the candidate does not tell it",)


def test_every_fact_is_in_the_verdict_whether_or_not_a_rule_asks_for_it() -> None:
    verdict = limited({"macs": 1e8, "nodes.Conv": 3.0}, {"macs": 1e8, "nodes.Resize": 1.0})
    found = {fact.name: (fact.unit, fact.baseline, fact.candidate) for fact in verdict.facts}
    assert found == {"macs": ("MACs", 1e8, 1e8), "nodes.Conv": ("count", 3, 0), "nodes.Resize": ("count", 0, 1)}


def test_measured_memory_is_shown_behind_the_latency_and_files_before_everything() -> None:
    rules = GateRules("r", limits=(LimitRule("peak_memory_bytes", 0.1), LimitRule("engine_bytes", 0.1)))
    verdict = verdict_of(ArmEvidence("after", record(556), facts()), rules)
    assert [check.text.split()[0] for check in verdict.checks] == [
        "engine_bytes",
        "pck_torso_0.2",
        "latency",
        "peak_memory_bytes",
    ]


@pytest.mark.parametrize(
    "rules",
    [
        GateRules("r", accuracy=(), latency=None, limits=(LimitRule("engine_bytes", 0.05),)),
        GateRules("r", latency=None),
    ],
)
def test_rules_without_evidence_are_an_error(rules: GateRules) -> None:
    with pytest.raises(RecipeError, match="without evidence"):
        decide(ArmEvidence("before"), ArmEvidence("after"), PairEvidence(), rules)
    with pytest.raises(RecipeError, match="paired timings"):
        decide(ArmEvidence("before"), ArmEvidence("after"), PairEvidence(), GateRules("r", accuracy=()))
