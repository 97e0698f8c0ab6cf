"""Eight-bit weights → seven-bit ones on a quantised ONNX graph, for CPUs on which sums of u8·s8 products saturate.

Invariant: codes end up within ±63, activations keep their ranges, and each bias keeps its value but for rounding to
the new scale of its accumulator.

Not lossless: a channel whose codes reach 127 is rounded to steps twice as wide. Requantising from the float network
with its ranges (`quantised_onnx(…, weight_bits=7)`) rounds once, this rounds a second time. Channels that stay within
±63 already are not touched.
"""

from __future__ import annotations

import os
from typing import Any, Literal

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgepose.errors import OnnxError
from edgepose.export.files import read_graph, write_graph
from edgepose.spec import Dialect

_TOP = 63
_MULTIPLIERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


class Quantisation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How an ONNX file is quantised.

    Attributes:
        dialect: "float" where no activation is.
        weight_bits: 7 where all weight codes are within ±63, 8 otherwise and for float weights.
    """

    dialect: Dialect
    weight_bits: Literal[7, 8]


class Narrowed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What requantising changed.

    Attributes:
        weights: Weight tensors with new codes.
        channels: Their channels with a wider scale.
        worst_step: Largest widening of a scale, 127/63 at most for codes within ±127.
    """

    weights: int
    channels: int
    worst_step: float


def quantisation_of(path: str | os.PathLike[str]) -> Quantisation:
    """Reads off the graph itself how it is quantised.

    Raises:
        OnnxError: Not a readable ONNX file.
    """
    graph = read_graph(path).graph
    kinds = {_dtype_of(node.inputs[2]) for node in graph if node.op_type == "QuantizeLinear" and len(node.inputs) > 2}
    peaks = [int(np.abs(_codes_of(node).astype(np.int16)).max(initial=0)) for node in _weights(graph)]
    dialect: Dialect = "s8s8" if ir.DataType.INT8 in kinds else "u8s8" if kinds else "float"
    return Quantisation(dialect, 7 if peaks and max(peaks) <= _TOP else 8)


def narrowed_onnx(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Narrowed:
    """Writes a copy of a quantised ONNX file whose weights have seven bits.

    Args:
        path: The file, with int8 weights behind DequantizeLinear and zero points of 0.
        out: Where the copy goes.

    Raises:
        OnnxError: Not a readable ONNX file, or weights with other zero points.
        StorageError: Disk full, read-only or no permission.
    """
    model = read_graph(path)
    steps = [_narrow(model.graph, node, where=str(path)) for node in _weights(model.graph)]
    changed = [step for step in steps if step.max() > 1]
    model.metadata_props["edgepose.dialect"] = "u8s8-7bit"
    write_graph(model, out, what="a valid quantised graph")
    return Narrowed(
        weights=len(changed),
        channels=sum(int(np.count_nonzero(step > 1)) for step in changed),
        worst_step=max((float(step.max()) for step in changed), default=1.0),
    )


def _weights(graph: ir.Graph) -> list[ir.Node]:
    """The nodes that dequantise int8 weights of convolutions and matrix products."""
    return [
        node
        for node in graph
        if node.op_type == "DequantizeLinear"
        and node.inputs[0] is not None
        and node.inputs[0].const_value is not None
        and node.inputs[0].const_value.dtype == ir.DataType.INT8
        and any(user.op_type in _MULTIPLIERS and port == 1 for user, port in node.outputs[0].uses())
    ]


def _narrow(graph: ir.Graph, node: ir.Node, *, where: str) -> NDArray[np.float64]:
    """Requantises one weight; returns the factors of its scales, 1 where a channel is left as it is."""
    codes, scale = _codes_of(node), _constant_of(node.inputs[1])
    zero = _constant_of(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or (zero is not None and np.any(zero)):
        raise OnnxError(
            f"{where}: {node.name}", found="weights with a zero point, or a scale that is computed",
            expected="symmetric constants", fix="compile the network again for the target",
        )  # fmt: skip
    magnitudes = np.abs(codes.astype(np.float64))
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    others = None if scale.size == 1 else tuple(a for a in range(codes.ndim) if a != axis % codes.ndim)
    peaks: NDArray[np.float64] = np.asarray(magnitudes.max(axis=others))
    factors: NDArray[np.float64] = np.maximum(peaks / _TOP, 1.0).reshape(scale.shape)
    if factors.max() == 1:
        return factors
    wider = (scale * factors).astype(np.float32)
    shape = [1] * codes.ndim
    shape[axis % codes.ndim] = -1 if scale.size > 1 else 1
    ratios = (scale.astype(np.float64) / wider).reshape(shape)
    narrow = np.clip(np.round(codes * ratios), -_TOP, _TOP).astype(np.int8)
    _replace(graph, node, 0, narrow)
    _replace(graph, node, 1, wider)
    for user, port in node.outputs[0].uses():
        if port == 1:
            _rescale_bias(graph, user, wider, where=where)
    return factors


def _rescale_bias(graph: ir.Graph, node: ir.Node, scale: NDArray[np.float32], *, where: str) -> None:
    """Rounds an int32 bias to the new scale of its accumulator; float biases stay as they are."""
    bias = node.inputs[2] if node.op_type in ("Conv", "Gemm") and len(node.inputs) > 2 else None
    dequantise = None if bias is None else bias.producer()
    if dequantise is None or dequantise.op_type != "DequantizeLinear":
        return
    codes, unit = _constant_of(dequantise.inputs[0]), _constant_of(dequantise.inputs[1])
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    step = _constant_of(source.inputs[1]) if source is not None and source.op_type == "DequantizeLinear" else None
    if codes is None or unit is None or step is None or len(dequantise.outputs[0].uses()) > 1:
        raise OnnxError(
            f"{where}: {node.name}", found="an integer bias that is computed, shared, or behind a float input",
            expected="a constant of its own behind a quantised input", fix="compile the network again for the target",
        )  # fmt: skip
    # The engine multiplies the same two float32 numbers, so this product must be rounded to float32 first.
    wider = np.broadcast_to((scale * step).astype(np.float32), unit.shape).copy()
    _replace(graph, dequantise, 0, np.round(codes * (unit.astype(np.float64) / wider)).astype(np.int32))
    _replace(graph, dequantise, 1, wider)


def _replace(graph: ir.Graph, node: ir.Node, port: int, array: NDArray[Any]) -> None:
    """Gives one input of a node a new constant; the old one goes when nobody else reads it."""
    old = node.inputs[port]
    assert old is not None
    name = f"{old.name}_for_{node.name or node.outputs[0].name}" if len(old.uses()) > 1 else f"{old.name}_7bit"
    value = ir.Value(
        name=name,
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
        const_value=ir.tensor(array, name=name),
    )
    graph.register_initializer(value)
    node.replace_input_with(port, value)
    if not old.uses() and old.name is not None:
        graph.initializers.pop(old.name, None)


def _codes_of(node: ir.Node) -> NDArray[Any]:
    codes = _constant_of(node.inputs[0])
    assert codes is not None
    return codes


def _constant_of(value: ir.Value | None) -> NDArray[Any] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _dtype_of(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None or value.const_value is None else value.const_value.dtype
