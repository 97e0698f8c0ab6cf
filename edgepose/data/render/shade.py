"""Light on a person: colours of the visible surface points from normals, materials, decals and neighbourhood shadow.

Invariant: light is summed in linear intensity and returned as display values in 0..1, BGR; the light's direction is in
screen axes (x right, y down, z away), so "from above" has a negative y.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.data.render import texture
from edgepose.data.render.body import Flesh, Outfit
from edgepose.data.render.raster import Cones, Surface, surface_points

F32 = NDArray[np.float32]
_GAMMA = np.float32(2.2)


@dataclass(frozen=True, slots=True)
class Light:
    """One lamp, a sky and a floor.

    Attributes:
        direction: (3,) float32 unit vector towards the lamp, screen axes.
        key: (3,) float32 BGR, linear intensity of the lamp.
        sky: (3,) float32 BGR, linear ambient light on upward normals.
        ground: (3,) float32 BGR, linear ambient light on downward normals.
        crevice: 0..1, how dark places behind nearer surfaces become.
    """

    direction: F32
    key: F32
    sky: F32
    ground: F32
    crevice: float


def sample_light(rng: np.random.Generator) -> Light:
    """Sunlight, overcast sky, hall lamps or a flash."""
    flash = rng.random() < 0.15
    direction = np.array([rng.normal(0, 0.6), -abs(rng.normal(0.7, 0.35)), -rng.normal(0.55, 0.5)])
    if flash:
        direction = np.array([rng.normal(0, 0.15), -0.15, -1.0])
    exposure = float(np.exp(rng.normal(0.0, 0.28)))
    hardness = float(rng.uniform(0.15, 0.85))
    warm = float(rng.normal(0.0, 0.08))
    tint = np.array([1.0 - warm, 1.0, 1.0 + warm], np.float32)
    ambient = exposure * (1.15 - hardness)
    return Light(
        direction=(direction / np.linalg.norm(direction)).astype(np.float32),
        key=np.float32(1.5 * exposure * hardness) * tint,
        sky=np.float32(ambient * 1.05) * tint[::-1],
        ground=np.float32(ambient * rng.uniform(0.35, 0.8)) * np.clip(texture.scene_color(rng) + 0.5, 0.5, 1.2),
        crevice=float(rng.uniform(0.3, 0.8)),
    )


@dataclass(frozen=True, slots=True)
class ScreenBody:
    """A projected body: one entry per part of flesh, in the same order.

    Attributes:
        cones: The parts in screen space.
        frames: (N, 3, 3) float32, the parts' own unit axes as columns, screen axes.
        origins: (N, 3) float32, where the coordinates of patterns and decals start, pixels.
        stature_px: Pixels per stature.
    """

    cones: Cones
    frames: F32
    origins: F32
    stature_px: float


def shade(
    flesh: Sequence[Flesh], outfit: Outfit, body: ScreenBody, surface: Surface, light: Light
) -> tuple[NDArray[np.intp], F32]:
    """Colours the visible pixels of a person.

    Args:
        flesh: The parts, for their materials.
        outfit: What the material indices mean.
        body: The same parts on the screen.
        surface: The z-buffer into which `body.cones` was drawn as parts 0 and up.
        light: Lighting.

    Returns:
        (P,) flat pixel indices and (P, 3) float32 BGR.
    """
    pixels, points, normals, along = surface_points(body.cones, surface)
    part = surface.part.ravel()[pixels].astype(np.intp)
    local = np.einsum("pji,pj->pi", body.frames[part], points - body.origins[part]) / np.float32(body.stature_px)
    material = _material_of(flesh, part, along)
    color = np.empty((pixels.size, 3), np.float32)
    gloss = np.zeros(pixels.size, np.float32)
    for index, item in enumerate(outfit.materials):
        chosen = np.flatnonzero(material == index)
        if not chosen.size:
            continue
        color[chosen] = texture.albedo(item, local[chosen])
        gloss[chosen] = item.gloss
        if item.wrinkle > 0.0:
            _fold(normals, chosen, local[chosen], part[chosen], item.wrinkle)
    for index, body_part in enumerate(flesh):
        if body_part.decal != "none":
            chosen = np.flatnonzero(part == index)
            paint = _paint_face if body_part.decal == "face" else _paint_bib
            paint(color, chosen, local[chosen], outfit)
    lit = _illuminate(color, normals, gloss, light)
    lit *= (1.0 - light.crevice * _crevices(surface, body.stature_px).ravel()[pixels])[:, None]
    return pixels, np.clip(lit, 0.0, 1.0) ** (1 / _GAMMA)


def _material_of(flesh: Sequence[Flesh], part: NDArray[np.intp], along: F32) -> NDArray[np.intp]:
    """Material index of each point, (P,), from its part and its s."""
    zones = max(len(item.zones) for item in flesh)
    bounds = np.full((len(flesh), zones), np.inf, np.float32)
    materials = np.zeros((len(flesh), zones), np.intp)
    for index, item in enumerate(flesh):
        for zone, (bound, material) in enumerate(item.zones):
            bounds[index, zone], materials[index, zone] = bound, material
        bounds[index, len(item.zones) - 1] = np.inf
    zone = (along[:, None] > bounds[part]).sum(axis=1)
    return np.asarray(materials[part, zone])


def _fold(normals: F32, chosen: NDArray[np.intp], local: F32, part: NDArray[np.intp], amplitude: float) -> None:
    """Tilts the normals of cloth by random slopes, in place; folds run differently on every part."""
    shift = part.astype(np.float32) * np.float32(0.37)
    along_x, along_y = texture.fold_slopes(local[:, 1] * 2.5 + shift, (local[:, 0] + local[:, 2]) * 2.5)
    tilted = normals[chosen]
    tilted[:, 0] += amplitude * along_x
    tilted[:, 1] += amplitude * along_y
    normals[chosen] = tilted / np.linalg.norm(tilted, axis=1, keepdims=True)


def _paint_face(color: F32, chosen: NDArray[np.intp], local: F32, outfit: Outfit) -> None:
    """Eyes, brows and mouth on the front of the head, in place; `local` starts at the middle of the skull."""
    x, y, front = np.abs(local[:, 0]), local[:, 1], local[:, 2] > 0.0
    hair = outfit.materials[outfit.hair].colors[0]
    eyes = front & (((x - 0.019) / 0.011) ** 2 + ((y + 0.016) / 0.0065) ** 2 < 1.0)
    brows = front & (np.abs(x - 0.020) < 0.013) & (np.abs(y + 0.001) < 0.0035)
    mouth = front & (x < 0.017) & (np.abs(y + 0.059) < 0.0045)
    color[chosen[eyes]] *= np.float32(0.3)
    color[chosen[brows]] = 0.5 * (color[chosen[brows]] + hair)
    color[chosen[mouth]] *= np.array([0.6, 0.55, 0.85], np.float32)


def _paint_bib(color: F32, chosen: NDArray[np.intp], local: F32, outfit: Outfit) -> None:
    """A race number on the chest, in place; `local` starts at the chest's upper end."""
    x, y = local[:, 0], local[:, 1]
    sheet = (local[:, 2] > 0.0) & (np.abs(x) < 0.062) & (y > -0.115) & (y < -0.025)
    color[chosen[sheet]] = outfit.bib_color
    digits = sheet & (np.abs(x) < 0.05) & (y > -0.095) & (y < -0.045)
    ink = texture.lookup(9, x * 3.0, y * 3.0) > 0.5
    color[chosen[digits & ink]] = np.float32(0.1)


