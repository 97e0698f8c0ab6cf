"""A float network in 16 bits: which values are halved is written into the ONNX file, so that any backend computes the same.

Invariant: inputs, outputs, shape computations and the decoding at the end stay in 32 bits; a weight that 16 bits cannot
hold is an error, never an infinity.

What stays in 32 bits: sums and exponentials (softmax, reductions, normalisation over a tensor), which lose or overflow
in 16, and everything behind them that no convolution or matrix product follows: decoding. Quantised networks are not
touched: their scales are 32-bit numbers, and TensorRT takes the type between layers from them.
"""  # noqa: E501

from __future__ import annotations

import os
from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from edgepose.errors import OnnxError
from edgepose.export.files import read_graph, write_graph
from edgepose.export.notes import HEAVY

_WIDE = frozenset({
    "Softmax", "LogSoftmax", "Exp", "Log", "Pow", "ReduceSum", "ReduceMean", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
    "ReduceSumSquare", "ReduceProd", "CumSum", "InstanceNormalization", "LayerNormalization", "LpNormalization",
    "Range", "NonMaxSuppression", "Einsum", "ArgMax",
})  # fmt: skip
_WIDE_PORTS = {"Resize": (1, 2), "Upsample": (1,)}
"""Inputs that ONNX has in 32 bits whatever the data is."""
_SHAPES = frozenset({"Shape", "Size"})
_MOST = float(np.finfo(np.float16).max)


def half_onnx(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """Writes a copy of a float ONNX file that computes in 16 bits; returns how many nodes do.

    Raises:
        OnnxError: Not a readable ONNX file, quantised, with control flow, or with weights beyond 16 bits.
        StorageError: Disk full, read-only or no permission.
    """
    model = read_graph(path, inferred=True)  # every value's type has to be known
    writer = _Halver(model, where=str(path))
    halved = writer.write()
    write_graph(model, out, what="a valid graph of 16 bits")
    return halved


class _Halver:
    """One graph being halved: nodes are chosen, then their inputs, then what leaves them."""

    def __init__(self, model: ir.Model, *, where: str) -> None:
        self.graph, self.where = model.graph, where
        self.nodes = tuple(node for node in model.graph if node.op_type != "Constant")
        self._check()
        data = _reached(model.graph.inputs, stop=_SHAPES)
        wide = _wide(self.nodes)
        self.half = frozenset(node for node in self.nodes if node in data and node not in wide)
        self._narrow: dict[ir.Value, ir.Value] = {}
        self._widened: dict[ir.Value, ir.Value] = {}

    def write(self) -> int:
        """Rewrites the graph; returns how many nodes compute in 16 bits."""
        made = {value for node in self.half for value in node.outputs if _is_float(value)}
        for node in self.half:
            for port, value in enumerate(node.inputs):
                wide_port = port in _WIDE_PORTS.get(node.op_type, ())
                if value is None or not _is_float(value):
                    continue
                if wide_port and value in made:
                    node.replace_input_with(port, self._as_wide(value))
                elif not wide_port and value not in made:
                    node.replace_input_with(port, self._as_half(value))
        for node in self.nodes:
            if node not in self.half:
                for port, value in enumerate(node.inputs):
                    if value is not None and value in made:
                        node.replace_input_with(port, self._as_wide(value))
        for value in made:
            value.dtype = ir.DataType.FLOAT16
        self._widen_outputs(made)
        self._retype()
        self._drop_unused()
        self.graph.sort()
        return len(self.half)

    def _check(self) -> None:
        for node in self.nodes:
            if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                   for attribute in node.attributes.values()):  # fmt: skip
                found, fix = f"control flow ({node.op_type})", "build it in fp32"
                raise OnnxError(f"{self.where}: {node.name}", found=found, expected="a plain graph", fix=fix)
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                found = "a quantised network"
                raise OnnxError(f"{self.where}: {node.name}", found=found, expected="a float one for fp16")

    def _as_half(self, value: ir.Value) -> ir.Value:
        """The 16-bit form of a 32-bit value: a constant of its own, or a Cast."""
        if value in self._narrow:
            return self._narrow[value]
        tensor = _constant(value)
        if tensor is None:
            self._narrow[value] = self._cast(value, ir.DataType.FLOAT16)
            return self._narrow[value]
        wide = tensor.numpy()
        finite = wide[np.isfinite(wide)]
        if finite.size and float(np.abs(finite).max()) > _MOST:
            raise OnnxError(
                f"{self.where}: {value.name}", found=f"values up to {np.abs(finite).max():g}",
                expected=f"at most {_MOST:g}, as 16 bits hold", fix="build it in fp32",
            )  # fmt: skip
        name = f"{value.name}_half"
        content = ir.tensor(wide.astype(np.float16), name=name)
        narrow = ir.Value(name=name, shape=ir.Shape(wide.shape), type=ir.TensorType(content.dtype), const_value=content)
        self.graph.register_initializer(narrow)
        self._narrow[value] = narrow
        return narrow

    def _as_wide(self, value: ir.Value) -> ir.Value:
        if value not in self._widened:
            self._widened[value] = self._cast(value, ir.DataType.FLOAT)
        return self._widened[value]

    def _cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        ending = "half" if to == ir.DataType.FLOAT16 else "wide"
        attributes = {"to": ir.AttrInt64("to", int(to))}
        node = ir.node("Cast", [value], attributes=attributes, name=f"{value.name}_{ending}_cast")
        result = node.outputs[0]
        result.name, result.shape, result.type = f"{value.name}_{ending}", value.shape, ir.TensorType(to)
        self.graph.append(node)
        return result

    def _widen_outputs(self, made: Iterable[ir.Value]) -> None:
        """Gives outputs back in 32 bits under their names."""
        halved = set(made)
        for index, value in enumerate(self.graph.outputs):
            if value in halved:
                name, value.name = value.name, f"{value.name}_inner"
                wide = self._as_wide(value)
                wide.name = name
                self.graph.outputs[index] = wide

    def _retype(self) -> None:
        """Casts and constants of a shape that made 32 bits make 16."""
        for node in self.half:
            if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
                node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT16))

    def _drop_unused(self) -> None:
        for node in list(self.graph):
            if node.op_type == "Constant" and not node.outputs[0].uses() and node.outputs[0] not in self.graph.outputs:
                self.graph.remove(node, safe=True)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in self.graph.outputs:
                del self.graph.initializers[name]


