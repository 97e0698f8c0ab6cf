"""Graphs respelt for runtimes that do otherwise than they say: equal numbers, and now the runtimes' too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgepose.export.openvino import values_openvino
from edgepose.export.ort import values_ort
from edgepose.export.qdq_spelling import respell

SCALE = 0.05
SHAPE = (2, 4, 6, 6)


def images() -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)


def write(path: Path, middle: list[onnx.NodeProto], constants: dict[str, NDArray[np.generic]], *, zero: int) -> Path:
    """x → Q → DQ → `middle`, from xd to y → Q → DQ → out."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
        *middle,
        helper.make_node("QuantizeLinear", ["y", "scale", "zero"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "scale", "zero"], ["out"]),
    ]
    held = {"scale": np.float32(SCALE), "zero": np.uint8(zero), **constants}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *SHAPE[1:]])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 4, "h", "w"])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in held.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def respelt(path: Path) -> Path:
    model = ir.load(path)
    respell(model.graph)
    model.graph.sort()
    out = path.with_name(f"respelt-{path.name}")
    ir.save(model, out)
    onnx.checker.check_model(str(out), full_check=True)
    return out


def run(path: Path, how: str) -> NDArray[np.float32]:
    if how == "openvino":
        return values_openvino(path, ["out"], {"x": images()})["out"]
    return values_ort(path, ["out"], {"x": images()}, optimise=how == "optimised")["out"]


def convolution(weight: NDArray[np.float32], **attributes: int) -> tuple[list[onnx.NodeProto], dict[str, NDArray]]:
    node = helper.make_node("Conv", ["xd", "w", "b"], ["y"], name="conv", pads=[1, 1, 1, 1], **attributes)
    return [node], {"w": weight, "b": np.linspace(-1, 1, weight.shape[0], dtype=np.float32)}


def uneven_weight(inputs: int) -> NDArray[np.float32]:
    """Channels of very unlike sizes, of which one scale for all makes zeros."""
    weight = np.random.default_rng(1).standard_normal((4, inputs, 3, 3)).astype(np.float32)
    return weight * np.array([3.0, 0.3, 0.03, 0.003], np.float32).reshape(4, 1, 1, 1)


@pytest.mark.parametrize("groups", [1, 4])
def test_float_weights_between_codes_stay_float(groups: int, tmp_path: Path) -> None:
    nodes, constants = convolution(uneven_weight(4 // groups), group=groups)
    path = write(tmp_path / "conv.onnx", nodes, constants, zero=128)
    again = respelt(path)
    exact = run(path, "as written")
    np.testing.assert_array_equal(run(again, "as written"), exact)
    for how in ("optimised", "openvino"):
        assert np.abs(run(again, how) - exact).max() <= SCALE * 1.01


def test_without_it_onnx_runtime_quantises_float_weights_by_itself(tmp_path: Path) -> None:
    """When this fails, ONNX Runtime has stopped doing so, and `respell` may stop, too."""
    nodes, constants = convolution(uneven_weight(4))
    constants["w"] = constants["w"] * np.array([30.0, 1, 1, 1], np.float32).reshape(4, 1, 1, 1)
    path = write(tmp_path / "conv.onnx", nodes, constants, zero=128)
    others = np.abs(run(path, "optimised") - run(path, "as written"))[:, 1:]
    assert others.max() > 2 * SCALE


@pytest.mark.parametrize("zero", [0, 128])
def test_an_average_pool_counts_zeros_around_the_image(zero: int, tmp_path: Path) -> None:
    node = helper.make_node(
        "AveragePool", ["xd"], ["y"], name="pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
    )
    path = write(tmp_path / "pool.onnx", [node], {}, zero=zero)
    again = respelt(path)
    kinds = [entry.op_type for entry in onnx.load(again).graph.node]
    assert ("Pad" in kinds) == (zero != 0)
    exact = run(path, "as written")
    for how in ("as written", "optimised", "openvino"):
        assert np.abs(run(again, how) - exact).max() <= SCALE * 1.01


def test_without_it_openvino_pads_with_the_code_0(tmp_path: Path) -> None:
    """When this fails, OpenVINO has been repaired, and `respell` may stop, too."""
    node = helper.make_node(
        "AveragePool", ["xd"], ["y"], name="pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
    )
    path = write(tmp_path / "pool.onnx", [node], {}, zero=128)
    assert np.abs(run(path, "openvino") - run(path, "as written")).max() > 10 * SCALE


def test_other_readers_of_the_same_codes_go_on_as_before(tmp_path: Path) -> None:
    pool = helper.make_node(
        "AveragePool", ["xd"], ["p"], name="pool", kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=1
    )
    nodes, constants = convolution(uneven_weight(4))
    nodes[0].output[0] = "c"
    joined = helper.make_node("Sum", ["p", "c", "xd"], ["y"], name="sum")
    path = write(tmp_path / "both.onnx", [pool, *nodes, joined], constants, zero=100)
    again = respelt(path)
    assert [e.op_type for e in onnx.load(again).graph.node].count("DequantizeLinear") == 4
    np.testing.assert_allclose(run(again, "as written"), run(path, "as written"), atol=1e-6)


@pytest.mark.parametrize(
    "node",
    [
        helper.make_node("AveragePool", ["xd"], ["y"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        helper.make_node("AveragePool", ["xd"], ["y"], kernel_shape=[2, 2], strides=[2, 2], count_include_pad=1),
        helper.make_node("Relu", ["xd"], ["y"]),
    ],
)
def test_what_runtimes_do_right_stays_as_it_is(node: onnx.NodeProto, tmp_path: Path) -> None:
    path = write(tmp_path / "same.onnx", [node], {}, zero=128)
    before, after = onnx.load(path).graph.node, onnx.load(respelt(path)).graph.node
    assert [(n.op_type, list(n.input)) for n in before] == [(n.op_type, list(n.input)) for n in after]
