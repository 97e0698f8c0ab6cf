"""The estimator that apps embed: a bundle's best engine, one call per frame, other bundles while it runs.

Invariant: a call is answered by one network from its beginning to its end, whatever is put into service meanwhile.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgepose.bundle import Bundle, read_bundle
from edgepose.engines import Opened, open_engine, open_first, open_isolated, runnable_engines
from edgepose.errors import SpecError, UsageError
from edgepose.golden import check_golden
from edgepose.network import MAX_BATCH, Network
from edgepose.runtime import Session, SessionFacts, facts_of
from edgepose.runtime.guard import PATIENCE_S, Guard, Standby
from edgepose.spec import Aim, Backend, Engine, Execution, ModelSpec, Poses, Precision

if TYPE_CHECKING:
    import asyncio
    from concurrent.futures import Future, ThreadPoolExecutor

    from edgepose.selection import Selection

_log = logging.getLogger("edgepose")
Shown = NDArray[np.uint8] | tuple[NDArray[np.uint8], ArrayLike]
"""A frame, or a frame and its boxes."""

_WORKERS, _PENDING = 2, 8
_PATIENCE = 20.0  # times the measured duration of a full batch


@dataclass(frozen=True, slots=True)
class EstimatorInfo:
    """What an estimator runs.

    Attributes:
        name: Name of the network.
        backend: Runtime that executes it ("" for a session of the caller's own).
        engine: The bundle's engine; None for a session of the caller's own.
        bundle_digest: Digest of the bundle; empty without one.
        threads: Threads it was opened with; 0 stands for all physical cores.
        input_hw: Height and width of the network's input in pixels.
        keypoints: Names, in output order.
        flip_test: Whether each crop is also shown mirrored and the two answers are averaged.
        passed_over: Why engines that the bundle prefers to this one do not run here, one line each.
        selection: What was measured to choose it; None where nothing was.
        facts: What the runtime itself says of it: which device executes which nodes; None where it does not tell.
    """

    name: str
    backend: str
    engine: Engine | None
    bundle_digest: str
    threads: int
    input_hw: tuple[int, int]
    keypoints: tuple[str, ...]
    flip_test: bool = False
    passed_over: tuple[str, ...] = ()
    selection: Selection | None = None
    facts: SessionFacts | None = None


@dataclass(frozen=True, slots=True)
class EstimatorOptions:
    """What is seldom asked for when an estimator is opened.

    Attributes:
        flip_test: Show each crop mirrored as well and average the two answers: a little better, and twice the work.
        execution: Providers, device and the rest; None takes what the engine was made for.
        strict: Raise where the chosen engine fails, instead of answering by the next one.
        isolated: Run engines in processes of their own, which are ended and replaced when they crash or hang: for
            backends that can take their process down, such as CUDA. Arrays are copied there and back.
        told: Told while engines are measured: what is measured, how many settings are done, how many there are.
    """

    flip_test: bool = False
    execution: Execution | None = None
    strict: bool = False
    isolated: bool = False
    told: Callable[[str, int, int], None] | None = None


@dataclass(frozen=True, slots=True)
class _Wishes:
    """What a bundle is opened with."""

    backend: Backend | None
    threads: int | None
    precision: Precision | None
    aim: Aim | Literal["none"] | None
    options: EstimatorOptions


@dataclass(slots=True, eq=False)
class _Service:
    """A network, what is known of it, and how many calls it is answering."""

    network: Network
    info: EstimatorInfo
    calls: int = 0


class PoseEstimator:
    """Finds the keypoints of the people in a frame; a context manager. Threads may share it.

    Args:
        session: The loaded network; the estimator closes it.
        spec: What it eats and says.
        backend: Passed on in the poses.
        flip_test: Show each crop mirrored as well and average the two answers: a little better, and twice the work.

    Raises:
        SpecError: The session does not fit the specification, or the flip test lacks the keypoints' flip pairs.
    """

    def __init__(self, session: Session, spec: ModelSpec, *, backend: str = "", flip_test: bool = False) -> None:
        network = Network(session, spec, backend=backend, flip_test=flip_test)
        hw, names = spec.preprocess.input_hw, spec.keypoints.names
        self._service = _Service(network, EstimatorInfo(spec.name, backend, None, "", 0, hw, names, flip_test))
        self._wishes: _Wishes | None = None
        self._changed = threading.Condition()
        self._pool: ThreadPoolExecutor | None = None
        self._waiting = threading.BoundedSemaphore(_PENDING)

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        backend: Backend | None = None,
        threads: int | None = None,
        precision: Precision | None = None,
        *,
        aim: Aim | Literal["none"] | None = None,
        options: EstimatorOptions | None = None,
    ) -> Self:
        """Loads the engine of a bundle that serves an aim best on this machine.

        The first start with a bundle measures what there is to choose from, engines and numbers of threads, in
        processes of their own, after a check on the golden vectors: seconds. Later starts remember (`selection`).

        An engine of another machine is passed over for the next one: a warning of the logger "edgepose" and
        `info().passed_over` name the field that differs and the command that builds it anew.

        Args:
            path: The bundle's directory.
            backend: Take only engines of this runtime; one that does not run here is then an error.
            threads: Threads of one inference, 0 for all physical cores; None measures one, half and all cores, or takes
                what the engine was made for where nothing is measured.
            precision: Take only engines of this precision.
            aim: What to choose for: latency, throughput, memory, energy; "none" takes the first engine that runs, as
                the bundle lists them, and measures nothing. None takes $EDGEPOSE_AIM, else latency.
            options: What is seldom asked for; None takes the defaults.

        Raises:
            BadInput: `path` is no bundle, none of its engines is of that backend and precision, there is no such aim,
                or the flip test lacks the keypoints' flip pairs.
            IntegrityError: The engine was changed since the bundle was written, or all of them are for other machines.
            EnvironmentFault: No suitable runtime is installed here; the text names the extras to install.
        """
        wishes = _Wishes(backend, threads, precision, aim, options or EstimatorOptions())
        bundle = read_bundle(path)
        session, info = _open(bundle, wishes)
        try:
            estimator = cls(session, bundle.manifest.spec, backend=info.backend, flip_test=info.flip_test)
        except BaseException:
            session.close()
            raise
        estimator._service.info, estimator._wishes = info, wishes
        return estimator

    @property
    def spec(self) -> ModelSpec:
        """What the network eats and says."""
        return self._service.network.spec

    def info(self) -> EstimatorInfo:
        """What runs: network, engine, backend."""
        service = self._service
        return replace(service.info, facts=facts_of(service.network.session))

    def __call__(self, frame: NDArray[np.uint8], boxes: ArrayLike | None = None) -> Poses:
        """Finds one pose per box.

        Args:
            frame: (H, W, 3) uint8 BGR.
            boxes: (N, 4) xyxy, pixels of the frame, x right, y down; None takes the whole frame as one person.
                A one-stage network is shown the whole frame and finds its people itself: None takes them all, and each
                box gets the pose whose own box overlaps it most, NaN with scores of 0 where none does.

        Returns:
            Poses in pixels of the frame, in the order of `boxes`; none for no boxes. Its arrays are read-only.

        Raises:
            ImageError: The frame is not (H, W, 3) uint8.
            AnnotationError: A box is not finite, empty or outside the frame; names the row.
        """
        with self._serving() as network:
            return network.find(frame, boxes)

    def submit(self, frame: NDArray[np.uint8], boxes: ArrayLike | None = None) -> Future[Poses]:
        """Like a call, but answers later: one frame is cropped and decoded while another one is inferred.

        Waits where eight frames are pending already, so that a camera that is faster than the network does not fill the
        memory. The frame must not be changed before it is answered.
        """
        from concurrent.futures import ThreadPoolExecutor  # apps that do not need it start without it

        with self._changed:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_WORKERS, "edgepose-frame")
            pool = self._pool
        self._waiting.acquire()
        try:
            future = pool.submit(self, frame, boxes)
        except BaseException:
            self._waiting.release()
            raise
        future.add_done_callback(lambda _: self._waiting.release())
        return future

    async def stream(self, frames: Iterable[Shown] | AsyncIterable[Shown]) -> AsyncIterator[Poses]:
        """Poses of one frame after the other, in their order, while the next ones are being worked on.

        Args:
            frames: Frames, or pairs of a frame and its boxes.
        """
        import asyncio  # takes longer to load than a network

        pending: deque[asyncio.Future[Poses]] = deque()
        async for shown in _each(frames):
            frame, boxes = shown if isinstance(shown, tuple) else (shown, None)
            if len(pending) > _WORKERS:
                yield await pending.popleft()
            future = await asyncio.to_thread(self.submit, frame, boxes)
            pending.append(asyncio.wrap_future(future))
        while pending:
            yield await pending.popleft()

    def reload(self, path: str | os.PathLike[str]) -> None:
        """Puts another bundle into service, opened with the same wishes, while frames go on being answered.

        It is loaded beside the one that serves, and has to answer its golden inputs first; calls that have begun are
        answered by the network that they began with, which is closed behind the last of them. Whatever goes wrong, the
        old network goes on serving.

        Args:
            path: The bundle's directory; its keypoints are those of the one in service.

        Raises:
            ParityError: The engine strays from the golden vectors.
            UsageError: The estimator was not opened from a bundle.
            SpecError: The bundle has other keypoints.
            BadInput: As `from_bundle`.
            IntegrityError: As `from_bundle`.
            EnvironmentFault: As `from_bundle`.
        """
        if self._wishes is None:
            fix = "make a new estimator"
            raise UsageError(
                "reload", found="an estimator of the caller's own session", expected="one of a bundle", fix=fix
            )
        bundle = read_bundle(path)
        there, here = bundle.manifest.spec.keypoints.names, self.spec.keypoints.names
        if there != here:
            raise SpecError(
                f"reload: bundle {path}", found=f"keypoints {', '.join(there)}", expected=f"{', '.join(here)}"
            )
        session, info = _open(bundle, self._wishes, golden=True)
        try:
            network = Network(session, bundle.manifest.spec, backend=info.backend, flip_test=info.flip_test)
        except BaseException:
            session.close()
            raise
        with self._changed:
            old, self._service = self._service, _Service(network, info)
            self._changed.wait_for(lambda: old.calls == 0)
        old.network.session.close()

    def close(self) -> None:
        """Frees the network, behind the frames that are pending; calling it twice is harmless."""
        with self._changed:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        self._service.network.session.close()

    @contextmanager
    def _serving(self) -> Iterator[Network]:
        """The network that is in service, which is not closed before the block ends."""
        with self._changed:
            service = self._service
            service.calls += 1
        try:
            yield service.network
        finally:
            with self._changed:
                service.calls -= 1
                self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _each(frames: Iterable[Shown] | AsyncIterable[Shown]) -> AsyncIterator[Shown]:
    if isinstance(frames, AsyncIterable):
        async for shown in frames:
            yield shown
        return
    for shown in frames:
        yield shown


def _open(bundle: Bundle, wishes: _Wishes, *, golden: bool = False) -> tuple[Guard, EstimatorInfo]:
    """Chooses and loads an engine, with `golden` checks it; and what is known of it."""
    options = wishes.options
    candidates = runnable_engines(bundle, wishes.backend, wishes.precision)
    order = [(engine, wishes.threads) for engine in candidates]
    selection = None
    if (aim := wishes.aim or os.environ.get("EDGEPOSE_AIM") or "latency") != "none":
        from edgepose.selection import Wishes, preferred  # what it measures with takes time to import

        asked = Wishes(cast("Aim", aim), wishes.threads, options.execution)  # an aim that is none is refused there
        selection, order = preferred(bundle, candidates, asked, options.told)
    opener = open_isolated if options.isolated else open_engine
    opened = open_first(bundle, order, options.execution, named=wishes.backend is not None, opener=opener)
    engine, spec = opened.engine, bundle.manifest.spec
    if golden:
        try:
            check_golden(bundle, engine, opened.session)
        except BaseException:
            opened.session.close()
            raise
    out = selection.passed_over if selection is not None and selection.best is not None else ()
    for fault in out:
        _log.warning("%s; running %s %s meanwhile", fault, engine.backend, engine.precision)
    info = EstimatorInfo(
        name=spec.name,
        backend=engine.backend,
        engine=engine,
        bundle_digest=bundle.digest,
        threads=opened.threads,
        input_hw=spec.preprocess.input_hw,
        keypoints=spec.keypoints.names,
        flip_test=options.flip_test,
        passed_over=(*out, *opened.passed_over),
        selection=selection,
    )
    return _guarded(bundle, opened, options, selection), info


def _guarded(bundle: Bundle, opened: Opened, options: EstimatorOptions, selection: Selection | None) -> Guard:
    """The engines that are left as one session that outlives those that fail."""
    times_ms = {(t.engine, t.backend): t.ms or 0.0 for t in reversed(selection.trials)} if selection else {}
    opener = open_isolated if options.isolated else open_engine
    kept = ((opened.engine, opened.threads), *(() if options.strict else opened.rest))
    engines = [
        Standby(
            engine.backend,
            partial(opener, bundle, engine, threads, options.execution),
            max(PATIENCE_S, _PATIENCE * times_ms.get((engine.path, engine.backend), 0.0) * MAX_BATCH / 1e3),
        )
        for engine, threads in kept
    ]
    return Guard(opened.session, engines)
