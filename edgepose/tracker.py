"""Poses of a video: who is who, where to look next, joints that rest while people do.

A network that is shown one person at a time needs somebody who says where the people are. In a video that is the frame
before: people are looked for around the joints they had, and a detector is asked now and then for those who came.

Invariant: a frame that raises changes nothing of what is remembered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgepose.errors import SpecError, UsageError
from edgepose.estimator import PoseEstimator
from edgepose.pose.metrics import AREA_OF_BOX, oks_sigmas
from edgepose.pose.nms import box_ious, oks_nms
from edgepose.pose.smoothing import OneEuro, SmoothingState, smooth_people
from edgepose.pose.tracking import Tracking, TrackingState, best_pairs, identify, joint_boxes
from edgepose.spec import Keypoints, OneStage, Poses

Detector = Callable[[NDArray[np.uint8]], Poses]
"""(H, W, 3) uint8 BGR frame → the boxes of its people; a `PoseEstimator` of a one-stage network or box detector is."""

_SAME_PERSON_IOU = 0.3


class TrackerOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How people are followed.

    Attributes:
        follow: Whether people are looked for where they were in the frame before; otherwise each frame is on its own.
        detect_every: Frames from one look of the detector to the next; it also looks where somebody got lost.
        min_score: Joints below it are not trusted.
        margin: Room around the joints of the frame before, as a share of the person's larger side.
        max_oks: Where poses are more alike than this (OKS) they are one person's; None keeps all.
        smooth: The filter on the joints; None for none.
        tracking: When people of two frames are the same.
    """

    follow: bool = True
    detect_every: int = 10
    min_score: float = 0.3
    margin: float = 0.1
    max_oks: float | None = 0.8
    smooth: OneEuro | None = OneEuro()
    tracking: Tracking = Tracking()

    def __post_init__(self) -> None:
        """Refuses what would never look or never trust."""
        if self.detect_every < 1 or not (0 <= self.min_score < 1 and self.margin >= 0):
            expected = "detect_every from 1, min_score in 0..1, a margin from 0"
            raise UsageError("tracker", found=f"{self}", expected=expected)


@dataclass(frozen=True, slots=True)
class _Memory:
    """What is remembered of the last frame.

    Attributes:
        shape: Height and width of the frame.
        regions: (N, 4) float64 xyxy where people are looked for next.
        since: Frames since the detector looked; None if it is to look next.
        people: Who they were.
        joints: What smoothing remembers.
    """

    shape: tuple[int, ...] = ()
    regions: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 4)))
    since: int | None = None
    people: TrackingState = field(default_factory=TrackingState)
    joints: SmoothingState = field(default_factory=SmoothingState)


