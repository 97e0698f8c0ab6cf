"""Drawing: what is where, in which colour, and what stays untouched.

Invariant: tests look at pixels, not at calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edgepose.errors import ImageError, SpecError, UsageError
from edgepose.pose import draw as drawing
from edgepose.pose.draw import draw, side_by_side
from edgepose.spec import Keypoints, Poses

SET = Keypoints(names=("left_hand", "right_hand", "neck"), skeleton=((0, 2), (1, 2)))
LEFT_AT, RIGHT_AT, NECK_AT = (150.0, 200.0), (50.0, 200.0), (100.0, 40.0)


def poses(scores: tuple[float, float, float] = (0.9, 0.9, 0.9)) -> Poses:
    return Poses(
        np.array([[LEFT_AT, RIGHT_AT, NECK_AT]], np.float32),
        np.array([scores], np.float32),
        np.array([[20, 10, 180, 230]], np.float32),
    )


def grey(height: int = 240, width: int = 200) -> np.ndarray:
    return np.full((height, width, 3), 128, np.uint8)


def scaled(people: Poses, factor: int) -> Poses:
    return Poses(people.keypoints * factor, people.scores, people.boxes * factor)


def near(found: Sequence[int] | np.ndarray, color: Sequence[int]) -> bool:
    """Equal but for the rounding of anti-aliased edges."""
    return bool(np.abs(np.subtract(found, color, dtype=int)).max() < 25)


def pixel(frame: np.ndarray, x: float, y: float) -> tuple[int, ...]:
    return tuple(int(value) for value in frame[round(y), round(x)])


def test_the_frame_is_not_written_to() -> None:
    frame = grey()
    frame.setflags(write=False)
    picture = draw(frame, poses(), SET)
    assert (frame == 128).all()
    assert picture.shape == frame.shape
    assert picture.dtype == np.uint8
    assert (picture != frame).any()


def test_sides_have_their_colours() -> None:
    picture = draw(grey(), poses(), SET)
    assert pixel(picture, *LEFT_AT) == drawing.LEFT
    assert pixel(picture, *RIGHT_AT) == drawing.RIGHT
    assert pixel(picture, *NECK_AT) == drawing.MIDDLE
    assert near(pixel(picture, 125, 120), drawing.LEFT), "half way along the left limb"
    assert near(pixel(picture, 75, 120), drawing.RIGHT)


def test_uncertain_joints_are_hollow_and_their_limbs_faint() -> None:
    unsure = scaled(poses((0.1, 0.9, 0.9)), 4)
    picture = draw(grey(960, 800), unsure, SET)
    x, y = round(4 * LEFT_AT[0]), round(4 * LEFT_AT[1])
    around = picture[y - 15 : y + 16, x - 15 : x + 16].reshape(-1, 3)
    assert sum(near(found, drawing.LEFT) for found in around) > 40, "the ring"
    faint = pixel(picture, 500, 480)
    assert near(pixel(picture, x, y + 2), faint), "nothing but the faint limb's end inside of the ring"
    assert not near(faint, drawing.LEFT)
    assert not near(faint, (128, 128, 128))
    sure = draw(grey(960, 800), unsure, SET, min_score=0.05)
    assert near(pixel(sure, x, y + 5), drawing.LEFT)
    assert near(pixel(sure, 500, 480), drawing.LEFT)


def test_lines_grow_with_the_person() -> None:
    def drawn_px(size: int) -> int:
        frame = grey(240 * size, 200 * size)
        row = 120 * size
        return int((draw(frame, scaled(poses(), size), SET)[row] != 128).any(axis=1).sum())

    assert drawn_px(8) > 3 * drawn_px(1)


def test_joints_that_are_not_numbers_or_far_away_are_left_out() -> None:
    wild = poses()
    wild.keypoints[0, 0] = np.nan
    wild.keypoints[0, 1] = 3e38
    picture = draw(grey(), wild, SET)
    assert pixel(picture, *NECK_AT) == drawing.MIDDLE
    picture[25:56, 85:116] = 128
    assert (picture == 128).all(), "nothing but the neck is drawn"


def test_nobody_gives_an_equal_but_separate_frame() -> None:
    frame = grey()
    nobody = Poses(np.zeros((0, 3, 2), np.float32), np.zeros((0, 3), np.float32), np.zeros((0, 4), np.float32))
    picture = draw(frame, nobody, SET)
    assert (picture == frame).all()
    assert not np.shares_memory(picture, frame)


@pytest.mark.parametrize(
    "frame",
    [np.zeros((9, 9), np.uint8), np.zeros((9, 9, 4), np.uint8), np.zeros((9, 9, 3)), np.zeros((0, 9, 3), np.uint8)],
)
def test_other_frames_are_refused(frame: np.ndarray) -> None:
    with pytest.raises(ImageError, match=r"expected \(H, W, 3\) uint8"):
        draw(frame, poses(), SET)


def test_poses_of_another_set_are_refused() -> None:
    with pytest.raises(SpecError, match=r"expected \(N, 2, 2\)"):
        draw(grey(), poses(), Keypoints(names=("a", "b")))


def test_side_by_side_keeps_aspects_and_puts_labels_on_top() -> None:
    wide, tall = np.full((100, 200, 3), 10, np.uint8), np.full((300, 150, 3), 200, np.uint8)
    row = side_by_side([wide, tall], ["fp32", "int8, a label far too long for a narrow frame"], height_px=150)
    strip = row.shape[0] - 150
    assert strip > 0
    assert (row[strip:, :300] == 10).all()
    assert (row[strip:, -75:] == 200).all()
    assert (row[strip:, 300:-75] == 255).all(), "a white gap between them"
    assert (row[:strip, :300] < 128).any(), "the first label is written"
    assert (row[:strip, -75:] < 160).any(), "the second label is written"
    assert (row[:strip, 300:-75] == 255).all(), "no label runs out of its frame"


def test_side_by_side_refuses_what_it_cannot_lay_out() -> None:
    with pytest.raises(UsageError, match="one label per frame"):
        side_by_side([grey()], [])
    with pytest.raises(UsageError, match="one label per frame"):
        side_by_side([], [])
    with pytest.raises(UsageError, match="height_px"):
        side_by_side([grey()], ["a"], height_px=0)
