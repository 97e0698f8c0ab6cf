"""Frames in and out: photographs, folders of them, videos.

Invariant: what is read is whole or an error, a video that ends before its header says included; what is written appears
under its name only when all of it is there.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

# Before cv2 opens its first video: ffmpeg would write lines of its own beside ours.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.data.coco import read_image
from edgepose.errors import BackendUnavailable, ImageError, StorageError, UsageError, VideoError
from edgepose.storage import atomic_directory, atomic_file, atomic_write

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)

Frame = NDArray[np.uint8]
Kind = Literal["photograph", "folder", "video"]
Sink = Callable[["Shot", Frame], None]
"""Takes a shot and the (H, W, 3) uint8 BGR picture that was made of it."""

PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv")
_CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".avi": "MJPG", ".mkv": "mp4v"}
_FALLBACK_FPS = 25.0


@dataclass(frozen=True, slots=True, eq=False)
class Shot:
    """One frame.

    Attributes:
        name: File name, relative to the folder where it came from one.
        frame: (H, W, 3) uint8 BGR.
        number: Number of the frame in its video, from 0; None for a photograph.
    """

    name: str
    frame: Frame
    number: int | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Where frames come from.

    Attributes:
        path: The file or folder.
        kind: What it is.
        files: The photographs; the video.
        total: Number of frames; 0 where a video does not say.
        fps: Frames per second of a video.
    """

    path: Path
    kind: Kind
    files: tuple[Path, ...]
    total: int
    fps: float = 0.0


def open_source(path: Path) -> Source:
    """Finds out what `path` is: a folder is a folder of photographs, and videos are known by their suffix.

    Raises:
        ImageError: There is nothing.
        VideoError: A folder without photographs, or a video that no decoder opens.
    """
    if path.is_dir():
        files = tuple(sorted(file for file in path.iterdir() if file.suffix.lower() in PHOTOGRAPHS and file.is_file()))
        if not files:
            raise VideoError(
                str(path), found="a folder without photographs", expected=f"files {', '.join(PHOTOGRAPHS)}"
            )
        return Source(path, "folder", files, len(files))
    if path.suffix.lower() not in VIDEOS:
        return Source(path, "photograph", (path,), 1)
    capture = _opened(path)
    try:
        total = int(max(capture.get(cv2.CAP_PROP_FRAME_COUNT), 0))
        fps = float(capture.get(cv2.CAP_PROP_FPS))
    finally:
        capture.release()
    return Source(path, "video", (path,), total, fps if math.isfinite(fps) and fps > 0 else _FALLBACK_FPS)


def shots(source: Source, *, convert: bool = False, allow_short: bool = False) -> Iterator[Shot]:
    """The frames of a source, in order.

    Args:
        source: Where they come from.
        convert: Whether grey photographs and such with an alpha channel are taken, converted to colour.
        allow_short: Whether a video may have fewer frames than its header says.

    Raises:
        ImageError: A photograph is missing, truncated, or not of three channels of 8 bits.
        VideoError: A video ends early.
    """
    if source.kind == "video":
        yield from _video_shots(source, allow_short)
        return
    for file in source.files:
        if not convert:
            _require_colour(file)
        yield Shot(file.name, read_image(file))


def check_output_suffix(out: Path, kind: Kind) -> None:
    """Refuses names that pictures of that kind cannot be written to.

    Raises:
        UsageError: Names the suffixes that can.
    """
    suffix = out.suffix.lower()
    if kind == "photograph" and suffix not in PHOTOGRAPHS:
        expected = f"a name that ends in {', '.join(PHOTOGRAPHS)}"
        raise UsageError(f"--out {out}", found=f"the suffix {suffix!r}", expected=expected)
    if kind == "video" and suffix not in _CODECS:
        expected = f"a name that ends in {', '.join(_CODECS)}"
        raise UsageError(f"--out {out}", found=f"the suffix {suffix!r} for a video", expected=expected)
    if kind == "folder" and suffix in (*PHOTOGRAPHS, *VIDEOS):
        raise UsageError(f"--out {out}", found="a file name for a folder of photographs", expected="a folder's name")


