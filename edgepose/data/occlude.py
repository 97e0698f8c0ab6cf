"""Things put in front of people in training: rendered shapes, pieces of other photographs, masks on joints, cut frames.

The families here are for training only; what networks are tested against comes from `edgepose.data.corrupt` and shares
neither shapes nor textures with them.

Invariant: a pixel is painted exactly where the returned mask says so, so whether a joint is hidden is known, not
guessed; all randomness comes from the generator handed in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.data.patch import Patch

Image = NDArray[np.uint8]
Mask = NDArray[np.uint8]


class OcclusionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often and how much of a person is hidden.

    Probabilities and shares below hold at full severity; `severity` scales them at the beginning of a run.

    Attributes:
        pasted: Probability of things pasted over the person.
        largest: Largest share of the person's box that is covered by them.
        shapes: Weight of ellipses, convex polygons, sticks and bent limbs among the pasted things.
        body_parts: Weight of limbs cut from other training people.
        objects: Weight of pieces of other training photographs.
        cutout: Weight of plain rectangles.
        joints: Probability of small masks right on up to three joints.
        truncation: Probability that the frame ends within the person.
        largest_truncation: Largest share of the person's box that the frame cuts off.
        soft: Probability that a pasted thing has blurred edges, so that hard ones give nothing away.
        start: Severity at the start of the run, 0..1.
        ramp: Share of the run until the severity is 1.
    """

    pasted: float = 0.6
    largest: float = 0.5
    shapes: float = 0.35
    body_parts: float = 0.25
    objects: float = 0.3
    cutout: float = 0.1
    joints: float = 0.25
    truncation: float = 0.15
    largest_truncation: float = 0.45
    soft: float = 0.4
    start: float = 0.3
    ramp: float = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A person in a crop, to be covered.

    Attributes:
        crop: (h, w, 3) uint8 BGR; painted in place.
        covered: (h, w) uint8, 128 and more where the crop was painted over; written in place.
        points: (n, 2) float32, labelled joints in pixels of the crop.
        box_px2: Area of the person's box in square pixels of the crop.
    """

    crop: Image
    covered: Mask
    points: NDArray[np.float32]
    box_px2: float


@dataclass(frozen=True, slots=True)
class Donors:
    """Where pieces of other photographs come from.

    Attributes:
        patches: Training people.
        skeleton: Pairs of joints between which there is a limb.
    """

    patches: Sequence[Patch]
    skeleton: tuple[tuple[int, int], ...]


def severity(config: OcclusionConfig, progress: float) -> float:
    """The curriculum: from `start` to 1 over the first `ramp` of the run, `progress` in 0..1."""
    if config.ramp <= 0:
        return 1.0
    return config.start + (1 - config.start) * min(1.0, max(0.0, progress) / config.ramp)


def truncated(patch: Patch, config: OcclusionConfig, strength: float, rng: np.random.Generator) -> Patch:
    """Sometimes, the patch with its frame ending within the person, as at the edge of a photograph.

    The box is clipped as a detector would, so the view zooms in on what is left. Half the time what is cut off is gone;
    otherwise it is only beyond the new box, and shows as far as the crop's margin goes.
    """
    if rng.random() >= config.truncation * strength:
        return patch
    share = rng.uniform(0.1, max(0.1, config.largest_truncation * strength))
    side, gone = int(rng.integers(4)), rng.random() < 0.5
    axis, at_the_end = side % 2, side >= 2
    box, (height, width) = patch.box_xyxy.copy(), patch.pixels.shape[:2]
    low, high = max(box[axis], -0.5), min(box[2 + axis], (width, height)[axis] - 0.5)
    line = round(high - share * (high - low)) if at_the_end else round(low + share * (high - low))
    if not (1 <= line < (width, height)[axis] and low < line - 0.5 < high):
        return patch  # a speck
    box[axis + (2 if at_the_end else 0)] = line - 0.5  # between two pixels: coordinates are pixel centres
    if not gone:
        return Patch(patch.pixels, box, patch.keypoints)
    keep = slice(None, line) if at_the_end else slice(line, None)
    pixels = patch.pixels[:, keep] if axis == 0 else patch.pixels[keep]
    keypoints = patch.keypoints.copy()
    if not at_the_end:
        keypoints[:, axis] -= line
        box[[axis, axis + 2]] -= line
    return Patch(np.ascontiguousarray(pixels), box, keypoints)


def occlude(target: Target, donors: Donors, config: OcclusionConfig, strength: float, rng: np.random.Generator) -> None:
    """Paint things over a person, or leave it alone.

    Args:
        target: The person; its crop and `covered` are changed.
        donors: Other people; without any, pieces of photographs are replaced by the other families.
        config: Families and shares.
        strength: Severity, 0..1.
        rng: Of everything random.
    """
    if rng.random() < config.pasted * strength:
        _paste_things(target, donors, config, strength, rng)
    if len(target.points) and rng.random() < config.joints * strength:
        for _ in range(int(rng.integers(1, 4))):
            center = target.points[rng.integers(len(target.points))] + rng.normal(0, 1, 2)
            radius_px = math.sqrt(target.box_px2) * rng.uniform(0.04, 0.1)
            mask = _blank(target.crop)
            if rng.random() < 0.5:
                _ellipse(mask, center, math.pi * radius_px**2, rng)
            else:
                _rectangle(mask, center, 4 * radius_px**2, rng)
            _paste(target, mask, None, config.soft, rng)


def _paste_things(
    target: Target, donors: Donors, config: OcclusionConfig, strength: float, rng: np.random.Generator
) -> None:
    """Paste until the wanted share of the box is covered, a few things at most: they may overlap or fall outside."""
    wanted_px2 = rng.uniform(0.02, max(0.02, config.largest * strength)) * target.box_px2
    weights = np.array([config.shapes, config.cutout, config.body_parts, config.objects])
    if not donors.patches:
        weights[2:] = 0
    if weights.sum() <= 0:
        return
    limits = np.cumsum(weights / weights.sum())
    for _ in range(5):
        left_px2 = wanted_px2 - cv2.countNonZero(target.covered)
        if left_px2 < 0.1 * wanted_px2:
            return
        area_px2 = max(12.0, left_px2 * rng.uniform(0.35, 1.0))
        center = _somewhere_on(target, rng)
        mask, pixels = _blank(target.crop), None
        match int(np.searchsorted(limits, rng.random(), side="right")):
            case 0:
                _SHAPES[rng.integers(len(_SHAPES))](mask, center, area_px2, rng)
            case 1:
                _rectangle(mask, center, area_px2, rng)
            case 2:
                pixels = _body_part(mask, center, area_px2, donors, rng)
            case _:
                (_SHAPES[rng.integers(2)] if rng.random() < 0.7 else _rectangle)(mask, center, area_px2, rng)
                pixels = _object(mask, center, donors, rng)
        _paste(target, mask, pixels, config.soft, rng)


def _blank(crop: Image) -> Mask:
    return np.zeros(crop.shape[:2], np.uint8)


def _somewhere_on(target: Target, rng: np.random.Generator) -> NDArray[np.float64]:
    """A place on or near the person: between two of its joints, more often near one of them."""
    height, width = target.crop.shape[:2]
    if not len(target.points):
        return rng.uniform(0.2, 0.8, 2) * (width, height)
    first, second = target.points[rng.integers(len(target.points), size=2)]
    place = first + (second - first) * rng.beta(0.6, 1.4) + rng.normal(0, 0.06 * math.sqrt(target.box_px2), 2)
    return np.asarray(np.clip(place, 0, (width - 1, height - 1)), np.float64)


# ------------------------------------------------------------------------------------------------------------ shapes
# Each draws 255 into a mask (h, w) at a centre, of about the wanted area; what falls outside is lost.


def _ellipse(mask: Mask, center: NDArray[np.float64], area_px2: float, rng: np.random.Generator) -> None:
    aspect = math.exp(rng.uniform(-1, 1) * math.log(2.5))
    axes = 2 * math.sqrt(area_px2 * aspect / math.pi), 2 * math.sqrt(area_px2 / aspect / math.pi)
    cv2.ellipse(mask, (_pair(center), axes, rng.uniform(0, 180)), 255, -1)


def _polygon(mask: Mask, center: NDArray[np.float64], area_px2: float, rng: np.random.Generator) -> None:
    count = int(rng.integers(3, 8))
    turns = np.sort(rng.uniform(0, 0.6, count) + np.arange(count)) * (2 * math.pi / count)
    spokes = np.stack([np.cos(turns), np.sin(turns)], 1) * (math.exp(rng.uniform(-0.6, 0.6)), 1.0)
    x, y = spokes.T
    unit_px2 = 0.5 * abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))))
    angle = rng.uniform(0, 2 * math.pi)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    corners = center + math.sqrt(area_px2 / max(unit_px2, 1e-3)) * spokes @ turn.T
    cv2.fillConvexPoly(mask, np.rint(corners).astype(np.int32), 255)


def _stick(mask: Mask, center: NDArray[np.float64], area_px2: float, rng: np.random.Generator) -> None:
    slimness = rng.uniform(3, 12)
    length = math.sqrt(area_px2 * slimness)
    angle = rng.uniform(0, math.pi)
    half = length / 2 * np.array([math.cos(angle), math.sin(angle)])
    _line(mask, center - half, center + half, length / slimness)


def _limb(mask: Mask, center: NDArray[np.float64], area_px2: float, rng: np.random.Generator) -> None:
    """Two bones with a joint between them, the second one slimmer."""
    slimness = rng.uniform(3, 6)
    length = math.sqrt(area_px2 / 2 * slimness)
    angle = rng.uniform(0, 2 * math.pi)
    bend = angle + rng.uniform(-2.2, 2.2)
    first = center - length * np.array([math.cos(angle), math.sin(angle)])
    last = center + length * np.array([math.cos(bend), math.sin(bend)])
    _line(mask, first, center, length / slimness * 1.15)
    _line(mask, center, last, length / slimness * 0.85)


def _rectangle(mask: Mask, center: NDArray[np.float64], area_px2: float, rng: np.random.Generator) -> None:
    aspect = math.exp(rng.uniform(-0.8, 0.8))
    half = 0.5 * np.array([math.sqrt(area_px2 * aspect), math.sqrt(area_px2 / aspect)])
    cv2.rectangle(mask, _pixel(center - half), _pixel(center + half), 255, -1)


_SHAPES = (_ellipse, _polygon, _stick, _limb)


def _line(mask: Mask, start: NDArray[np.float64], end: NDArray[np.float64], width_px: float) -> None:
    cv2.line(mask, _pixel(start), _pixel(end), 255, max(1, round(width_px)))


def _pair(point: NDArray[np.float64]) -> tuple[float, float]:
    return float(point[0]), float(point[1])


def _pixel(point: NDArray[np.float64]) -> tuple[int, int]:
    return round(float(point[0])), round(float(point[1]))


# ------------------------------------------------------------------------------------------------- other photographs


def _body_part(
    mask: Mask, center: NDArray[np.float64], area_px2: float, donors: Donors, rng: np.random.Generator
) -> Image:
    """Draw a limb-shaped mask, and fetch a limb of another person that fits it."""
    donor = donors.patches[int(rng.integers(len(donors.patches)))]
    joints, labelled = donor.keypoints[:, :2].astype(np.float64), donor.keypoints[:, 2] > 0
    bones = [(a, b) for a, b in donors.skeleton if labelled[a] and labelled[b]]
    if bones:
        a, b = bones[rng.integers(len(bones))]
        start, end = joints[a], joints[b]
    else:
        start = end = joints[rng.choice(np.flatnonzero(labelled))] if labelled.any() else joints[0]
    side_px = math.sqrt(float(np.prod(donor.box_xyxy[2:] - donor.box_xyxy[:2])))
    length = float(np.hypot(*(end - start)))
    width = max(length * rng.uniform(0.4, 0.9), 0.12 * side_px, 2.0)
    zoom = math.sqrt(area_px2 / (width * length + math.pi * width**2 / 4))
    angle = rng.uniform(0, 2 * math.pi)
    view = _placed((start + end) / 2, center, zoom, angle)
    ends = np.stack([start, end]) @ view[:, :2].T + view[:, 2]
    _line(mask, ends[0], ends[1], width * zoom)
    return _fetched(donor.pixels, view, mask)


def _object(mask: Mask, center: NDArray[np.float64], donors: Donors, rng: np.random.Generator) -> Image:
    """A piece of another photograph as large as the mask, rather beside its person than on it."""
    donor = donors.patches[int(rng.integers(len(donors.patches)))]
    height, width = donor.pixels.shape[:2]
    for _ in range(3):
        source = rng.uniform(0, 1, 2) * (width - 1, height - 1)
        if not ((source > donor.box_xyxy[:2]) & (source < donor.box_xyxy[2:])).all():
            break
    zoom, angle = math.exp(rng.uniform(-0.9, 0.5)), rng.uniform(0, 2 * math.pi)
    return _fetched(donor.pixels, _placed(source, center, zoom, angle), mask)


def _placed(source: NDArray[np.float64], center: NDArray[np.float64], zoom: float, angle: float) -> NDArray[np.float64]:
    """(2, 3) similarity that takes `source` to `center`."""
    view = np.empty((2, 3))
    view[:, :2] = zoom * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    view[:, 2] = center - view[:, :2] @ source
    return view


def _fetched(pixels: Image, view: NDArray[np.float64], mask: Mask) -> Image:
    """What `view` shows of a photograph within the mask's window."""
    rows, columns = _window(mask)
    view = view.copy()
    view[:, 2] -= columns.start, rows.start
    piece = np.empty((rows.stop - rows.start, columns.stop - columns.start, 3), np.uint8)
    if piece.size:
        size = piece.shape[1], piece.shape[0]
        cv2.warpAffine(pixels, view, size, dst=piece, flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return piece


def _window(mask: Mask) -> tuple[slice, slice]:
    """Rows and columns around all that is drawn, with room for a blurred edge; empty where nothing is."""
    x, y, width, height = cv2.boundingRect(mask)
    if not width or not height:
        return slice(0, 0), slice(0, 0)
    return (
        slice(max(y - _EDGE_PX, 0), min(y + height + _EDGE_PX, mask.shape[0])),
        slice(max(x - _EDGE_PX, 0), min(x + width + _EDGE_PX, mask.shape[1])),
    )


_EDGE_PX = 4


# ----------------------------------------------------------------------------------------------------------- pasting


def _paste(target: Target, mask: Mask, pixels: Image | None, soft: float, rng: np.random.Generator) -> None:
    """Paint a crop where the mask is, with `pixels` of the mask's window or a texture of their own."""
    where = _window(mask)
    alpha, below = mask[where], target.crop[where]
    if not alpha.size:
        return
    if pixels is None:
        pixels = _texture(target.crop, alpha.shape, rng)
    if rng.random() < soft:
        alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.6, 1.6)), np.uint8)
        share = alpha[..., None].astype(np.uint16)
        below[...] = (pixels * share + below * (255 - share) + 127) // 255
    else:
        cv2.copyTo(pixels, alpha, below)
    np.maximum(target.covered[where], alpha, out=target.covered[where])


