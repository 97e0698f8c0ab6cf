"""Peaks of one heat map and poses of one person: the best stays, the rest goes, and others are left alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.errors import SpecError
from edgepose.pose.codec import decode, encode_heatmap
from edgepose.pose.metrics import oks
from edgepose.pose.nms import heatmap_peaks, oks_nms
from edgepose.spec import Heatmap

quick = settings(max_examples=40, deadline=None)
HW = (96, 64)
DARK = Heatmap(stride=4.0)


def map_of(points: list[tuple[float, float]], heights: list[float]) -> np.ndarray:
    """(h, w): Gaussians of these heights, where two meet the higher."""
    maps = encode_heatmap(np.array([points], np.float32), HW, DARK, 3.0)[0]
    return (maps * np.array(heights, np.float32)[:, None, None]).max(0)


def test_every_peak_is_found_highest_first_to_a_fraction_of_a_cell() -> None:
    points = [(12.3, 20.7), (45.0, 22.1), (30.6, 80.2)]
    found, scores = heatmap_peaks(map_of(points, [0.6, 0.9, 0.3]), DARK)
    assert found.shape == (3, 2)
    assert np.abs(found - np.array([points[1], points[0], points[2]])).max() < 0.3
    assert (np.diff(scores) < 0).all()
    assert scores[0] == pytest.approx(0.9, rel=0.2)  # the cell beside the peak


@quick
@given(st.floats(0, HW[1] - 1, width=32), st.floats(0, HW[0] - 1, width=32))
def test_of_one_peak_it_is_what_decoding_finds(x: float, y: float) -> None:
    heatmap = map_of([(x, y)], [0.8])
    found, scores = heatmap_peaks(heatmap, DARK)
    expected = decode({"heatmap": heatmap[None, None]}, DARK)
    assert np.array_equal(found, expected[0][0])
    assert np.array_equal(scores, expected[1][0])


def test_low_and_neighbouring_peaks_and_those_beyond_the_limit_go() -> None:
    points = [(12.0, 20.0), (24.0, 20.0), (45.0, 60.0), (20.0, 80.0)]
    heatmap = map_of(points, [0.9, 0.8, 0.5, 0.05])
    assert len(heatmap_peaks(heatmap, DARK)[0]) == 3
    assert len(heatmap_peaks(heatmap, DARK, radius_px=13.0)[0]) == 2
    assert len(heatmap_peaks(heatmap, DARK, min_score=0.01)[0]) == 4
    assert len(heatmap_peaks(heatmap, DARK, limit=1)[0]) == 1


def test_of_a_plateau_one_peak_stays_and_an_empty_map_has_none() -> None:
    plateau = np.zeros((24, 16))
    plateau[10:12, 6:8] = 0.7
    found, scores = heatmap_peaks(plateau, DARK)
    assert len(found) == 1
    assert scores.tolist() == [pytest.approx(0.7)]
    found, scores = heatmap_peaks(np.zeros((24, 16)), DARK)
    assert (found.shape, scores.shape) == ((0, 2), (0,))


@quick
@given(st.integers(0, 2**32 - 1))
def test_kept_peaks_are_in_order_and_apart(seed: int) -> None:
    found, scores = heatmap_peaks(np.random.default_rng(seed).uniform(0, 1, (24, 16)), DARK, radius_px=10.0)
    assert (np.diff(scores) <= 0).all()
    apart = np.linalg.norm(found[:, None] - found, axis=-1)[~np.eye(len(found), dtype=bool)]
    assert (apart > 10.0).all()


def test_heat_maps_of_several_keypoints_are_refused() -> None:
    with pytest.raises(SpecError, match=r"shape \(2, 24, 16\)"):
        heatmap_peaks(np.zeros((2, 24, 16)), DARK)
    with pytest.raises(SpecError, match=r"shape \(0, 16\)"):
        heatmap_peaks(np.zeros((0, 16)), DARK)


SIGMAS = np.full(5, 0.07)


def poses(offsets_px: list[float]) -> np.ndarray:
    """One pose of five joints, moved to the right by so much."""
    base = np.array([[0.0, 0.0], [30.0, 0.0], [15.0, 40.0], [0.0, 80.0], [30.0, 80.0]])
    return base + np.array(offsets_px)[:, None, None] * (1.0, 0.0)


def test_the_most_confident_of_one_person_stays_and_other_people_stay() -> None:
    kept = oks_nms(poses([0.0, 1.0, 200.0, -1.0]), np.array([0.5, 0.9, 0.2, 0.6]), np.full(4, 2400.0), SIGMAS)
    assert kept.tolist() == [1, 2]


def test_suppression_is_at_the_similarity_worked_out_by_hand() -> None:
    # All joints 7 px apart: OKS = exp(-49 / (2 · (2 · 0.07)² · area)), the mean area of 2000 and 3000 px²: exp(-0.5).
    limit = float(np.exp(-0.5))
    arguments = poses([0.0, 7.0]), np.array([0.5, 0.4]), np.array([2000.0, 3000.0]), SIGMAS
    assert oks_nms(*arguments, threshold=limit - 1e-6).tolist() == [0]
    assert oks_nms(*arguments, threshold=limit + 1e-6).tolist() == [0, 1]


def test_a_pose_that_went_suppresses_nobody() -> None:
    # In a chain of equal steps the middle one goes with the first; the last is near the middle only.
    areas, scores = np.full(3, 2400.0), np.array([0.9, 0.8, 0.7])
    assert oks_nms(poses([0.0, 3.0, 6.0]), scores, areas, SIGMAS, threshold=0.8).tolist() == [0, 2]


def test_ties_keep_the_first_and_nobody_is_nobody() -> None:
    assert oks_nms(poses([0.0, 0.0, 0.0]), np.full(3, 0.5), np.full(3, 900.0), SIGMAS).tolist() == [0]
    assert oks_nms(poses([]), np.empty(0), np.empty(0), SIGMAS).tolist() == []


def test_joints_that_were_not_found_are_not_compared() -> None:
    people = poses([0.0, 0.0, 0.0])
    people[1, 2] = np.nan  # the others agree
    people[2] = np.inf  # nothing to compare: stays
    assert oks_nms(people, np.array([0.9, 0.8, 0.7]), np.full(3, 900.0), SIGMAS).tolist() == [0, 2]


@quick
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.3, 0.6, 0.9]))
def test_kept_poses_are_apart_and_every_other_is_near_a_better_one(seed: int, threshold: float) -> None:
    rng = np.random.default_rng(seed)
    people = poses(list(rng.uniform(0, 40, 8))) + rng.normal(0, 1, (8, 5, 2))
    scores, areas = rng.uniform(0, 1, 8), rng.uniform(500, 5000, 8)
    kept = oks_nms(people, scores, areas, SIGMAS, threshold=threshold).tolist()
    alike = np.array(
        [oks(np.linalg.norm(people - p, axis=-1), (areas + a) / 2, SIGMAS) for p, a in zip(people, areas, strict=True)]
    )
    assert (np.diff(scores[kept]) <= 0).all()
    for row in range(8):
        better = [k for k in kept if scores[k] > scores[row] and alike[k, row] > threshold]
        assert (row in kept) == (not better)


def test_arrays_of_different_people_are_refused() -> None:
    with pytest.raises(SpecError, match=r"\(2, 5, 2\), \(3,\), \(2,\)"):
        oks_nms(poses([0.0, 1.0]), np.zeros(3), np.zeros(2), SIGMAS)
    with pytest.raises(SpecError, match="OKS sigmas"):
        oks_nms(poses([0.0, 1.0]), np.zeros(2), np.zeros(2), SIGMAS[:3])
