"""A session that outlives its engines: what one of them cannot answer is answered by the next.

Invariant: an answer is handed out only after it was looked at: every output is there, as long as the batch, finite, and
not the same number all over a map, unless the picture is, too. Whatever else comes, or nothing in time, costs the
engine its place for a while.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue

import numpy as np

from edgepose.errors import EnvironmentFault
from edgepose.runtime.session import Array, ClosedSession, Session, SessionFacts, check_feeds, facts_of
from edgepose.spec import TensorSpec

_log = logging.getLogger("edgepose")

PATIENCE_S = 10.0
"""How long an inference may take where nobody measured how long it does."""
_COOL_DOWN_S, _HANG_S, _LONGEST_S = 1.0, 60.0, 300.0
_MAP = 16  # fewer numbers than that may well be equal


class EngineFault(EnvironmentFault):
    """An engine raised, hung, or answered what cannot be an answer."""


@dataclass(frozen=True, slots=True)
class Standby:
    """An engine that can be opened.

    Attributes:
        name: What it is called.
        open: Loads it.
        patience_s: How long one of its inferences may take.
    """

    name: str
    open: Callable[[], Session]
    patience_s: float = PATIENCE_S


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What came of one inference.

    Attributes:
        outputs: One array per output, by name.
        engine: Name of the engine that answered.
        degraded: Whether that was another one than the preferred engine.
    """

    outputs: dict[str, Array]
    engine: str
    degraded: bool


