"""Ranges → Q/DQ nodes on the float ONNX graph, in the dialect that a backend runs fast.

Invariant: with 8-bit weights every dialect computes the same numbers; only their spelling differs. Weights are stored
as int8, biases as int32 with scale s_input·s_weight, and nothing of batch normalisation or of the calibrator is left.

A symmetric int8 activation (scale s, zero point 0) and a uint8 one (s, 128) are the same 256 numbers, so signed ranges
are written unsigned for ONNX Runtime, whose fast kernels take u8 activations and s8 weights. The reverse is possible
only for ranges with zero point 0: TensorRT takes nothing else, and silently misreads what is.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, assert_never

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgepose.compress.ranges import Range, Ranges, check_ranges
from edgepose.errors import OnnxError, UsageError
from edgepose.export.files import read_graph, write_graph
from edgepose.export.marks import METADATA_KEY, Mark, marks_of
from edgepose.export.notes import FLOATS_KEY, HEAVY, FloatNode, modules_of
from edgepose.export.qdq_spelling import constant, respell
from edgepose.spec import Backend

QuantisedDialect = Literal["u8s8", "s8s8"]

_MOVERS = frozenset({
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "MaxPool", "GlobalMaxPool", "Slice", "Gather", "Split",
    "Identity", "Expand", "DepthToSpace", "SpaceToDepth",
})  # fmt: skip
_WITH_BIAS = frozenset({"Conv", "Gemm"})


class QdqReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was written.

    Attributes:
        dialect: How quantisation is spelt.
        weight_bits: Bits of the weights; 7 is not lossless.
        activations: Quantised activation tensors.
        weights: Quantised weight tensors.
        float_nodes: Convolutions and matrix products left in float, by node name.
        widened: Output channels whose weights got a coarser scale so that their bias fits into 32 bits.
    """

    dialect: QuantisedDialect
    weight_bits: int
    activations: int
    weights: int
    float_nodes: tuple[str, ...]
    widened: int


def dialect_for(backend: Backend) -> QuantisedDialect:
    """The spelling that a backend runs fast and right.

    OpenVINO 2026.4 reads both at the same speed, but computes a concatenation of signed codes wrongly.
    """
    match backend:
        case "onnxruntime" | "openvino":
            return "u8s8"
        case "tensorrt" | "tensorrt-rtx":
            return "s8s8"
        case _:
            assert_never(backend)


def quantised_onnx(
    float_onnx: str | os.PathLike[str],
    ranges: Ranges,
    path: str | os.PathLike[str],
    *,
    dialect: QuantisedDialect,
    weight_bits: Literal[7, 8] = 8,
) -> QdqReport:
    """Writes a quantised copy of a float ONNX file.

    Args:
        float_onnx: What `onnx_from_torch(…, ranges=ranges)` wrote.
        ranges: What `convert` returned with the exported module.
        path: Where the quantised file goes.
        dialect: "u8s8" for ONNX Runtime and OpenVINO, "s8s8" for TensorRT.
        weight_bits: 7 requantises weights to -63..63 for x86 CPUs without VNNI, where u8·s8 sums of 8-bit weights
            saturate; this changes the numbers.

    Raises:
        OnnxError: Not such a file, ranges of another network, or unsigned ranges for "s8s8".
        UsageError: 7 bits for "s8s8", which no such hardware needs.
        StorageError: Disk full, read-only or no permission.
    """
    if weight_bits == 7 and dialect != "u8s8":
        raise UsageError("weight_bits", found=f"7 with dialect {dialect}", expected="8; only u8s8 sums saturate")
    check_ranges(ranges, where="ranges")
    where = str(float_onnx)
    model = read_graph(float_onnx)
    marks = marks_of(model, where=where)
    writer = _Writer(model, dialect, weight_bits)
    writer.place(marks, ranges, where=where)
    writer.spread()
    writer.write()
    report = writer.report()
    modules = modules_of(model.metadata_props)
    floats = [FloatNode(name, _is_inside(modules.get(name, ""), ranges.protected)) for name in report.float_nodes]
    model.metadata_props[FLOATS_KEY] = msgspec.json.encode(floats).decode()
    model.metadata_props.pop(METADATA_KEY, None)
    model.metadata_props["edgepose.dialect"] = dialect if weight_bits == 8 else f"{dialect}-{weight_bits}bit"
    write_graph(model, path, what="a valid quantised graph")
    return report