class PoseTracker:
    """Follows the people of one video; a second video takes a second tracker, both may share the estimator.

    Args:
        estimator: Finds poses; the caller closes it.
        detector: Finds people; None begins with the whole frame, and does so again where everybody got lost.
        options: How people are followed.

    Raises:
        UsageError: A detector for a network that finds its people itself.
    """

    def __init__(
        self, estimator: PoseEstimator, detector: Detector | None = None, options: TrackerOptions | None = None
    ) -> None:
        self._alone = isinstance(estimator.spec.decoder, OneStage)
        if self._alone and detector is not None:
            found = f"{estimator.spec.name}, which finds people itself"
            raise UsageError("detector", found=found, expected="a network that is shown one person", fix="leave it out")
        self._estimator, self._detector = estimator, detector
        self._options = options or TrackerOptions()
        self._sigmas = sigmas_or_none(estimator.spec.keypoints)
        self._memory = _Memory()

    def __call__(self, frame: NDArray[np.uint8], time_s: float, boxes: ArrayLike | None = None) -> Poses:
        """Finds the people of the next frame.

        Args:
            frame: (H, W, 3) uint8 BGR. A frame of another size begins a new scene: regions are forgotten.
            time_s: When it was taken, in seconds; later than the last one.
            boxes: (N, 4) xyxy where the people of this frame are, where somebody knows; nobody is looked for then.

        Returns:
            Poses with `ids`. Who is followed and of whom fewer than three joints are trusted is lost, and left out.

        Raises:
            UsageError: Time does not go forward.
            BadInput: As the estimator.
        """
        memory, options = self._memory, self._options
        if frame.shape[:2] != memory.shape:
            memory = replace(memory, shape=frame.shape[:2], regions=np.empty((0, 4)), since=None)
        where, since = self._where(frame, memory) if boxes is None else (None, memory.since)
        poses = self._estimator(frame, where if boxes is None else boxes)
        around = joint_boxes(poses.keypoints, poses.scores, min_score=options.min_score, margin=options.margin)
        if boxes is None and options.follow:
            here = np.isfinite(around).all(axis=1)
            if since and not here.all():  # somebody who was followed; what the detector has just found may be nobody
                since = None
            poses, around = poses.take(np.flatnonzero(here)), around[here]
        if options.max_oks is not None:
            kept = distinct(poses, self._sigmas, options.max_oks)
            poses, around = poses.take(kept), around[kept]
        poses, memory = self._known(poses, time_s, memory)
        regions = inside(around, frame) if options.follow else memory.regions
        self._memory = replace(memory, regions=regions, since=since)
        return poses

    def _where(self, frame: NDArray[np.uint8], memory: _Memory) -> tuple[NDArray[Any] | None, int | None]:
        """Boxes to look at, None for the whole frame; and how many frames ago the detector looked."""
        if self._alone:
            return None, None
        if self._detector is None:
            return (memory.regions if len(memory.regions) else None), None
        every = self._options.detect_every if self._options.follow else 1
        if memory.since is not None and memory.since + 1 < every and len(memory.regions):
            return memory.regions, memory.since + 1
        found = inside(self._detector(frame).boxes, frame)
        pairs = best_pairs(box_ious(memory.regions, found), _SAME_PERSON_IOU)
        unseen = [row for row in range(len(memory.regions)) if row not in pairs]
        return np.concatenate([found, memory.regions[unseen]]), 0

    def _known(self, poses: Poses, time_s: float, memory: _Memory) -> tuple[Poses, _Memory]:
        """The poses with identities, and smoothed."""
        options = self._options
        ids, people = identify(
            memory.people, poses.keypoints, poses.boxes, time_s, self._sigmas, config=options.tracking
        )  # of what was found, not of what was smoothed: that lags
        poses = replace(poses, ids=ids)
        if options.smooth is None:
            return poses, replace(memory, people=people)
        points, joints = smooth_people(memory.joints, ids.tolist(), poses.keypoints, time_s, options.smooth)
        return replace(poses, keypoints=points), replace(memory, people=people, joints=joints)


def inside(boxes: NDArray[Any], frame: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Those of (N, 4) xyxy boxes of which something is left when they are cut off at the frame's borders, cut off."""
    height, width = frame.shape[:2]
    cut = np.clip(np.asarray(boxes, np.float64), 0, [width, height, width, height])
    left: NDArray[np.float64] = cut[(cut[:, 2] - cut[:, 0] >= 2) & (cut[:, 3] - cut[:, 1] >= 2)]  # not NaN either
    return left


def distinct(poses: Poses, sigmas: NDArray[np.float64] | None, max_oks: float) -> NDArray[np.intp]:
    """Rows of the poses that are left where those too alike are one person's, in their order.

    Args:
        poses: The people of a frame.
        sigmas: (K,) float, COCO's k/2; None compares nothing.
        max_oks: Of poses more alike than this the most confident stays.
    """
    if sigmas is None:
        return np.arange(len(poses))
    areas_px2 = AREA_OF_BOX * (poses.boxes[:, 2:] - poses.boxes[:, :2]).astype(np.float64).prod(axis=1)
    return np.sort(oks_nms(poses.keypoints, poses.scores.mean(axis=1), areas_px2, sigmas, threshold=max_oks))


def sigmas_or_none(keypoints: Keypoints) -> NDArray[np.float64] | None:
    """The sigmas of a keypoint set, None where nobody knows them."""
    try:
        return oks_sigmas(keypoints)
    except SpecError:
        return None
