"""Each rule of the lint on a real graph that breaks it and no other, and on graphs that break none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

from edgepose.errors import OnnxError
from edgepose.export.trt_lint import RULES, Finding, check_for_tensorrt, lint, named
from tests.export.qdq_graphs import Net, clean

IMAGES = "images"


def found(net: Net, output: str) -> tuple[Finding, ...]:
    return lint(ir.from_proto(net.model(output)))


def one(net: Net, output: str) -> Finding:
    """The only rule that is broken."""
    findings = found(net, output)
    assert [finding.rule for finding in findings] == [findings[0].rule]
    return findings[0]


def zero_point() -> tuple[Net, str]:
    net = Net()
    return net, net.conv(net.pair(IMAGES, "image", zero=np.asarray(3, np.int8)), "conv")


def unsigned() -> tuple[Net, str]:
    net = Net()
    return net, net.conv(net.pair(IMAGES, "image", zero=np.asarray(0, np.uint8)), "conv")


def integer_bias() -> tuple[Net, str]:
    net = Net()
    codes = [
        net.constant("b_codes", np.arange(4, dtype=np.int32)),
        net.constant("b_s", np.full(4, 0.0005, np.float32)),
        net.constant("b_z", np.zeros(4, np.int32)),
    ]
    bias = net.node("DequantizeLinear", codes, "b_dq", axis=0)
    return net, net.node("Conv", [net.pair(IMAGES, "image"), net.weight((4, 4, 3, 3), "w"), bias], "conv")


def activation_channels() -> tuple[Net, str]:
    net = Net()
    image = net.pair(IMAGES, "image", zero=np.zeros(4, np.int8), scale=np.full(4, 0.05, np.float32))
    return net, net.conv(image, "conv")


def weight_axis() -> tuple[Net, str]:
    net = Net()
    return net, net.conv(net.pair(IMAGES, "image"), "conv", axis=1)


def weight_per_tensor() -> tuple[Net, str]:
    net = Net()
    return net, net.conv(net.pair(IMAGES, "image"), "conv", axis=None)


def placement() -> tuple[Net, str]:
    """Q between a convolution and its rectifier."""
    net = Net()
    made = net.pair(net.conv(net.pair(IMAGES, "image"), "conv"), "between")
    return net, net.node("Relu", [made], "relu")


def residual_add() -> tuple[Net, str]:
    """Both operands quantised."""
    net = Net()
    image = net.pair(IMAGES, "image")
    return net, net.node("Add", [net.pair(net.conv(image, "conv"), "branch"), image], "sum")


def custom_domain() -> tuple[Net, str]:
    net = Net(domains=("org.openvinotoolkit",))
    limits = [net.constant(f"limit{index}", np.float32(index)) for index in range(4)]
    image = net.node("FakeQuantize", [IMAGES, *limits], "fake", domain="org.openvinotoolkit", levels=256)
    return net, net.node("Relu", [image], "relu")


def computed_scale() -> tuple[Net, str]:
    net = Net()
    scale = net.node("ReduceMax", [IMAGES], "largest", keepdims=0)
    zero = net.constant("z", np.asarray(0, np.int8))
    codes = net.node("QuantizeLinear", [IMAGES, scale, zero], "image_q")
    return net, net.conv(net.node("DequantizeLinear", [codes, scale, zero], "image_dq"), "conv")


def half_scale() -> tuple[Net, str]:
    net = Net(opset=18)
    image = net.node("Cast", [IMAGES], "half", to=TensorProto.FLOAT16)
    return net, net.node("Relu", [net.pair(image, "image", scale=np.float16(0.05))], "relu")


def batch_norm() -> tuple[Net, str]:
    net = Net()
    numbers = [net.constant(f"n{index}", np.ones(4, np.float32)) for index in range(4)]
    conv = net.conv(net.pair(IMAGES, "image"), "conv")
    return net, net.node("BatchNormalization", [conv, *numbers], "norm")


BREAKS: dict[str, tuple[Callable[[], tuple[Net, str]], str, str]] = {
    "zero-point": (zero_point, "error", "image_q"),
    "unsigned": (unsigned, "error", "image_q"),
    "integer-bias": (integer_bias, "error", "b_dq"),
    "activation-channels": (activation_channels, "error", "image_q"),
    "weight-axis": (weight_axis, "error", "conv_w_dq"),
    "weight-per-tensor": (weight_per_tensor, "warning", "conv_w_dq"),
    "placement": (placement, "warning", "between_q"),
    "residual-add": (residual_add, "warning", "sum"),
    "custom-domain": (custom_domain, "error", "fake"),
    "computed-scale": (computed_scale, "error", "image_q"),
    "half-scale": (half_scale, "error", "image_q"),
    "batch-norm": (batch_norm, "error", "norm"),
}


def test_twelve_rules_and_a_graph_for_each() -> None:
    assert len(RULES) == 12
    assert tuple(BREAKS) == RULES


@pytest.mark.parametrize("rule", RULES)
def test_graph_breaks_its_rule_and_no_other(rule: str) -> None:
    made, severity, node = BREAKS[rule]
    finding = one(*made())
    assert (finding.rule, finding.severity) == (rule, severity)
    assert finding.nodes[0] == node
    assert finding.found
    assert finding.expected
    assert finding.fix


@pytest.mark.parametrize("rule", RULES)
def test_errors_are_raised_before_any_build_and_warnings_are_returned(rule: str, tmp_path: Path) -> None:
    made, severity, node = BREAKS[rule]
    net, output = made()
    path = net.save(tmp_path / "net.onnx", output)
    if severity == "warning":
        assert [finding.rule for finding in check_for_tensorrt(path)] == [rule]
        return
    with pytest.raises(OnnxError, match=f"net.onnx: {rule}: {node}") as caught:
        check_for_tensorrt(path)
    assert caught.value.exit_code == 2
    assert caught.value.fix


def test_clean_graph_breaks_none(tmp_path: Path) -> None:
    net, output = clean()
    assert found(net, output) == ()
    assert check_for_tensorrt(net.save(tmp_path / "net.onnx", output)) == ()


def test_float_graph_breaks_none() -> None:
    net = Net()
    kernel = net.constant("w", np.ones((4, 4, 3, 3), np.float32))
    conv = net.node("Conv", [IMAGES, kernel], "conv")
    numbers = [net.constant(f"n{index}", np.ones(4, np.float32)) for index in range(4)]
    assert found(net, net.node("BatchNormalization", [conv, *numbers], "norm")) == ()


# What the rules look at


def test_numbers_are_followed_through_identity_and_constant_nodes() -> None:
    """Rule 10 of what was seen: the parser resolves them, so a lint that did not would see nothing."""
    net = Net()
    held = helper.make_node(
        "Constant", [], ["held"], name="held", value=numpy_helper.from_array(np.asarray(7, np.uint8))
    )
    net.nodes.append(held)
    zero = net.node("Identity", ["held"], "same")
    scale = net.node("Identity", [net.constant("s", np.float32(0.1))], "scale")
    codes = net.node("QuantizeLinear", [IMAGES, scale, zero], "image_q")
    output = net.conv(net.node("DequantizeLinear", [codes, scale, zero], "image_dq"), "conv")
    assert one(net, output).rule == "zero-point"


def test_without_a_zero_point_codes_are_unsigned() -> None:
    """ONNX makes uint8 of a Q that has none; what looks symmetric is the trap itself."""
    net = Net()
    scale = net.constant("s", np.float32(0.1))
    codes = net.node("QuantizeLinear", [IMAGES, scale], "image_q")
    assert one(net, net.conv(net.node("DequantizeLinear", [codes, scale], "image_dq"), "conv")).rule == "unsigned"


def test_output_type_says_what_codes_are_without_a_zero_point() -> None:
    net = Net(opset=21)
    scale = net.constant("s", np.float32(0.1))
    codes = net.node("QuantizeLinear", [IMAGES, scale], "image_q", output_dtype=TensorProto.INT8)
    assert found(net, net.conv(net.node("DequantizeLinear", [codes, scale], "image_dq"), "conv")) == ()


def test_half_scales_are_right_from_opset_19() -> None:
    net = Net(opset=19)
    image = net.node("Cast", [IMAGES], "half", to=TensorProto.FLOAT16)
    assert found(net, net.node("Relu", [net.pair(image, "image", scale=np.float16(0.05))], "relu")) == ()


@pytest.mark.parametrize(("axis", "rules"), [(1, []), (0, ["weight-axis"])])
def test_transposed_convolutions_have_their_channels_on_axis_1(axis: int, rules: list[str]) -> None:
    net = Net()
    kernel = net.weight((4, 6, 2, 2), "w", axis=axis)
    output = net.node("ConvTranspose", [net.pair(IMAGES, "image"), kernel], "up", strides=[2, 2])
    assert [finding.rule for finding in found(net, output)] == rules


@pytest.mark.parametrize(("axis", "rules"), [(0, []), (1, ["weight-axis"])])
def test_axis_is_followed_through_a_transposition(axis: int, rules: list[str]) -> None:
    net = Net()
    flat = net.node("Flatten", [net.pair(IMAGES, "image")], "flat")
    kernel = net.node("Transpose", [net.weight((10, 256), "w", axis=axis)], "turned", perm=[1, 0])
    assert [finding.rule for finding in found(net, net.node("MatMul", [flat, kernel], "linear"))] == rules


def test_weights_quantised_from_floats_are_weights_too() -> None:
    net = Net()
    floats = net.constant("floats", np.ones((4, 4, 3, 3), np.float32))
    numbers = [net.constant("s", np.full(4, 0.1, np.float32)), net.constant("z", np.zeros(4, np.int8))]
    codes = net.node("QuantizeLinear", [floats, *numbers], "w_q", axis=1)
    kernel = net.node("DequantizeLinear", [codes, *numbers], "w_dq", axis=1)
    assert one(net, net.node("Conv", [net.pair(IMAGES, "image"), kernel], "conv")).rule == "weight-axis"


@pytest.mark.parametrize("where", ["output", "pad"])
def test_other_places_that_hinder_fusing(where: str) -> None:
    net = Net()
    if where == "output":
        output = net.pair(net.node("Relu", [net.conv(net.pair(IMAGES, "image"), "conv")], "relu"), "last")
    else:
        pads = net.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
        output = net.conv(net.pair(net.node("Pad", [IMAGES, pads], "pad"), "padded"), "conv")
    assert one(net, output).rule == "placement"


@pytest.mark.parametrize(("branch", "skip", "balanced"), [(False, True, True), (True, False, False),
                                                          (True, True, False), (False, False, False)])  # fmt: skip
def test_only_the_skip_branch_of_a_sum_is_quantised(branch: bool, skip: bool, balanced: bool) -> None:
    net = Net()
    image = net.node("Relu", [IMAGES], "stem")
    conv = net.conv(net.pair(image, "image"), "conv")
    operands = [net.pair(conv, "branch") if branch else conv, net.pair(image, "skip") if skip else image]
    assert (found(net, net.node("Add", operands, "sum")) == ()) is balanced


def test_sum_with_a_constant_is_a_bias() -> None:
    net = Net()
    offset = net.constant("offset", np.ones((1, 4, 1, 1), np.float32))
    assert found(net, net.node("Add", [net.conv(net.pair(IMAGES, "image"), "conv"), offset], "sum")) == ()


def test_several_errors_are_all_named(tmp_path: Path) -> None:
    net = Net()
    image = net.pair(IMAGES, "image", zero=np.asarray(0, np.uint8))
    path = net.save(tmp_path / "net.onnx", net.conv(image, "conv", axis=1))
    with pytest.raises(OnnxError, match=r"unsigned: image_q, image_dq: .*\(and weight-axis\)"):
        check_for_tensorrt(path)


# Files that the tools of others write


class Batches(CalibrationDataReader):
    """A few random images."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.left = [rng.normal(size=(2, 4, 8, 8)).astype(np.float32) for _ in range(3)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        return {IMAGES: self.left.pop()} if self.left else None


