"""Photographs made harder on purpose, for testing only: things in front of people, cut frames, bad light, bad cameras.

The occluders share neither shapes nor textures with `edgepose.data.occlude`, which training uses: superellipse blobs,
stars, grids of bars and foliage here, filled with noise, checks, clouds or pieces of other photographs of the test set.

Strengths hold for a reference crop: the person's box, 1.25 times as large, on `REFERENCE_PX` pixels. So a person of any
size in any photograph is blurred as much as the network sees it.

Invariant: a corruption is a function of (frame, person, draw) and the photographs that lend pieces; neither the order
of people nor what else is measured changes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.data.coco import Person, read_image
from edgepose.data.cover import joints_covered

Image = NDArray[np.uint8]
Points = NDArray[np.float64]

REFERENCE_PX = 192
_PADDING = 1.25


@dataclass(frozen=True, slots=True)
class Clean:
    """The photograph as it is."""


@dataclass(frozen=True, slots=True)
class Occluded:
    """Things cover `share` of the person's box."""

    share: float


@dataclass(frozen=True, slots=True)
class Truncated:
    """The photograph ends within the person: between `low` and `high` of the box's width or height are gone.

    The box is clipped to what is left, as a detector would.
    """

    low: float = 0.2
    high: float = 0.4


@dataclass(frozen=True, slots=True)
class LowLight:
    """`gain` · value ^ `gamma` of values in 0..1, then noise of `sigma` grey levels."""

    gamma: float = 2.0
    gain: float = 0.45
    sigma: float = 6.0


@dataclass(frozen=True, slots=True)
class MotionBlur:
    """A straight movement of `length_px` pixels of the reference crop, in any direction."""

    length_px: float = 11.0


@dataclass(frozen=True, slots=True)
class SensorNoise:
    """Gaussian noise of `sigma` grey levels in each channel, as fine as the reference crop's pixels."""

    sigma: float = 28.0


@dataclass(frozen=True, slots=True)
class Jpeg:
    """JPEG compression at `quality`, with the photograph no finer than the reference crop."""

    quality: int = 10


Corruption = Clean | Occluded | Truncated | LowLight | MotionBlur | SensorNoise | Jpeg

CORRUPTIONS: Mapping[str, Corruption] = MappingProxyType(
    {
        "clean": Clean(),
        "occluded_10": Occluded(0.1),
        "occluded_20": Occluded(0.2),
        "occluded_30": Occluded(0.3),
        "occluded_40": Occluded(0.4),
        "truncated": Truncated(),
        "low_light": LowLight(),
        "motion_blur": MotionBlur(),
        "sensor_noise": SensorNoise(),
        "jpeg": Jpeg(),
    }
)
"""The corruptions that networks are compared under, in the order they are shown."""


@dataclass(frozen=True, slots=True, eq=False)
class Corrupted:
    """A photograph of a person, made harder.

    Attributes:
        frame: (H, W, 3) uint8 BGR.
        box_xyxy: (4,) float64, pixels of `frame`.
        keypoints: (K, 3) float32 x, y, v, pixels of `frame`; v is 0 for joints that the frame no longer shows, which
            do not count.
        hidden: (K,) bool, labelled joints that cannot be seen: covered, labelled hidden, or beyond the frame.
        known: (K,) bool, joints of which `hidden` is known: the labelled ones, those beyond the frame included.
        covered: (H, W) bool, where something was pasted.
    """

    frame: Image
    box_xyxy: Points
    keypoints: NDArray[np.float32]
    hidden: NDArray[np.bool_]
    known: NDArray[np.bool_]
    covered: NDArray[np.bool_]


