"""Things put in front of people in training, masks on joints, cut frames: what, how much of it, and the pasting itself.

Outlines and fillings are those of `edgepose.data.occluders`, for training only; what networks are tested against comes
from `edgepose.data.corrupt` and shares neither shapes nor textures with them.

Invariant: a pixel is painted exactly where the returned mask says so, so whether a joint is hidden is known, not
guessed; all randomness comes from the generator handed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.data.occluders.layouts import Place, clutter, single, tangle, veil, wall
from edgepose.data.occluders.photographs import Donors, background, elsewhere, limbs, window
from edgepose.data.occluders.shapes import disc, rectangle
from edgepose.data.occluders.textures import texture
from edgepose.data.patch import Patch

__all__ = ["Donors", "OcclusionConfig", "Target", "occlude", "severity", "truncated"]

Image = NDArray[np.uint8]
Mask = NDArray[np.uint8]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Weight = Annotated[float, msgspec.Meta(ge=0)]


class OcclusionConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often and how much of a person is hidden.

    Probabilities and shares below hold at full severity; `severity` scales them at the beginning of a run.

    Attributes:
        pasted: Probability of things pasted over the person.
        largest: Largest share of the person's surroundings that is covered by them.
        shapes: Weight of things with drawn textures among the pasted ones.
        body_parts: Weight of limbs cut from other training people.
        objects: Weight of pieces of other training photographs, of people or beside them.
        scene: Weight of pieces of the same photograph's background, whose colours and grain give nothing away.
        cutout: Weight of rectangles.
        single: Weight of one thing at a time in the layout of shapes, objects and scene.
        clutter: Weight of many small things.
        tangles: Weight of strings.
        walls: Weight of all to one side of an edge.
        veils: Weight of irregular patches; kept for calibration, to see how sure a network is of what it never saw.
        joints: Probability of small masks right on up to three joints.
        truncation: Probability that the frame ends within the person.
        largest_truncation: Largest share of the person's box that the frame cuts off.
        soft: Probability that a pasted thing has blurred edges, so that hard ones give nothing away.
        translucent: Probability that up to a quarter of what is behind a thing shows through.
        jitter: Probability that colours, sharpness and grain of a thing change, and those of its pieces.
        start: Severity at the start of the run, 0..1.
        ramp: Share of the run until the severity is 1.
    """

    pasted: Share = 0.6
    largest: Share = 0.7
    shapes: Weight = 0.3
    body_parts: Weight = 0.2
    objects: Weight = 0.25
    scene: Weight = 0.2
    cutout: Weight = 0.05
    single: Weight = 0.35
    clutter: Weight = 0.35
    tangles: Weight = 0.15
    walls: Weight = 0.15
    veils: Weight = 0.0
    joints: Share = 0.2
    truncation: Share = 0.15
    largest_truncation: Share = 0.45
    soft: Share = 0.6
    translucent: Share = 0.15
    jitter: Share = 0.6
    start: Share = 0.3
    ramp: Share = 0.3


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """A person in a crop, to be covered.

    Attributes:
        crop: (h, w, 3) uint8 BGR; painted in place.
        covered: (h, w) uint8, how much of each pixel was painted over, 0..255; written in place.
        points: (n, 2) float32, labelled joints in pixels of the crop.
        box_px2: Area of the person's box in square pixels of the crop.
    """

    crop: Image
    covered: Mask
    points: NDArray[np.float32]
    box_px2: float


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
            canvas = _blank(target.crop)
            if rng.random() < 0.5:
                disc(canvas, center, math.pi * radius_px**2, rng, 1)
            else:
                rectangle(canvas, center, 4 * radius_px**2, rng, 1)
            family = _family(config, donors, rng)
            pixels = _filling(canvas, target, donors, "objects" if family == "body_parts" else family, rng)
            _paste(target, canvas, pixels, config, rng)


def _paste_things(
    target: Target, donors: Donors, config: OcclusionConfig, strength: float, rng: np.random.Generator
) -> None:
    """Paste until the wanted share is covered, a few layers at most: they may overlap or fall outside."""
    around = _surroundings(target)
    x1, y1, x2, y2 = (round(v) for v in around.tolist())
    wanted_px2 = rng.uniform(0.04, max(0.04, config.largest * strength)) * (x2 - x1) * (y2 - y1)
    layouts = np.cumsum([config.single, config.clutter, config.tangles, config.walls, config.veils])
    for _ in range(5):
        left_px2 = wanted_px2 - cv2.countNonZero(target.covered[y1:y2, x1:x2])
        family = _family(config, donors, rng)
        if left_px2 < 0.1 * wanted_px2 or family is None:
            return
        area_px2 = max(12.0, left_px2 * rng.uniform(0.35, 1.0))
        place = Place(_somewhere_on(target, rng), area_px2, around)
        canvas, pixels = _blank(target.crop), None
        if family == "body_parts":
            pixels = limbs(canvas, place.center, area_px2, donors, rng)
        elif family == "cutout" or layouts[-1] <= 0:
            rectangle(canvas, place.center, area_px2, rng, 1)
        else:
            _LAYOUTS[int(np.searchsorted(layouts, rng.random() * layouts[-1], side="right"))](canvas, place, rng)
        if pixels is None:
            pixels = _filling(canvas, target, donors, family, rng)
        _paste(target, canvas, pixels, config, rng)


