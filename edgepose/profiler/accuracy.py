"""Predicting over a labelled data set, and the record of it that every accuracy figure is computed from.

Invariant: an `AccuracyRecord` keeps one row per labelled person, in the data set's order, so that any metric, any table
and any paired comparison with another record of the same persons can be recomputed from it without a network.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.data.coco import Person, PoseDataset, read_image
from edgepose.errors import AnnotationError, SpecError, UsageError
from edgepose.pose import metrics
from edgepose.pose.metrics import AREA_OF_BOX
from edgepose.pose.results import result_rows
from edgepose.spec import Keypoints, Poses

Estimator = Callable[[NDArray[np.uint8], NDArray[np.float64]], Poses]
"""(H, W, 3) uint8 BGR frame and (N, 4) float64 xyxy boxes in its pixels → N poses, same order."""

Progress = Callable[[int, int], None]
"""Called with the number of persons done and the number of all persons."""


@dataclass(frozen=True, slots=True, eq=False)
class AccuracyRecord:
    """What a network predicted for P labelled persons of K joints, and how far off it was. Arrays are read-only.

    All lengths are pixels of the source image, x right, y down.

    Attributes:
        dataset: Digest of the data set.
        backend: Backend that predicted ("onnxruntime").
        image_id: (P,) int64 COCO image ids.
        annotation_id: (P,) int64 COCO annotation ids.
        boxes: (P, 4) float32 xyxy, the boxes that were cropped, before padding.
        predicted: (P, K, 2) float32; NaN where the network gave no finite coordinate.
        scores: (P, K) float32 confidences.
        visibility: (P, K) uint8: 0 not labelled, 1 hidden, 2 visible.
        errors_px: (P, K) float64; NaN where unlabelled, inf where labelled but not predicted.
        torso_px: (P,) float64 left shoulder to right hip; NaN unless both are labelled.
        extent_px: (P,) float64 larger side of the extent of the labelled joints.
        area_px2: (P,) float64, `AREA_OF_BOX` of the annotation's box, for OKS.
    """

    dataset: str
    backend: str
    image_id: NDArray[np.int64]
    annotation_id: NDArray[np.int64]
    boxes: NDArray[np.float32]
    predicted: NDArray[np.float32]
    scores: NDArray[np.float32]
    visibility: NDArray[np.uint8]
    errors_px: NDArray[np.float64]
    torso_px: NDArray[np.float64]
    extent_px: NDArray[np.float64]
    area_px2: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Takes each array as its declared dtype, read-only, and refuses rows that do not belong together."""
        for name, dtype in _DTYPES.items():
            array: NDArray[Any] = np.array(getattr(self, name), dtype=dtype)
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        persons, joints = len(self.annotation_id), self.errors_px.shape[-1]
        for name, tail in _TAILS.items():
            expected = (persons, *(joints if size is None else size for size in tail))
            found = getattr(self, name).shape
            if found != expected:
                raise SpecError(f"accuracy record: {name}", found=f"shape {found}", expected=f"{expected}")

    def __len__(self) -> int:
        return len(self.annotation_id)


_DTYPES: Mapping[str, type] = {
    "image_id": np.int64,
    "annotation_id": np.int64,
    "boxes": np.float32,
    "predicted": np.float32,
    "scores": np.float32,
    "visibility": np.uint8,
    "errors_px": np.float64,
    "torso_px": np.float64,
    "extent_px": np.float64,
    "area_px2": np.float64,
}
# Shapes after the person axis; None is the number of joints.
_TAILS: Mapping[str, tuple[int | None, ...]] = {
    "image_id": (),
    "annotation_id": (),
    "boxes": (4,),
    "predicted": (None, 2),
    "scores": (None,),
    "visibility": (None,),
    "errors_px": (None,),
    "torso_px": (),
    "extent_px": (),
    "area_px2": (),
}


