"""The waterfall of a compression: what every step from the float network to the engines cost, on the same persons.

Invariant: pure, and nothing is made up: a step that was not measured has no figure and says why, and figures that were
recorded when it was made stand apart from those measured now.

Bounds and the smallest change that could have shown are the gate's (docs/gate.md): a bootstrap over photographs, paired
on the same persons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError
from edgepose.profiler.accuracy import AccuracyRecord, per_joint, summary
from edgepose.profiler.gate.judge import judge_accuracy, judge_joints
from edgepose.profiler.gate.rules import AccuracyRule, GateRules
from edgepose.profiler.gate.verdict import JointOutcome
from edgepose.profiler.slices import Joints, SliceRecord, intervals, paired_difference, person_sums, shown_metrics
from edgepose.spec import Keypoints
from edgepose.stats import Interval

Kind = Literal["control", "network", "onnx", "engine"]

ALPHA, POWER = 0.025, 0.9
"""A change is detectable when its 95 % bounds leave out zero with this probability."""

_DRAWS, _SLICE_DRAWS = 4000, 2000
_CAPPED = 0.5  # an error beyond this share of the person is as bad as any: the joint is somewhere else


class Latency(msgspec.Struct, frozen=True):
    """One inference of one person, timed in fresh processes that took turns.

    Attributes:
        median_ms: Median call.
        processes: How many fresh processes there were.
        threads: Threads of each.
        against: Name of the step that `speedup` is over; "" for that step itself.
        speedup: How many times faster.
        low: Lower end of its two-sided 95 % bounds.
        high: Upper end.
    """

    median_ms: float
    processes: int
    threads: int
    against: str = ""
    speedup: float | None = None
    low: float | None = None
    high: float | None = None


class Costs(msgspec.Struct, frozen=True):
    """What a step's network takes; None where nobody knows.

    Attributes:
        macs: Multiply-accumulates of one person.
        params: Parameters of the network.
        size_bytes: Files on disk.
        int8_share: Part of the multiplications that the engine really did in integers, 0..1.
        latency: Time of one inference.
    """

    macs: int | None = None
    params: int | None = None
    size_bytes: int | None = None
    int8_share: float | None = None
    latency: Latency | None = None


class Change(msgspec.Struct, frozen=True):
    """The difference of one metric between two steps on the same persons, in points; negative is worse.

    Attributes:
        against: Name of the step it is the difference to.
        points: The difference.
        low: Lower end of its two-sided 95 % bounds; None where all persons are in one photograph.
        high: Upper end.
        detectable_points: The smallest true change that so many persons show with 90 % probability.
        persons: Persons of whom something counts.
        joints: Joints that count.
    """

    against: str
    points: float
    low: float | None
    high: float | None
    detectable_points: float | None
    persons: int
    joints: int


class SliceFigures(msgspec.Struct, frozen=True):
    """One slice of one step.

    Attributes:
        slice: Its name ("occluded_30").
        joints: "all", or the "hidden" ones.
        pictures: How many there are.
        counted_joints: Labelled joints within them.
        metrics: By name, 0..1, with 95 % bounds.
        changes: Difference to the step before, points, with paired 95 % bounds.
        totals: Difference to the reference, likewise.
    """

    slice: str
    joints: Joints
    pictures: int
    counted_joints: int
    metrics: dict[str, Interval]
    changes: dict[str, Interval] = {}
    totals: dict[str, Interval] = {}


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One form of the network.

    Attributes:
        name: Unique among the steps ("prune", "onnxruntime int8").
        title: For people.
        kind: A control arm, a checkpoint, the exported graph, or an engine.
        runs_in: What executed it.
        measured: Whether `metrics` were measured now.
        why: Why it was not.
        metrics: Measured on these persons, 0..1 (`mpjpe_px` in pixels).
        recorded: Recorded on dev when the step was made.
        changes: By metric, difference to the step before.
        totals: By metric, difference to the reference.
        joints: The headline metric by joint.
        slices: The same persons in other circumstances.
        costs: What it takes.
    """

    name: str
    title: str
    kind: Kind
    runs_in: str
    measured: bool
    why: str = ""
    metrics: dict[str, float] = {}
    recorded: dict[str, float] = {}
    changes: dict[str, Change] = {}
    totals: dict[str, Change] = {}
    joints: dict[str, float] = {}
    slices: tuple[SliceFigures, ...] = ()
    costs: Costs = Costs()


class People(msgspec.Struct, frozen=True):
    """Who was measured.

    Attributes:
        name: The data set and its part ("lspet val").
        sha256: Digest of its labels.
        persons: How many.
        torso_persons: How many of them have both joints that torso metrics are normalised by.
    """

    name: str
    sha256: str
    persons: int
    torso_persons: int


