"""Who is who from one frame of a video to the next, and where to look for them there.

People are matched by how alike their poses are (OKS) and how much their boxes overlap, best pair first. People move
little between frames, which is why there is neither a motion model nor an optimal assignment; where people cross behind
each other they may swap numbers, and telling them apart would need their looks.

Invariant: pure functions over arrays; a state that is handed in is never changed, and no two people of a frame share an
identity, nor does a new person get one that was somebody's before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError, UsageError
from edgepose.pose.metrics import AREA_OF_BOX, oks
from edgepose.pose.nms import box_ious


class Tracking(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the matching.

    Attributes:
        min_similarity: People of two frames less alike than this are two people: the larger of the OKS of their poses
            and the overlap (IoU) of their boxes.
        forget_after_s: Somebody who was not seen for longer is somebody new when they come back.
    """

    min_similarity: float = 0.3
    forget_after_s: float = 1.0

    def __post_init__(self) -> None:
        """Refuses limits that would match everybody or nobody."""
        if not (0 < self.min_similarity <= 1 and self.forget_after_s >= 0):
            raise UsageError("tracking", found=f"{self}", expected="a similarity in 0..1, above 0, and a time from 0")


@dataclass(frozen=True, slots=True, eq=False)
class Tracked:
    """What is remembered of one person.

    Attributes:
        identity: Their number, from 1.
        keypoints: (K, 2) float, pixels, when they were last seen; NaN for joints that were not found.
        box: (4,) float xyxy, pixels, likewise.
        time_s: When that was.
    """

    identity: int
    keypoints: NDArray[Any]
    box: NDArray[Any]
    time_s: float


@dataclass(frozen=True, slots=True, eq=False)
class TrackingState:
    """What is remembered of everybody; `TrackingState()` starts, and starts over."""

    people: tuple[Tracked, ...] = ()
    given: int = 0


def identify(
    state: TrackingState,
    keypoints: NDArray[Any],
    boxes: NDArray[Any],
    time_s: float,
    sigmas: NDArray[Any] | None,
    *,
    config: Tracking = Tracking(),  # noqa: B008 - frozen
) -> tuple[NDArray[np.int64], TrackingState]:
    """Says who the people of a frame are.

    Args:
        state: What the last frame returned.
        keypoints: (N, K, 2) float, pixels of the frame; NaN where a joint was not found.
        boxes: (N, 4) float xyxy, pixels of the frame.
        time_s: When the frame was taken, in seconds.
        sigmas: (K,) float, COCO's k/2 of each keypoint; None compares boxes alone.
        config: The limits.

    Returns:
        (N,) int64 identities from 1, and the state for the next frame.

    Raises:
        SpecError: The arrays do not describe the same people.
    """
    points, corners = np.asarray(keypoints, np.float64), np.asarray(boxes, np.float64)
    if points.ndim != 3 or points.shape[2] != 2 or corners.shape != (len(points), 4):
        found = f"keypoints {points.shape}, boxes {corners.shape}"
        raise SpecError("people to track", found=found, expected="(N, K, 2) and (N, 4)")
    known = [person for person in state.people if time_s - person.time_s <= config.forget_after_s]
    alike = _similarity(known, points, corners, sigmas)
    owners = best_pairs(alike, config.min_similarity)
    identities, given = np.zeros(len(points), np.int64), state.given
    for row in range(len(points)):
        if row in owners:
            identities[row] = known[owners[row]].identity
        else:
            given += 1
            identities[row] = given
    seen = [
        Tracked(int(identity), point, box, time_s)
        for identity, point, box in zip(identities, points, corners, strict=True)
    ]
    absent = [person for column, person in enumerate(known) if column not in owners.values()]
    return identities, TrackingState((*seen, *absent), given)


def best_pairs(similarity: NDArray[np.float64], minimum: float) -> dict[int, int]:
    """Pairs of rows and columns, the most similar first, each row and column at most once.

    Args:
        similarity: (N, M) float.
        minimum: Less similar ones are no pairs.

    Returns:
        Column by row.
    """
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    rows, columns = np.nonzero(similarity >= minimum)
    for best in np.argsort(-similarity[rows, columns], kind="stable"):
        row, column = int(rows[best]), int(columns[best])
        if row not in pairs and column not in taken:
            pairs[row] = column
            taken.add(column)
    return pairs


def joint_boxes(
    keypoints: NDArray[Any], scores: NDArray[Any], *, min_score: float, margin: float, min_joints: int = 3
) -> NDArray[np.float64]:
    """Where to look for people in the next frame: boxes around their joints, with room to move.

    Args:
        keypoints: (N, K, 2) float, pixels.
        scores: (N, K) float, 0..1.
        min_score: Joints below it are not trusted.
        margin: Room on every side, as a share of the larger side of the joints' extent.
        min_joints: With fewer joints that are trusted somebody is lost; of networks with fewer joints, all have to be.

    Returns:
        (N, 4) float64 xyxy, pixels; NaN for those who are lost.
    """
    points = np.asarray(keypoints, np.float64)
    sure = (np.asarray(scores) >= min_score) & np.isfinite(points).all(-1)
    low = np.where(sure[..., None], points, np.inf).min(axis=1, initial=np.inf)
    high = np.where(sure[..., None], points, -np.inf).max(axis=1, initial=-np.inf)
    found = sure.sum(axis=1) >= min(min_joints, points.shape[1])
    extent = np.where(found, (high - low).max(axis=1, initial=0.0), np.nan)
    found &= extent > 0
    room = margin * extent[:, None]
    boxes: NDArray[np.float64] = np.where(found[:, None], np.concatenate([low - room, high + room], axis=1), np.nan)
    return boxes


def _similarity(
    known: Sequence[Tracked], points: NDArray[np.float64], boxes: NDArray[np.float64], sigmas: NDArray[Any] | None
) -> NDArray[np.float64]:
    """(N, M): of N people of a frame with each of M who are known."""
    if not known or not len(points):
        return np.zeros((len(points), len(known)))
    boxes_before = np.stack([person.box for person in known])
    overlaps = box_ious(boxes, boxes_before)
    if sigmas is None:
        return overlaps
    before = np.stack([person.keypoints for person in known])
    areas, areas_before = (AREA_OF_BOX * (b[:, 2:] - b[:, :2]).prod(axis=1) for b in (boxes, boxes_before))
    offsets = points[:, None] - before[None]
    distances = np.where(np.isfinite(offsets).all(-1), np.hypot(offsets[..., 0], offsets[..., 1]), np.nan)
    pairs = distances.reshape(-1, distances.shape[-1])
    poses = oks(pairs, ((areas[:, None] + areas_before[None]) / 2).reshape(-1), sigmas).reshape(overlaps.shape)
    similarity: NDArray[np.float64] = np.fmax(poses, overlaps)  # of NaN and a number, the number
    return similarity
