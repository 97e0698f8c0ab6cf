"""Providers, devices, hints, threads and caches: each option does what it says, and the runtime itself says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import pytest

from edgepose.errors import BackendUnavailable, UsageError
from edgepose.host import core_cpus
from edgepose.runtime import facts_of, open_session
from edgepose.runtime.openvino import available_devices
from edgepose.runtime.ort import PROVIDERS, OrtSession, available_providers, provider_options
from edgepose.spec import Backend, Execution, OpenvinoOptions, OrtOptions, OrtProvider
from tests.fakes import HEIGHT, WIDTH, FakeSession, spot_outputs, spot_spec
from tests.tiny_network import spot_ir, spot_onnx

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "spots.onnx"
    path.write_bytes(spot_onnx())
    return path


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3, HEIGHT, WIDTH), np.float32)


def ort(**options: Any) -> Execution:
    return Execution(onnxruntime=OrtOptions(**options))


def openvino(**options: Any) -> Execution:
    return Execution(openvino=OpenvinoOptions(**options))


def answers(path: Path, backend: Backend, execution: Execution, *, threads: int = 1, count: int = 5) -> dict[str, str]:
    """What the runtime says of its settings, once its answers were found to be right; of two batch sizes."""
    session = open_session(path, backend, threads=threads, execution=execution)
    try:
        for size in (count, 1, count):
            fed = images(size, seed=size)
            found = session.infer({"images": fed})
            for name, expected in spot_outputs(fed).items():
                np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5)
        facts = facts_of(session)
        assert facts is not None
        return facts.settings
    finally:
        session.close()


# ONNX Runtime: providers


def test_every_provider_has_a_name_and_is_told_something_plain() -> None:
    assert tuple(PROVIDERS) == get_args(OrtProvider)
    for name in PROVIDERS:
        for precision in ("fp32", "int8", "fp16"):
            told = provider_options(name, 3, precision)
            assert all(isinstance(value, str) for value in told.values())
    assert provider_options("cuda", 1, "fp32") == {"use_tf32": "0"}
    assert provider_options("tensorrt", 1, "fp16") == {"trt_fp16_enable": "1", "trt_int8_enable": "0"}
    assert provider_options("xnnpack", 3, "fp32") == {"intra_op_num_threads": "3"}


@pytest.mark.parametrize("name", sorted(set(PROVIDERS) - {"cpu"}))
def test_provider_that_is_not_there_is_an_error_that_lists_those_that_are(network: Path, name: OrtProvider) -> None:
    if name in available_providers():
        pytest.skip(f"{name} is here")
    with pytest.raises(BackendUnavailable, match=rf"provider {name}: found .* cpu, expected {name} among") as caught:
        open_session(network, "onnxruntime", threads=1, execution=ort(providers=(name, "cpu")))
    assert caught.value.exit_code == 6


def test_where_nodes_run_is_told_by_the_runtime(network: Path) -> None:
    session = open_session(network, "onnxruntime", threads=1, execution=ort(strict=True))
    facts = facts_of(session)
    session.close()
    assert facts is not None
    assert facts.placement == {"cpu": ("Conv", "ReduceSum", "ReduceSum")}
    assert facts.text == "all 3 nodes on cpu"


def test_strict_refuses_nodes_that_landed_elsewhere(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Azure's provider is in every wheel, starts anywhere and takes no node of ours."""
    monkeypatch.setitem(PROVIDERS, "cuda", "AzureExecutionProvider")
    monkeypatch.setattr("edgepose.runtime.ort.provider_options", lambda *_: {})
    session = open_session(network, "onnxruntime", threads=1, execution=ort(providers=("cuda",)))
    assert session.infer({"images": images(1)})
    session.close()
    with pytest.raises(BackendUnavailable, match=r"3 of 3 nodes elsewhere, Conv on cpu the first, expected all on cud"):
        open_session(network, "onnxruntime", threads=1, execution=ort(providers=("cuda",), strict=True))
    open_session(network, "onnxruntime", threads=1, execution=ort(providers=("cuda", "cpu"), strict=True)).close()


# ONNX Runtime: the rest