def _illuminate(color: F32, normals: F32, gloss: F32, light: Light) -> F32:
    """Lambert's law, a hemisphere of ambient light and a Blinn highlight; linear BGR, (P, 3)."""
    facing = np.maximum(normals @ light.direction, 0.0)[:, None]
    upward = (0.5 - 0.5 * normals[:, 1])[:, None]
    halfway = light.direction + np.array([0.0, 0.0, -1.0], np.float32)
    halfway /= max(float(np.linalg.norm(halfway)), 1e-6)
    shine = gloss * np.maximum(normals @ halfway, 0.0) ** 24
    incoming = light.key * facing + light.sky * upward + light.ground * (1.0 - upward)
    return np.asarray(np.clip(color, 0.0, 1.0) ** _GAMMA * incoming + shine[:, None] * light.key, np.float32)


def _crevices(surface: Surface, stature_px: float) -> F32:
    """How far each pixel lies behind its neighbourhood, (H, W) float32 in 0..1 (depth darkening, Luft et al. 2006)."""
    covered = surface.part >= 0
    if not covered.any():
        return np.zeros(surface.depth.shape, np.float32)
    far = float(surface.depth[covered].max())
    depth = np.where(covered, surface.depth, np.float32(far))
    side = _odd(0.06 * stature_px)
    smooth = cv2.blur(cv2.blur(depth, (side, side)), (side, side))
    behind = (depth - smooth) / np.float32(0.06 * stature_px)
    return np.asarray(np.clip(behind, 0.0, 1.0), np.float32)


def _odd(value: float) -> int:
    return 2 * max(int(value / 2), 0) + 1
