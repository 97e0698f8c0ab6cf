"""Hostile and broken ONNX files: each is refused as data, by name of the place, before any library executes it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper

from edgepose.errors import OnnxError
from edgepose.importer.onnx_file import read_onnx

WEIGHT = np.arange(12, dtype=np.float32).reshape(4, 3, 1, 1)


def model(
    nodes: list[onnx.NodeProto] | None = None, *, opset: int = 17, weight: TensorProto | None = None
) -> ModelProto:
    nodes = nodes or [helper.make_node("Conv", ["image", "weight"], ["maps"], name="first")]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, 16, 8])],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [weight or numpy_helper.from_array(WEIGHT, "weight")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def written(built: ModelProto, folder: Path) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(built.SerializeToString())
    return path


def external(folder: Path, location: str, **words: str) -> Path:
    built = model()
    tensor = built.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **words}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return written(built, folder)


# What is taken


def test_a_plain_file(tmp_path: Path) -> None:
    file = read_onnx(written(model(), tmp_path))
    assert file.opset == 17
    assert len(file.digest) == 64
    assert file.notes == ()


def test_initialisers_that_are_listed_as_inputs_and_lies_about_shapes(tmp_path: Path) -> None:
    built = model()
    built.graph.input.append(helper.make_tensor_value_info("weight", TensorProto.FLOAT, [4, 3, 1, 1]))
    built.graph.value_info.append(helper.make_tensor_value_info("maps", TensorProto.FLOAT, [7, 7]))
    file = read_onnx(written(built, tmp_path))
    assert [value.name for value in file.model.graph.input] == ["image"]
    assert not file.model.graph.value_info
    assert "listed as inputs" in file.notes[0]


def test_nodes_out_of_order_are_sorted(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["maps"], ["out"]), helper.make_node("Conv", ["image", "weight"], ["maps"])]
    built = model(nodes)
    built.graph.output[0].name = "out"
    file = read_onnx(written(built, tmp_path))
    assert [node.op_type for node in file.model.graph.node] == ["Conv", "Relu"]


def test_external_data_in_the_models_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 8 + WEIGHT.tobytes())
    file = read_onnx(external(tmp_path, "weights.bin", offset="8", length="48"))
    assert np.array_equal(numpy_helper.to_array(file.model.graph.initializer[0]), WEIGHT)
    assert "weights.bin" in file.notes[0]
    (tmp_path / "weights.bin").write_bytes(b"\0" * 8 + (WEIGHT + 1).tobytes())
    assert read_onnx(tmp_path / "net.onnx").digest != file.digest


def test_functions_of_its_own_are_written_out(tmp_path: Path) -> None:
    built = model([helper.make_node("twice", ["image"], ["out"], domain="own")])
    built.opset_import.append(helper.make_opsetid("own", 1))
    body = [helper.make_node("Add", ["x", "x"], ["y"])]
    built.functions.append(helper.make_function("own", "twice", ["x"], ["y"], body, [helper.make_opsetid("", 17)]))
    file = read_onnx(written(built, tmp_path))
    assert [node.op_type for node in file.model.graph.node] == ["Add"]


# What is refused


def refused(path: Path, match: str) -> OnnxError:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(OnnxError, match=match) as caught:
        read_onnx(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert sorted(path.parent.rglob("*")) == before
    return caught.value


def test_files_that_are_none(tmp_path: Path) -> None:
    refused(tmp_path / "net.onnx", "No such file")
    refused(tmp_path, "no file")
    path = tmp_path / "net.onnx"
    path.write_bytes(b"")
    refused(path, "an empty file")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(path, "no ONNX file|without a graph")
    path.write_bytes(ModelProto(ir_version=8).SerializeToString())
    refused(path, "without a graph")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file(share: float, tmp_path: Path) -> None:
    raw = model().SerializeToString()
    (tmp_path / "net.onnx").write_bytes(raw[: int(share * len(raw))])
    refused(tmp_path / "net.onnx", ".")


def test_a_file_with_any_byte_changed_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    raw = model().SerializeToString()
    for place in range(0, len(raw), 3):
        changed = bytearray(raw)
        changed[place] ^= 0xFF
        (tmp_path / "net.onnx").write_bytes(bytes(changed))
        with contextlib.suppress(OnnxError):
            read_onnx(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    "location", ["../weights.bin", "/etc/hostname", "a/../../weights.bin", "..\\weights.bin", "", "\0", "link.bin"]
)
def test_external_data_outside_the_folder(location: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    refused(external(folder, location), "in the model's folder|location|cannot be read|null")


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"offset": "40"}, "bytes|dimensions"),
        ({"length": "4000"}, "which has 48"),
        ({"offset": "-8"}, "whole number"),
        ({"length": "8"}, "8 bytes for dimensions"),
        ({"length": "9" * 30}, "whole number"),
        ({"run": "me"}, "location"),
    ],
)
def test_external_data_that_is_not_there(words: dict[str, str], match: str, tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(WEIGHT.tobytes())
    refused(external(tmp_path, "weights.bin", **words), match)


def test_external_data_that_is_missing_or_no_file(tmp_path: Path) -> None:
    refused(external(tmp_path, "weights.bin"), "no file 'weights.bin'")
    os.mkfifo(tmp_path / "weights.bin")
    refused(tmp_path / "net.onnx", "no file 'weights.bin'")


def _tensor(dims: list[int], raw: bytes = b"", kind: int = TensorProto.FLOAT) -> TensorProto:
    return TensorProto(name="weight", dims=dims, data_type=kind, raw_data=raw)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (_tensor([-4, 3, 1, 1], WEIGHT.tobytes()), "dimensions .-4, 3, 1, 1., expected 0 or more"),
        (_tensor([1 << 15, 1 << 15, 1, 1]), "4.3 GB, expected at most 2 GB"),
        (_tensor([1 << 62, 1 << 62, 1, 1]), "GB, expected at most 2 GB"),
        (_tensor([4, 3, 1, 1], b"\0" * 20), "20 bytes for dimensions .4, 3, 1, 1., expected 48"),
        (_tensor([4, 3, 1, 1]), "other values"),
        (_tensor([4, 3, 1, 1], WEIGHT.tobytes(), 99), "the type 99"),
        (_tensor([4, 3, 1, 1], np.full(12, np.nan, np.float32).tobytes()), "NaN"),
    ],
)
def test_tensors_that_are_not_what_they_say(tensor: TensorProto, match: str, tmp_path: Path) -> None:
    refused(written(model(weight=tensor), tmp_path), match)


def _circle() -> ModelProto:
    nodes = [
        helper.make_node("Add", ["image", "b"], ["a"], name="one"),
        helper.make_node("Relu", ["a"], ["b"], name="two"),
        helper.make_node("Relu", ["b"], ["out"], name="three"),
    ]
    return model(nodes)


def _with(change: Callable[[GraphProto], object]) -> ModelProto:
    built = model()
    change(built.graph)
    return built


def _image_of(dims: list[int]) -> Callable[[GraphProto], object]:
    return lambda graph: graph.input[0].CopyFrom(helper.make_tensor_value_info("image", TensorProto.FLOAT, dims))


@pytest.mark.parametrize(
    ("built", "match"),
    [
        (_circle(), "a circle of operators: .*one.*two"),
        (model([helper.make_node("Conv", ["image", "nowhere"], ["y"])]), "reads 'nowhere', which nothing produces"),
        (model([helper.make_node("Convv", ["image", "weight"], ["y"])]), "does not have.*did you mean 'Conv'"),
        (model([helper.make_node("NMS", ["image"], ["y"], domain="mmdeploy")]), "operators of the domain 'mmdeploy'"),
        (model([helper.make_node("Relu", ["image"], ["image"])]), "second value named 'image'"),
        (_with(_image_of([1, -3, 16, 8])), "dimensions .1, -3, 16, 8., expected 0 or more"),
        (_with(_image_of([1, 3, 1 << 20, 1 << 20])), "at most 2 GB"),
        (
            _with(lambda graph: graph.output.append(helper.make_tensor_value_info("x", 1, [1]))),
            "'x' that nothing produces",
        ),
        (model(opset=6), "found 6, expected 7 to"),
        (model(opset=999), "found 999"),
        (model([helper.make_node("Conv", ["image"], ["y"])]), "valid ONNX graph"),
        (model([helper.make_node("MatMul", ["image", "weight"], ["y"])]), "valid ONNX graph"),
    ],
)
def test_graphs_that_cannot_be(built: ModelProto, match: str, tmp_path: Path) -> None:
    refused(written(built, tmp_path), match)


def test_a_value_that_would_fill_the_memory(tmp_path: Path) -> None:
    nodes = [
        helper.make_node(
            "Constant", [], ["shape"], value=numpy_helper.from_array(np.array([1 << 16, 1 << 16], np.int64))
        ),
        helper.make_node("ConstantOfShape", ["shape"], ["bomb"]),
        helper.make_node("ReduceSum", ["bomb"], ["sum"]),
        helper.make_node("Add", ["image", "sum"], ["out"]),
    ]
    refused(written(model(nodes), tmp_path), "'bomb': found dimensions .65536, 65536., 17.2 GB")


def test_functions_that_call_each_other(tmp_path: Path) -> None:
    built = model([helper.make_node("a", ["image"], ["out"], domain="own")])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    built.opset_import.append(opsets[1])
    for name, other in (("a", "b"), ("b", "a")):
        body = [helper.make_node(other, ["x"], ["y"], domain="own")]
        built.functions.append(helper.make_function("own", name, ["x"], ["y"], body, opsets))
    refused(written(built, tmp_path), "in a circle")
