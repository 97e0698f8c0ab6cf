"""Change points: none in noise, a step where it is."""

from __future__ import annotations

import numpy as np
import pytest

from edgepose.profiler.history.change_points import segments

PENALTY = 3.0


@pytest.mark.parametrize("count", [12, 30, 50])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_noise_has_no_change(tails: str, count: int) -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=count) if tails == "normal" else rng.standard_t(3, size=count) / np.sqrt(3)
        assert segments(values, noise=1.0, penalty=PENALTY) == [(0, count)]


def test_a_step_of_three_times_the_noise_is_found_within_a_point() -> None:
    placed = 0
    for seed in range(30):
        values = np.random.default_rng(seed).normal(size=30)
        values[15:] += 3.0
        found = segments(values, noise=1.0, penalty=PENALTY)
        placed += len(found) == 2 and abs(found[0][1] - 15) <= 1
    assert placed >= 27


def test_a_series_too_short_for_two_segments_is_one() -> None:
    assert segments(np.array([0.0, 0.0, 9.0, 9.0, 9.0]), noise=0.1, penalty=PENALTY) == [(0, 5)]


def test_one_value_far_off_is_no_step() -> None:
    values = np.random.default_rng(0).normal(size=20)
    values[10] = 15.0
    assert segments(values, noise=1.0, penalty=PENALTY) == [(0, 20)]
