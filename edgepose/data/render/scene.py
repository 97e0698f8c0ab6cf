"""Where the person is: cluttered backgrounds, things in front of people, and what a camera does to a picture.

Invariant: pictures are (H, W, 3) float32 BGR display values in 0..1; every function draws its randomness from the
generator it is given and draws the same amount for the same arguments and state.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.data.render import texture

F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]
Size = tuple[int, int]


def background(rng: np.random.Generator, size_hw: Size) -> F32:
    """A place: outdoors, a hall, a dark arena or abstract clutter, out of focus more or less."""
    kinds: tuple[Callable[[np.random.Generator, Size], F32], ...] = (_outdoors, _hall, _arena, _abstract)
    picture = kinds[int(rng.choice(len(kinds), p=[0.38, 0.24, 0.14, 0.24]))](rng, size_hw)
    for _ in range(int(rng.integers(0, 12))):
        _add_thing(rng, picture)
    # Nothing out there is perfectly even: fine and coarse unevenness over everything.
    for scale in ((0.2, 1.0), (1.0, 3.0)):
        picture *= 1.0 + np.float32(rng.uniform(0.0, 0.6)) * (texture.patch(rng, size_hw, scale)[:, :, None] - 0.5)
    sigma = float(rng.choice([0.0, 0.8, 1.6, 3.0], p=[0.5, 0.28, 0.14, 0.08])) * size_hw[0] / 192
    if sigma > 0.0:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma), np.float32)
    return np.clip(picture, 0.0, 1.0)


def textured(rng: np.random.Generator, size_hw: Size, contrast: float, scale: tuple[float, float] = (0.3, 3.0)) -> F32:
    """A random colour modulated by one or two random patterns, (H, W, 3)."""
    base, other = texture.scene_color(rng), texture.scene_color(rng)
    pattern = texture.patch(rng, size_hw, scale)
    if rng.random() < 0.5:
        pattern = 0.6 * pattern + 0.4 * texture.patch(rng, size_hw, scale)
    mixed = base + (other - base) * np.float32(contrast) * pattern[:, :, None]
    return np.asarray(mixed * (1.0 + np.float32(0.3 * contrast) * (pattern[:, :, None] - 0.5)), np.float32)


def _ramp(rng: np.random.Generator, size_hw: Size) -> F32:
    """A vertical gradient between two similar colours, (H, 1, 3)."""
    top = texture.scene_color(rng)
    bottom = np.clip(top + rng.normal(0, 0.15, 3), 0, 1).astype(np.float32)
    return top + (bottom - top) * np.linspace(0, 1, size_hw[0], dtype=np.float32)[:, None, None]


def _sky(rng: np.random.Generator, size_hw: Size) -> F32:
    blue = texture.bgr_from_hsv(float(rng.normal(0.58, 0.02)), float(rng.uniform(0.0, 0.6)), float(rng.uniform(0.6, 1)))
    clouds = texture.patch(rng, size_hw, (0.2, 1.0))[:, :, None] * np.float32(rng.uniform(0, 0.6))
    return blue + (np.float32(0.97) - blue) * clouds


def _outdoors(rng: np.random.Generator, size_hw: Size) -> F32:
    """Sky, something on the horizon, ground that gets finer with distance."""
    height, width = size_hw
    picture = np.ascontiguousarray(np.broadcast_to(_sky(rng, size_hw), (height, width, 3)))
    horizon = int(np.clip(rng.normal(0.5, 0.22), 0.02, 0.98) * height)
    band = int(rng.uniform(0.05, 0.6) * height)
    outline = texture.patch(rng, (1, width), (0.2, 1.5))[0]
    tops = horizon - band * (0.4 + 0.6 * outline)
    rows = np.arange(height, dtype=np.float32)[:, None]
    far = textured(rng, size_hw, 1.0)
    picture = np.where((rows > tops)[:, :, None], far, picture)
    ground = textured(rng, size_hw, float(rng.uniform(0.1, 0.9)), (0.8, 4.0))
    ground *= (0.8 + 0.3 * np.linspace(0, 1, height, dtype=np.float32))[:, None, None]
    picture = np.where((rows > horizon)[:, :, None], ground, picture)
    if rng.random() < 0.35:  # lanes of a track or a pitch
        for _ in range(int(rng.integers(1, 6))):
            foot = (float(rng.uniform(0, width)), float(height))
            line = _bar(size_hw, foot, float(rng.uniform(-1.4, 1.4)), 1.0, width)
            picture[line & (rows > horizon)] = np.float32(0.9)
    return picture


def _hall(rng: np.random.Generator, size_hw: Size) -> F32:
    """A wall with panels or bricks above a floor or mats."""
    height, _ = size_hw
    wall = _ramp(rng, size_hw) * (0.75 + 0.5 * texture.patch(rng, size_hw)[:, :, None])
    edge = int(np.clip(rng.normal(0.65, 0.2), 0.1, 1.0) * height)
    floor = _ramp(rng, size_hw) * (0.85 + 0.3 * texture.patch(rng, size_hw, (1.0, 4.0))[:, :, None])
    rows = np.arange(height)[:, None, None]
    picture = np.where(rows < edge, wall, floor).astype(np.float32)
    for _ in range(int(rng.integers(1, 6))):
        _add_rectangle(rng, picture, upright=True)
    return picture


def _arena(rng: np.random.Generator, size_hw: Size) -> F32:
    """Darkness with a crowd or lamps in it."""
    dark = textured(rng, size_hw, 0.6) * np.float32(rng.uniform(0.03, 0.3))
    crowd = np.stack([texture.patch(rng, size_hw, (1.0, 4.0)) for _ in range(3)], axis=2)
    picture = dark + crowd * np.float32(rng.uniform(0.0, 0.5)) * texture.patch(rng, size_hw, (0.2, 0.6))[:, :, None]
    for _ in range(int(rng.integers(0, 4))):
        _add_rectangle(rng, picture, upright=True)
    return picture


def _abstract(rng: np.random.Generator, size_hw: Size) -> F32:
    """Patches of unrelated textures."""
    picture = textured(rng, size_hw, 1.0)
    for _ in range(int(rng.integers(2, 5))):
        mask = texture.patch(rng, size_hw, (0.2, 0.8)) > float(rng.uniform(0.4, 0.8))
        picture[mask] = textured(rng, size_hw, float(rng.uniform(0.2, 1.0)))[mask]
    return picture


def _grid(size_hw: Size) -> tuple[F32, F32]:
    """Columns (1, W) and rows (H, 1) as float32."""
    return np.arange(size_hw[1], dtype=np.float32)[None], np.arange(size_hw[0], dtype=np.float32)[:, None]


def _bar(size_hw: Size, center_xy: tuple[float, float], angle: float, half_width: float, half_length: float) -> Mask:
    """A turned rectangle: pixels within the half sizes of its centre; `angle` 0 is upright."""
    x, y = _grid(size_hw)
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = x - np.float32(center_xy[0]), y - np.float32(center_xy[1])
    return np.asarray((np.abs(c * dx + s * dy) <= half_width) & (np.abs(c * dy - s * dx) <= half_length))


def _ellipse(size_hw: Size, center_xy: tuple[float, float], half_xy: tuple[float, float]) -> Mask:
    x, y = _grid(size_hw)
    return np.asarray(((x - center_xy[0]) / half_xy[0]) ** 2 + ((y - center_xy[1]) / half_xy[1]) ** 2 <= 1.0)


def _somewhere(rng: np.random.Generator, size_hw: Size) -> tuple[float, float]:
    return float(rng.uniform(0, size_hw[1])), float(rng.uniform(0, size_hw[0]))


def _fill(rng: np.random.Generator, picture: F32, mask: Mask) -> None:
    """Covers a region with a colour that is shaded from one side to the other, or with a texture; in place."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = (int(rows[-1] - rows[0] + 1), int(columns[-1] - columns[0] + 1))
    if rng.random() < 0.5:
        paint = textured(rng, size, float(rng.uniform(0.1, 1.0)))
    else:
        shading = 1.0 + float(rng.normal(0, 0.4)) * np.linspace(-0.5, 0.5, size[1], dtype=np.float32)
        paint = np.broadcast_to(texture.scene_color(rng) * shading[None, :, None], (*size, 3))
    np.copyto(picture[window], np.asarray(paint, np.float32), where=mask[window][:, :, None])


