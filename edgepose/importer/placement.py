"""Where quantisers belong in a foreign float graph, which no module describes: as marks that `export.qdq` reads.

Invariant: only what convolutions and matrix products with constant weights read and make is quantised, and sums and
concatenations between them; whatever leads to an output behind the last of them stays float, decoding above all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from edgepose.compress.ranges import Range
from edgepose.errors import OnnxError, UsageError
from edgepose.export.marks import METADATA_KEY, Mark, Reader
from edgepose.export.notes import HEAVY, MODULES_KEY
from edgepose.strict_yaml import did_you_mean

_RECTIFIERS = ("Relu", "Clip")
_CARRIERS = frozenset({"Add", "Concat", "AveragePool", "GlobalAveragePool", "MaxPool", "Resize"})
"""Operators that runtimes execute in integers where what they read and what they make is quantised."""


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Where quantisers go.

    Attributes:
        model: The graph, simplified: constants are initialisers, batch normalisation is folded, everything has a name.
        activations: Names of values that are quantised.
        weights: Ranges of the weights.
        protected: Names of nodes that stay float.
    """

    model: ir.Model
    activations: tuple[str, ...]
    weights: tuple[Range, ...]
    protected: tuple[str, ...]


def placed(path: Path, protected: tuple[str, ...]) -> Placement:
    """Simplify a float graph and decide where its quantisers go; both are noted in the model's metadata.

    Args:
        path: A float ONNX file of opset 13 or newer.
        protected: Names of nodes that stay float besides the last layers.

    Raises:
        OnnxError: Nothing in it can be quantised.
        UsageError: A protected name that no layer has.
    """
    model = _simplified(ir.load(path))
    heavy = [node for node in model.graph if _weight_of(node) is not None]
    names = [node.name or "" for node in heavy]
    wished = [_dotted(name) for name in protected]
    for name in wished:
        if name not in names:
            fix = did_you_mean(name, names)
            raise UsageError(
                "recipe: quantise: protected", found=repr(name), expected="the name of a node with weights", fix=fix
            )
    kept = {*wished, *_last(model.graph, heavy)}
    quantised = [node for node in heavy if node.name not in kept]
    if not quantised:
        raise OnnxError(str(path), found="no layer that can be quantised", expected="one before the last layers")
    activations = _activations(model.graph, quantised)
    marks = [_activation_mark(name) for name in activations]
    weights: dict[str, tuple[Range, list[Reader]]] = {}
    for node in quantised:
        value = node.inputs[1]
        assert value is not None
        entry = _weight_range(node, value)
        weights.setdefault(value.name or "", (entry, []))[1].append(Reader(node.name or "", 1))
    marks += [Mark(entry.key, "weight", name, tuple(readers)) for name, (entry, readers) in weights.items()]
    model.metadata_props[METADATA_KEY] = msgspec.json.encode(marks).decode()
    model.metadata_props[MODULES_KEY] = msgspec.json.encode({name: name for name in names}).decode()
    ranges = tuple(entry for entry, _ in weights.values())
    return Placement(model, activations, ranges, tuple(sorted(name for name in kept if name)))


def activation_key(name: str) -> str:
    """The key of the range of a value."""
    return f"post_hooks.{name}"


def _activation_mark(name: str) -> Mark:
    return Mark(activation_key(name), "activation", name, ())


def _simplified(model: ir.Model) -> ir.Model:
    for simplify in (
        common.LiftConstantsToInitializersPass(lift_all_constants=False, size_limit=0),
        common.IdentityEliminationPass(),
        common.NameFixPass(),
    ):
        simplify(model)
    _rename(model.graph)
    for node in list(model.graph):
        if node.op_type == "BatchNormalization":
            _fold(model.graph, node)
    common.RemoveUnusedNodesPass()(model)
    return model


def _rename(graph: ir.Graph) -> None:
    """Names without slashes, which runtimes put between a node's name and words of their own."""
    fixed = {value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values())}
    values, nodes = set(fixed), set[str]()
    for number, node in enumerate(graph):
        node.name = _unique(_dotted(node.name or f"{node.op_type}_{number}"), nodes)
        for value in node.outputs:
            if value.name and value.name not in fixed:
                value.name = _unique(_dotted(value.name), values)


def _dotted(name: str) -> str:
    return name.strip("/").replace("/", ".")


def _unique(name: str, taken: set[str | None] | set[str]) -> str:
    candidates = (name if number == 0 else f"{name}.{number}" for number in count())
    chosen = next(candidate for candidate in candidates if candidate not in taken)
    taken.add(chosen)
    return chosen


