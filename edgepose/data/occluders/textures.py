"""Drawn fillings: plain, gradients, stripes, tartan, bricks, dots, rings of wood, cells, brush strokes, writing.

None is one of the textures of `edgepose.data.corrupt`: no noise, checks or clouds.

Invariant: a texture is (h, w, 3) uint8 BGR, whatever h and w from 1 on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.data.occluders.shapes import letter

Image = NDArray[np.uint8]
Colors = NDArray[np.uint8]
F32 = NDArray[np.float32]


def texture(crop: Image, hw: tuple[int, int], rng: np.random.Generator) -> Image:
    """A random one of a size, in colours of the crop more often than not; (h, w, 3)."""
    colors = _palette(crop, rng)
    unit_px = max(crop.shape[:2]) * math.exp(rng.uniform(math.log(0.015), math.log(0.1)))
    return _TEXTURES[rng.integers(len(_TEXTURES))](hw, colors, unit_px, rng)


def _palette(crop: Image, rng: np.random.Generator) -> Colors:
    """(8, 3) colours: any, of the crop, or all near one of the crop."""
    taken = crop[rng.integers(crop.shape[0], size=8), rng.integers(crop.shape[1], size=8)].astype(np.float64)
    kind = rng.random()
    if kind < 0.3:
        taken[:] = taken[0]
    mixed = np.clip(taken + rng.normal(0, 15 if kind >= 0.3 else 30, (8, 3)), 0, 255).astype(np.uint8)
    free = rng.random(8) < (0.35 if kind >= 0.3 else 0.1)
    mixed[free] = rng.integers(0, 256, (int(free.sum()), 3))
    return mixed


def _plain(hw: tuple[int, int], colors: Colors, *_: object) -> Image:
    return np.full((*hw, 3), colors[0], np.uint8)


def _gradient(hw: tuple[int, int], colors: Colors, *_: object) -> Image:
    corners = np.ascontiguousarray(colors[:4].reshape(2, 2, 3))
    return np.asarray(cv2.resize(corners, hw[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)


def _stripes(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    u, _ = _axes(hw, unit_px, rng)
    return _mapped(u, _profile(colors, rng))


def _tartan(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    """Two sets of stripes of uneven width that show through each other."""
    u, v = _axes(hw, 3 * unit_px, rng)
    profile = _profile(colors, rng)
    mixed = cv2.addWeighted(_mapped(u, profile), 0.5, _mapped(v, profile), 0.5, 0)
    return np.asarray(mixed, np.uint8)


def _bricks(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    u, v = _axes(hw, 1.5 * unit_px, rng)
    row = np.floor(v)
    u /= np.float32(rng.uniform(1.6, 3))
    u += row * np.float32(0.5)
    mortar = np.float32(rng.uniform(0.06, 0.2))
    inside = (v - row > mortar) & (u - np.floor(u) > mortar / 2)
    shade = (np.floor(u) * 3 + row * 5).astype(np.int32) % 3 + 1  # neighbours differ a little
    table = np.stack([colors[1], *(np.clip(colors[0].astype(int) + d, 0, 255) for d in (0, 12, -12))]).astype(np.uint8)
    return _colored((shade * inside).astype(np.uint8), table)


def _dots(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    """Polka dots."""
    u, v = _axes(hw, 2 * unit_px, rng)
    row = np.floor(v)
    u += row * np.float32(0.5)
    u -= np.floor(u) + np.float32(0.5)
    v = v - row - np.float32(0.5)
    inside = u * u + v * v < rng.uniform(0.03, 0.2)
    return _colored(inside.astype(np.uint8), colors)


def _wood(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    """Uneven rings around a point, or grain far away from it."""
    u, v = _axes(hw, unit_px, rng)
    u += np.float32(rng.normal(0, 6))
    v *= np.float32(rng.uniform(0.1, 1))
    radius = np.sqrt(u * u + v * v)
    radius += np.float32(rng.uniform(0, 0.5)) * np.sin(v * np.float32(rng.uniform(0.5, 2)))
    return _mapped(radius, _profile(colors[:3], rng))


def _waves(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    """Stripes that swing."""
    u, v = _axes(hw, unit_px, rng)
    u += np.float32(rng.uniform(0.3, 1.5)) * np.sin(v * np.float32(rng.uniform(0.5, 2)))
    return _mapped(u, _profile(colors, rng))


def _cells(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    """Voronoi cells, like paving or the skin of a giraffe; with or without joints."""
    count = int(np.clip(hw[0] * hw[1] / (4 * unit_px) ** 2, 3, 60))
    seeds = np.full(hw, 1, np.uint8)
    seeds[rng.integers(hw[0], size=count), rng.integers(hw[1], size=count)] = 0
    _, labels = cv2.distanceTransformWithLabels(seeds, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    ids = np.asarray(labels, np.uint8)
    cells = _colored(ids % np.uint8(6), colors)
    if rng.random() < 0.5:
        joints = cv2.morphologyEx(ids, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8))
        cells[np.asarray(joints) > 0] = colors[7]
    return cells


def _strokes(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    """Strokes of a broad brush over each other."""
    return _strewn(_plain(hw, colors), colors, (unit_px, rng.uniform(2, 6)), rng)


def _confetti(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    """Loose dots on a gradient."""
    return _strewn(_gradient(hw, colors), colors, (unit_px, 0.01), rng)


def _strewn(ground: Image, colors: Colors, form: tuple[float, float], rng: np.random.Generator) -> Image:
    """Thick short lines of (width in pixels, length over width), all in about one direction or in any."""
    width_px, slimness = form
    height, width = ground.shape[:2]
    count = int(np.clip(height * width / (width_px**2 * (1 + slimness)), 3, 45))
    starts = rng.uniform(-0.1, 1.1, (count, 2)) * (width, height)
    angles = rng.uniform(0, 2 * math.pi) + rng.normal(0, rng.choice([0.2, 2.0]), count)
    ends = starts + np.stack([np.cos(angles), np.sin(angles)], 1) * (width_px * slimness)
    lines = np.rint(np.stack([starts, ends], 1)).astype(np.int32)
    for pair, chosen in zip(lines, rng.integers(1, 8, count), strict=True):
        cv2.polylines(ground, [pair], False, colors[chosen].tolist(), max(1, round(width_px)))
    return ground


def _writing(hw: tuple[int, int], colors: Colors, unit_px: float, rng: np.random.Generator) -> Image:
    """Letters in rows, like a sign or a newspaper."""
    cell_px = max(2.5 * unit_px, math.sqrt(hw[0] * hw[1] / 30))
    page = np.zeros(hw, np.uint8)
    for y in np.arange(cell_px / 2, hw[0] + cell_px / 2, 1.2 * cell_px):
        for x in np.arange(cell_px / 2, hw[1] + cell_px / 2, cell_px):
            if rng.random() < 0.85:
                letter(page, np.array([x, y]), 0.3 * cell_px**2, rng, 1 + int(rng.random() < 0.2))
    return _colored(page, colors)


_TEXTURES: tuple[Callable[[tuple[int, int], Colors, float, np.random.Generator], Image], ...] = (
    _plain, _gradient, _stripes, _tartan, _bricks, _dots, _wood, _waves, _cells, _strokes, _confetti, _writing,
)  # fmt: skip


def _axes(hw: tuple[int, int], unit_px: float, rng: np.random.Generator) -> tuple[F32, F32]:
    """Two coordinates (h, w) across each other, in units, turned and shifted."""
    angle = rng.uniform(0, 2 * math.pi)
    cos, sin = np.float32(math.cos(angle) / unit_px), np.float32(math.sin(angle) / unit_px)
    y, x = np.arange(hw[0], dtype=np.float32)[:, None], np.arange(hw[1], dtype=np.float32)[None]
    du, dv = rng.uniform(0, 8, 2).astype(np.float32)
    return x * cos + (y * sin + du), y * cos - (x * sin - dv)


def _profile(colors: Colors, rng: np.random.Generator) -> Colors:
    """(256, 3), one period of stripes of uneven widths, with hard or smooth edges."""
    bands = int(rng.integers(2, 1 + min(5, len(colors))))
    edges = np.sort(rng.uniform(0, 256, bands - 1)) if bands > 2 else rng.uniform(64, 192, 1)
    which = np.searchsorted(edges, np.arange(256))
    profile: Colors = colors[which]
    if rng.random() < 0.4:
        ring = np.concatenate([profile[-48:], profile, profile[:48]])
        profile = np.asarray(cv2.blur(ring[:, None], (1, 61))[48:-48, 0], np.uint8)
    return profile


def _mapped(values: F32, profile: Colors) -> Image:
    """Colours of a profile at the fractions of values."""
    return _colored(((values - np.floor(values)) * np.float32(255.99)).astype(np.uint8), profile)


def _colored(indices: NDArray[np.uint8], colors: Colors) -> Image:
    table = np.zeros((256, 1, 3), np.uint8)
    table[: len(colors), 0] = colors
    return np.asarray(cv2.applyColorMap(indices, table), np.uint8)
