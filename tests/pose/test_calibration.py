"""Ranking and calibration against cases worked out by hand, and what must hold of any scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.errors import SpecError
from edgepose.pose.calibration import auroc, expected_calibration_error, fit_platt

quick = settings(max_examples=40, deadline=None)


@st.composite
def samples(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities on a grid, so that there are ties, and outcomes of both kinds."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=60))
    pairs += [(3, True), (5, False)]
    return np.array([p for p, _ in pairs]) / 20, np.array([t for _, t in pairs])


def test_auroc_by_hand() -> None:
    # Pairs (positive, negative): 0.8 beats 0.7 and 0.1; 0.4 loses to 0.7 and beats 0.1: three of four.
    assert auroc(np.array([0.8, 0.7, 0.4, 0.1]), np.array([1, 0, 1, 0])) == pytest.approx(0.75)
    assert auroc(np.array([0.5, 0.5, 0.5]), np.array([True, False, True])) == 0.5
    assert auroc(np.array([2.0, 3.0, -1.0]), np.array([0, 1, 0])) == 1.0
    assert auroc(np.array([-np.inf, np.inf]), np.array([1, 0])) == 0.0
    assert np.isnan(auroc(np.array([0.1, 0.2]), np.array([1, 1])))


@quick
@given(samples())
def test_auroc_is_the_share_of_pairs_in_the_right_order(pair: tuple[np.ndarray, np.ndarray]) -> None:
    scores, truth = pair
    difference = scores[truth][:, None] - scores[~truth]
    assert auroc(scores, truth) == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean())
    assert auroc(-scores, truth) == pytest.approx(1 - auroc(scores, truth))
    assert auroc(np.exp(3 * scores) - 7, truth) == pytest.approx(auroc(scores, truth))


def test_calibration_error_by_hand() -> None:
    # Two bins of two: (0.1, 0.3) with one positive: |0.2 - 0.5|; (0.6, 0.8) with two: |0.7 - 1|. Mean: 0.3.
    found = expected_calibration_error(np.array([0.8, 0.1, 0.6, 0.3]), np.array([1, 0, 1, 1]), bins=2)
    assert found == pytest.approx((0.3 + 0.3) / 2)
    # Three samples in two bins: two and one. (0.0, 0.5) with none: 0.25 on 2 of 3; (1.0) with one: 0.
    assert expected_calibration_error(np.array([0.0, 0.5, 1.0]), np.array([0, 0, 1]), bins=2) == pytest.approx(1 / 6)
    # One bin: |mean of what was said - share of what happened|.
    assert expected_calibration_error(np.array([0.2, 0.4, 0.9]), np.array([1, 0, 1]), 1) == pytest.approx(2 / 3 - 0.5)


def test_bins_hold_equally_many_samples_not_equal_widths() -> None:
    # All probabilities below 0.01: bins of equal width would lump them together and see no error at all.
    probabilities = np.r_[np.full(50, 0.0), np.full(50, 0.01)]
    truth = np.r_[np.ones(1), np.zeros(99)]
    assert expected_calibration_error(probabilities, truth, bins=2) == pytest.approx((0.02 + 0.01) / 2)


def test_equal_probabilities_are_one_group_in_whatever_order_they_come() -> None:
    half = np.full(30, 0.5)
    assert expected_calibration_error(half, np.arange(30) < 15) == pytest.approx(0.0)
    assert expected_calibration_error(half, np.arange(30) % 2) == pytest.approx(0.0)


@quick
@given(samples(), st.integers(1, 20), st.integers(0, 2**32 - 1))
def test_order_does_not_matter_and_a_right_oracle_has_no_error(
    pair: tuple[np.ndarray, np.ndarray], bins: int, seed: int
) -> None:
    probabilities, truth = pair
    order = np.random.default_rng(seed).permutation(len(truth))
    found = expected_calibration_error(probabilities, truth, bins)
    assert 0 <= found <= 1
    assert expected_calibration_error(probabilities[order], truth[order], bins) == pytest.approx(found)
    assert expected_calibration_error(truth.astype(float), truth, bins) == 0
    assert found >= abs(probabilities.mean() - truth.mean()) - 1e-12  # finer bins never hide what one bin shows


def test_calibration_error_of_fair_and_of_boastful_probabilities() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1.5, 20_000)
    fair = 1 / (1 + np.exp(-logits))
    truth = rng.uniform(size=len(fair)) < fair
    assert expected_calibration_error(fair, truth) < 0.015
    assert expected_calibration_error(1 / (1 + np.exp(-4 * logits)), truth) > 0.1


def test_platt_recovers_the_logits_that_made_the_outcomes() -> None:
    rng = np.random.default_rng(1)
    fair = rng.normal(-0.5, 1.5, 20_000)
    truth = rng.uniform(size=len(fair)) < 1 / (1 + np.exp(-fair))
    scale, shift = fit_platt((fair - 0.7) / 0.4, truth)
    assert scale == pytest.approx(0.4, abs=0.02)
    assert shift == pytest.approx(0.7, abs=0.06)
    repaired = 1 / (1 + np.exp(-(scale * (fair - 0.7) / 0.4 + shift)))
    assert expected_calibration_error(repaired, truth) < 0.015


@quick
@given(samples(), st.floats(0.01, 1e4), st.floats(-1e4, 1e4))
def test_platt_fits_its_own_targets_at_any_scale(
    pair: tuple[np.ndarray, np.ndarray], spread: float, centre: float
) -> None:
    scores, truth = pair
    scale, shift = fit_platt(scores * spread + centre, truth)
    said = 1 / (1 + np.exp(-(scale * (scores * spread + centre) + shift)))
    targets = np.where(truth, (truth.sum() + 1) / (truth.sum() + 2), 1 / ((~truth).sum() + 2))
    # At the optimum of a logistic fit the residuals are orthogonal to both inputs.
    assert abs((said - targets).mean()) < 1e-5
    assert abs(((said - targets) * scores).mean()) < 1e-5


def test_platt_of_separable_or_constant_logits_stays_finite() -> None:
    scale, shift = fit_platt(np.array([-5.0, -4.0, 4.0, 5.0]), np.array([0, 0, 1, 1]))
    assert 0 < scale < 10
    assert np.isfinite(shift)
    # Targets 2/3 and 1/3 · 2 … by hand: two positives of four, (2 + 1) / (2 + 2) and 1 / (2 + 2): mean 1/2, logit 0.
    scale, shift = fit_platt(np.full(4, 2.0), np.array([0, 1, 0, 1]))
    assert 2.0 * scale + shift == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    ("scores", "truth", "words"),
    [
        (np.zeros(2), np.zeros(3), r"shapes \(2,\) and \(3,\)"),
        (np.zeros((2, 1)), np.zeros((2, 1)), r"\(M,\) both"),
        (np.array([0.1, np.nan]), np.zeros(2), "1 scores NaN"),
        (np.zeros(2), np.array([0, 2]), "neither 0 nor 1"),
    ],
)
def test_samples_that_do_not_fit_are_refused(scores: np.ndarray, truth: np.ndarray, words: str) -> None:
    for function in (auroc, expected_calibration_error, fit_platt):
        with pytest.raises(SpecError, match=words):
            function(scores, truth)


def test_what_is_no_probability_or_has_one_class_is_refused() -> None:
    for bad in (np.array([0.5, 1.1]), np.array([-0.1, 0.5])):
        with pytest.raises(SpecError, match=r"probabilities in 0\.\.1"):
            expected_calibration_error(bad, np.array([0, 1]))
    with pytest.raises(SpecError, match="at least one bin"):
        expected_calibration_error(np.array([0.5]), np.array([1]), bins=0)
    assert np.isnan(expected_calibration_error(np.empty(0), np.empty(0)))
    with pytest.raises(SpecError, match="2 positive and 0 negative"):
        fit_platt(np.array([0.0, 1.0]), np.array([1, 1]))
    with pytest.raises(SpecError, match="1 not finite"):
        fit_platt(np.array([0.0, np.inf]), np.array([0, 1]))
