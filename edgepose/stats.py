"""Bounds for noisy measurements: percentiles, paired time ratios, paired accuracy differences.

Invariant: pure and seeded. Equal arguments give equal results on every machine, and no function prints, reads a clock
or touches global random state.

Times are compared through medians of log-ratios: on shared machines the tails are so heavy that means do not settle.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import BadInput, Inconclusive

Floats = NDArray[np.float64]

_INNER_DRAWS = 1000  # resampled medians kept per process pair; the outer draws pick among these
_CHUNK_ELEMENTS = 4_000_000  # largest index table built at once: 32 MB


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with a lower and an upper bound, all in the same unit."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Candidate minus baseline for one or more pooled metrics, as fractions.

    Attributes:
        baseline: (M,) metric of the baseline.
        candidate: (M,) metric of the candidate.
        draws: (D, M) bootstrap replicates of the difference.
    """

    baseline: Floats
    candidate: Floats
    draws: Floats

    @property
    def difference(self) -> Floats:
        return self.candidate - self.baseline

    @property
    def standard_error(self) -> Floats:
        """(M,) standard deviation of the replicates."""
        spread: Floats = self.draws.std(axis=0)
        return spread

    def bounds(self, alpha: float) -> tuple[Floats, Floats]:
        """Lower and upper one-sided bounds, each (M,), each wrong with probability `alpha`."""
        low, high = np.quantile(self.draws, [alpha, 1 - alpha], axis=0)
        return low, high


# ---------------------------------------------------------------------------------------------------- percentiles


def minimum_samples(quantile: float, *, confidence: float = 0.99, excess: int = 1) -> int:
    """Samples needed before a percentile may be stated: the early-stopping rule of MLPerf inference (d = 0).

    With fewer, even `excess` samples above the true percentile would be likelier than 1 - `confidence`.
    That is 64 samples for a p90 and 662 for a p99.

    Args:
        quantile: 0.5 <= quantile < 1.
        confidence: Confidence that the statement holds.
        excess: Samples that may lie above the percentile.
    """
    if not 0.5 <= quantile < 1:
        raise BadInput("percentile", found=f"{quantile}", expected="0.5 to below 1")
    count = excess + 1
    while _binomial_cdf(excess, count, 1 - quantile) > 1 - confidence:
        count += 1
    return count


def percentile_bounds(samples: NDArray[np.floating], quantile: float, *, confidence: float = 0.95) -> Interval:
    """A percentile with distribution-free bounds: order statistics whose ranks come from the binomial distribution.

    Args:
        samples: (N,) finite values of any unit.
        quantile: Such as 0.99.
        confidence: Two-sided confidence of the bounds.

    Raises:
        Inconclusive: Fewer samples than `minimum_samples` asks for.
        BadInput: Empty or not finite.
    """
    values = np.sort(_finite(samples, "samples of a percentile"))
    needed = minimum_samples(quantile)
    if len(values) < needed:
        raise Inconclusive(
            f"p{100 * quantile:g}",
            found=f"{len(values)} samples",
            expected=f"at least {needed}",
            fix="measure for longer or ask for a lower percentile",
        )
    low, high = _order_ranks(len(values), quantile, (1 - confidence) / 2)
    return Interval(float(np.quantile(values, quantile)), float(values[low]), float(values[high]))


def _order_ranks(count: int, quantile: float, alpha: float) -> tuple[int, int]:
    """0-based ranks (l, u) with P(x_(l) > q) <= alpha and P(x_(u) < q) <= alpha, clipped to the sample."""
    low = -1  # largest l with P(Bin <= l) <= alpha
    high = count - 1  # smallest u with P(Bin <= u) >= 1 - alpha
    start, cumulative = _binomial_window(count, quantile)
    below = np.flatnonzero(cumulative <= alpha)
    if below.size:
        low = start + int(below[-1])
    above = np.flatnonzero(cumulative >= 1 - alpha)
    if above.size:
        high = start + int(above[0])
    return max(low, 0), min(high, count - 1)


def _binomial_cdf(successes: int, trials: int, probability: float) -> float:
    """P(X <= successes) for few successes."""
    return sum(
        math.exp(_log_choose(trials, k) + k * math.log(probability) + (trials - k) * math.log1p(-probability))
        for k in range(successes + 1)
    )


def _binomial_window(trials: int, probability: float) -> tuple[int, Floats]:
    """The binomial CDF where it differs visibly from 0 and 1: its first argument, and its values from there on."""
    centre, spread = trials * probability, math.sqrt(trials * probability * (1 - probability))
    start = max(0, math.floor(centre - 12 * spread - 1))
    k = np.arange(start, min(trials, math.ceil(centre + 12 * spread + 1)) + 1)
    first = _log_choose(trials, start) + start * math.log(probability) + (trials - start) * math.log1p(-probability)
    steps = np.log((trials - k[:-1]) / (k[:-1] + 1.0)) + math.log(probability) - math.log1p(-probability)
    return start, np.cumsum(np.exp(first + np.concatenate([[0.0], np.cumsum(steps)])))


