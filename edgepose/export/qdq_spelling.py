"""Q/DQ graphs respelt where runtimes do otherwise than such a graph says.

Invariant: the numbers stay equal; only nodes are written another way, and only where a runtime asks for it.

* ONNX Runtime quantises float weights by itself, with one scale for all channels, wherever they stand between codes of
  one scale (its WeightBiasQuantization): protecting a layer would make it worse. It leaves layers alone that read codes
  with a scale per channel, and nothing says that those must differ.
* OpenVINO 2026.4 pads an average pool with the code 0, which is the number 0 only where the zero point is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_REQUANTISED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_CHANNEL_AXIS = 1


def respell(graph: ir.Graph) -> None:
    """Rewrites a quantised graph in place; it is not sorted afterwards."""
    for node in list(graph):
        if node.op_type in _REQUANTISED:
            _keep_float(graph, node)
        elif node.op_type == "AveragePool":
            _pad_codes(graph, node)


def constant(graph: ir.Graph, name: str, array: NDArray[Any] | np.generic) -> ir.Value:
    """A new constant of a graph."""
    tensor = ir.tensor(np.asarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(np.shape(array)), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def _keep_float(graph: ir.Graph, node: ir.Node) -> None:
    """Dequantises what a layer with float weights reads with a scale per channel, all of them equal."""
    weight = node.inputs[1] if len(node.inputs) > 1 else None
    dequantise = _dequantise_before(node)
    if dequantise is None or weight is None or weight.const_value is None:
        return
    value, name = dequantise.outputs[0], f"{dequantise.outputs[0].name}_for_{node.name}"
    channels = _channels_read(node, weight.const_value.numpy())
    scale, zero = (_array(dequantise.inputs[port]) for port in (1, 2))
    vectors = [
        constant(graph, f"{name}_scales", np.full(channels, scale, np.float32)),
        constant(graph, f"{name}_zero_points", np.full(channels, zero, zero.dtype)),
    ]
    if len(value.uses()) == 1 and not any(output is value for output in graph.outputs):
        for port, vector in enumerate(vectors, start=1):
            dequantise.replace_input_with(port, vector)
        dequantise.attributes["axis"] = ir.AttrInt64("axis", _CHANNEL_AXIS)
        return
    own = ir.node("DequantizeLinear", [dequantise.inputs[0], *vectors], attributes={"axis": _CHANNEL_AXIS}, name=name)
    _read_instead(graph, node, own, value)


def _pad_codes(graph: ir.Graph, node: ir.Node) -> None:
    """Pads in front of an average pool that counts its padding, with the code of 0."""
    dequantise = _dequantise_before(node)
    pads = list(node.attributes["pads"].as_ints()) if "pads" in node.attributes else []
    counted = "count_include_pad" in node.attributes and node.attributes["count_include_pad"].as_int() == 1
    rounded_up = "ceil_mode" in node.attributes and node.attributes["ceil_mode"].as_int() == 1
    if dequantise is None or not any(pads) or not counted or rounded_up:
        return
    codes, scale, zero = dequantise.inputs
    if not np.any(_array(zero)):
        return
    value, sides = dequantise.outputs[0], len(pads) // 2
    name = f"{value.name}_for_{node.name}"
    widths = np.array([0, 0, *pads[:sides], 0, 0, *pads[sides:]], np.int64)
    pad = ir.node("Pad", [codes, constant(graph, f"{name}_pads", widths), zero], name=f"{name}_pad")
    pad.outputs[0].name = f"{name}_padded_codes"
    graph.append(pad)
    node.attributes["pads"] = ir.AttrInt64s("pads", [0] * len(pads))
    own = ir.node("DequantizeLinear", [pad.outputs[0], scale, zero], name=name)
    _read_instead(graph, node, own, None)


def _read_instead(graph: ir.Graph, node: ir.Node, dequantise: ir.Node, like: ir.Value | None) -> None:
    """Lets a node read what a new DequantizeLinear makes, which has the shape of `like`."""
    made = dequantise.outputs[0]
    made.name, made.type = f"{dequantise.name}_dequantised", ir.TensorType(ir.DataType.FLOAT)
    made.shape = None if like is None else like.shape
    graph.append(dequantise)
    before = node.inputs[0]
    node.replace_input_with(0, made)
    producer = None if before is None else before.producer()
    if before is not None and producer is not None and not before.uses() and before not in graph.outputs:
        graph.remove(producer, safe=True)


def _dequantise_before(node: ir.Node) -> ir.Node | None:
    """The DequantizeLinear with one scale that a node reads from."""
    producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    if producer is None or producer.op_type != "DequantizeLinear" or _array(producer.inputs[1]).size != 1:
        return None
    return producer


def _channels_read(node: ir.Node, weight: NDArray[Any]) -> int:
    """Channels of a node's input, from its weight."""
    if node.op_type == "Conv":
        return int(weight.shape[1]) * (node.attributes["group"].as_int() if "group" in node.attributes else 1)
    if node.op_type == "Gemm":
        return int(weight.shape[1 if "transB" in node.attributes and node.attributes["transB"].as_int() else 0])
    return int(weight.shape[0])  # ConvTranspose


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None  # written by export.qdq, which knows no other scales
    return value.const_value.numpy()
