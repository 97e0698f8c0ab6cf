"""Procedural textures and colours: a bank of tileable grey patterns, palettes of skin, hair, cloth and surroundings.

Invariant: patterns are float32 in 0..1, colours are float32 BGR in 0..1 (display values, not linear light), and all
randomness comes from the generator that is passed in; a bank is a function of its seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
MaterialKind = Literal["plain", "noise", "stripes", "checks", "gradient", "panels", "fine"]

BANK_SIZE = 256
DEFAULT_BANK = 20_000
_BANKS_KEPT = 2  # five megabytes each
_SKIN_BGR = np.array(
    [
        (0.72, 0.80, 0.96),
        (0.60, 0.72, 0.92),
        (0.52, 0.65, 0.87),
        (0.42, 0.56, 0.80),
        (0.33, 0.46, 0.69),
        (0.25, 0.36, 0.56),
        (0.17, 0.26, 0.42),
        (0.12, 0.18, 0.30),
    ],
    np.float32,
)
_HAIR_BGR = np.array(
    [
        (0.06, 0.06, 0.07),
        (0.08, 0.10, 0.14),
        (0.11, 0.17, 0.26),
        (0.20, 0.32, 0.46),
        (0.42, 0.62, 0.78),
        (0.16, 0.26, 0.52),
        (0.62, 0.63, 0.64),
    ],
    np.float32,
)
_HAIR_SHARE = np.array([0.27, 0.25, 0.2, 0.11, 0.09, 0.04, 0.04])


@dataclass(frozen=True, slots=True)
class Material:
    """How a patch of the body is coloured.

    Attributes:
        kind: Pattern.
        colors: (3, 3) float32 BGR.
        direction: (3,) float32 unit vector in the part's own axes along which the pattern varies.
        frequency: Repeats per stature.
        phase: Offset of the pattern, repeats.
        layer: Which texture of the bank it uses.
        wrinkle: Amplitude of folds, relative to the brightness.
        gloss: Strength of the highlight.
    """

    kind: MaterialKind
    colors: F32
    direction: F32
    frequency: float
    phase: float
    layer: int
    wrinkle: float
    gloss: float


def _filtered_noise(rng: np.random.Generator, exponent: float, stretch: float = 1.0) -> F32:
    """Tileable noise whose amplitude falls with frequency^-exponent, histogram-equalised to 0..1."""
    fy = np.fft.fftfreq(BANK_SIZE)[:, None] * stretch
    fx = np.fft.fftfreq(BANK_SIZE)[None]
    radius = np.maximum(np.hypot(fx, fy), 1.0 / BANK_SIZE)
    phases = np.fft.fft2(rng.standard_normal((BANK_SIZE, BANK_SIZE)))
    values = np.fft.ifft2(phases * radius**-exponent).real
    ranks = np.argsort(np.argsort(values, axis=None)).reshape(values.shape)
    return (ranks / (values.size - 1)).astype(np.float32)


def _cells(rng: np.random.Generator, count: int) -> tuple[F32, F32]:
    """Tileable Voronoi cells: one random value per cell, and the distance to the nearest seed scaled to 0..1."""
    axis = np.arange(BANK_SIZE, dtype=np.float32)
    closest = np.full((BANK_SIZE, BANK_SIZE), np.inf, np.float32)
    values = np.zeros_like(closest)
    for row, column, value in rng.random((count, 3)).astype(np.float32):
        gaps = [np.abs(axis - place * BANK_SIZE) for place in (row, column)]
        down, across = (np.minimum(gap, BANK_SIZE - gap) ** 2 for gap in gaps)
        distance = down[:, None] + across[None, :]
        np.copyto(values, value, where=distance < closest)
        np.minimum(closest, distance, out=closest)
    depth = np.sqrt(closest)
    return values, depth / depth.max()


def _bricks(rng: np.random.Generator) -> F32:
    rows, columns = np.indices((BANK_SIZE, BANK_SIZE))
    course = rows // 16
    shifted = columns + (course % 2) * 16
    mortar = (rows % 16 < 2) | (shifted % 32 < 2)
    shade = rng.random((17, 17)).astype(np.float32)[course % 16, (shifted // 32) % 8]
    return np.where(mortar, np.float32(0.0), 0.4 + 0.6 * shade).astype(np.float32)


_chosen_bank: ContextVar[int] = ContextVar("_chosen_bank", default=DEFAULT_BANK)


@contextmanager
def bank_of(seed: int) -> Iterator[None]:
    """Everything in this block is textured from the bank of this seed."""
    token = _chosen_bank.set(seed)
    try:
        yield
    finally:
        _chosen_bank.reset(token)


def bank() -> F32:
    """Tileable patterns, (T, 256, 256) float32 in 0..1."""
    return _bank(_chosen_bank.get())


@lru_cache(_BANKS_KEPT)
def _bank(seed: int) -> F32:
    rng = np.random.default_rng(seed)
    layers = [_filtered_noise(rng, exponent) for exponent in (0.6, 1.0, 1.4, 1.8, 2.2, 2.6)]
    layers += [_filtered_noise(rng, 1.2, stretch) for stretch in (6.0, 0.15)]
    ridged = 1.0 - np.abs(2.0 * _filtered_noise(rng, 1.6) - 1.0)
    layers += [ridged, (_filtered_noise(rng, 1.5) > 0.5).astype(np.float32)]
    for count in (40, 160, 500):
        layers += list(_cells(rng, count))
    layers.append(_bricks(rng))
    stacked = np.stack(layers).astype(np.float32)
    stacked.flags.writeable = False
    return stacked


@lru_cache(_BANKS_KEPT)
def _bank_bytes(seed: int) -> NDArray[np.uint8]:
    """A bank in 8 bits: OpenCV warps bytes three times as fast as floats."""
    return np.asarray(np.rint(_bank(seed) * 255.0), np.uint8)


@lru_cache(_BANKS_KEPT)
def _folds(seed: int) -> tuple[F32, F32]:
    """Slopes of smooth noise, each (256, 256) float32 of unit deviation: they tilt normals into folds of cloth."""
    height = _bank(seed)[4]
    slopes = [np.asarray(np.roll(height, -2, axis) - np.roll(height, 2, axis), np.float32) for axis in (0, 1)]
    return slopes[0] / slopes[0].std(), slopes[1] / slopes[1].std()


def lookup(layer: int, x: F32, y: F32) -> F32:
    """Nearest texel of a bank texture at tile coordinates (any real; 1 is a whole tile), same shape as `x`."""
    texels: F32 = bank()[layer][_texel(y), _texel(x)]
    return texels


def fold_slopes(x: F32, y: F32) -> tuple[F32, F32]:
    """Slopes of cloth folds at tile coordinates, each like `x`, of unit deviation."""
    first, second = _folds(_chosen_bank.get())
    rows, columns = _texel(y), _texel(x)
    return np.asarray(first[rows, columns]), np.asarray(second[rows, columns])


def _texel(coordinate: F32) -> NDArray[np.intp]:
    return np.floor(coordinate * BANK_SIZE).astype(np.intp) & (BANK_SIZE - 1)


def patch(rng: np.random.Generator, size_hw: tuple[int, int], scale: tuple[float, float] = (0.3, 3.0)) -> F32:
    """A random, randomly turned and scaled piece of a random pattern, (H, W) float32 in 0..1.

    Args:
        rng: Source of randomness.
        size_hw: Size of the piece.
        scale: Range of texels per pixel (log-uniform).
    """
    texels = float(np.exp(rng.uniform(*np.log(scale))))
    angle = float(rng.uniform(0, 2 * np.pi)) if rng.random() < 0.5 else float(rng.normal(0, 0.06))
    c, s = texels * np.cos(angle), texels * np.sin(angle)
    matrix = np.array([[c, -s, rng.uniform(0, BANK_SIZE)], [s, c, rng.uniform(0, BANK_SIZE)]])
    patterns = _bank_bytes(_chosen_bank.get())
    source = patterns[int(rng.integers(len(patterns)))]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    size = (size_hw[1], size_hw[0])
    warped = cv2.warpAffine(source, matrix, size, flags=flags, borderMode=cv2.BORDER_WRAP)
    return np.asarray(warped * np.float32(1 / 255), np.float32)


def bgr_from_hsv(hue: float, saturation: float, value: float) -> F32:
    """Hue, saturation and value in 0..1 to (3,) BGR."""
    wheel = [(offset + hue * 6.0) % 6.0 for offset in (1.0, 3.0, 5.0)]
    return np.array([value - value * saturation * max(0.0, min(k, 4.0 - k, 1.0)) for k in wheel], np.float32)


def skin_color(rng: np.random.Generator) -> F32:
    """A skin tone, (3,) BGR."""
    place = float(np.clip(rng.beta(1.1, 1.8), 0, 0.999)) * (len(_SKIN_BGR) - 1)
    below = int(place)
    tone = _SKIN_BGR[below] + (place - below) * (_SKIN_BGR[below + 1] - _SKIN_BGR[below])
    return np.asarray(np.clip(tone * rng.normal(1.0, 0.04, 3), 0.03, 1.0), np.float32)


def hair_color(rng: np.random.Generator) -> F32:
    """A hair colour, (3,) BGR."""
    color = _HAIR_BGR[int(rng.choice(len(_HAIR_BGR), p=_HAIR_SHARE))]
    return np.asarray(np.clip(color * rng.uniform(0.7, 1.35) * rng.normal(1.0, 0.05, 3), 0.01, 1.0), np.float32)


def cloth_color(rng: np.random.Generator) -> F32:
    """A colour of sportswear, (3,) BGR: half of it is black, white, grey or navy."""
    kind = rng.random()
    if kind < 0.2:
        return bgr_from_hsv(float(rng.random()), 0.1, float(rng.uniform(0.03, 0.16)))
    if kind < 0.38:
        return bgr_from_hsv(float(rng.random()), 0.04, float(rng.uniform(0.8, 1.0)))
    if kind < 0.48:
        return bgr_from_hsv(float(rng.random()), 0.08, float(rng.uniform(0.2, 0.7)))
    if kind < 0.56:
        return bgr_from_hsv(float(rng.normal(0.62, 0.02)), float(rng.uniform(0.4, 0.9)), float(rng.uniform(0.15, 0.4)))
    if kind < 0.70:
        return bgr_from_hsv(float(rng.normal(0.99, 0.02)), float(rng.uniform(0.7, 1.0)), float(rng.uniform(0.5, 0.95)))
    return bgr_from_hsv(float(rng.random()), float(rng.uniform(0.3, 1.0)), float(rng.uniform(0.25, 1.0)))


def scene_color(rng: np.random.Generator) -> F32:
    """A colour of surroundings, (3,) BGR: mostly muted, sometimes a banner's."""
    if rng.random() < 0.12:
        banner = float(rng.choice([0.0, 0.08, 0.15, 0.35, 0.6]))
        return bgr_from_hsv(banner, float(rng.uniform(0.5, 1.0)), float(rng.uniform(0.3, 0.9)))
    # Greens, browns and blues are more common out there than magenta.
    hue = float(rng.choice([0.07, 0.1, 0.14, 0.25, 0.33, 0.58, 0.62, 0.02])) + float(rng.normal(0, 0.03))
    return bgr_from_hsv(hue, float(rng.beta(1.2, 3.5)), float(rng.uniform(0.04, 0.98)))