def quantised_by_onnxruntime(folder: Path, **settings: object) -> Path:
    """Convolution, rectifier, convolution, residual sum: quantised by ONNX Runtime's own tool."""
    rng, net = np.random.default_rng(1), Net()
    weights = [net.constant(f"w{n}", rng.normal(size=(4, 4, 3, 3)).astype(np.float32)) for n in range(2)]
    biases = [net.constant(f"b{n}", rng.normal(size=4).astype(np.float32)) for n in range(2)]
    first = net.node("Relu", [net.node("Conv", [IMAGES, weights[0], biases[0]], "c1", pads=[1] * 4)], "r1")
    second = net.node("Conv", [first, weights[1], biases[1]], "c2", pads=[1] * 4)
    file = net.save(folder / "float.onnx", net.node("Add", [second, first], "sum"))
    quantize_static(file, folder / "int8.onnx", Batches(), **settings)  # type: ignore[arg-type]
    return folder / "int8.onnx"


def test_what_quantize_static_writes_by_default_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match=r"unsigned|zero-point") as caught:
        check_for_tensorrt(quantised_by_onnxruntime(tmp_path))
    assert "integer-bias" in str(caught.value)


def test_what_quantize_static_writes_when_asked_for_what_tensorrt_reads_passes(tmp_path: Path) -> None:
    asked = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    file = quantised_by_onnxruntime(
        tmp_path, activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, per_channel=True, extra_options=asked
    )
    assert all(finding.severity == "warning" for finding in check_for_tensorrt(file))


def test_many_nodes_are_counted() -> None:
    assert named(tuple("abcdef")) == "a, b, c, d and 2 more"
    assert named(("a",)) == "a"


@pytest.mark.parametrize("content", [None, b"", b"no network"])
def test_files_that_are_no_network(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OnnxError, match=r"net\.onnx"):
        check_for_tensorrt(path)


def test_graphs_of_the_tests_are_valid() -> None:
    for rule, (made, _, _) in BREAKS.items():
        if rule not in ("custom-domain", "half-scale"):  # ONNX itself knows neither
            net, output = made()
            onnx.checker.check_model(net.model(output), full_check=True)
