"""Running the gate: predict with both bundles, time them in pairs of processes for as long as it takes, then decide.

Invariant: this file gathers evidence and decides nothing beyond when to stop gathering; the verdict is `gate.decide`'s.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from edgepose.bundle import Bundle, read_bundle
from edgepose.data.coco import PoseDataset
from edgepose.engines import choose_engine
from edgepose.errors import SpecError
from edgepose.estimator import PoseEstimator
from edgepose.host import fingerprint
from edgepose.profiler.accuracy import AccuracyRecord, evaluate
from edgepose.profiler.facts import FACTS, Fact, bundle_facts
from edgepose.profiler.gate.judge import ArmEvidence, PairEvidence, decide, judge_limits, latency_zone, missing_evidence
from edgepose.profiler.gate.rules import GateRules, LatencyRule, check_rules, protocol_of
from edgepose.profiler.gate.verdict import Conditions, Verdict
from edgepose.spec import Backend, Engine, Keypoints, Precision
from edgepose.timing.pairs import compare_latency
from edgepose.timing.record import BundleArm, LatencyComparison, merged

_OF_FILES = Fact("count")

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

Measure = Callable[[int, int], LatencyComparison]
"""Measures a number of fresh pairs: called with the number of the first and how many."""


@dataclass(frozen=True, slots=True)
class GateOptions:
    """What the rules leave open.

    Attributes:
        backend: Take only engines of this runtime, in both arms.
        precision: Take only engines of this precision, in both arms.
        threads: Threads of either arm; 0 takes all physical cores.
        batch: People per call.
        seed: Of everything random.
    """

    backend: Backend | None = None
    precision: Precision | None = None
    threads: int = 0
    batch: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GateRun:
    """A verdict with the evidence behind it.

    Attributes:
        verdict: What `edgepose gate` reports.
        baseline: Evidence about the baseline.
        candidate: Evidence about the candidate.
        together: Evidence about both.
    """

    verdict: Verdict
    baseline: ArmEvidence
    candidate: ArmEvidence
    together: PairEvidence

    @property
    def timings(self) -> LatencyComparison | None:
        """All pairs that were measured, those of the confirmation included."""
        first, again = self.together.latency, self.together.confirmation
        return first if first is None or again is None else merged(first, again)


def run_gate(
    baseline: str | os.PathLike[str],
    candidate: str | os.PathLike[str],
    dataset: PoseDataset | None,
    rules: GateRules,
    *,
    options: GateOptions | None = None,
    progress: Progress | None = None,
) -> GateRun:
    """Compares two bundles: the facts of their files first, then accuracy, then latency.

    Args:
        baseline: Directory of the bundle that is good enough.
        candidate: Directory of the bundle that wants to replace it.
        dataset: Labelled people; None where the rules do not ask for accuracy.
        rules: What counts as worse.
        options: Engine, threads, seed; None takes the defaults.
        progress: Told while measuring.

    Raises:
        BadInput: A bundle, the rules or the data do not fit together.
        EnvironmentFault: An engine cannot be run here.
        IntegrityError: A bundle was changed since it was written.
    """
    options, report = options or GateOptions(), progress or _silent
    check_rules(rules)
    bundles = [read_bundle(path) for path in (baseline, candidate)]
    keypoints = _shared_keypoints(bundles, dataset)
    if rules.accuracy and dataset is None:
        raise missing_evidence(rules, "accuracy", "labelled people to predict on")
    names = _names(bundles)
    engines = [choose_engine(bundle, options.backend, options.precision) for bundle in bundles]
    told = [bundle_facts(bundle, engine) for bundle, engine in zip(bundles, engines, strict=True)]
    judge_limits(told[0], told[1], _unmeasured(rules))  # a rule without evidence is refused before anything is measured
    accuracies: list[AccuracyRecord | None] = [None, None]
    if rules.accuracy and dataset is not None:
        accuracies = [_predict(b, n, dataset, options, report) for b, n in zip(bundles, names, strict=True)]
    latency = confirmation = None
    if rules.latency is not None:
        measure = _measurer(bundles, names, rules.latency, options, report)
        latency, confirmation = gather_latency(measure, rules.latency)
    conditions = _conditions(bundles, engines, accuracies[0], latency)
    together = PairEvidence(keypoints, latency, confirmation, conditions)
    arms = [
        ArmEvidence(name, accuracy, {**facts, **_memory(latency, side)})
        for side, (name, accuracy, facts) in enumerate(zip(names, accuracies, told, strict=True))
    ]
    verdict = decide(arms[0], arms[1], together, rules, seed=options.seed)
    return GateRun(verdict, arms[0], arms[1], together)


def gather_latency(measure: Measure, rule: LatencyRule) -> tuple[LatencyComparison, LatencyComparison | None]:
    """Measures more and more pairs until the rule decides or its last look is reached.

    Returns:
        The sample that decided, or the largest, and fresh pairs for confirmation where it said FAIL.
    """
    sample = measure(0, rule.looks[0])
    for pairs in rule.looks[1:]:
        if latency_zone(sample, rule) != "inconclusive":
            break
        measured = len(sample.pairs)
        sample = merged(sample, measure(measured, pairs - measured))
    if latency_zone(sample, rule) != "fail" or not rule.confirm:
        return sample, None
    measured = len(sample.pairs)
    return sample, measure(measured, measured)


def _measurer(
    bundles: list[Bundle], names: list[str], rule: LatencyRule, options: GateOptions, report: Progress
) -> Measure:
    base, cand = (
        BundleArm(name, str(bundle.root), options.backend, options.precision, rule.timed, bundle.digest)
        for name, bundle in zip(names, bundles, strict=True)
    )
    protocol = protocol_of(rule, threads=options.threads, batch=options.batch, seed=options.seed)

    def measure(first: int, count: int) -> LatencyComparison:
        def told(done: int, whole: int) -> None:
            report(f"timing pairs {first + 1} to {first + count}", done, whole)

        part = msgspec.structs.replace(protocol, pairs=count)
        return compare_latency(base, cand, part, told, first_pair=first)

    return measure


def _predict(bundle: Bundle, name: str, dataset: PoseDataset, options: GateOptions, report: Progress) -> AccuracyRecord:
    def told(done: int, whole: int) -> None:
        report(f"predicting with {name}", done, whole)

    chosen = options.backend, options.threads, options.precision
    with PoseEstimator.from_bundle(bundle.root, *chosen, aim="none") as estimator:
        return evaluate(estimator, dataset, progress=told)


def _unmeasured(rules: GateRules) -> GateRules:
    """The rules on facts of the files alone."""
    limits = tuple(rule for rule in rules.limits if not (FACTS.get(rule.metric) or _OF_FILES).measured)
    return msgspec.structs.replace(rules, limits=limits)


def _memory(latency: LatencyComparison | None, side: int) -> dict[str, float]:
    """Memory of an arm's processes: medians over the pairs, bytes."""
    if latency is None:
        return {}
    facts = [(pair.a, pair.b)[side].facts for pair in latency.pairs]
    return {
        "peak_memory_bytes": float(np.median([fact.peak_rss_bytes for fact in facts])),
        "steady_memory_bytes": float(np.median([fact.steady_rss_bytes for fact in facts])),
    }


