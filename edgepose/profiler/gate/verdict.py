"""What the gate says: one outcome per check, and one verdict over all of them.

Invariant: a verdict carries every number it was derived from, and its exit code follows from its checks alone. An
inconclusive check never becomes a pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from edgepose.errors import AccuracyRegression, Inconclusive, LatencyRegression, NoisyMachine
from edgepose.profiler.facts import Unit
from edgepose.timing.record import LatencyProtocol

Outcome = Literal["pass", "warn", "fail", "inconclusive"]


class JointOutcome(msgspec.Struct, frozen=True):
    """One joint of the headline metric.

    Attributes:
        joint: Its name.
        labelled: Joints of that name that count.
        baseline: Metric of the baseline, 0..1.
        candidate: Metric of the candidate, 0..1.
        diff_points: Candidate minus baseline; negative is worse.
        ci95: Two-sided 95 % bounds of the difference in points.
        p_holm: p-value that more than the allowed loss was lost, adjusted over all joints.
        lost: Whether that is below the rules' level.
    """

    joint: str
    labelled: int
    baseline: float
    candidate: float
    diff_points: float
    ci95: tuple[float, float]
    p_holm: float
    lost: bool


class AccuracyOutcome(msgspec.Struct, frozen=True):
    """One accuracy metric.

    Attributes:
        metric: Its name.
        outcome: What follows.
        baseline: Metric of the baseline, 0..1.
        candidate: Metric of the candidate, 0..1.
        diff_points: Candidate minus baseline; negative is worse.
        ci95: Two-sided 95 % bounds of the difference in points.
        loss_bounds: One-sided lower and upper bound of the loss in points, each at the rule's alpha.
        fail_above_points: FAIL needs a lower bound above this.
        margin_points: PASS needs an upper bound below this.
        detectable_points: The smallest loss that this data would have shown with the rule's power.
        persons: People compared.
        joints: Labelled joints compared.
        text: One line for people.
    """

    metric: str
    outcome: Outcome
    baseline: float
    candidate: float
    diff_points: float
    ci95: tuple[float, float]
    loss_bounds: tuple[float, float]
    fail_above_points: float
    margin_points: float
    detectable_points: float
    persons: int
    joints: int
    text: str


class LatencyOutcome(msgspec.Struct, frozen=True):
    """The time ratio.

    Attributes:
        outcome: What follows.
        ratio: Candidate over baseline; above 1 is slower.
        ci95: Two-sided 95 % bounds of the ratio.
        bounds: One-sided bounds that decide, corrected for the number of looks.
        fail_above: FAIL needs a lower bound above 1 plus this.
        pass_below: PASS needs an upper bound below 1 plus this.
        pairs: Pairs of processes behind `ratio`.
        confirmed: Whether a FAIL repeated on fresh pairs; None where nothing had to be confirmed.
        noisy: Whether nothing could be decided because the rounds spread too far.
        pair_spread: Robust standard deviation of the rounds' log-ratios.
        hodges_lehmann_ratio: Cross-check without a vote.
        sign_test_p: Cross-check without a vote, over the pairs.
        baseline_ms: Median call of the baseline.
        candidate_ms: Median call of the candidate.
        text: One line for people.
    """

    outcome: Outcome
    ratio: float
    ci95: tuple[float, float]
    bounds: tuple[float, float]
    fail_above: float
    pass_below: float
    pairs: int
    confirmed: bool | None
    noisy: bool
    pair_spread: float
    hodges_lehmann_ratio: float
    sign_test_p: float
    baseline_ms: float
    candidate_ms: float
    text: str


class LimitOutcome(msgspec.Struct, frozen=True):
    """A fact against its limits.

    Attributes:
        metric: Its name.
        outcome: pass or fail.
        baseline: Value of the baseline.
        candidate: Value of the candidate.
        text: One line for people.
        unit: Of both values.
        better: Which way is better.
        fail_above: It may become worse by this share of the baseline's value,
        fail_above_absolute: or by this much in its unit.
        measured: Whether it comes from running processes instead of the files.
    """

    metric: str
    outcome: Outcome
    baseline: float
    candidate: float
    text: str
    unit: Unit = "bytes"
    better: Literal["lower", "higher"] = "lower"
    fail_above: float = 0.0
    fail_above_absolute: float = 0.0
    measured: bool = False


class FactPair(msgspec.Struct, frozen=True):
    """One fact of both arms; None where that arm does not tell it."""

    name: str
    unit: Unit
    baseline: float | None
    candidate: float | None


class Conditions(msgspec.Struct, frozen=True):
    """What two arms were compared, where and how: figures of different conditions are never compared.

    Attributes:
        baseline_digest: Of the baseline's bundle.
        candidate_digest: Of the candidate's bundle.
        baseline_engine: Which of its engines: "onnxruntime int8".
        candidate_engine: The same of the candidate.
        host: Digest of the host's fingerprint.
        device: The host for people.
        cores: Physical cores that the processes were allowed.
        governor: Frequency governor of these; "" where unknown.
        timed: What was timed: the engine alone, or a whole frame; "" where nothing was.
        protocol: How it was timed; the number of pairs follows from the looks and is not a condition.
        dataset: Digest of the data set; "" where nothing was predicted.
    """

    baseline_digest: str
    candidate_digest: str
    baseline_engine: str
    candidate_engine: str
    host: str
    device: str
    cores: int
    governor: str = ""
    timed: str = ""
    protocol: LatencyProtocol | None = None
    dataset: str = ""


class Verdict(msgspec.Struct, frozen=True):
    """The whole verdict; its JSON is what `edgepose gate --json` writes.

    Attributes:
        verdict: The worst outcome: fail, else inconclusive, else warn, else pass.
        exit_code: Of the program; the lowest where several checks failed.
        reasons: One line per check that is not a plain pass.
        baseline: What the baseline is called.
        candidate: What the candidate is called.
        rules: Name of the rules.
        accuracy: The headline metric.
        latency: The time ratio.
        limits: Facts that may not grow.
        other_accuracy: The other metrics of the rules.
        joints: The headline metric joint by joint.
        seed: Of everything random.
        facts: What the files say of both arms, whether or not there is a rule for it.
        skipped: One line per optional rule that was left out, with the reason.
        conditions: What was compared, where and how; None in verdicts of before that was kept.
    """

    verdict: Outcome
    exit_code: int
    reasons: tuple[str, ...]
    baseline: str
    candidate: str
    rules: str
    accuracy: AccuracyOutcome | None
    latency: LatencyOutcome | None
    limits: tuple[LimitOutcome, ...]
    other_accuracy: tuple[AccuracyOutcome, ...]
    joints: tuple[JointOutcome, ...]
    seed: int
    facts: tuple[FactPair, ...] = ()
    skipped: tuple[str, ...] = ()
    conditions: Conditions | None = None

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks in the order they are shown: what needs no statistics comes first."""
        headline = (self.accuracy,) if self.accuracy is not None else ()
        return in_order((*headline, *self.other_accuracy), self.latency, self.limits)


