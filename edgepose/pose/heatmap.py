"""Heat maps: keypoints as peaks of 2-D maps, from and to the coordinates of the input crop.

Invariant: what input coordinate a cell's centre stands for is said by `cell_grid` alone, and refining a peak moves it
by one cell at most, never out of the crop.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.spec import Heatmap

Floats = NDArray[np.float32]
Integers = NDArray[np.intp]

LOWEST = 1e-6  # heat below it is none; also keeps logarithms finite
DARK_RADIUS = 2  # the smoothed 3 x 3 cells around a peak are made of 5 x 5
MEAN_RADIUS = 3  # holds 99 % of a Gaussian of 0.75 cells, the narrowest that training draws, and 97 % of one of 1.25


def cell_grid(cells: int, decoder: Heatmap) -> tuple[float, float]:
    """Where the cells of one axis are.

    Args:
        cells: How many there are.
        decoder: Gives stride and alignment.

    Returns:
        The distance of neighbouring cells' centres and the coordinate of the first one's, input pixels.
    """
    match decoder.alignment:
        case "tiled":
            return decoder.stride, (decoder.stride - 1) / 2
        case "scaled":
            return decoder.stride, 0.0
        case "corners":
            return (cells * decoder.stride - 1) / max(cells - 1, 1), 0.0


def decode_heatmap(maps: Floats, decoder: Heatmap) -> tuple[Floats, Floats]:
    """The highest cell of each map, refined.

    Args:
        maps: (N, K, h, w) float32.
        decoder: Gives stride and refinement.

    Returns:
        Keypoints (N, K, 2) float32 in pixels of the input crop, and scores (N, K) float32 in 0..1: the heat there.
    """
    count, joints, height, width = maps.shape
    flat = maps.reshape(count * joints, height * width)
    peak = flat.argmax(-1)
    score = np.take_along_axis(flat, peak[:, None], -1)[:, 0].reshape(count, joints)
    cells = np.stack([peak % width, peak // width], -1)
    keypoints = refined_px(maps.reshape(-1, height, width), np.arange(len(flat)), cells, decoder)
    return keypoints.reshape(count, joints, 2), np.clip(score, 0, 1).astype(np.float32)


def refined_px(maps: Floats, which: Integers, cells: Integers, decoder: Heatmap) -> Floats:
    """Where peaks are, to a fraction of a cell.

    Args:
        maps: (M, h, w) float32.
        which: (P,) int, the map of each peak.
        cells: (P, 2) int, column and row of each peak's highest cell.
        decoder: Gives stride and refinement.

    Returns:
        (P, 2) float32, pixels of the input crop.
    """
    height, width = maps.shape[1:]
    offsets = _offsets(maps, which, cells, decoder.refine)
    steps, firsts = np.array([cell_grid(width, decoder), cell_grid(height, decoder)], np.float32).T
    points: Floats = (cells.astype(np.float32) + offsets) * steps + firsts
    last = np.array([width, height], np.float32) * np.float32(decoder.stride) - 1
    np.clip(points, 0, last, out=points)
    return points


def _offsets(maps: Floats, which: Integers, cells: Integers, refine: str) -> Floats:
    """From the centre of each peak's cell to the peak, (P, 2) float32 cells."""
    match refine:
        case "quarter":
            return _quarter_offset(maps, which, cells)
        case "dark" if min(maps.shape[1:]) > 2 * DARK_RADIUS:
            return _dark_offset(_log_patches(maps, which, cells, DARK_RADIUS))
        case "softargmax" if min(maps.shape[1:]) > 2 * MEAN_RADIUS:
            return _mean_offset(_log_patches(maps, which, cells, MEAN_RADIUS))
        case _:  # "none", and maps too small to refine anything by
            return np.zeros(cells.shape, np.float32)


def _quarter_offset(maps: Floats, which: Integers, cells: Integers) -> Floats:
    """A quarter of a cell towards the higher neighbour; none along an axis on which one of the two is missing."""
    x, y = cells[:, 0], cells[:, 1]
    last_y, last_x = maps.shape[1] - 1, maps.shape[2] - 1
    dx = maps[which, y, np.minimum(x + 1, last_x)] - maps[which, y, np.maximum(x - 1, 0)]
    dy = maps[which, np.minimum(y + 1, last_y), x] - maps[which, np.maximum(y - 1, 0), x]
    inside = (cells > 0) & (cells < (last_x, last_y))
    step: Floats = (0.25 * np.sign(np.stack([dx, dy], -1)) * inside).astype(np.float32)
    return step


