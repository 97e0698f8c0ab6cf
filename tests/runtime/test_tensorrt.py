"""Engines reach TensorRT only when they are proven to be ours; what runs them copies, captures and cleans up."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgepose.errors import BackendUnavailable, BadInput, EnvironmentFault, IntegrityError, SpecError
from edgepose.runtime import open_session
from edgepose.runtime.cuda import CudaError
from edgepose.runtime.provenance import ForeignEngine, Provenance, companions, digest_of, write_engine
from edgepose.runtime.session import ClosedSession
from edgepose.runtime.tensorrt import TensorrtOptions, TensorrtSession, choose_profile, engine_host, open_engine
from edgepose.runtime.trt_versions import TrtApi
from edgepose.spec import Execution, TensorrtExecution, TensorSpec
from tests.runtime.fake_cuda import FakeCudart, cudart, fake_cudart_file
from tests.runtime.fake_tensorrt import FakeTensorrt, plan_of
from tests.runtime.test_trt_versions import RECORDED

__all__ = ["cudart", "fake_cudart_file"]  # fixtures

STATIC = plan_of()
DYNAMIC = plan_of([(1, 1, 1), (2, 8, 8)])


@pytest.fixture
def trt(cudart: FakeCudart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorrt]:
    """A machine of its own with a GPU and TensorRT; at the end, nothing of the GPU is in use."""
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    module = FakeTensorrt(cudart)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    yield module
    if cudart.alive():
        gc.collect()  # sessions that a test left open
    assert cudart.alive() == {}


@pytest.fixture
def rtx(cudart: FakeCudart, trt: FakeTensorrt, monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    module = FakeTensorrt(cudart, "tensorrt_rtx", "1.7.1.116")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    return module


def built(trt: FakeTensorrt, path: Path, plan: bytes, **fields: Any) -> Path:
    """An engine built on this machine."""
    flavour: Any = trt.__name__.replace("_", "-")
    host = engine_host(TrtApi(trt, flavour, trt.__version__), trt.cudart.cuda())
    write_engine(path, plan, Provenance(sha256=digest_of(plan), size_bytes=len(plan), built=host, **fields))
    trt.cudart.calls()
    return path


def opened(trt: FakeTensorrt, folder: Path, plan: bytes, **options: Any) -> TensorrtSession:
    flavour: Any = trt.__name__.replace("_", "-")
    path = built(trt, folder / "engine.plan", plan)
    session = open_engine(path, flavour, TensorrtOptions(cuda=trt.cudart.cuda(), **options))
    trt.cudart.calls()
    return session


def images(batch: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(batch, 2, 3)).astype(np.float32)


def answers_right(session: TensorrtSession, batch: int = 4, seed: int = 0) -> bool:
    fed = images(batch, seed)
    return bool(np.array_equal(session.infer({"images": fed})["double"], 2 * fed))


# What reaches TensorRT


def test_nothing_of_a_forged_engine_reaches_tensorrt(trt: FakeTensorrt, tmp_path: Path) -> None:
    path = built(trt, tmp_path / "engine.plan", STATIC)
    options = TensorrtOptions(cuda=trt.cudart.cuda())
    path.write_bytes(plan_of(factors={"double": 3.0}))
    with pytest.raises(IntegrityError):
        open_engine(path, "tensorrt", options)
    companions(path)[1].unlink()
    path.write_bytes(STATIC)
    with pytest.raises(IntegrityError, match="no seal"):
        open_engine(path, "tensorrt", options)
    companions(path)[0].unlink()
    with pytest.raises(BadInput):
        open_engine(path, "tensorrt", options)
    assert trt.seen == []


def test_nothing_of_a_foreign_engine_reaches_tensorrt(trt: FakeTensorrt, tmp_path: Path) -> None:
    path = built(trt, tmp_path / "engine.plan", STATIC, target="jetson-orin-nano")
    trt.__version__ = "10.3.0"
    with pytest.raises(ForeignEngine, match=r"TensorRT: found tensorrt 10\.3\.0, .*--target jetson-orin-nano"):
        open_engine(path, "tensorrt", TensorrtOptions(cuda=trt.cudart.cuda()))
    assert trt.seen == []


def test_what_was_checked_is_what_is_loaded(trt: FakeTensorrt, tmp_path: Path) -> None:
    opened(trt, tmp_path, STATIC).close()
    assert trt.seen == [STATIC]


def test_engine_that_tensorrt_refuses_is_told_with_its_log(trt: FakeTensorrt, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"tensorrt 10\.16\.1\.11 refuses the engine: Magic tag does not match$"):
        opened(trt, tmp_path, b"no engine at all")


def test_tensorrt_that_does_not_start_is_told(trt: FakeTensorrt, tmp_path: Path) -> None:
    path = built(trt, tmp_path / "engine.plan", STATIC)
    trt.start_fault = True
    with pytest.raises(EnvironmentFault, match=r"cannot be started .*nullptr.*CUDA initialization failure"):
        open_engine(path, "tensorrt", TensorrtOptions(cuda=trt.cudart.cuda()))


def test_old_tensorrt_is_refused(trt: FakeTensorrt, tmp_path: Path) -> None:
    trt.__version__ = "8.6.1"
    with pytest.raises(BackendUnavailable, match=r"8\.6\.1, expected 10\.3 or newer"):
        open_engine(tmp_path / "engine.plan", "tensorrt", TensorrtOptions(cuda=trt.cudart.cuda()))


def test_machine_without_a_gpu_is_told_so(trt: FakeTensorrt, tmp_path: Path) -> None:
    path = built(trt, tmp_path / "engine.plan", STATIC)
    trt.cudart.limit(gpus=0)
    with pytest.raises(CudaError, match="cudaGetDeviceCount"):
        open_engine(path, "tensorrt", TensorrtOptions(cuda=trt.cudart.cuda()))
    assert trt.seen == []


@pytest.mark.parametrize(
    ("quirk", "text"),
    [
        ({"format": "CHW32"}, "found the layout Channel major FP32 format"),
        ({"dtype": "BF16"}, "found type BF16, expected one of float32"),
        ({"shape_tensor": True}, "found a tensor of shapes"),
    ],
)
def test_engines_that_cannot_be_fed_with_plain_arrays_are_refused(
    trt: FakeTensorrt, tmp_path: Path, quirk: dict[str, Any], text: str
) -> None:
    with pytest.raises(SpecError, match=text):
        opened(trt, tmp_path, plan_of(**quirk))


# Inference


def test_inputs_and_outputs_are_described(trt: FakeTensorrt, tmp_path: Path) -> None:
    session = opened(trt, tmp_path, DYNAMIC)
    assert session.inputs == (TensorSpec("images", ("batch", 2, 3)),)
    assert session.outputs == (TensorSpec("double", ("batch", 2, 3)),)
    assert opened(trt, tmp_path, STATIC).inputs[0].shape == (4, 2, 3)


def test_first_is_enqueued_second_is_captured_further_ones_are_launched(trt: FakeTensorrt, tmp_path: Path) -> None:
    session, cudart = opened(trt, tmp_path, STATIC), trt.cudart
    assert answers_right(session, seed=1)
    first = cudart.calls()
    assert first[first.index("StreamSynchronize") + 1 :] == [
        *("HostAlloc", "Malloc", "HostAlloc", "Malloc"),
        *("MemcpyAsync", "Malloc", "Free", "fake_scale", "MemcpyAsync", "StreamSynchronize"),
    ]
    assert answers_right(session, seed=2)
    assert cudart.calls() == [
        *("StreamBeginCapture", "MemcpyAsync", "fake_scale", "MemcpyAsync", "StreamEndCapture"),
        *("GraphInstantiate", "GraphDestroy", "GraphLaunch", "StreamSynchronize"),
    ]
    for seed in (3, 4):
        assert answers_right(session, seed=seed)
        assert cudart.calls() == ["GraphLaunch", "StreamSynchronize"]
    assert session.plain_because == ""


def test_answers_belong_to_the_caller(trt: FakeTensorrt, tmp_path: Path) -> None:
    session = opened(trt, tmp_path, STATIC)
    first = session.infer({"images": images(4, 1)})["double"]
    kept = first.copy()
    for seed in (2, 3):
        session.infer({"images": images(4, seed)})
    session.close()
    assert np.array_equal(first, kept)


def test_every_output_comes_back_under_its_name(trt: FakeTensorrt, tmp_path: Path) -> None:
    session = opened(trt, tmp_path, plan_of(factors={"half": 0.5, "triple": 3.0}))
    for _ in range(3):
        found = session.infer({"images": images(4)})
        assert np.array_equal(found["half"], images(4) * np.float32(0.5))
        assert np.array_equal(found["triple"], images(4) * np.float32(3))


def test_other_shape_drops_the_graph_and_is_enqueued_before_it_is_captured(trt: FakeTensorrt, tmp_path: Path) -> None:
    session, cudart = opened(trt, tmp_path, DYNAMIC), trt.cudart
    for _ in range(3):
        assert answers_right(session, 2)
    cudart.calls()
    assert answers_right(session, 5)
    calls = cudart.calls()
    assert "GraphExecDestroy" in calls
    assert not {"StreamBeginCapture", "GraphLaunch"} & set(calls)
    assert answers_right(session, 5, seed=1)
    assert "StreamBeginCapture" in cudart.calls()
    assert answers_right(session, 2)  # smaller again: no memory is taken
    assert not {"HostAlloc", "Malloc"} & set(cudart.calls()[:-5])
    assert answers_right(session, 1)  # another profile
    assert answers_right(session, 1, seed=1)
    assert cudart.alive()["graphs"] == 1


def test_shapes_that_no_profile_takes_are_refused_and_change_nothing(trt: FakeTensorrt, tmp_path: Path) -> None:
    session = opened(trt, tmp_path, DYNAMIC)
    assert answers_right(session, 2)
    expected = r"\(1, 2, 3\) to \(1, 2, 3\) or \(2, 2, 3\) to \(8, 2, 3\)"
    with pytest.raises(
        SpecError, match=rf"feeds: images: found shape \(9, 2, 3\), expected {expected}; feed it in parts"
    ):
        session.infer({"images": images(9)})
    trt.cudart.calls()
    assert answers_right(session, 2)
    assert "StreamBeginCapture" in trt.cudart.calls()  # as if nothing had been between


def test_feeds_are_checked(trt: FakeTensorrt, tmp_path: Path) -> None:
    session = opened(trt, tmp_path, STATIC)
    for feeds in ({}, {"images": images(3)}, {"images": images(4).astype(np.float64)}, {"other": images(4)}):
        with pytest.raises(SpecError, match="feeds"):
            session.infer(feeds)


def test_feeds_that_are_not_contiguous_are_copied_right(trt: FakeTensorrt, tmp_path: Path) -> None:
    session = opened(trt, tmp_path, STATIC)
    fed = images(8)[::2, :, ::-1]
    assert np.array_equal(session.infer({"images": fed})["double"], 2 * fed)


@pytest.mark.parametrize(
    ("shape", "index"), [((1, 2), 0), ((2, 2), 1), ((5, 2), 1), ((40, 2), 2), ((64, 2), 2), ((8, 2), 1)]
)
def test_profile_made_for_the_nearest_batch_is_chosen(shape: tuple[int, int], index: int) -> None:
    profiles = tuple({"x": ((1, 2), (best, 2), (most, 2))} for best, most in ((1, 1), (8, 64), (64, 64)))
    assert choose_profile(profiles, {"x": shape}) == index


# Graphs that are not to be had


def test_engine_that_cannot_be_captured_is_enqueued_each_time(trt: FakeTensorrt, tmp_path: Path) -> None:
    session, cudart = opened(trt, tmp_path, plan_of(uncapturable=True)), trt.cudart
    for seed in range(4):
        assert answers_right(session, seed=seed)
    calls = cudart.calls()
    assert calls.count("StreamBeginCapture") == 1  # tried once, not again and again
    assert calls.count("fake_scale") == 4
    assert "does not execute the engine" in session.plain_because
    assert not {"graphs", "recordings"} & set(cudart.alive())


@pytest.mark.parametrize(("call", "code"), [("cudaStreamBeginCapture", 900), ("cudaStreamEndCapture", 901),
                                            ("cudaGraphInstantiate", 900)])  # fmt: skip
def test_capture_that_cuda_refuses_is_done_without(trt: FakeTensorrt, tmp_path: Path, call: str, code: int) -> None:
    session, cudart = opened(trt, tmp_path, STATIC), trt.cudart
    assert answers_right(session)
    cudart.fail(call, code)
    assert answers_right(session, seed=1)
    assert call in session.plain_because
    assert answers_right(session, seed=2)


def test_fault_of_the_device_during_a_capture_is_no_reason_to_go_on(trt: FakeTensorrt, tmp_path: Path) -> None:
    session, cudart = opened(trt, tmp_path, STATIC), trt.cudart
    assert answers_right(session)
    cudart.fail("cudaGraphInstantiate", 700)
    with pytest.raises(CudaError, match="cudaErrorIllegalAddress"):
        session.infer({"images": images(4)})


def test_graphs_can_be_left_off(trt: FakeTensorrt, tmp_path: Path) -> None:
    session = opened(trt, tmp_path, STATIC, graphs=False)
    for seed in range(3):
        assert answers_right(session, seed=seed)
    assert "StreamBeginCapture" not in trt.cudart.calls()


def test_backend_without_graphs_is_enqueued_each_time(trt: FakeTensorrt, tmp_path: Path) -> None:
    cuda: Any = trt.cudart.cuda()
    cuda.captures = False
    session = open_engine(built(trt, tmp_path / "engine.plan", STATIC), "tensorrt", TensorrtOptions(cuda=cuda))
    for seed in range(3):
        assert answers_right(session, seed=seed)
    assert session.plain_because == "ctypes captures no graphs"


def test_tensorrt_rtx_is_asked_to_capture_by_itself(rtx: FakeTensorrt, tmp_path: Path) -> None:
    session = opened(rtx, tmp_path, STATIC)
    (context,) = rtx.contexts
    assert context.runtime_config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    for seed in range(3):
        assert answers_right(session, seed=seed)
    assert "StreamBeginCapture" not in rtx.cudart.calls()
    assert session.plain_because == ""
    session.close()
    plain = opened(rtx, tmp_path, STATIC, graphs=False)
    del context
    (context,) = rtx.contexts
    assert context.runtime_config is None
    plain.close()


# Faults, and what is left after them


@pytest.mark.parametrize("call", ["cudaStreamCreateWithFlags"])
def test_session_that_does_not_open_leaves_nothing(trt: FakeTensorrt, tmp_path: Path, call: str) -> None:
    path = built(trt, tmp_path / "engine.plan", STATIC)
    trt.cudart.fail(call, 2)
    with pytest.raises(CudaError, match=call):
        open_engine(path, "tensorrt", TensorrtOptions(cuda=trt.cudart.cuda()))
    assert trt.cudart.alive() == {}


def test_missing_context_is_told_and_leaves_nothing(trt: FakeTensorrt, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="makes no execution context: Requested amount of GPU memory"):
        opened(trt, tmp_path, plan_of(no_context=True))
    assert trt.cudart.alive() == {}


@pytest.mark.parametrize(
    ("quirk", "kind", "text"),
    [
        ({"no_execution": True}, EnvironmentFault, "does not execute the engine: enqueueV3"),
        ({"data_dependent": True}, SpecError, "which depends on the data"),
        ({"infer_fault": True}, EnvironmentFault, "cannot infer the outputs' shapes"),
    ],
)
def test_what_tensorrt_does_not_do_is_told(
    trt: FakeTensorrt, tmp_path: Path, quirk: dict[str, Any], kind: type[Exception], text: str
) -> None:
    session = opened(trt, tmp_path, plan_of([(1, 1, 8)], **quirk))
    for _ in range(2):
        with pytest.raises(kind, match=text):
            session.infer({"images": images(2)})
    session.close()


@pytest.mark.parametrize("call", ["cudaHostAlloc", "cudaMalloc", "cudaMemcpyAsync", "cudaStreamSynchronize"])
@pytest.mark.parametrize("after", [0, 1])
def test_call_that_fails_once_is_told_and_the_next_inference_is_right(
    trt: FakeTensorrt, tmp_path: Path, call: str, after: int
) -> None:
    session = opened(trt, tmp_path, DYNAMIC)
    trt.cudart.fail(call, 2, after=after)
    with pytest.raises(CudaError, match=call):
        session.infer({"images": images(3)})
    assert answers_right(session, 3)
    assert answers_right(session, 3, seed=1)
    assert answers_right(session, 5)


def test_memory_that_runs_out_for_a_large_batch_leaves_the_small_ones_working(
    trt: FakeTensorrt, tmp_path: Path
) -> None:
    session = opened(trt, tmp_path, DYNAMIC)
    assert answers_right(session, 2)
    trt.cudart.limit(memory_bytes=250)
    with pytest.raises(CudaError, match="cudaMalloc: found cudaErrorMemoryAllocation"):
        session.infer({"images": images(8)})
    assert answers_right(session, 2, seed=1)


def test_interrupted_inference_is_waited_for_before_its_memory_goes(
    trt: FakeTensorrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = opened(trt, tmp_path, DYNAMIC)
    with monkeypatch.context() as patch:
        patch.setattr(session._cuda, "synchronize", _interrupted_at_the_second(session._cuda.synchronize))
        with pytest.raises(KeyboardInterrupt):
            session.infer({"images": images(2)})
    assert answers_right(session, 8)  # larger memory: what was enqueued before must not touch the old one
    session.close()


def _interrupted_at_the_second(synchronize: Any) -> Any:
    calls = []

    def interrupted(stream: int) -> None:
        calls.append(stream)
        if len(calls) > 1:
            raise KeyboardInterrupt
        synchronize(stream)

    return interrupted


def test_close_gives_everything_back_and_once(trt: FakeTensorrt, tmp_path: Path) -> None:
    session = opened(trt, tmp_path, STATIC)
    for _ in range(3):
        assert answers_right(session)
    assert trt.cudart.alive() == {"device memory": 2, "pinned memory": 2, "streams": 1, "graphs": 1}
    trt.cudart.calls()
    session.close()
    assert trt.cudart.calls() == [
        *("StreamSynchronize", "GraphExecDestroy", "Free", "FreeHost", "Free", "FreeHost", "StreamDestroy")
    ]
    gc.collect()
    assert (len(trt.contexts), len(trt.engines)) == (0, 0)
    session.close()
    assert trt.cudart.calls() == []
    for use in (lambda: session.infer({"images": images(4)}), session.worker):
        with pytest.raises(ClosedSession):
            use()


@pytest.mark.parametrize(
    "call", ["cudaStreamSynchronize", "cudaGraphExecDestroy", "cudaFree", "cudaFreeHost", "cudaStreamDestroy"]
)
def test_close_gives_back_the_rest_where_one_call_fails(trt: FakeTensorrt, tmp_path: Path, call: str) -> None:
    session = opened(trt, tmp_path, STATIC)
    for _ in range(2):
        assert answers_right(session)
    trt.cudart.fail(call, 700)
    if call == "cudaStreamSynchronize":
        session.close()
    else:
        with pytest.raises(CudaError, match=call):
            session.close()
    assert sum(trt.cudart.alive().values()) == (0 if call == "cudaStreamSynchronize" else 1)
    trt.cudart.library.fake_reset()  # what the failed call kept


def test_forgotten_session_gives_everything_back(trt: FakeTensorrt, tmp_path: Path) -> None:
    assert answers_right(opened(trt, tmp_path, STATIC))
    gc.collect()
    assert trt.cudart.alive() == {}


# Workers


def test_each_worker_has_a_context_stream_and_memory_of_its_own(trt: FakeTensorrt, tmp_path: Path) -> None:
    first = opened(trt, tmp_path, DYNAMIC)
    second = first.worker()
    assert trt.seen == [DYNAMIC]  # one engine
    assert len(trt.contexts) == 2
    assert answers_right(first, 2)
    assert answers_right(second, 5)
    assert trt.cudart.alive()["streams"] == 2
    first.close()
    assert answers_right(second, 5, seed=1)
    second.close()


def test_workers_do_not_disturb_each_other(trt: FakeTensorrt, tmp_path: Path) -> None:
    first = opened(trt, tmp_path, DYNAMIC)
    sessions = [first, *(first.worker() for _ in range(3))]
    outcomes: list[object] = []

    def work(session: TensorrtSession, batch: int) -> None:
        try:
            outcomes.extend(answers_right(session, batch, seed) for seed in range(20))
        except EnvironmentFault as err:
            outcomes.append(err)

    threads = [threading.Thread(target=work, args=(session, 2 + i)) for i, session in enumerate(sessions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True] * 80
    for session in sessions:
        session.close()


# DLA


def test_engine_for_dla_runs_on_the_core_that_is_named(trt: FakeTensorrt, tmp_path: Path) -> None:
    trt.dla_cores = 2
    path = built(trt, tmp_path / "engine.plan", STATIC, dla=True)
    session = open_engine(path, "tensorrt", TensorrtOptions(cuda=trt.cudart.cuda(), dla_core=1))
    assert [engine.ran_on for engine in trt.engines] == [1]
    session.close()
    with pytest.raises(BackendUnavailable, match="DLA core 2 of 2"):
        open_engine(path, "tensorrt", TensorrtOptions(cuda=trt.cudart.cuda(), dla_core=2))


# Through the dispatcher


def test_a_target_says_how_its_engines_are_executed(
    trt: FakeTensorrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []

    def open_named(choice: str) -> Any:
        chosen.append(choice)
        return trt.cudart.cuda()

    monkeypatch.setattr("edgepose.runtime.tensorrt.open_cuda", open_named)
    trt.dla_cores = 2
    path = built(trt, tmp_path / "engine.plan", STATIC, dla=True)
    execution = Execution(tensorrt=TensorrtExecution(cuda="ctypes", graphs=False, dla_core=1))
    session = open_session(path, "tensorrt", execution=execution)
    assert chosen == ["ctypes"]
    assert [engine.ran_on for engine in trt.engines] == [1]
    assert isinstance(session, TensorrtSession)
    for seed in range(4):
        assert answers_right(session, seed=seed)
    assert not any("Graph" in call for call in trt.cudart.calls())
    session.close()


def test_keys_of_the_environment_are_trusted(
    trt: FakeTensorrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPOSE_TRUSTED_KEYS", f"{tmp_path / 'a.pem'}{os.pathsep}{tmp_path / 'b.pem'}")
    assert TensorrtOptions.of(TensorrtExecution()).trusted_keys == (tmp_path / "a.pem", tmp_path / "b.pem")
    monkeypatch.setenv("EDGEPOSE_TRUSTED_KEYS", "")
    assert TensorrtOptions.of(TensorrtExecution()).trusted_keys == ()


def test_dispatcher_opens_tensorrt_engines(trt: FakeTensorrt, tmp_path: Path) -> None:
    path = built(trt, tmp_path / "engine.plan", STATIC)
    session = open_session(path, "tensorrt", tensorrt=TensorrtOptions(cuda=trt.cudart.cuda()))
    assert np.array_equal(session.infer({"images": images(4)})["double"], 2 * images(4))
    session.close()


# The fake itself


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_fake_offers_nothing_that_tensorrt_lacks(trt: FakeTensorrt, rtx: FakeTensorrt, name: str) -> None:
    module = trt if name == "tensorrt" else rtx
    column = -1 if name == "tensorrt_rtx" else RECORDED["versions"].index("tensorrt 10.16.1.11")
    recorded = {dotted for dotted, row in RECORDED["names"].items() if row[column] == "1"}
    runtime = module.Runtime(type("Log", (module.ILogger,), {"log": lambda *_: None})())
    engine = runtime.deserialize_cuda_engine(STATIC)
    context = engine.create_execution_context()
    offered = {kind: dir(thing) for kind, thing in
               {"Runtime": runtime, "ICudaEngine": engine, "IExecutionContext": context}.items()}  # fmt: skip
    own = {"ICudaEngine.ran_on", "IExecutionContext.runtime_config"}  # for tests to look at
    names = {f"{kind}.{each}" for kind, members in offered.items() for each in members if not each.startswith("_")}
    assert names - recorded - own == set()
    for enum in ("TensorIOMode", "TensorFormat", "DataType"):
        assert {f"{enum}.{member}" for member in getattr(module, enum).__members__} <= recorded