@dataclass(frozen=True, slots=True)
class _Weight:
    """A weight to store: its float values, channel axis and largest code."""

    name: str
    array: NDArray[np.float32]
    axis: int
    top: int


class _Writer:
    """One graph being quantised: ranges are placed, spread over operators that only move values, then written."""

    def __init__(self, model: ir.Model, dialect: QuantisedDialect, weight_bits: int) -> None:
        self.graph = model.graph
        self.dialect, self.weight_bits = dialect, weight_bits
        self.tensors: dict[ir.Value, Range] = {}  # activations quantised for all their readers
        self.edges: dict[tuple[ir.Node, int], Range] = {}  # activations quantised for one reader
        self.weights: dict[ir.Value, tuple[Range, tuple[tuple[ir.Node, int], ...]]] = {}
        self.widened = 0

    def place(self, marks: Iterable[Mark], ranges: Ranges, *, where: str) -> None:
        """Looks up what the marks name."""
        nodes = {node.name: node for node in self.graph}
        values = {value.name: value for value in self.graph.inputs}
        values.update(self.graph.initializers)
        values.update((value.name, value) for node in self.graph for value in node.outputs)
        by_key = ranges.by_key
        for mark in marks:
            entry, source = by_key.get(mark.key), values.get(mark.source)
            readers = tuple((nodes.get(reader.node), reader.index) for reader in mark.readers if reader.node)
            if entry is None or source is None or any(node is None for node, _ in readers):
                raise OnnxError(
                    f"{where}: mark {mark.key}", found="no range or no tensor for it",
                    expected="the ranges and the graph of one export", fix="export again with these ranges",
                )  # fmt: skip
            known = tuple((node, index) for node, index in readers if node is not None)
            if mark.kind == "weight":
                self.weights[source] = (entry, known)
            elif mark.key.startswith("post_hooks."):
                self.tensors[source] = self._spelt(entry)
            else:
                self.edges.update(dict.fromkeys(known, self._spelt(entry)))

    def spread(self) -> None:
        """Gives the outputs of operators that only move values the ranges of their inputs."""
        outputs = set(self.graph.outputs)
        for node in self.graph:
            inputs = [value for value in node.inputs if value is not None and not value.is_initializer()]
            entries = [self.edges.get((node, i)) or self.tensors.get(v) for i, v in enumerate(inputs)]
            first = entries[0] if entries else None
            if first is None or not _moves(node, len(inputs), first):
                continue
            if not all(entry is not None and entry.same_codes(first) for entry in entries):
                continue
            for value in node.outputs:
                if value not in self.tensors and value not in outputs:
                    self.tensors[value] = first

    def write(self) -> None:
        """Turns ranges into nodes and sorts the graph."""
        for value, (entry, readers) in self.weights.items():
            self._write_weight(value, entry, readers)
        for (node, index), entry in self.edges.items():
            source = node.inputs[index]
            assert source is not None
            node.replace_input_with(index, self._pair(source, entry, f"{source.name}_for_{node.name}"))
        for value, entry in self.tensors.items():
            self._write_tensor(value, entry)
        for value in self.weights:
            self._drop_if_unused(value)
        if self.dialect == "u8s8":
            respell(self.graph)
        self.graph.sort()

    def report(self) -> QdqReport:
        floats = [
            node.name or ""
            for node in self.graph
            if node.op_type in HEAVY and not all(_is_dequantised(node.inputs[i]) for i in (0, 1))
        ]
        return QdqReport(
            dialect=self.dialect,
            weight_bits=self.weight_bits,
            activations=len(self.tensors) + len(self.edges),
            weights=len(self.weights),
            float_nodes=tuple(floats),
            widened=self.widened,
        )

    def _spelt(self, entry: Range) -> Range:
        """An activation's range in the dialect's codes; the values stay the same."""
        if self.dialect == "s8s8":
            if not entry.symmetric:
                raise OnnxError(
                    f"dialect s8s8: {entry.key}",
                    found=f"codes {entry.low}..{entry.high} with zero point {entry.zero_point[0]}",
                    expected="signed codes with zero point 0", fix="prepare with symmetric=True",
                )  # fmt: skip
            return entry
        offset = 128 if entry.signed else 0
        return msgspec.structs.replace(
            entry, low=entry.low + offset, high=entry.high + offset, zero_point=(entry.zero_point[0] + offset,)
        )

    def _write_tensor(self, value: ir.Value, entry: Range) -> None:
        readers = [(node, index) for node, index in value.uses() if node.op_type != "QuantizeLinear"]
        name, is_output = value.name, any(output is value for output in self.graph.outputs)
        if is_output:
            value.name = f"{name}_float"
        dequantised = self._rectified_pair(value, entry, name or "") or self._pair(value, entry, name or "")
        for node, index in readers:
            node.replace_input_with(index, dequantised)
        if is_output:
            dequantised.name = name
            for index, output in enumerate(self.graph.outputs):
                if output is value:
                    self.graph.outputs[index] = dequantised

    def _rectified_pair(self, value: ir.Value, entry: Range, name: str) -> ir.Value | None:
        """Replaces Relu → Q and Clip → Q by Q → Clip on the codes, which gives the same codes.

        ONNX Runtime takes a rectifier into its integer kernels only where quantising clips as much anyway, so behind
        signed ranges it would fall back to float convolutions.
        """
        producer = value.producer()
        limits = None if producer is None else _limits_of(producer)
        if self.dialect != "u8s8" or producer is None or limits is None:
            return None
        scale, zero = float(np.float32(entry.scale[0])), entry.zero_point[0]
        low, high = (int(np.clip(np.round(limit / scale) + zero, entry.low, entry.high)) for limit in limits)
        source = producer.inputs[0]
        clips_anyway = (low, high) == (entry.low, entry.high)
        if clips_anyway or source is None or source in self.tensors or len(source.uses()) != 1:
            return None
        dequantised = self._pair(source, entry, name)
        dequantise = dequantised.producer()
        assert dequantise is not None
        bounds = [
            constant(self.graph, f"{name}_{end}", np.uint8(code)) for end, code in (("least", low), ("most", high))
        ]
        clip = ir.node("Clip", [dequantise.inputs[0], *bounds], name=f"{name}_rectify")
        clip.outputs[0].name = f"{name}_rectified_codes"
        self.graph.append(clip)
        dequantise.replace_input_with(0, clip.outputs[0])
        self.graph.remove(producer, safe=False)
        return dequantised

    def _pair(self, value: ir.Value, entry: Range, name: str) -> ir.Value:
        """Q → DQ behind a value; returns the dequantised value."""
        dtype = np.int8 if entry.signed else np.uint8
        scale = constant(self.graph, f"{name}_scale", np.float32(entry.scale[0]))
        zero = constant(self.graph, f"{name}_zero_point", np.asarray(entry.zero_point[0], dtype))
        quantise = ir.node("QuantizeLinear", [value, scale, zero], name=f"{name}_quantise")
        quantise.outputs[0].name = f"{name}_codes"
        dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], scale, zero], name=f"{name}_dequantise")
        result = dequantise.outputs[0]
        result.name, result.shape, result.type = f"{name}_dequantised", value.shape, ir.TensorType(ir.DataType.FLOAT)
        self.graph.extend([quantise, dequantise])
        return result

    def _write_weight(self, value: ir.Value, entry: Range, readers: tuple[tuple[ir.Node, int], ...]) -> None:
        """Stores int8 codes in place of a weight, through a transposition if there is one, and quantises the bias."""
        assert value.const_value is not None
        axis = entry.axis or 0
        array = value.const_value.numpy()
        scales = np.broadcast_to(entry.scales, (array.shape[axis],)).astype(np.float32)
        top = 2 ** (self.weight_bits - 1) - 1
        if top < entry.high:
            scales = scales * np.float32(entry.high / top)
        weight = _Weight(value.name or "", array, axis, top)
        for node, index in readers:
            consumers, permutation = [(node, index)], None
            if node.op_type == "Transpose":  # the exporter's spelling of a linear layer's weight
                permutation = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else [1, 0]
                consumers = list(node.outputs[0].uses())
            for consumer, port in consumers:
                fitted = self._fit_bias(consumer, scales)
                consumer.replace_input_with(port, self._stored(weight, fitted, permutation, consumer))
                self._write_bias(consumer, fitted)
            if permutation is not None:
                self.graph.remove(node, safe=True)

    def _stored(
        self, weight: _Weight, scales: NDArray[np.float32], permutation: list[int] | None, consumer: ir.Node
    ) -> ir.Value:
        """int8 codes → DQ."""
        shape, axis = [1] * weight.array.ndim, weight.axis
        shape[axis] = -1
        codes = np.clip(np.round(weight.array / scales.reshape(shape)), -weight.top, weight.top).astype(np.int8)
        if permutation is not None:
            codes, axis = np.ascontiguousarray(codes.transpose(permutation)), permutation.index(axis)
        # A weight that several layers share is stored once for each: their biases may ask for different scales.
        taken = f"{weight.name}_codes" in self.graph.initializers
        name = f"{weight.name}_for_{consumer.name}" if taken else weight.name
        return self._dequantised(name, codes, scales, axis)

    def _dequantised(self, name: str, codes: NDArray[Any], scales: NDArray[np.float32], axis: int) -> ir.Value:
        """DQ behind constant codes; their zero point is 0."""
        inputs = [
            constant(self.graph, f"{name}_codes", codes),
            constant(self.graph, f"{name}_scale", scales),
            constant(self.graph, f"{name}_zero_point", np.zeros(scales.shape, codes.dtype)),
        ]
        node = ir.node("DequantizeLinear", inputs, attributes={"axis": axis}, name=f"{name}_dequantise")
        result = node.outputs[0]
        result.name, result.shape = f"{name}_dequantised", ir.Shape(codes.shape)
        result.type = ir.TensorType(ir.DataType.FLOAT)
        self.graph.append(node)
        return result

    def _fit_bias(self, node: ir.Node, scales: NDArray[np.float32]) -> NDArray[np.float32]:
        """Coarser scales for channels with next to no weights, whose bias would not fit into 32 bits otherwise."""
        bias, step = self._bias_of(node), self._input_step(node)
        if bias is None or step is None:
            return scales
        needed = (np.abs(bias.astype(np.float64)) / (2**30 * float(step))).astype(np.float32)
        self.widened += int(np.count_nonzero(needed > scales))
        return np.maximum(scales, needed)

    def _write_bias(self, node: ir.Node, scales: NDArray[np.float32]) -> None:
        """int32 codes with the scale of the accumulator; float for TensorRT, which adds biases in float."""
        bias, step = self._bias_of(node), self._input_step(node)
        if bias is None or step is None or self.dialect == "s8s8":
            return
        value = node.inputs[2]
        assert value is not None
        # The engine multiplies the same two float32 numbers, so this product must be rounded to float32 first.
        unit = (scales * step).astype(np.float32)
        codes = np.round(bias.astype(np.float64) / unit).astype(np.int32)
        node.replace_input_with(2, self._dequantised(f"{node.name}_bias", codes, unit, 0))
        self._drop_if_unused(value)

    def _drop_if_unused(self, value: ir.Value) -> None:
        if not value.uses() and value.name is not None and value.name in self.graph.initializers:
            del self.graph.initializers[value.name]

    def _bias_of(self, node: ir.Node) -> NDArray[np.float32] | None:
        if node.op_type not in _WITH_BIAS or len(node.inputs) < 3 or node.inputs[2] is None:
            return None
        constant = node.inputs[2].const_value
        return None if constant is None else constant.numpy()

    def _input_step(self, node: ir.Node) -> np.float32 | None:
        """Scale of the codes that a node's first input is quantised to."""
        value = node.inputs[0]
        entry = self.edges.get((node, 0)) or (self.tensors.get(value) if value is not None else None)
        return None if entry is None else np.float32(entry.scale[0])


def _moves(node: ir.Node, inputs: int, entry: Range) -> bool:
    """Whether a node's outputs have the codes of its inputs."""
    if node.op_type in _MOVERS:
        return True
    if node.op_type == "Concat":
        return inputs > 0
    if node.op_type == "Resize":
        mode = node.attributes.get("mode")
        return mode is None or mode.as_string() == "nearest"
    return node.op_type == "Relu" and entry.zero_point[0] == entry.low


def _is_inside(module: str, parts: Iterable[str]) -> bool:
    return any(f"{module}.".startswith(f"{part}.") for part in parts)


def _limits_of(node: ir.Node) -> tuple[float, float] | None:
    """What a rectifier clips its input to; None for other operators, and where the limits are computed."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    if node.op_type != "Clip":
        return None
    limits = [float("-inf"), float("inf")]
    for index, bound in enumerate(node.inputs[1:3]):
        if bound is not None:
            if bound.const_value is None:
                return None
            limits[index] = float(bound.const_value.numpy())
    return limits[0], limits[1]


def _is_dequantised(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
