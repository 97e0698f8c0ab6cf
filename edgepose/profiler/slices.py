"""Accuracy by circumstance: the same people clean, occluded, cut off, in bad light, and which joints can be seen.

Invariant: a `SliceRecord` keeps one row per person and draw, in an order that depends on the data set only, so that any
figure of a slice, and any paired comparison of two networks on it, can be computed without a network.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepose.data.coco import Person, PoseDataset, read_image
from edgepose.data.corrupt import CORRUPTIONS, Corrupted, Occluded, Truncated, corrupt
from edgepose.errors import AnnotationError, BadInput, SpecError, UsageError
from edgepose.pose import metrics
from edgepose.pose.calibration import auroc, expected_calibration_error
from edgepose.profiler.accuracy import Estimator, Progress
from edgepose.spec import Keypoints
from edgepose.stats import Interval, paired_bootstrap

Joints = Literal["all", "hidden", "seen"]

ALPHA = 0.025
"""Each side of an interval here is wrong with this probability: 95 % in all."""

_VISIBILITY_DRAWS = 400


@dataclass(frozen=True, slots=True, eq=False)
class SliceRecord:
    """What a network made of R pictures of people of K joints, in one circumstance.

    Attributes:
        name: Of the slice ("occluded_30").
        annotation_id: (R,) int64: whose picture it is; several draws of a person share it.
        errors: R rows; lengths are pixels of the source image. The norms are those of the whole person, also where the
            frame cuts some of it off. Joints beyond the frame count as not labelled.
        hidden: (R, K) bool, labelled joints that cannot be seen, those beyond the frame included.
        known: (R, K) bool, where `hidden` is known.
        visibility: (R, K) float64, the network's probability that a joint can be seen; None if it does not say.
    """

    name: str
    annotation_id: NDArray[np.int64]
    errors: metrics.JointErrors
    hidden: NDArray[np.bool_]
    known: NDArray[np.bool_]
    visibility: NDArray[np.float64] | None

    def __len__(self) -> int:
        return len(self.annotation_id)

    def counted(self, joints: Joints) -> NDArray[np.bool_]:
        """(R, K) bool: which labelled joints within the frame belong to a selection."""
        inside = ~np.isnan(self.errors.errors_px)
        return inside if joints == "all" else inside & (self.hidden if joints == "hidden" else ~self.hidden)


def measure_slices(
    estimator: Estimator,
    dataset: PoseDataset,
    *,
    names: Sequence[str] = tuple(CORRUPTIONS),
    draws: int = 1,
    lenders: Sequence[Path] | None = None,
    progress: Progress | None = None,
) -> dict[str, SliceRecord]:
    """Predict every labelled person under every corruption.

    Args:
        estimator: Any callable from a frame and boxes to poses.
        dataset: The labelled people.
        names: Out of `CORRUPTIONS`.
        draws: Pictures per person where things or frames are placed at random.
        lenders: Photographs that lend pieces to occluders; the data set's own if None. Give the whole set's where a
            sample is measured, and a person's pictures are the same as in a measurement of all.
        progress: Called after each person with pictures done and pictures in all.

    Raises:
        AnnotationError: The data set holds nobody, or somebody whose box lies outside the photograph.
        ImageError: A photograph cannot be read.
        SpecError: The estimator's poses do not fit the data set's keypoints.
        UsageError: An unknown name, or `draws` is below 1.
    """
    _require_people(dataset)
    if unknown := [name for name in names if name not in CORRUPTIONS]:
        raise UsageError("slices", found=repr(unknown[0]), expected=f"names out of {', '.join(CORRUPTIONS)}")
    if draws < 1:
        raise UsageError("draws", found=str(draws), expected="1 or more")
    photographs = lenders_of(dataset) if lenders is None else lenders
    repeats = {name: _repeats(name, draws) for name in names}
    rows: dict[str, list[_Row]] = {name: [] for name in names}
    done, whole = 0, len(dataset) * sum(repeats.values())
    for person in dataset.persons:
        frame = read_image(person.image)
        for name, count in repeats.items():
            for draw in range(count):
                picture = corrupt(CORRUPTIONS[name], frame, person, draw=draw, others=photographs)
                rows[name].append(_predicted(estimator, picture, person))
            done += count
        if progress is not None:
            progress(done, whole)
    return {name: _record(name, found, dataset.keypoints) for name, found in rows.items()}


def _require_people(dataset: PoseDataset) -> None:
    if not dataset.persons:
        raise AnnotationError(f"{dataset.source}", found="no labelled person", expected="at least one")


def _repeats(name: str, draws: int) -> int:
    """Pictures per person of a slice: `draws` where chance decides what happens to them."""
    return draws if isinstance(CORRUPTIONS.get(name), (Occluded, Truncated)) else 1


def lenders_of(dataset: PoseDataset) -> tuple[Path, ...]:
    """A data set's photographs, in an order that does not depend on the order of its people."""
    return tuple(sorted({person.image for person in dataset.persons}))


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    person: Person
    picture_truth: NDArray[np.float32]  # (K, 3), pixels of the picture
    predicted: NDArray[np.float32]  # (K, 2), the same
    hidden: NDArray[np.bool_]
    known: NDArray[np.bool_]
    visibility: NDArray[np.float32] | None