@contextmanager
def picture_sink(out: Path | None, source: Source, *, replace: bool) -> Iterator[Sink]:
    """Where drawn pictures go; they appear at `out` together, when the block ends without an exception.

    Args:
        out: File or folder; None throws the pictures away.
        source: What they are drawn on.
        replace: Whether a folder of photographs that is at `out` may be replaced.

    Raises:
        BackendUnavailable: No encoder for the video.
        StorageError: Disk full, read-only or no permission.
        UsageError: `out` is taken.
    """
    if out is None:
        yield lambda _shot, _picture: None
    elif source.kind == "photograph":
        encoded: list[bytes] = []
        yield lambda _shot, picture: encoded.append(encode(picture, out.suffix))
        for content in encoded:
            atomic_write(out, content)
    elif source.kind == "folder":
        with atomic_directory(out, replaceable=_holds_photographs_only if replace else None) as folder:

            def write(shot: Shot, picture: Frame) -> None:
                file = folder / shot.name
                file.write_bytes(encode(picture, file.suffix))

            yield write
    else:
        with _video_sink(out, source) as sink:
            yield sink


def encode(picture: Frame, suffix: str) -> bytes:
    """The bytes of an image file of that suffix.

    Raises:
        ImageError: It cannot be encoded.
    """
    try:
        done, content = cv2.imencode(suffix, picture)
    except cv2.error as err:
        raise ImageError(f"picture {suffix}", found=f"no encoder ({err.err})", expected=f"{PHOTOGRAPHS}") from err
    if not done:
        raise ImageError(f"picture {suffix}", found=f"{picture.shape}, which cannot be encoded", fix="write a .png")
    return content.tobytes()


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


def _capture(path: Path) -> cv2.VideoCapture:
    """A reader; ffmpeg's where OpenCV has it, since the others write lines of their own about bad files."""
    has_ffmpeg = cv2.CAP_FFMPEG in cv2.videoio_registry.getStreamBackends()
    return cv2.VideoCapture(str(path), cv2.CAP_FFMPEG if has_ffmpeg else cv2.CAP_ANY)


def _opened(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise VideoError(str(path), found="no such file", expected="a video", fix="check the path")
    capture = _capture(path)
    if not capture.isOpened():
        capture.release()
        raise VideoError(
            str(path),
            found=f"{path.stat().st_size} bytes that no decoder opens: truncated, not a video, or of an unknown codec",
            expected="a whole video, such as H.264 in .mp4",
            fix="copy it again, or convert it: ffmpeg -i IN -c:v libx264 OUT.mp4",
        )
    return capture


def _video_shots(source: Source, allow_short: bool) -> Iterator[Shot]:
    capture, number = _opened(source.path), 0
    try:
        while True:
            there, frame = capture.read()
            if not there:
                break
            yield Shot(source.path.name, np.asarray(frame, np.uint8), number)
            number += 1
    finally:
        capture.release()
    if number == 0 or (number < source.total and not allow_short):
        raise VideoError(
            str(source.path),
            found=f"{number} frames, then the end",
            expected=f"{source.total} frames as its header says" if source.total else "at least one frame",
            fix="copy it again, or pass --allow-short to take the frames that are there" if number else "copy it again",
        )


@contextmanager
def _video_sink(out: Path, source: Source) -> Iterator[Sink]:
    with atomic_file(out) as temporary:
        writers: list[cv2.VideoWriter] = []
        written = 0

        def write(_shot: Shot, picture: Frame) -> None:
            nonlocal written
            if not writers:
                writers.append(_writer(temporary, source.fps, picture))
            writers[0].write(picture)
            written += 1

        try:
            yield write
        finally:
            for writer in writers:
                writer.release()
        _check_video(temporary, out, written)


def _writer(path: Path, fps: float, picture: Frame) -> cv2.VideoWriter:
    codec = _CODECS[path.suffix.lower()]
    height, width = picture.shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (width, height))
    if not writer.isOpened():
        writer.release()
        raise BackendUnavailable(
            f"writing a {path.suffix} video",
            found=f"no encoder {codec} for {width} x {height} in this build of OpenCV, or no place to write to",
            fix=f"choose another of {', '.join(_CODECS)}, or write a folder of pictures",
        )
    return writer


def _check_video(temporary: Path, out: Path, written: int) -> None:
    """The encoder says nothing of a full disk; only reading back does."""
    capture = _capture(temporary)
    found = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
    capture.release()
    if found < written:
        raise StorageError(
            f"writing {out}",
            found=f"{found} of {written} frames in the file",
            expected="room for the whole video",
            fix="free some space or choose another place",
        )


def _holds_photographs_only(folder: Path) -> bool:
    return folder.is_dir() and all(file.suffix.lower() in PHOTOGRAPHS for file in folder.iterdir())
