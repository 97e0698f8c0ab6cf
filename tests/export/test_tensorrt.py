"""Engines are built as the target asks, on a TensorRT made of Python over a CUDA made of C: no GPU is needed."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepose.errors import (
    BackendUnavailable,
    EnvironmentFault,
    IntegrityError,
    MissingDependency,
    OnnxError,
    ParityError,
    UsageError,
)
from edgepose.export.engine import Reference
from edgepose.export.tensorrt import Plan, PlanOrder, build_plan, timing_cache_file
from edgepose.export.tensorrt_engine import EngineWish, tensorrt_engine
from edgepose.runtime.provenance import STRIPPED_WEIGHTS
from edgepose.runtime.tensorrt import TensorrtOptions, open_engine
from edgepose.spec import Keypoints, ModelSpec, Preprocess, SimCC, Target, TensorrtBuild, TensorSpec
from edgepose.stages.engine_latency import Latency
from edgepose.timing.record import LatencyProtocol, ModelArm
from tests.runtime.fake_builder import UNKNOWN, give_builder
from tests.runtime.fake_cuda import FakeCudart, cudart, fake_cudart_file
from tests.runtime.fake_tensorrt import FakeTensorrt

__all__ = ["cudart", "fake_cudart_file"]  # fixtures

SPEC = ModelSpec(
    name="fake",
    keypoints=Keypoints(("a", "b")),
    preprocess=Preprocess((2, 3)),
    decoder=SimCC(split_ratio=1.0),
    inputs=(TensorSpec("images", ("batch", 2, 3)),),
    outputs=(TensorSpec("simcc_x", ("batch", 2, 3)), TensorSpec("simcc_y", ("batch", 2, 3))),
)
IMAGES = np.random.default_rng(3).normal(size=(5, 2, 3)).astype(np.float32)
REFERENCE = Reference(SPEC, IMAGES, {"simcc_x": 2 * IMAGES, "simcc_y": 3 * IMAGES})
ORIN = Target("orin", "A board.", ("tensorrt",), ("fp32", "fp16", "int8"), compute_capability="8.7", max_batch=16)


@pytest.fixture
def trt(cudart: FakeCudart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorrt]:
    """A board with a GPU and TensorRT; at the end, nothing of the GPU is in use."""
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    cudart.limit(memory_bytes=64 << 30)
    module = give_builder(FakeTensorrt(cudart))
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    yield module
    if cudart.alive():
        gc.collect()
    assert cudart.alive() == {}


def network(path: Path, *, batch: str | int = "batch", operator: str = "", width: int = 3) -> Path:
    """`simcc_x` and `simcc_y` are 2 and 3 times the images."""
    nodes, constants = [], []
    for name, factor in (("simcc_x", 2.0), ("simcc_y", 3.0)):
        constants.append(numpy_helper.from_array(np.eye(width, dtype=np.float32) * np.float32(factor), f"{name}_w"))
        nodes.append(helper.make_node("MatMul", ["images", f"{name}_w"], [name], name=f"{name}_product"))
    if operator:
        nodes.append(helper.make_node(operator, ["images"], ["odd"], name="odd_one"))
    shape = (batch, 2, width)
    graph = helper.make_graph(
        nodes, "net", [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("simcc_x", "simcc_y")], constants,
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def orin(**build: Any) -> Target:
    return msgspec.structs.replace(ORIN, tensorrt=TensorrtBuild(**build))


def planned(trt: FakeTensorrt, folder: Path, target: Target = ORIN, **net: Any) -> Plan:
    model = network(folder / "net.onnx", **net)
    return build_plan(PlanOrder(model, target, "tensorrt", cuda=trt.cudart.cuda()))


def engine(trt: FakeTensorrt, folder: Path, target: Target = ORIN, **wish: Any) -> dict[str, Any]:
    out = folder / "engine"
    out.mkdir(exist_ok=True)
    wished = EngineWish(target, "tensorrt", cuda=trt.cudart.cuda(), **wish)
    return tensorrt_engine(network(folder / "net.onnx"), wished, REFERENCE, out)


def config_of(trt: Any) -> Any:
    return trt.built[-1]


# What is asked of the builder


def test_networks_are_strongly_typed_and_tf32_is_off(trt: FakeTensorrt, tmp_path: Path) -> None:
    plan = planned(trt, tmp_path)  # the fake refuses networks of any other typing
    config = config_of(trt)
    assert config.flags_set == set()  # TF32 was on
    assert config.builder_optimization_level == 3
    assert plan.report.builder == "tensorrt 10.16.1.11"
    assert plan.report.warnings == ("a warning of the builder",)
    assert plan.report.options == ()


def test_profiles_are_the_targets_cut_at_its_largest_batch(trt: FakeTensorrt, tmp_path: Path) -> None:
    plan = planned(trt, tmp_path, orin(profiles=((1, 1, 1), (1, 8, 64))))
    assert plan.report.profiles == ((1, 1, 1), (1, 8, 16))
    assert config_of(trt).profiles[1]["images"] == ((1, 2, 3), (8, 2, 3), (16, 2, 3))


def test_network_of_a_fixed_batch_has_no_profiles(trt: FakeTensorrt, tmp_path: Path) -> None:
    assert planned(trt, tmp_path, batch=4).report.profiles == ()
    assert config_of(trt).profiles == []


def test_target_of_a_fixed_batch_has_one_profile_of_it(trt: FakeTensorrt, tmp_path: Path) -> None:
    target = msgspec.structs.replace(ORIN, batch=4)
    assert planned(trt, tmp_path, target).report.profiles == ((4, 4, 4),)


def test_workspace_and_level_are_the_targets(trt: FakeTensorrt, tmp_path: Path) -> None:
    plan = planned(trt, tmp_path, orin(workspace_mib=7, level=5))
    config = config_of(trt)
    assert config.builder_optimization_level == plan.report.level == 5
    assert list(config.pools.values()) == [7 << 20] == [plan.report.workspace_bytes]


def test_without_a_limit_kernels_get_half_of_what_is_free(trt: FakeTensorrt, tmp_path: Path) -> None:
    assert planned(trt, tmp_path).report.workspace_bytes == 32 << 30


@pytest.mark.parametrize(
    ("build", "flags", "option"),
    [
        ({"version_compatible": True}, {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}, "version-compatible"),
        ({"strip_weights": True}, {"STRIP_PLAN", "REFIT_IDENTICAL"}, "weights stripped"),
    ],
)
def test_flags_are_set(trt: FakeTensorrt, tmp_path: Path, build: Any, flags: set[str], option: str) -> None:
    plan = planned(trt, tmp_path, orin(**build))
    assert {flag.name for flag in config_of(trt).flags_set} == flags
    assert plan.report.options == (option,)


def test_kernels_for_sparse_weights_are_looked_for_where_there_are_some(trt: FakeTensorrt, tmp_path: Path) -> None:
    plan = planned(trt, tmp_path, width=4)  # of four inputs, each output reads one
    assert {flag.name for flag in config_of(trt).flags_set} == {"SPARSE_WEIGHTS"}
    assert plan.report.options == ("2:4 sparse weights in 2 layers",)


@pytest.mark.parametrize(("hardware", "level"), [("ampere-plus", 1), ("same-compute-capability", 2)])
def test_hardware_compatibility(trt: FakeTensorrt, tmp_path: Path, hardware: Any, level: int) -> None:
    assert planned(trt, tmp_path, orin(hardware=hardware)).report.options == (hardware,)
    assert config_of(trt).hardware_compatibility_level == level


def test_what_a_version_lacks_is_said_before_it_is_touched(trt: FakeTensorrt, tmp_path: Path) -> None:
    trt.__version__ = "10.3.0"
    with pytest.raises(BackendUnavailable, match=r"has no HardwareCompatibilityLevel.SAME.*from 10\.13"):
        planned(trt, tmp_path, orin(hardware="same-compute-capability"))


# Timing cache


def test_timing_cache_is_kept_by_device_and_version_and_never_of_another(trt: FakeTensorrt, tmp_path: Path) -> None:
    first = planned(trt, tmp_path)
    assert first.report.timing_cache == "new"
    file = timing_cache_file(first.host)
    assert file.read_bytes() == b"timings of 10.16.1.11"
    assert file.parent.stat().st_mode & 0o077 == 0
    assert planned(trt, tmp_path).report.timing_cache == "found"
    assert config_of(trt).mismatches == [False]
    trt.__version__ = "10.13.3.9"
    assert planned(trt, tmp_path).report.timing_cache == "new"
    assert len(list(file.parent.iterdir())) == 2


def test_timing_cache_that_tensorrt_refuses_is_begun_anew(trt: FakeTensorrt, tmp_path: Path) -> None:
    file = timing_cache_file(planned(trt, tmp_path).host)
    file.write_bytes(b"of something else")
    assert planned(trt, tmp_path).report.timing_cache == "new"
    assert config_of(trt).mismatches == [False, False]
    assert file.read_bytes() == b"timings of 10.16.1.11"


# DLA


def test_dla_takes_what_it_can_and_the_rest_is_counted(trt: FakeTensorrt, tmp_path: Path) -> None:
    trt.dla_cores = 2
    trt.dla_takes = ("MATRIX_MULTIPLY",)  # type: ignore[attr-defined]
    model = network(tmp_path / "net.onnx")
    loaded = onnx.load(model)
    loaded.graph.node.append(helper.make_node("Relu", ["simcc_x"], ["unused"], name="relu"))
    onnx.save(loaded, model)
    target = orin(dla_core=1, profiles=((1, 4, 8),))
    plan = build_plan(PlanOrder(model, target, "tensorrt", cuda=trt.cudart.cuda()))
    assert plan.report.dla is not None
    assert (plan.report.dla.core, plan.report.dla.layers) == (1, 2)
    assert plan.report.dla.fallen_back == ("elementwise relu",)
    config = config_of(trt)
    assert (config.DLA_core, config.default_device_type.name) == (1, "DLA")
    assert {flag.name for flag in config.flags_set} == {"GPU_FALLBACK"}
    assert plan.report.profiles == ((4, 4, 4),)  # a DLA has fixed shapes


def test_dla_core_that_is_not_there(trt: FakeTensorrt, tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match="dla_core 0: found 0 DLA cores"):
        planned(trt, tmp_path, orin(dla_core=0))


# Small boards


def test_less_is_asked_for_where_memory_runs_out_and_it_is_said(trt: FakeTensorrt, tmp_path: Path) -> None:
    trt.most_batch = 4  # type: ignore[attr-defined]
    plan = planned(trt, tmp_path, orin(profiles=((1, 8, 64),)))
    assert plan.report.profiles == ((1, 4, 4),)
    assert plan.report.level == 2
    assert plan.report.without[0].startswith("batch 4 instead of 16")
    assert plan.report.without[1] == "level 2 instead of 3"
    assert len(trt.built) == 2  # type: ignore[attr-defined]


def test_no_attempt_fits(trt: FakeTensorrt, tmp_path: Path) -> None:
    trt.most_batch = 0  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentFault, match=r"out of memory.*there is not enough even with batch 4.*level 0"):
        planned(trt, tmp_path)
    assert len(trt.built) == 3  # type: ignore[attr-defined]


def test_little_memory_is_noticed_before_anything_is_built(trt: FakeTensorrt, tmp_path: Path) -> None:
    trt.cudart.limit(memory_bytes=100 << 20)
    plan = planned(trt, tmp_path)
    assert plan.report.profiles == ((1, 1, 1),)
    assert "100 MiB are free" in plan.report.without[0]
    assert plan.report.estimate_bytes > 100 << 20


# What is refused


def test_another_gpu_than_the_targets(trt: FakeTensorrt, tmp_path: Path) -> None:
    target = msgspec.structs.replace(ORIN, compute_capability="8.9")
    with pytest.raises(BackendUnavailable, match=r"Fake GPU 9000, of compute capability 8\.7, expected 8\.9"):
        planned(trt, tmp_path, target)


def test_operator_that_the_parser_refuses_is_named(trt: FakeTensorrt, tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match=rf"odd_one: found {UNKNOWN} that tensorrt refuses: no such operator"):
        planned(trt, tmp_path, operator=UNKNOWN)


def test_sizes_free_beyond_the_batch(trt: FakeTensorrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import types

    from tests.runtime import fake_builder

    free = types.SimpleNamespace(name="images", shape=(-1, 2, -1))
    monkeypatch.setattr(fake_builder._Network, "get_input", lambda self, index: free)
    with pytest.raises(OnnxError, match="free beyond the batch"):
        planned(trt, tmp_path)


def test_profile_that_is_out_of_order(trt: FakeTensorrt, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="profiles: found 4, 2, 8"):
        planned(trt, tmp_path, orin(profiles=((4, 2, 8),)))


def test_builder_that_does_not_start(trt: FakeTensorrt, tmp_path: Path) -> None:
    trt.start_fault = True
    with pytest.raises(EnvironmentFault, match="building for orin"):
        planned(trt, tmp_path)


def test_tensorrt_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("edgepose.runtime.trt_diagnosis.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"building for orin.*pip install 'edgepose\[tensorrt\]'"):
        build_plan(PlanOrder(network(tmp_path / "net.onnx"), ORIN, "tensorrt"))


def test_ctrl_c_stops_the_builder(trt: FakeTensorrt, tmp_path: Path) -> None:
    def interrupt(what: str, done: int, whole: int) -> None:
        raise KeyboardInterrupt

    order = PlanOrder(network(tmp_path / "net.onnx"), ORIN, "tensorrt", interrupt, trt.cudart.cuda())
    with pytest.raises(KeyboardInterrupt):
        build_plan(order)


def test_builder_of_old_versions_is_told_where_typing_is_complete(trt: FakeTensorrt, tmp_path: Path) -> None:
    trt.__version__ = "10.3.0"
    trt.most_batch = 1  # type: ignore[attr-defined]
    model = network(tmp_path / "net.onnx")
    order = PlanOrder(model, orin(profiles=((1, 1, 1),)), "tensorrt", cuda=trt.cudart.cuda())
    build_plan(order)  # it works as well

    def refuse(self: Any, network: Any, config: Any) -> None:
        self._logger.log(1, "Error Code 9: strongly typed network is not supported")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.runtime.fake_builder._Builder.build_serialized_network", refuse)
        with pytest.raises(EnvironmentFault, match=r"strongly typed.*complete from TensorRT 10\.12"):
            build_plan(order)


# Engines that are kept


def test_float_network_is_halved_built_sealed_and_run(trt: FakeTensorrt, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    report = engine(trt, tmp_path, told=lambda *step: seen.append(step))
    assert (report["precision"], report["dialect"], report["main"]) == ("fp16", "float", "engine.plan")
    assert report["half_nodes"] == 2
    assert report["checked"] == "the engine, on this GPU"
    assert report["shift"]["max_px"] == 0
    assert report["arithmetic"]["asked"] == report["arithmetic"]["achieved"] == {"fp16": 1.0}
    assert report["arithmetic"]["source"] == "inspector"
    assert "tolerances" not in report
    assert seen[-1] == ("Building engine", 100, 100)
    assert sorted(path.name for path in (tmp_path / "engine").iterdir()) == [
        "engine.plan", "engine.plan.json", "engine.plan.seal",
    ]  # fmt: skip
    options = TensorrtOptions(cuda=trt.cudart.cuda())
    session = open_engine(tmp_path / "engine" / "engine.plan", "tensorrt", options)
    assert np.array_equal(session.infer({"images": IMAGES})["simcc_y"], 3 * IMAGES)
    session.close()


@pytest.mark.parametrize(("target", "wish"), [(orin(floats="fp32"), {}), (ORIN, {"precision": "fp32"})])
def test_float_network_in_fp32(trt: FakeTensorrt, tmp_path: Path, target: Target, wish: Any) -> None:
    report = engine(trt, tmp_path, target, **wish)
    assert report["precision"] == "fp32"
    assert report["arithmetic"]["achieved"] == {"fp32": 1.0}


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_precisions_that_a_float_network_does_not_have(trt: FakeTensorrt, tmp_path: Path, precision: Any) -> None:
    with pytest.raises(UsageError, match=f"{precision}, of a network written as float"):
        engine(trt, tmp_path, precision=precision)


def test_another_precision_than_asked_for_is_reported(trt: FakeTensorrt, tmp_path: Path) -> None:
    def widened(plan: Callable[..., bytes]) -> Callable[..., bytes]:
        def write(batches: Any, *, layers: Any, **rest: Any) -> bytes:
            for layer in layers:
                layer["Inputs"][0]["Datatype"] = "Float"
            return plan(batches, layers=layers, **rest)

        return write

    from tests.runtime import fake_builder

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_builder, "plan_of", widened(fake_builder.plan_of))
        found = engine(trt, tmp_path)["arithmetic"]
    assert (found["asked"], found["achieved"]) == ({"fp16": 1.0}, {"fp32": 1.0})
    assert [(layer["node"], layer["kernel"]) for layer in found["otherwise"]] == [
        ("simcc_x_product", "gemm"), ("simcc_y_product", "gemm"),
    ]  # fmt: skip


def test_engine_that_answers_otherwise_is_no_engine(trt: FakeTensorrt, tmp_path: Path) -> None:
    wrong = Reference(SPEC, IMAGES, {"simcc_x": 2 * IMAGES, "simcc_y": 5 * IMAGES})
    wish = EngineWish(ORIN, "tensorrt", cuda=trt.cudart.cuda())
    with pytest.raises(ParityError, match="engine tensorrt fp16 for orin"):
        tensorrt_engine(network(tmp_path / "net.onnx"), wish, wrong, tmp_path)


def test_file_that_breaks_a_rule_never_reaches_the_parser(trt: FakeTensorrt, tmp_path: Path) -> None:
    from tests.export.qdq_graphs import Net

    net = Net()
    path = net.save(tmp_path / "net.onnx", net.conv(net.pair("images", "image"), "conv", axis=1))
    wish = EngineWish(ORIN, "tensorrt", cuda=trt.cudart.cuda())
    with pytest.raises(OnnxError, match="weight-axis"):
        tensorrt_engine(path, wish, REFERENCE, tmp_path)
    assert trt.built == []  # type: ignore[attr-defined]
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["net.onnx"]


def test_stripped_weights_are_put_back_when_the_engine_is_loaded(trt: FakeTensorrt, tmp_path: Path) -> None:
    report = engine(trt, tmp_path, orin(strip_weights=True))
    assert report["checked"] == "the engine, on this GPU"
    assert report["shift"]["max_px"] == 0
    main, weights = tmp_path / "engine" / "engine.plan", tmp_path / "engine" / STRIPPED_WEIGHTS
    options = TensorrtOptions(cuda=trt.cudart.cuda())
    network(weights)  # the float32 file, not the one that was built
    with pytest.raises(IntegrityError, match=r"weights\.onnx"):
        open_engine(main, "tensorrt", options)
    weights.unlink()
    with pytest.raises(Exception, match=r"weights\.onnx: found No such file.*edgepose build"):
        open_engine(main, "tensorrt", options)


@pytest.mark.parametrize("version", ["10.3.0", "10.7.0", "10.13.3.9", "11.0.0.114", "11.4.0.106"])
def test_the_same_recipe_builds_on_every_version(trt: FakeTensorrt, tmp_path: Path, version: str) -> None:
    trt.__version__ = version
    assert engine(trt, tmp_path)["tensorrt"]["builder"] == f"tensorrt {version}"


# Bundles


def test_edgepose_build_makes_a_bundle_whose_engine_answers_as_recorded(
    trt: FakeTensorrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgepose.bundle import BundleDraft, GoldenDraft, check_engine, verify_bundle, write_bundle
    from edgepose.golden import check_golden
    from edgepose.pose.codec import decode
    from edgepose.rebuild import BuildRequest, build_bundle
    from tests.tiny_checkpoint import Watch

    for module in ("edgepose.export.tensorrt", "edgepose.runtime.tensorrt"):
        monkeypatch.setattr(f"{module}.open_cuda", lambda _choice: trt.cudart.cuda())
    outputs = dict(REFERENCE.outputs)
    golden = GoldenDraft(IMAGES, outputs, decode(outputs, SPEC.decoder)[0])
    draft = BundleDraft("fake", SPEC, network(tmp_path / "net.onnx"), (), {}, {}, golden)
    source = write_bundle(tmp_path / "source.bundle", draft)
    (tmp_path / "orin.yaml").write_text(
        "name: orin\ndescription: A board.\nbackends: [tensorrt, onnxruntime]\nprecisions: [fp32, fp16]\n"
        'compute_capability: "8.7"\nmax_batch: 8\n'
    )
    watch, timed = Watch(), list[str]()

    def timer(arm: ModelArm, protocol: LatencyProtocol) -> Latency:  # a fresh process has no fake TensorRT
        timed.append(arm.backend)
        return Latency(1.0, 0.9, 1.1, 100, protocol.threads, protocol.batch)

    wanted = (str(tmp_path / "orin.yaml"),)
    bundle = build_bundle(BuildRequest(source.root, wanted, tmp_path / "new.bundle"), watch, timer=timer).bundle
    verify_bundle(bundle.root)
    assert watch.ran == ["engine-tensorrt", "engine-onnxruntime"]
    engine, other = bundle.manifest.engines
    assert (engine.backend, engine.precision, other.precision) == ("tensorrt", "fp16", "fp32")
    session = open_engine(check_engine(bundle, engine), "tensorrt")
    assert check_golden(bundle, engine, session) is not None
    session.close()
    again = build_bundle(BuildRequest(source.root, wanted, tmp_path / "new.bundle"), watch, timer=timer)
    assert timed == ["tensorrt", "onnxruntime"]
    assert again.reused
    assert len(trt.built) == 1  # type: ignore[attr-defined]


def test_fake_builder_offers_nothing_that_tensorrt_lacks(trt: FakeTensorrt) -> None:
    """Else a wrong name could pass here and fail on a device."""
    from tests.runtime import fake_builder
    from tests.runtime.test_trt_versions import names_of

    recorded = names_of("tensorrt 10.16.1.11") | names_of("tensorrt-rtx 1.7.1.116")
    kinds = {
        "Builder": fake_builder._Builder, "IBuilderConfig": fake_builder._Config,
        "INetworkDefinition": fake_builder._Network, "OnnxParser": fake_builder._Parser,
        "IOptimizationProfile": fake_builder._Profile, "Refitter": fake_builder._Refitter,
        "OnnxParserRefitter": fake_builder._ParserRefitter,
    }  # fmt: skip
    own = {  # for tests to look at
        *("name", "flags_set", "pools", "profiles", "capabilities", "mismatches", "cache"),
        *("batch", "factors", "inspected", "layers", "shapes", "engine", "model"),
    }
    offered = {
        f"{kind}.{each}" for kind, thing in kinds.items() for each in dir(thing) if each not in own and each[0] != "_"
    }
    assert offered - recorded == set()
    assert len(offered) > 25
    for enum in ("BuilderFlag", "MemoryPoolType", "ProfilingVerbosity", "DeviceType", "HardwareCompatibilityLevel"):
        assert {f"{enum}.{member}" for member in getattr(trt, enum).__members__} <= recorded
