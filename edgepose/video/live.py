"""Frames of a camera or a stream, which come whether or not somebody is ready for them.

Invariant: a frame is handed out once, in order, or counted as dropped; a reader that has ended, or says nothing any
more, is opened anew until patience runs out, and then that is an error, never an end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Literal, Self

import cv2
import numpy as np

from edgepose.errors import VideoError
from edgepose.video.reading import Capture, Frame

Policy = Literal["latest", "every"]
"""Of frames that come faster than they are taken: only the newest counts, or each one waits for its turn."""

_PENDING = 8
_RETRY_S = 0.2


class LiveFrames:
    """Reads a camera in a thread of its own; a context manager and an iterator of (time_s, frame), for one thread.

    Args:
        name: What messages call it.
        opener: Opens a reader, which may turn out not to be open.
        policy: What becomes of frames that come too fast. With "every" up to eight wait here, and then the reader is
            read no faster than frames are taken, so that what is dropped is dropped by the camera and not counted.
        patience_s: How long a reader may say nothing, or not open, until that is an error.

    Attributes:
        dropped: Frames that were read and never handed out.
        fps: Frames per second that the camera says it takes; 0 where it does not say.

    Raises:
        VideoError: It does not open.
    """

    def __init__(
        self, name: str, opener: Callable[[], Capture], *, policy: Policy = "latest", patience_s: float = 5.0
    ) -> None:
        self._name, self._opener, self._policy, self._patience_s = name, opener, policy, patience_s
        self.dropped = 0
        self._frames: deque[tuple[float, Frame]] = deque()
        self._changed = threading.Condition()
        self._stopped = False
        self._fault: VideoError | None = None
        capture = self._opened()
        if capture is None:
            raise self._absent("nothing there that can be read")
        fps = float(capture.get(cv2.CAP_PROP_FPS))
        self.fps = fps if np.isfinite(fps) and 0 < fps < 1000 else 0.0
        self._start_s = 0.0
        self._capture = capture
        self._thread = threading.Thread(target=self._read, args=(capture,), name=f"edgepose-{name}", daemon=True)

    def __iter__(self) -> Iterator[tuple[float, Frame]]:
        """Seconds since it began, and (H, W, 3) uint8 BGR; raises `VideoError` when the camera is gone."""
        self._start_s = time.monotonic()
        self._thread.start()  # not before: what comes while an engine is chosen is nobody's loss
        while True:
            with self._changed:
                # The reader's thread finds out by itself; more patience is for one that hangs in the driver.
                self._changed.wait_for(lambda: self._frames or self._fault or self._stopped, 3 * self._patience_s)
                if self._frames:
                    taken = self._frames.popleft()
                    self._changed.notify_all()
                elif self._fault is not None:
                    raise self._fault
                elif self._stopped:
                    return
                else:
                    raise self._absent(f"no frame for {3 * self._patience_s:g} s")
            yield taken

    def close(self) -> None:
        """Lets the camera go; a reader that hangs in its driver is left behind."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread.ident is None:
            self._capture.release()  # nobody ever asked for a frame
        else:
            self._thread.join(self._patience_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> Capture | None:
        capture = self._opener()
        if capture.isOpened():
            return capture
        capture.release()
        return None

    def _read(self, capture: Capture | None) -> None:
        seen_s = time.monotonic()
        try:
            while not self._stopped:
                there, frame = capture.read() if capture is not None else (False, None)
                now_s = time.monotonic()
                if there:
                    seen_s = now_s
                    self._offer(now_s - self._start_s, np.asarray(frame, np.uint8))
                    continue
                if capture is not None:
                    capture.release()
                if now_s - seen_s > self._patience_s:
                    raise self._absent(f"no frame for {now_s - seen_s:.1f} s, and it cannot be opened again")
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped, _RETRY_S)
                capture = None if self._stopped else self._opened()
        except Exception as err:  # noqa: BLE001 - handed to whoever takes the frames
            fault = err if isinstance(err, VideoError) else self._absent(f"{type(err).__name__}: {err}")
            with self._changed:
                self._fault = fault
                self._changed.notify_all()
        finally:
            if capture is not None:
                capture.release()

    def _offer(self, time_s: float, frame: Frame) -> None:
        with self._changed:
            if self._policy == "latest":
                self.dropped += len(self._frames)
                self._frames.clear()
            else:
                self._changed.wait_for(lambda: len(self._frames) < _PENDING or self._stopped)
            self._frames.append((time_s, frame))
            self._changed.notify_all()

    def _absent(self, found: str) -> VideoError:
        fix = "check that it is plugged in and that no other program uses it, or the address"
        return VideoError(self._name, found=found, expected="a camera or stream that gives frames", fix=fix)
