"""Fillings from photographs: which part of which, and donors that lack what is wanted."""

from __future__ import annotations

import numpy as np

from edgepose.data.occluders.photographs import Donors, background, elsewhere, limbs, window
from edgepose.data.patch import Patch

SKELETON = ((0, 1), (1, 2))


def donor(visibility: int = 2) -> Patch:
    """White limbs on black."""
    pixels = np.zeros((100, 100, 3), np.uint8)
    pixels[20:80, 40:60] = 255
    joints = np.array([[50, 25, visibility], [50, 50, visibility], [50, 75, visibility]], np.float32)
    return Patch(pixels, np.array([30.0, 15, 70, 85]), joints)


def square() -> np.ndarray:
    canvas = np.zeros((120, 120), np.uint8)
    canvas[50:70, 40:60] = 1
    return canvas


def test_the_window_leaves_room_for_soft_edges_within_the_canvas() -> None:
    rows, columns = window(square())
    assert (rows.start, rows.stop, columns.start, columns.stop) == (44, 76, 34, 66)
    assert window(np.ones((9, 7), np.uint8)) == (slice(0, 9), slice(0, 7))
    assert window(np.zeros((9, 7), np.uint8)) == (slice(0, 0), slice(0, 0))


def test_limbs_are_cut_along_bones() -> None:
    donors, shares, areas = Donors([donor()], SKELETON), [], []
    for seed in range(40):
        canvas = np.zeros((120, 120), np.uint8)
        piece = limbs(canvas, np.array([60.0, 60]), 500.0, donors, np.random.default_rng(seed))
        where = window(canvas)
        assert piece.shape[:2] == canvas[where].shape
        shares.append((piece[canvas[where] > 0] > 128).mean())
        areas.append(np.count_nonzero(canvas))
    assert np.mean(shares) > 0.7
    assert 350 < np.mean(areas) < 650


def test_donors_without_labelled_bones_lend_what_they_have() -> None:
    for patch in (donor(visibility=0), Patch(donor().pixels, donor().box_xyxy, donor().keypoints * (1, 1, 0))):
        canvas = np.zeros((120, 120), np.uint8)
        limbs(canvas, np.array([60.0, 60]), 500.0, Donors([patch], SKELETON), np.random.default_rng(0))
        assert canvas.any()


def test_pieces_show_people_and_what_is_beside_them() -> None:
    means = [
        float(elsewhere(square(), Donors([donor()], SKELETON), np.random.default_rng(seed)).mean())
        for seed in range(60)
    ]
    assert min(means) < 20
    assert max(means) > 120


def test_the_background_is_taken_from_afar_and_not_from_beyond_the_photograph() -> None:
    crop = np.full((120, 120, 3), 60, np.uint8)
    crop[:, 80:] = 200
    crop[:, 110:] = 0
    joints = np.array([[20, 30], [25, 90]], np.float32)
    middles = [int(background(square(), crop, joints, np.random.default_rng(seed))[16, 16, 0]) for seed in range(60)]
    assert np.mean([middle == 200 for middle in middles]) > 0.75
    assert 0 not in middles
    assert background(square(), crop, joints[:0], np.random.default_rng(0)).any()
