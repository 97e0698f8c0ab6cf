"""Keypoints to training targets and network outputs to keypoints, for SimCC and heat maps.

Invariant: `decode(encode(p))` returns p to sub-pixel accuracy, without a half-pixel bias (bins and cells as in `spec`).
"""

from __future__ import annotations

from collections.abc import Mapping

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError
from edgepose.spec import Decoder, Heatmap, SimCC

Floats = NDArray[np.float32]


def decode(outputs: Mapping[str, NDArray[np.floating]], decoder: Decoder) -> tuple[Floats, Floats]:
    """Network outputs to keypoints.

    Args:
        outputs: The network's outputs by name; logits for SimCC, heat-map values for Heatmap.
        decoder: Which outputs to read, and how.

    Returns:
        Keypoints (N, K, 2) float32 in pixels of the input crop, and scores (N, K) float32 in 0..1.

    Raises:
        SpecError: An output that the decoder needs is absent or has too few axes.
    """
    match decoder:
        case SimCC():
            x, y = _output(outputs, decoder.x, "(N, K, bins)"), _output(outputs, decoder.y, "(N, K, bins)")
            return _decode_simcc(x, y, decoder.split_ratio)
        case Heatmap():
            return _decode_heatmap(_output(outputs, decoder.output, "(N, K, h, w)"), decoder)


def _output(outputs: Mapping[str, NDArray[np.floating]], name: str, shape: str) -> Floats:
    if name not in outputs:
        raise SpecError(
            "decoder",
            found=f"network outputs {sorted(outputs)}",
            expected=f"an output named {name!r}",
            fix="correct the decoder in the model specification",
        )
    # In C order whatever the runtime's memory layout: `_dark_offset` writes through flattened views.
    values = np.ascontiguousarray(outputs[name], np.float32)
    if values.ndim != shape.count(",") + 1:
        raise SpecError(f"decoder: output {name!r}", found=f"shape {values.shape}", expected=shape)
    return values


def _decode_simcc(x: Floats, y: Floats, split_ratio: float) -> tuple[Floats, Floats]:
    (px, sx), (py, sy) = _peak_1d(x), _peak_1d(y)
    keypoints = np.stack([px, py], axis=-1) / np.float32(split_ratio)
    return keypoints.astype(np.float32), np.sqrt(sx * sy)


_SUPPORT = 2  # bins on each side of the peak that take part in its sub-bin position
_MASS = 6  # bins on each side whose probability counts as confidence: about ±3 pixels at split ratio 2


def _peak_1d(logits: Floats) -> tuple[Floats, Floats]:
    """Sub-bin peak position and the probability around it, for (N, K, B) logits.

    The position is that of the parabola through the log-probabilities of the peak and its neighbours at distance
    `_SUPPORT` (exact for a Gaussian); the wider base makes it robust to the quantisation steps of INT8 logits.
    """
    bins = logits.shape[-1]
    peak = logits.argmax(-1)
    probability = np.exp(logits - logits.max(-1, keepdims=True))
    probability /= probability.sum(-1, keepdims=True)
    centre = np.clip(peak, _SUPPORT, bins - 1 - _SUPPORT)

    def at(index: NDArray[np.integer]) -> Floats:
        return np.take_along_axis(logits, index[..., None], -1)[..., 0]

    left, mid, right = at(centre - _SUPPORT), at(centre), at(centre + _SUPPORT)
    curvature = left - 2 * mid + right
    with np.errstate(divide="ignore", invalid="ignore"):
        shift = np.where(np.isfinite(curvature) & (curvature < 0), _SUPPORT * 0.5 * (left - right) / curvature, 0.0)
    inside = centre == peak
    position = np.where(inside, peak + np.clip(shift, -_SUPPORT, _SUPPORT), peak)
    cumulative = np.concatenate([np.zeros_like(probability[..., :1]), probability.cumsum(-1)], -1)
    high = np.minimum(peak + _MASS + 1, bins)[..., None]
    low = np.maximum(peak - _MASS, 0)[..., None]
    mass = np.take_along_axis(cumulative, high, -1) - np.take_along_axis(cumulative, low, -1)
    return position.astype(np.float32), np.clip(mass[..., 0], 0, 1).astype(np.float32)