_LAYOUTS = (single, clutter, tangle, wall, veil)


def _family(config: OcclusionConfig, donors: Donors, rng: np.random.Generator) -> str | None:
    """What the next thing is made of; None where no family is left."""
    weights = [config.shapes, config.cutout, config.scene, config.body_parts, config.objects]
    limits = np.cumsum(weights if donors.patches else weights[:3])
    if limits[-1] <= 0:
        return None
    return _FAMILIES[int(np.searchsorted(limits, rng.random() * limits[-1], side="right"))]


_FAMILIES = ("shapes", "cutout", "scene", "body_parts", "objects")


def _filling(canvas: Mask, target: Target, donors: Donors, family: str | None, rng: np.random.Generator) -> Image:
    """(h, w, 3) uint8 for the canvas's window."""
    if family == "objects":
        return elsewhere(canvas, donors, rng)
    if family == "scene":
        return background(canvas, target.crop, target.points, rng)
    rows, columns = window(canvas)
    hw = rows.stop - rows.start, columns.stop - columns.start
    return texture(target.crop, hw, rng) if min(hw) else np.zeros((*hw, 3), np.uint8)


def _blank(crop: Image) -> Mask:
    return np.zeros(crop.shape[:2], np.uint8)


def _surroundings(target: Target) -> NDArray[np.float64]:
    """(4,) x1, y1, x2, y2 of the part of the crop that the person takes up, going by its joints."""
    height, width = target.crop.shape[:2]
    if not len(target.points):
        return np.array([0.0, 0, width, height])
    low, high = target.points.min(axis=0).astype(np.float64), target.points.max(axis=0).astype(np.float64)
    side_px = math.sqrt(target.box_px2)
    half = np.maximum((high - low) / 2 + 0.1 * side_px, 0.35 * side_px)
    middle = (low + high) / 2
    size = np.array([width, height, width, height])
    return np.asarray(np.clip(np.concatenate([middle - half, middle + half]), 0, size), np.float64)


def _somewhere_on(target: Target, rng: np.random.Generator) -> NDArray[np.float64]:
    """A place on or near the person: between two of its joints, more often near one of them."""
    height, width = target.crop.shape[:2]
    if not len(target.points):
        return rng.uniform(0.2, 0.8, 2) * (width, height)
    first, second = target.points[rng.integers(len(target.points), size=2)]
    place = first + (second - first) * rng.beta(0.6, 1.4) + rng.normal(0, 0.06 * math.sqrt(target.box_px2), 2)
    return np.asarray(np.clip(place, 0, (width - 1, height - 1)), np.float64)


# ----------------------------------------------------------------------------------------------------------- pasting


def _paste(target: Target, canvas: Mask, pixels: Image, config: OcclusionConfig, rng: np.random.Generator) -> None:
    """Paint a crop where the canvas is not 0, with `pixels` of the canvas's window."""
    where = window(canvas)
    numbers, below = canvas[where], target.crop[where]
    if not numbers.size:
        return
    if rng.random() < config.jitter:
        pixels = _jittered(pixels, numbers, rng)
    solid = 255 if rng.random() >= config.translucent else int(rng.integers(191, 255))
    alpha = np.asarray(cv2.threshold(numbers, 0, solid, cv2.THRESH_BINARY)[1], np.uint8)
    soft = rng.random() < config.soft
    if soft:
        alpha = np.asarray(cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.4, 1.8)), np.uint8)
    if soft or solid < 255:
        share = alpha[..., None].astype(np.uint16)
        below[...] = (pixels * share + below * (255 - share) + 127) // 255
    else:
        cv2.copyTo(pixels, alpha, below)
    np.maximum(target.covered[where], alpha, out=target.covered[where])


def _jittered(pixels: Image, numbers: Mask, rng: np.random.Generator) -> Image:
    """Other colours, sharpness and grain, and a brightness or a colour of its own for each numbered piece."""
    if rng.random() < 0.7:
        gain = rng.uniform(0.6, 1.4) * rng.uniform(0.85, 1.15, 3)
        levels = np.arange(256)[:, None] * gain + rng.uniform(-30, 30)
        pixels = np.asarray(cv2.LUT(pixels, np.clip(levels, 0, 255).astype(np.uint8)[None]), np.uint8)
    if numbers.max() > 1:
        own = rng.random()
        if own < 0.3:
            pixels = np.asarray(cv2.applyColorMap(numbers, rng.integers(0, 256, (256, 1, 3), np.uint8)), np.uint8)
        elif own < 0.7:
            shades = cv2.LUT(numbers, rng.integers(120, 256, 256, np.uint8))
            pixels = np.asarray(cv2.multiply(pixels, cv2.merge([shades] * 3), scale=1 / 255), np.uint8)
    if rng.random() < 0.35:
        pixels = np.asarray(cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.5, 2.5)), np.uint8)
    if rng.random() < 0.35:
        grain = rng.integers(0, 256, pixels.shape, np.uint8)
        strength = rng.uniform(0.02, 0.12)
        pixels = np.asarray(cv2.addWeighted(pixels, 1, grain, strength, -127.5 * strength), np.uint8)
    return pixels
