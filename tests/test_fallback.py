"""Where the engine that a bundle prefers is for another machine, the next one runs, and the user is told why."""

from __future__ import annotations

import json
import logging
import sys
import types
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgepose.__main__ import main
from edgepose.bundle import Bundle, EngineDraft, write_bundle
from edgepose.engines import choose_engine
from edgepose.errors import EnvironmentFault
from edgepose.estimator import EstimatorOptions, PoseEstimator
from edgepose.runtime.guard import EngineFault
from edgepose.runtime.ort import OrtSession
from edgepose.runtime.provenance import ForeignEngine, Provenance, companions, digest_of, write_engine
from edgepose.runtime.tensorrt import engine_host
from edgepose.runtime.trt_versions import TrtApi
from tests.fakes import spot_frame
from tests.runtime.fake_cuda import FakeCudart, cudart, fake_cuda_python, fake_cudart_file
from tests.runtime.fake_tensorrt import FakeTensorrt, plan_of
from tests.tiny_network import spot_bundle, spot_draft

__all__ = ["cudart", "fake_cudart_file"]  # fixtures

FRAME = np.zeros((64, 64, 3), np.uint8)
_REBUILD = r"edgepose build \S*spots\.bundle --target jetson-orin-nano --out"


@pytest.fixture
def trt(cudart: FakeCudart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeTensorrt:
    """A machine with a GPU and TensorRT 10.16, reached as cuda-python would be."""
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    module = FakeTensorrt(cudart)
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    for name in ("cuda", "cuda.bindings"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", fake_cuda_python(cudart))
    return module


@pytest.fixture
def bundle(trt: FakeTensorrt, tmp_path: Path) -> Bundle:
    """A bundle that prefers a TensorRT engine, built on this machine, to those of the CPU."""
    plan, path = plan_of(), tmp_path / "engine.plan"
    host = engine_host(TrtApi(trt, "tensorrt", trt.__version__), trt.cudart.cuda())
    provenance = Provenance(sha256=digest_of(plan), size_bytes=len(plan), built=host, target="jetson-orin-nano")
    write_engine(path, plan, provenance)
    files = {file.name: file for file in (path, *companions(path)[:2])}
    engine = EngineDraft(
        target="jetson-orin-nano",
        backend="tensorrt",
        precision="fp16",
        dialect="float",
        files=files,
        main=path.name,
        builder="tensorrt",
    )
    draft = spot_draft(tmp_path)
    return write_bundle(tmp_path / "spots.bundle", replace(draft, engines=(engine, *draft.engines)))


def test_engine_of_another_version_is_passed_over_and_the_rebuild_named(
    trt: FakeTensorrt, bundle: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    trt.__version__ = "10.3.0"
    with caplog.at_level(logging.WARNING, "edgepose"), PoseEstimator.from_bundle(bundle.root) as estimator:
        info = estimator.info()
        assert len(estimator(FRAME)) == 1
    assert (info.backend, len(info.passed_over)) == ("onnxruntime", 1)
    assert "TensorRT: found tensorrt 10.3.0, expected tensorrt 10.16.1.11" in info.passed_over[0]
    (record,) = caplog.records
    assert "running onnxruntime fp32 meanwhile" in record.getMessage()
    assert choose_engine(bundle).backend == "onnxruntime"
    assert trt.seen == []


def test_engine_of_another_version_is_an_error_where_tensorrt_was_named(trt: FakeTensorrt, bundle: Bundle) -> None:
    trt.__version__ = "10.3.0"
    with pytest.raises(ForeignEngine, match=_REBUILD) as caught:
        PoseEstimator.from_bundle(bundle.root, backend="tensorrt")
    assert caught.value.exit_code == 8


def test_all_engines_being_foreign_is_an_error(trt: FakeTensorrt, bundle: Bundle) -> None:
    trt.__version__ = "10.3.0"
    with pytest.raises(ForeignEngine, match=_REBUILD):
        PoseEstimator.from_bundle(bundle.root, precision="fp16")


def test_machine_without_a_gpu_runs_the_next_engine(trt: FakeTensorrt, bundle: Bundle) -> None:
    trt.cudart.limit(gpus=0)
    with PoseEstimator.from_bundle(bundle.root) as estimator:
        assert estimator.info().backend == "onnxruntime"
        assert "cudaGetDeviceCount" in estimator.info().passed_over[0]
    with pytest.raises(EnvironmentFault, match="cudaGetDeviceCount"):
        PoseEstimator.from_bundle(bundle.root, backend="tensorrt")


def test_engine_of_this_machine_is_preferred(trt: FakeTensorrt, bundle: Bundle) -> None:
    assert choose_engine(bundle).backend == "tensorrt"
    assert trt.seen == [plan_of()]


def test_nothing_is_passed_over_where_the_first_engine_runs(bundle: Bundle) -> None:
    with PoseEstimator.from_bundle(bundle.root, backend="onnxruntime") as estimator:
        assert estimator.info().passed_over == ()


def test_verify_names_what_differs_and_runs_the_others(
    trt: FakeTensorrt, bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    trt.__version__ = "10.3.0"
    assert main(["verify", str(bundle.root), "--json"]) == 0
    said = capsys.readouterr()
    rows = {row["backend"]: row for row in json.loads(said.out)["engines"]}
    assert {name: row["outcome"] for name, row in rows.items()} == {
        "tensorrt": "not run",
        "onnxruntime": "same",
        "openvino": "same",
    }
    assert "TensorRT: found tensorrt 10.3.0" in rows["tensorrt"]["detail"]
    assert "--target jetson-orin-nano" in rows["tensorrt"]["detail"]
    assert "engine.plan was not run" in said.err


def test_changed_engine_of_tensorrt_is_never_passed_over(bundle: Bundle) -> None:
    path = bundle.root / bundle.manifest.engines[0].path
    path.write_bytes(path.read_bytes() + b"!")
    with pytest.raises(Exception, match="sha256") as caught:
        PoseEstimator.from_bundle(bundle.root)
    assert caught.value.exit_code == 8  # type: ignore[attr-defined]


def test_reason_survives_as_json(trt: FakeTensorrt, bundle: Bundle) -> None:
    trt.__version__ = "10.3.0"
    with PoseEstimator.from_bundle(bundle.root) as estimator:
        assert json.loads(msgspec.json.encode(estimator.info()))["passed_over"]


# Engines that fail while they run


def test_poses_say_that_another_engine_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = spot_bundle(tmp_path)
    frame = spot_frame((80, 60), (200, 150))
    with PoseEstimator.from_bundle(bundle.root) as estimator, caplog.at_level(logging.WARNING, "edgepose"):
        before = estimator(frame)
        monkeypatch.setattr(OrtSession, "infer", broken)
        poses = estimator(frame)
        assert estimator.info().facts is not None
    assert (before.backend, before.degraded) == ("onnxruntime", False)
    assert (poses.backend, poses.degraded) == ("openvino", True)
    np.testing.assert_allclose(poses.keypoints, before.keypoints, atol=0.05)
    assert "engine onnxruntime: found RuntimeError: CUDA error 700" in caplog.text


def test_strict_and_a_named_backend_never_answer_by_another_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = spot_bundle(tmp_path)
    monkeypatch.setattr(OrtSession, "infer", broken)
    for backend, options in ((None, EstimatorOptions(strict=True)), ("onnxruntime", EstimatorOptions())):
        with (
            PoseEstimator.from_bundle(bundle.root, backend, options=options) as estimator,  # type: ignore[arg-type]
            pytest.raises(EngineFault, match="CUDA error 700"),
        ):
            estimator(FRAME)


def broken(_session: OrtSession, _feeds: object) -> dict[str, np.ndarray]:
    raise RuntimeError("CUDA error 700")
