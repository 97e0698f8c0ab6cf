"""Slices: every figure follows from errors that were put in, by person, by joint and by what is hidden."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from edgepose.data.coco import PoseDataset, dataset
from edgepose.data.corrupt import CORRUPTIONS
from edgepose.errors import AnnotationError, BadInput, SpecError, UsageError
from edgepose.pose import metrics
from edgepose.profiler import accuracy
from edgepose.profiler.accuracy import Estimator
from edgepose.profiler.slices import (
    SliceRecord,
    intervals,
    lenders_of,
    measure_slices,
    npz_from_slices,
    paired_difference,
    require_comparable,
    shown_metrics,
    slices_from_npz,
    together,
    visibility_quality,
)
from edgepose.spec import Poses

NAMES = [f"{s}_{j}" for j in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle") for s in ("left", "right")]
COUNT = 9
JOINTS = np.array([[20 + 9 * (k % 4), 15 + 9 * (k // 4), 2] for k in range(12)], np.float64)


@pytest.fixture
def people(tmp_path: Path) -> PoseDataset:
    """Nine photographs of a person each, whose pixels are marked with where they are."""
    (tmp_path / "images").mkdir()
    y, x = np.mgrid[:64, :80]
    images, annotations = [], []
    for number in range(1, COUNT + 1):
        frame = np.stack([x * 3, y * 3, np.full_like(x, number)], axis=2).astype(np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), frame)
        images.append({"id": number, "file_name": f"{number}.png"})
        points = JOINTS.copy()
        points[:, 0] += number
        points[3, 2] = 1
        points[5] = 0
        row = {"id": 10 * number, "image_id": number, "category_id": 1, "keypoints": points.ravel().tolist()}
        annotations.append({**row, "bbox": [12 + number, 8, 45, 34]})
    document = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person", "keypoints": NAMES}],
    }
    (tmp_path / "val.json").write_text(json.dumps(document))
    return dataset(tmp_path, "val")


def off_by(offset_px: float, *, confident: float | None = None) -> Estimator:
    """An estimator that reads off the first pixel who and where it is, and misses each joint by so much."""

    def estimate(frame: NDArray[np.uint8], boxes: NDArray[np.float64]) -> Poses:
        left, top = frame[0, 0, 0] / 3, frame[0, 0, 1] / 3
        points = JOINTS[None, :, :2] + (float(frame[0, 0, 2]) - left, -top)
        points[..., 0] += offset_px
        said = None if confident is None else np.full(points.shape[:2], confident, np.float32)
        scores = np.full(points.shape[:2], 0.5, np.float32)
        return Poses(points.astype(np.float32), scores, boxes.astype(np.float32), "fake", said)

    return estimate


def record(
    errors: list[list[float]], hidden: list[list[bool]] | None = None, said: list[list[float]] | None = None
) -> SliceRecord:
    """People with a torso of 10 px, numbered from 0; a row may be NaN where nothing is labelled."""
    array = np.array(errors, float)
    covered = np.zeros(array.shape, bool) if hidden is None else np.array(hidden)
    joints = metrics.JointErrors(
        array, np.full(len(array), 10.0), np.full(len(array), 20.0), np.ones(array.shape[1], bool)
    )
    visibility = None if said is None else np.array(said, float)
    return SliceRecord("made", np.arange(len(array)), joints, covered, ~np.isnan(array), visibility)


def test_the_clean_slice_is_what_eval_measures(people: PoseDataset) -> None:
    estimator = off_by(1.5)
    found = measure_slices(estimator, people, names=("clean",))["clean"]
    expected = accuracy.summary(accuracy.evaluate(estimator, people), people.keypoints)
    shown = intervals(found, shown_metrics(people.keypoints))
    assert set(shown) == {"pck_torso_0.2", "pck_torso_0.1", "auc", "limb12_extent_0.1"}
    for name, interval in shown.items():
        assert interval.estimate == pytest.approx(expected[name])
        assert interval.low <= interval.estimate <= interval.high
    assert found.hidden.sum() == COUNT  # the joint that is labelled hidden
    assert found.counted("hidden").sum() == COUNT
    assert found.counted("all").sum() == 11 * COUNT
    assert found.counted("seen").sum() == 10 * COUNT


def test_every_slice_is_measured_on_the_same_people(people: PoseDataset) -> None:
    calls: list[tuple[int, int]] = []
    records = measure_slices(off_by(0.0), people, draws=3, progress=lambda done, whole: calls.append((done, whole)))
    assert list(records) == list(CORRUPTIONS)
    for name, found in records.items():
        repeats = 3 if name.startswith(("occluded", "truncated")) else 1
        assert found.annotation_id.tolist() == np.repeat(10 * np.arange(1, COUNT + 1), repeats).tolist()
        if name not in ("low_light", "sensor_noise", "motion_blur", "jpeg") and not name.startswith("occluded"):
            assert np.nanmax(found.errors.errors_px) < 1e-4, name  # truncated frames included
    assert calls[-1] == (COUNT * 20, COUNT * 20)
    assert len(calls) == COUNT
    cut = records["truncated"]
    assert 0.1 < cut.hidden.sum() / cut.known.sum() < 0.6
    assert np.isnan(cut.errors.errors_px[cut.hidden & cut.known & ~cut.counted("all")]).all()
    whole = records["clean"].errors
    assert np.array_equal(cut.errors.torso_px[::3], whole.torso_px)  # as large as before
    shares = [records[f"occluded_{share}"].hidden.mean() for share in (10, 20, 30, 40)]
    assert shares == sorted(shares)


def test_a_sample_gets_the_pictures_of_the_whole_set(people: PoseDataset) -> None:
    some = people.subset([20, 50])
    whole = measure_slices(off_by(0.0), people, names=("occluded_30",))["occluded_30"]
    part = measure_slices(off_by(0.0), some, names=("occluded_30",), lenders=lenders_of(people))["occluded_30"]
    rows = np.flatnonzero(np.isin(whole.annotation_id, [20, 50]))
    assert np.array_equal(part.hidden, whole.hidden[rows])


def test_figures_of_hidden_and_seen_joints() -> None:
    found = record(
        [[1.0, 1.0, 9.0], [1.5, 9.0, np.nan]],
        [[False, True, True], [False, True, False]],
    )
    assert intervals(found, ["pck_torso_0.2"])["pck_torso_0.2"].estimate == pytest.approx(3 / 5)
    assert intervals(found, ["pck_torso_0.2"], "hidden")["pck_torso_0.2"].estimate == pytest.approx(1 / 3)
    assert intervals(found, ["pck_torso_0.2"], "seen")["pck_torso_0.2"].estimate == 1.0
    nothing = intervals(record([[1.0, 2.0]]), ["pck_torso_0.1"], "hidden")["pck_torso_0.1"]
    assert np.isnan([nothing.estimate, nothing.low, nothing.high]).all()


def test_bounds_come_from_persons_not_from_pictures() -> None:
    """Ten pictures of each person say no more about people than one."""
    rng = np.random.default_rng(0)
    errors = np.where(rng.random((30, 1)) < 0.5, 1.0, 9.0) * np.ones((30, 14))
    once = record(errors.tolist())
    often = dataclasses.replace(together([once] * 10, "often"))
    first, second = (intervals(r, ["pck_torso_0.2"])["pck_torso_0.2"] for r in (once, often))
    assert second.estimate == pytest.approx(first.estimate)
    assert second.high - second.low == pytest.approx(first.high - first.low, rel=0.1)
    assert first.high - first.low > 0.25


def test_paired_differences() -> None:
    rng = np.random.default_rng(1)
    hidden = (rng.random((40, 6)) < 0.4).tolist()
    base_errors = rng.uniform(0, 4, (40, 6))
    better = np.where(hidden, base_errors - 1.0, base_errors)
    base, candidate = record(base_errors.tolist(), hidden), record(better.tolist(), hidden)
    same = paired_difference([base], [base], "pck_torso_0.2")
    assert (same.estimate, same.low, same.high) == (0, 0, 0)
    found = paired_difference([base], [candidate], "pck_torso_0.2", "hidden")
    gained = ((base_errors >= 2) & (better < 2))[np.array(hidden)].mean()
    assert found.estimate == pytest.approx(gained)
    assert 0 < found.low < found.estimate < found.high
    assert paired_difference([base], [candidate], "pck_torso_0.2", "seen").estimate == 0
    # Two seeds: the mean of what each gains.
    both = paired_difference([base, base], [candidate, base], "pck_torso_0.2", "hidden")
    assert both.estimate == pytest.approx(gained / 2)


def test_only_the_same_pictures_are_compared() -> None:
    base = record([[1.0, 2.0], [3.0, 4.0]])
    others = [
        record([[1.0, 2.0]]),
        record([[1.0, 2.0], [3.0, 4.0]], [[True, False], [False, False]]),
        record([[1.0, 2.0], [3.0, np.nan]]),
        dataclasses.replace(base, annotation_id=np.array([0, 7])),
        # Another data set may number its people alike, and hide nothing either.
        dataclasses.replace(base, errors=dataclasses.replace(base.errors, extent_px=np.array([20.0, 21.0]))),
        dataclasses.replace(base, errors=dataclasses.replace(base.errors, torso_px=np.array([np.nan, 10.0]))),
    ]
    for other in others:
        with pytest.raises(SpecError, match="same pictures of the same people"):
            paired_difference([base], [other], "pck_torso_0.2")
    with pytest.raises(BadInput, match="an arm without records"):
        paired_difference([], [base], "pck_torso_0.2")


def test_bounds_are_those_of_the_people_that_count() -> None:
    """One of twelve hides no joint: draws of nobody else would make a network that is always right look wrong."""
    hidden = [[True, False]] * 2 + [[False, False]] * 10
    found = record([[1.0, 9.0]] * 12, hidden)
    interval = intervals(found, ["pck_torso_0.2"], "hidden")["pck_torso_0.2"]
    assert (interval.estimate, interval.low, interval.high) == (1.0, 1.0, 1.0)
    worse = record([[5.0, 9.0]] * 12, hidden)
    difference = paired_difference([worse], [found], "pck_torso_0.2", "hidden")
    assert (difference.estimate, difference.low, difference.high) == (1.0, 1.0, 1.0)


def test_one_person_has_no_bounds() -> None:
    one = record([[1.0, 9.0]], [[True, False]], [[0.2, 0.7]])
    many = together([one, one], "drawn twice")
    found = [
        intervals(many, ["pck_torso_0.2"])["pck_torso_0.2"],
        paired_difference([many], [many], "pck_torso_0.2"),
        visibility_quality(many)["auroc"],
    ]
    assert [interval.estimate for interval in found] == [0.5, 0.0, 1.0]
    assert np.isnan([(interval.low, interval.high) for interval in found]).all()


def test_a_comparison_of_what_does_not_count_is_refused() -> None:
    base = record([[1.0, 2.0]])
    with pytest.raises(BadInput, match=r"found no pck_torso_0\.2 of hidden joints in made"):
        paired_difference([base], [base], "pck_torso_0.2", "hidden")


def test_records_of_other_people_are_known_before_anything_is_measured(people: PoseDataset) -> None:
    records = measure_slices(off_by(0.0), people, names=("clean", "truncated"), draws=2)
    for record_ in records.values():
        require_comparable(record_, people, draws=2)
    require_comparable(records["clean"], people, draws=3)
    moved = [dataclasses.replace(p, keypoints=p.keypoints * np.float32(1.1)) for p in people.persons]
    for other in (people.subset([10, 20]), dataclasses.replace(people, persons=tuple(moved))):
        with pytest.raises(SpecError, match="found 9 pictures in clean, expected the"):
            require_comparable(records["clean"], other, draws=2)
    with pytest.raises(AnnotationError, match="found no labelled person"):
        require_comparable(records["clean"], people.subset([]), draws=2)
    with pytest.raises(SpecError, match="found 18 pictures in truncated, expected the 27 to be measured"):
        require_comparable(records["truncated"], people, draws=3)


def test_a_box_outside_of_its_photograph_is_named(people: PoseDataset) -> None:
    def strict(frame: NDArray[np.uint8], boxes: NDArray[np.float64]) -> Poses:
        raise AnnotationError("boxes[0]", found="a box outside the frame")

    with pytest.raises(AnnotationError, match=r"1\.png: annotation 10: boxes\[0\]: found a box outside"):
        measure_slices(strict, people, names=("clean",))


def test_visibility_is_judged_on_known_joints() -> None:
    hidden = [[True, False, False, True]] * 12
    errors = [[1.0, 1.0, np.nan, 1.0]] * 12
    perfect = visibility_quality(record(errors, hidden, [[0.0, 1.0, 0.0, 0.0]] * 12))  # the unlabelled one is wrong
    assert perfect["auroc"].estimate == 1.0
    assert perfect["ece"].estimate == 0.0
    blind = visibility_quality(record(errors, hidden, [[1 / 3] * 4] * 12))
    assert blind["auroc"].estimate == 0.5
    assert blind["ece"].estimate == pytest.approx(0, abs=1e-9)
    sure = visibility_quality(record(errors, hidden, [[0.9] * 4] * 12))
    assert sure["ece"].estimate == pytest.approx(0.9 - 1 / 3)
    assert visibility_quality(record(errors, hidden)) == {}
    assert visibility_quality(record(errors, None, [[0.5] * 4] * 12)) == {}


def test_what_the_network_says_of_visibility_arrives(people: PoseDataset) -> None:
    records = measure_slices(off_by(0.0, confident=0.7), people, names=("occluded_20", "clean"))
    for found in records.values():
        assert found.visibility is not None
        assert np.allclose(found.visibility, 0.7)
        share_seen = 1 - found.hidden[found.known].mean()
        assert visibility_quality(found)["ece"].estimate == pytest.approx(abs(0.7 - share_seen), abs=1e-6)
    assert measure_slices(off_by(0.0), people, names=("clean",))["clean"].visibility is None


def test_records_survive_their_file(people: PoseDataset, tmp_path: Path) -> None:
    records = measure_slices(off_by(2.0, confident=0.4), people, names=("clean", "truncated"))
    records["silent"] = dataclasses.replace(records["clean"], name="silent", visibility=None)
    (tmp_path / "records.npz").write_bytes(npz_from_slices(records))
    back = slices_from_npz(tmp_path / "records.npz")
    assert list(back) == list(records)
    for name, found in back.items():
        assert np.array_equal(found.errors.errors_px, records[name].errors.errors_px, equal_nan=True)
        assert np.array_equal(found.annotation_id, records[name].annotation_id)
        assert paired_difference([records[name]], [found], "auc").estimate == 0
    assert back["silent"].visibility is None
    assert np.array_equal(back["clean"].visibility, records["clean"].visibility)


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 cut off"])
def test_a_file_without_records_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "records.npz"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=r"records\.npz: .*measure the network again"):
        slices_from_npz(path)


def test_a_file_with_missing_arrays_is_named(people: PoseDataset, tmp_path: Path) -> None:
    path = tmp_path / "records.npz"
    np.savez(path, **{"clean:hidden": np.zeros((1, 2), bool)})
    with pytest.raises(SpecError, match=r"no array 'clean:annotation_id'"):
        slices_from_npz(path)


def test_a_file_of_other_arrays_is_named(people: PoseDataset, tmp_path: Path) -> None:
    path, records = tmp_path / "records.npz", measure_slices(off_by(0.0), people, names=("clean",))
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(SpecError, match="no archive of arrays"):
        slices_from_npz(path)
    np.savez(path)
    with pytest.raises(SpecError, match="no archive of arrays"):
        slices_from_npz(path)
    path.write_bytes(npz_from_slices({"clean": dataclasses.replace(records["clean"], hidden=np.zeros((3, 3), bool))}))
    with pytest.raises(SpecError, match=r"clean: hidden of shape \(3, 3\) beside errors of shape \(9, 12\)"):
        slices_from_npz(path)


def test_wrong_questions_are_refused(people: PoseDataset) -> None:
    with pytest.raises(UsageError, match=r"found 'fog', expected names out of clean, occluded_10"):
        measure_slices(off_by(0.0), people, names=("fog",))
    with pytest.raises(UsageError, match="draws: found 0"):
        measure_slices(off_by(0.0), people, draws=0)

    def two_joints(frame: NDArray[np.uint8], boxes: NDArray[np.float64]) -> Poses:
        return Poses(np.zeros((1, 2, 2), np.float32), np.zeros((1, 2), np.float32), boxes.astype(np.float32))

    with pytest.raises(SpecError, match=r"found shape \(1, 2, 2\), expected \(1, 12, 2\)"):
        measure_slices(two_joints, people, names=("clean",))