def _add_rectangle(rng: np.random.Generator, picture: F32, *, upright: bool) -> None:
    size = (picture.shape[0], picture.shape[1])
    angle = 0.0 if upright else float(rng.uniform(0, np.pi))
    half = np.exp(rng.uniform(np.log(0.02), np.log(0.3), 2)) * min(size)
    _fill(rng, picture, _bar(size, _somewhere(rng, size), angle, float(half[0]), float(half[1])))


def _add_thing(rng: np.random.Generator, picture: F32) -> None:
    """One box, pole, rail, ball or limb-like blob, in place."""
    size = (picture.shape[0], picture.shape[1])
    unit = min(size)
    kind = rng.random()
    if kind < 0.3:
        _add_rectangle(rng, picture, upright=bool(rng.random() < 0.6))
    elif kind < 0.6:
        angle = float(rng.choice([0.0, np.pi / 2])) + float(rng.normal(0, 0.1 if rng.random() < 0.6 else 1.0))
        half = float(np.exp(rng.uniform(np.log(0.004), np.log(0.03)))) * unit
        _fill(rng, picture, _bar(size, _somewhere(rng, size), angle, half, float(rng.uniform(0.1, 1.5)) * unit))
    elif kind < 0.8:
        half_xy = np.exp(rng.uniform(np.log(0.015), np.log(0.12), 2)) * unit
        _fill(rng, picture, _ellipse(size, _somewhere(rng, size), (float(half_xy[0]), float(half_xy[1]))))
    else:
        _add_bystander(rng, picture, unit)


