"""Who is who from frame to frame, on people made of arrays."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepose.errors import SpecError, UsageError
from edgepose.pose.tracking import Tracking, TrackingState, best_pairs, identify, joint_boxes

SIGMAS = np.full(3, 0.08)
SHAPE = np.array([[0.0, 0.0], [20.0, 40.0], [-20.0, 80.0]])


def person_at(x: float, y: float = 0.0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return SHAPE + np.array([x, y]), np.array([x - 25, y - 5, x + 25, y + 85])


def step(
    state: TrackingState, people: list[tuple[NDArray[np.float64], NDArray[np.float64]]], time_s: float
) -> tuple[list[int], TrackingState]:
    points = np.array([p for p, _ in people]).reshape(-1, 3, 2)
    boxes = np.array([b for _, b in people]).reshape(-1, 4)
    ids, after = identify(state, points, boxes, time_s, SIGMAS)
    return ids.tolist(), after


def test_people_keep_their_numbers_whatever_the_order_of_the_rows() -> None:
    ids, state = step(TrackingState(), [person_at(50), person_at(200)], 0.0)
    assert ids == [1, 2]
    ids, state = step(state, [person_at(210), person_at(55)], 0.04)
    assert ids == [2, 1]
    ids, state = step(state, [person_at(400), person_at(215), person_at(60)], 0.08)
    assert ids == [3, 2, 1]


def test_who_comes_back_soon_is_known_and_who_comes_back_late_is_new() -> None:
    _, state = step(TrackingState(), [person_at(50), person_at(200)], 0.0)
    ids, state = step(state, [person_at(200)], 0.5)
    assert ids == [2]
    assert step(state, [person_at(52), person_at(200)], 0.9)[0] == [1, 2]
    assert step(state, [person_at(52), person_at(200)], 1.2)[0] == [3, 2]


def test_numbers_are_never_given_twice() -> None:
    state, seen = TrackingState(), set[int]()
    for frame in range(20):
        ids, state = step(state, [person_at(500.0 * frame)], float(frame))
        assert not seen & set(ids)
        seen |= set(ids)


def test_two_people_never_share_a_number() -> None:
    """Both are like the one who was there; the nearer one is them."""
    _, state = step(TrackingState(), [person_at(100)], 0.0)
    ids, _ = step(state, [person_at(112), person_at(101)], 0.04)
    assert ids == [2, 1]


def test_state_is_not_changed_by_a_step() -> None:
    _, state = step(TrackingState(), [person_at(100)], 0.0)
    before = state.people, state.given
    step(state, [person_at(300), person_at(101)], 0.04)
    assert (state.people, state.given) == before


def test_joints_that_were_not_found_do_not_matter() -> None:
    _, state = step(TrackingState(), [person_at(100)], 0.0)
    points, box = person_at(102)
    points[1] = np.nan
    assert step(state, [(points, box)], 0.04)[0] == [1]
    assert step(state, [(np.full((3, 2), np.nan), box)], 0.04)[0] == [1]  # the boxes overlap


def test_boxes_alone_do_where_nobody_knows_how_joints_vary() -> None:
    points, box = person_at(100)
    _, state = identify(TrackingState(), points[None], box[None], 0.0, None)
    moved, box = person_at(110)
    assert identify(state, moved[None], box[None], 0.1, None)[0].tolist() == [1]
    moved, box = person_at(170)
    assert identify(state, moved[None], box[None], 0.1, None)[0].tolist() == [2]


def test_nobody_is_a_frame_as_well() -> None:
    ids, state = step(TrackingState(), [], 0.0)
    assert ids == []
    assert step(state, [person_at(5)], 0.1)[0] == [1]


def test_arrays_that_describe_other_people_are_refused() -> None:
    with pytest.raises(SpecError, match="people to track"):
        identify(TrackingState(), np.zeros((2, 3, 2)), np.zeros((1, 4)), 0.0, SIGMAS)
    with pytest.raises(UsageError, match="tracking"):
        Tracking(min_similarity=0.0)


def test_best_pairs_are_disjoint_and_best_first() -> None:
    assert best_pairs(np.array([[0.9, 0.8], [0.85, 0.1]]), 0.2) == {0: 0}
    assert best_pairs(np.array([[0.9, 0.8], [0.85, 0.3]]), 0.2) == {0: 0, 1: 1}
    assert best_pairs(np.zeros((0, 2)), 0.2) == {}


def test_next_region_holds_the_trusted_joints_with_room() -> None:
    points = np.array([[[10.0, 20.0], [50.0, 100.0], [30.0, 60.0], [900.0, 900.0]]])
    scores = np.array([[0.9, 0.9, 0.9, 0.1]])
    boxes = joint_boxes(points, scores, min_score=0.3, margin=0.1)
    assert np.allclose(boxes, [[10 - 8, 20 - 8, 50 + 8, 100 + 8]])


@pytest.mark.parametrize("scores", [[0.9, 0.9, 0.1, 0.1], [0.0, 0.0, 0.0, 0.0]])
def test_who_has_too_few_trusted_joints_is_lost(scores: list[float]) -> None:
    points = np.array([[[10.0, 20.0], [50.0, 100.0], [30.0, 60.0], [np.nan, 9.0]]])
    assert np.isnan(joint_boxes(points, np.array([scores]), min_score=0.3, margin=0.1)).all()


def test_joints_all_in_one_place_are_nobody() -> None:
    assert np.isnan(joint_boxes(np.ones((1, 4, 2)), np.ones((1, 4)), min_score=0.3, margin=0.1)).all()
    assert joint_boxes(np.empty((0, 4, 2)), np.empty((0, 4)), min_score=0.3, margin=0.1).shape == (0, 4)
