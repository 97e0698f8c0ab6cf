"""What a worker runs: an arm turned into stages, callables without arguments.

Invariant: a worker imports no more than its arm needs, so that an arm of one backend, or of none, is not measured
beside the libraries of another.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from edgepose.errors import UsageError
from edgepose.timing.harness import Stage
from edgepose.timing.messages import Load
from edgepose.timing.record import BundleArm, CallableArm, ModelArm


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed.

    Attributes:
        stages: (name, callable) in order; one run of all is a call.
        backend: Backend that runs, "" for a callable.
        close: Frees it.
        people: Items per call; an engine of fixed batch is fed as many as it takes.
    """

    stages: tuple[tuple[str, Stage], ...]
    backend: str
    close: Callable[[], None]
    people: int = 1


def open_workload(request: Load) -> Workload:
    """Loads the arm of a request.

    Raises:
        EdgeposeError: The bundle, the model or the factory cannot be used here.
    """
    match request.arm:
        case BundleArm() | ModelArm() as arm:
            from edgepose.timing.engine_stages import open_engine

            engine = open_engine(arm, request)
            return Workload(engine.stages, engine.backend, engine.session.close, engine.people)
        case CallableArm() as arm:
            return Workload((("call", _made_by(arm)),), "", lambda: None)


def _made_by(arm: CallableArm) -> Stage:
    """Calls the factory of an arm.

    Raises:
        UsageError: It cannot be found, or does not return a callable.
    """
    where, (place, _, name) = f"arm {arm.label}: factory", arm.factory.rpartition(":")
    expected = "'package.module:function' or 'path/to/file.py:function'"
    if not place or not name:
        raise UsageError(where, found=repr(arm.factory), expected=expected)
    try:
        factory = getattr(_module(place), name)
    except (ImportError, AttributeError, FileNotFoundError) as err:
        raise UsageError(where, found=f"{arm.factory!r}, which cannot be loaded ({err})", expected=expected) from err
    made = factory(**arm.arguments)
    if not callable(made):
        raise UsageError(where, found=f"{type(made).__name__} from {arm.factory}", expected="a callable")
    call: Stage = made
    return call


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
