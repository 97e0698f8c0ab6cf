"""2:4 sparsity is read off the ONNX file that engines are built from, in every spelling of a layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgepose.errors import ParityError
from edgepose.export.sparsity import check_sparse_onnx, sparse_weights

SPARSE = np.tile(np.array([1, 0, 0, -2], np.float32), (6, 2))  # (outputs, inputs): two of every four inputs
DENSE = SPARSE.copy()
DENSE[4, 5] = 0.5
LAYER = {"net.layer": SPARSE}


def model(path: Path, weight: NDArray[np.float32], spelling: str) -> Path:
    """A layer "net.layer" with that weight (6, 8), as the exporter or the quantiser may write it."""
    nodes, name = [], "net.layer.weight"
    stored: dict[str, NDArray[np.generic]] = {name: weight}
    inputs = ["batch", 8]
    match spelling:
        case "conv":
            stored[name] = np.ascontiguousarray(np.tile(weight[:, :, None, None], (1, 1, 3, 1)))
            inputs = ["batch", 8, 5, 5]
            nodes.append(helper.make_node("Conv", ["x", name], ["y"]))
        case "int8 conv":
            del stored[name]
            stored[f"{name}_codes"] = np.round(weight[:, :, None, None] * 60).astype(np.int8)
            stored[f"{name}_scale"] = np.float32(1 / 60)[None][0]
            inputs = ["batch", 8, 5, 5]
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_codes", f"{name}_scale"], ["w"]))
            nodes.append(helper.make_node("Conv", ["x", "w"], ["y"]))
        case "linear":
            nodes.append(helper.make_node("Transpose", [name], ["t"], perm=[1, 0]))
            nodes.append(helper.make_node("MatMul", ["x", "t"], ["y"]))
        case "int8 linear":
            del stored[name]
            stored[f"{name}_codes"] = np.ascontiguousarray(np.round(weight * 60).astype(np.int8).T)
            stored[f"{name}_scale"] = np.float32(1 / 60)[None][0]
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}_codes", f"{name}_scale"], ["w"]))
            nodes.append(helper.make_node("MatMul", ["x", "w"], ["y"]))
        case "nameless linear":
            del stored[name]
            stored["val_8"] = np.ascontiguousarray(weight.T)
            nodes.append(helper.make_node("MatMul", ["x", "val_8"], ["y"]))
        case "gemm":
            nodes.append(helper.make_node("Gemm", ["x", name], ["y"], transB=1))
        case "gemm as stored":
            stored[name] = np.ascontiguousarray(weight.T)
            nodes.append(helper.make_node("Gemm", ["x", name], ["y"]))
    graph = helper.make_graph(
        nodes, "one", [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


@pytest.mark.parametrize("spelling", ["conv", "int8 conv", "linear", "int8 linear", "gemm", "gemm as stored"])
def test_the_pattern_is_looked_for_along_the_inputs(tmp_path: Path, spelling: str) -> None:
    good = model(tmp_path / "good.onnx", SPARSE, spelling)
    check_sparse_onnx(good, LAYER)
    assert len(sparse_weights(good)) == 1
    broken = model(tmp_path / "broken.onnx", DENSE, spelling)
    assert sparse_weights(broken) == ()
    with pytest.raises(ParityError, match=r"broken.onnx: net.layer: found weights that are not 2:4 sparse") as caught:
        check_sparse_onnx(broken, LAYER)
    assert caught.value.exit_code == 5
    check_sparse_onnx(broken, {})


def test_a_layer_that_the_exporter_renamed_is_known_by_its_weights(tmp_path: Path) -> None:
    check_sparse_onnx(model(tmp_path / "good.onnx", SPARSE, "nameless linear"), LAYER)
    broken = model(tmp_path / "broken.onnx", DENSE, "nameless linear")
    with pytest.raises(ParityError, match=r"net\.layer: found weights that are not 2:4 sparse"):
        check_sparse_onnx(broken, {"net.layer": DENSE})
    with pytest.raises(ParityError, match=r"net\.layer: found no such weights"):
        check_sparse_onnx(broken, LAYER)


def test_sparsity_along_the_outputs_is_none(tmp_path: Path) -> None:
    turned = np.ascontiguousarray(np.tile(np.array([1, 0, 0, -2, 1, 0], np.float32)[:, None], (1, 8)))
    with pytest.raises(ParityError, match="not 2:4 sparse"):
        check_sparse_onnx(model(tmp_path / "turned.onnx", turned, "gemm"), LAYER)


def test_a_layer_that_is_not_in_the_file_and_inputs_that_do_not_come_in_fours_are_named(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"net.other: found no such weights"):
        check_sparse_onnx(model(tmp_path / "one.onnx", SPARSE, "linear"), {**LAYER, "net.other": 2 * SPARSE})
    with pytest.raises(ParityError, match="not 2:4 sparse"):
        check_sparse_onnx(model(tmp_path / "six.onnx", SPARSE[:, :6], "gemm"), LAYER)
