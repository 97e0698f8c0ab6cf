"""What a measuring process and its worker say to each other, and the pipe they say it through.

Invariant: every message is a tagged struct in MessagePack; one request is answered by exactly one reply, which is
`Failed` where the request could not be carried out.
"""

from __future__ import annotations

from multiprocessing.connection import Connection

import msgspec

from edgepose.timing.record import Arm, WorkerFacts


class Load(msgspec.Struct, frozen=True, tag="load"):
    """Build the workload of an arm and warm it up.

    Attributes:
        arm: What to run.
        threads: Threads it may use.
        batch: Size of every free batch dimension; people per frame for whole frames.
        frame_hw: Height and width of the synthetic frame, pixels; used by whole frames only.
        seed: Of the synthetic input.
        warm_up_ms: Duration of the warm-up.
    """

    arm: Arm
    threads: int
    batch: int
    frame_hw: tuple[int, int]
    seed: int
    warm_up_ms: float


class RunBlock(msgspec.Struct, frozen=True, tag="block"):
    """Time `calls` calls, after one that is not timed and brings caches and threads back."""

    calls: int


class Sample(msgspec.Struct, frozen=True, tag="sample"):
    """Time calls for `duration_ms`, stage by stage."""

    duration_ms: float


class Finish(msgspec.Struct, frozen=True, tag="finish"):
    """Report and end."""


Request = Load | RunBlock | Sample | Finish


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Loaded and warm.

    Attributes:
        call_ns: Median call at the end of the warm-up.
        stages: Names of the stages of a call.
        people: Items per call: the batch, or that of an engine of fixed batch.
    """

    call_ns: float
    stages: tuple[str, ...]
    people: int


class Timed(msgspec.Struct, frozen=True, tag="timed"):
    """Durations in little-endian int64 nanoseconds, (calls, stages) in C order."""

    ns: bytes
    stages: int


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    facts: WorkerFacts


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The request failed.

    Attributes:
        error: The pickled EdgeposeError, from a child that this very program started; empty for any other exception.
        text: Class and text of the exception.
    """

    error: bytes
    text: str


Reply = Ready | Timed | Finished | Failed

_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def send(pipe: Connection, message: Request | Reply) -> None:
    """Writes one message.

    Raises:
        OSError: The other side has gone.
    """
    pipe.send_bytes(msgspec.msgpack.encode(message))


def receive_request(pipe: Connection) -> Request:
    """Waits for a request.

    Raises:
        EOFError: The other side has gone.
    """
    return _REQUESTS.decode(pipe.recv_bytes())


def receive_reply(pipe: Connection) -> Reply:
    """Waits for a reply.

    Raises:
        EOFError: The other side has gone.
    """
    return _REPLIES.decode(pipe.recv_bytes())
