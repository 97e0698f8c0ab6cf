"""Drawn fillings: any size, in the crop's colours or others, and of many kinds."""

from __future__ import annotations

import numpy as np
import pytest

from edgepose.data.occluders.textures import texture


@pytest.mark.parametrize("hw", [(1, 1), (1, 90), (70, 2), (33, 47)])
def test_a_texture_has_the_size_asked_for(hw: tuple[int, int]) -> None:
    crop = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    for seed in range(40):
        made = texture(crop, hw, np.random.default_rng(seed))
        assert (made.shape, made.dtype) == ((*hw, 3), np.uint8)


def test_textures_repeat_with_their_generator_and_differ_otherwise() -> None:
    crop = np.full((96, 96, 3), 90, np.uint8)
    made = [texture(crop, (40, 50), np.random.default_rng(seed)) for seed in range(60)]
    again = [texture(crop, (40, 50), np.random.default_rng(seed)) for seed in range(60)]
    assert all(np.array_equal(a, b) for a, b in zip(made, again, strict=True))
    assert len({m.tobytes() for m in made}) == 60
    patterned = np.mean([m.std(axis=(0, 1)).max() > 5 for m in made])
    assert 0.6 < patterned < 1


def test_textures_look_like_the_scene_more_often_than_not() -> None:
    crop = np.full((96, 96, 3), (20, 200, 90), np.uint8)
    near = [
        np.abs(texture(crop, (40, 50), np.random.default_rng(seed)).astype(int) - (20, 200, 90)).max(axis=2) < 60
        for seed in range(80)
    ]
    assert 0.5 < np.mean(near) < 0.9
