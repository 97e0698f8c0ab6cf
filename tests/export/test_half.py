"""Networks of 16 bits: which values are halved, and that any backend computes what the file says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from edgepose.errors import OnnxError
from edgepose.export.half import half_onnx
from tests.export.qdq_graphs import Net, clean

IMAGES = np.random.default_rng(1).normal(size=(2, 4, 8, 8)).astype(np.float32)


def halved(net: Net, output: str, folder: Path) -> tuple[onnx.ModelProto, dict[str, int]]:
    """The written network, and the element type of every value in it."""
    half_onnx(net.save(folder / "net.onnx", output), folder / "half.onnx")
    model = onnx.load(folder / "half.onnx")
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    return model, {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}


def answers(path: Path) -> np.ndarray:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: np.ndarray = session.run(None, {"images": IMAGES})[0]
    return found


def convolved(net: Net, value: str, name: str, channels: int = 4) -> str:
    kernel = np.random.default_rng(len(name)).normal(size=(channels, 4, 3, 3)).astype(np.float32) / 6
    return net.node("Conv", [value, net.constant(f"{name}_w", kernel)], name, pads=[1, 1, 1, 1])


def test_inputs_and_outputs_stay_and_what_is_between_is_halved(tmp_path: Path) -> None:
    net = Net()
    output = convolved(net, net.node("Relu", [convolved(net, "images", "first")], "relu"), "second")
    model, types = halved(net, output, tmp_path)
    assert types["images"] == types[output] == TensorProto.FLOAT
    assert types["first_out"] == types["relu_out"] == TensorProto.FLOAT16
    assert {tensor.data_type for tensor in model.graph.initializer} == {TensorProto.FLOAT16}
    found, expected = answers(tmp_path / "half.onnx"), answers(tmp_path / "net.onnx")
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.01
    assert np.abs(found - expected).max() > 0  # it was halved


def test_decoding_behind_the_last_product_stays_in_32_bits(tmp_path: Path) -> None:
    net = Net()
    heat = net.node("Flatten", [convolved(net, "images", "head")], "flat", axis=1)
    share = net.node("Softmax", [heat], "softmax", axis=-1)
    places = net.node("Mul", [share, net.constant("places", np.arange(256, dtype=np.float32))], "weighted")
    last = net.node("ReduceSum", [places, net.constant("axes", np.array([1]))], "sum", keepdims=1)
    model, types = halved(net, last, tmp_path)
    wide = {"softmax_out", "weighted_out"}
    assert {types[name] for name in wide} == {TensorProto.FLOAT}
    assert types["head_out"] == types["flat_out"] == TensorProto.FLOAT16
    assert {t.name: t.data_type for t in model.graph.initializer}["places"] == TensorProto.FLOAT


def test_softmax_amid_products_is_wide_and_what_follows_is_not(tmp_path: Path) -> None:
    net = Net()
    gate = net.node("Softmax", [convolved(net, "images", "one")], "softmax", axis=1)
    output = convolved(net, net.node("Mul", [gate, gate], "twice"), "two")
    _, types = halved(net, output, tmp_path)
    assert types["softmax_out"] == TensorProto.FLOAT
    assert types["twice_out"] == TensorProto.FLOAT16


def test_shape_computations_and_scales_of_resizing_stay(tmp_path: Path) -> None:
    net = Net()
    size = net.node("Cast", [net.node("Shape", ["images"], "shape")], "floats", to=TensorProto.FLOAT)
    scales = net.node("Div", [net.node("Mul", [size, net.constant("two", np.float32(2))], "double"), size], "scales")
    up = net.node("Resize", [convolved(net, "images", "conv"), "", scales], "up", mode="nearest")
    _, types = halved(net, net.node("Relu", [up], "relu"), tmp_path)
    assert {types[name] for name in ("floats_out", "double_out", "scales_out")} == {TensorProto.FLOAT}
    assert types["up_out"] == TensorProto.FLOAT16
    assert answers(tmp_path / "half.onnx").shape == (4, 8, 16, 16)


def test_casts_to_floats_and_constants_are_halved_with_the_rest(tmp_path: Path) -> None:
    net = Net()
    mask = net.node("Cast", [net.node("Greater", ["images", net.constant("zero", np.float32(0))], "positive")],
                    "mask", to=TensorProto.FLOAT)  # fmt: skip
    net.nodes.append(helper.make_node("Constant", [], ["gain"], name="gain", value_float=2.0))
    _, types = halved(net, net.node("Mul", [mask, "gain"], "product"), tmp_path)
    assert types["mask_out"] == TensorProto.FLOAT16
    assert np.array_equal(answers(tmp_path / "half.onnx"), 2.0 * (np.float16(IMAGES) > 0))


def test_value_that_many_read_is_cast_once(tmp_path: Path) -> None:
    net = Net()
    both = [convolved(net, "images", name) for name in ("a", "b")]
    model, _ = halved(net, net.node("Add", both, "sum"), tmp_path)
    assert [node.op_type for node in model.graph.node].count("Cast") == 2  # in, and out


def test_weights_beyond_16_bits(tmp_path: Path) -> None:
    net = Net()
    output = net.node("Mul", ["images", net.constant("huge", np.float32(1e6))], "product")
    with pytest.raises(OnnxError, match=r"huge: found values up to 1e\+06, expected at most 65504.*fp32"):
        half_onnx(net.save(tmp_path / "net.onnx", output), tmp_path / "half.onnx")
    assert not (tmp_path / "half.onnx").exists()


def test_infinities_stay_what_they_are(tmp_path: Path) -> None:
    net = Net()
    output = net.node("Clip", ["images", "", net.constant("most", np.float32(np.inf))], "clip")
    halved(net, output, tmp_path)
    assert np.array_equal(answers(tmp_path / "half.onnx"), np.float16(IMAGES))


def test_quantised_networks_and_control_flow_are_refused(tmp_path: Path) -> None:
    net, output = clean()
    with pytest.raises(OnnxError, match="a quantised network"):
        half_onnx(net.save(tmp_path / "net.onnx", output), tmp_path / "half.onnx")
    net = Net()
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Relu", ["images"], ["o"])], "branch", [], [out])
    chosen = net.node("If", [net.constant("yes", np.asarray(True))], "choice", then_branch=branch, else_branch=branch)
    with pytest.raises(OnnxError, match="choice: found control flow"):
        half_onnx(net.save(tmp_path / "net.onnx", chosen), tmp_path / "half.onnx")


@pytest.mark.parametrize("content", [None, b"no network"])
def test_files_that_are_no_network(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OnnxError, match=r"net\.onnx"):
        half_onnx(path, tmp_path / "half.onnx")
