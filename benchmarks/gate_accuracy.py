"""What the accuracy gate is tried on: arms that are swapped, people who are drawn anew, predictions that are spoilt.

Invariant: labels are never touched, and people of one photograph stay together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from edgepose.profiler.accuracy import AccuracyRecord
from edgepose.profiler.gate.judge import judge_accuracy
from edgepose.profiler.gate.rules import AccuracyRule
from edgepose.profiler.gate.verdict import AccuracyOutcome
from edgepose.spec import Keypoints

_PREDICTED = ("predicted", "scores", "errors_px")
_OF_PERSONS = (
    "image_id", "annotation_id", "boxes", "predicted", "scores", "visibility", "errors_px", "torso_px", "extent_px",
    "area_px2",
)  # fmt: skip


def swapped(
    first: AccuracyRecord, second: AccuracyRecord, rng: np.random.Generator
) -> tuple[AccuracyRecord, AccuracyRecord]:
    """Two records whose predictions change places for a random half of the photographs: no true difference is left."""
    images, of_person = np.unique(first.image_id, return_inverse=True)
    changes = rng.random(len(images))[of_person] < 0.5
    mixed = []
    for mine, other in ((first, second), (second, first)):
        arrays = {}
        for name in _PREDICTED:
            own, theirs = getattr(mine, name), getattr(other, name)
            arrays[name] = np.where(changes.reshape(-1, *[1] * (own.ndim - 1)), theirs, own)
        mixed.append(replace(mine, **arrays))
    return mixed[0], mixed[1]


def drawn_again(
    first: AccuracyRecord, second: AccuracyRecord, rng: np.random.Generator
) -> tuple[AccuracyRecord, AccuracyRecord]:
    """Both records on as many photographs, drawn from theirs with replacement."""
    images, of_person = np.unique(first.image_id, return_inverse=True)
    people = [np.flatnonzero(of_person == image) for image in range(len(images))]
    chosen = rng.integers(0, len(images), len(images))
    rows = np.concatenate([people[image] for image in chosen])
    numbers = np.concatenate([np.full(len(people[image]), place) for place, image in enumerate(chosen)])
    first, second = (
        replace(
            record,
            **{name: getattr(record, name)[rows] for name in _OF_PERSONS}
            | {"image_id": numbers, "annotation_id": np.arange(len(rows))},
        )
        for record in (first, second)
    )
    return first, second


def without_joint(record: AccuracyRecord, joint: int, share: float, rng: np.random.Generator) -> AccuracyRecord:
    """One joint's answers lost for a share of the people, as when its channel is damaged."""
    errors = np.array(record.errors_px)
    lost = (rng.random(len(record)) < share) & ~np.isnan(errors[:, joint])
    errors[lost, joint] = np.inf
    return replace(record, errors_px=errors)


def without_unsure(record: AccuracyRecord, share: float) -> AccuracyRecord:
    """The least confident share of all answers lost, as when scores are scaled and a threshold stays."""
    errors = np.array(record.errors_px)
    labelled = ~np.isnan(errors)
    limit = np.quantile(record.scores[labelled], share)
    errors[labelled & (record.scores <= limit)] = np.inf
    return replace(record, errors_px=errors)


def outcomes(
    pairs: Callable[[np.random.Generator], tuple[AccuracyRecord, AccuracyRecord]],
    keypoints: Keypoints,
    rule: AccuracyRule,
    draws: int,
    told: Callable[[int, int], None],
) -> list[str]:
    """What the gate says of so many pairs of records.

    Args:
        pairs: Makes the next pair.
        keypoints: Of both.
        rule: The gate's.
        draws: How many.
        told: Told about progress.
    """
    rng = np.random.default_rng(0)
    found: list[str] = []
    for number in range(draws):
        found.append(judge_accuracy(*pairs(rng), keypoints, rule, seed=number).outcome)
        told(number + 1, draws)
    return found


def predicted_power(judged: AccuracyOutcome, rule: AccuracyRule) -> float:
    """How often the gate says that it would FAIL a loss of this size: what `detectable_points` is computed from."""
    normal = NormalDist()
    z = normal.inv_cdf(1 - rule.alpha)
    error = (judged.detectable_points - rule.fail_above_points) / (z + normal.inv_cdf(rule.power))
    return normal.cdf((-judged.diff_points - rule.fail_above_points) / error - z)


def joint_of_most(record: AccuracyRecord) -> int:
    """The joint with the most labels."""
    counts: NDArray[np.intp] = (record.visibility > 0).sum(axis=0)
    return int(counts.argmax())
