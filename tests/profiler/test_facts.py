"""Facts of bundles: multiplications, parameters, nodes and precisions as the files tell them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepose.bundle import Bundle
from edgepose.errors import IntegrityError
from edgepose.profiler.facts import FACTS, allowance, bundle_facts, known_fact, network_facts, spelt, value_of
from edgepose.profiler.onnx_wire import OnnxGraph, read_onnx
from tests.tiny_network import flip_a_byte, spot_bundle


def graph_of(
    tmp_path: Path, nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], values: dict[str, list[int | str]]
) -> OnnxGraph:
    """A network whose first value is its input; the others are told by value_info."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
    initialisers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", infos[:1], [], initialisers, value_info=infos[1:])
    path = tmp_path / "net.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    return read_onnx(path)


CONV = helper.make_node("Conv", ["x", "w", "b"], ["y"])
WEIGHTS = {"w": np.zeros((8, 3, 3, 3), np.float32), "b": np.zeros(8, np.float32)}
VALUES: dict[str, list[int | str]] = {"x": ["batch", 3, 16, 16], "y": ["batch", 8, 16, 16]}


def test_a_convolution_costs_what_the_book_says(tmp_path: Path) -> None:
    facts = network_facts(graph_of(tmp_path, [CONV], WEIGHTS, VALUES))
    assert facts["macs"] == facts["macs.fp32"] == 8 * 16 * 16 * 27
    assert facts["parameters"] == 8 * 27 + 8
    assert facts["network_nodes"] == facts["nodes.Conv"] == 1
    assert facts["int8_macs_share"] == 0


def test_a_fixed_batch_is_counted_for_one_image(tmp_path: Path) -> None:
    fixed = {name: [4, *shape[1:]] for name, shape in VALUES.items()}
    assert network_facts(graph_of(tmp_path, [CONV], WEIGHTS, fixed))["macs"] == 8 * 16 * 16 * 27


@pytest.mark.parametrize(
    ("node", "weight", "output", "macs"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (64, 10), ["batch", 5, 10], 5 * 10 * 64),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (10, 64), ["batch", 10], 10 * 64),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"]), (5, 8, 2, 2), ["batch", 8, 2, 128], 5 * 64 * 32),
    ],
)
def test_matrix_products_and_transposed_convolutions_count(
    tmp_path: Path, node: onnx.NodeProto, weight: tuple[int, ...], output: list[int | str], macs: int
) -> None:
    values = {"x": ["batch", 5, 64] if node.op_type != "Gemm" else ["batch", 64], "y": output}
    assert network_facts(graph_of(tmp_path, [node], {"w": np.zeros(weight, np.float16)}, values)) | {
        "macs": macs,
        "macs.fp16": macs,
    } == network_facts(graph_of(tmp_path, [node], {"w": np.zeros(weight, np.float16)}, values))


def test_quantised_layers_are_int8_and_their_scales_are_no_parameters(tmp_path: Path) -> None:
    scale, zero = np.float32(0.1), np.uint8(0)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws"], ["wd"], axis=0),
        helper.make_node("Conv", ["d", "wd"], ["y"]),
        helper.make_node("Conv", ["y", "v"], ["o"]),
    ]
    constants = {
        "s": np.array(scale), "z": np.array(zero), "ws": np.ones(8, np.float32),
        "w": np.zeros((8, 3, 3, 3), np.int8), "v": np.zeros((2, 8, 1, 1), np.float32),
    }  # fmt: skip
    values = VALUES | {"o": ["batch", 2, 16, 16]}
    facts = network_facts(graph_of(tmp_path, nodes, constants, values))
    assert facts["macs.int8"] == 8 * 256 * 27
    assert facts["macs.fp32"] == 2 * 256 * 8
    assert facts["parameters"] == 8 * 27 + 16
    assert facts["int8_macs_share"] == pytest.approx(216 / (216 + 16))


def test_without_shapes_the_multiplications_are_unknown_not_zero(tmp_path: Path) -> None:
    silent = graph_of(tmp_path, [CONV], WEIGHTS, {"x": VALUES["x"]})
    facts = network_facts(silent)
    assert "macs" not in facts
    assert facts["parameters"] == 224
    assert value_of(facts, "macs") is None
    assert value_of(facts, "macs.int8") is None


def test_a_family_member_that_is_not_there_is_zero_where_the_family_is_known() -> None:
    assert value_of({"nodes.Conv": 3.0}, "nodes.Resize") == 0
    assert value_of({}, "nodes.Resize") is None
    assert known_fact("nodes.Conv") is not None
    assert known_fact("nodes.") is None
    assert known_fact("colour") is None


def test_both_engines_of_a_bundle_are_described(tmp_path: Path) -> None:
    bundle: Bundle = spot_bundle(tmp_path)
    by_backend = {engine.backend: bundle_facts(bundle, engine) for engine in bundle.manifest.engines}
    onnx_file = bundle.root / "engines/cpu/onnxruntime/fp32.onnx"
    assert by_backend["onnxruntime"]["engine_bytes"] == onnx_file.stat().st_size
    assert by_backend["onnxruntime"]["engine_nodes"] == by_backend["onnxruntime"]["network_nodes"] == 3
    assert by_backend["openvino"]["engine_nodes"] >= 3
    assert by_backend["openvino"]["parameters"] == 6
    assert set(by_backend["openvino"]) & set(FACTS) >= {"engine_bytes", "bundle_bytes", "engine_nodes"}


def test_a_changed_file_is_noticed_before_it_is_read(tmp_path: Path) -> None:
    bundle = spot_bundle(tmp_path)
    flip_a_byte(bundle.root / "model.onnx")
    with pytest.raises(IntegrityError):
        bundle_facts(bundle, bundle.manifest.engines[0])


def test_values_are_spelt_with_their_units() -> None:
    assert [spelt(2.5e6, "bytes"), spelt(196_966_400, "MACs"), spelt(0.982, "share"), spelt(1234, "count")] == [
        "2.50 MB", "197.0 M", "98.2 %", "1,234",
    ]  # fmt: skip
    assert allowance("lower", "bytes", 0.05, 65536) == "+5.0 % or 0.07 MB, whichever is more"
    assert allowance("higher", "share", 0.01, 0) == "-1.0 %"
