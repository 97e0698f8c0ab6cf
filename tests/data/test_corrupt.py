"""Corruptions for tests: how much they cover, what they call hidden, and that a person's picture is always the same."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edgepose.data.coco import Person, dataset, read_image
from edgepose.data.corrupt import (
    CORRUPTIONS,
    REFERENCE_PX,
    Clean,
    Corruption,
    Jpeg,
    LowLight,
    MotionBlur,
    Occluded,
    SensorNoise,
    Truncated,
    corrupt,
)
from edgepose.data.cover import joints_covered

FRAME = np.stack([*np.mgrid[:170, :150][::-1], np.full((170, 150), 90)], axis=2).astype(np.uint8)
"""A picture whose pixels say where they are: blue is x, green is y."""
JOINTS = np.array([[60, 40, 2], [45, 70, 1], [82, 66, 0], [70, 120, 2], [95, 90, 2]], np.float32)


def person(number: int = 1, bbox_xywh: tuple[float, ...] = (30.0, 25.0, 80.0, 120.0)) -> Person:
    return Person(Path("none.png"), 1, number, np.array(bbox_xywh), JOINTS)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 0.4])
def test_the_wanted_share_of_the_box_is_covered(share: float) -> None:
    boxes = ((30.0, 25.0, 80.0, 120.0), (10.0, 60.0, 130.0, 34.0), (60.4, 20.7, 41.3, 139.9))
    for number in range(24):
        someone = person(number, boxes[number % 3])
        picture = corrupt(Occluded(share), FRAME, someone)
        x1, y1, x2, y2 = np.rint(someone.box_xyxy).astype(int)
        assert picture.covered[y1:y2, x1:x2].mean() == pytest.approx(share, abs=0.02)


def test_only_the_covered_pixels_change_and_joints_under_them_are_hidden() -> None:
    before, hidden = FRAME.copy(), 0
    for number in range(40):
        picture = corrupt(Occluded(0.3), FRAME, person(number))
        near = cv2.dilate(picture.covered.astype(np.uint8), np.ones((9, 9), np.uint8)) > 0  # edges may be soft
        assert np.array_equal(picture.frame[~near], FRAME[~near])
        assert (picture.frame[picture.covered] != FRAME[picture.covered]).any(axis=1).mean() > 0.95
        side_px = float(person(number).bbox_xywh[2:].max())
        covered = joints_covered(picture.covered.astype(np.uint8) * 255, JOINTS[:, :2], side_px)
        assert picture.hidden.tolist() == [covered[0], True, False, covered[3], covered[4]]
        assert picture.known.tolist() == [True, True, False, True, True]
        assert np.array_equal(picture.keypoints, JOINTS)
        hidden += int(covered.sum())
    assert 30 < hidden < 120
    assert np.array_equal(FRAME, before)


@pytest.mark.parametrize("corruption", [Occluded(0.3), *(c for c in CORRUPTIONS.values() if type(c) is not Occluded)])
def test_boxes_far_larger_than_the_photograph_or_beside_it_take_no_more_memory(corruption: Corruption) -> None:
    small = FRAME[:40, :30]
    for box in ((0.0, 0.0, 1e9, 1.0), (-5.0, -5.0, 3.0, 1e6), (400.0, 400.0, 20.0, 20.0)):
        picture = corrupt(corruption, small, person(1, box))
        assert picture.frame.size > 0
        assert picture.hidden.tolist() == [True, True, False, True, True]  # all joints are beyond the photograph


def test_shares_grow_out_of_one_draw() -> None:
    """Where little was covered, more covers it too, so slices differ by share and not by luck."""
    for number in range(12):
        small, large = (corrupt(Occluded(share), FRAME, person(number)).covered for share in (0.1, 0.4))
        assert (large & small).sum() > 0.97 * small.sum()


@pytest.mark.parametrize("name", list(CORRUPTIONS))
def test_a_person_and_a_draw_always_give_the_same_picture(name: str) -> None:
    first, second = (corrupt(CORRUPTIONS[name], FRAME, person(5), draw=2) for _ in range(2))
    assert np.array_equal(first.frame, second.frame)
    assert np.array_equal(first.box_xyxy, second.box_xyxy)
    assert np.array_equal(first.hidden, second.hidden)
    if name not in ("clean", "jpeg"):
        for number, draw in ((5, 3), (6, 2)):
            other = corrupt(CORRUPTIONS[name], FRAME, person(number), draw=draw)
            assert other.frame.shape != first.frame.shape or not np.array_equal(other.frame, first.frame)


def test_the_frame_ends_within_the_person() -> None:
    sides = set()
    for number in range(30):
        picture = corrupt(Truncated(), FRAME, person(number))
        height, width = picture.frame.shape[:2]
        sides.add((height == 170, bool(picture.keypoints[0, 0] == 60), bool(picture.keypoints[0, 1] == 40)))
        size = picture.box_xyxy[2:] - picture.box_xyxy[:2]
        assert 0.59 < size.prod() / (80 * 120) < 0.81
        assert (picture.box_xyxy[:2] >= -0.5).all()
        assert (picture.box_xyxy[2:] <= (width - 0.5, height - 0.5)).all()
        for (x, y, v), label, hidden in zip(picture.keypoints, JOINTS, picture.hidden, strict=True):
            inside = 0 <= x < width and 0 <= y < height
            if inside:
                assert picture.frame[int(y), int(x), :2].tolist() == label[:2].tolist()
            assert v == (label[2] if inside else 0)
            assert hidden == (label[2] == 1 or (label[2] > 0 and not inside))
        assert picture.known.tolist() == [True, True, False, True, True]
    assert len(sides) >= 3


def test_a_speck_is_left_whole() -> None:
    for number in range(8):
        speck = corrupt(Truncated(), FRAME[:1, :1], person(number))
        assert speck.frame.shape == (1, 1, 3)
        assert corrupt(Occluded(0.4), FRAME[:1, :1], person(number)).frame.shape == (1, 1, 3)


@pytest.mark.parametrize("corruption", [LowLight(), MotionBlur(), SensorNoise(), Jpeg()])
def test_cameras_change_pixels_and_no_labels(corruption: Corruption) -> None:
    frame = np.random.default_rng(0).integers(0, 256, FRAME.shape, dtype=np.uint8)
    before = frame.copy()
    picture = corrupt(corruption, frame, person())
    assert picture.frame.shape == frame.shape
    assert picture.frame.dtype == np.uint8
    assert (picture.frame != frame).mean() > 0.8
    assert np.array_equal(frame, before)
    assert not picture.covered.any()
    assert np.array_equal(picture.keypoints, JOINTS)
    assert picture.hidden.tolist() == [False, True, False, False, False]
    assert np.array_equal(picture.box_xyxy, person().box_xyxy)
    assert corrupt(Clean(), frame, person()).frame is frame


def test_motion_blur_is_as_long_as_the_crop_shows_it_and_shifts_nothing() -> None:
    for side in (60.0, 240.0):
        frame = np.zeros((301, 301, 3), np.uint8)
        cv2.circle(frame, (150, 150), 6, (255, 255, 255), -1)
        someone = person(3, (150 - side / 2, 150 - side / 2, side, side))
        blurred = corrupt(MotionBlur(length_px=20), frame, someone).frame
        rows, columns = np.mgrid[:301, :301] - 150.0
        spreads = []
        for picture in (frame, blurred):
            mass = picture[..., 0].astype(np.float64)
            center = np.array([(mass * columns).sum(), (mass * rows).sum()]) / mass.sum()
            assert np.abs(center).max() < 0.1
            spreads.append(((columns**2 + rows**2) * mass).sum() / mass.sum())
        length = 20 * side * 1.25 / REFERENCE_PX
        assert np.sqrt(12 * (spreads[1] - spreads[0])) == pytest.approx(length, rel=0.1)  # of a uniform line


def test_noise_and_darkness_are_as_strong_as_they_say() -> None:
    grey = np.full((200, 200, 3), 128, np.uint8)
    small, large = person(1, (50.0, 50, 100, 100)), person(1, (0.0, 0, 100 * REFERENCE_PX, 100))
    noisy = corrupt(SensorNoise(sigma=28), grey, small).frame.astype(float)
    assert noisy.std() == pytest.approx(28, rel=0.05)
    assert noisy.mean() == pytest.approx(128, abs=1)
    # A large person has coarse grain: neighbours of one cell are equal.
    coarse = corrupt(SensorNoise(sigma=28), grey, large).frame
    assert (coarse[:, 1:] == coarse[:, :-1]).mean() > 0.9
    dark = corrupt(LowLight(gamma=2.0, gain=0.5, sigma=3.0), grey, small).frame.astype(float)
    assert dark.mean() == pytest.approx(255 * 0.5 * (128 / 255) ** 2, abs=1)


def test_large_photographs_are_compressed_as_coarsely_as_the_crop_is() -> None:
    rng = np.random.default_rng(0)
    frame = cv2.resize(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8), (800, 800), interpolation=cv2.INTER_CUBIC)
    errors = [
        np.abs(corrupt(Jpeg(quality=10), frame, person(1, (0.0, 0, side, side))).frame.astype(float) - frame).mean()
        for side in (150.0, 780.0)
    ]
    assert errors[1] > 1.5 * errors[0]


def test_pieces_of_other_photographs_are_lent_by_others_only(tmp_path: Path) -> None:
    """A photograph lends no piece to itself, and an unreadable one is named."""
    own = tmp_path / "own.png"
    cv2.imwrite(str(own), FRAME)
    gold = tmp_path / "gold.png"
    cv2.imwrite(str(gold), np.full((50, 50, 3), (10, 200, 250), np.uint8))
    lent = 0
    for number in range(24):
        someone = Person(own, 1, number, np.array([30.0, 25, 80, 120]), JOINTS)
        alone = corrupt(Occluded(0.3), FRAME, someone, others=[own])
        picture = corrupt(Occluded(0.3), FRAME, someone, others=[own, gold])
        assert np.array_equal(picture.covered, alone.covered)
        core = cv2.erode(picture.covered.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0
        ratio = picture.frame[core].astype(float) / (10, 200, 250)  # pieces are shaded, their colour stays
        lent += bool(core.any() and np.abs(ratio[:, 1] - ratio[:, 2]).max() < 0.02)
    assert 1 < lent < 14


def test_real_people_are_covered_as_wanted(real_data: Path) -> None:
    people = dataset(real_data / "lspet", "val")
    others = tuple(sorted({p.image for p in people.persons}))
    for someone in people.sample(6, seed=0).persons:
        frame = read_image(someone.image)
        picture = corrupt(CORRUPTIONS["occluded_30"], frame, someone, others=others)
        x1, y1, x2, y2 = np.clip(np.rint(someone.box_xyxy), 0, [*frame.shape[1::-1]] * 2).astype(int)
        assert picture.covered[y1:y2, x1:x2].mean() == pytest.approx(0.3, abs=0.02)
