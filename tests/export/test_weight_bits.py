"""Seven-bit weights made from an eight-bit graph, against those made from the float network with its ranges."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgepose.errors import OnnxError
from edgepose.export.qdq import quantised_onnx
from edgepose.export.weight_bits import Quantisation, narrowed_onnx, quantisation_of
from edgepose.runtime import open_session
from edgepose.spec import Backend
from tests.export.networks import Exported, images
from tests.export.test_qdq import run_as_written

BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")


def constants(path: Path) -> dict[str, NDArray[np.generic]]:
    return {value.name: onnx.numpy_helper.to_array(value) for value in onnx.load(path).graph.initializer}


def weights(path: Path) -> dict[str, tuple[NDArray[np.generic], NDArray[np.generic]]]:
    """Codes and scales of int8 weights, by name of the node that dequantises them."""
    stored = constants(path)
    return {
        node.name: (stored[node.input[0]], stored[node.input[1]])
        for node in onnx.load(path).graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in stored and stored[node.input[0]].dtype == np.int8
    }


def biases(path: Path) -> dict[str, NDArray[np.float64]]:
    """Values of int32 biases, by name of the node that dequantises them, checked against their accumulators."""
    model, stored = onnx.load(path), constants(path)
    producers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3 or node.input[2] not in producers:
            continue
        source, weight, bias = (producers[name] for name in node.input[:3])
        unit = stored[bias.input[1]]
        assert np.array_equal(unit, (stored[weight.input[1]] * stored[source.input[1]]).astype(np.float32))
        found[bias.name] = stored[bias.input[0]].astype(np.float64) * unit
    return found


@pytest.fixture(params=["simcc", "mixed"])
def eight(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    exported: Exported = request.getfixturevalue(request.param)
    quantised_onnx(exported.float_onnx, exported.ranges, tmp_path / "8.onnx", dialect="u8s8")
    quantised_onnx(exported.float_onnx, exported.ranges, tmp_path / "fresh.onnx", dialect="u8s8", weight_bits=7)
    return tmp_path / "8.onnx"


def test_codes_fit_and_values_stay(eight: Path, tmp_path: Path) -> None:
    report = narrowed_onnx(eight, tmp_path / "7.onnx")
    before, after, fresh = weights(eight), weights(tmp_path / "7.onnx"), weights(tmp_path / "fresh.onnx")
    assert before.keys() == after.keys() == fresh.keys()
    assert report.weights == len(after)
    assert report.worst_step == pytest.approx(127 / 63)
    for name, (codes, scale) in after.items():
        assert np.abs(codes.astype(int)).max() <= 63
        axis = codes.shape.index(scale.size)
        shape = [-1 if a == axis else 1 for a in range(codes.ndim)]
        old_codes, old_scale = before[name]
        value = codes.astype(np.float64) * scale.reshape(shape)
        old = old_codes.astype(np.float64) * old_scale.reshape(shape)
        assert np.all(np.abs(value - old) <= 0.5001 * scale.reshape(shape))
        # Never coarser than fresh ones; finer where a channel does not use all its codes.
        assert np.all(scale <= 1.001 * fresh[name][1])
        same = np.broadcast_to(scale > 0.98 * fresh[name][1], scale.shape)
        assert same.mean() > 0.8
        gap = np.abs(codes.astype(int) - fresh[name][0].astype(int))
        assert np.moveaxis(gap, axis, 0)[same].max() <= 2
    old_biases, new_biases = biases(eight), biases(tmp_path / "7.onnx")
    assert old_biases.keys() == new_biases.keys() != set()
    stored = constants(tmp_path / "7.onnx")
    for name, value in new_biases.items():
        (node,) = [node for node in onnx.load(tmp_path / "7.onnx").graph.node if node.name == name]
        assert np.all(np.abs(value - old_biases[name]) <= 0.5001 * stored[node.input[1]])


def test_answers_stay_as_near_as_with_fresh_seven_bit_weights(eight: Path, tmp_path: Path) -> None:
    narrowed_onnx(eight, tmp_path / "7.onnx")
    feeds = images(4, 9)
    reference = run_as_written(eight, feeds)
    fresh, narrowed = run_as_written(tmp_path / "fresh.onnx", feeds), run_as_written(tmp_path / "7.onnx", feeds)
    for name, expected in reference.items():
        twice, once = np.abs(narrowed[name] - expected).mean(), np.abs(fresh[name] - expected).mean()
        assert 0 < twice < 1.5 * once


@pytest.mark.parametrize("backend", BACKENDS)
def test_both_backends_execute_it(simcc: Exported, backend: Backend, tmp_path: Path) -> None:
    quantised_onnx(simcc.float_onnx, simcc.ranges, tmp_path / "8.onnx", dialect="u8s8")
    narrowed_onnx(tmp_path / "8.onnx", tmp_path / "7.onnx")
    feeds = images(4, 9)
    session = open_session(tmp_path / "7.onnx", backend, threads=1, precision="int8")
    for name, expected in run_as_written(tmp_path / "7.onnx", feeds).items():
        gap = np.abs(session.infer({"image": feeds})[name] - expected) / np.abs(expected).max()
        assert gap.mean() < 1 / 127


def test_seven_bit_weights_are_left_as_they_are(eight: Path, tmp_path: Path) -> None:
    report = narrowed_onnx(tmp_path / "fresh.onnx", tmp_path / "again.onnx")
    assert (report.weights, report.channels, report.worst_step) == (0, 0, 1.0)
    first, second = constants(tmp_path / "fresh.onnx"), constants(tmp_path / "again.onnx")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_how_a_graph_is_quantised_is_read_off_the_graph(
    eight: Path, simcc: Exported, signed: Exported, tmp_path: Path
) -> None:
    assert quantisation_of(eight) == Quantisation("u8s8", 8)
    narrowed_onnx(eight, tmp_path / "7.onnx")
    assert quantisation_of(tmp_path / "7.onnx") == Quantisation("u8s8", 7)
    assert quantisation_of(simcc.float_onnx).dialect == "float"
    quantised_onnx(signed.float_onnx, signed.ranges, tmp_path / "s8s8.onnx", dialect="s8s8")
    assert quantisation_of(tmp_path / "s8s8.onnx").dialect == "s8s8"


def test_weights_with_a_zero_point_are_refused(eight: Path, tmp_path: Path) -> None:
    model = onnx.load(eight)
    name = next(iter(weights(eight)))
    (node,) = [node for node in model.graph.node if node.name == name]
    (zero,) = [value for value in model.graph.initializer if value.name == node.input[2]]
    zero.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(zero) + np.int8(1), zero.name))
    onnx.save(model, tmp_path / "shifted.onnx")
    with pytest.raises(OnnxError, match=r"weights with a zero point.*symmetric constants"):
        narrowed_onnx(tmp_path / "shifted.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("content", [b"not a network", b""])
def test_what_is_no_onnx_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(OnnxError, match=r"x\.onnx"):
        narrowed_onnx(tmp_path / "x.onnx", tmp_path / "out.onnx")
    with pytest.raises(OnnxError, match=r"absent\.onnx"):
        quantisation_of(tmp_path / "absent.onnx")
