"""The one-euro filter for keypoints of a video: steady while they rest, prompt when they move.

Casiez, Roussel and Vogel, CHI 2012: a first-order low-pass whose cutoff frequency grows with the speed. It is
applied to each coordinate on its own, as in the paper.

Invariant: a step is a pure function of the state it is given; what it returns lies between the last smoothed value and
the new one.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError, UsageError

Floats = NDArray[np.float64]


class OneEuro(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the filter.

    Attributes:
        min_cutoff_hz: Cutoff at rest: lower is steadier.
        beta: Cutoff gained per speed, in hertz per (pixel per second): higher lags less. Speeds grow with the size of
            the person, so divide by it where people of very different sizes are smoothed.
        speed_cutoff_hz: Cutoff of the low-pass on the speed itself.
        forget_after_s: A joint unseen for longer starts anew.
    """

    min_cutoff_hz: float = 1.0
    beta: float = 0.05
    speed_cutoff_hz: float = 1.0
    forget_after_s: float = 0.5

    def __post_init__(self) -> None:
        """Refuses what would make the filter grow instead of settle, or say that nothing is a number."""
        positive = 0 < self.min_cutoff_hz < np.inf and 0 < self.speed_cutoff_hz < np.inf and self.forget_after_s > 0
        if not (positive and 0 <= self.beta < np.inf):
            expected = "finite cutoffs above 0, a time above 0, beta at least 0 and finite"
            raise UsageError("one-euro filter", found=f"{self}", expected=expected)


@dataclass(frozen=True, slots=True, eq=False)
class Track:
    """What is remembered of one person.

    Attributes:
        points: (K, 2) float64 last smoothed position, pixels; NaN for joints not seen yet.
        speeds: (K, 2) float64 smoothed speed, pixels per second.
        times_s: (K,) float64 when each joint was last seen.
    """

    points: Floats
    speeds: Floats
    times_s: Floats


@dataclass(frozen=True, slots=True, eq=False)
class SmoothingState:
    """What is remembered of everybody: the time of the last frame, and a track by person."""

    time_s: float = -np.inf
    tracks: Mapping[Hashable, Track] = field(default_factory=lambda: MappingProxyType({}))


def smooth_people(
    state: SmoothingState,
    people: Sequence[Hashable],
    keypoints: NDArray[Any],
    time_s: float,
    config: OneEuro = OneEuro(),  # noqa: B008 - frozen
) -> tuple[NDArray[np.float32], SmoothingState]:
    """One frame of a video.

    Args:
        state: What the last frame returned; `SmoothingState()` starts, and starts over.
        people: Who each row is: any hashable identity, the tracker's or the row's own number.
        keypoints: (N, K, 2) float, pixels; NaN where a joint was not found.
        time_s: When the frame was taken, in seconds; later than the last one, at whatever interval.
        config: The filter's settings.

    Returns:
        (N, K, 2) float32 smoothed keypoints, NaN where they were, and the state for the next frame. People who are not
        in this frame are remembered for `forget_after_s`.

    Raises:
        UsageError: Time does not go forward, or two rows are the same person.
        SpecError: The arrays do not fit each other.
    """
    points = np.asarray(keypoints, np.float64)
    if points.ndim != 3 or points.shape[2] != 2 or len(points) != len(people):
        found = f"shape {points.shape} for {len(people)} people"
        raise SpecError("keypoints to smooth", found=found, expected="(N, K, 2), a row per person")
    if not (np.isfinite(time_s) and time_s > state.time_s):
        raise UsageError("time of a frame", found=f"{time_s} s", expected=f"more than the last one, {state.time_s} s")
    if len(set(people)) != len(people):
        raise UsageError("people to smooth", found="the same person twice", expected="an identity per row")
    tracks = {
        person: track
        for person, track in state.tracks.items()
        if time_s - track.times_s.max(initial=-np.inf) <= config.forget_after_s
    }
    smoothed = np.empty(points.shape, np.float32)
    for row, person in enumerate(people):
        track = tracks.get(person)
        if track is not None and track.points.shape != points[row].shape:
            found = f"{points.shape[1]} keypoints"
            raise SpecError("keypoints to smooth", found=found, expected=f"{len(track.points)}, as in the last frame")
        smoothed[row], tracks[person] = one_euro_step(track, points[row], time_s, config)
    return smoothed, SmoothingState(time_s, MappingProxyType(tracks))


def one_euro_step(
    track: Track | None, points: Floats, time_s: float, config: OneEuro
) -> tuple[NDArray[np.float32], Track]:
    """One person's keypoints of one frame.

    Args:
        track: What the person's last frame returned; None for a new person.
        points: (K, 2) float64, pixels; NaN where a joint was not found.
        time_s: When the frame was taken, later than the last.
        config: The filter's settings.

    Returns:
        (K, 2) float32 smoothed keypoints, NaN where they were, and the track.
    """
    if track is None:
        track = Track(np.full(points.shape, np.nan), np.zeros(points.shape), np.full(len(points), -np.inf))
    seen: NDArray[np.bool_] = np.isfinite(points).all(axis=-1).reshape(-1, 1)
    since_s = time_s - track.times_s[:, None]
    known = seen & (since_s <= config.forget_after_s)
    # Rows without a past are computed too and not used; any interval does for them.
    interval_s = np.where(known, since_s, 1.0)
    before, now = np.where(known, track.points, 0.0), np.where(seen, points, 0.0)
    speed_share = _smoothing_share(config.speed_cutoff_hz, interval_s)
    speeds = track.speeds + speed_share * ((now - before) / interval_s - track.speeds)
    share = _smoothing_share(config.min_cutoff_hz + config.beta * np.abs(speeds), interval_s)
    smoothed = np.where(known, before + share * (now - before), points)
    return np.where(seen, smoothed, np.nan).astype(np.float32), Track(
        points=np.where(seen, smoothed, track.points),
        speeds=np.where(seen, np.where(known, speeds, 0.0), track.speeds),
        times_s=np.where(seen[:, 0], time_s, track.times_s),
    )


def _smoothing_share(cutoff_hz: float | Floats, interval_s: Floats) -> Floats:
    """How far a first-order low-pass goes towards a new value after an interval: 1 / (1 + tau / interval)."""
    turn: Floats = 2 * np.pi * cutoff_hz * interval_s
    return turn / (1 + turn)
