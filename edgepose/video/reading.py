"""OpenCV's reader of videos, cameras and streams, and nothing else of it.

Invariant: a reader that does not open says what was tried; nothing is printed by the libraries behind it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Protocol

# Before cv2 opens its first video: ffmpeg would write lines of its own beside ours.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import VideoError

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

Frame = NDArray[np.uint8]
"""(H, W, 3) uint8 BGR."""


class Capture(Protocol):
    """What is used of `cv2.VideoCapture`."""

    def read(self) -> tuple[bool, Any]:
        """Whether there is a next frame, and it."""

    def get(self, propId: int, /) -> float:  # noqa: N803 - OpenCV's name
        """A property of the video."""

    def isOpened(self) -> bool:  # noqa: N802 - OpenCV's name
        """Whether frames can be read."""

    def release(self) -> None:
        """Closes it."""


def file_capture(path: Path) -> Capture:
    """A reader of a file; ffmpeg's where OpenCV has it, since the others write lines of their own about bad files."""
    return cv2.VideoCapture(str(path), _ffmpeg())


def open_file(path: Path) -> Capture:
    """A reader that can read a video file.

    Raises:
        VideoError: No such file, or no decoder opens it.
    """
    if not path.is_file():
        raise VideoError(str(path), found="no such file", expected="a video", fix="check the path")
    capture = file_capture(path)
    if not capture.isOpened():
        capture.release()
        raise VideoError(
            str(path),
            found=f"{path.stat().st_size} bytes that no decoder opens: truncated, not a video, or of an unknown codec",
            expected="a whole video, such as H.264 in .mp4",
            fix="copy it again, or convert it: ffmpeg -i IN -c:v libx264 OUT.mp4",
        )
    return capture


def live_capture(address: str, timeout_s: float) -> Capture:
    """A reader of a camera ("0", "/dev/video0") or a stream ("rtsp://…"); it may not be open.

    Args:
        address: Number or device of a camera, or a URL.
        timeout_s: After how long a stream that says nothing is given up.
    """
    if address.isdecimal():
        return cv2.VideoCapture(int(address))
    if "://" not in address:
        return cv2.VideoCapture(address, cv2.CAP_V4L2)
    limit_ms = round(1e3 * timeout_s)
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit_ms, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit_ms]
    return cv2.VideoCapture(address, cv2.CAP_FFMPEG, limits)


def _ffmpeg() -> int:
    return cv2.CAP_FFMPEG if cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends() else cv2.CAP_ANY
