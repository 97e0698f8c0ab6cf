"""The CUDA calls, in order, through every way of making them; what fails names itself and leaves nothing behind."""

from __future__ import annotations

import ctypes
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepose.errors import BackendUnavailable, EnvironmentFault
from edgepose.runtime.cuda import Cuda, CudaError, cuda_of_library, open_cuda
from tests.runtime.fake_cuda import FakeCudart, cudart, fake_cuda_python, fake_cudart_file

__all__ = ["cudart", "fake_cudart_file"]  # fixtures

BYTES = 4 * 6


def floats(address: int) -> Any:
    return np.frombuffer((ctypes.c_ubyte * BYTES).from_address(address), np.float32)


@pytest.fixture(params=["ctypes", "cuda-python", "cuda-python of JetPack 6"])
def cuda(request: pytest.FixtureRequest, cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    """edgepose's calls over the fake library, by each backend that can make them."""
    if request.param == "ctypes":
        return cudart.cuda()
    module = fake_cuda_python(cudart)
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    if request.param == "cuda-python":
        monkeypatch.setitem(sys.modules, "cuda.bindings", types.ModuleType("cuda.bindings"))
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", module)
    else:
        monkeypatch.setitem(sys.modules, "cuda.cudart", module)
    found = open_cuda("cuda-python")
    cudart.calls()
    return found


def test_device_is_described(cuda: Cuda) -> None:
    device = cuda.device()
    assert (device.name, device.compute_capability) == ("Fake GPU 9000", "8.7")
    assert (device.driver, device.runtime) == ("13.2", "12.6")
    assert device.total_bytes == 1 << 30
    address = cuda.malloc(1 << 20)
    assert cuda.device().free_bytes == (1 << 30) - (1 << 20)
    cuda.free(address)


def test_copies_and_work_are_done_in_order_once_synchronised(cuda: Cuda, cudart: FakeCudart) -> None:
    stream, host, device, twice = (
        cuda.create_stream(),
        cuda.malloc_pinned(BYTES),
        cuda.malloc(BYTES),
        cuda.malloc(BYTES),
    )
    floats(host)[:] = range(6)
    cuda.copy_to_device(device, host, BYTES, stream)
    assert cudart.scale(twice, device, BYTES, 2.0, stream) == 0
    cuda.copy_to_host(host, twice, BYTES, stream)
    assert floats(host).tolist() == [0, 1, 2, 3, 4, 5]  # the fake does nothing before it has to
    cuda.synchronize(stream)
    assert floats(host).tolist() == [0, 2, 4, 6, 8, 10]
    cuda.free(device)
    cuda.free(twice)
    cuda.free_pinned(host)
    cuda.destroy_stream(stream)
    assert cudart.alive() == {}
    assert cudart.calls() == [
        *("StreamCreateWithFlags", "HostAlloc", "Malloc", "Malloc"),
        *("MemcpyAsync", "fake_scale", "MemcpyAsync", "StreamSynchronize"),
        *("Free", "Free", "FreeHost", "StreamDestroy"),
    ]


def test_captured_work_is_done_at_each_launch_and_not_before(cuda: Cuda, cudart: FakeCudart) -> None:
    stream, host, device = cuda.create_stream(), cuda.malloc_pinned(BYTES), cuda.malloc(BYTES)

    def enqueue() -> None:
        cuda.copy_to_device(device, host, BYTES, stream)
        assert cudart.scale(device, device, BYTES, 3.0, stream) == 0
        cuda.copy_to_host(host, device, BYTES, stream)

    floats(host)[:] = 1
    graph = cuda.capture(stream, enqueue)
    assert "recordings" not in cudart.alive()  # only what can be launched is kept
    cuda.synchronize(stream)
    assert floats(host).tolist() == [1] * 6
    for expected in (3, 9):
        cuda.launch(graph, stream)
        cuda.synchronize(stream)
        assert floats(host).tolist() == [expected] * 6
    cuda.destroy_graph(graph)
    assert "graphs" not in cudart.alive()


def test_empty_capture_is_an_error_of_capturing(cuda: Cuda, cudart: FakeCudart) -> None:
    stream = cuda.create_stream()
    with pytest.raises(CudaError, match="an empty graph") as caught:
        cuda.capture(stream, lambda: None)
    assert caught.value.of_capture
    assert cudart.alive() == {"streams": 1}
    cuda.synchronize(stream)  # the stream is out of its capture


@pytest.mark.parametrize("fault", [ValueError("enqueue refused"), KeyboardInterrupt()])
def test_exception_inside_a_capture_ends_it_and_goes_on(cuda: Cuda, cudart: FakeCudart, fault: BaseException) -> None:
    stream, host, device = cuda.create_stream(), cuda.malloc_pinned(BYTES), cuda.malloc(BYTES)

    def enqueue() -> None:
        cuda.copy_to_device(device, host, BYTES, stream)
        raise fault

    with pytest.raises(type(fault)):
        cuda.capture(stream, enqueue)
    assert cudart.calls()[-3:] == ["MemcpyAsync", "StreamEndCapture", "GraphDestroy"]
    assert not {"recordings", "graphs"} & set(cudart.alive())
    cuda.synchronize(stream)


def test_allocating_inside_a_capture_spoils_it_and_the_error_of_the_allocation_is_told(
    cuda: Cuda, cudart: FakeCudart
) -> None:
    stream = cuda.create_stream()
    with pytest.raises(CudaError, match=r"cudaMalloc: found cudaErrorStreamCaptureUnsupported \(900\)") as caught:
        cuda.capture(stream, lambda: cuda.free(cuda.malloc(4)))
    assert caught.value.of_capture
    cuda.synchronize(stream)
    assert cudart.alive() == {"streams": 1}


def test_recording_is_given_back_when_it_cannot_be_instantiated(cuda: Cuda, cudart: FakeCudart) -> None:
    stream, host, device = cuda.create_stream(), cuda.malloc_pinned(BYTES), cuda.malloc(BYTES)
    cudart.fail("cudaGraphInstantiate", 2)
    with pytest.raises(CudaError, match="cudaGraphInstantiate"):
        cuda.capture(stream, lambda: cuda.copy_to_device(device, host, BYTES, stream))
    assert "recordings" not in cudart.alive()


CALLS: dict[str, Callable[[Cuda, int], object]] = {
    "cudaMalloc": lambda cuda, _: cuda.malloc(4),
    "cudaHostAlloc": lambda cuda, _: cuda.malloc_pinned(4),
    "cudaStreamCreateWithFlags": lambda cuda, _: cuda.create_stream(),
    "cudaStreamSynchronize": lambda cuda, stream: cuda.synchronize(stream),
    "cudaStreamBeginCapture": lambda cuda, stream: cuda.capture(stream, lambda: None),
    "cudaStreamDestroy": lambda cuda, stream: cuda.destroy_stream(stream),
    "cudaFree": lambda cuda, _: cuda.free(0),
    "cudaFreeHost": lambda cuda, _: cuda.free_pinned(0),
    "cudaMemcpyAsync": lambda cuda, stream: cuda.copy_to_device(1, 1, 1, stream),
    "cudaGraphLaunch": lambda cuda, stream: cuda.launch(1, stream),
    "cudaGraphExecDestroy": lambda cuda, _: cuda.destroy_graph(1),
    "cudaMemGetInfo": lambda cuda, _: cuda.device(),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_failing_call_names_itself_and_cudas_error(cuda: Cuda, cudart: FakeCudart, name: str) -> None:
    stream = cuda.create_stream()
    cudart.fail(name, 2)
    with pytest.raises(CudaError, match=rf"^{name}: found cudaErrorMemoryAllocation \(2\); free memory") as caught:
        CALLS[name](cuda, stream)
    assert (caught.value.call, caught.value.code, caught.value.of_capture) == (name, 2, False)


def test_memory_that_is_not_pinned_or_not_large_enough_is_refused(cuda: Cuda) -> None:
    stream, device = cuda.create_stream(), cuda.malloc(BYTES)
    pageable, small = np.zeros(6, np.float32), cuda.malloc_pinned(BYTES - 4)
    for host in (pageable.ctypes.data, small):
        with pytest.raises(CudaError, match="cudaErrorInvalidValue"):
            cuda.copy_to_device(device, host, BYTES, stream)


def test_giving_back_twice_is_an_error(cuda: Cuda) -> None:
    address = cuda.malloc(4)
    cuda.free(address)
    with pytest.raises(CudaError, match="cudaFree: found cudaErrorInvalidValue"):
        cuda.free(address)


def test_error_survives_the_way_between_processes() -> None:
    error = CudaError("cudaMalloc", 2, "cudaErrorMemoryAllocation")
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.code, copy.exit_code) == (str(error), 2, EnvironmentFault.exit_code)


def test_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "libcudart.so").write_bytes(b"not a library")
    with pytest.raises(BackendUnavailable, match=r"libcudart\.so"):
        cuda_of_library(tmp_path / "libcudart.so")


