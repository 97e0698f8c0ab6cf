"""Random views of a labelled person: rotation, scale, shift, mirror, occlusion, colour, cut-out.

Invariant: all randomness comes from the generator handed in, so a sample is a function of (seed, epoch, person).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypedDict, Unpack

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.data.cover import joints_covered
from edgepose.data.occlude import Donors, OcclusionConfig, Share, Target, Weight, occlude, severity, truncated
from edgepose.data.patch import Patch, cut_patch
from edgepose.pose.preprocess import crop_transforms
from edgepose.spec import Keypoints, Preprocess

__all__ = ["AugmentConfig", "Occluding", "OcclusionConfig", "Patch", "View", "augment", "cut_patch", "mirror"]


class AugmentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far random views go.

    Attributes:
        rotation_deg: Standard deviation of the rotation.
        rotation_max_deg: Largest rotation.
        scale: Largest zoom factor in either direction, at least 1.
        shift: Largest shift as a share of the crop.
        mirror: Probability of mirroring.
        color: Strength of brightness, contrast and saturation changes, 0..1.
        cutout: Probability of covering a random rectangle.
        blur: Probability of a Gaussian blur.
        occlusion: Things in front of the person; None for none.
    """

    rotation_deg: Weight = 30.0
    rotation_max_deg: Weight = 150.0
    scale: Annotated[float, msgspec.Meta(ge=1)] = 1.4
    shift: Share = 0.08
    mirror: Share = 0.5
    color: Share = 0.3
    cutout: Share = 0.3
    blur: Share = 0.1
    occlusion: OcclusionConfig | None = None


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One random view of a person of K joints, with what can be seen of it; lengths are pixels of the crop.

    Attributes:
        crop: (h, w, 3) uint8 BGR.
        keypoints: (K, 2) float32.
        weights: (K,) float32: 0 for joints that are not labelled or fell outside the crop, 1 otherwise. A joint that
            is covered keeps its weight: where it is has to be learned from the others.
        visible: (K,) float32: 1 where the joint can be seen; 0 where it is covered, labelled hidden, or outside of
            the photograph or the crop.
        known: (K,) float32: 1 where `visible` is known, which is where the joint is labelled.
        covered: (h, w) uint8: how much of each pixel was painted over, 0..255.
        uncovered: (h, w, 3) uint8 BGR: the same without what was pasted in front; None if nobody asked for it.
    """

    crop: NDArray[np.uint8]
    keypoints: NDArray[np.float32]
    weights: NDArray[np.float32]
    visible: NDArray[np.float32]
    known: NDArray[np.float32]
    covered: NDArray[np.uint8]
    uncovered: NDArray[np.uint8] | None = None


class Occluding(TypedDict, total=False):
    """What occlusion takes beyond its settings.

    Attributes:
        progress: Share of the run that is done, 0..1, for the curriculum; 1 if left out.
        donors: Other training people, for pieces of photographs; none if left out.
        keep_uncovered: Give the view without the pasted things as well; not if left out.
    """

    progress: float
    donors: Sequence[Patch]
    keep_uncovered: bool


def augment(
    patch: Patch,
    preprocess: Preprocess,
    keypoints: Keypoints,
    config: AugmentConfig,
    rng: np.random.Generator,
    **occluding: Unpack[Occluding],
) -> View:
    """One random view of a person.

    Things are pasted before colours change and blur sets in, so that they look as if they had been there.

    Args:
        patch: The person; not changed.
        preprocess: Size of the crop.
        keypoints: For mirroring and for limbs of other people.
        config: How far views go.
        rng: Of everything random.
        **occluding: Read only where `config.occlusion` is set.
    """
    height, width = preprocess.input_hw
    strength = severity(config.occlusion, occluding.get("progress", 1.0)) if config.occlusion else 0.0
    if config.occlusion:
        patch = truncated(patch, config.occlusion, strength, rng)
    transform = _random_view(crop_transforms(patch.box_xyxy[None], preprocess)[0], (height, width), config, rng)
    points, labels = patch.keypoints[:, :2], patch.keypoints[:, 2]  # 0 not labelled, 1 hidden, 2 visible
    labels = np.where(_inside(patch.keypoints, patch.pixels.shape), labels, np.minimum(labels, 1))
    points = (points @ transform[:, :2].T + transform[:, 2]).astype(np.float32)
    if rng.random() < config.mirror:
        transform[0] = -transform[0]
        transform[0, 2] += width - 1
        points, labels = mirror(points, labels, width, keypoints)
    crop = np.empty((height, width, 3), np.uint8)
    cv2.warpAffine(patch.pixels, transform, (width, height), dst=crop, flags=cv2.INTER_LINEAR)
    inside, covered = _inside(points, crop.shape), np.zeros((height, width), np.uint8)
    uncovered = crop.copy() if occluding.get("keep_uncovered", False) else None
    if config.occlusion:
        size = (patch.box_xyxy[2:] - patch.box_xyxy[:2]) * math.hypot(*transform[:, 0])
        target = Target(crop, covered, points[(labels > 0) & inside], float(np.prod(size)))
        donors = Donors(occluding.get("donors", ()), keypoints.skeleton)
        occlude(target, donors, config.occlusion, strength, rng)
    if uncovered is not None:
        uncovered = _taken(uncovered, config, copy.deepcopy(rng))
    crop = _taken(crop, config, rng)
    if rng.random() < config.cutout:
        covered[_cut_out(crop, rng)] = 255
    visible = (inside & (labels > 1)).astype(np.float32)
    side_px = float((patch.box_xyxy[2:] - patch.box_xyxy[:2]).max() * math.hypot(*transform[:, 0]))
    visible[inside] *= ~joints_covered(covered, points[inside], side_px)
    known = (labels > 0).astype(np.float32)
    return View(crop, points, known * inside, visible, known, covered, uncovered)


def _inside(points: NDArray[np.float32], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """(K,) bool, which of (K, 2 or more) points lie in an image of this shape."""
    within = (points[:, :2] >= 0) & (points[:, :2] <= (shape[1] - 1, shape[0] - 1))
    return np.asarray(within.all(axis=1), np.bool_)


def mirror(
    points: NDArray[np.float32], weights: NDArray[np.float32], width: int, keypoints: Keypoints
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mirror (K, 2) points of a crop `width` wide and swap left and right, weights (K,) too."""
    points, weights = points.copy(), weights.copy()
    points[:, 0] = width - 1 - points[:, 0]
    order = np.arange(len(points))
    for a, b in keypoints.flip_pairs:
        order[[a, b]] = order[[b, a]]
    return points[order], weights[order]


