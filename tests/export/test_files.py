"""ONNX files that edgepose rewrites: what is none is said to be none, and nothing invalid is left behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from edgepose.errors import OnnxError
from edgepose.export.files import read_graph, write_graph


def network(path: Path) -> Path:
    weight = helper.make_tensor("w", TensorProto.FLOAT, [3, 4], np.ones(12, np.float32))
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Relu", ["y"], ["z"])]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, n]) for name, n in (("x", 3), ("z", 4))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_a_graph_survives(tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx")
    write_graph(read_graph(path), tmp_path / "b.onnx")
    assert [node.op_type for node in read_graph(str(tmp_path / "b.onnx")).graph] == ["MatMul", "Relu"]


def test_shapes_between_operators_are_known_on_request(tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx")
    plain, inferred = (next(iter(read_graph(path, inferred=wanted).graph)).outputs[0] for wanted in (False, True))
    assert plain.shape is None
    assert inferred.shape == ir.Shape([2, 4])


@pytest.mark.parametrize("inferred", [False, True])
@pytest.mark.parametrize(
    ("content", "found"), [(None, "No such file"), (b"", "operators"), (b"a page of HTML", "readable")]
)
def test_what_is_no_onnx_file_is_said_to_be_none(
    tmp_path: Path, content: bytes | None, found: str, inferred: bool
) -> None:
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OnnxError, match=found) as caught:
        read_graph(path, inferred=inferred)
    assert str(path) in str(caught.value)


def test_a_graph_that_the_checker_refuses_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = network(tmp_path / "a.onnx")
    before, model = path.read_bytes(), read_graph(path)
    next(iter(model.graph)).op_type = "NoSuchOperator"
    with pytest.raises(OnnxError, match="NoSuchOperator") as caught:
        write_graph(model, path, what="a multiplication")
    assert "a multiplication" in str(caught.value)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.onnx"]