def _conditions(
    bundles: list[Bundle], engines: list[Engine], accuracy: AccuracyRecord | None, latency: LatencyComparison | None
) -> Conditions:
    here = fingerprint() if latency is None else latency.host
    timed = "" if latency is None or not isinstance(latency.a, BundleArm) else latency.a.timed
    return Conditions(
        baseline_digest=bundles[0].digest,
        candidate_digest=bundles[1].digest,
        baseline_engine=f"{engines[0].backend} {engines[0].precision}",
        candidate_engine=f"{engines[1].backend} {engines[1].precision}",
        host=here.digest,
        device=" + ".join((here.cpu, *here.gpus)),
        cores=here.physical_cores,
        governor=here.governor,
        timed=timed,
        protocol=None if latency is None else msgspec.structs.replace(latency.protocol, pairs=1, seed=0),
        dataset="" if accuracy is None else accuracy.dataset,
    )


def _shared_keypoints(bundles: list[Bundle], dataset: PoseDataset | None) -> Keypoints:
    first, second = (bundle.manifest.spec.keypoints for bundle in bundles)
    if first.names != second.names:
        raise SpecError(
            f"bundles {bundles[0].root} and {bundles[1].root}",
            found="different keypoint sets",
            expected="the same keypoints in both arms",
        )
    if dataset is not None and dataset.keypoints.names != first.names:
        raise SpecError(
            f"{dataset.source}",
            found=f"keypoints {', '.join(dataset.keypoints.names)}",
            expected=f"those of the bundles: {', '.join(first.names)}",
        )
    return first


def _names(bundles: list[Bundle]) -> list[str]:
    """What the arms are called: the bundles' names, told apart by their directories where these are equal."""
    names = [bundle.manifest.name for bundle in bundles]
    if names[0] != names[1]:
        return names
    return [f"{side} {bundle.root.name}" for side, bundle in zip(("baseline", "candidate"), bundles, strict=True)]


def _silent(_what: str, _done: int, _whole: int) -> None:
    pass
