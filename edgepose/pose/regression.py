"""Coordinates that the network says outright (RLE; Li et al., ICCV 2021), from and to those of the input crop.

Invariant: a share of 0 is the outer edge of the first pixel and a share of 1 that of the last one, so that mirroring
the crop turns a share s into 1 - s.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.spec import Regression

Floats = NDArray[np.float32]

NEAR_PX = 3.0  # an error of at most this counts as a hit in the score: about what SimCC's score counts


def decode_regression(
    shares: Floats, scales: Floats | None, scores: Floats | None, decoder: Regression
) -> tuple[Floats, Floats]:
    """Shares of the input's size to keypoints.

    Args:
        shares: (N, K, 2) float32, x and y as shares of the input's width and height.
        scales: (N, K, 2) float32, the scales of their errors in the same shares, above 0; None where there are none.
        scores: (N, K) float32, 0..1; None where there are none.
        decoder: Gives the size of the input.

    Returns:
        Keypoints (N, K, 2) float32 in pixels of the input crop, which they may leave, and scores (N, K) float32, 0..1:
        those given; else the geometric mean, over the two axes, of the probability of an error of at most three pixels,
        were the errors distributed as a Laplacian of that scale; else 1. (The paper's own score, one minus the mean
        scale, orders joints much alike but is near 1 for all that a threshold would tell apart.)
    """
    size = _size(decoder)
    keypoints = (shares * size - np.float32(0.5)).astype(np.float32)
    if scores is not None:
        return keypoints, np.clip(scores, 0, 1)
    if scales is None:
        return keypoints, np.ones(keypoints.shape[:2], np.float32)
    near = -np.expm1(-NEAR_PX / np.maximum(scales * size, np.float32(1e-6)))
    return keypoints, np.sqrt(near[..., 0] * near[..., 1]).astype(np.float32)


def encode_regression(keypoints: NDArray[Any], decoder: Regression) -> Floats:
    """Keypoints as shares of the input's size.

    Args:
        keypoints: (N, K, 2), pixels of the input crop.
        decoder: Gives the size of the input.

    Returns:
        (N, K, 2) float32, 0..1 inside the crop.
    """
    shares: Floats = ((np.asarray(keypoints, np.float32) + np.float32(0.5)) / _size(decoder)).astype(np.float32)
    return shares


def _size(decoder: Regression) -> Floats:
    height, width = decoder.input_hw
    return np.array([width, height], np.float32)
