"""Candidates of a one-stage network to people: thresholds, duplicates, half pixels, and whose pose is whose."""

from __future__ import annotations

import numpy as np
import pytest

from edgepose.errors import SpecError
from edgepose.estimator import PoseEstimator
from edgepose.pose.codec import decode, output_names, people_candidates
from edgepose.pose.nms import box_ious, box_nms
from edgepose.pose.one_stage import owners, people_of
from edgepose.runtime.session import Array
from edgepose.spec import Keypoints, ModelSpec, OneStage, Preprocess, TensorSpec
from tests.fakes import FakeSession

POSES = OneStage(min_score=0.3, max_iou=0.5)
BOXES = OneStage(keypoints="", keypoint_scores="", min_score=0.3, max_iou=0.5)


def outputs() -> dict[str, Array]:
    """One frame, four candidates: two of one person, one of another, one too unsure."""
    boxes = np.array([[[0, 0, 10, 20], [1, 0, 11, 20], [40, 0, 50, 20], [80, 0, 90, 20]]], np.float32)
    scores = np.array([[0.6, 0.9, 0.4, 0.2]], np.float32)
    keypoints = np.stack([boxes[..., :2] + 3.5, boxes[..., 2:] - 1.5], axis=2)
    sure = np.broadcast_to(np.array([0.7, 0.8], np.float32), (1, 4, 2))
    return {"boxes": boxes, "scores": scores, "keypoints": keypoints, "keypoint_scores": sure}


def test_people_are_confident_candidates_without_duplicates() -> None:
    people = people_of(people_candidates(outputs(), POSES), 0, POSES)
    assert people.scores.tolist() == pytest.approx([0.9, 0.4])
    assert people.boxes.tolist() == [[0.5, -0.5, 10.5, 19.5], [39.5, -0.5, 49.5, 19.5]]
    assert people.keypoints[0].tolist() == [[4, 3], [9, 18]]  # 1 + 3.5 and 11 - 1.5, from edges to centres
    assert people.keypoint_scores[1].tolist() == pytest.approx([0.7, 0.8])


def test_decoding_takes_the_best_candidate_whatever_its_score() -> None:
    keypoints, scores = decode(outputs(), OneStage(min_score=1.0))
    assert keypoints.tolist() == [[[4, 3], [9, 18]]]
    assert scores.tolist() == [pytest.approx([0.7, 0.8])]


def test_a_detectors_keypoints_are_its_corners_and_its_scores_the_boxes() -> None:
    keypoints, scores = decode(outputs(), BOXES)
    assert keypoints.tolist() == [[[0.5, -0.5], [10.5, 19.5]]]
    assert scores.tolist() == [pytest.approx([0.9, 0.9])]
    assert output_names(BOXES) == ("boxes", "scores")


def test_nobody_is_found_in_nothing() -> None:
    nothing = {name: values[:, :0] for name, values in outputs().items()}
    keypoints, scores = decode(nothing, POSES)
    assert np.isnan(keypoints).all()
    assert keypoints.shape == (1, 2, 2)
    assert not scores.any()
    assert len(people_of(people_candidates(nothing, POSES), 0, POSES).scores) == 0


def test_a_score_that_is_no_number_is_nobody() -> None:
    broken = outputs() | {"scores": np.array([[np.nan, 0.9, np.nan, np.nan]], np.float32)}
    assert people_of(people_candidates(broken, POSES), 0, POSES).scores.tolist() == pytest.approx([0.9])
    assert decode(broken, POSES)[0].tolist() == [[[4, 3], [9, 18]]]


def test_outputs_of_different_candidates_are_refused() -> None:
    with pytest.raises(SpecError, match="the same candidates"):
        decode(outputs() | {"scores": np.zeros((1, 3), np.float32)}, POSES)


def test_boxes_overlap_as_computed_by_hand() -> None:
    # 10 x 20 boxes shifted by 1: 180 of 220; by 5: 100 of 300.
    found = box_ious(
        np.array([[0, 0, 10, 20]]), np.array([[1, 0, 11, 20], [5, 0, 15, 20], [10, 0, 20, 20], [3, 3, 3, 9]])
    )
    assert found.tolist() == [[pytest.approx(180 / 220), pytest.approx(1 / 3), 0, 0]]
    boxes = np.array([[0, 0, 10, 20], [1, 0, 11, 20], [5, 0, 15, 20]], float)
    assert box_nms(boxes, np.array([0.5, 0.9, 0.7]), max_iou=0.4).tolist() == [1]
    assert box_nms(boxes, np.array([0.5, 0.9, 0.7]), max_iou=0.5).tolist() == [1, 2]
    with pytest.raises(SpecError, match="boxes to suppress"):
        box_nms(boxes, np.zeros(2), max_iou=0.5)


