"""Statistics of the profiler: they must be right on cases whose answer is known, and refuse what they cannot answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose import stats
from edgepose.errors import BadInput, Inconclusive


@pytest.mark.parametrize(("quantile", "samples"), [(0.5, 11), (0.9, 64), (0.95, 130), (0.97, 219), (0.99, 662)])
def test_fewest_samples_are_those_of_the_early_stopping_rule(quantile: float, samples: int) -> None:
    assert stats.minimum_samples(quantile) == samples


@pytest.mark.parametrize(("quantile", "samples"), [(0.9, 64), (0.99, 662)])
def test_percentile_is_refused_one_sample_below_the_floor(quantile: float, samples: int) -> None:
    values = np.arange(samples, dtype=float)
    with pytest.raises(Inconclusive, match=f"at least {samples}"):
        stats.percentile_bounds(values[:-1], quantile)
    bounds = stats.percentile_bounds(values, quantile)
    assert bounds.low < bounds.estimate < bounds.high


def test_percentile_bounds_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    truth = math.exp(1.2815515594600038 * 0.8)  # p90 of a log-normal with sigma 0.8
    covered = 0
    for _ in range(400):
        bounds = stats.percentile_bounds(rng.lognormal(0, 0.8, 200), 0.9)
        covered += bounds.low <= truth <= bounds.high
    assert 0.93 <= covered / 400 <= 0.995


@pytest.mark.parametrize("values", [np.empty(0), np.array([1.0, np.nan]), np.array([np.inf] * 70)])
def test_percentile_of_nothing_or_of_nan_is_an_error(values: np.ndarray) -> None:
    with pytest.raises(BadInput):
        stats.percentile_bounds(values, 0.5)


def test_ratio_bounds_widen_with_the_spread_between_processes() -> None:
    rng = np.random.default_rng(1)
    rounds = [rng.normal(0, 0.02, 40) for _ in range(6)]
    calm = stats.ratio_draws(rounds, seed=3)
    jumpy = stats.ratio_draws([r + s for r, s in zip(rounds, rng.normal(0, 0.05, 6), strict=True)], seed=3)
    assert jumpy.std() > 3 * calm.std()


def test_ratio_draws_repeat_with_the_seed_and_change_with_it() -> None:
    rounds = [np.random.default_rng(i).standard_t(2, 40) * 0.02 for i in range(6)]
    first = stats.ratio_draws(rounds, seed=5, draws=500)
    np.testing.assert_array_equal(first, stats.ratio_draws(rounds, seed=5, draws=500))
    assert not np.array_equal(first, stats.ratio_draws(rounds, seed=6, draws=500))


def test_ratio_interval_covers_the_truth_under_heavy_tails() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        rounds = [math.log(1.03) + rng.normal(0, 0.004) + rng.standard_t(1.5, 40) * 0.02 for _ in range(12)]
        draws = stats.ratio_draws(rounds, seed=trial, draws=2000)
        interval = stats.ratio_interval(draws, stats.median_of_medians(rounds), alpha=0.025)
        covered += interval.low <= 1.03 <= interval.high
    assert covered / 200 >= 0.93


def test_neighbouring_rounds_are_drawn_together() -> None:
    """Rounds that drift slowly carry less information than independent ones; moving blocks must show it."""
    rng = np.random.default_rng(3)
    independent = rng.normal(0, 0.02, 400)
    drifting = np.repeat(rng.normal(0, 0.02, 80), 5)
    assert stats.ratio_draws([drifting], seed=0).std() > 1.5 * stats.ratio_draws([independent], seed=0).std()


@pytest.mark.parametrize("pairs", [[], [np.empty(0)], [np.zeros(5), np.array([0.0, np.nan])]])
def test_ratio_of_no_rounds_or_of_nan_is_an_error(pairs: list[np.ndarray]) -> None:
    with pytest.raises(BadInput):
        stats.ratio_draws(pairs, seed=0)


def test_robust_spread_ignores_the_tail() -> None:
    values = np.random.default_rng(4).normal(0, 0.02, 2001)
    values[:200] = 50.0
    assert 0.015 < stats.robust_spread(values) < 0.03


def test_hodges_lehmann_and_sign_test_agree_with_hand_counts() -> None:
    assert stats.hodges_lehmann(np.array([1.0, 2.0, 9.0])) == pytest.approx(3.5)  # means 1, 1.5, 2, 5, 5.5, 9
    assert stats.sign_test(np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])) == pytest.approx(2 / 64)
    assert stats.sign_test(np.zeros(4)) == 1.0


# ------------------------------------------------------------------------------------------------------ accuracy


def _arms(persons: int, *, lost: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hits per person of 14 joints, where the candidate loses a share `lost` of the right ones."""
    rng = np.random.default_rng(seed)
    hits = rng.random((persons, 14)) < 0.6
    kept = hits & (rng.random((persons, 14)) >= lost)
    counts = np.full((persons, 1), 14.0)
    return hits.sum(1, keepdims=True).astype(float), kept.sum(1, keepdims=True).astype(float), counts


