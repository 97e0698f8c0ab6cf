"""A network quantised for CPUs (uint8 activations, int32 biases) respelt for TensorRT (int8 around 0, float biases).

Invariant: weights keep their codes; an activation whose zero point is 128 keeps its numbers, too. Any other gets the
narrowest symmetric range around its own, which is up to twice as coarse: how many did is returned, and what it costs is
seen where the engine's answers are compared with the golden vectors. Networks quantised with symmetric activations
(recipe: quantise: activations: symmetric) lose nothing here.
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgepose.errors import OnnxError
from edgepose.export.files import read_graph, write_graph
from edgepose.export.qdq_spelling import constant

_TOP = 127
_LAST = 255


class Signed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was respelt.

    Attributes:
        activations: Quantised activations.
        widened: Of these, those that got a coarser scale because their zero point was not 128.
        biases: Biases that are floats again.
    """

    activations: int
    widened: int
    biases: int


def signed_onnx(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Signed:
    """Writes a copy of a quantised ONNX file in the spelling that TensorRT reads.

    Raises:
        OnnxError: Not a readable ONNX file, or quantised otherwise than edgepose does for CPUs.
        StorageError: Disk full, read-only or no permission.
    """
    model = read_graph(path)
    writer = _Signer(model.graph, where=str(path))
    report = writer.write()
    model.metadata_props["edgepose.dialect"] = "s8s8"
    write_graph(model, out, what="a valid quantised graph")
    return report


class _Signer:
    """One graph being respelt."""

    def __init__(self, graph: ir.Graph, *, where: str) -> None:
        self.graph, self.where = graph, where
        self.activations = self.widened = self.biases = 0

    def write(self) -> Signed:
        nodes = list(self.graph)
        for node in nodes:
            if node.op_type == "QuantizeLinear":
                self._sign(node)
        for node in nodes:
            if node.op_type == "DequantizeLinear" and _dtype(node.inputs[0]) == ir.DataType.INT32:
                self._float_bias(node)
        self._drop_unused()
        self.graph.sort()
        return Signed(self.activations, self.widened, self.biases)

    def _sign(self, quantise: ir.Node) -> None:
        """Respells one Q, what stands on its codes, and the DQs behind."""
        zero = self._array(quantise, 2)
        if zero is None or zero.dtype != np.uint8:
            return
        scale = self._array(quantise, 1)
        if scale is None or scale.size != 1:
            raise self._odd(quantise, "a scale for each channel of an activation")
        old, offset = float(scale.reshape(())), int(zero.reshape(-1)[0])
        # The codes of zero point 128 are those of int8 already; any other range is widened to a symmetric one.
        new = old if offset == _TOP + 1 else old * max(offset, _LAST - offset) / _TOP
        self.activations += 1
        self.widened += offset != _TOP + 1
        name = f"{quantise.name or quantise.outputs[0].name}_signed"
        numbers = (
            constant(self.graph, f"{name}_scale", np.float32(new)),
            constant(self.graph, f"{name}_zero_point", np.asarray(0, np.int8)),
        )
        for node, _ in list(quantise.outputs[0].uses()):
            self._sign_reader(quantise, node, (old, offset), numbers)
        for port, value in enumerate(numbers, start=1):
            quantise.replace_input_with(port, value)
        quantise.outputs[0].dtype = ir.DataType.INT8

    def _sign_reader(
        self, quantise: ir.Node, node: ir.Node, old: tuple[float, int], numbers: tuple[ir.Value, ir.Value]
    ) -> None:
        """Respells what reads codes: DQ, a rectifier on codes, or the padding of an average pool."""
        match node.op_type:
            case "DequantizeLinear":
                for port, value in enumerate(numbers, start=1):
                    node.replace_input_with(port, value)
                node.attributes.pop("axis", None)
            case "Clip":
                self._rectify_floats(quantise, node, old)
                self._skip(node, numbers)
            case "Pad":
                self._pad_pool(node)
                self._skip(node, numbers)
            case _:
                raise self._odd(node, f"{node.op_type} on codes")

    def _rectify_floats(self, quantise: ir.Node, clip: ir.Node, old: tuple[float, int]) -> None:
        """Clips values in front of Q as Clip clipped their codes behind."""
        scale, offset = old
        if len(quantise.outputs[0].uses()) != 1:
            raise self._odd(clip, "codes of which only some are rectified")
        bounds = [self._array(clip, port) for port in (1, 2)]
        low, high = (limit if bound is None else int(bound) for bound, limit in zip(bounds, (0, _LAST), strict=True))
        value = quantise.inputs[0]
        assert value is not None
        name = clip.name or f"{value.name}_rectify"
        if (low, high) == (offset, _LAST):
            node = ir.node("Relu", [value], name=name)
        else:
            ends = [
                constant(self.graph, f"{name}_{end}", np.float32((code - offset) * scale))
                for end, code in (("from", low), ("to", high))
            ]
            node = ir.node("Clip", [value, *ends], name=name)
        clip.name = f"{name}_on_codes"
        result = node.outputs[0]
        result.name, result.shape, result.type = f"{value.name}_rectified", value.shape, value.type
        self.graph.append(node)
        quantise.replace_input_with(0, result)

    def _pad_pool(self, pad: ir.Node) -> None:
        """Gives padding that was written on codes back to the average pools behind."""
        widths = self._array(pad, 1)
        pools = [pool for dequantise, _ in pad.outputs[0].uses() for pool, _ in dequantise.outputs[0].uses()]
        if widths is None or not pools or any(pool.op_type != "AveragePool" for pool in pools):
            raise self._odd(pad, "padding of codes in front of something else than an average pool")
        sides = widths.size // 2
        spatial = [*widths[2:sides], *widths[sides + 2 :]]
        for pool in pools:
            pool.attributes["pads"] = ir.AttrInt64s("pads", [int(width) for width in spatial])

    def _skip(self, node: ir.Node, numbers: tuple[ir.Value, ir.Value]) -> None:
        """Takes an operator on codes out; the DQs behind it read what it read."""
        codes = node.inputs[0]
        for reader, port in list(node.outputs[0].uses()):
            if reader.op_type != "DequantizeLinear":
                raise self._odd(reader, f"{reader.op_type} on codes")
            reader.replace_input_with(port, codes)
            reader.outputs[0].shape = None if codes is None else codes.shape
            for place, value in enumerate(numbers, start=1):
                reader.replace_input_with(place, value)
            reader.attributes.pop("axis", None)
        self.graph.remove(node, safe=True)

    def _float_bias(self, dequantise: ir.Node) -> None:
        codes, unit = self._array(dequantise, 0), self._array(dequantise, 1)
        if codes is None or unit is None:
            raise self._odd(dequantise, "an integer bias that is computed")
        value = dequantise.outputs[0]
        name = f"{value.name}_float"
        bias = constant(self.graph, name, (codes.astype(np.float64) * unit).astype(np.float32))
        for reader, port in list(value.uses()):
            reader.replace_input_with(port, bias)
        self.graph.remove(dequantise, safe=True)
        self.biases += 1

    def _drop_unused(self) -> None:
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and value not in self.graph.outputs:
                del self.graph.initializers[name]

    def _array(self, node: ir.Node, port: int) -> NDArray[Any] | None:
        value = node.inputs[port] if port < len(node.inputs) else None
        return None if value is None or value.const_value is None else value.const_value.numpy()

    def _odd(self, node: ir.Node, what: str) -> OnnxError:
        fix = "compile the network with symmetric activations (recipe: quantise: activations: symmetric)"
        name = f"{self.where}: {node.name or node.op_type}"
        return OnnxError(name, found=what, expected="a network that edgepose quantised for CPUs", fix=fix)


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    return None if value is None or value.const_value is None else value.const_value.dtype