# Which backend


def forbid(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    for name in modules:
        monkeypatch.setitem(sys.modules, name, None)  # import says ModuleNotFoundError


def test_every_backend_that_was_tried_says_why_it_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    forbid(monkeypatch, "cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart", "pycuda", "pycuda.driver")
    monkeypatch.setattr("edgepose.runtime.cuda._candidates", lambda: iter(["libcudart-nowhere.so"]))
    with pytest.raises(BackendUnavailable) as caught:
        open_cuda()
    text = str(caught.value)
    assert "cuda-python: " in text
    assert "ctypes: no libcudart (libcudart-nowhere.so: cannot open" in text
    assert "pycuda" not in text.partition("expected")[0]  # nobody named it
    with pytest.raises(BackendUnavailable, match="pycuda: "):
        open_cuda("pycuda")


def test_library_itself_is_the_way_out_where_cuda_python_is_missing(
    cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    forbid(monkeypatch, "cuda", "cuda.bindings", "cuda.bindings.runtime", "cuda.cudart")
    monkeypatch.setattr("edgepose.runtime.cuda._candidates", lambda: iter(["nowhere.so", str(cudart.path)]))
    assert open_cuda().name == "ctypes"


@pytest.mark.parametrize("code", [35, 100])
def test_machine_without_a_gpu_is_told_so(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    monkeypatch.setattr("edgepose.runtime.cuda._candidates", lambda: iter([str(cudart.path)]))
    cudart.fail("cudaGetDeviceCount", code)
    with pytest.raises(BackendUnavailable, match=rf"ctypes: cudaGetDeviceCount: found cudaError\w+ \({code}\)"):
        open_cuda("ctypes")


def test_no_visible_gpu_is_no_device(cudart: FakeCudart) -> None:
    cudart.limit(gpus=0)
    with pytest.raises(CudaError, match="cudaErrorNoDevice"):
        cudart.cuda().device()


def test_this_machine_either_has_a_gpu_or_says_why_not() -> None:
    """The real libraries, whatever is installed: no crash, no bare exception."""
    try:
        cuda = open_cuda()
    except BackendUnavailable as err:
        assert "cuda-python: " in str(err)  # noqa: PT017
        assert "ctypes: " in str(err)  # noqa: PT017
    else:
        assert cuda.device().total_bytes > 0


# pycuda, over a module that records


class FakePycuda(types.ModuleType):
    """pycuda.driver over the fake library: objects that free themselves, one context, no graphs."""

    class Error(Exception):
        pass

    def __init__(self, fake: FakeCudart) -> None:
        super().__init__("pycuda.driver")
        self._cuda = fake.cuda()
        self.contexts: list[str] = []
        outer = self

        class Device:
            def __init__(self, index: int) -> None:
                assert index == 0

            def retain_primary_context(self) -> Any:
                return types.SimpleNamespace(push=lambda: outer.contexts.append("primary"))

            def name(self) -> str:
                return "Fake GPU 9000"

            def compute_capability(self) -> tuple[int, int]:
                return (8, 7)

        class Stream:
            def __init__(self, flags: int) -> None:
                assert flags == 1
                self.handle = outer._cuda.create_stream()

            def synchronize(self) -> None:
                outer._cuda.synchronize(self.handle)

            def __del__(self) -> None:
                outer._cuda.destroy_stream(self.handle)

        class Memory:
            def __init__(self, size: int) -> None:
                try:
                    self._address = outer._cuda.malloc(size)
                except CudaError as err:
                    raise FakePycuda.Error(f"cuMemAlloc failed:\nout of memory ({err.code})") from err

            def __int__(self) -> int:
                return self._address

            def free(self) -> None:
                outer._cuda.free(self._address)

        self.Device, self.Stream, self.mem_alloc = Device, Stream, Memory

    def init(self) -> None:
        self.contexts.append("init")

    def pagelocked_empty(self, size: int, dtype: str) -> Any:
        assert dtype == "uint8"
        address = self._cuda.malloc_pinned(size)  # its own clean-up is left to the fixture
        return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)

    def memcpy_htod_async(self, device: int, host: Any, stream: Any) -> None:
        self._cuda.copy_to_device(device, ctypes.addressof(host), len(host), stream.handle)

    def memcpy_dtoh_async(self, host: Any, device: int, stream: Any) -> None:
        self._cuda.copy_to_host(ctypes.addressof(host), device, len(host), stream.handle)

    def mem_get_info(self) -> tuple[int, int]:
        return (1, 2)

    def get_version(self) -> tuple[int, int, int]:
        return (12, 6, 0)

    def get_driver_version(self) -> int:
        return 13020


@pytest.fixture
def pycuda(cudart: FakeCudart, monkeypatch: pytest.MonkeyPatch) -> FakePycuda:
    module = FakePycuda(cudart)
    monkeypatch.setitem(sys.modules, "pycuda", types.ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", module)
    return module


def test_named_pycuda_works_on_the_primary_context(pycuda: FakePycuda, cudart: FakeCudart) -> None:
    cuda = open_cuda("pycuda")
    assert pycuda.contexts == ["init", "primary"]
    assert (cuda.name, cuda.captures) == ("pycuda", False)
    device = cuda.device()
    assert (device.compute_capability, device.driver, device.runtime) == ("8.7", "13.2", "12.6")
    stream, host, memory = cuda.create_stream(), cuda.malloc_pinned(BYTES), cuda.malloc(BYTES)
    floats(host)[:] = 2
    cuda.copy_to_device(memory, host, BYTES, stream)
    assert cudart.scale(memory, memory, BYTES, 5.0, stream) == 0
    cuda.copy_to_host(host, memory, BYTES, stream)
    cuda.synchronize(stream)
    assert floats(host).tolist() == [10] * 6
    with pytest.raises(CudaError, match="not in pycuda") as caught:
        cuda.capture(stream, lambda: None)
    assert caught.value.of_capture
    cuda.free(memory)
    cuda.free_pinned(host)
    cuda.destroy_stream(stream)
    assert not {"device memory", "streams"} & set(cudart.alive())


def test_exceptions_of_pycuda_become_one_line(pycuda: FakePycuda, cudart: FakeCudart) -> None:
    cuda = open_cuda("pycuda")
    cudart.limit(memory_bytes=16)
    with pytest.raises(CudaError, match=r"^cuMemAlloc: found cuMemAlloc failed: out of memory \(2\) \(999\)$"):
        cuda.malloc(64)
