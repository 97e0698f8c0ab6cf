"""Linear maps between inputs of different sizes: from the weights that read or write a map, or coordinate bins, of one
size to those for another.

Invariant: every matrix is (after, before), its rows say where in the old picture a place of the new one lies, and the
outer edges of both pictures coincide: no half-pixel shift.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor

Size = tuple[int, int]


def bins_matrix(bins: Size, ratios: tuple[float, float]) -> Tensor:
    """Interpolates values at SimCC's bins; bin b is input coordinate b / ratio, pixel centres are integers.

    Args:
        bins: Number of bins before and after.
        ratios: Bins per input pixel before and after.
    """
    before, after = bins
    zoom = (after / ratios[1]) / (before / ratios[0])
    places = ((torch.arange(after) / ratios[1] + 0.5) / zoom - 0.5) * ratios[0]
    places = places.clamp(0, before - 1)
    return (1 - (places[:, None] - torch.arange(before)[None]).abs()).clamp(min=0)


def cells_matrix(before_hw: Size, after_hw: Size) -> Tensor:
    """Resizes flattened maps: bilinear, with averaging where they get smaller."""
    rows, columns = (_line(before, after) for before, after in zip(before_hw, after_hw, strict=True))
    return torch.kron(rows, columns)


def readers_matrix(before_hw: Size, after_hw: Size) -> Tensor:
    """Lets weights that read a flattened map read one of another size, as if it had been resized to the one they know.

    With R resizing the new map to the old size, weights W become W·R: what they put out keeps its magnitude.
    """
    return cells_matrix(after_hw, before_hw).T


def resampled(value: Tensor, axis: int, matrix: Tensor) -> Tensor:
    """Applies a matrix along one axis."""
    applied: Tensor = torch.tensordot(matrix, value, dims=([1], [axis]))
    return applied.movedim(0, axis)


def _line(before: int, after: int) -> Tensor:
    lines = torch.eye(before)[None, None]  # one line per column
    resized = F.interpolate(lines, size=(after, before), mode="bilinear", align_corners=False, antialias=True)
    return resized[0, 0]
