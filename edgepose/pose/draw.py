"""Drawing skeletons on frames: what a person looks at to believe a network.

Colours say the side (the person's own left is orange, right is blue, the middle green), filled joints are confident
ones, hollow joints and faint limbs are not.

Invariant: the frame that is handed in is never written to; the result is a new (H, W, 3) uint8 BGR array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import ImageError, SpecError, UsageError
from edgepose.spec import Keypoints, Poses

Color = tuple[int, int, int]
Frame = NDArray[np.uint8]
Points = NDArray[np.floating[Any]]

LEFT: Color = (40, 150, 255)
RIGHT: Color = (255, 160, 40)
MIDDLE: Color = (120, 220, 120)
_OUTLINE: Color = (30, 30, 30)
_PAPER: Color = (255, 255, 255)

# OpenCV draws at fractions of a pixel when coordinates come as integers with this many binary places.
_PLACES = 4
_UNIT_CIRCLE = np.stack([f(np.linspace(0.0, 2.0 * np.pi, 24, endpoint=False)) for f in (np.cos, np.sin)], axis=1)
_FAINT = 0.45
_REACH_PX = 1 << 20


def draw(frame: NDArray[Any], poses: Poses, keypoints: Keypoints, *, min_score: float = 0.3) -> Frame:
    """Draw the people of one frame.

    Args:
        frame: (H, W, 3) uint8 BGR; not changed.
        poses: The people, in the frame's pixels. Joints that are not finite are left out.
        keypoints: Names, whose "left_" and "right_" choose colours, and skeleton.
        min_score: Joints below it are drawn hollow and their limbs faint.

    Returns:
        A new (H, W, 3) uint8 BGR frame.

    Raises:
        ImageError: `frame` is not (H, W, 3) uint8.
        SpecError: The poses have another number of joints than `keypoints`.
    """
    picture = _copy_of_frame(frame)
    if poses.keypoints.shape[1:] != (keypoints.count, 2) or poses.scores.shape != poses.keypoints.shape[:2]:
        raise SpecError(
            "poses to draw",
            found=f"keypoints {poses.keypoints.shape} and scores {poses.scores.shape}",
            expected=f"(N, {keypoints.count}, 2) and (N, {keypoints.count})",
        )
    for points, scores, box in zip(poses.keypoints, poses.scores, poses.boxes, strict=True):
        person = _Person(points, _drawable(points), scores >= min_score, _thickness(points[_drawable(points)], box))
        picture = _draw_person(picture, person, keypoints)
    return picture


def side_by_side(frames: Sequence[NDArray[Any]], labels: Sequence[str], *, height_px: int | None = None) -> Frame:
    """Put frames in one row at one height, each under its label.

    Args:
        frames: (H, W, 3) uint8 BGR each, of any sizes; not changed.
        labels: One per frame; text is shrunk to the frame's width.
        height_px: Height of the frames in the result; the tallest frame's height when None.

    Returns:
        A new (h, w, 3) uint8 BGR frame, `h` being the common height and a strip for the labels.

    Raises:
        ImageError: A frame is not (H, W, 3) uint8.
        UsageError: There are no frames, or not one label each, or `height_px` is below 1.
    """
    if not frames or len(frames) != len(labels):
        raise UsageError(
            "side by side", found=f"{len(frames)} frames and {len(labels)} labels", expected="one label per frame"
        )
    if height_px is not None and height_px < 1:
        raise UsageError("height_px", found=f"{height_px}", expected="1 or more")
    height = height_px or max(frame.shape[0] for frame in frames)
    gap = np.full((height + _strip_px(height), max(2, height // 100), 3), 255, np.uint8)
    columns = [gap]
    for frame, label in zip(frames, labels, strict=True):
        columns += [_labelled(_copy_of_frame(frame), label, height), gap]
    return np.concatenate(columns[1:-1], axis=1)


def side_color(name: str) -> Color:
    """BGR of a joint, by the side its name says."""
    if name.startswith("left"):
        return LEFT
    return RIGHT if name.startswith("right") else MIDDLE


@dataclass(frozen=True, slots=True, eq=False)
class _Person:
    """(K, 2) joints in pixels, (K,) which can be drawn, (K,) which are confident, line width in pixels."""

    points: Points
    drawn: NDArray[np.bool_]
    sure: NDArray[np.bool_]
    thickness: int


def _drawable(points: Points) -> NDArray[np.bool_]:
    return np.asarray((np.abs(points) < _REACH_PX).all(axis=1), np.bool_)  # False for NaN


def _draw_person(picture: Frame, person: _Person, keypoints: Keypoints) -> Frame:
    points, drawn, sure, thickness = person.points, person.drawn, person.sure, person.thickness
    colors = [side_color(name) for name in keypoints.names]
    limbs = [(a, b) for a, b in keypoints.skeleton if drawn[a] and drawn[b]]
    faint = [limb for limb in limbs if not sure[list(limb)].all()]
    if faint:
        veil = picture.copy()
        for a, b in faint:
            _limb(veil, points[a], points[b], _limb_color(colors[a], colors[b]), thickness)
        picture = np.asarray(cv2.addWeighted(veil, _FAINT, picture, 1.0 - _FAINT, 0.0), np.uint8)
    for a, b in limbs:
        if (a, b) not in faint:
            _limb(picture, points[a], points[b], _limb_color(colors[a], colors[b]), thickness)
    for joint in np.flatnonzero(drawn):
        _joint(picture, points[joint], colors[joint], thickness, filled=bool(sure[joint]))
    return picture


def _limb(picture: Frame, start: Points, end: Points, color: Color, thickness: int) -> None:
    """A line with a dark rim, so that it shows on any background."""
    a, b = _fixed(start), _fixed(end)
    cv2.line(picture, a, b, _OUTLINE, thickness + max(1, thickness // 2) + 1, cv2.LINE_AA, _PLACES)
    cv2.line(picture, a, b, color, thickness, cv2.LINE_AA, _PLACES)


def _joint(picture: Frame, point: Points, color: Color, thickness: int, *, filled: bool) -> None:
    radius_px = 0.8 + 0.9 * thickness
    if not filled:
        _circle(picture, point, radius_px + 1.0, color, max(1, thickness // 2))
        return
    _circle(picture, point, radius_px + 0.5 + 0.25 * thickness, _OUTLINE, cv2.FILLED)
    _circle(picture, point, radius_px, color, cv2.FILLED)
    if thickness > 2:  # a bright heart marks the exact place on large people
        _circle(picture, point, 0.35 * radius_px, _PAPER, cv2.FILLED)


def _circle(picture: Frame, centre: Points, radius_px: float, color: Color, thickness: int) -> None:
    """A disc, or a ring of `thickness`, as a polygon: OpenCV's own small circles come out as diamonds."""
    corners = np.rint((centre + radius_px * _UNIT_CIRCLE) * 2**_PLACES).astype(np.int32)
    if thickness == cv2.FILLED:
        cv2.fillConvexPoly(picture, corners, color, cv2.LINE_AA, _PLACES)
    else:
        cv2.polylines(picture, [corners], True, color, thickness, cv2.LINE_AA, _PLACES)


