"""Poses as COCO keypoint results, the form that pycocotools and its kin read.

Invariant: every number is finite, since JSON knows no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def result_rows(
    image_ids: Sequence[int],
    keypoints: NDArray[Any],
    scores: NDArray[Any],
    boxes: NDArray[Any],
    *,
    category_id: int = 1,
) -> list[dict[str, Any]]:
    """Predictions as COCO keypoint results, one row per person.

    Each row holds image_id, category_id, keypoints [x, y, score] · K in pixels of the source image, score (the mean of
    the joints' scores) and bbox [x, y, width, height], the box that was cropped. A joint that was not predicted stands
    at 0, 0 with score 0, since JSON has no NaN.

    Args:
        image_ids: N of them.
        keypoints: (N, K, 2) float, pixels.
        scores: (N, K) float.
        boxes: (N, 4) float xyxy, pixels.
        category_id: Of people.
    """
    points = np.nan_to_num(keypoints, nan=0.0)
    triples = np.concatenate([points, scores[..., None]], axis=-1).reshape(len(points), -1).astype(np.float64)
    xywh = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64)
    return [
        {
            "image_id": int(image_id),
            "category_id": category_id,
            "keypoints": triples[row].tolist(),
            "score": float(scores[row].mean(dtype=np.float64)),
            "bbox": xywh[row].tolist(),
        }
        for row, image_id in enumerate(image_ids)
    ]