def _predicted(estimator: Estimator, picture: Corrupted, person: Person) -> _Row:
    try:
        poses = estimator(picture.frame, picture.box_xyxy[None])
    except AnnotationError as err:
        where = f"{person.image}: annotation {person.annotation_id}: {err.where}"
        raise AnnotationError(where, found=err.found, expected=err.expected, fix=err.fix) from err
    if poses.keypoints.shape != (1, len(picture.keypoints), 2):
        raise SpecError(
            "predicted keypoints",
            found=f"shape {poses.keypoints.shape}",
            expected=f"(1, {len(picture.keypoints)}, 2), the data set's keypoints",
            fix="measure on a data set with the network's keypoint set",
        )
    visibility = None if poses.visibility is None else poses.visibility[0]
    return _Row(person, picture.keypoints, poses.keypoints[0], picture.hidden, picture.known, visibility)


def _record(name: str, rows: Sequence[_Row], keypoints: Keypoints) -> SliceRecord:
    predicted = np.stack([row.predicted for row in rows])
    whole = np.stack([row.person.keypoints for row in rows])
    # Where a picture ends before a joint, the person is still as large as before.
    errors = metrics.JointErrors(
        metrics.joint_errors_px(predicted, np.stack([row.picture_truth for row in rows])),
        metrics.torso_px(whole, keypoints),
        metrics.extent_px(whole),
        metrics.limb12(keypoints),
    )
    said = [row.visibility for row in rows if row.visibility is not None]
    return SliceRecord(
        name=name,
        annotation_id=np.array([row.person.annotation_id for row in rows], np.int64),
        errors=errors,
        hidden=np.stack([row.hidden for row in rows]),
        known=np.stack([row.known for row in rows]),
        visibility=np.stack(said).astype(np.float64) if len(said) == len(rows) else None,
    )


def together(records: Sequence[SliceRecord], name: str) -> SliceRecord:
    """Several slices of the same people as one; a person's rows stay together in every bootstrap."""
    first = records[0]
    said = [record.visibility for record in records if record.visibility is not None]
    return SliceRecord(
        name=name,
        annotation_id=np.concatenate([record.annotation_id for record in records]),
        errors=metrics.JointErrors(
            np.concatenate([record.errors.errors_px for record in records]),
            np.concatenate([record.errors.torso_px for record in records]),
            np.concatenate([record.errors.extent_px for record in records]),
            first.errors.limb12,
        ),
        hidden=np.concatenate([record.hidden for record in records]),
        known=np.concatenate([record.known for record in records]),
        visibility=np.concatenate(said) if len(said) == len(records) else None,
    )


# ------------------------------------------------------------------------------------------------------------ figures


def shown_metrics(keypoints: Keypoints) -> tuple[str, ...]:
    """The metrics of a slice that this keypoint set has."""
    wanted = ("pck_torso_0.2", "pck_torso_0.1", "auc", "limb12_extent_0.1", "pck_extent_0.1")
    return tuple(name for name in wanted if name in metrics.available(keypoints))