def _random_view(
    transform: NDArray[np.float64], hw: tuple[int, int], config: AugmentConfig, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Rotate, zoom and shift about the centre of the crop."""
    limit = config.rotation_max_deg
    angle = math.radians(float(np.clip(rng.normal(0, config.rotation_deg), -limit, limit)))
    zoom = math.exp(rng.uniform(-1, 1) * math.log(config.scale))
    center = (np.array(hw[::-1]) - 1) / 2
    shift = rng.uniform(-config.shift, config.shift, 2) * hw[::-1]
    linear = zoom * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    view = np.empty((2, 3))
    view[:, :2] = linear @ transform[:, :2]
    view[:, 2] = linear @ (transform[:, 2] - center) + center + shift
    return view


def _taken(crop: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    """As another camera would have taken it: colours and sharpness."""
    crop = _color(crop, config, rng)
    if rng.random() < config.blur:
        crop = cv2.GaussianBlur(crop, (0, 0), rng.uniform(0.5, 1.6)).astype(np.uint8, copy=False)
    return crop


def _color(crop: NDArray[np.uint8], config: AugmentConfig, rng: np.random.Generator) -> NDArray[np.uint8]:
    strength = config.color
    if strength <= 0:
        return crop
    image = crop.astype(np.float32)
    gain = (
        1
        + rng.uniform(-strength, strength, 3).astype(np.float32) * np.float32(0.4)
        + np.float32(rng.uniform(-strength, strength))
    )
    grey = image.mean(axis=2, keepdims=True)
    saturation = np.float32(0.0 if rng.random() < 0.05 else 1 + rng.uniform(-strength, strength))
    image = grey + (image - grey) * saturation
    mean = np.float32(grey.mean())
    contrast = np.float32(1 + rng.uniform(-strength, strength))
    image = ((image - mean) * contrast + mean) * gain
    clipped: NDArray[np.uint8] = np.clip(image, 0, 255, out=image).astype(np.uint8)
    return clipped


def _cut_out(crop: NDArray[np.uint8], rng: np.random.Generator) -> tuple[slice, slice]:
    """Paint a random rectangle; returns its rows and columns."""
    height, width = crop.shape[:2]
    h, w = (rng.uniform(0.1, 0.35, 2) * (height, width)).astype(int)
    y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
    where = slice(y, y + h), slice(x, x + w)
    crop[where] = rng.integers(0, 256, 3, dtype=np.uint8)
    return where
