"""A session that fails when it is told to, in every way that the runtime has to survive.

Invariant: it is right again after each fault; nothing of what it answered while failing is right.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Literal, Self, get_args

import numpy as np

from edgepose.runtime.isolated import IsolatedSession
from edgepose.runtime.session import Array

Fault = Literal["raise", "nan", "constant", "shape", "hang", "kill"]
KINDS: tuple[Fault, ...] = get_args(Fault)

_HANG_S = 0.6


class Faulty:
    """A session around one in a process of its own.

    Args:
        open: Starts the process; answers while nothing is injected.

    Attributes:
        next_fault: What the next inference does instead of answering; None for nothing.
    """

    def __init__(self, open: Callable[[], IsolatedSession]) -> None:  # noqa: A002 - what it does
        self._open, self._session = open, open()
        self.inputs, self.outputs = self._session.inputs, self._session.outputs
        self.next_fault: Fault | None = None

    def opened(self) -> Self:
        """The session again after a fault, in a fresh process where the last one was killed."""
        if not self._session.alive:
            self._session.abandon()
            self._session = self._open()
        return self

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`."""
        fault, self.next_fault = self.next_fault, None
        if fault == "kill":
            self._session.kill()
        outputs = self._session.infer(feeds)
        match fault:
            case "raise":
                raise RuntimeError("CUDA error 700: an illegal memory access was encountered")
            case "nan":
                return {name: np.full_like(value, np.nan) for name, value in outputs.items()}
            case "constant":
                return {name: np.zeros_like(value) for name, value in outputs.items()}
            case "shape":
                return {name: value[..., :-1] for name, value in outputs.items()}
            case "hang":
                time.sleep(_HANG_S)
        return outputs

    def close(self) -> None:
        """The process is kept: whoever opens it again gets the same one, where it still lives."""

    def end(self) -> None:
        """Ends the process for good."""
        self._session.close()
