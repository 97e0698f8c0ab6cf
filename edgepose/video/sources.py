"""Where frames come from: photographs, folders of them, videos, cameras, streams.

Invariant: what is read is whole or an error, a video that ends before its header says included.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import cv2
import numpy as np

from edgepose.data.coco import read_image
from edgepose.errors import ImageError, UsageError, VideoError
from edgepose.video.live import LiveFrames, Policy
from edgepose.video.reading import Frame, live_capture, open_file

Kind = Literal["photograph", "folder", "video", "live"]

PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv")
_STREAMS = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")
_FALLBACK_FPS = 25.0
_READ_AHEAD = 4
_CONNECT_S = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Shot:
    """One frame.

    Attributes:
        name: File name, relative to the folder where it came from one; a stream's address without its password.
        frame: (H, W, 3) uint8 BGR.
        number: Number of the frame in its video, from 0; None for a photograph. Dropped frames have none.
        time_s: When it is shown in its video, or was read since the camera was opened; 0 for a photograph.
    """

    name: str
    frame: Frame
    number: int | None = None
    time_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where frames come from.

    Attributes:
        name: File name, camera, or address without its password.
        kind: What it is.
        files: The photographs; the video; none of a camera.
        total: Number of frames; 0 where nobody knows.
        fps: Frames per second of a video.
        live: The camera, open.
    """

    name: str
    kind: Kind
    files: tuple[Path, ...]
    total: int
    fps: float = 0.0
    live: LiveFrames | None = field(default=None, compare=False)

    @property
    def has_time(self) -> bool:
        """Whether its frames follow each other."""
        return self.kind in ("video", "live")


def open_source(address: str, *, policy: Policy = "latest") -> Source:
    """Finds out what an address is: a folder is a folder of photographs, a number a camera, videos go by their suffix.

    Args:
        address: Path, number of a camera, device ("/dev/video0"), or URL.
        policy: What becomes of a camera's frames that come too fast.

    Raises:
        ImageError: There is nothing.
        VideoError: A folder without photographs, a video that no decoder opens, no such camera or stream.
        UsageError: A URL of another kind.
    """
    if _is_live(address):
        name = f"camera {address}" if address.isdecimal() else _without_password(address)
        live = LiveFrames(name, partial(live_capture, address, _CONNECT_S), policy=policy)
        return Source(name, "live", (), 0, live.fps or _FALLBACK_FPS, live)
    path = Path(address)
    if path.is_dir():
        files = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in PHOTOGRAPHS and file.is_file()))
        if not files:
            raise VideoError(
                str(path), found="a folder without photographs", expected=f"files {', '.join(PHOTOGRAPHS)}"
            )
        return Source(path.name, "folder", files, len(files))
    if path.suffix.lower() not in VIDEOS:
        return Source(path.name, "photograph", (path,), 1)
    capture = open_file(path)
    try:
        total = int(max(capture.get(cv2.CAP_PROP_FRAME_COUNT), 0))
        fps = float(capture.get(cv2.CAP_PROP_FPS))
    finally:
        capture.release()
    return Source(path.name, "video", (path,), total, fps if math.isfinite(fps) and fps > 0 else _FALLBACK_FPS)


def shots(source: Source, *, convert: bool = False, allow_short: bool = False) -> Iterator[Shot]:
    """The frames of a source, in order; a video's next frames are decoded while one is worked on.

    Args:
        source: Where they come from.
        convert: Whether grey photographs and such with an alpha channel are taken, converted to colour.
        allow_short: Whether a video may have fewer frames than its header says.

    Raises:
        ImageError: A photograph is missing, truncated, or not of three channels of 8 bits.
        VideoError: A video ends early, or a camera is gone.
    """
    if source.live is not None:
        with source.live as frames:
            for number, (time_s, frame) in enumerate(frames):
                yield Shot(source.name, frame, number, time_s)
    elif source.kind == "video":
        yield from _ahead(_video_shots(source, allow_short))
    else:
        for file in source.files:
            if not convert:
                _require_colour(file)
            yield Shot(file.name, read_image(file))


def _is_live(address: str) -> bool:
    if address.isdecimal() or address.startswith("/dev/video"):
        return True
    scheme, separator, _ = address.partition("://")
    if not separator:
        return False
    if scheme.lower() not in _STREAMS:
        raise UsageError(address, found=f"a URL of the kind {scheme}", expected=f"one of {', '.join(_STREAMS)}")
    return True


def _without_password(url: str) -> str:
    """What may be shown of an address: cameras carry their password in it."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="").geturl()


def _require_colour(path: Path) -> None:
    """A photograph must have three channels of 8 bits; what cannot be decoded at all is left to `read_image`."""
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError:
        return
    image: Any = cv2.imdecode(raw, cv2.IMREAD_UNCHANGED) if raw.size else None
    if image is None or (image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8):
        return
    channels = 1 if image.ndim == 2 else image.shape[2]
    what = {1: "a grey image", 4: "an image with an alpha channel"}.get(channels, "an image")
    raise ImageError(
        str(path),
        found=f"{what} ({channels} channels of {8 * image.dtype.itemsize} bits)",
        expected="colour: 3 channels of 8 bits",
        fix="pass --convert to take it converted to colour",
    )


def _video_shots(source: Source, allow_short: bool) -> Iterator[Shot]:
    capture, number = open_file(source.files[0]), 0
    try:
        while True:
            there, frame = capture.read()
            if not there:
                break
            yield Shot(source.name, np.asarray(frame, np.uint8), number, number / source.fps)
            number += 1
    finally:
        capture.release()
    if number == 0 or (number < source.total and not allow_short):
        raise VideoError(
            str(source.files[0]),
            found=f"{number} frames, then the end",
            expected=f"{source.total} frames as its header says" if source.total else "at least one frame",
            fix="copy it again, or pass --allow-short to take the frames that are there" if number else "copy it again",
        )


def _ahead(frames: Iterator[Shot]) -> Iterator[Shot]:
    """The same frames, some of them read ahead in a thread, which ends when nobody takes them any more."""
    waiting: queue.Queue[Shot | Exception | None] = queue.Queue(_READ_AHEAD)
    left = threading.Event()

    def put(item: Shot | Exception | None) -> bool:
        while not left.is_set():
            try:
                waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for shot in frames:
                if not put(shot):
                    return
            put(None)
        except Exception as err:  # noqa: BLE001 - raised where the frames are taken
            put(err)

    reader = threading.Thread(target=read, name="edgepose-reader", daemon=True)
    reader.start()
    try:
        while (item := waiting.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        left.set()
        reader.join()
