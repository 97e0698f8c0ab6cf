"""Fillings from photographs: limbs of other people, pieces of other pictures, and the scene's own background.

Invariant: photographs are only read; a piece is as large as the part of the canvas that something is drawn on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.data.occluders.shapes import Canvas, Points, line
from edgepose.data.patch import Patch

Image = NDArray[np.uint8]

_EDGE_PX = 6  # room for a blurred edge


@dataclass(frozen=True, slots=True)
class Donors:
    """Where pieces of other photographs come from.

    Attributes:
        patches: Training people.
        skeleton: Pairs of joints between which there is a limb.
    """

    patches: Sequence[Patch]
    skeleton: tuple[tuple[int, int], ...]


def window(canvas: Canvas) -> tuple[slice, slice]:
    """Rows and columns around all that is drawn, with room for a blurred edge; empty where nothing is."""
    x, y, width, height = cv2.boundingRect(canvas)
    if not width or not height:
        return slice(0, 0), slice(0, 0)
    return (
        slice(max(y - _EDGE_PX, 0), min(y + height + _EDGE_PX, canvas.shape[0])),
        slice(max(x - _EDGE_PX, 0), min(x + width + _EDGE_PX, canvas.shape[1])),
    )


def limbs(canvas: Canvas, center: Points, area_px2: float, donors: Donors, rng: np.random.Generator) -> Image:
    """Draw the outline of one or several connected limbs of somebody else, and fetch what fills it."""
    donor = donors.patches[int(rng.integers(len(donors.patches)))]
    joints, labelled = donor.keypoints[:, :2].astype(np.float64), donor.keypoints[:, 2] > 0
    bones = _connected([(a, b) for a, b in donors.skeleton if labelled[a] and labelled[b]], rng)
    if not bones:
        joint = int(rng.choice(np.flatnonzero(labelled))) if labelled.any() else 0
        bones = [(joint, joint)]
    ends = joints[np.array(bones)]  # (limbs, 2, 2)
    lengths = np.hypot(*(ends[:, 1] - ends[:, 0]).T)
    side_px = math.sqrt(float(np.prod(donor.box_xyxy[2:] - donor.box_xyxy[:2])))
    widths = np.maximum(lengths * rng.uniform(0.4, 0.9), max(0.12 * side_px, 2.0))
    if len(bones) > 1:
        widths = np.minimum(widths, 0.2 * side_px + 2)
    zoom = math.sqrt(area_px2 / float((widths * lengths + math.pi * widths**2 / 4).sum()))
    view = _placed(ends.mean(axis=(0, 1)), center, zoom, rng)
    for way, width in zip(ends @ view[:, :2].T + view[:, 2], (widths * zoom).tolist(), strict=True):
        line(canvas, way, width, 1)
    return _fetched(donor.pixels, view, window(canvas))


def _connected(bones: list[tuple[int, int]], rng: np.random.Generator) -> list[tuple[int, int]]:
    """One bone, or up to five that hang together."""
    wanted = 1 if rng.random() < 0.5 else int(rng.integers(2, 6))
    bones = [bones[i] for i in rng.permutation(len(bones))]
    chosen = bones[:1]
    while len(chosen) < wanted:
        joints = {joint for bone in chosen for joint in bone}
        following = [bone for bone in bones if bone not in chosen and joints & set(bone)]
        if not following:
            break
        chosen.append(following[0])
    return chosen


def elsewhere(canvas: Canvas, donors: Donors, rng: np.random.Generator) -> Image:
    """A piece of another photograph, of its person or beside it."""
    donor = donors.patches[int(rng.integers(len(donors.patches)))]
    size, beside = np.array(donor.pixels.shape[1::-1]), rng.random() < 0.5
    for _ in range(3):
        source = rng.uniform(0, 1, 2) * (size - 1)
        on_person = bool(((source > donor.box_xyxy[:2]) & (source < donor.box_xyxy[2:])).all())
        if on_person != beside:
            break
    where = window(canvas)
    return _fetched(donor.pixels, _placed(source, _middle(where), math.exp(rng.uniform(-1.2, 0.6)), rng), where)


def background(canvas: Canvas, crop: Image, points: NDArray[np.float32], rng: np.random.Generator) -> Image:
    """A piece of the crop itself from as far from the person's joints (n, 2) as a few tries find."""
    tries = rng.uniform(0, 1, (6, 2)) * (np.array(crop.shape[1::-1]) - 1)
    distances = np.full(len(tries), 1.0)
    if len(points):
        distances = np.hypot(*(tries[:, None] - points[None]).transpose(2, 0, 1)).min(axis=1)
    columns, rows = tries.astype(np.intp).T
    distances *= crop[rows, columns].any(axis=1)  # black beyond the photograph gives things away
    where = window(canvas)
    view = _placed(tries[int(distances.argmax())], _middle(where), math.exp(rng.uniform(-0.5, 0.5)), rng)
    return _fetched(crop, view, where)


def _middle(where: tuple[slice, slice]) -> Points:
    rows, columns = where
    return np.array([columns.start + columns.stop - 1, rows.start + rows.stop - 1]) / 2


def _placed(source: Points, center: Points, zoom: float, rng: np.random.Generator) -> Points:
    """(2, 3) similarity that takes `source` to `center`, turned any way, or a little only, and mirrored or not."""
    angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.6 else rng.normal(0, 0.15)
    view = np.empty((2, 3))
    view[:, :2] = zoom * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    if rng.random() < 0.5:
        view[:, 0] = -view[:, 0]
    view[:, 2] = center - view[:, :2] @ source
    return view


def _fetched(pixels: Image, view: Points, where: tuple[slice, slice]) -> Image:
    """What `view` shows of a photograph within a window."""
    rows, columns = where
    view = view.copy()
    view[:, 2] -= columns.start, rows.start
    piece = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)
    if piece.size:
        size = piece.shape[1], piece.shape[0]
        cv2.warpAffine(pixels, view, size, dst=piece, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return piece
