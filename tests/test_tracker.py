"""Following people through a video: regions from the frame before, a detector now and then, numbers, smoothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from edgepose.errors import ImageError, UsageError
from edgepose.pose.smoothing import OneEuro
from edgepose.spec import Keypoints, ModelSpec, Poses
from edgepose.tracker import PoseTracker, TrackerOptions, distinct
from tests.fakes import spot_spec

HW = (240, 320)
FRAME = np.zeros((*HW, 3), np.uint8)
POINTS = np.array([[0.0, -20.0], [15.0, 0.0], [-15.0, 20.0]])
BODY = Keypoints(("nose", "left_hip", "right_hip"))


@dataclass
class FakeEstimator:
    """Finds whoever stands nearest to the middle of a box, as a network would, and notes where it was asked to look.

    Attributes:
        people: x, y of everybody, pixels.
        asked: The boxes of each call; None for the whole frame.
    """

    people: list[tuple[float, float]]
    spec: ModelSpec = field(default_factory=spot_spec)
    asked: list[NDArray[np.float64] | None] = field(default_factory=list)
    noise: Callable[[], float] = lambda: 0.0

    def __call__(self, frame: NDArray[np.uint8], boxes: ArrayLike | None = None) -> Poses:
        if frame.dtype != np.uint8:
            raise ImageError("frame", found="no picture")
        where = None if boxes is None else np.asarray(boxes, np.float64).reshape(-1, 4)
        self.asked.append(where)
        looked = np.array([[0.0, 0.0, HW[1], HW[0]]]) if where is None else where
        points, scores = np.zeros((len(looked), 3, 2), np.float32), np.zeros((len(looked), 3), np.float32)
        for row, (x1, y1, x2, y2) in enumerate(looked):
            inside = [(x, y) for x, y in self.people if x1 <= x <= x2 and y1 <= y <= y2]
            if inside:
                nearest = min(inside, key=lambda p: np.hypot(p[0] - (x1 + x2) / 2, p[1] - (y1 + y2) / 2))
                points[row], scores[row] = POINTS + nearest + self.noise(), 0.9
        return Poses(points, scores, looked.astype(np.float32))


@dataclass
class FakeDetector:
    """Finds everybody, and counts how often it looked."""

    people: list[tuple[float, float]]
    looked: int = 0

    def __call__(self, frame: NDArray[np.uint8]) -> Poses:
        self.looked += 1
        boxes = np.array([[x - 22, y - 30, x + 22, y + 30] for x, y in self.people], np.float32).reshape(-1, 4)
        return Poses(np.zeros((len(boxes), 0, 2), np.float32), np.zeros((len(boxes), 0), np.float32), boxes)


RAW = TrackerOptions(smooth=None)


def tracker(
    estimator: FakeEstimator, detector: FakeDetector | None = None, options: TrackerOptions = RAW
) -> PoseTracker:
    estimator.spec = msgspec.structs.replace(spot_spec(), keypoints=BODY)
    return PoseTracker(estimator, detector, options)  # type: ignore[arg-type]


def test_one_person_is_looked_for_where_they_were() -> None:
    estimator = FakeEstimator([(100.0, 100.0)])
    follow = tracker(estimator)
    for frame in range(6):
        estimator.people = [(100.0 + 5 * frame, 100.0)]
        poses = follow(FRAME, frame / 25)
        assert poses.ids is not None
        assert poses.ids.tolist() == [1]
        assert np.allclose(poses.keypoints[0], POINTS + estimator.people[0])
    assert estimator.asked[0] is None
    assert np.allclose(np.concatenate([a for a in estimator.asked[1:2] if a is not None]), [[81, 76, 119, 124]])
    assert all(asked is not None for asked in estimator.asked[1:])


def test_somebody_who_got_lost_is_looked_for_everywhere() -> None:
    estimator = FakeEstimator([(100.0, 100.0)])
    follow = tracker(estimator)
    follow(FRAME, 0.0)
    estimator.people = [(290.0, 200.0)]  # not where they were
    assert len(follow(FRAME, 0.04)) == 0
    poses = follow(FRAME, 0.08)
    assert estimator.asked[-1] is None
    assert np.allclose(poses.keypoints[0], POINTS + np.array([290, 200]))


def test_detector_looks_now_and_then_and_finds_who_came() -> None:
    people = [(60.0, 100.0)]
    estimator, detector = FakeEstimator(people), FakeDetector(people)
    follow = tracker(estimator, detector, TrackerOptions(smooth=None, detect_every=4))
    seen = []
    for frame in range(9):
        if frame == 2:
            people.append((200.0, 100.0))
        ids = follow(FRAME, frame / 25).ids
        assert ids is not None
        seen.append(ids.tolist())
    assert detector.looked == 3  # at 0, 4 and 8
    assert seen == [[1]] * 4 + [[1, 2]] * 5


def test_detector_looks_again_when_somebody_got_lost() -> None:
    people = [(60.0, 100.0), (200.0, 100.0)]
    estimator, detector = FakeEstimator(people), FakeDetector(people)
    follow = tracker(estimator, detector, TrackerOptions(smooth=None, detect_every=100))
    follow(FRAME, 0.0)
    follow(FRAME, 0.04)
    assert detector.looked == 1
    people.remove((60.0, 100.0))
    poses = follow(FRAME, 0.08)
    assert poses.ids is not None
    assert poses.ids.tolist() == [2]
    follow(FRAME, 0.12)
    assert detector.looked == 2


def test_what_the_detector_finds_and_is_nobody_costs_no_further_looks() -> None:
    people = [(60.0, 100.0)]
    detector = FakeDetector([*people, (250.0, 60.0)])  # a coat on a hook
    follow = tracker(FakeEstimator(people), detector, TrackerOptions(smooth=None, detect_every=4))
    assert [len(follow(FRAME, frame / 25)) for frame in range(8)] == [1] * 8
    assert detector.looked == 2  # at 0 and 4


def test_while_nobody_is_there_the_detector_looks_at_every_frame() -> None:
    estimator, detector = FakeEstimator([]), FakeDetector([])
    follow = tracker(estimator, detector)
    for frame in range(4):
        assert len(follow(FRAME, frame / 25)) == 0
    assert detector.looked == 4


def test_two_regions_that_slid_onto_one_person_are_one_person() -> None:
    estimator = FakeEstimator([(60.0, 100.0), (90.0, 100.0)])
    follow = tracker(estimator, FakeDetector(estimator.people), TrackerOptions(smooth=None, detect_every=100))
    assert len(follow(FRAME, 0.0)) == 2
    estimator.people = [(75.0, 100.0)]
    poses = follow(FRAME, 0.04)
    assert len(poses) == 1


def test_boxes_of_the_caller_are_taken_and_nobody_is_left_out() -> None:
    estimator = FakeEstimator([(60.0, 100.0)])
    follow = tracker(estimator)
    boxes = [[30, 60, 90, 140], [150, 60, 210, 140]]
    poses = follow(FRAME, 0.0, boxes)
    assert len(poses) == 2
    assert poses.ids is not None
    assert poses.ids.tolist() == [1, 2]


def test_not_following_looks_everywhere_each_time() -> None:
    estimator = FakeEstimator([(60.0, 100.0)])
    follow = tracker(estimator, None, TrackerOptions(follow=False, smooth=None))
    for frame in range(3):
        follow(FRAME, frame / 25)
    assert estimator.asked == [None, None, None]


def test_smoothing_rests_joints_that_rest() -> None:
    def jitter(options: TrackerOptions) -> float:
        random = np.random.default_rng(0)
        estimator = FakeEstimator([(100.0, 100.0)], noise=lambda: float(random.normal(0, 1)))
        follow = tracker(estimator, None, options)
        return float(np.std([follow(FRAME, frame / 25).keypoints[0, 0, 0] for frame in range(60)][10:]))

    assert jitter(TrackerOptions(smooth=OneEuro(beta=0.0))) < 0.5 * jitter(RAW)


def test_another_size_of_frame_is_another_scene() -> None:
    estimator = FakeEstimator([(100.0, 100.0)])
    follow = tracker(estimator)
    follow(FRAME, 0.0)
    follow(np.zeros((480, 640, 3), np.uint8), 0.04)
    assert estimator.asked == [None, None]


def test_a_frame_that_raises_changes_nothing() -> None:
    estimator = FakeEstimator([(100.0, 100.0)])
    follow = tracker(estimator)
    follow(FRAME, 0.0)
    with pytest.raises(ImageError):
        follow(FRAME.astype(np.float32), 0.04)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="time of a frame"):
        tracked = tracker(FakeEstimator([(100.0, 100.0)]), None, TrackerOptions())
        tracked(FRAME, 1.0)
        tracked(FRAME, 0.5)
    poses = follow(FRAME, 0.04)
    assert poses.ids is not None
    assert poses.ids.tolist() == [1]
    assert estimator.asked[-1] is not None


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="detect_every from 1"):
        TrackerOptions(detect_every=0)


def test_poses_that_nobody_can_compare_are_all_kept() -> None:
    poses = FakeEstimator([(60.0, 100.0)])(FRAME, [[0, 0, 99, 200], [0, 0, 99, 200]])
    assert distinct(poses, None, 0.5).tolist() == [0, 1]
    assert distinct(poses, np.full(3, 0.1), 0.5).tolist() == [0]