def test_paired_difference_is_that_of_the_pooled_metric() -> None:
    base, cand, counts = _arms(300, lost=0.05, seed=0)
    result = stats.paired_bootstrap(base, cand, counts, seed=0, draws=2000)
    assert result.difference[0] == pytest.approx((cand.sum() - base.sum()) / counts.sum())
    assert result.draws.mean() == pytest.approx(result.difference[0], abs=2e-4)


def test_paired_error_matches_the_formula_for_a_mean() -> None:
    base, cand, counts = _arms(500, lost=0.05, seed=1)
    result = stats.paired_bootstrap(base, cand, counts, seed=0)
    expected = ((cand - base) / counts).std() / math.sqrt(500)
    assert result.standard_error[0] == pytest.approx(expected, rel=0.05)


def test_persons_with_more_joints_weigh_more() -> None:
    base, cand = np.array([[2.0], [0.0]]), np.array([[0.0], [0.0]])
    result = stats.paired_bootstrap(base, cand, np.array([[2.0], [8.0]]), seed=0, draws=200)
    assert result.baseline[0] == pytest.approx(0.2)
    assert set(np.round(result.draws[:, 0], 6)) == {-1.0, -0.2, 0.0}


def test_people_of_one_image_are_drawn_together() -> None:
    rng = np.random.default_rng(5)
    shift = np.repeat(rng.integers(-1, 2, 50), 8)[:, None].astype(float)
    base, counts = np.full((400, 1), 7.0), np.full((400, 1), 14.0)
    alone = stats.paired_bootstrap(base, base + shift, counts, seed=0, draws=2000)
    grouped = stats.paired_bootstrap(
        base, base + shift, counts, seed=0, draws=2000, clusters=np.repeat(np.arange(50), 8)
    )
    assert grouped.standard_error[0] > 2.2 * alone.standard_error[0]
    assert grouped.difference[0] == pytest.approx(alone.difference[0])


def test_large_sets_are_drawn_in_pieces_without_changing_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    base, cand, counts = _arms(200, lost=0.05, seed=2)
    whole = stats.paired_bootstrap(base, cand, counts, seed=0, draws=1000)
    monkeypatch.setattr(stats, "_CHUNK_ELEMENTS", 3000)
    pieces = stats.paired_bootstrap(base, cand, counts, seed=0, draws=1000)
    np.testing.assert_allclose(whole.draws, pieces.draws)


@pytest.mark.parametrize(
    ("base", "cand", "counts"),
    [
        (np.empty((0, 1)), np.empty((0, 1)), np.empty((0, 1))),
        (np.zeros((3, 1)), np.zeros((4, 1)), np.ones((3, 1))),
        (np.zeros((3, 1)), np.full((3, 1), np.nan), np.ones((3, 1))),
        (np.zeros((3, 2)), np.zeros((3, 2)), np.array([[1.0, 0.0]] * 3)),
    ],
)
def test_unusable_arms_are_errors(base: np.ndarray, cand: np.ndarray, counts: np.ndarray) -> None:
    with pytest.raises(BadInput):
        stats.paired_bootstrap(base, cand, counts, seed=0)


def test_a_detectable_change_is_detected_with_the_promised_power() -> None:
    rng = np.random.default_rng(6)
    change = stats.detectable_change(0.25, alpha=0.005)
    observed = change + rng.normal(0, 0.25, 20_000)
    assert (observed - 2.5758 * 0.25 > 0).mean() == pytest.approx(0.9, abs=0.01)


def test_holm_against_a_worked_example() -> None:
    np.testing.assert_allclose(stats.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
@settings(deadline=None)
def test_holm_never_lowers_a_p_value_and_keeps_the_order(p_values: list[float]) -> None:
    adjusted = stats.holm(p_values)
    assert (adjusted >= np.array(p_values)).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p_values, kind="stable")]) >= 0).all()
