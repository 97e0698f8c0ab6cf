"""Execution of networks: one protocol, one leaf file per library, and the dispatcher that picks the leaf.

Invariant: importing this package imports no runtime; `open_session` imports the one it was asked for and no other.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, assert_never, get_args

from edgepose.errors import BackendUnavailable, EdgeposeError, MissingDependency, UsageError
from edgepose.host import physical_cores
from edgepose.runtime.session import Session, SessionFacts, check_feeds, facts_of, infer_all
from edgepose.spec import Backend, Execution, Precision
from edgepose.telemetry import block_telemetry

if TYPE_CHECKING:
    from edgepose.runtime.tensorrt import TensorrtOptions

block_telemetry()  # before any leaf imports openvino

__all__ = [
    "BACKENDS",
    "EXECUTABLE",
    "Session",
    "SessionFacts",
    "check_feeds",
    "extra_of",
    "facts_of",
    "infer_all",
    "installed_backends",
    "open_session",
]

BACKENDS: tuple[Backend, ...] = get_args(Backend)
EXECUTABLE: tuple[Backend, ...] = ("onnxruntime", "openvino")
"""Those whose engines run wherever their package is installed; of TensorRT's, only opening them tells."""

_EXTRAS: dict[Backend, str] = {
    "onnxruntime": "ort",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
}


def extra_of(backend: Backend) -> str:
    """The extra of edgepose that installs `backend`: pip install 'edgepose[EXTRA]'."""
    return _EXTRAS[backend]


def installed_backends() -> tuple[Backend, ...]:
    """Backends whose package can be found here, without importing any."""
    return tuple(backend for backend in BACKENDS if find_spec(_module(backend)) is not None)


def open_session(
    path: str | Path,
    backend: Backend,
    *,
    threads: int = 0,
    precision: Precision = "fp32",
    execution: Execution | None = None,
    tensorrt: TensorrtOptions | None = None,
) -> Session:
    """Loads an engine.

    Args:
        path: The engine's file.
        backend: The runtime to execute it with.
        threads: Threads of one inference; 0 takes all physical cores this process may use. A GPU has none to count.
        precision: Arithmetic of what the engine does not quantise. In ONNX Runtime it is the one that the file is
            written in, and the CPU computes FP16 in 32 bits, rounding after each node. TensorRT engines have had theirs
            fixed when they were built.
        execution: Providers, devices, streams and affinity; what it says of other backends than this one is not read.
        tensorrt: How TensorRT engines are executed, instead of what `execution` says: a `Cuda` of one's own, trusted
            keys.

    Raises:
        MissingDependency: The backend's package is not installed.
        BackendUnavailable: It is, but cannot be loaded, or lacks the device, driver or precision.
        BadInput: The engine's file cannot be read.
        IntegrityError: A TensorRT engine of another machine, or one that nothing proves to be from here.
        UsageError: A combination that does not exist.
    """
    if backend not in BACKENDS:
        raise UsageError("backend", found=repr(backend), expected=f"one of {', '.join(BACKENDS)}")
    if threads < 0:
        raise UsageError("threads", found=str(threads), expected="0 (all physical cores) or more")
    if tensorrt is not None and backend not in ("tensorrt", "tensorrt-rtx"):
        raise UsageError(
            "tensorrt", found=f"backend {backend}", expected="tensorrt or tensorrt-rtx", fix="leave it out"
        )
    try:
        if backend == "tensorrt" or backend == "tensorrt-rtx":  # noqa: PLR1714 - mypy narrows by these alone
            from edgepose.runtime.tensorrt import TensorrtOptions, open_engine

            chosen = tensorrt or TensorrtOptions.of((execution or Execution()).tensorrt)
            return open_engine(Path(path), backend, chosen)
        return _open(Path(path), backend, threads or physical_cores(), precision, execution or Execution())
    except ImportError as err:
        raise _import_fault(backend, err) from err


def _open(
    path: Path, backend: Literal["onnxruntime", "openvino"], threads: int, precision: Precision, execution: Execution
) -> Session:
    match backend:
        case "onnxruntime":
            if precision == "bf16":
                raise UsageError("precision", found=f"{precision} with onnxruntime", expected="fp32, fp16 or int8")
            from edgepose.runtime.ort import OrtSession

            return OrtSession(path, threads=threads, precision=precision, execution=execution)
        case "openvino":
            from edgepose.runtime.openvino import OpenvinoSession

            return OpenvinoSession(path, threads=threads, precision=precision, execution=execution)
        case _:
            assert_never(backend)


def _import_fault(backend: Backend, err: ImportError) -> EdgeposeError:
    if find_spec(_module(backend)) is None:
        return MissingDependency(backend, extra=_EXTRAS[backend], needed_for=f"running engines of backend {backend}")
    fix = f"reinstall it: pip install --force-reinstall 'edgepose[{_EXTRAS[backend]}]'"
    return BackendUnavailable(backend, found=f"an installed package that does not import ({err})", fix=fix)


def _module(backend: Backend) -> str:
    return backend.replace("-", "_")