def corrupt(
    corruption: Corruption, frame: Image, person: Person, *, draw: int = 0, others: Sequence[Path] = ()
) -> Corrupted:
    """Make one person's photograph harder.

    Args:
        corruption: How.
        frame: (H, W, 3) uint8 BGR, the person's photograph; not changed.
        person: The person in it.
        draw: Number of the random draw; the same person and number always give the same picture.
        others: Photographs of the test set that may lend pieces; the person's own is passed over.

    Raises:
        ImageError: A photograph that lends a piece cannot be read.
    """
    # The four shares of occlusion grow out of one draw, so that they differ in share only.
    family = tuple(type(c) for c in CORRUPTIONS.values()).index(type(corruption))
    rng = np.random.default_rng((draw, person.annotation_id % 2**63, family))
    unit_px = _box_side_px(frame, person.box_xyxy) * _PADDING / REFERENCE_PX  # pixels of the frame per reference pixel
    nothing = np.zeros(frame.shape[:2], np.bool_)
    match corruption:
        case Clean():
            return _labelled(frame, person.box_xyxy, person.keypoints, nothing)
        case Occluded(share):
            changed, covered = _occluded(frame, person, share, others, rng)
            return _labelled(changed, person.box_xyxy, person.keypoints, covered)
        case Truncated(low, high):
            return _truncated(frame, person, rng.uniform(low, high), int(rng.integers(4)))
        case LowLight(gamma, gain, sigma):
            table = 255 * gain * (np.arange(256) / 255) ** gamma
            changed = _noisy(table[frame], sigma, unit_px, rng)
        case MotionBlur(length_px):
            kernel = _streak(length_px * unit_px, rng.uniform(0, math.pi))
            changed = np.asarray(cv2.filter2D(frame, -1, kernel, borderType=cv2.BORDER_REFLECT_101), np.uint8)
        case SensorNoise(sigma):
            changed = _noisy(frame.astype(np.float64), sigma, unit_px, rng)
        case Jpeg(quality):
            changed = _compressed(frame, quality, unit_px)
    return _labelled(changed, person.box_xyxy, person.keypoints, nothing)


def _labelled(frame: Image, box: Points, keypoints: NDArray[np.float32], covered: NDArray[np.bool_]) -> Corrupted:
    known = keypoints[:, 2] > 0
    height, width = frame.shape[:2]
    columns, rows = np.rint(keypoints[:, :2]).astype(np.int64).T
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    under = np.zeros(len(keypoints), np.bool_)
    if covered.any():
        side_px = _box_side_px(frame, box)
        under[inside] = joints_covered(covered.astype(np.uint8) * 255, keypoints[inside, :2], side_px)
    hidden = known & (under | ~inside | (keypoints[:, 2] == 1))
    return Corrupted(frame, box, keypoints, hidden, known, covered)


def _box_side_px(frame: Image, box: Points) -> float:
    """Larger side of a box; of one far larger than its photograph, only so much that blur stays within memory."""
    return float(min((box[2:] - box[:2]).max(), 16 * max(frame.shape[:2])))


# --------------------------------------------------------------------------------------------------------- truncation


def _truncated(frame: Image, person: Person, share: float, side: int) -> Corrupted:
    """Cut the frame on one side of the person: left, top, right or bottom."""
    axis, at_the_end = side % 2, side >= 2
    size = frame.shape[1::-1]
    box = person.box_xyxy
    box = np.clip(box, -0.5, np.array([*size, *size]) - 0.5)  # outer edges of the outermost pixels
    low, high = box[axis], box[2 + axis]
    cut = high - share * (high - low) if at_the_end else low + share * (high - low)
    line = round(cut + 0.5)  # number of the first pixel behind the cut
    if not (1 <= line < size[axis] and low < line - 0.5 < high):  # a speck
        return _labelled(frame, person.box_xyxy, person.keypoints, np.zeros(frame.shape[:2], np.bool_))
    keep = slice(0, line) if at_the_end else slice(line, size[axis])
    left = np.ascontiguousarray(frame[:, keep] if axis == 0 else frame[keep])
    keypoints = person.keypoints.copy()
    box[axis + (2 if at_the_end else 0)] = line - 0.5
    if not at_the_end:
        box[[axis, axis + 2]] -= line
        keypoints[:, axis] -= line
    whole = _labelled(left, box, keypoints, np.zeros(left.shape[:2], np.bool_))
    places, width_height = np.rint(keypoints[:, :2]), np.array(left.shape[1::-1])
    gone = ((places < 0) | (places >= width_height)).any(axis=1)
    keypoints[gone, 2] = 0
    return Corrupted(left, box, keypoints, whole.hidden, whole.known, whole.covered)


