"""SimCC: keypoints as two 1-D classifications (Li et al., ECCV 2022), from and to the coordinates of the input crop.

Invariant: bin b stands for the coordinate b / split_ratio, and integer coordinates are pixel centres.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.spec import SimCC

Floats = NDArray[np.float32]

SUPPORT = 2  # bins on each side of the peak that take part in its sub-bin position
_VOTE_PX = 1.5  # half the width of a sliding sum; two of them weigh bins by a triangle of twice that on each side
MASS = 6  # bins on each side whose probability counts as confidence: about ±3 pixels at split ratio 2


def decode_simcc(x: Floats, y: Floats, decoder: SimCC) -> tuple[Floats, Floats]:
    """Logits to keypoints.

    Args:
        x: (N, K, w·split_ratio) float32 logits.
        y: (N, K, h·split_ratio) float32 logits.
        decoder: Gives the split ratio.

    Returns:
        Keypoints (N, K, 2) float32 in pixels of the input crop, and scores (N, K) float32 in 0..1: the geometric mean,
        over the two axes, of the probability around the peak.
    """
    reach = vote_reach(decoder)
    (px, sx), (py, sy) = _peak_1d(x, reach), _peak_1d(y, reach)
    keypoints = np.stack([px, py], axis=-1) / np.float32(decoder.split_ratio)
    return keypoints.astype(np.float32), np.sqrt(sx * sy)


def vote_reach(decoder: SimCC) -> int:
    """How many bins on each side a sliding sum has; two of them find the peak."""
    return max(1, round(_VOTE_PX * decoder.split_ratio))


def _peak_1d(logits: Floats, reach: int) -> tuple[Floats, Floats]:
    """Sub-bin peak position and the probability around it, for (N, K, B) logits.

    The peak is that of the probability within a few pixels, not of a single bin: bins are so narrow that the highest is
    a matter of noise, while accuracy is asked for within a distance. Beside a border, where there is nothing to sum on
    one side, the highest bin counts.
    """
    bins = logits.shape[-1]
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    cumulative = _cumulative(probability)
    summed = _within(_cumulative(_within(cumulative, reach)), reach)
    voted = summed.argmax(-1)
    margin = 2 * reach + SUPPORT
    free = (voted >= margin) & (voted < bins - margin)
    peak = np.where(free, voted, logits.argmax(-1))
    sums = np.log(np.maximum(summed, np.finfo(np.float32).tiny))
    position = np.where(free, _refined(sums, peak), _refined(logits, peak))
    high = np.minimum(peak + MASS + 1, bins)[..., None]
    low = np.maximum(peak - MASS, 0)[..., None]
    mass = np.take_along_axis(cumulative, high, -1) - np.take_along_axis(cumulative, low, -1)
    return position.astype(np.float32), np.clip(mass[..., 0], 0, 1).astype(np.float32)


def _cumulative(values: Floats) -> Floats:
    """(…, B) to (…, B + 1), from 0 on; float64, so that what lies far away leaves no rounding error behind."""
    sums = values.cumsum(-1, dtype=np.float64)
    return np.concatenate([np.zeros_like(sums[..., :1]), sums], -1)


def _within(cumulative: Floats, reach: int) -> Floats:
    """The sum of up to `reach` bins on each side of each of B bins, and of itself."""
    bins = np.arange(cumulative.shape[-1] - 1)
    high, low = np.minimum(bins + reach + 1, len(bins)), np.maximum(bins - reach, 0)
    within: Floats = cumulative[..., high] - cumulative[..., low]
    return within


def _refined(logits: Floats, peak: NDArray[np.integer]) -> Floats:
    """The peak's sub-bin position: that of the parabola through it and its neighbours at distance `SUPPORT`.

    Exact for a Gaussian; the wide base makes it robust to the quantisation steps of INT8 logits.
    """
    bins = logits.shape[-1]
    centre = np.clip(peak, SUPPORT, bins - 1 - SUPPORT)

    def at(index: NDArray[np.integer]) -> Floats:
        return np.take_along_axis(logits, index[..., None], -1)[..., 0]

    left, mid, right = at(centre - SUPPORT), at(centre), at(centre + SUPPORT)
    curvature = left - 2 * mid + right
    usable = np.isfinite(curvature) & (curvature < 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(usable, SUPPORT * 0.5 * (left - right) / curvature, 0.0)
    # Beside a border the parabola is that of the nearest bins that have both neighbours, not trusted beyond the peak's.
    inside = centre == peak
    reach = np.where(inside, SUPPORT, 0.5)
    position = np.where(inside | usable, np.clip(centre + shift, peak - reach, peak + reach), peak)
    refined: Floats = np.clip(position, 0, bins - 1)
    return refined


def encode_simcc(
    keypoints: NDArray[Any], input_hw: tuple[int, int], decoder: SimCC, sigma_px: float
) -> tuple[Floats, Floats]:
    """Gaussian label distributions over the bins, each summing to 1.

    Args:
        keypoints: (N, K, 2), pixels of the input crop.
        input_hw: Height and width of the input crop.
        decoder: Gives the split ratio.
        sigma_px: Standard deviation of the Gaussian in input pixels.

    Returns:
        (N, K, w·split_ratio) and (N, K, h·split_ratio) float32.
    """
    height, width = input_hw
    x = _gaussian_1d(
        keypoints[..., 0] * decoder.split_ratio, round(width * decoder.split_ratio), sigma_px * decoder.split_ratio
    )
    y = _gaussian_1d(
        keypoints[..., 1] * decoder.split_ratio, round(height * decoder.split_ratio), sigma_px * decoder.split_ratio
    )
    return x, y


def _gaussian_1d(centre: NDArray[Any], bins: int, sigma: float) -> Floats:
    exponent = -((np.arange(bins, dtype=np.float32) - centre[..., None]) ** 2) / np.float32(2 * sigma**2)
    weights = np.exp(exponent - exponent.max(-1, keepdims=True), dtype=np.float32)
    normalised: Floats = weights / weights.sum(-1, keepdims=True)
    return normalised