def _decode_heatmap(maps: Floats, decoder: Heatmap) -> tuple[Floats, Floats]:
    count, joints, height, width = maps.shape
    flat = maps.reshape(count, joints, height * width)
    peak = flat.argmax(-1)
    score = np.take_along_axis(flat, peak[..., None], -1)[..., 0]
    cells = np.stack([peak % width, peak // width], -1).astype(np.float32)
    match decoder.refine:
        case "quarter":
            cells += _quarter_offset(maps, cells)
        case "dark":
            cells += _dark_offset(maps, cells)
        case "none":
            pass
    stride = np.float32(decoder.stride)
    return (cells + np.float32(0.5)) * stride - np.float32(0.5), np.clip(score, 0, 1).astype(np.float32)


def _neighbourhood(maps: Floats, cells: Floats) -> tuple[Floats, NDArray[np.bool_]]:
    """The 3x3 values around each peak, (N, K, 3, 3), and whether the peak is away from the border."""
    height, width = maps.shape[2:]
    x, y = cells[..., 0].astype(int), cells[..., 1].astype(int)
    inside = (x > 0) & (x < width - 1) & (y > 0) & (y < height - 1)
    x, y = np.clip(x, 1, width - 2), np.clip(y, 1, height - 2)
    rows = y[..., None, None] + np.array([[-1], [0], [1]])
    columns = x[..., None, None] + np.array([[-1, 0, 1]])
    n = np.arange(maps.shape[0])[:, None, None, None]
    k = np.arange(maps.shape[1])[None, :, None, None]
    return maps[n, k, rows, columns], inside


def _quarter_offset(maps: Floats, cells: Floats) -> Floats:
    around, inside = _neighbourhood(maps, cells)
    dx = np.sign(around[..., 1, 2] - around[..., 1, 0])
    dy = np.sign(around[..., 2, 1] - around[..., 0, 1])
    return (0.25 * np.stack([dx, dy], -1) * inside[..., None]).astype(np.float32)


def _dark_offset(maps: Floats, cells: Floats) -> Floats:
    """Newton step on the smoothed log heat map (Zhang et al., DARK, CVPR 2020)."""
    smooth = np.empty_like(maps)
    for source, target in zip(maps.reshape(-1, *maps.shape[2:]), smooth.reshape(-1, *maps.shape[2:]), strict=True):
        # Nothing lies outside the map; a reflection would pull peaks beside the border towards it by half a cell.
        cv2.GaussianBlur(source, (3, 3), 0, dst=target, borderType=cv2.BORDER_CONSTANT)
    v, inside = _neighbourhood(np.log(np.maximum(smooth, 1e-6)), cells)
    dx, dy = (v[..., 1, 2] - v[..., 1, 0]) / 2, (v[..., 2, 1] - v[..., 0, 1]) / 2
    dxx = v[..., 1, 2] - 2 * v[..., 1, 1] + v[..., 1, 0]
    dyy = v[..., 2, 1] - 2 * v[..., 1, 1] + v[..., 0, 1]
    dxy = (v[..., 2, 2] - v[..., 2, 0] - v[..., 0, 2] + v[..., 0, 0]) / 4
    determinant = dxx * dyy - dxy**2
    usable = inside & (determinant > 1e-9) & (dxx < 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        step = -np.stack([dyy * dx - dxy * dy, dxx * dy - dxy * dx], -1) / determinant[..., None]
    return np.where(usable[..., None], np.clip(step, -1, 1), 0).astype(np.float32)


def encode_simcc(
    keypoints: NDArray[np.floating], input_hw: tuple[int, int], decoder: SimCC, sigma_px: float
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


def _gaussian_1d(centre: NDArray[np.floating], bins: int, sigma: float) -> Floats:
    exponent = -((np.arange(bins, dtype=np.float32) - centre[..., None]) ** 2) / np.float32(2 * sigma**2)
    weights = np.exp(exponent - exponent.max(-1, keepdims=True), dtype=np.float32)
    normalised: Floats = weights / weights.sum(-1, keepdims=True)
    return normalised


def encode_heatmap(
    keypoints: NDArray[np.floating], input_hw: tuple[int, int], decoder: Heatmap, sigma_px: float
) -> Floats:
    """Unnormalised Gaussians (peak 1) centred on the exact sub-cell position.

    Args:
        keypoints: (N, K, 2), pixels of the input crop.
        input_hw: Height and width of the input crop.
        decoder: Gives the stride.
        sigma_px: Standard deviation in input pixels.

    Returns:
        (N, K, h/stride, w/stride) float32.
    """
    height, width = round(input_hw[0] / decoder.stride), round(input_hw[1] / decoder.stride)
    cells = (np.asarray(keypoints, np.float32) + 0.5) / decoder.stride - 0.5
    sigma = sigma_px / decoder.stride
    dx = (np.arange(width, dtype=np.float32) - cells[..., :1]) ** 2
    dy = (np.arange(height, dtype=np.float32) - cells[..., 1:]) ** 2
    maps: Floats = np.exp(-(dy[..., :, None] + dx[..., None, :]) / np.float32(2 * sigma**2), dtype=np.float32)
    return maps
