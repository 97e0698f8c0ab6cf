"""The CUDA calls and TensorRT sessions on a real GPU; on a machine without one every test here is skipped."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepose.errors import BackendUnavailable
from edgepose.runtime.cuda import Cuda, CudaError, open_cuda
from edgepose.runtime.provenance import Provenance, digest_of, write_engine
from edgepose.runtime.tensorrt import TensorrtOptions, engine_host, open_engine
from edgepose.runtime.trt_versions import FLAVOURS, Flavour, TrtApi, import_trt
from edgepose.spec import CudaChoice

COUNT = 1000


def gpu(choice: CudaChoice = "auto") -> Cuda:
    try:
        return open_cuda(choice)
    except BackendUnavailable as err:
        pytest.skip(f"no GPU: {err}")


def floats(address: int) -> Any:
    return np.ctypeslib.as_array((ctypes.c_float * COUNT).from_address(address))


@pytest.mark.parametrize("choice", ["cuda-python", "ctypes", "pycuda"])
def test_pinned_copies_streams_and_graph_replay(choice: CudaChoice) -> None:
    cuda = gpu(choice)
    stream, size_bytes = cuda.create_stream(), 4 * COUNT
    source, target, device = cuda.malloc_pinned(size_bytes), cuda.malloc_pinned(size_bytes), cuda.malloc(size_bytes)

    def there_and_back() -> None:
        cuda.copy_to_device(device, source, size_bytes, stream)
        cuda.copy_to_host(target, device, size_bytes, stream)

    floats(source)[:] = np.arange(COUNT)
    there_and_back()
    cuda.synchronize(stream)
    assert np.array_equal(floats(target), np.arange(COUNT))
    if cuda.captures:
        graph = cuda.capture(stream, there_and_back)
        for factor in (2, 3):
            floats(source)[:] = factor * np.arange(COUNT)
            cuda.launch(graph, stream)
            cuda.synchronize(stream)
            assert np.array_equal(floats(target), factor * np.arange(COUNT))
        cuda.destroy_graph(graph)
        with pytest.raises(CudaError, match="an empty graph"):
            cuda.capture(stream, lambda: None)
    cuda.free(device)
    cuda.free_pinned(source)
    cuda.free_pinned(target)
    cuda.destroy_stream(stream)


def test_memory_that_is_not_there_is_refused_by_name() -> None:
    cuda = gpu()
    with pytest.raises(CudaError, match="cudaErrorMemoryAllocation"):
        cuda.malloc(1 << 50)


def doubling_plan(api: TrtApi) -> bytes:
    """An engine that answers 2 · images for batches of 1 to 8."""
    trt = api.module
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    images = network.add_input("images", trt.float32, (-1, 2, 3))
    double = network.add_elementwise(images, images, trt.ElementWiseOperation.SUM).get_output(0)
    double.name = "double"
    network.mark_output(double)
    profile = builder.create_optimization_profile()
    profile.set_shape("images", (1, 2, 3), (4, 2, 3), (8, 2, 3))
    builder_config = builder.create_builder_config()
    builder_config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, builder_config)
    assert plan is not None
    return bytes(plan)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_engine_is_built_proven_loaded_captured_and_shared(
    flavour: Flavour, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda = gpu()
    try:
        api = import_trt(flavour)
    except ImportError as err:
        pytest.skip(f"{flavour} is not installed: {err}")
    if flavour == "tensorrt-rtx" and cuda.device().compute_capability == "9.0":
        pytest.skip("TensorRT-RTX is not for Hopper")
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    plan = doubling_plan(api)
    provenance = Provenance(sha256=digest_of(plan), size_bytes=len(plan), built=engine_host(api, cuda))
    write_engine(tmp_path / "engine.plan", plan, provenance)
    session = open_engine(tmp_path / "engine.plan", flavour, TensorrtOptions(cuda=cuda))
    other = session.worker()
    rng = np.random.default_rng(0)
    for batch in (1, 1, 1, 8, 8, 8, 3, 1, 1):
        images = rng.normal(size=(batch, 2, 3)).astype(np.float32)
        for each in (session, other):
            assert np.array_equal(each.infer({"images": images})["double"], 2 * images)
    assert session.plain_because == ""
    session.close()
    other.close()