def test_each_box_gets_one_pose_the_one_that_overlaps_most() -> None:
    found = np.array([[0, 0, 10, 20], [2, 0, 12, 20], [100, 0, 110, 20]], float)
    wanted = np.array([[2, 0, 12, 20], [1, 0, 11, 20], [50, 0, 60, 20]], float)
    assert owners(wanted, found).tolist() == [1, 0, -1]
    assert owners(wanted, np.zeros((0, 4))).tolist() == [-1, -1, -1]


def one_stage_spec(decoder: OneStage = POSES) -> ModelSpec:
    names = ("head", "feet") if decoder.keypoints else ("first_corner", "last_corner")
    return ModelSpec(
        name="people",
        keypoints=Keypoints(names),
        preprocess=Preprocess((32, 64), "bgr", (0, 0, 0), (1, 1, 1), padding=1.0, border=114),
        decoder=decoder,
        inputs=(TensorSpec("images", ("batch", 3, 32, 64)),),
        outputs=tuple(TensorSpec(name, ("batch", 4)) for name in output_names(decoder)),
    )


def bright(images: Array) -> dict[str, Array]:
    """One candidate per channel: the extent of its bright pixels, measured from outer edges."""
    boxes = np.zeros((len(images), 3, 4), np.float32)
    for frame, image in enumerate(images):
        for channel, plane in enumerate(image):
            rows, columns = np.nonzero(plane > 200)
            if len(rows):
                boxes[frame, channel] = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    scores = (boxes[..., 2] > 0).astype(np.float32) * 0.9
    points = np.stack([boxes[..., :2] / 2 + boxes[..., 2:] / 2, boxes[..., 2:]], 2)
    return {
        "boxes": boxes,
        "scores": scores,
        "keypoints": points,
        "keypoint_scores": np.ones((*points.shape[:3],), np.float32),
    }


def frame() -> Array:
    """128 x 128, scaled by 1/4 and centred in 64 x 32: a blue person and a red one."""
    picture = np.zeros((128, 128, 3), np.uint8)
    picture[16:80, 8:40, 0] = 255
    picture[32:96, 80:112, 2] = 255
    return picture


def test_a_frame_is_shown_whole_and_its_people_come_back_in_its_pixels() -> None:
    session = FakeSession(one_stage_spec(), bright)
    poses = PoseEstimator(session, one_stage_spec())(frame())
    assert session.batches == [1]
    assert len(poses) == 2
    order = np.argsort(poses.boxes[:, 0])
    np.testing.assert_allclose(poses.boxes[order], [[8, 16, 40, 80], [80, 32, 112, 96]], atol=2)
    np.testing.assert_allclose(poses.keypoints[order, 0], [[24, 48], [96, 64]], atol=2)
    assert not poses.keypoints.flags.writeable


def test_boxes_ask_for_people() -> None:
    estimator = PoseEstimator(FakeSession(one_stage_spec(), bright), one_stage_spec())
    poses = estimator(frame(), [[78, 30, 114, 98], [0, 100, 20, 120]])
    assert poses.boxes.tolist() == [[78, 30, 114, 98], [0, 100, 20, 120]]
    np.testing.assert_allclose(poses.keypoints[0, 0], [96, 64], atol=2)
    assert np.isnan(poses.keypoints[1]).all()
    assert not poses.scores[1].any()


def test_what_lies_outside_the_frame_is_the_border() -> None:
    shown: list[Array] = []

    def watch(images: Array) -> dict[str, Array]:
        shown.append(images)
        return bright(images)

    PoseEstimator(FakeSession(one_stage_spec(), watch), one_stage_spec())(frame())
    assert set(shown[0][0, :, :, :15].ravel().tolist()) == {114}


def test_a_detector_finds_boxes_and_is_not_mirrored() -> None:
    spec = one_stage_spec(BOXES)
    poses = PoseEstimator(FakeSession(spec, bright), spec)(frame())
    np.testing.assert_allclose(poses.keypoints.reshape(-1, 4), poses.boxes, atol=1e-4)
    with pytest.raises(SpecError, match="one-stage"):
        PoseEstimator(FakeSession(spec, bright), spec, flip_test=True)


def test_a_network_with_another_number_of_keypoints() -> None:
    spec = one_stage_spec()
    other = ModelSpec(spec.name, Keypoints(("a", "b", "c")), spec.preprocess, spec.decoder, spec.inputs, spec.outputs)
    with pytest.raises(SpecError, match="found 2 keypoints, expected 3"):
        PoseEstimator(FakeSession(other, bright), other)(frame())
