"""Non-maximum suppression: of the peaks of one heat map, of poses and of boxes that are the same person.

Invariant: what is kept is in order of falling score, ties in the order they came in, and no two kept ones are nearer to
each other than the limit.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError
from edgepose.pose.heatmap import refined_px
from edgepose.pose.metrics import oks
from edgepose.spec import Heatmap

Floats = NDArray[np.float32]


def heatmap_peaks(
    heatmap: NDArray[Any], decoder: Heatmap, *, min_score: float = 0.1, radius_px: float = 8.0, limit: int = 30
) -> tuple[Floats, Floats]:
    """All peaks of one map: the several people of a bottom-up network, or the second thoughts of a top-down one.

    For callers with such networks: `PoseEstimator` crops a person at a time and takes each map's highest peak.

    Args:
        heatmap: (h, w) float, the map of one keypoint.
        decoder: Gives stride and refinement.
        min_score: Lower peaks are none.
        radius_px: Of peaks within this distance, in pixels of the input, the highest stays.
        limit: Peaks at most.

    Returns:
        (P, 2) float32 pixels of the input, and (P,) float32 scores in 0..1, highest first.

    Raises:
        SpecError: `heatmap` has another number of axes, or no cells.
    """
    values = np.ascontiguousarray(heatmap, np.float32)
    if values.ndim != 2 or not values.size:
        raise SpecError("heat map", found=f"shape {values.shape}", expected="(h, w), the map of one keypoint")
    # A peak is as high as the highest of its eight neighbours and itself; of a plateau one cell survives below.
    highest = np.asarray(cv2.dilate(values, np.ones((3, 3), np.uint8)))
    rows, columns = np.nonzero((values == highest) & (values >= min_score))
    by_score = np.argsort(-values[rows, columns], kind="stable")
    cells = np.stack([columns, rows], -1)[by_score]
    points = refined_px(values[None], np.zeros(len(cells), np.intp), cells, decoder)
    kept: list[int] = []
    for candidate in range(len(points)):
        if len(kept) == limit:
            break
        if not kept or (np.hypot(*(points[kept] - points[candidate]).T) > radius_px).all():
            kept.append(candidate)
    scores = np.clip(values[cells[kept, 1], cells[kept, 0]], 0, 1)
    return points[kept], scores


def oks_nms(
    keypoints: NDArray[Any],
    scores: NDArray[Any],
    areas_px2: NDArray[Any],
    sigmas: NDArray[Any],
    *,
    threshold: float = 0.9,
) -> NDArray[np.intp]:
    """Which poses to keep where several are of one person: from the highest score down (Papandreou et al., CVPR 2017).

    Args:
        keypoints: (N, K, 2) float, pixels of the source image; a joint that is not finite is not compared.
        scores: (N,) float, confidence of each pose.
        areas_px2: (N,) float, the person's area in square pixels (of the box, or COCO's share of it).
        sigmas: (K,) float, COCO's k/2.
        threshold: A pose goes if its object keypoint similarity with one that stays is above this. The area is the mean
            of the two, so that the order does not matter.

    Returns:
        (M,) int, rows of the poses that stay, highest score first.

    Raises:
        SpecError: The arrays do not describe the same poses.
    """
    points = np.asarray(keypoints, np.float64)
    shapes = [np.shape(values) for values in (points, scores, areas_px2)]
    if points.ndim != 3 or points.shape[2] != 2 or shapes[1:] != [(len(points),)] * 2:
        raise SpecError("poses to suppress", found=f"shapes {shapes}", expected="[(N, K, 2), (N,), (N,)]")
    areas = np.asarray(areas_px2, np.float64)
    remaining = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    kept: list[int] = []
    while len(remaining):
        best, others = remaining[0], remaining[1:]
        kept.append(int(best))
        offsets = points[others] - points[best]
        distances = np.where(np.isfinite(offsets).all(-1), np.hypot(offsets[..., 0], offsets[..., 1]), np.nan)
        similarity = oks(distances, (areas[others] + areas[best]) / 2, np.asarray(sigmas))
        remaining = others[~(similarity > threshold)]  # NaN, where no joint can be compared, stays
    return np.array(kept, np.intp)


def box_ious(first: NDArray[Any], second: NDArray[Any]) -> NDArray[np.float64]:
    """Intersection over union of each of (N, 4) xyxy boxes with each of (M, 4): (N, M), 0 where a box is empty."""
    a, b = (np.asarray(boxes, np.float64).reshape(-1, 4) for boxes in (first, second))
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    both = np.maximum(high - low, 0).prod(-1)
    areas = [np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(-1) for boxes in (a, b)]
    union = areas[0][:, None] + areas[1][None] - both
    ious: NDArray[np.float64] = np.divide(both, union, out=np.zeros_like(both), where=union > 0)
    return ious


def box_nms(boxes: NDArray[Any], scores: NDArray[Any], *, max_iou: float) -> NDArray[np.intp]:
    """Which boxes to keep where several are of one thing: from the highest score down, without those that overlap it.

    Args:
        boxes: (N, 4) float xyxy.
        scores: (N,) float.
        max_iou: A box goes if it overlaps one that stays by more than this (intersection over union).

    Returns:
        (M,) int, rows of the boxes that stay, highest score first.

    Raises:
        SpecError: The arrays do not describe the same boxes.
    """
    shapes = np.shape(boxes), np.shape(scores)
    if len(shapes[0]) != 2 or shapes[0][1] != 4 or shapes[1] != shapes[0][:1]:
        raise SpecError("boxes to suppress", found=f"shapes {list(shapes)}", expected="[(N, 4), (N,)]")
    remaining = np.argsort(-np.asarray(scores, np.float64), kind="stable")
    kept: list[int] = []
    while len(remaining):
        best, remaining = remaining[0], remaining[1:]
        kept.append(int(best))
        remaining = remaining[box_ious(boxes[best], boxes[remaining])[0] <= max_iou]
    return np.array(kept, np.intp)
