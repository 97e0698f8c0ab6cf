"""What an engine does, read from lines that TensorRT-RTX 1.7 logged and from the inspector's JSON of other versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto

from edgepose.errors import EnvironmentFault
from edgepose.export.int8_reasons import achieved, read_asked
from edgepose.export.trt_kernels import (
    EngineKernel,
    engine_layers,
    int8_share_of,
    kernels_in_inspection,
    kernels_in_log,
    precision_report,
)
from tests.export.qdq_graphs import Net, clean


def line(name: str, kind: str, types: dict[str, str], origins: str) -> str:
    """A kernel as TensorRT-RTX 1.7 logs it; `types` are those of inputs, constants and outputs, separated by spaces."""
    place = "Dimensions: [1,3,160,160], Strides: [76800,25600,160,1], StrideOrder: [3,2,1,0]"
    tensors = {
        role: ", ".join(
            f"{{ Name: v, {place}, Datatype: {kind}, Format: (Linear) Row major linear format }}"
            for kind in text.split()
        )
        for role, text in types.items()
    }
    inputs, constants, outputs = (f"[ {tensors[role]}]" if tensors[role] else "[]" for role in ("in", "const", "out"))
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: {inputs}, Constants: {constants}, Outputs: {outputs}, "
        f"TacticName: __myelin_CASK_STUB, StreamId: 0, Metadata: {origins}"
    )


LOG = (
    "Layers:\n"
    + line("__myl_Move_myl0_0", "kgen", {"in": "Float", "const": "", "out": "Float"}, "")
    + "\n"
    + line(
        "node_conv2d [profile 1]_myl0_1", "correlation", {"in": "Int8", "const": "Int8 Float", "out": "Half"},
        "[ONNX Layer: node_conv2d][ONNX Layer: node_relu]",
    ),
    line("__mye1769_0_myl1_0", "shape_call", {"in": "", "const": "", "out": ""}, ""),
    line(
        "node_MatMul_11+node_MatMul_9_myl0_28", "gemm", {"in": "Half", "const": "", "out": "Half"},
        "[ONNX Layer: node_MatMul_11]\x1e[ONNX Layer: node_MatMul_9]",
    ),
    "Engine generation completed in 16.039 seconds.",
)  # fmt: skip


def kernel(kind: str, precision: str, *origins: str) -> EngineKernel:
    return EngineKernel(f"{kind} of {origins}", kind, origins, (precision,))


def test_kernels_are_read_from_a_log() -> None:
    assert [(k.kind, k.origins, k.inputs) for k in kernels_in_log(LOG)] == [
        ("kgen", (), ("fp32",)),
        ("correlation", ("node_conv2d", "node_relu"), ("int8", "int8", "fp32")),  # and not the output's type
        ("shape_call", (), ()),
        ("gemm", ("node_MatMul_11", "node_MatMul_9"), ("fp16",)),
    ]


@pytest.mark.parametrize(
    ("tensor", "precision"),
    [
        ({"Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}, "fp16"),
        ({"Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}, "int8"),
        ({"Format": "(NHWC) Channel major format", "Datatype": "BFloat16"}, "bf16"),
        ({"Format": "Row major linear FP32 format (kLINEAR)"}, "fp32"),
        ({"Datatype": "Int64"}, "unknown"),
        ("x", "unknown"),
    ],
)
def test_inspectors_of_all_versions_say_the_type(tensor: Any, precision: str) -> None:
    layer = {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [tensor], "Metadata": "[ONNX Layer: conv]"}
    (found,) = kernels_in_inspection(json.dumps({"Layers": [layer]}))
    assert (found.inputs, found.origins) == ((precision,), ("conv",))


def test_without_metadata_the_name_of_a_fused_layer_says_its_origins() -> None:
    (found,) = kernels_in_inspection(json.dumps({"Layers": [{"Name": "conv1 + relu1", "LayerType": "Convolution"}]}))
    assert found.origins == ("conv1", "relu1")


@pytest.mark.parametrize("text", ["", "[]", '{"Bindings": []}', '{"Layers": ["conv1", "conv2"]}', '{"Layers": 3}'])
def test_inspection_that_says_nothing(text: str) -> None:
    with pytest.raises(EnvironmentFault, match="engine inspector"):
        kernels_in_inspection(text)


# Against the file


def quantised(folder: Path) -> Path:
    net, output = clean()
    return net.save(folder / "net.onnx", output)


def test_layers_are_asked_for_by_the_file_and_achieved_by_the_engine(tmp_path: Path) -> None:
    path = quantised(tmp_path)
    kernels = [
        kernel("correlation", "int8", "conv1", "relu1"),
        kernel("kgen", "fp32", "conv2"),  # a part of it that multiplies nothing
        kernel("correlation", "fp16", "conv2", "sum"),
    ]
    layers = engine_layers(path, kernels)
    macs = 8 * 8 * 4 * 4 * 9
    assert [(layer.node, layer.asked, layer.achieved, layer.macs) for layer in layers] == [
        ("conv1", "int8", "int8", macs),
        ("conv2", "int8", "fp16", macs),
    ]
    report = precision_report(layers, len(kernels), "log")
    assert (report.asked, report.achieved) == ({"int8": 1.0}, {"int8": 0.5, "fp16": 0.5})
    assert [layer.node for layer in report.otherwise] == ["conv2"]
    share = achieved(int8_share_of(layers, "tensorrt"), read_asked(path))
    assert share.share == 0.5
    assert share.float_layers[0].reason == "quantised, but tensorrt runs it as correlation"


def test_the_most_exact_of_several_profiles_counts(tmp_path: Path) -> None:
    kernels = [kernel("correlation", precision, "conv1") for precision in ("int8", "fp32", "int8")]
    assert engine_layers(quantised(tmp_path), kernels)[0].achieved == "fp32"


def test_layer_that_no_kernel_names_is_not_known(tmp_path: Path) -> None:
    layers = engine_layers(quantised(tmp_path), [])
    assert {layer.achieved for layer in layers} == {"unknown"}
    assert int8_share_of(layers, "tensorrt").share == 0


def test_products_of_every_kind_are_counted(tmp_path: Path) -> None:
    net = Net()
    half = net.node("Cast", ["images"], "half", to=TensorProto.FLOAT16)
    up = net.node("ConvTranspose", [half, net.constant("u", np.ones((4, 6, 2, 2), np.float16))], "up", strides=[2, 2])
    flat = net.node("Flatten", [up], "flat")
    rows = net.node("Gemm", [flat, net.constant("g", np.ones((10, 1536), np.float16))], "rows", transB=1)
    last = net.node("MatMul", [rows, net.constant("m", np.ones((10, 3), np.float16))], "last")
    last = net.node("Cast", [last], "wide", to=TensorProto.FLOAT)
    layers = engine_layers(net.save(tmp_path / "net.onnx", last), [])
    assert [(layer.node, layer.asked, layer.macs) for layer in layers] == [
        ("up", "fp16", 4 * 8 * 8 * 6 * 4),
        ("rows", "fp16", 15360),
        ("last", "fp16", 30),
    ]