Check = AccuracyOutcome | LatencyOutcome | LimitOutcome


def in_order(
    accuracy: Sequence[AccuracyOutcome], latency: LatencyOutcome | None, limits: Sequence[LimitOutcome]
) -> tuple[Check, ...]:
    """Checks as they are shown: facts of the files, accuracy, latency, facts that were measured."""
    exact = [limit for limit in limits if not limit.measured]
    measured = [limit for limit in limits if limit.measured]
    return (*exact, *accuracy, *((latency,) if latency is not None else ()), *measured)


def exit_code_of(check: Check) -> int:
    """The exit code that one check alone would end the program with."""
    match check.outcome:
        case "pass" | "warn":
            return 0
        case "inconclusive":
            noisy = isinstance(check, LatencyOutcome) and check.noisy
            return NoisyMachine.exit_code if noisy else Inconclusive.exit_code
        case "fail":
            return AccuracyRegression.exit_code if isinstance(check, AccuracyOutcome) else LatencyRegression.exit_code


def word_of(check: Check) -> str:
    """The outcome in one word: that of a machine too noisy to decide is "refused"."""
    return "refused" if isinstance(check, LatencyOutcome) and check.noisy else check.outcome


def overall(checks: Iterable[Check]) -> tuple[Outcome, int]:
    """The verdict over all checks and its exit code.

    A regression is never hidden by an inconclusive check beside it: among several failures the lowest code counts, and
    codes of undecided checks only where nothing failed.
    """
    found = list(checks)
    severity: tuple[Outcome, ...] = ("fail", "inconclusive", "warn")
    for outcome in severity:
        codes = [exit_code_of(check) for check in found if check.outcome == outcome]
        if codes:
            return outcome, min(codes)
    return "pass", 0
