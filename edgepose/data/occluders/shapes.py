"""Single outlines: rounded, angular, bitten, bent, and drawn with a thick pen.

Each draws its number into a canvas (h, w) uint8, at a centre and of about the wanted area in pixels; what falls outside
of the canvas is lost. None is one of the outlines of `edgepose.data.corrupt`.

Invariant: a shape changes only pixels that it covers, and sets them to its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import MappingProxyType

import cv2
import numpy as np
from numpy.typing import NDArray

Canvas = NDArray[np.uint8]
Points = NDArray[np.float64]
Shape = Callable[[Canvas, Points, float, np.random.Generator, int], None]

_SUBPIXEL = 4  # bits


def ellipse(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """Up to two and a half times as long as wide."""
    _round(canvas, center, (area_px2, math.exp(rng.uniform(-1, 1) * math.log(2.5))), rng.uniform(0, 180), number)


def disc(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """A hardly flattened disc: a cloud of slim ones would look like leaves."""
    _round(canvas, center, (area_px2, rng.uniform(1, 1.4)), rng.uniform(0, 180), number)


def rectangle(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """Along the axes of the canvas."""
    aspect = math.exp(rng.uniform(-0.8, 0.8))
    half = 0.5 * np.array([math.sqrt(area_px2 * aspect), math.sqrt(area_px2 / aspect)])
    cv2.rectangle(canvas, _pixel(center - half), _pixel(center + half), number, -1)


def polygon(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """Convex, of three to seven corners."""
    _fill(canvas, center + _convex(area_px2, rng), number)


def bitten(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """A polygon with a corner bent inwards beyond its middle, or two polygons grown together at an end."""
    corners = _convex(area_px2 * 1.4, rng)
    if rng.random() < 0.5:
        corner = int(rng.integers(len(corners)))
        middle = (corners[corner - 1] + corners[(corner + 1) % len(corners)]) / 2
        corners[corner] = middle + (middle - corners[corner]) * rng.uniform(0.1, 0.6)
        _fill(canvas, center + corners, number)
        return
    _fill(canvas, center + corners * 0.7, number)
    joint = center + corners[int(rng.integers(len(corners)))] * 0.6
    _fill(canvas, joint + _convex(area_px2 * 0.4, rng), number)


def ring(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """An elliptic ring, sometimes open."""
    band = rng.uniform(0.25, 0.7)  # of the radius of the pen's way
    open_deg = 0.0 if rng.random() < 0.6 else rng.uniform(30, 200)
    aspect = math.exp(rng.uniform(-0.4, 0.4))
    radius = math.sqrt(area_px2 / (2 * math.pi * band * (1 - open_deg / 360)))
    axes = max(1, round(radius * aspect)), max(1, round(radius / aspect))
    width = max(1, round(radius * band))
    cv2.ellipse(canvas, _pixel(center), axes, rng.uniform(0, 360), open_deg, 360, number, width)


def limb(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """Two bones with a joint between them, the second one slimmer."""
    slimness = rng.uniform(3, 6)
    length = math.sqrt(area_px2 / 2 * slimness)
    angle = rng.uniform(0, 2 * math.pi)
    bend = angle + rng.uniform(-2.2, 2.2)
    first = center - length * np.array([math.cos(angle), math.sin(angle)])
    last = center + length * np.array([math.cos(bend), math.sin(bend)])
    line(canvas, np.stack([first, center]), length / slimness * 1.15, number)
    line(canvas, np.stack([center, last]), length / slimness * 0.85, number)


def stick(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """A straight line."""
    _written(canvas, [np.array([[-1.0, 0], [1, 0]])], (center, area_px2, rng.uniform(3, 12)), rng, number)


def cross(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """Two lines that meet somewhere."""
    second = np.array([[0, -rng.uniform(0.2, 1)], [rng.uniform(-0.6, 0.6), rng.uniform(0.4, 1)]])
    second[:, 0] += rng.uniform(-0.7, 0.7)
    _written(canvas, [np.array([[-1.0, 0], [1, 0]]), second], (center, area_px2, rng.uniform(5, 16)), rng, number)


def bent(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """A thick arc or a zigzag."""
    if rng.random() < 0.5:
        turn = np.linspace(0, rng.uniform(1.2, 4.5), 16)
        way = np.stack([np.cos(turn), np.sin(turn)], 1)
    else:
        count = int(rng.integers(3, 7))
        way = np.stack([np.arange(count) - (count - 1) / 2, np.resize([-0.8, 0.8], count)], 1)
        way += rng.uniform(-0.35, 0.35, (count, 2))
    _written(canvas, [way - way.mean(axis=0)], (center, area_px2, rng.uniform(5, 14)), rng, number)


def letter(canvas: Canvas, center: Points, area_px2: float, rng: np.random.Generator, number: int) -> None:
    """A capital letter, condensed or wide, leaning, turned any way."""
    strokes = _LETTERS[_NAMES[int(rng.integers(len(_NAMES)))]]
    form = np.array([[rng.uniform(0.6, 1.1), 0], [rng.uniform(-0.3, 0.3), 1]])
    _written(canvas, [stroke @ form for stroke in strokes], (center, area_px2, rng.uniform(9, 18)), rng, number)


def line(canvas: Canvas, way: Points, width_px: float, number: int) -> None:
    """A line along (n, 2) points with round ends."""
    points = np.rint(way * (1 << _SUBPIXEL)).astype(np.int32)
    cv2.polylines(canvas, [points], False, number, max(1, round(width_px)), cv2.LINE_8, _SUBPIXEL)


SINGLE: tuple[Shape, ...] = (ellipse, polygon, rectangle, bitten, ring, limb, stick, cross, bent, letter)
"""Shapes that stand alone."""
SMALL: tuple[Shape, ...] = (disc, polygon, rectangle, ring, letter, bitten)
"""Shapes that come by the dozen."""


def _round(canvas: Canvas, center: Points, form: tuple[float, float], angle_deg: float, number: int) -> None:
    """An ellipse of (area, aspect)."""
    area_px2, aspect = form
    axes = 2 * math.sqrt(area_px2 * aspect / math.pi), 2 * math.sqrt(area_px2 / aspect / math.pi)
    cv2.ellipse(canvas, ((float(center[0]), float(center[1])), axes, angle_deg), number, -1)


def _convex(area_px2: float, rng: np.random.Generator) -> Points:
    """(n, 2) corners around the origin."""
    count = int(rng.integers(3, 8))
    turns = np.sort(rng.uniform(0, 0.6, count) + np.arange(count)) * (2 * math.pi / count)
    spokes = np.stack([np.cos(turns), np.sin(turns)], 1) * (math.exp(rng.uniform(-0.6, 0.6)), 1.0)
    x, y = spokes.T
    unit_px2 = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
    return math.sqrt(area_px2 / max(unit_px2, 1e-3)) * _turned(spokes, rng)


def _fill(canvas: Canvas, corners: Points, number: int) -> None:
    cv2.fillPoly(canvas, [np.rint(corners * (1 << _SUBPIXEL)).astype(np.int32)], number, cv2.LINE_8, _SUBPIXEL)


def _written(
    canvas: Canvas,
    strokes: Sequence[Points],
    size: tuple[Points, float, float],
    rng: np.random.Generator,
    number: int,
) -> None:
    """Strokes of any unit, drawn at `size`: centre, area in pixels, and length of all strokes over the pen's width."""
    center, area_px2, slimness = size
    length = sum(float(np.hypot(*np.diff(stroke, axis=0).T).sum()) for stroke in strokes)
    wanted_px = math.sqrt(area_px2 * slimness)
    turn = _rotation(rng) * (wanted_px / length)
    for stroke in strokes:
        line(canvas, center + stroke @ turn, wanted_px / slimness, number)