def cloth(rng: np.random.Generator, wrinkle: float) -> Material:
    """A random fabric; `wrinkle` is the amplitude of its folds."""
    kinds: tuple[MaterialKind, ...] = ("plain", "noise", "stripes", "checks", "gradient", "panels", "fine")
    kind = kinds[int(rng.choice(len(kinds), p=[0.45, 0.07, 0.12, 0.04, 0.07, 0.17, 0.08]))]
    colors = np.stack([cloth_color(rng) for _ in range(3)])
    if kind == "fine":  # a weave: nearly one colour
        colors[1:] = np.clip(colors[0] * rng.uniform(0.6, 1.5, (2, 1)), 0, 1)
    axis = rng.normal(0, 0.15, 3)
    axis[int(rng.choice(3, p=[0.4, 0.45, 0.15]))] += 1.0
    frequency = {"stripes": rng.uniform(8, 40), "checks": rng.uniform(10, 40), "fine": rng.uniform(6, 14)}.get(
        kind, rng.uniform(1.0, 4.0)
    )
    return Material(
        kind=kind,
        colors=colors,
        direction=(axis / np.linalg.norm(axis)).astype(np.float32),
        frequency=float(frequency),
        phase=float(rng.random()),
        layer=int(rng.choice([0, 1, 2, 3, 9, 10])),
        wrinkle=wrinkle * float(rng.uniform(0.4, 1.6)),
        gloss=float(rng.choice([0.0, 0.05, 0.35], p=[0.6, 0.25, 0.15])),
    )