# ---------------------------------------------------------------------------------------------------------- occlusion


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """One polygon of an occluder, star-shaped about its centre, so that it only gains pixels as it grows."""

    center: Points
    outline: Points  # (n, 2) around the centre, at scale 1


def _occluded(
    frame: Image, person: Person, share: float, others: Sequence[Path], rng: np.random.Generator
) -> tuple[Image, NDArray[np.bool_]]:
    """Cover a share of the part of the box that lies in the frame."""
    height, width = frame.shape[:2]
    box = np.clip(np.rint(person.box_xyxy), 0, (width, height, width, height)).astype(np.int64)
    x1, y1, x2, y2 = (int(v) for v in box)
    covered = np.zeros((height, width), np.bool_)
    if x1 >= x2 or y1 >= y2:
        return frame, covered
    size = np.array([x2 - x1, y2 - y1], np.float64)
    room = np.ceil(0.3 * size).astype(int)  # occluders stand out of the box, but not all over the photograph
    rows = slice(max(y1 - int(room[1]), 0), min(y2 + int(room[1]), height))
    columns = slice(max(x1 - int(room[0]), 0), min(x2 + int(room[0]), width))
    origin = np.array([x1 - columns.start, y1 - rows.start], np.float64)
    pieces = _FAMILIES[int(rng.integers(len(_FAMILIES)))](size, rng)
    pieces = [_Piece(piece.center + origin, piece.outline) for piece in pieces]
    shape = rows.stop - rows.start, columns.stop - columns.start
    inner = slice(int(origin[1]), int(origin[1] + size[1])), slice(int(origin[0]), int(origin[0] + size[0]))
    mask = _grown(pieces, shape, inner, share)
    texture = _texture(frame, person, shape, others, rng)
    shades = np.zeros(shape, np.uint8)  # each piece is a little brighter or darker than the next
    _draw(shades, pieces, mask[1], rng.integers(150, 256, len(pieces)))
    texture = (texture.astype(np.uint16) * np.where(mask[0] > 0, shades, 255)[..., None] // 255).astype(np.uint8)
    alpha = mask[0] if rng.random() < 0.5 else np.asarray(cv2.GaussianBlur(mask[0], (0, 0), 0.7), np.uint8)
    weight = alpha[..., None].astype(np.uint16)
    changed = frame.copy()
    changed[rows, columns] = (texture * weight + frame[rows, columns] * (255 - weight) + 127) // 255
    covered[rows, columns] = mask[0] > 0
    return changed, covered


def _grown(
    pieces: Sequence[_Piece], shape: tuple[int, int], inner: tuple[slice, slice], share: float
) -> tuple[Image, float]:
    """The pieces at the scale that comes nearest to covering `share` of the inner window: mask and scale."""

    def drawn(scale: float) -> tuple[Image, float]:
        mask = np.zeros(shape, np.uint8)
        _draw(mask, pieces, scale, np.full(len(pieces), 255))
        return mask, float((mask[inner] > 0).mean())

    low, high = 0.0, 1.0
    while drawn(high)[1] < share and high < 64:
        high *= 2
    best, gap = (drawn(high)[0], high), math.inf
    for _ in range(18):
        middle = (low + high) / 2
        mask, found = drawn(middle)
        if abs(found - share) < gap:
            best, gap = (mask, middle), abs(found - share)
        low, high = (middle, high) if found < share else (low, middle)
    return best


def _draw(mask: Image, pieces: Sequence[_Piece], scale: float, values: NDArray[np.int64]) -> None:
    for piece, value in zip(pieces, values.tolist(), strict=True):
        corners = np.rint((piece.center + scale * piece.outline) * 16).astype(np.int32)
        cv2.fillPoly(mask, [corners], value, cv2.LINE_8, 4)  # one by one: together, overlaps would stay empty


def _blobs(size: Points, rng: np.random.Generator) -> list[_Piece]:
    """One to three rounded squares or four-pointed pillows with an uneven rim: superellipses."""
    pieces = []
    for _ in range(int(rng.integers(1, 4))):
        turn = np.arange(72) * (2 * math.pi / 72)
        exponent = rng.choice([0.9, 3.5, 5.0])
        radius = (np.abs(np.cos(turn)) ** exponent + np.abs(np.sin(turn)) ** exponent) ** (-1 / exponent)
        for wave in range(2, 6):
            radius *= 1 + rng.uniform(0, 0.09) * np.cos(wave * turn + rng.uniform(0, 2 * math.pi))
        outline = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1) * (1.0, math.exp(rng.uniform(-0.5, 0.5)))
        pieces.append(_Piece(rng.uniform(0.1, 0.9, 2) * size, _turned(outline, rng) * _side(size) * 0.2))
    return pieces