def _add_bystander(rng: np.random.Generator, picture: F32, unit: int) -> None:
    """A far, blurry onlooker: legs, trunk and head, in place."""
    size = (picture.shape[0], picture.shape[1])
    x, y = _somewhere(rng, size)
    tall = float(rng.uniform(0.08, 0.3)) * unit
    colors = (texture.cloth_color(rng), texture.cloth_color(rng), texture.skin_color(rng))
    masks = (
        _bar(size, (x, y + 0.27 * tall), float(rng.normal(0, 0.1)), 0.09 * tall, 0.25 * tall),
        _bar(size, (x, y - 0.14 * tall), float(rng.normal(0, 0.1)), 0.13 * tall, 0.19 * tall),
        _ellipse(size, (x, y - 0.42 * tall), (0.06 * tall + 0.5, 0.08 * tall + 0.5)),
    )
    for color, mask in zip(colors, masks, strict=True):
        picture[mask] = color * np.float32(0.8)


def cast_shadow(rng: np.random.Generator, picture: F32, person: Mask) -> None:
    """Darkens the ground, or the wall behind, with a sheared and blurred copy of the silhouette; in place."""
    height, width = person.shape
    rows = np.flatnonzero(person.any(axis=1))
    if not rows.size:
        return
    feet = float(rows[-1])
    squash, lean = float(rng.uniform(0.12, 0.5)), float(rng.normal(0, 0.7))
    if rng.random() < 0.25:  # on a wall: the shape itself, beside the person
        squash, lean = 1.0, 0.0
        feet += float(rng.uniform(-0.06, 0.06)) * height
    shift = float(rng.normal(0, 0.06)) * width if squash == 1.0 else 0.0
    matrix = np.array([[1.0, lean, shift - lean * feet], [0.0, squash, feet * (1.0 - squash)]])
    shadow = cv2.warpAffine(person.astype(np.float32), matrix, (width, height))
    shadow = np.asarray(cv2.GaussianBlur(shadow, (0, 0), float(rng.uniform(1.0, 5.0)) * height / 192), np.float32)
    picture *= 1.0 - np.float32(rng.uniform(0.1, 0.6)) * shadow[:, :, None]


