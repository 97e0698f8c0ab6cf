"""A session that fails when it is told to, in every way that the runtime has to survive.

Invariant: it is right again after each fault; nothing of what it answered while failing is right.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np

from edgepose.runtime.session import Array, Session

Fault = Literal["raise", "nan", "constant", "shape", "hang"]
KINDS: tuple[Fault, ...] = get_args(Fault)

_HANG_S = 0.6


class Faulty:
    """A session around another one.

    Args:
        session: Answers while nothing is injected.

    Attributes:
        next_fault: What the next inference does instead of answering; None for nothing.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.inputs, self.outputs = session.inputs, session.outputs
        self.next_fault: Fault | None = None

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`."""
        fault, self.next_fault = self.next_fault, None
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
        """The network is kept: whoever opens it again gets the same one."""
