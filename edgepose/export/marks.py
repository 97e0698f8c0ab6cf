"""Where the quantisers of a torch network stand in its ONNX graph.

Invariant: marks come out of the same trace that makes the graph, so no name is ever guessed; they leave no operator
behind, only a note in the model's metadata.

For the export, an operator of our own stands wherever NNCF would quantise. The exporter carries it into the ONNX graph,
where it is taken out again, and what it stood between is written down.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import onnx_ir as ir
import torch
from torch import Tensor, nn

from edgepose.compress.hooks import add_hook, hooked_copy
from edgepose.compress.ranges import Ranges
from edgepose.errors import OnnxError

METADATA_KEY = "edgepose.marks"
_DOMAIN = "edgepose"
_OPERATOR = "Mark"


class Reader(msgspec.Struct, frozen=True, array_like=True):
    """One input of one node, or (node "") one output of the graph."""

    node: str
    index: int


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A quantiser's place in an ONNX graph.

    Attributes:
        key: The `Range.key` that belongs here.
        kind: Whether a weight or an activation is quantised.
        source: Name of the value to quantise.
        readers: Who reads the quantised value; others read the value as it is.
    """

    key: str
    kind: Literal["activation", "weight"]
    source: str
    readers: tuple[Reader, ...]


class _TracedMark(torch.autograd.Function):
    """The mark as TorchScript's exporter writes it."""

    @staticmethod
    def forward(_context: Any, value: Tensor, _key: str) -> Tensor:
        return value.clone()

    @staticmethod
    def symbolic(graph: Any, value: Any, key: str) -> Any:
        return graph.op(f"{_DOMAIN}::{_OPERATOR}", value, key_s=key).setType(value.type())


class _Marking(nn.Module):
    """Stands in for a quantiser during export."""

    def __init__(self, key: str) -> None:
        super().__init__()
        self.key = key

    def forward(self, value: Tensor) -> Tensor:
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            traced: Tensor = _TracedMark.apply(value, self.key)  # type: ignore[no-untyped-call]
            return traced
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{_DOMAIN}::{_OPERATOR}", (value,), {"key": self.key}, dtype=value.dtype, shape=value.shape, version=1
        )
        return marked


def marked_copy(model: nn.Module, ranges: Ranges) -> nn.Module:
    """A copy of `model` whose exported graph has a mark for every entry of `ranges`."""
    copied = hooked_copy(model)
    for entry in ranges.ranges:
        add_hook(copied, entry.key, _Marking(entry.key))
    return copied


def take_marks(model: ir.Model, ranges: Ranges) -> tuple[Mark, ...]:
    """Removes all marks from the graph and notes them in its metadata.

    Raises:
        OnnxError: A range without a mark: its place does not exist in this network.
    """
    kinds = {entry.key: entry.kind for entry in ranges.ranges}
    nodes = [node for node in model.graph if node.domain == _DOMAIN and node.op_type == _OPERATOR]
    marks = []
    for node in nodes:
        key, marked = node.attributes["key"].as_string(), node.outputs[0]
        readers = [Reader(user.name or "", index) for user, index in _real_uses(marked)]
        readers += [Reader("", index) for index, output in enumerate(model.graph.outputs) if output is marked]
        marks.append((key, _real_source(node), tuple(readers)))
    for node in nodes:
        _bypass(model.graph, node)
    _check_complete(kinds, [key for key, _, _ in marks])
    model.opset_imports.pop(_DOMAIN, None)
    noted = tuple(Mark(key, kinds[key], source.name or "", readers) for key, source, readers in marks)
    model.metadata_props[METADATA_KEY] = msgspec.json.encode(noted).decode()
    return noted


def marks_of(model: ir.Model, *, where: str) -> tuple[Mark, ...]:
    """The marks noted in a model's metadata.

    Raises:
        OnnxError: There are none.
    """
    text = model.metadata_props.get(METADATA_KEY)
    if text is None:
        raise OnnxError(
            where, found="an ONNX file without marks", expected="one exported together with its ranges",
            fix="export again with onnx_from_torch(…, ranges=ranges)",
        )  # fmt: skip
    try:
        return msgspec.json.decode(text, type=tuple[Mark, ...])
    except msgspec.DecodeError as err:
        raise OnnxError(f"{where}: metadata {METADATA_KEY}", found=str(err), expected="marks") from err


def _real_uses(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Who reads a value through no other mark; where two quantisers follow each other, the last one counts."""
    return [(user, index) for user, index in value.uses() if user.op_type != _OPERATOR or user.domain != _DOMAIN]


def _real_source(node: ir.Node) -> ir.Value:
    source = node.inputs[0]
    assert source is not None
    producer = source.producer()
    if producer is not None and producer.op_type == _OPERATOR and producer.domain == _DOMAIN:
        return _real_source(producer)
    return source


def _bypass(graph: ir.Graph, node: ir.Node) -> None:
    """Takes a one-to-one node out; a graph output keeps its name."""
    source, result = node.inputs[0], node.outputs[0]
    assert source is not None
    is_output = any(output is result for output in graph.outputs)
    name, shape = result.name, result.shape
    ir.convenience.replace_all_uses_with(result, source, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    if is_output and source.producer() is not None:
        source.name, source.shape = name, shape or source.shape


def _check_complete(kinds: dict[str, Literal["activation", "weight"]], found: list[str]) -> None:
    missing = sorted(set(kinds) - set(found))
    if missing:
        raise OnnxError(
            "ranges and network",
            found=f"{len(missing)} quantisers whose place does not exist, the first {missing[0]}",
            expected="the network that the ranges were learned with",
            fix="export the module that convert() returned",
        )
