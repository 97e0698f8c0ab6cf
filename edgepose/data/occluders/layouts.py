"""How occluders are laid out: one thing, clutter of many, tangles of strings, walls that hide all to one side, veils.

A layout draws its pieces into a canvas (h, w) uint8 that is 0 elsewhere, numbered from 1, so that each piece can have a
colour of its own.

Invariant: at most `MOST` pieces (a veil counts as one), of about the wanted area together where none overlap or fall
outside of the canvas.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from edgepose.data.occluders.shapes import SINGLE, SMALL, Canvas, Points, line

MOST = 40
_THINNEST_PX = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Place:
    """Where things go, and how large they are together; pixels of the canvas.

    Attributes:
        center: (2,) float64.
        area_px2: Of all pieces together.
        around_xyxy: (4,) float64, the person's surroundings.
    """

    center: Points
    area_px2: float
    around_xyxy: Points

    @property
    def size(self) -> Points:
        """(2,) width and height of the surroundings."""
        return self.around_xyxy[2:] - self.around_xyxy[:2]

    @property
    def side_px(self) -> float:
        """Side of a square as large as the surroundings."""
        return math.sqrt(float(np.prod(self.size)))


def single(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    """One thing."""
    SINGLE[rng.integers(len(SINGLE))](canvas, place.center, place.area_px2, rng, 1)


def clutter(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    """Three to `MOST` small things of one or several kinds: in a heap, in a row, or all over the person."""
    count = round(math.exp(rng.uniform(math.log(3), math.log(MOST))))
    sizes = rng.gamma(rng.choice([2.0, 8.0]), 1.0, count)
    sizes *= place.area_px2 / sizes.sum()
    kinds = rng.permutation(len(SMALL))[: 1 if rng.random() < 0.6 else 3]
    way = rng.random()
    if way < 0.4:
        centers = place.center + rng.normal(0, rng.uniform(0.08, 0.25) * place.side_px, (count, 2))
    elif way < 0.65:
        angle, reach_px = rng.uniform(0, math.pi), rng.uniform(0.3, 0.8) * place.side_px
        along = rng.uniform(-reach_px, reach_px, (count, 1)) * np.array([[math.cos(angle), math.sin(angle)]])
        centers = place.center + along + rng.normal(0, 0.05 * place.side_px, (count, 2))
    else:
        centers = place.around_xyxy[:2] + rng.uniform(0, 1, (count, 2)) * place.size
    for number in range(count):
        shape = SMALL[kinds[rng.integers(len(kinds))]]
        shape(canvas, centers[number], max(4.0, float(sizes[number])), rng, number + 1)


def tangle(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    """Strings that wander, coil, or spread like ripples: always curved, for bars are for tests."""
    side_px, kind = place.side_px, rng.random()
    count = int(rng.integers(1, 8))
    lengths_px = rng.uniform(0.5, 2.5, count) * side_px
    lengths_px *= min(1.0, place.area_px2 / (_THINNEST_PX * float(lengths_px.sum())))
    width_px = min(place.area_px2 / float(lengths_px.sum()), 0.16 * side_px)
    hub = place.center + rng.normal(0, 0.5 * side_px, 2)
    for number, length_px in enumerate(lengths_px.tolist()):
        start = place.center + rng.normal(0, 0.2 * side_px, 2)
        if kind < 0.5:
            way = _wandering(start, length_px, rng)
        elif kind < 0.75:
            way = _coil(start, length_px, rng)
        else:
            way = _ripple(hub, start, length_px, rng)
        line(canvas, way, width_px * rng.uniform(0.7, 1.3), number + 1)


def _wandering(start: Points, length_px: float, rng: np.random.Generator) -> Points:
    steps = 28
    heading = rng.uniform(0, 2 * math.pi) + np.cumsum(np.cumsum(rng.normal(0, 0.13, steps)) + rng.normal(0, 0.2, steps))
    way = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], 1), axis=0) * (length_px / steps)
    return np.asarray(start + way - way[steps // 2], np.float64)


def _coil(start: Points, length_px: float, rng: np.random.Generator) -> Points:
    turns = rng.uniform(1.5, 5)
    phase = np.linspace(0, 2 * math.pi * turns, round(12 * turns))
    radius_px = length_px / (2 * math.pi * turns)
    drift = np.linspace(-0.5, 0.5, len(phase))[:, None] * rng.normal(0, 0.5 * length_px, 2)
    return np.asarray(start + drift + radius_px * np.stack([np.cos(phase), np.sin(phase)], 1), np.float64)


def _ripple(hub: Points, start: Points, length_px: float, rng: np.random.Generator) -> Points:
    """Part of a circle around `hub` through `start`."""
    away = start - hub
    radius_px = max(2.0, float(np.hypot(*away)))
    half = min(math.pi, length_px / radius_px / 2)
    phase = math.atan2(away[1], away[0]) + np.linspace(-half, half, 24) + rng.normal(0, 0.2)
    return np.asarray(hub + radius_px * np.stack([np.cos(phase), np.sin(phase)], 1), np.float64)


_GRID = (np.stack(np.meshgrid(np.arange(8), np.arange(8)), axis=-1).reshape(-1, 2) + 0.5) / 8


def wall(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    """All to one side of an edge across the person: straight, round, hollow, or ragged."""
    angle = rng.uniform(0, 2 * math.pi)
    if rng.random() < 0.5:
        angle = round(angle / (math.pi / 2)) * math.pi / 2 + rng.normal(0, 0.1)
    out = np.array([math.cos(angle), math.sin(angle)])  # into the wall
    grid = place.around_xyxy[:2] + _GRID * place.size
    behind = np.sort(grid @ out)[round(max(0.0, 1 - place.area_px2 / place.side_px**2) * (len(grid) - 1))]
    middle = place.around_xyxy.reshape(2, 2).mean(axis=0)
    foot = middle + out * (behind - middle @ out)
    kind, far_px = rng.random(), 2.0 * sum(canvas.shape)
    if kind < 0.4:
        bend_px = rng.uniform(0.7, 3) * place.side_px
        hollow = kind < 0.2
        hub = foot + out * (-bend_px if hollow else bend_px)
        if hollow:
            canvas[:] = 1
        cv2.circle(canvas, (round(hub[0]), round(hub[1])), round(bend_px), 0 if hollow else 1, -1)
        return
    along = np.array([-out[1], out[0]])
    count = 2 if kind < 0.75 else int(rng.integers(5, 40))
    edge = np.linspace(-0.5, 0.5, count)[:, None] * along * far_px
    if count > 2:
        teeth = rng.normal(0, rng.uniform(0.02, 0.06) * place.side_px, count)
        edge = edge * (3 * place.side_px / far_px) + teeth[:, None] * out
        edge[[0, -1]] += np.array([[-0.5], [0.5]]) * along * far_px
    corners = np.concatenate([foot + edge, foot + edge[[-1, 0]] + out * far_px])
    cv2.fillPoly(canvas, [np.rint(corners).astype(np.int32)], 1)


def veil(canvas: Canvas, place: Place, rng: np.random.Generator) -> None:
    """What is above a height of rolling hills, or near one: patches, or bands that join, of any size: camouflage."""
    cell_px = max(3.0, place.side_px) * math.exp(rng.uniform(math.log(0.12), math.log(0.9)))
    hills = _hills(canvas, cell_px, rng) + 0.5 * _hills(canvas, max(3.0, cell_px / 2.3), rng)
    if rng.random() < 0.4:
        hills = -np.abs(hills)
    x1, y1, x2, y2 = np.rint(place.around_xyxy).astype(int).tolist()
    part = slice(max(y1, 0), y2 + 1), slice(max(x1, 0), x2 + 1)
    share = min(0.95, place.area_px2 / max(1.0, place.side_px**2))
    if hills[part].size:
        canvas[part] = hills[part] > np.quantile(hills[part], 1 - share)


def _hills(canvas: Canvas, cell_px: float, rng: np.random.Generator) -> Points:
    """(h, w) heights, smooth within about `cell_px`."""
    cells = [max(2, math.ceil(side_px / cell_px)) + 2 for side_px in canvas.shape]
    return np.asarray(cv2.resize(rng.normal(0, 1, cells), canvas.shape[::-1], interpolation=cv2.INTER_CUBIC))