def person_sums(
    record: SliceRecord, metric: str, joints: Joints = "all"
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A metric's (R,) numerators and (R,) denominators over a selection of joints.

    Raises:
        SpecError: An unknown metric, or one that the keypoint set does not have.
    """
    values, counted = metrics.joint_values(metric, record.errors)
    chosen = counted & record.counted(joints)
    return np.where(chosen, values, 0.0).sum(axis=1), chosen.sum(axis=1).astype(np.float64)


def intervals(
    record: SliceRecord, wanted: Sequence[str], joints: Joints = "all", *, seed: int = 0, draws: int = 2000
) -> dict[str, Interval]:
    """Metrics with 95 % bounds from a bootstrap over persons.

    Returns:
        By metric; NaN where no joint counts, and bounds of NaN where those of one person only do.

    Raises:
        SpecError: As `person_sums`.
    """
    found = {metric: Interval(*[float("nan")] * 3) for metric in wanted}
    alike: dict[bytes, list[str]] = {}  # metrics that count the same people are drawn together
    sums = {metric: person_sums(record, metric, joints) for metric in wanted}
    for metric, (_, counts) in sums.items():
        if counts.any():
            alike.setdefault((counts > 0).tobytes(), []).append(metric)
    for group in alike.values():
        right, counts = (np.stack([sums[metric][i] for metric in group], axis=1) for i in range(2))
        nothing = np.zeros_like(right)  # the difference to a network that finds nothing is the metric itself
        bounded = _bounded((nothing, right), counts, record.annotation_id, seed=seed, draws=draws)
        found.update(zip(group, bounded, strict=True))
    return found


def paired_difference(
    base: Sequence[SliceRecord],
    candidate: Sequence[SliceRecord],
    metric: str,
    joints: Joints = "all",
    *,
    seed: int = 0,
    draws: int = 10_000,
) -> Interval:
    """Candidate minus baseline on one slice, as a fraction, with 95 % bounds from a paired bootstrap over persons.

    The bounds are NaN where the joints of one person only count.

    Args:
        base: Records of the baseline, one per training seed; their mean is compared.
        candidate: Records of the candidate, likewise.
        metric: Which figure.
        joints: Over which joints.
        seed: Of the bootstrap.
        draws: Replicates.

    Raises:
        SpecError: The records are of different pictures, or as `person_sums`.
        BadInput: No record in an arm, or no joint counts.
    """
    if not base or not candidate:
        raise BadInput("paired difference", found="an arm without records", expected="at least one each")
    first = base[0]
    for other in (*base, *candidate):
        _require_same_pictures(first, other)
    counts = person_sums(first, metric, joints)[1]
    if not counts.any():
        found = f"no {metric} of {joints} joints in {first.name}"
        raise BadInput("paired difference", found=found, expected="at least one joint that counts")
    ours, theirs = (
        np.mean([person_sums(r, metric, joints)[0] for r in arm], axis=0)[:, None] for arm in (base, candidate)
    )
    return _bounded((ours, theirs), counts[:, None], first.annotation_id, seed=seed, draws=draws)[0]


def visibility_quality(record: SliceRecord, *, seed: int = 0) -> dict[str, Interval]:
    """How well a network says which joints can be seen: `auroc`, and `ece` over 15 bins of equal mass.

    The bounds come from a bootstrap over persons, NaN of one person. Those of `ece` are cautious: resampling itself
    adds to it.

    Returns:
        Nothing where the network does not say, or all known joints are of one kind.
    """
    if record.visibility is None:
        return {}
    known = record.known & np.isfinite(record.visibility)
    hidden = record.hidden[known]
    if not hidden.any() or hidden.all():
        return {}
    said, truth = record.visibility[known], ~hidden
    # Joints sorted by person, so that drawing a person is drawing a range.
    owner = np.broadcast_to(record.annotation_id[:, None], known.shape)[known]
    order = np.argsort(owner, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(owner[order])) + 1)
    rng = np.random.default_rng(seed)
    replicates = []
    for _ in range(_VISIBILITY_DRAWS):
        rows = np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))])
        replicates.append((auroc(said[rows], truth[rows]), expected_calibration_error(said[rows], truth[rows])))
    estimates = auroc(said, truth), expected_calibration_error(said, truth)
    low, high = np.nanquantile(np.array(replicates), [ALPHA, 1 - ALPHA], axis=0)
    low, high = np.minimum(low, estimates), np.maximum(high, estimates)
    if len(groups) == 1:
        low, high = np.full(2, np.nan), np.full(2, np.nan)
    return {name: Interval(estimates[i], float(low[i]), float(high[i])) for i, name in enumerate(("auroc", "ece"))}


def _bounded(
    arms: tuple[NDArray[np.float64], NDArray[np.float64]],
    counts: NDArray[np.float64],
    persons: NDArray[np.int64],
    *,
    seed: int,
    draws: int,
) -> list[Interval]:
    """The difference of two arms in M metrics that count joints in the same of R rows.

    Args:
        arms: (R, M) sums of the baseline and of the candidate.
        counts: (R, M) joints behind them.
        persons: (R,) whose row it is.
        seed: Of the bootstrap.
        draws: Replicates.
    """
    rows = counts[:, 0] > 0  # a draw of people of whom nothing counts would have no figure
    base, candidate, weights, owners = arms[0][rows], arms[1][rows], counts[rows], persons[rows]
    bootstrap = paired_bootstrap(base, candidate, weights, seed=seed, draws=draws, clusters=owners)
    low, high = bootstrap.bounds(ALPHA)
    if (owners == owners[0]).all():  # one person says nothing about others
        low, high = np.full_like(low, np.nan), np.full_like(high, np.nan)
    return [Interval(*map(float, row)) for row in zip(bootstrap.difference, low, high, strict=True)]


def require_comparable(record: SliceRecord, dataset: PoseDataset, *, draws: int) -> None:
    """Refuses a record of other people, known before anything is measured, to compare a measurement with.

    Raises:
        AnnotationError: The data set holds nobody.
        SpecError: It is not of that data set's people with as many draws, or its labels have changed since.
    """
    _require_people(dataset)
    repeats = _repeats(record.name, draws)
    owners = np.repeat(np.array([person.annotation_id for person in dataset.persons], np.int64), repeats)
    extents = np.repeat(metrics.extent_px(np.stack([person.keypoints for person in dataset.persons])), repeats)
    same = (
        np.array_equal(record.annotation_id, owners)
        and record.errors.errors_px.shape[1] == dataset.keypoints.count
        and np.array_equal(record.errors.extent_px, extents, equal_nan=True)
    )
    if not same:
        raise _other_pictures(f"{len(record)} pictures in {record.name}", f"the {len(owners)} to be measured")


def _require_same_pictures(first: SliceRecord, other: SliceRecord) -> None:
    same = (
        np.array_equal(first.annotation_id, other.annotation_id)
        and np.array_equal(first.hidden, other.hidden)
        and np.array_equal(first.known, other.known)
        and np.array_equal(np.isnan(first.errors.errors_px), np.isnan(other.errors.errors_px))
        and np.array_equal(first.errors.torso_px, other.errors.torso_px, equal_nan=True)
        and np.array_equal(first.errors.extent_px, other.errors.extent_px, equal_nan=True)
    )
    if not same:
        found = f"{len(first)} pictures of {first.name} and {len(other)} of {other.name}"
        raise _other_pictures(found, "the same pictures of the same people")


def _other_pictures(found: str, expected: str) -> SpecError:
    fix = "measure both networks on one data set, with as many draws"
    return SpecError("paired slices", found=found, expected=expected, fix=fix)


# -------------------------------------------------------------------------------------------------------------- files

_ARRAYS: Mapping[str, Callable[[SliceRecord], NDArray[Any] | None]] = {
    "annotation_id": lambda record: record.annotation_id,
    "errors_px": lambda record: record.errors.errors_px,
    "torso_px": lambda record: record.errors.torso_px,
    "extent_px": lambda record: record.errors.extent_px,
    "limb12": lambda record: record.errors.limb12,
    "hidden": lambda record: record.hidden,
    "known": lambda record: record.known,
    "visibility": lambda record: record.visibility,
}


def npz_from_slices(records: Mapping[str, SliceRecord]) -> bytes:
    """NumPy's archive of all arrays, that `slices_from_npz` reads back exactly."""
    arrays: dict[str, Any] = {}
    for name, record in records.items():
        for field, taken in _ARRAYS.items():
            if (array := taken(record)) is not None:
                arrays[f"{name}:{field}"] = array
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def slices_from_npz(path: Path) -> dict[str, SliceRecord]:
    """Read what `npz_from_slices` made.

    Raises:
        SpecError: It is no such file.
    """
    expected, fix = "records that edgepose eval --slices --records wrote", "measure the network again"
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile) or not archive.files:
            raise ValueError("no archive of arrays")
        with archive:
            arrays = {key: archive[key] for key in archive.files}
        names = dict.fromkeys(key.partition(":")[0] for key in arrays)
        return {name: _from_arrays(name, arrays) for name in names}
    except KeyError as err:
        raise SpecError(str(path), found=f"no array {err}", expected=expected, fix=fix) from err
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as err:
        raise SpecError(str(path), found=f"{err}", expected=expected, fix=fix) from err


def _from_arrays(name: str, arrays: Mapping[str, NDArray[Any]]) -> SliceRecord:
    found = {field: arrays[f"{name}:{field}"] for field in _ARRAYS if field != "visibility"}
    if (visibility := arrays.get(f"{name}:visibility")) is not None:
        found["visibility"] = visibility
    table = found["errors_px"].shape
    for field, array in found.items():
        expected = table[:1] if field in _PER_PICTURE else table[1:] if field == "limb12" else table
        if len(table) != 2 or array.shape != expected:
            raise ValueError(f"{name}: {field} of shape {array.shape} beside errors of shape {table}")
    errors = metrics.JointErrors(*(found[field] for field in ("errors_px", "torso_px", "extent_px", "limb12")))
    return SliceRecord(name, found["annotation_id"], errors, found["hidden"], found["known"], visibility)


_PER_PICTURE = ("annotation_id", "torso_px", "extent_px")
