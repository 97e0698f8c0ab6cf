"""The part of a photograph around one labelled person: all that training keeps in memory of it.

Invariant: a patch's box and keypoints are in pixels of the patch, so that cutting or shrinking it never moves them on
the person.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.data.coco import Person, read_image
from edgepose.errors import AnnotationError
from edgepose.pose.preprocess import crop_transforms
from edgepose.spec import Preprocess


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