def _log_choose(trials: int, k: int) -> float:
    return math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)


# ---------------------------------------------------------------------------------------------------- time ratios


def robust_spread(values: NDArray[np.floating]) -> float:
    """Standard deviation as the scaled median absolute deviation: what it would be without the tails."""
    finite = _finite(values, "values of a spread")
    return float(1.4826 * np.median(np.abs(finite - np.median(finite))))


def median_of_medians(pairs: Sequence[NDArray[np.floating]]) -> float:
    """The median over process pairs of each pair's median log-ratio."""
    return float(np.median([np.median(_finite(pair, "log-ratios of a pair")) for pair in pairs]))


def ratio_draws(
    pairs: Sequence[NDArray[np.floating]], *, seed: int, draws: int = 20_000, block_length: int = 5
) -> Floats:
    """Hierarchical bootstrap of the median log-ratio: process pairs first, then moving blocks of rounds inside each.

    Moving blocks (Künsch, 1989) keep the correlation of neighbouring rounds. The inner medians are drawn once per
    pair and the outer draws choose among them, which is the same distribution at a fraction of the cost.

    Args:
        pairs: One (B,) array of log(candidate / baseline) per pair of processes, in order of time.
        seed: Of the random draws.
        draws: Replicates.
        block_length: Rounds per moving block.

    Returns:
        (draws,) replicates of the overall median log-ratio.

    Raises:
        BadInput: No pair, an empty pair, or a value that is not finite.
    """
    if not pairs:
        raise BadInput("latency comparison", found="no process pairs", expected="at least one")
    rng = np.random.default_rng(seed)
    inner = np.stack([_inner_medians(_finite(pair, "log-ratios of a pair"), block_length, rng) for pair in pairs])
    count = len(pairs)
    chosen = rng.integers(0, count, (draws, count))
    return _row_medians(inner[chosen, rng.integers(0, _INNER_DRAWS, (draws, count))])


def _inner_medians(values: Floats, block_length: int, rng: np.random.Generator) -> Floats:
    length = min(block_length, len(values))
    blocks = math.ceil(len(values) / length)
    starts = rng.integers(0, len(values) - length + 1, (_INNER_DRAWS, blocks))
    index = (starts[:, :, None] + np.arange(length)).reshape(_INNER_DRAWS, -1)[:, : len(values)]
    return _row_medians(values[index])