def _log_patches(maps: Floats, which: Integers, cells: Integers, radius: int) -> Floats:
    """Logarithms of the heat around peaks, (P, 2·radius + 1, 2·radius + 1) float32, the peak in the middle.

    Cells outside the map are filled with the parabola through the three that are nearest: the map goes on as the
    Gaussian it is. Zeros would push a peak beside the border inwards, and a reflection would pull it outwards, by up to
    half a cell each.
    """
    height, width = maps.shape[1:]
    size = 2 * radius + 1
    start_x = np.clip(cells[:, 0] - radius, 0, width - size)
    start_y = np.clip(cells[:, 1] - radius, 0, height - size)
    span = np.arange(size)
    inside = maps[which[:, None, None], (start_y[:, None] + span)[:, :, None], (start_x[:, None] + span)[:, None, :]]
    logs: Floats = np.log(np.maximum(inside, np.float32(LOWEST)))
    shift_x, shift_y = cells[:, 0] - radius - start_x, cells[:, 1] - radius - start_y
    if not (shift_x.any() or shift_y.any()):
        return logs
    logs = _shifted(logs, shift_x)
    return _shifted(logs.swapaxes(1, 2), shift_y).swapaxes(1, 2)


def _shifted(logs: Floats, shift: Integers) -> Floats:
    """Patches (P, S, S) moved along their last axis by (P,) cells, extrapolated where they end."""
    last = logs.shape[-1] - 1
    index = np.arange(last + 1) + shift[:, None]
    moved = np.take_along_axis(logs, np.clip(index, 0, last)[:, None, :], -1)
    below, above = np.maximum(-index, 0)[:, None, :], np.maximum(index - last, 0)[:, None, :]
    for steps, (first, second, third) in ((below, (0, 1, 2)), (above, (last, last - 1, last - 2))):
        a, b, c = (logs[..., i, None] for i in (first, second, third))
        beyond = a + steps * (a - b) + steps * (steps + 1) / 2 * (a - 2 * b + c)
        # Heat falls beyond a border: were it to rise, the peak would be outside, where no label is.
        moved = np.where(steps > 0, np.clip(beyond, np.float32(np.log(LOWEST)), a), moved)
    return moved.astype(np.float32)


def _dark_offset(logs: Floats) -> Floats:
    """Newton step on the smoothed log heat map (Zhang et al., DARK, CVPR 2020); (P, 5, 5) to (P, 2)."""
    heat = np.exp(logs)
    heat = (heat[:, :-2] + 2 * heat[:, 1:-1] + heat[:, 2:]) / 4
    v = np.log((heat[:, :, :-2] + 2 * heat[:, :, 1:-1] + heat[:, :, 2:]) / 4)
    dx, dy = (v[:, 1, 2] - v[:, 1, 0]) / 2, (v[:, 2, 1] - v[:, 0, 1]) / 2
    dxx = v[:, 1, 2] - 2 * v[:, 1, 1] + v[:, 1, 0]
    dyy = v[:, 2, 1] - 2 * v[:, 1, 1] + v[:, 0, 1]
    dxy = (v[:, 2, 2] - v[:, 2, 0] - v[:, 0, 2] + v[:, 0, 0]) / 4
    determinant = dxx * dyy - dxy**2
    usable = (determinant > 1e-9) & (dxx < 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        step = -np.stack([dyy * dx - dxy * dy, dxx * dy - dxy * dx], -1) / determinant[:, None]
    return np.where(usable[:, None], np.clip(step, -1, 1), 0).astype(np.float32)


def _mean_offset(logs: Floats) -> Floats:
    """Soft-argmax over the patch: the mean position under the softmax of the logarithms, which is the heat itself.

    Bulat et al. (BMVC 2021) sharpen the heat first (softmax of 10 times the heat); the mean of the heat as it is has no
    bias towards cell centres, and a network's INT8 steps hardly move it.
    """
    radius = logs.shape[-1] // 2
    heat = np.exp(logs)
    total = heat.sum((1, 2))
    axis = np.arange(-radius, radius + 1, dtype=np.float32)
    mean: Floats = np.stack([(heat.sum(1) * axis).sum(-1), (heat.sum(2) * axis).sum(-1)], -1) / total[:, None]
    return np.clip(mean, -1, 1)


def encode_heatmap(keypoints: NDArray[Any], input_hw: tuple[int, int], decoder: Heatmap, sigma_px: float) -> Floats:
    """Unnormalised Gaussians (peak 1) centred on the exact sub-cell position.

    Args:
        keypoints: (N, K, 2), pixels of the input crop.
        input_hw: Height and width of the input crop.
        decoder: Gives stride and alignment.
        sigma_px: Standard deviation in input pixels.

    Returns:
        (N, K, h/stride, w/stride) float32.
    """
    height, width = round(input_hw[0] / decoder.stride), round(input_hw[1] / decoder.stride)
    steps, firsts = np.array([cell_grid(width, decoder), cell_grid(height, decoder)], np.float32).T
    cells = (np.asarray(keypoints, np.float32) - firsts) / steps
    sigma = sigma_px / decoder.stride
    dx = (np.arange(width, dtype=np.float32) - cells[..., :1]) ** 2
    dy = (np.arange(height, dtype=np.float32) - cells[..., 1:]) ** 2
    maps: Floats = np.exp(-(dy[..., :, None] + dx[..., None, :]) / np.float32(2 * sigma**2), dtype=np.float32)
    return maps
