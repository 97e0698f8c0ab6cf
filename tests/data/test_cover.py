"""Joints have an extent: what hides them covers most of it."""

from __future__ import annotations

import numpy as np
import pytest

from edgepose.data.cover import joints_covered

SIDE_PX = 100.0  # a joint is a disc of 3 pixels


def hidden(covered: np.ndarray, *points: tuple[float, float]) -> list[bool]:
    return joints_covered((covered * 255).astype(np.uint8), np.array(points), SIDE_PX).tolist()


def test_a_wall_hides_what_is_behind_it_and_nothing_beside_it() -> None:
    wall = np.zeros((40, 40))
    wall[:, 20:] = 1
    assert hidden(wall, (30, 10), (17, 10), (20, 10), (19, 10)) == [True, False, True, False]


def test_a_thin_bar_hides_nothing_and_a_pinhole_shows_nothing() -> None:
    bar, pierced = np.zeros((40, 40)), np.ones((40, 40))
    bar[:, 19:21] = 1
    pierced[20, 20] = 0
    assert hidden(bar, (20, 20)) == [False]
    assert hidden(pierced, (20, 20)) == [True]


def test_only_what_lies_inside_the_image_counts() -> None:
    corner = np.zeros((40, 40))
    corner[:3, :3] = 1
    assert hidden(corner, (0, 0), (39, 39)) == [True, False]


def test_half_transparent_covers_count_by_half() -> None:
    assert hidden(np.full((20, 20), 0.6), (10, 10)) == [True]
    assert hidden(np.full((20, 20), 0.4), (10, 10)) == [False]


@pytest.mark.parametrize("side_px", [1.0, 10.0, 25.0])
def test_specks_of_people_have_joints_of_a_pixel(side_px: float) -> None:
    covered = np.zeros((10, 10), np.uint8)
    covered[4, 5] = 255
    assert joints_covered(covered, np.array([[5.2, 3.9], [7.0, 4.0]]), side_px).tolist() == [True, False]


def test_nobody_has_no_joints() -> None:
    assert joints_covered(np.zeros((5, 5), np.uint8), np.zeros((0, 2)), 50.0).shape == (0,)
