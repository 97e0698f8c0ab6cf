"""How far probabilities can be believed: ranking, calibration error, and Platt's repair of logits.

Invariant: nothing here depends on the order of the samples, not even among equal scores.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_STEPS = 100


def auroc(scores: NDArray[Any], truth: NDArray[Any]) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, a tie counting one half.

    Args:
        scores: (M,) float, higher for positive.
        truth: (M,) bool or 0/1.

    Returns:
        0..1; NaN where one of the two classes is absent.

    Raises:
        SpecError: The two do not fit each other, or a score is NaN.
    """
    values, positive = _samples(scores, truth)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return float("nan")
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2  # the mean rank, from 1, of samples of one score
    above = ranks[group][positive].sum() - positives * (positives + 1) / 2  # Mann and Whitney's U
    return float(above / (positives * negatives))


def expected_calibration_error(probabilities: NDArray[Any], truth: NDArray[Any], bins: int = 15) -> float:
    """Mean gap between what was said and what happened, over bins that hold equally many samples.

    Naeini et al. (AAAI 2015) with the equal-mass bins of Nguyen and O'Connor (2015). Samples of equal probability share
    their mean outcome, so that it does not matter on which side of a bin's edge they fall.

    Args:
        probabilities: (M,) float, 0..1.
        truth: (M,) bool or 0/1.
        bins: Bins; fewer where there are fewer samples.

    Returns:
        0..1; NaN of no samples.

    Raises:
        SpecError: The two do not fit each other, a probability is not in 0..1, or `bins` is below 1.
    """
    values, happened = _samples(probabilities, truth)
    if bins < 1 or (len(values) and not (values.min() >= 0 and values.max() <= 1)):
        found = f"{bins} bins over values {values.min(initial=1):g} … {values.max(initial=0):g}"
        raise SpecError("calibration error", found=found, expected="at least one bin, and probabilities in 0..1")
    if not len(values):
        return float("nan")
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    outcome = (np.bincount(group, weights=happened) / counts)[group]
    order = np.argsort(values, kind="stable")
    gaps = [abs(float((values[part] - outcome[part]).sum())) for part in np.array_split(order, min(bins, len(order)))]
    return sum(gaps) / len(values)


def fit_platt(logits: NDArray[Any], truth: NDArray[Any]) -> tuple[float, float]:
    """Scale and shift that turn logits into calibrated ones: sigmoid(scale · logit + shift).

    Platt (1999) with his smoothed targets, by Newton's method with backtracking (Lin, Lin and Weng, 2007).

    Args:
        logits: (M,) float, finite.
        truth: (M,) bool or 0/1.

    Raises:
        SpecError: The two do not fit each other, a logit is not finite, or one of the two classes is absent.
    """
    values, positive = _samples(logits, truth)
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives or not np.isfinite(values).all():
        found = f"{positives} positive and {negatives} negative samples, {int((~np.isfinite(values)).sum())} not finite"
        raise SpecError("Platt scaling", found=found, expected="finite logits of both classes")
    # Fitted on standardised logits, where the two parameters are of one magnitude.
    centre, spread = float(values.mean()), float(values.std()) or 1.0
    inputs = np.stack([(values - centre) / spread, np.ones(len(values))], -1)
    targets = np.where(positive, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    weights = np.array([0.0, np.log((positives + 1) / (negatives + 1))])
    loss = _cross_entropy(inputs @ weights, targets)
    for _ in range(_STEPS):
        said = _sigmoid(inputs @ weights)
        gradient = inputs.T @ (said - targets)
        if np.abs(gradient).max() < 1e-9 * len(values):
            break
        curvature = (inputs * (said * (1 - said))[:, None]).T @ inputs + 1e-12 * np.eye(2)
        direction = np.linalg.solve(curvature, gradient)
        step = 1.0
        while (new := _cross_entropy(inputs @ (weights - step * direction), targets)) > loss and step > 1e-10:
            step /= 2
        if new >= loss:
            break
        weights, loss = weights - step * direction, new
    scale = float(weights[0] / spread)
    return scale, float(weights[1] - scale * centre)


def _cross_entropy(logits: Floats, targets: Floats) -> float:
    return float((np.logaddexp(0.0, logits) - targets * logits).sum())


def _sigmoid(logits: Floats) -> Floats:
    return np.exp(-np.logaddexp(0.0, -logits))


def _samples(scores: NDArray[Any], truth: NDArray[Any]) -> tuple[Floats, Bools]:
    values, outcome = np.asarray(scores, np.float64), np.asarray(truth)
    if values.ndim != 1 or values.shape != outcome.shape or np.isnan(values).any():
        found = f"shapes {values.shape} and {outcome.shape}, {int(np.isnan(values).sum())} scores NaN"
        raise SpecError("scores and truth", found=found, expected="(M,) both, and no NaN")
    if not np.isin(outcome, (0, 1)).all():
        raise SpecError("scores and truth", found="a truth that is neither 0 nor 1", expected="bool, or 0 and 1")
    return values, outcome.astype(np.bool_)
