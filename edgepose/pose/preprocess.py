"""From a frame and person boxes to the network's input, and back.

Invariant: `to_source` inverts `apply_transforms` (affine, in double precision); integer coordinates are pixel centres.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.spec import ModelSpec, Preprocess


def crop_transforms(boxes: NDArray[np.floating], preprocess: Preprocess) -> NDArray[np.float64]:
    """The affine maps that cut each box out of the source image.

    The box's short side is widened to the input's aspect, both sides are multiplied by `preprocess.padding`, and the
    box's centre lands on the input's centre; there is no rotation.

    Args:
        boxes: (N, 4) xyxy, pixels of the source image.
        preprocess: Input size and padding.

    Returns:
        (N, 2, 3) float64, source → input.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    height, width = preprocess.input_hw
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    size = (boxes[:, 2:] - boxes[:, :2]) * preprocess.padding
    crop_width = np.maximum(size[:, 0], size[:, 1] * width / height)
    scale = width / crop_width
    transforms = np.zeros((len(boxes), 2, 3))
    transforms[:, 0, 0] = transforms[:, 1, 1] = scale
    transforms[:, 0, 2] = (width - 1) / 2 - scale * center[:, 0]
    transforms[:, 1, 2] = (height - 1) / 2 - scale * center[:, 1]
    return transforms


def warp(
    frame: NDArray[np.uint8], transforms: NDArray[np.float64], input_hw: tuple[int, int], border: int = 0
) -> NDArray[np.uint8]:
    """Cut crops out of a frame, bilinearly.

    Args:
        frame: (H, W, 3) uint8 BGR.
        transforms: (N, 2, 3), source → input.
        input_hw: Height and width of each crop.
        border: Grey value of what lies outside the frame.

    Returns:
        (N, h, w, 3) uint8 BGR.
    """
    height, width = input_hw
    crops = np.empty((len(transforms), height, width, 3), np.uint8)
    for crop, transform in zip(crops, transforms, strict=True):
        cv2.warpAffine(
            frame, transform, (width, height), dst=crop, flags=cv2.INTER_LINEAR, borderValue=(border, border, border)
        )
    return crops


def normalise(crops: NDArray[np.uint8], preprocess: Preprocess) -> NDArray[np.float32]:
    """Crops to the network's input tensor.

    Args:
        crops: (N, h, w, 3) uint8 BGR.
        preprocess: Channel order, mean and standard deviation.

    Returns:
        (N, 3, h, w) float32, C-contiguous.
    """
    planes = crops.transpose(0, 3, 1, 2)
    if preprocess.color == "rgb":
        planes = planes[:, ::-1]
    scale = (1.0 / np.array(preprocess.std, np.float32)).reshape(1, 3, 1, 1)
    shift = (np.array(preprocess.mean, np.float32)).reshape(1, 3, 1, 1) * scale
    tensor: NDArray[np.float32] = np.multiply(planes, scale, dtype=np.float32, order="C")
    tensor -= shift
    return tensor


def network_input(crops: NDArray[np.uint8], spec: ModelSpec) -> NDArray[Any]:
    """What a network is fed: the crops (N, h, w, 3) uint8 BGR themselves, or (N, 3, h, w) float32."""
    return crops if spec.takes_images else normalise(crops, spec.preprocess)


def apply_transforms(keypoints: NDArray[np.floating], transforms: NDArray[np.float64]) -> NDArray[np.float32]:
    """Map (N, K, 2) points through (N, 2, 3) affine maps, source → input."""
    points = np.asarray(keypoints, np.float64)
    mapped: NDArray[np.float64] = np.einsum("nij,nkj->nki", transforms[:, :, :2], points) + transforms[:, None, :, 2]
    return mapped.astype(np.float32)


def to_source(keypoints: NDArray[np.floating], transforms: NDArray[np.float64]) -> NDArray[np.float32]:
    """Map (N, K, 2) points of the input crops back to pixels of the source image (inverse of `apply_transforms`)."""
    points = np.asarray(keypoints, np.float64) - transforms[:, None, :, 2]
    inverse = np.linalg.inv(transforms[:, :, :2])
    mapped: NDArray[np.float64] = np.einsum("nij,nkj->nki", inverse, points)
    return mapped.astype(np.float32)
