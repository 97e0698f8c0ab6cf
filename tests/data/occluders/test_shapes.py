"""Single outlines: as large as asked for, where asked for, and drawn with their number only."""

from __future__ import annotations

import numpy as np
import pytest

from edgepose.data.occluders.shapes import SINGLE, SMALL, Shape


def drawn(shape: Shape, seed: int, area_px2: float = 900.0) -> np.ndarray:
    canvas = np.zeros((240, 240), np.uint8)
    shape(canvas, np.array([120.0, 120.0]), area_px2, np.random.default_rng(seed), 7)
    return canvas


@pytest.mark.parametrize("shape", sorted({*SINGLE, *SMALL}, key=lambda shape: shape.__name__))
def test_a_shape_has_about_the_wanted_area_around_its_centre(shape: Shape) -> None:
    areas = []
    for seed in range(30):
        canvas = drawn(shape, seed)
        assert set(np.unique(canvas)) == {0, 7}
        rows, columns = np.nonzero(canvas)
        assert abs(rows.mean() - 120) < 40
        assert abs(columns.mean() - 120) < 40
        areas.append(np.count_nonzero(canvas))
    assert 0.55 * 900 < np.mean(areas) < 1.5 * 900
    assert len({drawn(shape, seed).tobytes() for seed in range(30)}) > 12


@pytest.mark.parametrize("shape", SMALL)
def test_a_shape_outside_of_the_canvas_is_lost(shape: Shape) -> None:
    canvas = np.zeros((40, 40), np.uint8)
    shape(canvas, np.array([-300.0, 20.0]), 50.0, np.random.default_rng(0), 1)
    assert not canvas.any()