def evaluate(
    estimator: Estimator, dataset: PoseDataset, *, batch: int = 16, progress: Progress | None = None
) -> AccuracyRecord:
    """Predict every labelled person from their annotated box and measure the errors.

    Each image is decoded once and all its people go to the estimator in one call.

    Args:
        estimator: Any callable from a frame and boxes to poses.
        dataset: The labelled people.
        batch: People per call at most; an image with more of them takes several calls.
        progress: Called after each call of the estimator.

    Raises:
        AnnotationError: The data set holds nobody.
        ImageError: A photograph cannot be read.
        SpecError: The estimator's poses do not fit the boxes or the data set's keypoints.
        UsageError: `batch` is below 1.
    """
    persons = dataset.persons
    if not persons:
        raise AnnotationError(f"{dataset.source}", found="no labelled person", expected="at least one")
    if batch < 1:
        raise UsageError("batch", found=f"{batch}", expected="1 or more")
    count, joints = len(persons), dataset.keypoints.count
    predicted = np.full((count, joints, 2), np.nan, np.float32)
    scores = np.zeros((count, joints), np.float32)
    boxes = np.zeros((count, 4), np.float32)
    backend, done = "", 0
    for image, rows in _rows_by_image(persons).items():
        frame = read_image(image)
        for chunk in (rows[start : start + batch] for start in range(0, len(rows), batch)):
            poses = estimator(frame, np.stack([persons[row].box_xyxy for row in chunk]).astype(np.float64))
            _require_fitting(poses, len(chunk), dataset.keypoints)
            predicted[chunk], scores[chunk], boxes[chunk] = poses.keypoints, poses.scores, poses.boxes
            backend, done = poses.backend, done + len(chunk)
            if progress is not None:
                progress(done, count)
    return _record(dataset, backend, boxes=boxes, predicted=predicted, scores=scores)


def _record(
    dataset: PoseDataset,
    backend: str,
    *,
    boxes: NDArray[np.float32],
    predicted: NDArray[np.float32],
    scores: NDArray[np.float32],
) -> AccuracyRecord:
    persons = dataset.persons
    truth = np.stack([person.keypoints for person in persons])
    missing = np.asarray(~np.isfinite(predicted).all(axis=-1), np.bool_)
    errors = metrics.measure(predicted, truth, dataset.keypoints)
    return AccuracyRecord(
        dataset=dataset.digest,
        backend=backend,
        image_id=np.array([person.image_id for person in persons]),
        annotation_id=np.array([person.annotation_id for person in persons]),
        boxes=boxes,
        predicted=np.where(missing[..., None], np.float32(np.nan), predicted),
        scores=np.where(missing | ~np.isfinite(scores), np.float32(0.0), scores),
        visibility=truth[..., 2].astype(np.uint8),
        errors_px=errors.errors_px,
        torso_px=errors.torso_px,
        extent_px=errors.extent_px,
        area_px2=np.array([AREA_OF_BOX * person.bbox_xywh[2] * person.bbox_xywh[3] for person in persons]),
    )


def joint_errors(record: AccuracyRecord, keypoints: Keypoints) -> metrics.JointErrors:
    """The record in the form that `edgepose.pose.metrics` takes.

    Raises:
        SpecError: The record has another number of joints than `keypoints`.
    """
    if record.errors_px.shape[1] != keypoints.count:
        raise SpecError(
            "accuracy record", found=f"{record.errors_px.shape[1]} joints", expected=f"the {keypoints.count} of the set"
        )
    return metrics.JointErrors(record.errors_px, record.torso_px, record.extent_px, metrics.limb12(keypoints))


def summary(record: AccuracyRecord, keypoints: Keypoints) -> dict[str, float]:
    """Every metric this keypoint set has, pooled over all persons; NaN where no joint counts.

    Raises:
        SpecError: The record has another number of joints than `keypoints`.
    """
    errors = joint_errors(record, keypoints)
    return {name: metrics.pooled(name, errors) for name in metrics.available(keypoints)}