def _turned(points: Points, rng: np.random.Generator) -> Points:
    return np.asarray(points @ _rotation(rng), np.float64)


def _rotation(rng: np.random.Generator) -> Points:
    angle = rng.uniform(0, 2 * math.pi)
    return np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])


def _pixel(point: Points) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))


# Strokes of letters as ways over a grid of three by three points, numbered row by row from 0.
_WAYS = {
    "A": ("618", "35"), "B": ("06853", "3510"), "C": ("2068",), "D": ("0158760",), "E": ("2068", "35"),
    "F": ("206", "35"), "G": ("206854",), "H": ("06", "28", "35"), "J": ("2863",), "K": ("06", "238"), "L": ("068",),
    "M": ("60428",), "N": ("6082",), "P": ("60253",), "R": ("602538",), "S": ("203586",), "T": ("02", "17"),
    "U": ("0682",), "V": ("072",), "W": ("06482",), "X": ("08", "26"), "Y": ("04", "247"), "Z": ("0268",),
}  # fmt: skip
_LETTERS = MappingProxyType(
    {
        name: tuple(np.array([divmod(int(point), 3)[::-1] for point in way], np.float64) - 1 for way in ways)
        for name, ways in _WAYS.items()
    }
)
_NAMES = tuple(_LETTERS)