class Guard:
    """Engines in order of preference as one session. Threads may share it: they are answered one after the other.

    An engine that fails is closed and left alone for a second, then two, four, up to five minutes, and one that hangs
    for a minute at first; then it is tried again. The frame at hand goes to the next engine. An engine that hangs
    cannot be stopped from outside unless it is isolated: its thread is left to itself, and closes it should it ever
    come back.

    Args:
        first: The preferred engine, loaded already.
        engines: All of them, `first` being that of the first one.
        clock: Seconds that never go back.
    """

    def __init__(
        self, first: Session, engines: Sequence[Standby], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._places = [_Place(engine) for engine in engines]
        self._places[0].thread = _Thread(first)
        self._clock = clock
        self._inputs, self._outputs = first.inputs, first.outputs
        self._serving = self._places[0]
        self._closed = False
        self._lock = threading.Lock()

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the preferred engine has to be fed."""
        return self._inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the preferred engine returns."""
        return self._outputs

    def facts(self) -> SessionFacts | None:
        """What the runtime says of the engine that answered last."""
        thread = self._serving.thread
        return None if thread is None else facts_of(thread.session)

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the first engine that can answer; as `answer`."""
        return self.answer(feeds).outputs

    def answer(self, feeds: Mapping[str, Array]) -> Answer:
        """Runs the first engine that can answer.

        Raises:
            SpecError: The feeds do not fit `inputs`.
            EngineFault: None of the engines could answer; that of the preferred one.
        """
        faults = []
        with self._lock:
            if self._closed:
                raise ClosedSession
            for place in self._order():
                try:
                    outputs = self._answer(place, feeds)
                except Exception as err:  # noqa: BLE001 - whatever an engine raises, the frame is not lost
                    check_feeds(feeds, self._inputs)  # the caller's mistakes cost no engine its place
                    faults.append(self._trip(place, err))
                    continue
                place.failures = 0
                self._serving = place
                return Answer(outputs, place.engine.name, place is not self._places[0])
        raise faults[0]

    def close(self) -> None:
        """Frees all engines that are loaded; calling it twice is harmless."""
        with self._lock:
            self._closed = True
            for place in self._places:
                place.drop()

    def _order(self) -> list[_Place]:
        """The engines to try: those that are not cooling down, or else the one that has done so for longest."""
        now = self._clock()
        ready = [place for place in self._places if place.retry_at <= now]
        return ready or [min(self._places, key=lambda place: place.retry_at)]

    def _answer(self, place: _Place, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if place.thread is None:
            place.thread = _Thread(place.engine.open())
        outputs = place.thread.infer(feeds, place.engine.patience_s)
        _look_at(outputs, self._outputs, feeds, self._inputs[0].shape[0])
        return outputs

    def _trip(self, place: _Place, err: Exception) -> EngineFault:
        """Closes an engine that failed, and leaves it alone for a while: longer where it made callers wait."""
        shortest_s = _HANG_S if place.thread is not None and place.thread.hangs else _COOL_DOWN_S
        place.drop()
        place.failures += 1
        pause_s = min(shortest_s * 2 ** (place.failures - 1), _LONGEST_S)
        place.retry_at = self._clock() + pause_s
        fault = EngineFault(
            f"engine {place.engine.name}",
            found=str(err) if isinstance(err, _NoAnswer) else f"{type(err).__name__}: {err}",
            expected="an answer to this frame",
            fix=f"it is tried again in {pause_s:g} s; if it keeps failing, build it anew or choose another backend",
        )
        fault.__cause__ = err
        _log.warning("%s", fault)
        return fault


class _NoAnswer(Exception):
    """What an engine did instead of answering."""


class _Place:
    """An engine, its thread while it is loaded, and how it has been doing."""

    def __init__(self, engine: Standby) -> None:
        self.engine = engine
        self.thread: _Thread | None = None
        self.failures = 0
        self.retry_at = float("-inf")

    def drop(self) -> None:
        """Closes the engine, or leaves that to its thread."""
        if self.thread is not None:
            self.thread.end()
            self.thread = None


class _Thread:
    """A session in a thread of its own, so that whoever waits for it can stop waiting."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._asked: SimpleQueue[tuple[int, Mapping[str, Array]] | None] = SimpleQueue()
        self._told: SimpleQueue[tuple[int, dict[str, Array] | BaseException]] = SimpleQueue()
        self._ticket = 0
        self.hangs = False
        self._thread = threading.Thread(target=self._serve, name="edgepose-engine", daemon=True)
        self._thread.start()

    def infer(self, feeds: Mapping[str, Array], patience_s: float) -> dict[str, Array]:
        """Runs the session; raises what it raises, or `_NoAnswer` when it takes too long."""
        self._ticket += 1
        self._asked.put((self._ticket, feeds))
        while True:
            try:
                ticket, said = self._told.get(timeout=patience_s)
            except Empty:
                self.hangs = True
                raise _NoAnswer(f"nothing for {patience_s:g} s") from None
            if ticket != self._ticket:
                continue  # of a call that Ctrl-C ended
            if isinstance(said, BaseException):
                raise said
            return said

    def end(self) -> None:
        """Closes the session as soon as it is idle, and waits for that unless it hangs and nobody can stop it."""
        self._asked.put(None)
        if self.hangs:
            abandon = getattr(self.session, "abandon", None)  # of a session in a process of its own
            if abandon is None:
                return
            abandon()
        self._thread.join()

    def _serve(self) -> None:
        while (request := self._asked.get()) is not None:
            ticket, feeds = request
            try:
                self._told.put((ticket, self.session.infer(feeds)))
            except BaseException as err:  # noqa: BLE001 - it belongs to whoever asked
                self._told.put((ticket, err))
        self.session.close()


def _look_at(
    outputs: Mapping[str, Array], expected: Sequence[TensorSpec], feeds: Mapping[str, Array], batch: int | str
) -> None:
    """Refuses what cannot be an answer to these crops; `batch` is what the input calls its free first dimension."""
    count = len(next(iter(feeds.values())))
    for tensor in expected:
        value = outputs.get(tensor.name)
        if value is None:
            raise _NoAnswer(f"no output {tensor.name!r}")
        rest = zip(value.shape[1:], tensor.shape[1:], strict=False)
        fits = value.ndim == len(tensor.shape) and all(isinstance(b, str) or a == b for a, b in rest)
        if not fits or (isinstance(batch, str) and tensor.shape[:1] == (batch,) and len(value) != count):
            raise _NoAnswer(f"{tensor.name} of shape {value.shape} for {count} crops")
        if value.size and value.dtype.kind == "f":
            low, high = float(value.min()), float(value.max())  # NaN wherever there is one
            if not np.isfinite(low) or not np.isfinite(high):
                raise _NoAnswer(f"{tensor.name} with values that are no numbers")
            if low == high and value[0].size >= _MAP and any(fed.min() != fed.max() for fed in feeds.values()):
                raise _NoAnswer(f"{tensor.name} that is {low:g} throughout")
