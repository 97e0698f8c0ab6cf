"""What TensorRT-RTX really compiles, on a machine without a GPU: its parser, its compiler, its log.

Skipped, loudly, where the package tensorrt-rtx-cu13 is not installed. Networks of the zoo are exported first, which
takes minutes: those tests are slow ones.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgepose.blocks.zoo import find_checkpoint, zoo_names
from edgepose.bundle import Bundle, verify_bundle
from edgepose.errors import EnvironmentFault, OnnxError, UsageError
from edgepose.export.engine import Reference
from edgepose.export.half import half_onnx
from edgepose.export.tensorrt import CAPABILITIES, PlanOrder, build_plan
from edgepose.export.tensorrt_engine import EngineWish, tensorrt_engine
from edgepose.profiles import load_target
from edgepose.rebuild import BuildRequest, build_bundle
from edgepose.runtime.provenance import Provenance, companions
from edgepose.spec import Target, TensorrtBuild
from tests.export.qdq_graphs import Net, clean
from tests.tiny_checkpoint import Watch
from tests.tiny_network import spot_bundle

try:
    import tensorrt_rtx
except ImportError:
    warnings.warn("tensorrt-rtx-cu13 is not installed: nothing is compiled for RTX cards in these tests", stacklevel=1)
    pytest.skip("tensorrt-rtx-cu13 is not installed: pip install 'edgepose[tensorrt-rtx]'", allow_module_level=True)

PROMISED = ("7.5", "8.0", "8.6", "8.9", "12.0")


def target(capabilities: str = "8.6", **build: Any) -> Target:
    settings = TensorrtBuild(**build)
    return Target("rtx", "A PC.", ("tensorrt-rtx",), ("fp32",), compute_capability=capabilities, tensorrt=settings)


def plan(model: Path, wanted: Target) -> Any:
    return build_plan(PlanOrder(model, wanted, "tensorrt-rtx"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))


def float_net(path: Path) -> Path:
    net = Net()
    kernel = np.random.default_rng(0).normal(size=(8, 4, 3, 3)).astype(np.float32)
    conv = net.node("Conv", ["images", net.constant("w", kernel)], "conv1", pads=[1, 1, 1, 1])
    return net.save(path, net.node("Relu", [conv], "relu1"))


def test_version_is_one_that_is_supported() -> None:
    assert tuple(map(int, tensorrt_rtx.__version__.split(".")[:2])) >= (1, 7)


@pytest.mark.parametrize("capability", sorted(CAPABILITIES))
def test_every_compute_capability_is_compiled_for_in_16_bits(tmp_path: Path, capability: str) -> None:
    half_onnx(float_net(tmp_path / "net.onnx"), tmp_path / "half.onnx")
    built = plan(tmp_path / "half.onnx", target(capability))
    assert len(built.content) == built.report.size_bytes > 1000
    assert built.report.capabilities == (capability,)
    assert built.host.gpu == built.host.driver == ""
    convolutions = [k for k in built.kernels if "conv1" in k.origins and k.kind == "correlation"]
    assert [kernel.inputs[0] for kernel in convolutions] == ["fp16"]


def test_one_engine_serves_several_and_is_the_same_every_time(tmp_path: Path) -> None:
    model = float_net(tmp_path / "net.onnx")
    first, again = (plan(model, target("8.6, 8.9, 12.0")) for _ in range(2))
    assert first.content == again.content
    assert first.report.capabilities == ("8.6", "8.9", "12.0")
    assert first.report.profiles == ((1, 8, 64),)


def test_quantised_convolutions_run_in_int8(tmp_path: Path) -> None:
    net, output = clean()
    built = plan(net.save(tmp_path / "net.onnx", output), target())
    assert {kernel.inputs[0] for kernel in built.kernels if {"conv1", "conv2"} & set(kernel.origins)} == {"int8"}


def test_unsigned_codes_are_read_as_signed_ones_which_is_why_there_is_a_lint(tmp_path: Path) -> None:
    engines = []
    for kind in (np.int8, np.uint8):
        net = Net()
        output = net.conv(net.pair("images", "image", zero=np.asarray(0, kind)), "conv")
        engines.append(plan(net.save(tmp_path / f"{kind.__name__}.onnx", output), target()))
    assert engines[0].content == engines[1].content  # and these two networks compute different things
    assert any("UINT8" in warning.upper() for warning in engines[1].report.warnings)


@pytest.mark.parametrize("rule", ["zero-point", "integer-bias", "custom-domain"])
def test_parser_refuses_what_the_lint_refuses(tmp_path: Path, rule: str) -> None:
    from tests.export.test_trt_lint import BREAKS

    net, output = BREAKS[rule][0]()
    with pytest.raises(OnnxError, match=r"that tensorrt-rtx refuses|does not parse"):
        plan(net.save(tmp_path / "net.onnx", output), target())


def test_unfit_workspace_is_said_with_the_setting(tmp_path: Path) -> None:
    net, value = Net(), "images"
    for index in range(3):
        kernel = np.ones((4, 4, 5, 5), np.float32)
        value = net.node("Conv", [value, net.constant(f"w{index}", kernel)], f"conv{index}", pads=[2, 2, 2, 2])
    model = onnx.load(net.save(tmp_path / "net.onnx", value))
    for size, dim in zip((1, 4, 512, 512), model.graph.input[0].type.tensor_type.shape.dim, strict=True):
        dim.dim_value = size
    del model.graph.value_info[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    onnx.save(model, tmp_path / "big.onnx")
    with pytest.raises(EnvironmentFault, match=r"workspace.*raise workspace_mib of the target \(now 1\)"):
        plan(tmp_path / "big.onnx", target(workspace_mib=1))


def test_turing_has_no_products_in_32_bits(tmp_path: Path) -> None:
    net = Net()
    flat = net.node("Flatten", ["images"], "flat")
    product = net.node("MatMul", [flat, net.constant("w", np.ones((256, 8), np.float32))], "product")
    with pytest.raises(EnvironmentFault, match=r"Turing.*compile for 8\.0 and newer only, or a float network with"):
        plan(net.save(tmp_path / "net.onnx", product), target("7.5"))


@pytest.mark.parametrize(
    ("wanted", "fault"),
    [
        (target("9.0"), "found compute capability 9.0, expected some of 7.5"),
        (target(""), r"found compute capability \(none\)"),
        (target(strip_weights=True), "strip_weights: found an option that it does not have"),
        (target(version_compatible=True), "version_compatible"),
        (target(dla_core=0), "dla_core"),
        (target(hardware="ampere-plus"), "hardware.*name compute capabilities"),
    ],
)
def test_what_it_does_not_do_is_refused_at_once(tmp_path: Path, wanted: Target, fault: str) -> None:
    with pytest.raises(UsageError, match=fault):
        plan(float_net(tmp_path / "net.onnx"), wanted)


def test_progress_is_told(tmp_path: Path) -> None:
    seen: list[int] = []
    order = PlanOrder(
        float_net(tmp_path / "net.onnx"), target(), "tensorrt-rtx", lambda _what, done, _whole: seen.append(done)
    )
    build_plan(order)
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert len(seen) > 10


def test_ctrl_c_stops_it(tmp_path: Path) -> None:
    def interrupt(what: str, done: int, whole: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(PlanOrder(float_net(tmp_path / "net.onnx"), target(), "tensorrt-rtx", interrupt))


# Bundles


def test_bundle_gets_an_engine_that_says_it_has_not_run(tmp_path: Path) -> None:
    source: Bundle = spot_bundle(tmp_path)
    bundle = build_bundle(
        BuildRequest(source.root, ("rtx-desktop", "this-cpu"), tmp_path / "rtx.bundle"), Watch()
    ).bundle
    verify_bundle(bundle.root)
    engine = bundle.manifest.engines[0]
    assert (engine.target, engine.backend, engine.precision) == ("rtx-desktop", "tensorrt-rtx", "fp16")
    assert engine.builder.startswith("tensorrt-rtx-cu13 1.")
    report = bundle.manifest.reports["engines/rtx-desktop/tensorrt-rtx"]
    assert report["checked"].startswith("the ONNX file it was compiled from")
    assert report["tensorrt"]["capabilities"] == ["8.6", "8.9", "12.0"]
    assert bundle.manifest.golden is not None
    assert bundle.manifest.golden.tolerances[engine.path]["keypoints_px"] >= 0.5
    import msgspec

    raw = companions(bundle.root / engine.path)[0].read_bytes()
    provenance = msgspec.json.decode(raw, type=Provenance)
    assert provenance.built.compute_capabilities == ("8.6", "8.9", "12.0")
    assert (provenance.built.gpu, provenance.target) == ("", "rtx-desktop")


def test_engines_are_signed_for_other_machines(tmp_path: Path) -> None:
    crypto = pytest.importorskip("cryptography.hazmat.primitives.asymmetric.ed25519")
    from cryptography.hazmat.primitives import serialization

    private = crypto.Ed25519PrivateKey.generate()
    key = tmp_path / "release.pem"
    key.write_bytes(private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ))  # fmt: skip
    source = spot_bundle(tmp_path)
    signed = build_bundle(BuildRequest(source.root, ("rtx-40",), tmp_path / "signed.bundle", sign=key), Watch()).bundle
    plain = build_bundle(BuildRequest(source.root, ("rtx-40",), tmp_path / "plain.bundle"), Watch()).bundle
    assert "engines/rtx-40/tensorrt-rtx/engine.plan.sig" in signed.manifest.files
    assert "engines/rtx-40/tensorrt-rtx/engine.plan.sig" not in plain.manifest.files


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", zoo_names())
def test_networks_of_the_zoo_compile_for_every_capability(name: str, tmp_path: Path) -> None:
    """Float ones in fp16 for all five, and what is quantised in INT8 as well where there are integer kernels."""
    from edgepose.blocks.card import read_card
    from edgepose.stages.export import FLOAT_ONNX, MODEL, export, golden_vectors
    from edgepose.stages.source import Source

    checkpoint = find_checkpoint(name)
    export(Source(checkpoint), 18, tmp_path)
    reference = Reference(read_card(checkpoint).spec, *golden_vectors(tmp_path))
    quantised = (tmp_path / MODEL).exists()
    if quantised:
        (tmp_path / "int8").mkdir()
        found = tensorrt_engine(tmp_path / MODEL, EngineWish(load_target("rtx-desktop"), "tensorrt-rtx"), reference,
                                tmp_path / "int8")  # fmt: skip
        assert found["precision"] == "int8"
        assert found["int8"]["asked_share"] >= 0.95
        half_onnx(tmp_path / FLOAT_ONNX, tmp_path / "half.onnx")
        built = plan(tmp_path / "half.onnx", target(", ".join(PROMISED)))
        assert built.report.capabilities == PROMISED
        return
    wish = EngineWish(target(", ".join(PROMISED)), "tensorrt-rtx")
    (tmp_path / "fp16").mkdir()
    found = tensorrt_engine(tmp_path / FLOAT_ONNX, wish, reference, tmp_path / "fp16")
    assert found["tensorrt"]["capabilities"] == PROMISED
    assert found["tensorrt"]["profiles"] == ((1, 8, 64),)
    assert not found["arithmetic"][
        "otherwise"
    ]  # all as asked for; of ORN, which reads places off maps, a trace is fp32
    assert found["arithmetic"]["achieved"]["fp16"] > 0.999
    assert found["shift"]["median_px"] <= 0.5