def _is_float(value: ir.Value) -> bool:
    tensor = _constant(value)
    return (value.dtype if tensor is None else tensor.dtype) == ir.DataType.FLOAT


def _constant(value: ir.Value) -> ir.TensorProtocol | None:
    producer = value.producer()
    if value.const_value is not None:
        return value.const_value
    if producer is None or producer.op_type != "Constant":
        return None
    if "value" in producer.attributes:
        return producer.attributes["value"].as_tensor()
    if "value_float" in producer.attributes:
        return ir.tensor(np.float32(producer.attributes["value_float"].as_float()))
    if "value_floats" in producer.attributes:
        return ir.tensor(np.asarray(producer.attributes["value_floats"].as_floats(), np.float32))
    return None


def _reached(values: Iterable[ir.Value], *, stop: frozenset[str] = frozenset()) -> set[ir.Node]:
    """Nodes that these values have an influence on, other than by their shapes."""
    found: set[ir.Node] = set()
    pending = list(values)
    while pending:
        for node, _ in pending.pop().uses():
            if node not in found and node.op_type not in stop:
                found.add(node)
                pending.extend(node.outputs)
    return found


def _wide(nodes: tuple[ir.Node, ...]) -> set[ir.Node]:
    """Nodes that stay in 32 bits: sums, exponentials, and what follows them where no product does."""
    before_product: set[ir.Node] = set()  # nodes that some product follows
    pending = [node for node in nodes if node.op_type in HEAVY]
    while pending:
        for value in pending.pop().inputs:
            source = None if value is None else value.producer()
            if source is not None and source not in before_product:
                before_product.add(source)
                pending.append(source)
    wide = {node for node in nodes if node.op_type in _WIDE}
    last = [value for node in wide if node not in before_product for value in node.outputs]
    return wide | {node for node in _reached(last) if node.op_type not in HEAVY and node not in before_product}
