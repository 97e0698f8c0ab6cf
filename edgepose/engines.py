"""Which of a bundle's engines run here: those asked for, those whose runtime is installed, the first that opens.

Invariant: an engine is opened only after its digest was checked, and never instead of one that the caller named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from edgepose.bundle import Bundle, check_engine, read_bundle
from edgepose.errors import BackendUnavailable, EnvironmentFault, IntegrityError, MissingDependency, UsageError
from edgepose.runtime import EXECUTABLE, Session, extra_of, installed_backends, open_session
from edgepose.runtime.provenance import ForeignEngine
from edgepose.spec import Backend, Engine, Execution, Precision

if TYPE_CHECKING:
    from edgepose.runtime.isolated import IsolatedSession

_log = logging.getLogger("edgepose")


def choose_engine(bundle: Bundle, backend: Backend | None = None, precision: Precision | None = None) -> Engine:
    """The first engine that runs here: what `PoseEstimator.from_bundle` takes where it is to measure nothing.

    Args:
        bundle: The bundle.
        backend: Take only engines of this runtime; one that cannot be executed is then chosen as well, so that opening
            it says why.
        precision: Take only engines of this precision.

    Raises:
        UsageError: The bundle has no engine of that backend and precision.
        MissingDependency: `backend` is not installed.
        BackendUnavailable: None of the bundle's backends is installed, or none works here.
        IntegrityError: All that could run are for other machines.
    """
    candidates = runnable_engines(bundle, backend, precision)
    if backend is not None or candidates[0].backend in EXECUTABLE:
        return candidates[0]
    # Of TensorRT's engines only opening them tells.
    opened = open_first(bundle, [(engine, None) for engine in candidates], None, named=False)
    opened.session.close()
    return opened.engine


def named_engine(bundle: Bundle, path: str, backend: Backend | None = None) -> Engine:
    """The engine at a path of the bundle; `backend` tells apart those of two runtimes that share a file.

    Raises:
        UsageError: There is none.
    """
    found = next((e for e in bundle.manifest.engines if e.path == path and backend in (None, e.backend)), None)
    if found is None:
        there = ", ".join(engine.path for engine in bundle.manifest.engines)
        raise UsageError(f"bundle {bundle.root}: engine", found=repr(path), expected=f"one of {there}")
    return found


class Opened(NamedTuple):
    """A loaded engine, its threads, why those before it are not run, and those that come after it."""

    engine: Engine
    session: Session
    threads: int
    passed_over: tuple[str, ...]
    rest: tuple[tuple[Engine, int | None], ...]


def engines_of(bundle: Bundle, backend: Backend | None, precision: Precision | None) -> tuple[Engine, ...]:
    """A bundle's engines of a runtime and a precision, in its order; at least one.

    Raises:
        UsageError: It has none of these.
    """
    engines = bundle.manifest.engines
    wanted = tuple(e for e in engines if backend in (None, e.backend) and precision in (None, e.precision))
    if not wanted:
        there = ", ".join(sorted({f"{e.backend} {e.precision}" for e in engines})) or "no engines at all"
        expected = " ".join(filter(None, (backend, precision))) or "at least one engine"
        fix = "choose one of these, or compile for that one"
        raise UsageError(f"bundle {bundle.root}", found=there, expected=expected, fix=fix)
    return wanted


def runnable_engines(bundle: Bundle, backend: Backend | None, precision: Precision | None) -> tuple[Engine, ...]:
    """The engines asked for whose runtime is installed, in the bundle's order; at least one.

    Raises:
        UsageError: The bundle has no engine of that backend and precision.
        MissingDependency: `backend` is not installed.
        BackendUnavailable: None of the bundle's backends is.
    """
    where, wanted = f"bundle {bundle.root}", engines_of(bundle, backend, precision)
    installed = installed_backends()
    found = tuple(engine for engine in wanted if engine.backend in installed)
    if found:
        return found
    if backend is not None:
        raise MissingDependency(backend, extra=extra_of(backend), needed_for=f"running the {backend} engine of {where}")
    raise _nothing_installed(where, wanted)


def open_engine(bundle: Bundle, engine: Engine, threads: int | None, execution: Execution | None) -> Session:
    """Loads an engine of a bundle, its digest checked.

    Args:
        bundle: Where it lies.
        engine: Which.
        threads: Threads of one inference; None takes what it was made for.
        execution: The rest; None takes what it was made for.

    Raises:
        IntegrityError: It was changed since the bundle was written, or is for another machine.
        EnvironmentFault: It cannot be loaded here.
    """
    return open_session(
        check_engine(bundle, engine),
        engine.backend,
        threads=engine.threads if threads is None else threads,
        precision=engine.precision,
        execution=execution or engine.execution,
    )


def open_isolated(bundle: Bundle, engine: Engine, threads: int | None, execution: Execution | None) -> IsolatedSession:
    """`open_engine` in a process of its own, for engines that can take theirs down.

    Raises:
        IntegrityError: As `open_engine`.
        EnvironmentFault: As `open_engine`, or the process cannot be started.
    """
    from edgepose.runtime.isolated import IsolatedSession

    told = {"root": str(bundle.root), "digest": bundle.digest, "path": engine.path, "backend": engine.backend}
    return IsolatedSession(f"{__name__}:open_at", {**told, "threads": threads, "execution": execution})


def open_at(
    *, root: str, digest: str, path: str, backend: Backend, threads: int | None, execution: Execution | None
) -> Session:
    """`open_engine` by where the bundle and the engine lie, and the digest that the bundle had.

    Raises:
        IntegrityError: As `open_engine`, or another bundle lies there now.
        EnvironmentFault: As `open_engine`.
    """
    bundle = read_bundle(root)
    if bundle.digest != digest:
        found = f"digest {bundle.digest[:12]}…"
        raise IntegrityError(f"bundle {root}", found=found, expected=f"{digest[:12]}…, which was opened before")
    return open_engine(bundle, named_engine(bundle, path, backend), threads, execution)


Opener = Callable[[Bundle, Engine, int | None, Execution | None], Session]
"""`open_engine` or `open_isolated`."""


def open_first(
    bundle: Bundle,
    candidates: Sequence[tuple[Engine, int | None]],
    execution: Execution | None,
    *,
    named: bool,
    opener: Opener = open_engine,
) -> Opened:
    """Opens the first that runs here.

    Args:
        bundle: Where they lie.
        candidates: Engines and the threads of one inference, in order of preference, at least one; None takes what the
            engine was made for.
        execution: The rest; None takes what each engine was made for.
        named: Whether the user asked for this backend, so that nothing else may be run instead of the first.
        opener: Loads one.

    Raises:
        IntegrityError: An engine was changed since the bundle was written, or all of them are for other machines.
        EnvironmentFault: None of them can be loaded here.
    """
    faults: list[IntegrityError | EnvironmentFault] = []
    for place, (engine, threads) in enumerate(candidates):
        try:
            session = opener(bundle, engine, threads, execution)
        except (ForeignEngine, EnvironmentFault) as err:
            if named:
                raise
            faults.append(err)
            continue
        for fault in faults:
            _log.warning("%s; running %s %s meanwhile", fault, engine.backend, engine.precision)
        used = engine.threads if threads is None else threads
        return Opened(engine, session, used, tuple(map(str, faults)), tuple(candidates[place + 1 :]))
    raise faults[0]


def _nothing_installed(where: str, wanted: Sequence[Engine]) -> BackendUnavailable:
    backends = list(dict.fromkeys(engine.backend for engine in wanted))
    found = f"engines of {', '.join(backends)}, and no runtime installed that executes one of them"
    commands = " or ".join(f"pip install 'edgepose[{extra_of(backend)}]'" for backend in backends)
    build = "" if set(backends) & set(EXECUTABLE) else f", or build the bundle for {' or '.join(EXECUTABLE)}"
    return BackendUnavailable(where, found=found, fix=f"run: {commands}{build}")
