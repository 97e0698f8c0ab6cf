"""Accuracy of predicted keypoints: PCK, AUC, MPJPE and OKS as pure functions over arrays.

Every metric here is a ratio of two sums over labelled joints, so one function, `joint_values`, defines them all: pooled
figures, per-joint tables and bootstraps over persons only differ in the axes they sum over.

Invariant: an unlabelled joint never counts, and a labelled joint always does: a prediction that is not a finite number
is wrong at every threshold, never left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError
from edgepose.spec import Keypoints

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Pck:
    """A joint is right when its error is below `factor` times the person's norm."""

    norm: Literal["torso", "extent"]
    factor: float
    joints: Literal["all", "limb12"]


_PCK = {
    "pck_torso_0.2": _Pck("torso", 0.2, "all"),
    "pck_torso_0.1": _Pck("torso", 0.1, "all"),
    "limb12_torso_0.2": _Pck("torso", 0.2, "limb12"),
    "limb12_torso_0.1": _Pck("torso", 0.1, "limb12"),
    "limb12_extent_0.1": _Pck("extent", 0.1, "limb12"),
    "pck_extent_0.1": _Pck("extent", 0.1, "all"),
}

METRICS = (
    "pck_torso_0.2",
    "pck_torso_0.1",
    "limb12_torso_0.2",
    "limb12_torso_0.1",
    "limb12_extent_0.1",
    "auc",
    "mpjpe_px",
)
"""The figures of a person data set, in the order they are shown. Fractions 0..1, but for `mpjpe_px`."""

LIMB12 = frozenset(
    f"{side}_{joint}" for side in ("left", "right") for joint in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
)
_TORSO = ("left_shoulder", "right_hip")

AREA_OF_BOX = 0.53
"""A person covers about this share of their box: what COCO-style tools take where annotations carry no area."""

# Integer steps keep 0.1 and 0.2 exactly where the PCK metrics have them.
_AUC_THRESHOLDS = np.arange(51) / 100.0
_AUC_WEIGHTS = np.r_[0.5, np.ones(49), 0.5] / 50.0

# COCO's published k/2 per joint; neck and head_top as CrowdPose sets them.
_SIGMAS = {
    "nose": 0.026,
    "eye": 0.025,
    "ear": 0.035,
    "shoulder": 0.079,
    "elbow": 0.072,
    "wrist": 0.062,
    "hip": 0.107,
    "knee": 0.087,
    "ankle": 0.089,
    "neck": 0.079,
    "head_top": 0.079,
}


@dataclass(frozen=True, slots=True, eq=False)
class JointErrors:
    """What the metrics are made of: one row per person, lengths in pixels of the source image.

    Attributes:
        errors_px: (P, K) float64 distance to the label; NaN where unlabelled, inf where the prediction is not finite.
        torso_px: (P,) float64 left shoulder to right hip; NaN unless both are labelled.
        extent_px: (P,) float64 larger side of the extent of the labelled joints; NaN where there is none.
        limb12: (K,) bool, the shoulders, elbows, wrists, hips, knees and ankles.
    """

    errors_px: Floats
    torso_px: Floats
    extent_px: Floats
    limb12: Bools


def joint_errors_px(predicted: NDArray[Any], truth: NDArray[Any]) -> Floats:
    """Distances between predicted and labelled joints.

    Args:
        predicted: (P, K, 2) float, pixels of the source image.
        truth: (P, K, 3) float x, y, v, same pixels; v > 0 means labelled.

    Returns:
        (P, K) float64 pixels; NaN where unlabelled, inf where labelled but the prediction is not finite.

    Raises:
        SpecError: The two arrays do not describe the same persons and keypoints.
    """
    _require_truth(truth)
    if predicted.shape != (*truth.shape[:2], 2):
        raise SpecError(
            "predicted keypoints", found=f"shape {predicted.shape}", expected=f"{(*truth.shape[:2], 2)} like the labels"
        )
    offsets = predicted.astype(np.float64) - truth[..., :2].astype(np.float64)
    errors = np.hypot(offsets[..., 0], offsets[..., 1])
    errors[~np.isfinite(predicted).all(axis=-1)] = np.inf
    errors[~labelled(truth)] = np.nan
    return errors


def labelled(truth: NDArray[Any]) -> Bools:
    """Which joints carry a label, (P, K) bool, from (P, K, 3) x, y, v: occluded ones (v = 1) do."""
    mask: Bools = truth[..., 2] > 0
    return mask


