"""The CUDA runtime of fakecudart.c, compiled, and a cuda-python that calls it.

Invariant: every test starts with no memory, streams or graphs, an empty log and nothing made to fail.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import types
import warnings
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from edgepose.runtime.cuda import Cuda, cuda_of_library

SOURCE = Path(__file__).with_name("fakecudart.c")
KINDS = ("device memory", "pinned memory", "streams", "recordings", "graphs")


class FakeCudart:
    """The compiled library: what was called, what is alive, what shall fail."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        self.library.fake_log.restype = ctypes.c_char_p
        self.library.fake_limits.argtypes = (ctypes.c_int, ctypes.c_size_t)
        self.library.fake_scale.argtypes = (
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t),
            *(ctypes.c_float, ctypes.c_void_p),
        )

    def cuda(self) -> Cuda:
        """edgepose's own calls, over this library."""
        return cuda_of_library(self.path)

    def calls(self) -> list[str]:
        """Names of the functions called since the last look, "cuda" left out."""
        names = [name.removeprefix("cuda") for name in self.library.fake_log().decode().split()]
        self.library.fake_clear_log()
        return names

    def fail(self, call: str, code: int, *, after: int = 0) -> None:
        """Makes one call of a function answer `code`, `after` calls that work."""
        self.library.fake_fail(call.encode(), code, after)

    def limit(self, *, gpus: int = 1, memory_bytes: int = 1 << 30) -> None:
        """How many GPUs there are, and how much memory they have."""
        self.library.fake_limits(gpus, memory_bytes)

    def alive(self) -> dict[str, int]:
        """How many things of each kind were made and not given back; kinds that have none are left out."""
        counts = {kind: int(self.library.fake_live(number)) for number, kind in enumerate(KINDS)}
        return {kind: count for kind, count in counts.items() if count}

    def scale(self, target: int, source: int, size_bytes: int, factor: float, stream: int) -> int:
        """Enqueues a "kernel" that multiplies float32; answers CUDA's status."""
        return int(self.library.fake_scale(target, source, size_bytes, factor, stream))


def compile_fake_cudart(folder: Path) -> Path:
    """The library, compiled into `folder`; skips the test, loudly, where no C compiler is installed."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        message = "no C compiler: nothing that calls CUDA is tested here; install gcc or clang"
        warnings.warn(message, stacklevel=2)
        pytest.skip(message)
    path = folder / "libfakecudart.so"
    flags = ["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *flags, "-o", str(path), str(SOURCE)], check=True)
    return path


@pytest.fixture(scope="session")
def fake_cudart_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_fake_cudart(tmp_path_factory.mktemp("cudart"))


@pytest.fixture
def cudart(fake_cudart_file: Path) -> Iterator[FakeCudart]:
    fake = FakeCudart(fake_cudart_file)
    fake.library.fake_reset()
    yield fake
    fake.library.fake_reset()


class _Handle:
    """cuda-python's handles are objects that int() understands."""

    def __init__(self, value: int) -> None:
        self._value = value

    def __int__(self) -> int:
        return self._value


def fake_cuda_python(fake: FakeCudart) -> types.ModuleType:
    """The module cuda.bindings.runtime over the fake library: tuples of status and answers, enums, handle objects."""
    module = types.ModuleType("cuda.bindings.runtime")
    library = fake.library
    Status = IntEnum(  # noqa: N806 - a type
        "Status",
        {"cudaSuccess": 0, "cudaErrorInvalidValue": 1, "cudaErrorMemoryAllocation": 2, "cudaErrorNoDevice": 100,
         "cudaErrorStreamCaptureUnsupported": 900, "cudaErrorStreamCaptureInvalidated": 901, "other": 400},
    )  # fmt: skip
    module.cudaMemcpyKind = IntEnum("cudaMemcpyKind", {"cudaMemcpyHostToDevice": 1, "cudaMemcpyDeviceToHost": 2})  # type: ignore[attr-defined]
    module.cudaStreamCaptureMode = IntEnum("cudaStreamCaptureMode", {"cudaStreamCaptureModeThreadLocal": 1})  # type: ignore[attr-defined]
    module.cudaDeviceAttr = IntEnum("cudaDeviceAttr", {"Major": 75, "Minor": 76})  # type: ignore[attr-defined]

    def function(name: str, outs: tuple[Any, ...], *, last: bool = False, kind: tuple[int, str] | None = None) -> None:
        def call(*args: Any) -> tuple[Any, ...]:
            if kind is not None:
                assert isinstance(args[kind[0]], getattr(module, kind[1])), f"{name} takes a {kind[1]}"
            answers = [out() for out in outs]
            pointers = [ctypes.byref(answer) for answer in answers]
            given = [ctypes.c_size_t(int(arg)) for arg in args]
            status = Status(getattr(library, name)(*([*given, *pointers] if last else [*pointers, *given])))
            if status:
                return (status, *(None for _ in answers))
            wrap = [_Handle(a.value or 0) if isinstance(a, ctypes.c_void_p) else a.value for a in answers]
            return (status, *wrap)

        setattr(module, name, call)

    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    for name in ("cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags", "cudaGraphInstantiate"):
        function(name, (pointer,))
    for name in ("cudaFree", "cudaFreeHost", "cudaStreamDestroy", "cudaStreamSynchronize", "cudaGraphDestroy",
                 "cudaGraphExecDestroy", "cudaGraphLaunch"):  # fmt: skip
        function(name, ())
    for name in ("cudaGetDeviceCount", "cudaDriverGetVersion", "cudaRuntimeGetVersion"):
        function(name, (number,))
    function("cudaMemcpyAsync", (), kind=(3, "cudaMemcpyKind"))
    function("cudaStreamBeginCapture", (), kind=(1, "cudaStreamCaptureMode"))
    function("cudaDeviceGetAttribute", (number,), kind=(0, "cudaDeviceAttr"))
    function("cudaStreamEndCapture", (pointer,), last=True)
    function("cudaMemGetInfo", (size, size))
    module.cudaGetDeviceProperties = lambda _: (Status(0), types.SimpleNamespace(name=b"Fake GPU 9000"))  # type: ignore[attr-defined]
    return module
