"""The poses in the frames of `run`: who looks for people, several frames at once, from one frame to the next.

Invariant: poses come in the order of their frames, and an error of a frame or its boxes names the frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgepose.cli.boxes import BoxFile
from edgepose.errors import AnnotationError, ImageError
from edgepose.estimator import PoseEstimator
from edgepose.pose.smoothing import OneEuro
from edgepose.spec import Poses
from edgepose.tracker import PoseTracker, TrackerOptions, distinct, inside, sigmas_or_none
from edgepose.video.sources import Shot, Source

if TYPE_CHECKING:
    from concurrent.futures import Future

_AT_ONCE = 3


@dataclass(frozen=True, slots=True)
class Following:
    """What the flags say of people from one frame to the next, and of one person found twice."""

    track: bool
    smooth: bool
    max_oks: float | None

    @property
    def options(self) -> TrackerOptions:
        """For a tracker."""
        duplicates = TrackerOptions().max_oks if self.max_oks is None and self.track else self.max_oks
        return TrackerOptions(follow=self.track, max_oks=duplicates, smooth=OneEuro() if self.smooth else None)


@dataclass(frozen=True, slots=True)
class Finders:
    """Who finds people and poses in the frames.

    Attributes:
        estimator: Finds poses.
        finder: Finds people; None for nobody.
        people: Where people are, where a file says so.
        following: What the flags say of people from one frame to the next.
    """

    estimator: PoseEstimator
    finder: PoseEstimator | None
    people: BoxFile | None
    following: Following

    def boxes(self, shot: Shot) -> list[tuple[float, float, float, float]] | None:
        """Where people are in a frame, as the file says; None without one."""
        return None if self.people is None else self.people.of(shot.name, shot.number)


def found_in(frames: Iterator[Shot], source: Source, finders: Finders) -> Iterator[tuple[Shot, Poses]]:
    """The poses of each frame, in order."""
    following, estimator = finders.following, finders.estimator
    if following.track or following.smooth:
        tracker = PoseTracker(estimator, finders.finder, following.options)
        for shot in frames:
            with _naming(shot):
                poses = tracker(shot.frame, shot.time_s, finders.boxes(shot))
            yield shot, poses
        return
    sigmas = sigmas_or_none(estimator.spec.keypoints) if following.max_oks is not None else None
    for shot, poses in _answered(frames, source, finders):
        yield shot, poses if sigmas is None else poses.take(distinct(poses, sigmas, following.max_oks or 0.0))


def _answered(frames: Iterator[Shot], source: Source, finders: Finders) -> Iterator[tuple[Shot, Poses]]:
    """Each frame's poses on their own; some frames of a video are worked on at once."""
    pending: deque[tuple[Shot, Future[Poses]]] = deque()
    finder, estimator = finders.finder, finders.estimator
    at_once = _AT_ONCE if source.kind in ("folder", "video") else 1
    for shot in frames:
        with _naming(shot):
            boxes = finders.boxes(shot) if finder is None else inside(finder(shot.frame).boxes, shot.frame)
        pending.append((shot, estimator.submit(shot.frame, boxes)))
        if len(pending) >= at_once:
            yield _result(*pending.popleft())
    while pending:
        yield _result(*pending.popleft())


def _result(shot: Shot, future: Future[Poses]) -> tuple[Shot, Poses]:
    with _naming(shot):
        return shot, future.result()


@contextmanager
def _naming(shot: Shot) -> Iterator[None]:
    """Errors of boxes and frames name the frame."""
    try:
        yield
    except (AnnotationError, ImageError) as err:
        if not err.where.startswith(("boxes", "frame")):
            raise
        where = shot.name if shot.number is None else f"{shot.name}: frame {shot.number}"
        raise type(err)(f"{where}: {err.where}", found=err.found, expected=err.expected, fix=err.fix) from err