def _fixed(point: Points) -> tuple[int, int]:
    return round(float(point[0]) * 2**_PLACES), round(float(point[1]) * 2**_PLACES)


def _limb_color(a: Color, b: Color) -> Color:
    """The side's colour where both ends agree; towards the neck a limb keeps the side it comes from."""
    if b in (a, MIDDLE):
        return a
    return b if a == MIDDLE else MIDDLE


def _thickness(points: Points, box: Points) -> int:
    """Line width in pixels for a person's size; the smaller of joints and box, as either may be wild."""
    sizes = [float((box[2:] - box[:2]).max())]
    if len(points) > 1:
        sizes.append(float(np.ptp(points, axis=0).max()))
    usable = [size for size in sizes if np.isfinite(size) and size > 0]
    return int(np.clip(round(min(usable, default=0.0) / 110.0), 1, 24))


def _labelled(frame: Frame, label: str, height: int) -> Frame:
    width = max(1, round(frame.shape[1] * height / frame.shape[0]))
    shrinking = height < frame.shape[0]
    scaled = cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA if shrinking else cv2.INTER_CUBIC)
    strip = np.full((_strip_px(height), width, 3), 255, np.uint8)
    font, scale = cv2.FONT_HERSHEY_SIMPLEX, strip.shape[0] / 45.0
    (text_width, _), _ = cv2.getTextSize(label, font, scale, 1)
    if text_width > width - 8:
        scale *= max(width - 8, 1) / text_width
    (text_width, text_height), _ = cv2.getTextSize(label, font, scale, 1)
    origin = ((width - text_width) // 2, (strip.shape[0] + text_height) // 2)
    cv2.putText(strip, label, origin, font, scale, _OUTLINE, max(1, round(1.4 * scale)), cv2.LINE_AA)
    return np.concatenate([strip, np.asarray(scaled, np.uint8)], axis=0)


def _strip_px(height: int) -> int:
    return int(np.clip(height // 14, 18, 60))


def _copy_of_frame(frame: NDArray[Any]) -> Frame:
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8 or 0 in frame.shape:
        raise ImageError(
            "frame to draw on", found=f"shape {frame.shape} of {frame.dtype}", expected="(H, W, 3) uint8, BGR"
        )
    return np.array(frame, dtype=np.uint8, order="C")
