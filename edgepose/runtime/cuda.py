"""The few CUDA calls that executing an engine takes, over cuda-python, over libcudart itself, or over pycuda.

Invariant: every handle and every address is an int, which is what TensorRT takes; every call that fails raises a
`CudaError` that names the call and CUDA's own name of the error. Importing this loads no CUDA library.

Without a GPU, the order of calls, the error paths and the clean-up were run against a small libcudart written in C
(tests/runtime/fakecudart.c), and the ways of finding out that there is no driver against NVIDIA's own libraries; the
pycuda backend ran over a stand-in for pycuda only. On a real GPU, nothing here has run yet: tests/runtime/
test_real_gpu.py does it where there is one.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, assert_never

from edgepose.errors import BackendUnavailable, EnvironmentFault
from edgepose.spec import CudaChoice

_NON_BLOCKING = 1
_THREAD_LOCAL = 1
_MAJOR, _MINOR = 75, 76
"""cudaStreamNonBlocking; cudaStreamCaptureModeThreadLocal; cudaDevAttrComputeCapabilityMajor and -Minor."""
_TO_DEVICE, _TO_HOST = 1, 2
"""Of cudaMemcpyKind."""
_FIXES = {
    2: "free memory on the GPU, or use a smaller batch",
    35: "install an NVIDIA driver that is as new as the CUDA runtime",
    100: "make a GPU visible (CUDA_VISIBLE_DEVICES), or pass it into the container",
}

_T = TypeVar("_T")


class CudaError(EnvironmentFault):
    """A CUDA call failed.

    Args:
        call: The function ("cudaMalloc").
        code: What it answered.
        name: CUDA's name of that ("cudaErrorMemoryAllocation").
    """

    def __init__(self, call: str, code: int, name: str) -> None:
        self.call, self.code, self.name = call, code, name
        super().__init__(call, found=f"{name} ({code})", fix=_FIXES.get(code, ""))

    def __reduce__(self) -> tuple[object, ...]:
        return (CudaError, (self.call, self.code, self.name))

    @property
    def of_capture(self) -> bool:
        """Whether only the capturing of a graph failed (cudaErrorStreamCapture…), and the device is as well as ever."""
        return 900 <= self.code <= 908


@dataclass(frozen=True, slots=True)
class Device:
    """The GPU that is used: the first one visible.

    Attributes:
        name: As the driver calls it ("NVIDIA GeForce RTX 4090").
        compute_capability: "8.9".
        driver: Newest CUDA version that the driver knows ("13.0"); not the driver's own version.
        runtime: Version of the CUDA runtime library ("12.6").
        free_bytes: Memory that is free now.
        total_bytes: Memory that it has.
    """

    name: str
    compute_capability: str
    driver: str
    runtime: str
    free_bytes: int
    total_bytes: int


class Cuda(Protocol):
    """CUDA on the first visible GPU. Streams do not wait for the default stream. Not for several threads at a time."""

    @property
    def name(self) -> str:
        """Which backend this is."""
        ...

    @property
    def captures(self) -> bool:
        """Whether `capture` works; where it does not, work is enqueued anew each time."""
        ...

    def device(self) -> Device:
        """The GPU."""
        ...

    def malloc(self, size_bytes: int) -> int:
        """Device memory: its address."""
        ...

    def free(self, address: int) -> None:
        """Gives device memory back."""
        ...

    def malloc_pinned(self, size_bytes: int) -> int:
        """Host memory that the device can copy from and to while the processor goes on: its address."""
        ...

    def free_pinned(self, address: int) -> None:
        """Gives pinned memory back."""
        ...

    def create_stream(self) -> int:
        """A stream: what is enqueued on it is done in order."""
        ...

    def destroy_stream(self, stream: int) -> None:
        """Gives a stream back; what was enqueued is still done."""
        ...

    def copy_to_device(self, device: int, host: int, size_bytes: int, stream: int) -> None:
        """Enqueues a copy from pinned memory."""
        ...

    def copy_to_host(self, host: int, device: int, size_bytes: int, stream: int) -> None:
        """Enqueues a copy to pinned memory."""
        ...

    def synchronize(self, stream: int) -> None:
        """Waits until all that was enqueued is done."""
        ...

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """Records what `enqueue` enqueues on `stream`, without doing it: an executable graph."""
        ...

    def launch(self, graph: int, stream: int) -> None:
        """Enqueues an executable graph."""
        ...

    def destroy_graph(self, graph: int) -> None:
        """Gives an executable graph back."""
        ...


def open_cuda(choice: CudaChoice = "auto") -> Cuda:
    """The first backend that works here and sees a GPU.

    Raises:
        BackendUnavailable: None does; the text says why, for each that was tried.
    """
    reasons = []
    for name in ("cuda-python", "ctypes") if choice == "auto" else (choice,):
        try:
            return _opened(name)
        except (ImportError, OSError, RuntimeError, CudaError) as err:
            reasons.append(f"{name}: {err}")
    fix = "install the NVIDIA driver and `pip install cuda-python`; `edgepose doctor` says what is missing"
    raise BackendUnavailable("CUDA", found=f"no way to call it ({'; '.join(reasons)})", expected="a GPU", fix=fix)


def _opened(name: Literal["cuda-python", "ctypes", "pycuda"]) -> Cuda:
    match name:
        case "cuda-python":
            cuda: Cuda = CudaRuntime(_python_calls())
        case "ctypes":
            cuda = CudaRuntime(_library_calls(None))
        case "pycuda":
            return _Pycuda()
        case _:
            assert_never(name)
    cuda.device()
    return cuda


def installed_ways() -> tuple[CudaChoice, ...]:
    """Backends whose library is here, whether or not it finds a driver."""
    found: list[CudaChoice] = []
    if _exists("cuda.bindings.runtime") or _exists("cuda.cudart"):
        found.append("cuda-python")
    with suppress(ImportError):
        _found_library()
        found.append("ctypes")
    if _exists("pycuda.driver"):
        found.append("pycuda")
    return tuple(found)


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # no package of that name at all; or loaded by hand
        return False


def cuda_of_library(path: str | Path) -> Cuda:
    """CUDA over the libcudart at `path`, where the usual places do not have it.

    Raises:
        BackendUnavailable: It does not load.
    """
    try:
        return CudaRuntime(_library_calls(str(path)))
    except OSError as err:
        fix = "name the file of a CUDA runtime library (libcudart.so.12)"
        raise BackendUnavailable(f"CUDA runtime {path}", found=str(err), fix=fix) from err


Call = Callable[..., tuple[Any, ...]]
"""Calls a function of the CUDA runtime by name; the answers without the status, which has raised if it was not 0."""


@dataclass(frozen=True, slots=True)
class _Calls:
    name: str
    call: Call


class CudaRuntime:
    """`Cuda` over the functions of the CUDA runtime, whoever calls them.

    Args:
        calls: Name of the backend, and how a function is called by name.
    """

    captures = True

    def __init__(self, calls: _Calls) -> None:
        self.name = calls.name
        self._call = calls.call

    def device(self) -> Device:
        """See `Cuda.device`."""
        if not int(self._call("cudaGetDeviceCount")[0]):
            raise CudaError("cudaGetDeviceCount", 100, "cudaErrorNoDevice")
        major, minor = (int(self._call("cudaDeviceGetAttribute", which, 0)[0]) for which in (_MAJOR, _MINOR))
        free, total = self._call("cudaMemGetInfo")
        return Device(
            name=str(self._call("cudaGetDeviceProperties", 0)[0]),
            compute_capability=f"{major}.{minor}",
            driver=_version(self._call("cudaDriverGetVersion")[0]),
            runtime=_version(self._call("cudaRuntimeGetVersion")[0]),
            free_bytes=int(free),
            total_bytes=int(total),
        )

    def malloc(self, size_bytes: int) -> int:
        """See `Cuda.malloc`."""
        return int(self._call("cudaMalloc", size_bytes)[0])

    def free(self, address: int) -> None:
        """See `Cuda.free`."""
        self._call("cudaFree", address)

    def malloc_pinned(self, size_bytes: int) -> int:
        """See `Cuda.malloc_pinned`."""
        return int(self._call("cudaHostAlloc", size_bytes, 0)[0])

    def free_pinned(self, address: int) -> None:
        """See `Cuda.free_pinned`."""
        self._call("cudaFreeHost", address)

    def create_stream(self) -> int:
        """See `Cuda.create_stream`; non-blocking, as nothing can be captured on the default stream."""
        return int(self._call("cudaStreamCreateWithFlags", _NON_BLOCKING)[0])

    def destroy_stream(self, stream: int) -> None:
        """See `Cuda.destroy_stream`."""
        self._call("cudaStreamDestroy", stream)

    def copy_to_device(self, device: int, host: int, size_bytes: int, stream: int) -> None:
        """See `Cuda.copy_to_device`."""
        self._call("cudaMemcpyAsync", device, host, size_bytes, _TO_DEVICE, stream)

    def copy_to_host(self, host: int, device: int, size_bytes: int, stream: int) -> None:
        """See `Cuda.copy_to_host`."""
        self._call("cudaMemcpyAsync", host, device, size_bytes, _TO_HOST, stream)

    def synchronize(self, stream: int) -> None:
        """See `Cuda.synchronize`."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        """See `Cuda.capture`.

        Raises:
            CudaError: Nothing was captured, or something that cannot be (`CudaError.of_capture`).
        """
        self._call("cudaStreamBeginCapture", stream, _THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            # The stream stays unusable until its capture is ended, whatever that answers.
            with suppress(CudaError):
                self._destroy_recording(int(self._call("cudaStreamEndCapture", stream)[0] or 0))
            raise
        recording = int(self._call("cudaStreamEndCapture", stream)[0] or 0)
        if not recording:
            raise CudaError("cudaStreamEndCapture", 901, "an empty graph")
        try:
            return int(self._call("cudaGraphInstantiate", recording, 0)[0])
        finally:
            self._destroy_recording(recording)

    def _destroy_recording(self, recording: int) -> None:
        if recording:
            self._call("cudaGraphDestroy", recording)

    def launch(self, graph: int, stream: int) -> None:
        """See `Cuda.launch`."""
        self._call("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: int) -> None:
        """See `Cuda.destroy_graph`."""
        self._call("cudaGraphExecDestroy", graph)


def _version(number: int) -> str:
    """13020 → "13.2"."""
    return f"{number // 1000}.{number % 1000 // 10}"


# cuda-python


def _python_calls() -> _Calls:
    try:
        runtime = import_module("cuda.bindings.runtime")
    except ImportError:
        runtime = import_module("cuda.cudart")  # cuda-python up to 12.6, which JetPack 6 has
    kinds: dict[str, dict[int, Any]] = {
        "cudaMemcpyAsync": {3: runtime.cudaMemcpyKind},
        "cudaStreamBeginCapture": {1: runtime.cudaStreamCaptureMode},
        "cudaDeviceGetAttribute": {0: runtime.cudaDeviceAttr},
    }

    def call(name: str, *args: Any) -> tuple[Any, ...]:
        typed = kinds.get(name, {})
        status, *answers = getattr(runtime, name)(*(typed.get(i, int)(arg) for i, arg in enumerate(args)))
        if int(status):
            raise CudaError(name, int(status), str(getattr(status, "name", "CUDA error")))
        if name == "cudaGetDeviceProperties":
            return (_text(answers[0].name),)
        return tuple(answers)

    return _Calls("cuda-python", call)


# libcudart itself

_PROPERTIES_BYTES = 16384
"""cudaDeviceProp has about 1000 bytes and grows with each CUDA version; it opens with the name, 256 bytes, in all."""

_IN: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "z": ctypes.c_size_t,
    "u": ctypes.c_uint,
    "i": ctypes.c_int,
    "q": ctypes.c_ulonglong,
}
_OUT: dict[str, Any] = {"P": ctypes.c_void_p, "Z": ctypes.c_size_t, "I": ctypes.c_int}
_SIGNATURES = {
    "cudaDeviceGetAttribute": "Iii",
    "cudaDriverGetVersion": "I",
    "cudaFree": "p",
    "cudaFreeHost": "p",
    "cudaGetDeviceCount": "I",
    "cudaGetDeviceProperties": "Ni",
    "cudaGraphDestroy": "p",
    "cudaGraphExecDestroy": "p",
    "cudaGraphInstantiate": "Ppq",
    "cudaGraphLaunch": "pp",
    "cudaHostAlloc": "Pzu",
    "cudaMalloc": "Pz",
    "cudaMemGetInfo": "ZZ",
    "cudaMemcpyAsync": "ppzip",
    "cudaRuntimeGetVersion": "I",
    "cudaStreamBeginCapture": "pi",
    "cudaStreamCreateWithFlags": "Pu",
    "cudaStreamDestroy": "p",
    "cudaStreamEndCapture": "pP",
    "cudaStreamSynchronize": "p",
}
"""Parameters in order; capitals are pointers to what is answered, N to the struct that opens with a name."""


def _library_calls(path: str | None) -> _Calls:
    library = ctypes.CDLL(path) if path is not None else _found_library()
    library.cudaGetErrorName.restype = ctypes.c_char_p

    def call(name: str, *args: Any) -> tuple[Any, ...]:
        given = iter(args)
        passed: list[Any] = []
        answers: list[Any] = []
        for letter in _SIGNATURES[name]:
            if letter in _IN:
                passed.append(_IN[letter](next(given)))
                continue
            answer = ctypes.create_string_buffer(_PROPERTIES_BYTES) if letter == "N" else _OUT[letter]()
            answers.append(answer)
            passed.append(ctypes.byref(answer))
        if status := int(_function(library, name)(*passed)):
            raise CudaError(name, status, _text(library.cudaGetErrorName(status) or b"CUDA error"))
        return tuple(_text(answer.value) if isinstance(answer.value, bytes) else answer.value for answer in answers)

    return _Calls("ctypes", call)


def _function(library: ctypes.CDLL, name: str) -> Any:
    # CUDA 12 has two structs of properties, and the newer one under a name of its own; the header hides that.
    newer = f"{name}_v2"
    return library[newer] if name == "cudaGetDeviceProperties" and hasattr(library, newer) else library[name]


def _found_library() -> ctypes.CDLL:
    reasons = []
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError as err:
            reasons.append(str(err))
    raise ImportError(f"no libcudart ({reasons[0]})")


def _candidates() -> Iterator[str]:
    yield from ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
    if known := ctypes.util.find_library("cudart"):
        yield known
    if (wheels := find_spec("nvidia")) is not None:  # nvidia-cuda-runtime and nvidia-cuda-runtime-cu12
        for folder in wheels.submodule_search_locations or ():
            yield from map(str, sorted(Path(folder).glob("*/lib/libcudart.so.*"), reverse=True))


def _text(raw: bytes | str) -> str:
    return raw.decode(errors="replace").strip("\0 ") if isinstance(raw, bytes) else raw


# pycuda


class _Pycuda:
    """For programs that live on pycuda already: its streams and memory, on the primary context that TensorRT uses too.

    pycuda knows nothing of graphs, so work is enqueued anew each time. `pycuda.autoinit` would make a second context
    and is not imported.
    """

    name = "pycuda"
    captures = False

    def __init__(self) -> None:
        self._driver = import_module("pycuda.driver")
        with _pycuda_call(self._driver, "cuInit"):
            self._driver.init()
            self._gpu = self._driver.Device(0)
            self._gpu.retain_primary_context().push()
        self._kept: dict[int, Any] = {}

    def device(self) -> Device:
        with _pycuda_call(self._driver, "cuDeviceGet"):
            free, total = self._driver.mem_get_info()
            major, minor = self._gpu.compute_capability()
            runtime = ".".join(map(str, self._driver.get_version()[:2]))
            driver = _version(self._driver.get_driver_version())
            return Device(self._gpu.name(), f"{major}.{minor}", driver, runtime, int(free), int(total))

    def malloc(self, size_bytes: int) -> int:
        with _pycuda_call(self._driver, "cuMemAlloc"):
            memory = self._driver.mem_alloc(size_bytes)
        return self._keep(int(memory), memory)

    def free(self, address: int) -> None:
        with _pycuda_call(self._driver, "cuMemFree"):
            self._kept.pop(address).free()

    def malloc_pinned(self, size_bytes: int) -> int:
        with _pycuda_call(self._driver, "cuMemHostAlloc"):
            array = self._driver.pagelocked_empty(size_bytes, "uint8")
        return self._keep(int(array.ctypes.data), array)

    def free_pinned(self, address: int) -> None:
        del self._kept[address]

    def create_stream(self) -> int:
        with _pycuda_call(self._driver, "cuStreamCreate"):
            stream = self._driver.Stream(_NON_BLOCKING)
        return self._keep(int(stream.handle), stream)

    def destroy_stream(self, stream: int) -> None:
        del self._kept[stream]

    def copy_to_device(self, device: int, host: int, size_bytes: int, stream: int) -> None:
        with _pycuda_call(self._driver, "cuMemcpyHtoDAsync"):
            self._driver.memcpy_htod_async(device, _bytes_at(host, size_bytes), self._kept[stream])

    def copy_to_host(self, host: int, device: int, size_bytes: int, stream: int) -> None:
        with _pycuda_call(self._driver, "cuMemcpyDtoHAsync"):
            self._driver.memcpy_dtoh_async(_bytes_at(host, size_bytes), device, self._kept[stream])

    def synchronize(self, stream: int) -> None:
        with _pycuda_call(self._driver, "cuStreamSynchronize"):
            self._kept[stream].synchronize()

    def capture(self, stream: int, enqueue: Callable[[], None]) -> int:
        del stream, enqueue
        raise CudaError("cuStreamBeginCapture", 900, "not in pycuda")

    def launch(self, graph: int, stream: int) -> None:
        del graph, stream
        raise CudaError("cuGraphLaunch", 900, "not in pycuda")

    def destroy_graph(self, graph: int) -> None:
        del graph
        raise CudaError("cuGraphExecDestroy", 900, "not in pycuda")

    def _keep(self, handle: int, owner: _T) -> int:
        self._kept[handle] = owner
        return handle


class _pycuda_call:  # noqa: N801 - reads as a function
    """Turns pycuda's exceptions into `CudaError`."""

    def __init__(self, driver: Any, call: str) -> None:
        self._driver, self._call = driver, call

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, err: BaseException | None, trace: Any) -> None:
        if isinstance(err, self._driver.Error):
            raise CudaError(self._call, 999, " ".join(str(err).split())) from err


def _bytes_at(address: int, size_bytes: int) -> Any:
    return (ctypes.c_ubyte * size_bytes).from_address(address)