def _row_medians(values: Floats) -> Floats:
    """(R,) medians of the rows of (R, C) values: `np.median`, several times faster for short rows."""
    ordered, columns = np.sort(values, axis=1), values.shape[1]
    medians: Floats = (ordered[:, (columns - 1) // 2] + ordered[:, columns // 2]) / 2
    return medians


def ratio_interval(draws: NDArray[np.floating], estimate: float, *, alpha: float) -> Interval:
    """Bounds of a time ratio from log-ratio replicates, each side wrong with probability `alpha`; 1.0 is no change."""
    low, high = np.quantile(draws, [alpha, 1 - alpha])
    return Interval(math.exp(estimate), math.exp(min(low, estimate)), math.exp(max(high, estimate)))


def hodges_lehmann(values: NDArray[np.floating]) -> float:
    """Median of all pairwise means (Hodges & Lehmann, 1963): a cross-check that has no vote."""
    finite = _finite(values, "values of the Hodges-Lehmann estimate")
    rows, columns = np.triu_indices(len(finite))
    return float(np.median((finite[rows] + finite[columns]) / 2))


def sign_test(values: NDArray[np.floating]) -> float:
    """Two-sided p-value of the sign test against a median of zero; zeros are left out."""
    finite = _finite(values, "values of the sign test")
    positive, trials = int((finite > 0).sum()), int((finite != 0).sum())
    if trials == 0:
        return 1.0
    return min(1.0, 2 * _binomial_cdf(min(positive, trials - positive), trials, 0.5))


# ---------------------------------------------------------------------------------------------- accuracy differences


def paired_bootstrap(
    baseline: NDArray[np.floating],
    candidate: NDArray[np.floating],
    counts: NDArray[np.floating],
    *,
    seed: int,
    draws: int = 10_000,
    clusters: NDArray[np.integer] | None = None,
) -> PairedDifference:
    """Bootstrap over persons of the difference of pooled metrics; both arms see the same persons in every draw.

    A pooled metric is a sum over persons divided by a sum of counts over persons (a hit rate over joints), so it is
    recomputed for a draw from per-person sums by one matrix product. Joints of a person are never drawn apart: their
    errors are correlated, and bounds from joints would be too narrow.

    Args:
        baseline: (P, M) per person and metric: the sum that the baseline contributes.
        candidate: (P, M) the same of the candidate.
        counts: (P, M) labelled joints behind each sum; the same for both arms.
        seed: Of the random draws.
        draws: Replicates.
        clusters: (P,) persons with equal numbers are drawn together (people of one image); None draws persons.

    Raises:
        BadInput: Shapes differ, a value is not finite, or a metric has no labelled joint at all.
    """
    base, cand, joints = _matrix(baseline, "baseline"), _matrix(candidate, "candidate"), _matrix(counts, "counts")
    if not base.shape == cand.shape == joints.shape:
        raise BadInput(
            "paired bootstrap",
            found=f"shapes {base.shape}, {cand.shape} and {joints.shape}",
            expected="the same persons and metrics in both arms",
        )
    if (joints.sum(axis=0) <= 0).any():
        raise BadInput("paired bootstrap", found="a metric without labelled joints", expected="at least one per metric")
    if clusters is not None:
        base, cand, joints = (_sum_by(values, clusters) for values in (base, cand, joints))
    totals = _weighted_totals(np.concatenate([cand - base, joints], axis=1), seed, draws)
    differences, weights = np.split(totals, 2, axis=1)
    # A draw can miss a rare joint altogether; it then says nothing about a difference there.
    replicates = np.divide(differences, weights, out=np.zeros_like(differences), where=weights > 0)
    whole = joints.sum(axis=0)
    return PairedDifference(base.sum(axis=0) / whole, cand.sum(axis=0) / whole, replicates)


def _weighted_totals(values: Floats, seed: int, draws: int) -> Floats:
    """(D, C) column sums of (P, C) values over P persons drawn with replacement, D times."""
    persons = len(values)
    rng = np.random.default_rng(seed)
    totals = np.empty((draws, values.shape[1]))
    step = max(1, _CHUNK_ELEMENTS // persons)
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        chosen = rng.integers(0, persons, (rows, persons)) + np.arange(rows)[:, None] * persons
        times = np.bincount(chosen.ravel(), minlength=rows * persons).reshape(rows, persons)
        totals[start : start + rows] = times.astype(np.float64) @ values
    return totals


def _sum_by(values: Floats, clusters: NDArray[np.integer]) -> Floats:
    if clusters.shape != values.shape[:1]:
        raise BadInput("paired bootstrap", found=f"clusters of shape {clusters.shape}", expected=f"({len(values)},)")
    _, index = np.unique(clusters, return_inverse=True)
    summed = np.zeros((int(index.max()) + 1, values.shape[1]))
    np.add.at(summed, index, values)
    return summed


def detectable_change(standard_error: float, *, alpha: float, power: float = 0.9) -> float:
    """The true change that a one-sided test at `alpha` finds with probability `power`, in the unit of the error."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha) + normal.inv_cdf(power)) * standard_error


def exceedance_p_values(draws: NDArray[np.floating], threshold: float) -> Floats:
    """(M,) one-sided p-values that a value exceeds `threshold`: the share of (D, M) replicates that do not, never 0."""
    return np.asarray((1 + (draws <= threshold).sum(axis=0)) / (1 + len(draws)), np.float64)


def holm(p_values: Sequence[float] | Floats) -> Floats:
    """Holm's step-down adjustment (1979): (M,) p-values that may each be compared with the family's alpha."""
    raw = np.asarray(p_values, np.float64)
    order = np.argsort(raw, kind="stable")
    scaled = np.minimum(raw[order] * (len(raw) - np.arange(len(raw))), 1.0)
    adjusted = np.empty_like(raw)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted


def _finite(values: NDArray[np.floating], where: str) -> Floats:
    array = np.asarray(values, np.float64).ravel()
    if not array.size:
        raise BadInput(where, found="none", expected="at least one")
    if not np.isfinite(array).all():
        bad = int(array.size - np.isfinite(array).sum())
        raise BadInput(where, found=f"{bad} of {array.size} values that are not finite", expected="finite numbers")
    return array


def _matrix(values: NDArray[np.floating], arm: str) -> Floats:
    array, where = np.asarray(values, np.float64), f"paired bootstrap: {arm}"
    if array.ndim != 2 or not array.size:
        raise BadInput(where, found=f"shape {array.shape}", expected="(persons, metrics), not empty")
    if not np.isfinite(array).all():
        raise BadInput(where, found="values that are not finite", expected="finite sums per person")
    return array
