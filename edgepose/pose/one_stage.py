"""People found in a whole frame at once: which candidates of a one-stage network are people, and whose they are.

Invariant: coordinates in and out of `candidates` differ by 0.5: a network measures from the outer edge of the first
pixel, everything else from its centre.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError
from edgepose.pose.nms import box_ious, box_nms
from edgepose.spec import OneStage

Floats = NDArray[np.float32]

_MOST = 1000  # candidates of one frame that are compared with each other, the best ones
_SAME_PERSON_IOU = 0.3  # a box asked for and a box found overlap by this at least where they are one person's


class Candidates(NamedTuple):
    """What a network says of N frames, A candidates each.

    Attributes:
        boxes: (N, A, 4) float32 x1 y1 x2 y2, pixels of the input, centres are integers.
        scores: (N, A) float32.
        keypoints: (N, A, K, 2) float32, the same pixels.
        keypoint_scores: (N, A, K) float32.
    """

    boxes: Floats
    scores: Floats
    keypoints: Floats
    keypoint_scores: Floats


class People(NamedTuple):
    """The P people of one frame, most confident first; as `Candidates` without the first axis."""

    boxes: Floats
    scores: Floats
    keypoints: Floats
    keypoint_scores: Floats


def candidates(boxes: Floats, scores: Floats, keypoints: Floats | None, keypoint_scores: Floats | None) -> Candidates:
    """A network's outputs as candidates.

    Args:
        boxes: (N, A, 4) x1 y1 x2 y2, measured from the outer edge of the input's first pixel.
        scores: (N, A).
        keypoints: (N, A, K, 2), measured likewise; None takes each box's first and last corner.
        keypoint_scores: (N, A, K); None gives every keypoint its candidate's score.

    Raises:
        SpecError: They are not of the same candidates.
    """
    half = np.float32(0.5)
    centred = boxes - half
    points = centred.reshape(*boxes.shape[:2], 2, 2) if keypoints is None else keypoints - half
    shape = points.shape[:3]
    sure = np.broadcast_to(scores[..., None], (*scores.shape, shape[2])) if keypoint_scores is None else keypoint_scores
    if scores.shape != shape[:2] or boxes.shape[:2] != shape[:2] or sure.shape != shape:
        found = f"boxes {boxes.shape}, scores {scores.shape}, keypoints {points.shape}, their scores {sure.shape}"
        raise SpecError("decoder: candidates", found=found, expected="outputs of the same candidates")
    return Candidates(centred, scores, points, np.clip(sure, 0, 1).astype(np.float32))


def best_candidate(found: Candidates) -> tuple[Floats, Floats]:
    """Each frame's most confident candidate, whatever its score: (N, K, 2) keypoints and (N, K) scores.

    NaN and 0 where a network that suppresses duplicates itself has no candidate at all.
    """
    count, most, joints = found.keypoint_scores.shape
    if most == 0:
        return np.full((count, joints, 2), np.nan, np.float32), np.zeros((count, joints), np.float32)
    rows, best = np.arange(count), np.where(np.isfinite(found.scores), found.scores, -np.inf).argmax(1)
    return found.keypoints[rows, best], found.keypoint_scores[rows, best]


def people_of(found: Candidates, frame: int, decoder: OneStage) -> People:
    """The people of one frame: confident candidates, duplicates gone.

    Args:
        found: What the network says.
        frame: Which of the N frames.
        decoder: Gives the least score and the largest overlap.
    """
    scores = found.scores[frame]
    rows = np.flatnonzero(scores >= decoder.min_score)  # false for NaN
    rows = rows[np.argsort(-scores[rows], kind="stable")][:_MOST]
    rows = rows[box_nms(found.boxes[frame, rows], scores[rows], max_iou=decoder.max_iou)]
    return People(
        found.boxes[frame, rows], scores[rows], found.keypoints[frame, rows], found.keypoint_scores[frame, rows]
    )


def owners(wanted: NDArray[Any], found: NDArray[Any]) -> NDArray[np.intp]:
    """Which of the boxes found belongs to each box asked for: pairs are made from the largest overlap down.

    Args:
        wanted: (N, 4) xyxy.
        found: (P, 4) xyxy, the same pixels.

    Returns:
        (N,) int rows of `found`, each at most once; -1 where none overlaps enough.
    """
    ious = box_ious(wanted, found)
    rows = np.full(len(wanted), -1, np.intp)
    for place in np.argsort(-ious, axis=None, kind="stable"):
        asked, candidate = divmod(int(place), max(len(found), 1))
        if ious[asked, candidate] < _SAME_PERSON_IOU:
            break
        if rows[asked] < 0 and candidate not in rows:
            rows[asked] = candidate
    return rows
