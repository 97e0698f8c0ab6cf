"""Where drawn frames go: photographs, folders of them, videos.

Invariant: what is written appears under its name only when all of it is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from edgepose.errors import BackendUnavailable, ImageError, StorageError, UsageError
from edgepose.storage import atomic_directory, atomic_file, atomic_write
from edgepose.video.reading import Frame, file_capture
from edgepose.video.sources import PHOTOGRAPHS, VIDEOS, Kind, Shot, Source

Sink = Callable[[Shot, Frame], None]
"""Takes a shot and the (H, W, 3) uint8 BGR picture that was made of it."""

_CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".avi": "MJPG", ".mkv": "mp4v"}


def check_output_suffix(out: Path, kind: Kind) -> None:
    """Refuses names that pictures of that kind cannot be written to.

    Raises:
        UsageError: Names the suffixes that can.
    """
    suffix = out.suffix.lower()
    if kind == "photograph" and suffix not in PHOTOGRAPHS:
        expected = f"a name that ends in {', '.join(PHOTOGRAPHS)}"
        raise UsageError(f"--out {out}", found=f"the suffix {suffix!r}", expected=expected)
    if kind in ("video", "live") and suffix not in _CODECS:
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


@contextmanager
def _video_sink(out: Path, source: Source) -> Iterator[Sink]:
    with atomic_file(out) as temporary:
        writers: list[cv2.VideoWriter] = []
        sizes: list[tuple[int, ...]] = []
        start_s, written = 0.0, 0

        def write(shot: Shot, picture: Frame) -> None:
            """A camera's frames come when they come: each is shown as long as it was seen."""
            nonlocal written, start_s
            if not writers:
                start_s = shot.time_s
                writers.append(_writer(temporary, source.fps, picture))
                sizes.append(picture.shape[:2])
            if picture.shape[:2] != sizes[0]:  # the encoder would throw it away without a word
                height, width = sizes[0]
                picture = np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
            until = round((shot.time_s - start_s) * source.fps) + 1 if source.kind == "live" else written + 1
            while written < until:
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
    capture = file_capture(temporary)
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
