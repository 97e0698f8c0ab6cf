"""Reading ONNX files without the onnx package: the same answer as onnx itself gives, and errors on everything else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edgepose.errors import OnnxError
from edgepose.profiler.onnx_wire import Node, Tensor, read_onnx
from tests.tiny_network import spot_onnx


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    return path


def test_nodes_constants_and_values_are_those_that_onnx_reads(tmp_path: Path) -> None:
    model = onnx.load_from_string(spot_onnx())
    found = read_onnx(written(tmp_path, spot_onnx()))
    assert found.nodes == [Node(n.op_type, tuple(n.input), tuple(n.output)) for n in model.graph.node]
    assert found.constants == {
        "pick": Tensor((2, 3, 1, 1), "fp32"),
        "rows": Tensor((1,), "int64"),
        "columns": Tensor((1,), "int64"),
    }
    assert found.values["images"].shape[0] == "batch"
    assert found.inputs == ["images"]


def test_branches_and_constant_nodes_are_part_of_the_network(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    branch = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "branch", [], [value])
    kernel = numpy_helper.from_array(np.ones((4, 2), np.float16), "k")
    graph = helper.make_graph(
        [
            helper.make_node("Constant", [], ["k"], value=kernel),
            helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch),
        ],
        "main",
        [helper.make_tensor_value_info("c", TensorProto.BOOL, [])],
        [value],
    )
    found = read_onnx(written(tmp_path, helper.make_model(graph).SerializeToString()))
    assert sorted(node.operator for node in found.nodes) == ["If", "Relu", "Relu"]
    assert found.constants["k"] == Tensor((4, 2), "fp16")


def test_a_negative_size_is_free(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [-1, 3])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [])
    assert read_onnx(written(tmp_path, helper.make_model(graph).SerializeToString())).values["x"].shape == ("", 3)


@pytest.mark.parametrize("content", [b"", b"not a network", b"\x3a\xff\xff\xff\xff\x0f", b"\x3a\x02\x0a", b"\xff" * 40])
def test_what_is_no_onnx_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(OnnxError, match=r"net\.onnx"):
        read_onnx(written(tmp_path, content))


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match=r"none\.onnx"):
        read_onnx(tmp_path / "none.onnx")


@given(cut=st.integers(0, 400), flip=st.integers(0, 400), bit=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_spoilt_files_never_raise_anything_else(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int, bit: int
) -> None:
    content = bytearray(spot_onnx()[: -cut or None])
    if content:
        content[flip % len(content)] ^= 1 << bit
    path = written(tmp_path_factory.mktemp("spoilt"), bytes(content))
    try:
        read_onnx(path)
    except OnnxError as err:
        assert len(str(err).splitlines()) == 1  # noqa: PT017 - either outcome is right


def test_graphs_in_graphs_end_somewhere(tmp_path: Path) -> None:
    def framed(field: int, content: bytes) -> bytes:
        size, length = len(content), b""
        while size > 0x7F:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([field << 3 | 2]) + length + bytes([size]) + content

    graph = b""
    for _ in range(40):
        graph = framed(1, framed(5, framed(6, graph)))
    with pytest.raises(OnnxError, match="nested"):
        read_onnx(written(tmp_path, framed(7, graph)))