def _fold(graph: ir.Graph, node: ir.Node) -> None:
    """Batch normalisation behind a convolution that nobody else reads becomes a part of its weights."""
    source = node.inputs[0]
    conv = None if source is None else source.producer()
    if conv is None or conv.op_type != "Conv" or _weight_of(conv) is None or len(source.uses()) != 1:  # type: ignore[union-attr]
        return
    numbers = [_constant(value) for value in node.inputs[1:5]]
    if any(number is None for number in numbers) or _is_output(graph, conv.outputs[0]):
        return
    gamma, beta, mean, variance = (np.asarray(number, np.float64) for number in numbers)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    factor = gamma / np.sqrt(variance + epsilon)
    weight, bias = _constant(conv.inputs[1]), _constant(conv.inputs[2]) if len(conv.inputs) > 2 else 0.0
    if weight is None or bias is None:
        return
    folded = [
        (f"{conv.name}_folded_weight", weight * factor.reshape(-1, *[1] * (weight.ndim - 1))),
        (f"{conv.name}_folded_bias", beta + (np.asarray(bias, np.float64) - mean) * factor),
    ]
    values = [_initialiser(graph, name, array.astype(np.float32)) for name, array in folded]
    made = ir.node("Conv", [conv.inputs[0], *values], attributes=dict(conv.attributes), name=conv.name)
    made.outputs[0].name = f"{conv.name}_folded"
    graph.insert_before(conv, made)
    result, name = node.outputs[0], node.outputs[0].name
    was_output = _is_output(graph, result)
    made.outputs[0].shape, made.outputs[0].type = result.shape, result.type
    ir.convenience.replace_all_uses_with(result, made.outputs[0], replace_graph_outputs=True)
    graph.remove([node, conv], safe=True)
    if was_output:
        made.outputs[0].name = name


def _initialiser(graph: ir.Graph, name: str, array: NDArray[np.float32]) -> ir.Value:
    value = ir.Value(
        name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=ir.tensor(array)
    )
    graph.register_initializer(value)
    return value


def _weight_of(node: ir.Node) -> NDArray[np.float32] | None:
    """The constant float32 weight of a convolution or matrix product."""
    if node.op_type not in HEAVY or len(node.inputs) < 2:
        return None
    weight = _constant(node.inputs[1])
    return weight if weight is not None and weight.dtype == np.float32 and weight.ndim > 1 else None


def _constant(value: ir.Value | None) -> NDArray[np.float32] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _weight_range(node: ir.Node, value: ir.Value) -> Range:
    """Symmetric, one scale per output channel; one for all where a weight has no one axis of them."""
    weight = _weight_of(node)
    assert weight is not None
    match node.op_type:
        case "Conv":
            axis: int | None = 0
        case "Gemm":
            transposed = "transB" in node.attributes and node.attributes["transB"].as_int() == 1
            axis = 0 if transposed else 1
        case "ConvTranspose":
            grouped = "group" in node.attributes and node.attributes["group"].as_int() > 1
            axis = None if grouped else 1
        case _:
            axis = 1 if weight.ndim == 2 else None
    others = tuple(place for place in range(weight.ndim) if place != axis)
    peaks = np.abs(weight).max(axis=others) if axis is not None else np.abs(weight).max(keepdims=True).reshape(1)
    scales = np.maximum(peaks.astype(np.float32) / np.float32(127), np.float32(1e-9))
    return Range(
        key=f"weight.{value.name}",
        kind="weight",
        scale=tuple(map(float, scales)),
        zero_point=(0,) * len(scales),
        low=-127,
        high=127,
        axis=axis,
    )


def _last(graph: ir.Graph, heavy: list[ir.Node]) -> set[str]:
    """Names of the layers behind which there is no other layer: what they say is the answer."""
    counted = set(heavy)
    ahead: dict[ir.Node, bool] = {}
    for node in reversed(list(graph)):
        users = {user for value in node.outputs for user, _ in value.uses()}
        ahead[node] = any(user in counted or ahead.get(user, False) for user in users)
    return {node.name or "" for node in heavy if not ahead[node]}


def _activations(graph: ir.Graph, quantised: list[ir.Node]) -> tuple[str, ...]:
    wanted: dict[ir.Value, None] = {}
    for node in quantised:
        for value in (node.inputs[0], _rectified(node.outputs[0])):
            if value is not None and _can_be_quantised(graph, value):
                wanted[value] = None
    queue = list(wanted)
    while queue:  # what carries codes to a quantised value reads codes, too
        for value in _carried(queue.pop()):
            if value not in wanted and _can_be_quantised(graph, value):
                wanted[value] = None
                queue.append(value)
    return tuple(value.name or "" for value in wanted)


def _rectified(value: ir.Value) -> ir.Value:
    """What a rectifier makes of a value that it alone reads; else the value itself."""
    uses = list(value.uses())
    if len(uses) == 1 and uses[0][0].op_type in _RECTIFIERS and uses[0][1] == 0:
        return uses[0][0].outputs[0]
    return value


def _carried(value: ir.Value) -> Iterator[ir.Value]:
    """What the operator behind a value reads, where that can carry codes."""
    producer = value.producer()
    if producer is not None and producer.op_type in _RECTIFIERS and producer.inputs[0] is not None:
        producer = producer.inputs[0].producer()
    if producer is None or producer.op_type not in _CARRIERS:
        return
    inputs = [v for v in producer.inputs if v is not None and v.const_value is None]
    if producer.op_type == "Add" and len(inputs) < 2:
        return  # a bias
    yield from inputs if producer.op_type in ("Add", "Concat") else inputs[:1]


def _can_be_quantised(graph: ir.Graph, value: ir.Value) -> bool:
    known = value.type is None or value.dtype in (None, ir.DataType.FLOAT)
    return known and value.const_value is None and not _is_output(graph, value)


def _is_output(graph: ir.Graph, value: ir.Value) -> bool:
    return any(output is value for output in graph.outputs)