@pytest.mark.parametrize(
    "options",
    [
        {"optimisation": "none"},
        {"optimisation": "basic"},
        {"optimisation": "extended"},
        {"io_binding": True},
        {"spinning": True},
        {"save_optimised": True},
    ],
    ids=str,
)
def test_options_of_onnxruntime_do_not_change_the_answers(network: Path, options: dict[str, Any]) -> None:
    said = answers(network, "onnxruntime", ort(**options), threads=2)
    assert said["optimisation"] == options.get("optimisation", "all")
    assert said["io_binding"] == ("yes" if "io_binding" in options else "no")
    assert said["threads"] == "2"


def test_optimisation_level_decides_what_is_rewritten(tmp_path: Path, network: Path) -> None:
    import onnx

    operators = {}
    for level in ("none", "all"):
        session = OrtSession(network, threads=1, execution=ort(optimisation=level, save_optimised=True))
        session.close()
        for kept in (tmp_path / "cache" / "onnxruntime").iterdir():
            operators[level] = [(node.op_type, node.domain) for node in onnx.load(kept).graph.node]
            kept.unlink()
    assert operators["none"] == [("Conv", ""), ("ReduceSum", ""), ("ReduceSum", "")]
    assert operators["all"] != operators["none"]


def test_optimised_network_is_kept_and_found_again(tmp_path: Path, network: Path) -> None:
    folder = tmp_path / "cache" / "onnxruntime"
    answers(network, "onnxruntime", ort(save_optimised=True))
    (kept,) = folder.iterdir()
    written = kept.stat().st_mtime_ns
    answers(network, "onnxruntime", ort(save_optimised=True))
    assert (list(folder.iterdir()), kept.stat().st_mtime_ns) == ([kept], written)
    answers(network, "onnxruntime", ort(save_optimised=True, optimisation="basic"))
    assert len(list(folder.iterdir())) == 2


def test_broken_file_in_the_cache_is_made_again(tmp_path: Path, network: Path) -> None:
    answers(network, "onnxruntime", ort(save_optimised=True))
    (kept,) = (tmp_path / "cache" / "onnxruntime").iterdir()
    kept.write_bytes(kept.read_bytes()[:50])
    answers(network, "onnxruntime", ort(save_optimised=True))
    assert kept.stat().st_size > 50


def test_network_of_a_compiling_provider_cannot_be_saved(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "tensorrt", "AzureExecutionProvider")
    with pytest.raises(UsageError, match="save_optimised: found tensorrt, which compiles"):
        open_session(network, "onnxruntime", execution=ort(providers=("tensorrt",), save_optimised=True))


def test_bound_answers_belong_to_the_caller(network: Path) -> None:
    session = open_session(network, "onnxruntime", threads=1, execution=ort(io_binding=True))
    first = session.infer({"images": images(2, seed=1)})
    kept = {name: value.copy() for name, value in first.items()}
    session.infer({"images": images(2, seed=2)})
    session.close()
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])
        value[:] = 0  # writable


# Threads, streams, affinity