def _stars(size: Points, rng: np.random.Generator) -> list[_Piece]:
    """Two to four stars of four to eight rays."""
    pieces = []
    for _ in range(int(rng.integers(2, 5))):
        rays = int(rng.integers(4, 9))
        turn = np.arange(2 * rays) * (math.pi / rays)
        radius = np.where(np.arange(2 * rays) % 2, rng.uniform(0.35, 0.6), 1.0)
        outline = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
        pieces.append(_Piece(rng.uniform(0.1, 0.9, 2) * size, _turned(outline, rng) * _side(size) * 0.25))
    return pieces


def _bars(size: Points, rng: np.random.Generator) -> list[_Piece]:
    """A fence or a net: parallel bars through the whole box, sometimes crossed by others."""
    angle = rng.uniform(0.1, math.pi / 2 - 0.1) + (math.pi / 2 if rng.random() < 0.5 else 0)
    reach = float(np.hypot(*size))
    pieces = []
    for direction in (angle, angle + math.pi / 2)[: 1 + int(rng.random() < 0.5)]:
        along = np.array([math.cos(direction), math.sin(direction)])
        across = np.array([-along[1], along[0]])
        count = int(rng.integers(2, 6))
        for number in range(count):
            offset = ((number + rng.uniform(0.2, 0.8)) / count - 0.5) * 0.9 * float(np.abs(across) @ size)
            # So long that scaling changes nothing but the width.
            half = np.array([[-20, -0.03], [20, -0.03], [20, 0.03], [-20, 0.03]]) * rng.uniform(0.6, 1.2)
            outline = (half[:, :1] * along + half[:, 1:] * across) * reach
            pieces.append(_Piece(size / 2 + offset * across, outline))
    return pieces


def _foliage(size: Points, rng: np.random.Generator) -> list[_Piece]:
    """One or two branches of leaves, pointed at both ends."""
    turn = np.linspace(-1, 1, 9)
    leaf = np.concatenate([np.stack([turn, 0.3 * (1 - turn**2)], 1), np.stack([-turn, -0.3 * (1 - turn**2)], 1)[1:-1]])
    pieces = []
    for _ in range(int(rng.integers(1, 3))):
        middle, spread = rng.uniform(0.2, 0.8, 2) * size, rng.uniform(0.16, 0.26) * size
        pieces += [
            _Piece(middle + rng.normal(0, 1, 2) * spread, _turned(leaf, rng) * _side(size) * 0.08)
            for _ in range(int(rng.integers(25, 45)))
        ]
    return pieces


_FAMILIES = (_blobs, _stars, _bars, _foliage)


def _side(size: Points) -> float:
    return math.sqrt(float(size.prod()))


def _turned(outline: Points, rng: np.random.Generator) -> Points:
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return np.asarray(outline @ turn.T, np.float64)


# ----------------------------------------------------------------------------------------------------------- textures


def _texture(
    frame: Image, person: Person, hw: tuple[int, int], others: Sequence[Path], rng: np.random.Generator
) -> Image:
    """(h, w, 3) uint8: noise, checks, clouds, or a piece of another photograph, mirrored and turned."""
    kind = int(rng.integers(4))
    lenders = [path for path in others if path != person.image] if kind == 3 else []
    colors = np.stack([_color(frame, rng) for _ in range(3)]).astype(np.float32)
    grain_px = max(1.0, _side(person.bbox_xywh[2:]) * rng.uniform(0.02, 0.08))
    if kind == 0:
        noise = _upsampled(rng.normal(0, 60, (*_cells(hw, grain_px), 3)), hw, cv2.INTER_NEAREST)
        return _levels(colors[0] + noise)
    if kind == 1:
        angle = rng.uniform(0, math.pi / 2)
        y, x = np.mgrid[: hw[0], : hw[1]] / (1.5 * grain_px)
        u = np.floor(x * math.cos(angle) + y * math.sin(angle))
        v = np.floor(y * math.cos(angle) - x * math.sin(angle))
        return _levels(colors[((u + v) % 2).astype(int)])
    if lenders:
        return _piece_of(read_image(lenders[int(rng.integers(len(lenders)))]), hw, rng)
    clouds = sum(
        _upsampled(rng.uniform(0, 1, _cells(hw, 6 * grain_px / 2**octave)), hw, cv2.INTER_CUBIC) / 2**octave
        for octave in range(4)
    )
    share = np.clip((np.asarray(clouds) / 1.875 - 0.25) * 2, 0, 1)[..., None]
    return _levels(colors[1] + (colors[2] - colors[1]) * share)