def torso_px(truth: NDArray[Any], keypoints: Keypoints) -> Floats:
    """Length from left shoulder to right hip.

    Args:
        truth: (P, K, 3) float x, y, v, pixels of the source image.
        keypoints: Names of the K joints.

    Returns:
        (P,) float64 pixels; NaN where one of the two is unlabelled or the keypoint set has no such joint.

    Raises:
        SpecError: `truth` does not have one row per keypoint.
    """
    _require_truth(truth, keypoints)
    if not _has_torso(keypoints):
        return np.full(len(truth), np.nan)
    shoulder, hip = (truth[:, keypoints.names.index(name)].astype(np.float64) for name in _TORSO)
    length: Floats = np.hypot(shoulder[:, 0] - hip[:, 0], shoulder[:, 1] - hip[:, 1])
    return np.where((shoulder[:, 2] > 0) & (hip[:, 2] > 0), length, np.nan)


def extent_px(truth: NDArray[Any]) -> Floats:
    """Larger side of the upright rectangle around all labelled joints.

    Args:
        truth: (P, K, 3) float x, y, v, pixels of the source image.

    Returns:
        (P,) float64 pixels; 0 where one joint is labelled, NaN where none is.

    Raises:
        SpecError: `truth` is not (P, K, 3).
    """
    _require_truth(truth)
    mask = labelled(truth)[..., None]
    points = truth[..., :2].astype(np.float64)
    low = np.where(mask, points, np.inf).min(axis=1, initial=np.inf)
    high = np.where(mask, points, -np.inf).max(axis=1, initial=-np.inf)
    side: Floats = (high - low).max(axis=-1)
    return np.where(mask.any(axis=(1, 2)), side, np.nan)


def limb12(keypoints: Keypoints) -> Bools:
    """The twelve limb joints, (K,) bool; all False where the set does not have all twelve."""
    if not set(keypoints.names) >= LIMB12:
        return np.zeros(keypoints.count, dtype=np.bool_)
    return np.array([name in LIMB12 for name in keypoints.names], dtype=np.bool_)


def measure(predicted: NDArray[Any], truth: NDArray[Any], keypoints: Keypoints) -> JointErrors:
    """The errors and norms of all persons.

    Args:
        predicted: (P, K, 2) float, pixels of the source image.
        truth: (P, K, 3) float x, y, v, same pixels.
        keypoints: Names of the K joints.

    Raises:
        SpecError: The shapes do not fit each other or `keypoints`.
    """
    _require_truth(truth, keypoints)
    return JointErrors(
        joint_errors_px(predicted, truth), torso_px(truth, keypoints), extent_px(truth), limb12(keypoints)
    )


def available(keypoints: Keypoints) -> tuple[str, ...]:
    """The metrics that can be computed for a keypoint set.

    Sets without a left shoulder and right hip (hands, animals) have no torso metrics, and sets without the twelve limb
    joints no `limb12` ones; they get `pck_extent_0.1`, the extent rule over all their joints, instead.
    """
    torso, limbs = _has_torso(keypoints), bool(limb12(keypoints).any())
    chosen = [
        name
        for name in METRICS
        if (torso or not ("torso" in name or name == "auc")) and (limbs or not name.startswith("limb12"))
    ]
    return tuple(chosen) if limbs else (*chosen[:-1], "pck_extent_0.1", chosen[-1])


def joint_values(metric: str, joints: JointErrors) -> tuple[Floats, Bools]:
    """What each joint adds to a metric; the metric is the sum of the values over the number of counted joints.

    Args:
        metric: A name out of `METRICS`, or "pck_extent_0.1".
        joints: Errors and norms of P persons.

    Returns:
        (P, K) float64 values, 0 where not counted: 0 or 1 for PCK, the joint's own area 0..1 for `auc`, pixels for
        `mpjpe_px`. And (P, K) bool, the joints that count.

    Raises:
        SpecError: An unknown metric, or one that this keypoint set does not have.
    """
    counted = ~np.isnan(joints.errors_px)
    if metric == "mpjpe_px":
        return np.where(counted, joints.errors_px, 0.0), counted
    if metric == "auc":
        counted = counted & ~np.isnan(joints.torso_px)[:, None]
        values = np.zeros(joints.errors_px.shape)
        for threshold, weight in zip(_AUC_THRESHOLDS, _AUC_WEIGHTS, strict=True):
            values += weight * (joints.errors_px < threshold * joints.torso_px[:, None])
        return np.where(counted, values, 0.0), counted
    rule = _PCK.get(metric)
    if rule is None:
        raise SpecError(f"metric {metric!r}", found="an unknown name", expected=f"one of {', '.join(METRICS)}")
    norm = joints.torso_px if rule.norm == "torso" else joints.extent_px
    counted = counted & ~np.isnan(norm)[:, None]
    if rule.joints == "limb12":
        if not joints.limb12.any():
            raise SpecError(f"metric {metric!r}", found="a keypoint set without the twelve limb joints")
        counted = counted & joints.limb12
    right = joints.errors_px < rule.factor * norm[:, None]
    return np.where(counted & right, 1.0, 0.0), counted


