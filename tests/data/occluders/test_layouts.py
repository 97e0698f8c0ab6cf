"""Layouts of occluders: how many pieces, how much area, which side of a wall."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from edgepose.data.occluders.layouts import MOST, Place, clutter, single, tangle, veil, wall

AROUND = np.array([40.0, 30.0, 140.0, 170.0])


def place(share: float) -> Place:
    return Place(np.array([90.0, 100.0]), share * 100 * 140, AROUND)


def laid_out(layout: object, share: float, seed: int) -> np.ndarray:
    canvas = np.zeros((200, 180), np.uint8)
    layout(canvas, place(share), np.random.default_rng(seed))  # type: ignore[operator]
    return canvas


@pytest.mark.parametrize("layout", [single, clutter, tangle, veil, wall])
def test_the_area_grows_with_what_is_asked_for(layout: object) -> None:
    inner = np.s_[30:170, 40:140]
    shares = [
        np.mean([(laid_out(layout, share, seed)[inner] > 0).mean() for seed in range(40)]) for share in (0.1, 0.4)
    ]
    assert 0.03 < shares[0] < 0.16
    assert 0.12 < shares[1] < 0.5
    assert shares[1] > 2 * shares[0]


def test_clutter_is_of_few_to_many_pieces_with_numbers_of_their_own() -> None:
    counts = [len(np.unique(laid_out(clutter, 0.2, seed))) - 1 for seed in range(60)]
    assert min(counts) <= 4
    assert 25 < max(counts) <= MOST
    assert max(int(laid_out(clutter, 0.2, seed).max()) for seed in range(60)) <= MOST


def test_a_wall_is_one_piece_that_reaches_the_edge_of_the_canvas_and_covers_the_wanted_share() -> None:
    for seed in range(40):
        canvas = laid_out(wall, 0.3, seed)
        assert set(np.unique(canvas)) == {0, 1}
        rim = np.concatenate([canvas[0], canvas[-1], canvas[:, 0], canvas[:, -1]])
        assert rim.any()
        assert not rim.all()
        largest = cv2.connectedComponentsWithStats(canvas)[2][1:, cv2.CC_STAT_AREA].max()
        assert largest > 0.9 * canvas.sum()
        assert 0.1 < (canvas[30:170, 40:140] > 0).mean() < 0.55


def test_a_veil_lies_on_the_person_only_and_covers_what_is_asked_for() -> None:
    for seed in range(20):
        canvas = laid_out(veil, 0.3, seed)
        assert canvas.max() == 1
        assert canvas[30:171, 40:141].mean() == pytest.approx(0.3, abs=0.02)
        assert canvas.sum() == canvas[30:171, 40:141].sum()
    beside = Place(np.array([300.0, 300.0]), 100.0, np.array([180.0, 200.0, 180.0, 200.0]))
    canvas = np.zeros((200, 180), np.uint8)
    veil(canvas, beside, np.random.default_rng(0))
    assert not canvas.any()


def test_walls_stand_on_any_side() -> None:
    heavier = set()
    for seed in range(40):
        rows, columns = np.nonzero(laid_out(wall, 0.2, seed))
        heavier |= {("below", "above")[int(rows.mean() < 100)], ("right", "left")[int(columns.mean() < 90)]}
    assert heavier == {"below", "above", "left", "right"}


def test_strings_are_thin_and_long() -> None:
    for seed in range(20):
        canvas = (laid_out(tangle, 0.1, seed) > 0).astype(np.uint8)
        assert cv2.distanceTransform(canvas, cv2.DIST_L2, 3).max() < 0.15 * place(0.1).side_px