def occluder_mask(rng: np.random.Generator, size_hw: Size, center_xy: tuple[float, float], unit_px: float) -> Mask:
    """The outline of something in front of the person, near `center_xy`.

    Args:
        rng: Source of randomness.
        size_hw: Size of the picture.
        center_xy: A point it should cover or come near.
        unit_px: The person's stature.
    """
    x, y = center_xy[0] + float(rng.normal(0, 0.04)) * unit_px, center_xy[1] + float(rng.normal(0, 0.04)) * unit_px
    kind = rng.random()
    if kind < 0.35:  # pole, rail or beam across the picture
        angle = float(rng.choice([0.0, np.pi / 2])) + float(rng.normal(0, 0.25))
        return _bar(size_hw, (x, y), angle, float(rng.uniform(0.008, 0.05)) * unit_px, 3.0 * max(size_hw))
    if kind < 0.65:  # box
        half = rng.uniform(0.04, 0.16, 2) * unit_px
        return _bar(size_hw, (x, y), float(rng.normal(0, 0.3)), float(half[0]), float(half[1]))
    if kind < 0.85:  # ball, head of a spectator
        half = rng.uniform(0.04, 0.13, 2) * unit_px
        return _ellipse(size_hw, (x, y), (float(half[0]), float(half[1])))
    return np.asarray(np.broadcast_to(_grid(size_hw)[1] > y, size_hw))  # mat, hedge or wall that hides all below


def paint_occluder(rng: np.random.Generator, picture: F32, mask: Mask) -> None:
    """Draws an occluder into the picture, in place."""
    _fill(rng, picture, mask)


def photograph(rng: np.random.Generator, picture: F32) -> NDArray[np.uint8]:
    """Lens, sensor and file: blur, lost resolution, exposure, tint, vignette, noise; (H, W, 3) uint8 BGR."""
    height, width = picture.shape[:2]
    picture = _soften(rng, picture)
    gain = np.exp(rng.normal(0.0, 0.12)) * rng.normal(1.0, 0.035, 3)
    contrast = float(rng.normal(1.22, 0.18))
    colorful = 0.0 if rng.random() < 0.05 else float(np.clip(rng.normal(0.8, 0.2), 0.2, 1.3))
    # Tint, then saturation about grey, then contrast about 0.45, all of them one matrix.
    matrix = np.diag(gain) @ (colorful * np.eye(3) + (1.0 - colorful) / 3.0) * contrast
    offset = np.float32(0.45 - 0.45 * contrast + rng.normal(0, 0.03))
    picture = (picture.reshape(-1, 3) @ matrix.astype(np.float32) + offset).reshape(height, width, 3)
    if rng.random() < 0.25:  # corners fall off
        x, y = _grid((height, width))
        radius2 = ((x / width - 0.5) ** 2 + (y / height - 0.5) ** 2) * 2.0
        picture *= (1.0 - np.float32(rng.uniform(0.1, 0.6)) * radius2)[:, :, None]
    grain = rng.standard_normal((height, width, 1), np.float32) * np.float32(rng.gamma(1.2, 0.006))
    chroma = cv2.resize(rng.standard_normal((height // 4 + 1, width // 4 + 1, 3), np.float32), (width, height))
    picture = picture + grain + chroma * np.float32(rng.gamma(1.2, 0.003))
    return np.asarray(np.clip(picture * 255.0 + 0.5, 0, 255), np.uint8)


def _soften(rng: np.random.Generator, picture: F32) -> F32:
    """Antialiasing blur, motion blur at times, and a detour through a lower resolution as small photographs have it."""
    height, width = picture.shape[:2]
    picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), float(rng.uniform(0.45, 0.75))), np.float32)
    if rng.random() < 0.12:
        length = float(rng.uniform(1.5, 6.0)) * height / 192
        angle = float(rng.uniform(0, np.pi))
        kernel = _bar((15, 15), (7.0, 7.0), angle, 0.6, length / 2 + 0.3).astype(np.float32)
        picture = np.asarray(cv2.filter2D(picture, -1, kernel / kernel.sum()), np.float32)
    if rng.random() < 0.4:
        share = float(rng.uniform(0.5, 1.0))
        smaller = (max(int(width * share), 8), max(int(height * share), 8))
        small = cv2.resize(picture, smaller, interpolation=cv2.INTER_AREA)
        picture = np.asarray(cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    if rng.random() < 0.65:  # cameras sharpen
        smooth = cv2.GaussianBlur(picture, (0, 0), 1.2)
        picture = picture + np.float32(rng.uniform(0.4, 2.0)) * (picture - smooth)
    return picture