def plain(color: F32, *, wrinkle: float = 0.0, gloss: float = 0.05, layer: int = 2, variation: float = 0.1) -> Material:
    """One colour, gently blotched by bank texture `layer` with relative amplitude `variation`."""
    colors = np.stack([color, np.clip(color * (1 - variation), 0, 1), np.clip(color * (1 + variation), 0, 1)])
    up = np.array([0.0, 1.0, 0.0], np.float32)
    return Material("noise", colors.astype(np.float32), up, 3.0, 0.0, layer, wrinkle, gloss)


def albedo(material: Material, local: F32) -> F32:
    """Colour of surface points.

    Args:
        material: What they are made of.
        local: (P, 3) float32 in the part's own axes, statures.

    Returns:
        (P, 3) float32 BGR.
    """
    first, second, third = material.colors
    across = local @ material.direction * np.float32(material.frequency) + np.float32(material.phase)
    match material.kind:
        case "plain":
            mixed = np.broadcast_to(first, local.shape)
        case "noise" | "fine":
            scale = np.float32(material.frequency)
            pattern = lookup(material.layer, local[:, 0] * scale + material.phase, local[:, 1] * scale + local[:, 2])
            to_second, to_third = np.maximum(1 - 2 * pattern, 0), np.maximum(2 * pattern - 1, 0)
            mixed = first + np.outer(to_second, second - first) + np.outer(to_third, third - first)
        case "stripes":
            mixed = np.where((across % 1.0 < 0.5)[:, None], first, second)
        case "checks":
            other = local[:, (int(np.abs(material.direction).argmax()) + 1) % 3] * np.float32(material.frequency)
            mixed = np.where(((across % 1.0 < 0.5) ^ (other % 1.0 < 0.5))[:, None], first, second)
        case "gradient":
            mixed = first + np.outer(np.clip(across + 0.5, 0, 1), second - first)
        case "panels":
            mixed = material.colors[np.floor(across).astype(np.intp) % 3]
    return np.asarray(mixed, np.float32)