def _texture(crop: Image, hw: tuple[int, ...], rng: np.random.Generator) -> Image:
    """A plain, gradient or striped texture, in colours of the crop more often than not."""
    height, width = hw
    kind = rng.random()
    if kind < 0.4:
        return np.full((height, width, 3), _color(crop, rng), np.uint8)
    if kind < 0.7:
        corners = np.stack([_color(crop, rng) for _ in range(4)]).reshape(2, 2, 3)
        return np.asarray(cv2.resize(corners, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    angle, period_px = rng.uniform(0, math.pi), rng.uniform(3, 16)
    across = np.arange(width, dtype=np.float32) * np.float32(math.cos(angle) / period_px)
    down = np.arange(height, dtype=np.float32) * np.float32(math.sin(angle) / period_px)
    colors = np.stack([_color(crop, rng) for _ in range(2)])
    stripes: Image = colors[np.floor(across[None] + down[:, None]).astype(np.int32) & 1]
    return stripes


def _color(crop: Image, rng: np.random.Generator) -> NDArray[np.uint8]:
    if rng.random() < 0.35:
        return rng.integers(0, 256, 3, dtype=np.uint8)
    height, width = crop.shape[:2]
    taken = crop[rng.integers(height), rng.integers(width)]
    jittered: NDArray[np.uint8] = np.clip(taken + rng.normal(0, 15, 3), 0, 255).astype(np.uint8)
    return jittered