_TIED = """
import os, re, sys, time
from pathlib import Path
from edgepose.runtime import open_session
from edgepose.spec import Execution

def tied():
    allowed = {}
    for task in Path("/proc/self/task").iterdir():
        allowed[task.name] = re.search(r"Cpus_allowed_list:\\s*(\\S+)", (task / "status").read_text())[1]
    return [cpus for cpus in allowed.values() if cpus != allowed[str(os.getpid())]]

for affinity in ("free", "pinned"):
    session = open_session(sys.argv[1], "onnxruntime", threads=2, execution=Execution(affinity=affinity))
    for _ in range(100 if affinity == "pinned" else 5):  # a thread ties itself when it gets to run
        time.sleep(0.05)
        if tied():
            break
    print(affinity, *tied())
    session.close()
"""
"""Prints the CPUs of threads that may not run wherever the process may."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(len(core_cpus()) < 2, reason="one core")
def test_pinned_threads_of_onnxruntime_stay_on_a_core_of_their_own(network: Path) -> None:
    result = subprocess.run([sys.executable, "-c", _TIED, str(network)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["free", f"pinned {core_cpus()[1]}"]


@pytest.mark.parametrize("affinity", ["auto", "free", "pinned"])
def test_affinity_is_read_back_from_openvino(network: Path, affinity: Any) -> None:
    said = answers(network, "openvino", Execution(affinity=affinity), threads=1)
    assert affinity == "auto" or said["pinned"] == {"free": "no", "pinned": "yes"}[affinity]


def test_streams_reach_both_runtimes(network: Path) -> None:
    assert answers(network, "onnxruntime", Execution(streams=2), threads=1)["streams"] == "2"
    assert answers(network, "openvino", Execution(streams=2), threads=2)["streams"] == "2"


# OpenVINO


@pytest.mark.parametrize("device", ["GPU", "NPU", "GPU.7", "AUTO:GPU,CPU"])
def test_device_that_is_not_there_is_an_error_that_lists_those_that_are(network: Path, device: str) -> None:
    if any(there.startswith(("GPU", "NPU")) for there in available_devices()):
        pytest.skip("there is such a device here")
    with pytest.raises(BackendUnavailable, match=r"device (GPU|NPU)\S*: found the devices CPU, expected"):
        open_session(network, "openvino", threads=1, execution=openvino(device=device))


@pytest.mark.parametrize("device", ["cpu", "CPU;GPU", "HETERO:CPU", "AUTO:", "TPU", "MULTI:CPU"])
def test_what_is_no_device_is_refused_when_it_is_read(device: str) -> None:
    with pytest.raises(msgspec.ValidationError, match="device"):
        msgspec.convert({"device": device}, OpenvinoOptions)


@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_hint_device_threads_and_precision_are_read_back(tmp_path: Path, network: Path, hint: Any) -> None:
    said = answers(spot_ir(tmp_path), "openvino", openvino(hint=hint), threads=2)
    assert (said["hint"], said["device"], said["precision"], said["threads"]) == (hint, "CPU", "f32", "2")


def test_throughput_infers_the_parts_of_a_batch_side_by_side(network: Path) -> None:
    execution = msgspec.structs.replace(openvino(hint="throughput"), streams=2)
    assert answers(network, "openvino", execution, threads=2, count=7)["requests"] == "2"


def test_auto_says_which_device_it_took_and_pins_its_precision(network: Path) -> None:
    said = answers(network, "openvino", openvino(device="AUTO"))
    assert said["precision"] == "f32"
    assert said["device"].replace("(", "").split(".")[0] in {"CPU", "GPU", "NPU"}


def test_precision_that_the_device_does_not_hold_to_is_refused(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgepose.runtime.openvino._device_config", lambda *_: {"INFERENCE_PRECISION_HINT": "bf16"})
    if "BF16" not in _capabilities():
        pytest.skip("no BF16 here")
    with pytest.raises(BackendUnavailable, match="found arithmetic in bf16, expected f32"):
        open_session(network, "openvino", threads=1)


def _capabilities() -> list[str]:
    from edgepose.runtime.openvino import shared_core

    return list(shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def test_compiled_network_is_kept_by_fingerprint_and_found_again(tmp_path: Path, network: Path) -> None:
    assert answers(network, "openvino", openvino())["from_cache"] == "no"
    assert not (tmp_path / "cache").exists()
    assert answers(network, "openvino", openvino(cache=True))["from_cache"] == "no"
    assert answers(network, "openvino", openvino(cache=True))["from_cache"] == "yes"
    (folder,) = (tmp_path / "cache" / "openvino").iterdir()
    (blob,) = folder.glob("*.blob")
    blob.write_bytes(blob.read_bytes()[:100])
    assert answers(network, "openvino", openvino(cache=True))["from_cache"] == "no"


def test_another_host_never_finds_what_was_compiled_here(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgepose.host import fingerprint

    assert answers(network, "openvino", openvino(cache=True))["from_cache"] == "no"
    other = msgspec.structs.replace(fingerprint(), cpu="another")
    monkeypatch.setattr("edgepose.runtime.openvino.fingerprint", lambda: other)
    assert answers(network, "openvino", openvino(cache=True))["from_cache"] == "no"


def test_openvino_tells_what_it_executes(network: Path) -> None:
    session = open_session(network, "openvino", threads=1)
    facts = facts_of(session)
    session.close()
    assert facts is not None
    assert list(facts.placement) == ["CPU"]
    assert any("Convolution" in name for name in facts.placement["CPU"])


def test_session_of_ones_own_need_not_tell() -> None:
    assert facts_of(FakeSession(spot_spec())) is None