class Waterfall(msgspec.Struct, frozen=True):
    """All of it.

    Attributes:
        steps: In order.
        metrics: Metrics shown, the headline first.
        people: Who was measured; None where nobody was.
        reference: Name of the step that totals are against: the better of float network and control arm.
        compressed: Name of the step whose joints and persons are compared with the reference.
        joints: The headline metric joint by joint, `compressed` against `reference`.
    """

    steps: tuple[Step, ...]
    metrics: tuple[str, ...]
    people: People | None = None
    reference: str = ""
    compressed: str = ""
    joints: tuple[JointOutcome, ...] = ()

    def step(self, name: str) -> Step:
        """The step called `name`.

        Raises:
            KeyError: There is none.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """What is known of one step before anything is compared; the fields are those of `Step`.

    Attributes:
        accuracy: Its predictions for the persons; None where it was not measured.
        slices: Likewise, by slice.
    """

    name: str
    title: str
    kind: Kind
    runs_in: str
    why: str = ""
    recorded: Mapping[str, float] = field(default_factory=dict)
    costs: Costs = field(default_factory=Costs)
    accuracy: AccuracyRecord | None = None
    slices: Mapping[str, SliceRecord] = field(default_factory=dict)


def waterfall(
    evidence: Sequence[Evidence], keypoints: Keypoints, people: People | None = None, *, seed: int = 0
) -> Waterfall:
    """Compare every step with the one before it and with the reference.

    Engines are compared with the exported graph, or with the last checkpoint where that was not measured: they do not
    follow from each other.

    Args:
        evidence: The steps in order, control arms first.
        keypoints: The keypoint set of all records.
        people: Who was measured.
        seed: Of the bootstrap.

    Raises:
        SpecError: Two records are of different persons, or two steps have one name.
    """
    names = [one.name for one in evidence]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise SpecError("waterfall", found=f"two steps called {repeated[0]!r}", expected="a name for each")
    metrics = shown_metrics(keypoints)
    reference = _reference(evidence, keypoints, metrics)
    steps = tuple(
        _step(one, _before(evidence[:place], one.kind), reference, (keypoints, metrics, seed))
        for place, one in enumerate(evidence)
    )
    compressed = _compressed(evidence, reference)
    joints: tuple[JointOutcome, ...] = ()
    if reference is not None and compressed is not None:
        joints = _joints(reference, compressed, keypoints, metrics, seed)
    return Waterfall(
        steps=steps,
        metrics=metrics,
        people=people,
        reference=reference.name if reference else "",
        compressed=compressed.name if compressed else "",
        joints=joints,
    )


def _before(earlier: Sequence[Evidence], kind: Kind) -> Evidence | None:
    """The step that one of `kind` is to be compared with."""
    chain = [one for one in earlier if one.accuracy is not None and one.kind in ("network", "onnx")]
    return chain[-1] if chain and kind != "control" else None


def _reference(evidence: Sequence[Evidence], keypoints: Keypoints, metrics: Sequence[str]) -> Evidence | None:
    """The better of the float network and the control arms, by the headline metric."""
    first = next((one for one in evidence if one.kind == "network"), None)
    arms = [one for one in evidence if one.accuracy is not None and (one.kind == "control" or one is first)]

    def figure(one: Evidence) -> float:
        assert one.accuracy is not None
        value = summary(one.accuracy, keypoints).get(metrics[0], math.nan)
        return value if math.isfinite(value) else -math.inf

    return max(reversed(arms), key=figure, default=None)  # of equals the float network, which comes last


def _compressed(evidence: Sequence[Evidence], reference: Evidence | None) -> Evidence | None:
    """What would be shipped: the first engine that was measured, else the last step that was."""
    measured = [one for one in evidence if one.accuracy is not None and one.kind != "control" and one is not reference]
    engines = [one for one in measured if one.kind == "engine"]
    return engines[0] if engines else measured[-1] if measured else None


_Context = tuple[Keypoints, tuple[str, ...], int]


def _step(one: Evidence, before: Evidence | None, reference: Evidence | None, context: _Context) -> Step:
    keypoints, metrics, seed = context
    total = None if one is reference or one.kind == "control" else reference
    changes = _changes(before, one, context)
    joints: dict[str, float] = {}
    if one.accuracy is not None:
        table = per_joint(one.accuracy, keypoints)
        joints = {joint: row.get(metrics[0], math.nan) for joint, row in table.items()}
    return Step(
        name=one.name,
        title=one.title,
        kind=one.kind,
        runs_in=one.runs_in,
        measured=one.accuracy is not None,
        why=one.why,
        metrics={} if one.accuracy is None else summary(one.accuracy, keypoints),
        recorded=dict(one.recorded),
        changes=changes,
        totals=changes if total is before else _changes(total, one, context),
        joints=joints,
        slices=_slices(one, before, total, metrics, seed),
        costs=one.costs,
    )


def _changes(before: Evidence | None, one: Evidence, context: _Context) -> dict[str, Change]:
    if before is None or before.accuracy is None or one.accuracy is None:
        return {}
    keypoints, metrics, seed = context
    one_photograph = len(np.unique(one.accuracy.image_id)) == 1  # which says nothing about others
    found = {}
    for metric in metrics:
        if not math.isfinite(summary(one.accuracy, keypoints)[metric]):
            continue  # nobody has a torso, say
        rule = AccuracyRule(metric, fail_above_points=0.0, alpha=ALPHA, power=POWER, draws=_DRAWS)
        outcome = judge_accuracy(before.accuracy, one.accuracy, keypoints, rule, seed=seed)
        found[metric] = Change(
            against=before.name,
            points=outcome.diff_points,
            low=None if one_photograph else outcome.ci95[0],
            high=None if one_photograph else outcome.ci95[1],
            detectable_points=None if one_photograph else outcome.detectable_points,
            persons=outcome.persons,
            joints=outcome.joints,
        )
    return found


def _joints(
    reference: Evidence, compressed: Evidence, keypoints: Keypoints, metrics: Sequence[str], seed: int
) -> tuple[JointOutcome, ...]:
    assert reference.accuracy is not None
    assert compressed.accuracy is not None
    if not math.isfinite(summary(reference.accuracy, keypoints)[metrics[0]]):
        return ()
    rule = AccuracyRule(metrics[0], fail_above_points=0.0, alpha=ALPHA, draws=_DRAWS)
    rules = GateRules("report", accuracy=(rule,), latency=None, per_joint_alpha=2 * ALPHA)
    return judge_joints(reference.accuracy, compressed.accuracy, keypoints, rules, seed=seed)


# -------------------------------------------------------------------------------------------------------------- slices


def _slices(
    one: Evidence, before: Evidence | None, total: Evidence | None, metrics: Sequence[str], seed: int
) -> tuple[SliceFigures, ...]:
    found = []
    for name, record in one.slices.items():
        selections: tuple[Joints, ...] = ("all", "hidden") if record.counted("hidden").any() else ("all",)
        for joints in selections:
            changes = _slice_changes(before, record, metrics, joints, seed)
            found.append(
                SliceFigures(
                    slice=name,
                    joints=joints,
                    pictures=len(record),
                    counted_joints=int(record.counted(joints).sum()),
                    metrics=intervals(record, metrics, joints, seed=seed),
                    changes=changes,
                    totals=changes if total is before else _slice_changes(total, record, metrics, joints, seed),
                )
            )
    return tuple(found)


def _slice_changes(
    base: Evidence | None, record: SliceRecord, metrics: Sequence[str], joints: Joints, seed: int
) -> dict[str, Interval]:
    """Differences in points; empty where the other step was not measured on the slice."""
    there = None if base is None else base.slices.get(record.name)
    if there is None:
        return {}
    found = {}
    for metric in metrics:
        if person_sums(record, metric, joints)[1].any():
            share = paired_difference([there], [record], metric, joints, seed=seed, draws=_SLICE_DRAWS)
            found[metric] = Interval(100 * share.estimate, 100 * share.low, 100 * share.high)
    return found


# -------------------------------------------------------------------------------------------------------- worst persons


@dataclass(frozen=True, slots=True)
class Worst:
    """A person whom the compressed network finds worse than the reference does.

    Attributes:
        row: Place among the persons of the records.
        reference: Mean error of the reference, as a share of the person's extent; each joint counts 0.5 at most.
        compressed: The same of the compressed network.
    """

    row: int
    reference: float
    compressed: float


def worst_persons(reference: AccuracyRecord, compressed: AccuracyRecord, count: int) -> tuple[Worst, ...]:
    """The persons whose joints moved away most, worst first; none of whom nothing got worse.

    Args:
        reference: Predictions of the reference.
        compressed: Predictions for the same persons.
        count: How many at most.
    """
    before, after = _mean_errors(reference), _mean_errors(compressed)
    with np.errstate(invalid="ignore"):
        loss = np.nan_to_num(after - before, nan=-1.0)
    order = np.argsort(-loss, kind="stable")[:count]
    return tuple(Worst(int(row), float(before[row]), float(after[row])) for row in order if loss[row] > 0)


def _mean_errors(record: AccuracyRecord) -> NDArray[np.float64]:
    """(P,) mean over labelled joints of the error as a share of the person's extent, capped; NaN where none counts."""
    labelled = ~np.isnan(record.errors_px)
    extent = np.maximum(record.extent_px, 1e-9)[:, None]  # one labelled joint has none: any error is then capped
    shares = np.where(labelled, np.minimum(np.where(labelled, record.errors_px, 0.0) / extent, _CAPPED), 0.0)
    counts = labelled.sum(axis=1)
    means: NDArray[np.float64] = np.where(counts > 0, shares.sum(axis=1) / np.maximum(counts, 1), np.nan)
    return means