def _piece_of(photograph: Image, hw: tuple[int, int], rng: np.random.Generator) -> Image:
    height, width = photograph.shape[:2]
    source = rng.uniform(0.2, 0.8, 2) * (width, height)
    zoom, angle = math.exp(rng.uniform(-0.5, 0.7)), rng.uniform(0, 2 * math.pi)
    view = np.empty((2, 3))
    view[:, :2] = zoom * np.array([[-math.cos(angle), math.sin(angle)], [math.sin(angle), math.cos(angle)]])  # mirrored
    view[:, 2] = np.array(hw[::-1]) / 2 - view[:, :2] @ source
    piece = np.empty((*hw, 3), np.uint8)
    cv2.warpAffine(photograph, view, hw[::-1], dst=piece, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return piece


def _levels(values: NDArray[np.floating]) -> Image:
    return np.asarray(np.clip(np.rint(values), 0, 255), np.uint8)


def _color(frame: Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    if rng.random() < 0.5:
        return rng.integers(0, 256, 3, dtype=np.uint8)
    taken: NDArray[np.uint8] = frame[int(rng.integers(frame.shape[0])), int(rng.integers(frame.shape[1]))]
    return taken


def _cells(hw: tuple[int, int], cell_px: float) -> tuple[int, int]:
    return max(2, math.ceil(hw[0] / cell_px)), max(2, math.ceil(hw[1] / cell_px))


def _upsampled(values: Points, hw: tuple[int, int], interpolation: int) -> NDArray[np.float64]:
    return np.asarray(cv2.resize(values, hw[::-1], interpolation=interpolation), np.float64)


# ------------------------------------------------------------------------------------------------------------- camera


def _noisy(values: Points, sigma: float, unit_px: float, rng: np.random.Generator) -> Image:
    """Noise in cells of one reference pixel, or one pixel of the photograph where that is coarser."""
    height, width = values.shape[:2]
    cells = _cells((height, width), max(1.0, unit_px))
    noise = _upsampled(rng.normal(0, sigma, (*cells, 3)), (height, width), cv2.INTER_NEAREST)
    return _levels(values + noise)


def _streak(length_px: float, angle: float) -> NDArray[np.float32]:
    """The kernel of a straight movement, centred, so that nothing shifts: sums to 1."""
    half = max(length_px, 1.0) / 2
    reach = math.ceil(half)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    for along in np.linspace(-half, half, 16 * reach + 1):  # symmetric, so the centre of mass is the middle
        x, y = reach + along * math.cos(angle), reach + along * math.sin(angle)
        column, row = min(int(x), 2 * reach - 1), min(int(y), 2 * reach - 1)
        dx, dy = x - column, y - row
        kernel[row : row + 2, column : column + 2] += np.outer((1 - dy, dy), (1 - dx, dx))
    return np.asarray(kernel / kernel.sum(), np.float32)


def _compressed(frame: Image, quality: int, unit_px: float) -> Image:
    height, width = frame.shape[:2]
    small = frame
    if unit_px > 1:  # else a large photograph would lose nothing that the crop still shows
        size = max(1, round(width / unit_px)), max(1, round(height / unit_px))
        small = np.asarray(cv2.resize(frame, size, interpolation=cv2.INTER_AREA), np.uint8)
    _, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)
    if small is frame:
        return decoded
    return np.asarray(cv2.resize(decoded, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