def person_sums(
    record: AccuracyRecord, keypoints: Keypoints, metric: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A metric's (P,) numerators and (P,) denominators: resample rows of both to bootstrap over persons.

    Raises:
        SpecError: An unknown metric, or one that this keypoint set does not have.
    """
    return metrics.person_sums(metric, joint_errors(record, keypoints))


def per_joint(record: AccuracyRecord, keypoints: Keypoints) -> dict[str, dict[str, float]]:
    """Metrics of each joint on its own, by joint name; NaN where nobody has it labelled.

    Returns:
        For each joint `labelled` (number of persons), the all-joint metrics the set has, and `mpjpe_px`.

    Raises:
        SpecError: The record has another number of joints than `keypoints`.
    """
    errors = joint_errors(record, keypoints)
    table: dict[str, dict[str, float]] = {
        name: {"labelled": float(count)}
        for name, count in zip(keypoints.names, (record.visibility > 0).sum(axis=0), strict=True)
    }
    for metric in metrics.available(keypoints):
        if metric.startswith("limb12"):
            continue
        values, counted = metrics.joint_values(metric, errors)
        for name, total, number in zip(keypoints.names, values.sum(axis=0), counted.sum(axis=0), strict=True):
            table[name][metric] = float(total / number) if number else float("nan")
    return table


def oks(record: AccuracyRecord, keypoints: Keypoints) -> NDArray[np.float64]:
    """OKS of each person with their own label, (P,) float64 0..1.

    Raises:
        SpecError: No sigmas are known for the keypoint set.
    """
    return metrics.oks(record.errors_px, record.area_px2, metrics.oks_sigmas(keypoints))


def require_same_persons(base: AccuracyRecord, candidate: AccuracyRecord) -> None:
    """Make sure that two records can be compared row by row.

    Raises:
        SpecError: They were made from different labels, persons or orders.
    """
    same = (
        base.dataset == candidate.dataset
        and np.array_equal(base.annotation_id, candidate.annotation_id)
        and np.array_equal(base.visibility, candidate.visibility)
    )
    if not same:
        raise SpecError(
            "paired accuracy records",
            found=f"{len(base)} persons of {base.dataset[:12]} and {len(candidate)} of {candidate.dataset[:12]}",
            expected="the same persons in the same order",
            fix="evaluate both on one data set",
        )


def coco_results(record: AccuracyRecord, *, category_id: int = 1) -> list[dict[str, Any]]:
    """The predictions as COCO keypoint results, one row per person: see `pose.results.result_rows`."""
    image_ids = record.image_id.tolist()
    return result_rows(image_ids, record.predicted, record.scores, record.boxes, category_id=category_id)


def coco_truth(dataset: PoseDataset) -> dict[str, Any]:
    """The data set's annotation file cut down to its persons, for OKS-mAP: with the annotated areas.

    Crowds and people without keypoints stay, as COCO ignores what matches them. A missing `num_keypoints`, `iscrowd` or
    `area` is filled in.

    Raises:
        AnnotationError: The file no longer holds one of the persons.
    """
    try:
        document = json.loads(dataset.source.read_bytes())
    except (OSError, ValueError) as err:
        raise AnnotationError(f"{dataset.source}", found=f"{err}", expected="the file the data set came from") from err
    wanted = {person.annotation_id for person in dataset.persons}
    images = {person.image_id for person in dataset.persons}
    annotations = [
        _complete(annotation)
        for annotation in document.get("annotations", [])
        if annotation["id"] in wanted or (annotation.get("image_id") in images and _is_ignored(annotation))
    ]
    absent = wanted - {annotation["id"] for annotation in annotations}
    if absent:
        raise AnnotationError(
            f"{dataset.source}: annotation {min(absent)}", found="nothing", expected="the person that was evaluated"
        )
    return {
        "images": [image for image in document["images"] if image["id"] in images],
        "annotations": annotations,
        "categories": document["categories"],
    }


def oks_map(record: AccuracyRecord, dataset: PoseDataset) -> dict[str, float]:
    """OKS average precision and recall of a record, by faster-coco-eval, with the annotated areas.

    Raises:
        AnnotationError: The annotation file has changed.
        MissingDependency: faster-coco-eval is not installed.
        SpecError: No sigmas are known for the keypoint set.
    """
    from edgepose.pose import coco_map

    truth = coco_truth(dataset)
    category = next(annotation["category_id"] for annotation in truth["annotations"])
    return coco_map.oks_map(truth, coco_results(record, category_id=category), metrics.oks_sigmas(dataset.keypoints))


class _RecordJson(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The record as JSON; null stands for NaN, and for inf in a labelled joint's error."""

    schema: int
    dataset: str
    backend: str
    image_id: list[int]
    annotation_id: list[int]
    boxes: list[list[float]]
    predicted: list[list[list[float | None]]]
    scores: list[list[float]]
    visibility: list[list[int]]
    errors_px: list[list[float | None]]
    torso_px: list[float | None]
    extent_px: list[float | None]
    area_px2: list[float]


_SCHEMA = 1


def json_from_record(record: AccuracyRecord) -> bytes:
    """One line of JSON that `record_from_json` reads back exactly."""
    arrays = {name: getattr(record, name).tolist() for name in _DTYPES}
    return msgspec.json.encode({"schema": _SCHEMA, "dataset": record.dataset, "backend": record.backend, **arrays})


def record_from_json(data: bytes, *, where: str = "accuracy record") -> AccuracyRecord:
    """Read what `json_from_record` wrote.

    Args:
        data: The JSON.
        where: What to call it in errors, the file's name for instance.

    Raises:
        SpecError: It is not an accuracy record, or of another schema, or its rows do not fit together.
    """
    try:
        wire = msgspec.json.decode(data, type=_RecordJson)
    except msgspec.DecodeError as err:
        raise SpecError(where, found=f"{err}", expected="an accuracy record", fix="run edgepose eval again") from err
    if wire.schema != _SCHEMA:
        raise SpecError(f"{where}: schema", found=f"{wire.schema}", expected=f"{_SCHEMA}")
    try:
        arrays: dict[str, Any] = {name: np.array(getattr(wire, name), dtype=kind) for name, kind in _DTYPES.items()}
    except (ValueError, OverflowError) as err:
        raise SpecError(where, found=f"rows that form no array ({err})", expected="rows of one length") from err
    if arrays["errors_px"].shape == arrays["visibility"].shape:
        lost = np.isnan(arrays["errors_px"]) & (arrays["visibility"] > 0)
        arrays["errors_px"][lost] = np.inf
    return AccuracyRecord(dataset=wire.dataset, backend=wire.backend, **arrays)


def _rows_by_image(persons: Sequence[Person]) -> dict[Path, list[int]]:
    rows: dict[Path, list[int]] = {}
    for row, person in enumerate(persons):
        rows.setdefault(person.image, []).append(row)
    return rows


def _require_fitting(poses: Poses, people: int, keypoints: Keypoints) -> None:
    shapes = {
        "keypoints": (poses.keypoints.shape, (people, keypoints.count, 2)),
        "scores": (poses.scores.shape, (people, keypoints.count)),
        "boxes": (poses.boxes.shape, (people, 4)),
    }
    for name, (found, expected) in shapes.items():
        if found != expected:
            raise SpecError(
                f"predicted {name}",
                found=f"shape {found}",
                expected=f"{expected} for {people} boxes and the data set's {keypoints.count} keypoints",
                fix="evaluate on a data set with the network's keypoint set",
            )


def _is_ignored(annotation: Mapping[str, Any]) -> bool:
    return bool(annotation.get("iscrowd")) or not any(v > 0 for v in annotation.get("keypoints", [])[2::3])


def _complete(annotation: Mapping[str, Any]) -> dict[str, Any]:
    visible = sum(v > 0 for v in annotation.get("keypoints", [])[2::3])
    width, height = annotation["bbox"][2:]
    defaults = {"num_keypoints": visible, "iscrowd": 0, "area": AREA_OF_BOX * width * height}
    return {**defaults, **annotation}
