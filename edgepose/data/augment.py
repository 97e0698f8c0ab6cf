"""Random views of a labelled person: rotation, scale, shift, mirror, colour, cut-out.

Invariant: all randomness comes from the generator handed in, so a sample is a function of (seed, epoch, person).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.data.coco import Person, read_image
from edgepose.errors import AnnotationError
from edgepose.pose.preprocess import crop_transforms
from edgepose.spec import Keypoints, Preprocess


class AugmentConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far random views go.

    Attributes:
        rotation_deg: Standard deviation of the rotation.
        rotation_max_deg: Largest rotation.
        scale: Largest zoom factor in either direction.
        shift: Largest shift as a share of the crop.
        mirror: Probability of mirroring.
        color: Strength of brightness, contrast and saturation changes, 0..1.
        cutout: Probability of covering a random rectangle.
        blur: Probability of a Gaussian blur.
    """

    rotation_deg: float = 30.0
    rotation_max_deg: float = 150.0
    scale: float = 1.4
    shift: float = 0.08
    mirror: float = 0.5
    color: float = 0.3
    cutout: float = 0.3
    blur: float = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """The part of a photograph around one person, small enough to keep in memory.

    Attributes:
        pixels: (h, w, 3) uint8 BGR.
        box_xyxy: (4,) float64, pixels of the patch.
        keypoints: (K, 3) float32 x, y, v; pixels of the patch.
    """

    pixels: NDArray[np.uint8]
    box_xyxy: NDArray[np.float64]
    keypoints: NDArray[np.float32]


_MARGIN = 1.76  # times the crop: as far as zoom and shift together can look, but for the corners of rotated views
_OVERSAMPLE = 2.0  # patches are kept at up to this many pixels per input pixel


def cut_patch(person: Person, preprocess: Preprocess) -> Patch:
    """Read a photograph and keep what augmentation can see of one person.

    Raises:
        ImageError: The photograph cannot be read.
        AnnotationError: The person's box lies outside it.
    """
    frame = read_image(person.image)
    box = person.box_xyxy
    zoom = float(crop_transforms(box[None], preprocess)[0, 0, 0])  # input pixels per pixel of the photograph
    center, half = (box[:2] + box[2:]) / 2, max(preprocess.input_hw) / zoom / 2 * _MARGIN
    low = np.maximum(np.floor(center - half), 0).astype(int)
    high = np.minimum(np.ceil(center + half) + 1, frame.shape[1::-1]).astype(int)
    if (box[:2] >= frame.shape[1::-1]).any() or (box[2:] <= 0).any():
        raise AnnotationError(
            f"{person.image}: annotation {person.annotation_id}: bbox",
            found=f"{', '.join(f'{v:g}' for v in person.bbox_xywh)} (x, y, width, height)",
            expected=f"a box that meets the photograph of {frame.shape[1]} x {frame.shape[0]} pixels",
            fix="correct or remove the annotation",
        )
    pixels: NDArray[np.uint8] = frame[low[1] : high[1], low[0] : high[0]]
    scale = min(1.0, _OVERSAMPLE * zoom)
    if scale * min(pixels.shape[:2]) < 1:  # a box far larger than the photograph, which then is a speck in the crop
        scale = 1.0
    if scale < 1:
        pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
    offset = np.array([low[0], low[1]])

    def into_patch(points: NDArray[np.floating]) -> NDArray[np.float64]:
        return np.asarray((points - offset + 0.5) * scale - 0.5, np.float64)

    keypoints = person.keypoints.copy()
    keypoints[:, :2] = into_patch(keypoints[:, :2])
    corners = into_patch(box.reshape(2, 2)).reshape(4)
    return Patch(np.ascontiguousarray(pixels), corners, keypoints)


def augment(
    patch: Patch, preprocess: Preprocess, keypoints: Keypoints, config: AugmentConfig, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]:
    """One random view of a person.

    Returns:
        Crop (h, w, 3) uint8 BGR, keypoints (K, 2) float32 in pixels of the crop, weights (K,) float32: 0 for joints
        that are not labelled or fell outside the crop, 1 otherwise.
    """
    height, width = preprocess.input_hw
    transform = _random_view(crop_transforms(patch.box_xyxy[None], preprocess)[0], (height, width), config, rng)
    points, weights = patch.keypoints[:, :2], (patch.keypoints[:, 2] > 0).astype(np.float32)
    points = (points @ transform[:, :2].T + transform[:, 2]).astype(np.float32)
    if rng.random() < config.mirror:
        transform[0] = -transform[0]
        transform[0, 2] += width - 1
        points, weights = mirror(points, weights, width, keypoints)
    crop = np.empty((height, width, 3), np.uint8)
    cv2.warpAffine(patch.pixels, transform, (width, height), dst=crop, flags=cv2.INTER_LINEAR)
    crop = _color(crop, config, rng)
    if rng.random() < config.blur:
        crop = cv2.GaussianBlur(crop, (0, 0), rng.uniform(0.5, 1.6)).astype(np.uint8, copy=False)
    if rng.random() < config.cutout:
        _cut_out(crop, rng)
    inside = ((points >= 0) & (points <= (width - 1, height - 1))).all(1)
    return crop, points, weights * inside


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


def _cut_out(crop: NDArray[np.uint8], rng: np.random.Generator) -> None:
    height, width = crop.shape[:2]
    h, w = (rng.uniform(0.1, 0.35, 2) * (height, width)).astype(int)
    y, x = int(rng.integers(0, height - h)), int(rng.integers(0, width - w))
    crop[y : y + h, x : x + w] = rng.integers(0, 256, 3, dtype=np.uint8)
