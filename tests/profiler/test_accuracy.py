"""Evaluation over small COCO files with estimators that know their errors.

Invariant: expected figures follow from the errors put in, not from another run of the code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgepose.data.coco import PoseDataset, dataset, read_coco
from edgepose.errors import AnnotationError, ImageError, SpecError, UsageError
from edgepose.profiler import accuracy
from edgepose.profiler.accuracy import AccuracyRecord, evaluate
from edgepose.spec import Poses

NAMES = [f"{s}_{j}" for j in ("shoulder", "elbow", "wrist", "hip", "knee", "ankle") for s in ("left", "right")] + [
    "neck",
    "nose",
]
PEOPLE_PER_IMAGE = (3, 1, 2)


@pytest.fixture
def people(tmp_path: Path) -> PoseDataset:
    """Three images, six people written in mixed image order; every torso is 50 px, every extent 100 px."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for index, count in enumerate(PEOPLE_PER_IMAGE):
        frame = np.full((240, 320, 3), 10 * (index + 1), np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{index}.png"), frame)
        images.append({"id": 100 + index, "file_name": f"{index}.png", "height": 240, "width": 320})
        annotations += [annotation(image_id=100 + index, x=40.0 * k) for k in range(count)]
    annotations = annotations[::2] + annotations[1::2]
    for identity, row in enumerate(annotations, start=1):
        row["id"] = identity
    category = {"id": 5, "name": "person", "keypoints": NAMES, "skeleton": [], "oks_sigmas": [0.08] * len(NAMES)}
    document = {"images": images, "annotations": annotations, "categories": [category]}
    (tmp_path / "val.json").write_text(json.dumps(document))
    return dataset(tmp_path, "val")


def annotation(*, image_id: int, x: float) -> dict[str, Any]:
    points = np.tile([x + 50.0, 50.0, 2.0], (len(NAMES), 1))
    points[NAMES.index("left_shoulder"), :2] = x, 20.0
    points[NAMES.index("right_hip"), :2] = x + 30.0, 60.0
    points[NAMES.index("left_ankle"), :2] = x + 100.0, 80.0
    return {
        "image_id": image_id,
        "category_id": 5,
        "iscrowd": 0,
        "bbox": [x, 10.0, 110.0, 100.0],
        "area": 5000.0,
        "num_keypoints": len(NAMES),
        "keypoints": points.ravel().tolist(),
    }


class Oracle:
    """Knows the truth by image brightness and box, and misses the joints it is told to by so many pixels."""

    def __init__(self, people: PoseDataset, offsets_px: dict[str, float]) -> None:
        self.truth = {(p.image_id, float(p.bbox_xywh[0])): p.keypoints for p in people.persons}
        self.offset = np.zeros((people.keypoints.count, 2), np.float32)
        for name, offset in offsets_px.items():
            self.offset[people.keypoints.names.index(name), 0] = offset
        self.calls: list[tuple[int, int]] = []

    def __call__(self, frame: NDArray[np.uint8], boxes: NDArray[np.float64]) -> Poses:
        image_id = 99 + int(frame[0, 0, 0]) // 10
        self.calls.append((image_id, len(boxes)))
        points = np.stack([self.truth[image_id, float(box[0])][:, :2] for box in boxes]) + self.offset
        scores = np.full(points.shape[:2], 0.5, np.float32)
        return Poses(points.astype(np.float32), scores, boxes.astype(np.float32), backend="oracle")


def test_figures_follow_from_the_errors(people: PoseDataset) -> None:
    oracle = Oracle(people, {"left_knee": 7.0, "neck": 9.5, "nose": 30.0})
    record = evaluate(oracle, people)
    found = accuracy.summary(record, people.keypoints)
    assert found["pck_torso_0.2"] == pytest.approx(13 / 14)
    assert found["pck_torso_0.1"] == pytest.approx(11 / 14)
    assert found["limb12_torso_0.1"] == pytest.approx(11 / 12)
    assert found["limb12_extent_0.1"] == pytest.approx(1.0)
    assert found["mpjpe_px"] == pytest.approx((7 + 9.5 + 30) / 14)
    table = accuracy.per_joint(record, people.keypoints)
    assert table["nose"]["labelled"] == 6
    assert table["nose"]["pck_torso_0.2"] == 0.0
    assert table["left_knee"]["mpjpe_px"] == pytest.approx(7.0)
    assert table["left_knee"]["pck_torso_0.1"] == 0.0
    assert table["left_wrist"]["pck_torso_0.1"] == 1.0


def test_rows_keep_the_order_of_the_file_and_images_go_in_one_call(people: PoseDataset) -> None:
    oracle = Oracle(people, {})
    record = evaluate(oracle, people)
    assert sorted(oracle.calls) == [(100, 3), (101, 1), (102, 2)]
    assert record.annotation_id.tolist() == [1, 2, 3, 4, 5, 6]
    assert record.image_id.tolist() == [p.image_id for p in people.persons]
    assert (record.errors_px == 0).all()
    assert record.backend == "oracle"
    assert record.dataset == people.digest


def test_batch_bounds_the_people_of_a_call_and_changes_nothing_else(people: PoseDataset) -> None:
    oracle, seen = Oracle(people, {"neck": 3.0}), []
    record = evaluate(oracle, people, batch=2, progress=lambda done, total: seen.append((done, total)))
    assert sorted(oracle.calls) == [(100, 1), (100, 2), (101, 1), (102, 2)]
    assert seen[-1] == (6, 6)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert_equal(record, evaluate(oracle, people))


def test_json_round_trip_is_exact(people: PoseDataset) -> None:
    record = evaluate(Oracle(people, {"neck": 0.1}), people)
    assert_equal(accuracy.record_from_json(accuracy.json_from_record(record)), record)


@settings(max_examples=30, deadline=None)
@given(persons=st.integers(1, 4), joints=st.integers(1, 5), seed=st.integers(0, 2**32 - 1))
def test_json_round_trip_of_any_record(persons: int, joints: int, seed: int) -> None:
    record = random_record(persons, joints, seed)
    assert_equal(accuracy.record_from_json(accuracy.json_from_record(record)), record)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("scores"), "scores"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.update(schema=2), "schema: found 2, expected 1"),
        (lambda d: d["torso_px"].pop(), r"torso_px: found shape \(5,\), expected \(6,\)"),
        (lambda d: d["scores"][0].pop(), "no array"),
        (lambda d: d["visibility"][0].__setitem__(0, 300), "no array"),
    ],
)
def test_a_damaged_record_is_refused(
    people: PoseDataset, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    document = json.loads(accuracy.json_from_record(evaluate(Oracle(people, {}), people)))
    damage(document)
    with pytest.raises(SpecError, match=message) as caught:
        accuracy.record_from_json(json.dumps(document).encode(), where="a.json")
    assert str(caught.value).startswith(("a.json", "accuracy record"))


def test_text_that_is_not_json_is_refused() -> None:
    with pytest.raises(SpecError, match=r"a\.json"):
        accuracy.record_from_json(b"{", where="a.json")


def test_a_joint_that_was_not_predicted_counts_as_wrong_everywhere(people: PoseDataset) -> None:
    oracle = Oracle(people, {"neck": float("nan")})
    record = evaluate(oracle, people)
    assert accuracy.summary(record, people.keypoints)["pck_torso_0.2"] == pytest.approx(13 / 14)
    again = accuracy.record_from_json(accuracy.json_from_record(record))
    assert accuracy.summary(again, people.keypoints)["pck_torso_0.2"] == pytest.approx(13 / 14)
    row = accuracy.coco_results(record)[0]
    neck = NAMES.index("neck")
    assert row["keypoints"][3 * neck : 3 * neck + 3] == [0.0, 0.0, 0.0]
    json.dumps(row, allow_nan=False)


def test_person_sums_allow_a_paired_comparison(people: PoseDataset) -> None:
    base = evaluate(Oracle(people, {}), people)
    worse = evaluate(Oracle(people, {"neck": 20.0}), people)
    accuracy.require_same_persons(base, worse)
    right, joints = accuracy.person_sums(worse, people.keypoints, "pck_torso_0.2")
    assert right.tolist() == [13.0] * 6
    assert joints.tolist() == [14.0] * 6


def test_records_of_different_persons_are_not_compared(people: PoseDataset) -> None:
    base = evaluate(Oracle(people, {}), people)
    fewer = evaluate(Oracle(people, {}), people.subset([1, 2, 3]))
    with pytest.raises(SpecError, match="the same persons"):
        accuracy.require_same_persons(base, fewer)


def test_coco_results_hold_one_row_per_person_in_coco_form(people: PoseDataset) -> None:
    rows = accuracy.coco_results(evaluate(Oracle(people, {}), people), category_id=5)
    person = people.persons[1]
    assert len(rows) == 6
    assert rows[1]["image_id"] == person.image_id
    assert rows[1]["category_id"] == 5
    assert rows[1]["bbox"] == person.bbox_xywh.tolist()
    assert rows[1]["score"] == 0.5
    triples = np.reshape(rows[1]["keypoints"], (-1, 3))
    np.testing.assert_array_equal(triples[:, :2], person.keypoints[:, :2])
    assert (triples[:, 2] == 0.5).all()


def test_oks_map_of_an_oracle_is_one_and_of_a_wrong_one_is_not(people: PoseDataset) -> None:
    assert accuracy.oks_map(evaluate(Oracle(people, {}), people), people)["oks_ap"] == pytest.approx(1.0)
    wrong = evaluate(Oracle(people, dict.fromkeys(NAMES, 200.0)), people)
    assert accuracy.oks_map(wrong, people)["oks_ap"] == 0.0
    assert accuracy.oks(wrong, people.keypoints).max() < 0.01


def test_oks_map_of_a_subset_judges_that_subset(people: PoseDataset) -> None:
    some = people.subset([1, 2])
    assert accuracy.oks_map(evaluate(Oracle(people, {}), some), some)["oks_ar"] == pytest.approx(1.0)


def test_crowds_and_people_without_keypoints_stay_as_regions_to_ignore(people: PoseDataset) -> None:
    document = json.loads(people.source.read_text())
    crowd = {**annotation(image_id=100, x=0.0), "id": 7, "iscrowd": 1}
    blank = {**annotation(image_id=102, x=0.0), "id": 8, "num_keypoints": 0, "keypoints": [0.0] * 3 * len(NAMES)}
    elsewhere = {**blank, "id": 9, "image_id": 101}
    document["annotations"] += [crowd, blank, elsewhere]
    people.source.write_text(json.dumps(document))
    everyone = dataset(people.source.parent, "val")
    assert len(everyone) == 6
    some = everyone.without([p.annotation_id for p in everyone.persons if p.image_id == 101])
    truth = accuracy.coco_truth(some)
    kept = {row["id"] for row in truth["annotations"]}
    assert kept == {p.annotation_id for p in some.persons} | {7, 8}
    assert {image["id"] for image in truth["images"]} == {100, 102}


def test_oks_map_fills_in_what_annotations_leave_out(people: PoseDataset) -> None:
    document = json.loads(people.source.read_text())
    for row in document["annotations"]:
        del row["area"], row["num_keypoints"], row["iscrowd"]
    people.source.write_text(json.dumps(document))
    assert accuracy.oks_map(evaluate(Oracle(people, {}), people), people)["oks_ap"] == pytest.approx(1.0)


def test_oks_map_notices_that_the_labels_changed(people: PoseDataset) -> None:
    record = evaluate(Oracle(people, {}), people)
    document = json.loads(people.source.read_text())
    document["annotations"] = [a for a in document["annotations"] if a["id"] != 3]
    people.source.write_text(json.dumps(document))
    with pytest.raises(AnnotationError, match="annotation 3"):
        accuracy.oks_map(record, people)
    people.source.unlink()
    with pytest.raises(AnnotationError, match=r"val\.json"):
        accuracy.oks_map(record, people)


def test_an_estimator_of_another_keypoint_set_is_refused(people: PoseDataset) -> None:
    def seventeen(frame: NDArray[np.uint8], boxes: NDArray[np.float64]) -> Poses:
        return Poses(np.zeros((len(boxes), 17, 2), np.float32), np.zeros((len(boxes), 17), np.float32), boxes)

    with pytest.raises(SpecError, match=r"predicted keypoints: found shape \(\d, 17, 2\), expected \(\d, 14, 2\)"):
        evaluate(seventeen, people)


def test_too_few_poses_are_refused(people: PoseDataset) -> None:
    oracle = Oracle(people, {})
    with pytest.raises(SpecError, match="predicted keypoints"):
        evaluate(lambda frame, boxes: oracle(frame, boxes[:1]), people)


def test_unusable_arguments_are_refused(people: PoseDataset) -> None:
    with pytest.raises(AnnotationError, match="no labelled person"):
        evaluate(Oracle(people, {}), people.subset([]))
    with pytest.raises(UsageError, match="batch"):
        evaluate(Oracle(people, {}), people, batch=0)
    people.persons[0].image.write_bytes(b"not an image")
    with pytest.raises(ImageError, match="not"):
        evaluate(Oracle(people, {}), people)


def test_arrays_of_a_record_are_read_only_copies(people: PoseDataset) -> None:
    record = evaluate(Oracle(people, {}), people)
    with pytest.raises(ValueError, match="read-only"):
        record.errors_px[0, 0] = 1.0


def test_real_people_and_hidden_joints_go_through(real_data: Path) -> None:
    everyone = read_coco(real_data / "coco17" / "train.json", real_data / "coco17" / "images")
    some = everyone.sample(20, seed=0)
    truth = {(p.image.name, *p.box_xyxy.tolist()): p.keypoints for p in some.persons}
    name = iter(dict.fromkeys(p.image.name for p in some.persons))

    def exact(frame: NDArray[np.uint8], boxes: NDArray[np.float64]) -> Poses:
        image = next(name)
        points = np.stack([truth[image, *box.tolist()] for box in boxes])
        return Poses(points[..., :2], np.ones(points.shape[:2], np.float32), boxes.astype(np.float32))

    record = evaluate(exact, some, batch=1000)
    found = accuracy.summary(record, some.keypoints)
    assert found["pck_torso_0.1"] == found["limb12_extent_0.1"] == 1.0
    assert (record.visibility == 1).any()
    assert accuracy.oks_map(record, some)["oks_ap"] == pytest.approx(1.0)


def random_record(persons: int, joints: int, seed: int) -> AccuracyRecord:
    rng = np.random.default_rng(seed)
    visibility = rng.integers(0, 3, (persons, joints)).astype(np.uint8)
    predicted = rng.normal(0, 1e3, (persons, joints, 2)).astype(np.float32)
    errors = rng.exponential(10, (persons, joints))
    lost = rng.random((persons, joints)) < 0.1
    predicted[lost], errors[lost] = np.nan, np.inf
    errors[visibility == 0] = np.nan
    return AccuracyRecord(
        dataset="d",
        backend="b",
        image_id=rng.integers(0, 2**40, persons),
        annotation_id=rng.integers(0, 2**40, persons),
        boxes=rng.normal(0, 1e3, (persons, 4)).astype(np.float32),
        predicted=predicted,
        scores=rng.random((persons, joints)).astype(np.float32),
        visibility=visibility,
        errors_px=errors,
        torso_px=np.where(rng.random(persons) < 0.3, np.nan, rng.exponential(50, persons)),
        extent_px=rng.exponential(99, persons),
        area_px2=rng.exponential(999, persons),
    )


def assert_equal(a: AccuracyRecord, b: AccuracyRecord) -> None:
    assert (a.dataset, a.backend) == (b.dataset, b.backend)
    for name in accuracy._DTYPES:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
        assert getattr(a, name).dtype == getattr(b, name).dtype