def person_sums(metric: str, joints: JointErrors) -> tuple[Floats, Floats]:
    """A metric's numerator and denominator, person by person: all that a bootstrap over persons needs.

    Returns:
        (P,) float64 sums of values and (P,) float64 numbers of counted joints; the pooled metric of any selection of
        persons is the ratio of the two sums over it.

    Raises:
        SpecError: As `joint_values`.
    """
    values, counted = joint_values(metric, joints)
    return values.sum(axis=1), counted.sum(axis=1).astype(np.float64)


def pooled(metric: str, joints: JointErrors) -> float:
    """A metric over all persons; NaN where no joint counts (nobody has both torso joints labelled, say).

    Raises:
        SpecError: As `joint_values`.
    """
    values, counted = joint_values(metric, joints)
    return float(values.sum() / counted.sum()) if counted.any() else float("nan")


def oks(errors_px: NDArray[Any], area_px2: NDArray[Any], sigmas: NDArray[Any]) -> Floats:
    """Object keypoint similarity of each person with their own label, as COCO defines it.

    Args:
        errors_px: (P, K) float, NaN where unlabelled.
        area_px2: (P,) float, the person's area in square pixels.
        sigmas: (K,) float, COCO's k/2.

    Returns:
        (P,) float64 0..1, NaN where no joint is labelled.

    Raises:
        SpecError: The number of sigmas differs from the number of joints.
    """
    if sigmas.shape != (errors_px.shape[1],):
        raise SpecError("OKS sigmas", found=f"shape {sigmas.shape}", expected=f"({errors_px.shape[1]},)")
    counted = ~np.isnan(errors_px)
    # COCO adds one spacing so that an area of zero does not divide by zero.
    scale = 2.0 * (2.0 * sigmas.astype(np.float64)) ** 2 * (area_px2.astype(np.float64)[:, None] + np.spacing(1.0))
    similarity = np.where(counted, np.exp(-(errors_px.astype(np.float64) ** 2) / scale), 0.0)
    joints = counted.sum(axis=1)
    result: Floats = np.where(joints > 0, similarity.sum(axis=1) / np.maximum(joints, 1), np.nan)
    return result


def oks_sigmas(keypoints: Keypoints) -> Floats:
    """The keypoint set's own sigmas, or those COCO publishes for joints of these names, (K,) float64.

    Raises:
        SpecError: The set has no sigmas and holds a joint that COCO does not know.
    """
    if keypoints.sigmas:
        if len(keypoints.sigmas) != keypoints.count:
            raise SpecError(
                "keypoints.sigmas", found=f"{len(keypoints.sigmas)} values", expected=f"{keypoints.count}, one per name"
            )
        return np.array(keypoints.sigmas, dtype=np.float64)
    stems = [name.removeprefix("left_").removeprefix("right_") for name in keypoints.names]
    unknown = [name for name, stem in zip(keypoints.names, stems, strict=True) if stem not in _SIGMAS]
    if unknown:
        raise SpecError(
            "keypoints.sigmas",
            found=f"none, and COCO has no value for {unknown[0]!r}",
            fix="add sigmas to the keypoint set (oks_sigmas of the annotation file's category)",
        )
    return np.array([_SIGMAS[stem] for stem in stems], dtype=np.float64)


def _has_torso(keypoints: Keypoints) -> bool:
    return all(name in keypoints.names for name in _TORSO)


def _require_truth(truth: NDArray[Any], keypoints: Keypoints | None = None) -> None:
    count = keypoints.count if keypoints is not None else "K"
    if truth.ndim != 3 or truth.shape[2] != 3 or (keypoints is not None and truth.shape[1] != keypoints.count):
        raise SpecError("labelled keypoints", found=f"shape {truth.shape}", expected=f"(P, {count}, 3)")
