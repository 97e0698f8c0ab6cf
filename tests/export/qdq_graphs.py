"""Small quantised ONNX networks, made node by node, so that each can break one rule and no other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]


@dataclass
class Net:
    """A network being written; every method returns the name of the value that it makes."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    opset: int = 18
    domains: tuple[str, ...] = ()

    def node(self, kind: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name=name, **attributes))
        return f"{name}_out"

    def constant(self, name: str, value: Array) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def pair(self, value: str, name: str, *, zero: Array | None = None, scale: Array | None = None) -> str:
        """Q → DQ of an activation; signed and symmetric unless told otherwise."""
        zero = np.asarray(0, np.int8) if zero is None else zero
        numbers = [
            self.constant(f"{name}_s", np.float32(0.05) if scale is None else scale),
            self.constant(f"{name}_z", zero),
        ]
        axis = {"axis": 1} if np.size(zero) > 1 else {}
        codes = self.node("QuantizeLinear", [value, *numbers], f"{name}_q", **axis)
        return self.node("DequantizeLinear", [codes, *numbers], f"{name}_dq", **axis)

    def weight(self, shape: tuple[int, ...], name: str, *, axis: int | None = 0) -> str:
        """int8 codes → DQ, one scale for each channel along `axis`; None is one scale for all."""
        codes = np.random.default_rng(len(name)).integers(-127, 128, shape).astype(np.int8)
        count = () if axis is None else (shape[axis],)
        inputs = [
            self.constant(f"{name}_codes", codes),
            self.constant(f"{name}_s", np.full(count, 0.01, np.float32)),
            self.constant(f"{name}_z", np.zeros(count, np.int8)),
        ]
        return self.node("DequantizeLinear", inputs, f"{name}_dq", **({} if axis is None else {"axis": axis}))

    def conv(self, value: str, name: str, *, channels: int = 4, **weight: Any) -> str:
        """A quantised 3 × 3 convolution, whose input is a pair already."""
        kernel = self.weight((channels, channels, 3, 3), f"{name}_w", **weight)
        return self.node("Conv", [value, kernel], name, pads=[1, 1, 1, 1])

    def model(self, output: str, *, shape: tuple[int | str, ...] = ("batch", 4, 8, 8)) -> onnx.ModelProto:
        """The network from `images` to one output."""
        graph = helper.make_graph(
            self.nodes, "net",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)],
            self.constants,
        )  # fmt: skip
        opsets = [helper.make_opsetid("", self.opset), *(helper.make_opsetid(domain, 1) for domain in self.domains)]
        return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=10))

    def save(self, path: Path, output: str) -> Path:
        onnx.save(self.model(output), path)
        return path


def clean(net: Net | None = None) -> tuple[Net, str]:
    """Convolution, rectifier, convolution with a residual sum whose skip branch alone is quantised."""
    net = net or Net()
    first = net.node("Relu", [net.conv(net.pair("images", "image"), "conv1")], "relu1")
    skip = net.pair(first, "skip")
    second = net.conv(skip, "conv2")
    return net, net.node("Relu", [net.node("Add", [second, skip], "sum")], "relu2")
