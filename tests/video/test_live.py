"""Cameras that are too fast, pause, come back, hang, or go: fake readers, and a real stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import pytest

from edgepose.errors import VideoError
from edgepose.video.live import LiveFrames
from edgepose.video.sources import open_source, shots


class FakeCamera:
    """Gives numbered frames as fast as it is read, then nothing.

    Args:
        frames: How many there are; None for no end.
        start: Number of the first one.
        pause_s: Between two frames.
        hang: Set, a read does not return before `close` of the test.
    """

    def __init__(
        self, frames: int | None, *, start: int = 0, pause_s: float = 0.0, hang: threading.Event | None = None
    ) -> None:
        self.left, self.next, self.pause_s, self.hang = frames, start, pause_s, hang
        self.released = False

    def read(self) -> tuple[bool, Any]:
        time.sleep(self.pause_s)
        if self.left == 0:
            if self.hang is not None:
                self.hang.wait()
            return False, None
        if self.left is not None:
            self.left -= 1
        self.next += 1
        return True, np.full((4, 6, 3), (self.next - 1) % 256, np.uint8)

    def get(self, propId: int, /) -> float:  # noqa: N803 - OpenCV's name
        return 30.0 if propId == cv2.CAP_PROP_FPS else 0.0

    def isOpened(self) -> bool:
        return not self.released

    def release(self) -> None:
        self.released = True


class NoCamera(FakeCamera):
    def __init__(self) -> None:
        super().__init__(0)
        self.released = True


def opener(*cameras: FakeCamera) -> Callable[[], FakeCamera]:
    """Opens one after the other, and nothing when all were opened."""
    left = list(cameras)
    return lambda: left.pop(0) if left else NoCamera()


def numbers(frames: LiveFrames, count: int, *, pause_s: float = 0.0) -> list[int]:
    seen: list[int] = []
    for _, frame in frames:
        seen.append(int(frame[0, 0, 0]))
        time.sleep(pause_s)
        if len(seen) == count:
            break
    return seen


def test_the_latest_frame_is_taken_and_the_others_are_counted() -> None:
    camera = FakeCamera(None, pause_s=0.002)
    with LiveFrames("camera", opener(camera)) as frames:
        seen = numbers(frames, 5, pause_s=0.05)
        assert seen == sorted(set(seen))
        assert seen[-1] > 20
        assert frames.dropped >= seen[-1] + 1 - 5 - 1  # one may have come after the last was taken
    assert camera.released


def test_every_frame_waits_for_its_turn() -> None:
    with LiveFrames("camera", opener(FakeCamera(40)), policy="every", patience_s=0.3) as frames:
        assert numbers(frames, 40, pause_s=0.002) == list(range(40))
        assert frames.dropped == 0


def test_times_go_forward_from_zero() -> None:
    with LiveFrames("camera", opener(FakeCamera(None, pause_s=0.005))) as frames:
        times = [time_s for (time_s, _), _ in zip(frames, range(10), strict=False)]
    assert 0 <= times[0] < 5
    assert (np.diff(times) > 0).all()


def test_a_stream_that_ends_is_opened_again() -> None:
    cameras = FakeCamera(3), NoCamera(), FakeCamera(None, start=100)
    with LiveFrames("camera", opener(*cameras), policy="every", patience_s=5.0) as frames:
        assert numbers(frames, 5) == [0, 1, 2, 100, 101]
    assert cameras[0].released


def test_an_unplugged_camera_is_an_error_behind_its_last_frame() -> None:
    seen = []
    with (
        pytest.raises(VideoError, match=r"camera: found no frame for .* cannot be opened again, expected a camera"),
        LiveFrames("camera", opener(FakeCamera(3)), policy="every", patience_s=0.3) as frames,
    ):
        for _, frame in frames:
            seen.append(int(frame[0, 0, 0]))
    assert seen == [0, 1, 2]


def test_a_camera_that_hangs_in_its_driver_is_an_error() -> None:
    hanging = threading.Event()
    with (
        pytest.raises(VideoError, match=r"no frame for 0\.6 s"),
        LiveFrames("camera", opener(FakeCamera(1, hang=hanging)), patience_s=0.2) as frames,
    ):
        list(frames)
    hanging.set()


def test_a_reader_that_raises_says_what() -> None:
    class Broken(FakeCamera):
        def read(self) -> tuple[bool, Any]:
            raise ValueError("no more memory on the bus")

    with pytest.raises(VideoError, match="no more memory on the bus"), LiveFrames("x", opener(Broken(1))) as frames:
        list(frames)


def test_no_camera() -> None:
    with pytest.raises(VideoError, match="camera 7: found nothing there that can be read"):
        LiveFrames("camera 7", NoCamera)


def test_a_camera_that_nobody_asked_for_a_frame_is_let_go() -> None:
    camera = FakeCamera(None)
    with LiveFrames("camera", opener(camera)):
        pass
    assert camera.released


def test_a_real_stream_is_read_and_its_password_is_nowhere(stream: str) -> None:
    source = open_source(f"http://me:secret@{stream}?token=abc")
    assert (source.kind, source.name) == ("live", f"http://{stream}")
    brightness, seen = -1.0, 0
    reader = shots(source)
    for shot in reader:
        assert shot.number == seen
        assert shot.frame.shape == (48, 64, 3)
        assert brightness < shot.frame.mean() + 1
        brightness, seen = float(shot.frame.mean()), seen + 1
        time.sleep(0.05)
        if seen == 5:
            break
    reader.close()  # type: ignore[attr-defined]
    assert source.live is not None
    assert source.live.dropped > 0


def test_an_address_where_nobody_answers() -> None:
    with pytest.raises(VideoError, match=r"http://127\.0\.0\.1:9/x: found nothing there"):
        open_source("http://me:secret@127.0.0.1:9/x")
