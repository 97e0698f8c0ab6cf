"""The gate: from two accuracy records, paired timings and rules to a verdict.

Invariant: pure. Equal evidence and rules give an equal verdict; nothing here measures, reads or writes, so that a
verdict can be recomputed from stored records years later.

The mathematics, with sources, is in docs/gate.md. In short: FAIL when a lower bound says it is worse than allowed, PASS
when an upper bound says it is not, WARN when it is surely a little worse and surely not too much, and INCONCLUSIVE
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from edgepose import stats
from edgepose.errors import RecipeError, SpecError
from edgepose.pose import metrics
from edgepose.profiler.accuracy import AccuracyRecord, joint_errors, require_same_persons
from edgepose.profiler.facts import allowance, known_fact, spelt, value_of
from edgepose.profiler.gate.rules import AccuracyRule, GateRules, LatencyRule, LimitRule
from edgepose.profiler.gate.verdict import (
    AccuracyOutcome,
    Conditions,
    FactPair,
    JointOutcome,
    LatencyOutcome,
    LimitOutcome,
    Outcome,
    Verdict,
    in_order,
    overall,
)
from edgepose.spec import Keypoints
from edgepose.timing.record import LatencyComparison, change_percent, merged

_DESIGN_EFFECT = 2.0  # joints of one person err together: so many of them weigh as much as one independent joint


@dataclass(frozen=True, slots=True)
class ArmEvidence:
    """What is known about one arm.

    Attributes:
        name: What it is called.
        accuracy: Its predictions on the labelled persons, where they were made.
        facts: Values of `edgepose.profiler.facts`, each in its unit.
    """

    name: str
    accuracy: AccuracyRecord | None = None
    facts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PairEvidence:
    """What is known about the two arms together.

    Attributes:
        keypoints: The keypoint set of both accuracy records.
        latency: Candidate (arm B) against baseline (arm A).
        confirmation: The same on fresh pairs, measured because `latency` alone says FAIL.
        conditions: What was compared, where and how.
    """

    keypoints: Keypoints | None = None
    latency: LatencyComparison | None = None
    confirmation: LatencyComparison | None = None
    conditions: Conditions | None = None


def decide(
    baseline: ArmEvidence, candidate: ArmEvidence, together: PairEvidence, rules: GateRules, *, seed: int = 0
) -> Verdict:
    """Judges a candidate against a baseline.

    Args:
        baseline: What is known about the baseline.
        candidate: What is known about the candidate.
        together: What was measured on both at once.
        rules: What counts as worse.
        seed: Of the bootstrap.

    Raises:
        RecipeError: The rules ask for something that there is no evidence of.
        SpecError: The two accuracy records are not of the same persons.
    """
    limits, skipped = judge_limits(baseline.facts, candidate.facts, rules)
    accuracy = _judge_accuracies(baseline, candidate, together.keypoints, rules, seed)
    joints: tuple[JointOutcome, ...] = ()
    if accuracy and baseline.accuracy and candidate.accuracy and together.keypoints:
        joints = judge_joints(baseline.accuracy, candidate.accuracy, together.keypoints, rules, seed=seed)
        accuracy = (_warned(accuracy[0], joints), *accuracy[1:])
    latency = None
    if rules.latency is not None:
        if together.latency is None:
            raise missing_evidence(rules, "latency", "paired timings")
        latency = judge_latency(together.latency, together.confirmation, rules.latency)
    checks = in_order(accuracy, latency, limits)
    verdict, exit_code = overall(checks)
    return Verdict(
        verdict=verdict,
        exit_code=exit_code,
        reasons=tuple(check.text for check in checks if check.outcome != "pass"),
        baseline=baseline.name,
        candidate=candidate.name,
        rules=rules.name,
        accuracy=accuracy[0] if accuracy else None,
        latency=latency,
        limits=limits,
        other_accuracy=accuracy[1:],
        joints=joints,
        seed=seed,
        facts=fact_pairs(baseline.facts, candidate.facts),
        skipped=skipped,
        conditions=together.conditions,
    )


# ---------------------------------------------------------------------------------------------------------- accuracy


def judge_accuracy(
    baseline: AccuracyRecord, candidate: AccuracyRecord, keypoints: Keypoints, rule: AccuracyRule, *, seed: int = 0
) -> AccuracyOutcome:
    """Compares one metric over the same persons, by a bootstrap that draws the people of an image together.

    Raises:
        SpecError: The records are of different persons, the metric does not exist for them, or no joint counts.
    """
    require_same_persons(baseline, candidate)
    base, base_counted = _image_sums(baseline, keypoints, rule.metric)
    cand, cand_counted = _image_sums(candidate, keypoints, rule.metric)
    if not np.array_equal(base_counted, cand_counted):
        raise SpecError("accuracy records", found="other labelled joints in either", expected="the same labels in both")
    joints = base_counted.sum()
    if joints == 0:
        raise SpecError(f"metric {rule.metric}", found="no joint that counts", expected="labelled joints")
    persons = int((base_counted.sum(axis=1) > 0).sum())
    columns = [values.sum(axis=1, keepdims=True) for values in (base, cand, base_counted)]
    pairs = stats.paired_bootstrap(*columns, seed=seed, draws=rule.draws, clusters=baseline.image_id)
    difference = 100 * float(pairs.difference[0])
    low, high = (100 * float(bound[0]) for bound in pairs.bounds(rule.alpha))
    ci_low, ci_high = (100 * float(bound[0]) for bound in pairs.bounds(0.025))
    # Where hardly a joint changed, the bootstrap sees no spread at all; what was not seen in n joints may still be as
    # frequent as ln(1/alpha)/n (the "rule of three").
    unseen = 100 * math.log(1 / rule.alpha) * _DESIGN_EFFECT / float(joints)
    resolution = stats.detectable_change(100 * float(pairs.standard_error[0]), alpha=rule.alpha, power=rule.power)
    detectable = rule.fail_above_points + max(resolution, unseen)
    loss_bounds = (min(-high, -difference), max(-low, -difference + unseen))
    margin = min(max(rule.pass_below_points, detectable), rule.widest_pass_points)
    outcome = _zone(loss_bounds, rule.fail_above_points, margin) if persons >= rule.least_persons else "inconclusive"
    return AccuracyOutcome(
        metric=rule.metric,
        outcome=outcome,
        baseline=float(pairs.baseline[0]),
        candidate=float(pairs.candidate[0]),
        diff_points=difference,
        ci95=(ci_low, ci_high),
        loss_bounds=loss_bounds,
        fail_above_points=rule.fail_above_points,
        margin_points=margin,
        detectable_points=detectable,
        persons=persons,
        joints=int(joints),
        text=f"{rule.metric} {difference:+.2f} points (95 % bounds {ci_low:+.2f} to {ci_high:+.2f}, {persons} persons; "
        f"losses from {detectable:.2f} points show here; pass below {margin:.2f})",
    )


def judge_joints(
    baseline: AccuracyRecord, candidate: AccuracyRecord, keypoints: Keypoints, rules: GateRules, *, seed: int = 0
) -> tuple[JointOutcome, ...]:
    """The headline metric joint by joint, with p-values adjusted by Holm; joints that nobody has are left out.

    Raises:
        SpecError: As `judge_accuracy`.
    """
    rule = rules.accuracy[0]
    base, counted = _image_sums(baseline, keypoints, rule.metric)
    cand, _ = _image_sums(candidate, keypoints, rule.metric)
    present = np.flatnonzero(counted.sum(axis=0) > 0)
    pairs = stats.paired_bootstrap(
        base[:, present],
        cand[:, present],
        counted[:, present],
        seed=seed,
        draws=rule.draws,
        clusters=baseline.image_id,
    )
    p_values = stats.holm(stats.exceedance_p_values(-100 * pairs.draws, rule.fail_above_points))
    low, high = pairs.bounds(0.025)
    return tuple(
        JointOutcome(
            joint=keypoints.names[joint],
            labelled=int(counted[:, joint].sum()),
            baseline=float(pairs.baseline[column]),
            candidate=float(pairs.candidate[column]),
            diff_points=100 * float(pairs.difference[column]),
            ci95=(100 * float(low[column]), 100 * float(high[column])),
            p_holm=float(p_values[column]),
            lost=bool(p_values[column] < rules.per_joint_alpha),
        )
        for column, joint in enumerate(present)
    )


def _judge_accuracies(
    baseline: ArmEvidence, candidate: ArmEvidence, keypoints: Keypoints | None, rules: GateRules, seed: int
) -> tuple[AccuracyOutcome, ...]:
    if not rules.accuracy:
        return ()
    if baseline.accuracy is None or candidate.accuracy is None or keypoints is None:
        raise missing_evidence(rules, "accuracy", "predictions of both arms on labelled people")
    records = baseline.accuracy, candidate.accuracy
    return tuple(judge_accuracy(*records, keypoints, rule, seed=seed) for rule in rules.accuracy)


def _image_sums(record: AccuracyRecord, keypoints: Keypoints, metric: str) -> tuple[stats.Floats, stats.Floats]:
    """(P, K) values and (P, K) counted joints of a metric, as floats."""
    values, counted = metrics.joint_values(metric, joint_errors(record, keypoints))
    return values, counted.astype(np.float64)


def _warned(headline: AccuracyOutcome, joints: tuple[JointOutcome, ...]) -> AccuracyOutcome:
    """A pass becomes a warning where single joints were surely lost, as a pooled figure can hide one."""
    lost = [f"{joint.joint} {joint.diff_points:+.1f}" for joint in joints if joint.lost]
    if headline.outcome != "pass" or not lost:
        return headline
    values = {name: getattr(headline, name) for name in headline.__struct_fields__}
    return AccuracyOutcome(**values | {"outcome": "warn", "text": f"{headline.text}; joints lost: {', '.join(lost)}"})


# ----------------------------------------------------------------------------------------------------------- latency


def judge_latency(
    comparison: LatencyComparison, confirmation: LatencyComparison | None, rule: LatencyRule
) -> LatencyOutcome:
    """Judges the time ratio; a FAIL stands only once fresh pairs say so too.

    Args:
        comparison: Candidate (arm B) against baseline (arm A).
        confirmation: Fresh pairs, measured after `comparison` said FAIL; None where none were.
        rule: The thresholds.

    Raises:
        BadInput: The two comparisons are not of the same arms, protocol and host.
    """
    outcome, confirmed = latency_zone(comparison, rule), None
    whole = comparison
    if outcome == "fail" and rule.confirm:
        outcome = "inconclusive"
        if confirmation is not None:
            whole = merged(comparison, confirmation)
            confirmed = decision_bounds(confirmation, rule)[0] > 1 + rule.fail_above
            together = latency_zone(whole, rule)
            outcome = "fail" if confirmed else "inconclusive" if together == "fail" else together
    bounds = decision_bounds(whole, rule)
    medians = np.array([np.median(pair) for pair in whole.log_ratios()])
    noisy = outcome == "inconclusive" and whole.pair_spread > rule.noisy_above
    return LatencyOutcome(
        outcome=outcome,
        ratio=whole.ratio,
        ci95=whole.ci95,
        bounds=bounds,
        fail_above=rule.fail_above,
        pass_below=rule.pass_below,
        pairs=len(whole.pairs),
        confirmed=confirmed,
        noisy=noisy,
        pair_spread=whole.pair_spread,
        hodges_lehmann_ratio=math.exp(stats.hodges_lehmann(medians)),
        sign_test_p=stats.sign_test(medians),
        baseline_ms=whole.a_ms,
        candidate_ms=whole.b_ms,
        text=_latency_text(whole, confirmed, noisy),
    )


def latency_zone(comparison: LatencyComparison, rule: LatencyRule) -> Outcome:
    """The outcome of one sample, before anything is confirmed.

    A sample whose upper bound would pass but whose estimate lies above the allowed slow-down is a warning, so that a
    real slow-down between the two thresholds is never a plain pass.
    """
    low, high = decision_bounds(comparison, rule)
    outcome = _zone((low, high), 1 + rule.fail_above, 1 + rule.pass_below)
    return "warn" if outcome == "pass" and comparison.ratio > 1 + rule.fail_above else outcome


def decision_bounds(comparison: LatencyComparison, rule: LatencyRule) -> tuple[float, float]:
    """One-sided bounds of the ratio, each at alpha divided by the number of looks (Bonferroni)."""
    rounds = comparison.log_ratios()
    draws = stats.ratio_draws(rounds, seed=comparison.protocol.seed)
    interval = stats.ratio_interval(draws, stats.median_of_medians(rounds), alpha=rule.alpha / len(rule.looks))
    return interval.low, interval.high


def _latency_text(whole: LatencyComparison, confirmed: bool | None, noisy: bool) -> str:
    low, high = whole.ci95
    text = (
        f"latency {change_percent(whole.ratio)} (95 % bounds {change_percent(low)} to {change_percent(high)}, "
        f"{len(whole.pairs)} pairs of processes, {whole.a_ms:.3f} ms to {whole.b_ms:.3f} ms)"
    )
    if confirmed is False:
        text += "; a first alarm did not repeat on fresh pairs"
    if noisy:
        text += f"; this machine is too noisy to decide: rounds spread by {100 * whole.pair_spread:.0f} %"
    return text


# ------------------------------------------------------------------------------------------------------------ limits


def judge_limits(
    baseline: Mapping[str, float], candidate: Mapping[str, float], rules: GateRules
) -> tuple[tuple[LimitOutcome, ...], tuple[str, ...]]:
    """Facts against their limits; needs no statistics.

    Returns:
        One outcome per rule, and a line for each optional rule whose fact is not known of both arms.

    Raises:
        RecipeError: A rule that is not optional asks for a fact that is not known.
    """
    outcomes, skipped = [], []
    for rule in rules.limits:
        before, after = value_of(baseline, rule.metric), value_of(candidate, rule.metric)
        if before is not None and after is not None:
            outcomes.append(_judge_limit(before, after, rule))
        elif rule.optional:
            side = "baseline" if before is None else "candidate"
            skipped.append(f"{rule.metric} was not checked: the {side} does not tell it")
        else:
            raise missing_evidence(rules, f"limits: {rule.metric}", f"{rule.metric} of both arms")
    return tuple(outcomes), tuple(skipped)


def fact_pairs(baseline: Mapping[str, float], candidate: Mapping[str, float]) -> tuple[FactPair, ...]:
    """All facts that either arm tells, in the order of the baseline, those of the candidate alone last."""
    names = dict.fromkeys((*baseline, *candidate))
    known = {name: fact for name in names if (fact := known_fact(name)) is not None}
    return tuple(
        FactPair(name, fact.unit, value_of(baseline, name), value_of(candidate, name)) for name, fact in known.items()
    )


def _judge_limit(before: float, after: float, rule: LimitRule) -> LimitOutcome:
    fact = known_fact(rule.metric)
    assert fact is not None  # `check_rules` let the rule through
    worse = after - before if fact.better == "lower" else before - after
    failed = worse > rule.fail_above * before and worse > rule.fail_above_absolute
    share = f" ({change_percent(after / before)})" if before else ""
    return LimitOutcome(
        metric=rule.metric,
        outcome="fail" if failed else "pass",
        baseline=before,
        candidate=after,
        text=f"{rule.metric} {spelt(before, fact.unit)} to {spelt(after, fact.unit)}{share}, "
        f"allowed {allowance(fact.better, fact.unit, rule.fail_above, rule.fail_above_absolute)}",
        unit=fact.unit,
        better=fact.better,
        fail_above=rule.fail_above,
        fail_above_absolute=rule.fail_above_absolute,
        measured=fact.measured,
    )


def _zone(bounds: tuple[float, float], fail_above: float, pass_below: float) -> Outcome:
    low, high = bounds
    if low > fail_above:
        return "warn" if high < pass_below else "fail"
    return "pass" if high < pass_below else "inconclusive"


def missing_evidence(rules: GateRules, what: str, expected: str) -> RecipeError:
    """The error that says that a rule asks for something nobody measured."""
    return RecipeError(
        f"gate rules {rules.name}: {what}",
        found="a rule without evidence",
        expected=expected,
        fix="measure it, or take the rule out",
    )
