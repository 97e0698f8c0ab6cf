"""Reading what an ONNX file says of itself, sizes and shapes but no weights, straight from its protobuf encoding.

Devices that run bundles have no onnx package, and the gate compares networks there as well. Field numbers are those of
onnx.proto; the encoding is https://protobuf.dev/programming-guides/encoding.

Invariant: weights are stepped over, never copied; whatever is no ONNX is an `OnnxError`, never another exception.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from edgepose.errors import OnnxError

Shape = tuple[int | str, ...]
"""Sizes; a name or "" stands for a size that is free or not said."""

# Of TensorProto.DataType; types that no network computes in are left out.
TYPES = {
    1: "fp32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "fp16",
    11: "fp64", 12: "uint32", 13: "uint64", 16: "bf16", 17: "fp8", 18: "fp8", 19: "fp8", 20: "fp8", 21: "uint4",
    22: "int4", 23: "fp4",
}  # fmt: skip

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEPTH = 16  # graphs inside attributes of graphs; more is an attack


@dataclass(frozen=True, slots=True)
class Tensor:
    """Shape and type ("fp32", "int8", …; "" for none that is known) of a constant or a value."""

    shape: Shape
    type: str


@dataclass(frozen=True, slots=True)
class Node:
    """One node: operator, and the names of what it reads and writes."""

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(slots=True)
class OnnxGraph:
    """A network, branches and loop bodies included, in the order of the file.

    Attributes:
        nodes: All nodes but constants.
        constants: Initialisers and constant nodes by name.
        values: What the file says of other values by name; may be empty.
        inputs: Names of the network's inputs that are no constants.
    """

    nodes: list[Node] = field(default_factory=list)
    constants: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)


def read_onnx(path: str | os.PathLike[str]) -> OnnxGraph:
    """Reads the graph of an ONNX file; weights that lie in other files are not needed.

    Raises:
        OnnxError: It is no ONNX file, or cut short.
    """
    where = os.fspath(path)
    try:
        view = memoryview(Path(path).read_bytes())
    except OSError as err:
        raise OnnxError(where, found=err.strerror or str(err), expected="a readable file") from err
    found = OnnxGraph()
    try:
        graphs = [value for number, value in _fields(view) if number == 7 and isinstance(value, memoryview)]
        for graph in graphs:
            _graph(graph, found, top=True)
    except (_NotProtobufError, UnicodeDecodeError) as err:
        raise OnnxError(where, found=f"bytes that are no ONNX ({err})", expected="an ONNX network") from err
    if not graphs:
        raise OnnxError(where, found="no graph in it", expected="an ONNX network")
    found.inputs = [name for name in found.inputs if name not in found.constants]
    return found


class _NotProtobufError(ValueError):
    pass


def _fields(view: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, value) of one message; nested messages, strings and packed lists are their bytes."""
    position, end = 0, len(view)
    while position < end:
        key, position = _varint(view, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(view, position)
            yield number, value
            continue
        if wire == _BYTES:
            size, position = _varint(view, position)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise _NotProtobufError(f"wire type {wire} at byte {position}")
        if number == 0 or position + size > end:
            raise _NotProtobufError(f"field {number} of {size} bytes at byte {position} of {end}")
        yield number, view[position : position + size]
        position += size


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise _NotProtobufError("cut short")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _NotProtobufError(f"a number without an end at byte {position}")


def _graph(view: memoryview, found: OnnxGraph, *, top: bool = False, depth: int = 0) -> None:
    if depth > _DEPTH:
        raise _NotProtobufError(f"graphs nested deeper than {_DEPTH}")
    for number, value in _fields(view):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            _node(value, found, depth)
        elif number == 5:
            name, tensor = _tensor(value)
            found.constants[name] = tensor
        elif number in (11, 12, 13):
            name, tensor = _value(value)
            found.values[name] = tensor
            if number == 11 and top:
                found.inputs.append(name)


def _node(view: memoryview, found: OnnxGraph, depth: int) -> None:
    inputs, outputs, operator = [], [], ""
    attributes = []
    for number, value in _fields(view):
        if not isinstance(value, memoryview):
            continue
        if number == 1:
            inputs.append(_text(value))
        elif number == 2:
            outputs.append(_text(value))
        elif number == 4:
            operator = _text(value)
        elif number == 5:
            attributes.append(value)
    constant = None
    for attribute in attributes:
        for number, value in _fields(attribute):
            if number == 5 and isinstance(value, memoryview):
                constant = _tensor(value)[1]
            elif number in (6, 11) and isinstance(value, memoryview):
                _graph(value, found, depth=depth + 1)
    if operator == "Constant" and outputs:
        found.constants[outputs[0]] = constant or Tensor((), "")
        return
    found.nodes.append(Node(operator, tuple(inputs), tuple(outputs)))


def _tensor(view: memoryview) -> tuple[str, Tensor]:
    name, kind = "", ""
    sizes: list[int | str] = []
    for number, value in _fields(view):
        if number == 1:
            sizes += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            kind = TYPES.get(value, "")
        elif number == 8 and isinstance(value, memoryview):
            name = _text(value)
    return name, Tensor(tuple(sizes), kind)


def _packed(view: memoryview) -> list[int]:
    numbers, position = [], 0
    while position < len(view):
        number, position = _varint(view, position)
        numbers.append(number)
    return numbers


def _value(view: memoryview) -> tuple[str, Tensor]:
    name, tensor = "", Tensor((), "")
    for number, value in _fields(view):
        if number == 1 and isinstance(value, memoryview):
            name = _text(value)
        elif number == 2 and isinstance(value, memoryview):
            for kind, inner in _fields(value):
                if kind == 1 and isinstance(inner, memoryview):
                    tensor = _tensor_type(inner)
    return name, tensor


def _tensor_type(view: memoryview) -> Tensor:
    kind, sizes = "", []
    for number, value in _fields(view):
        if number == 1 and isinstance(value, int):
            kind = TYPES.get(value, "")
        elif number == 2 and isinstance(value, memoryview):
            sizes += [_size(inner) for number, inner in _fields(value) if number == 1 and isinstance(inner, memoryview)]
    return Tensor(tuple(sizes), kind)


def _size(view: memoryview) -> int | str:
    size: int | str = ""
    for number, value in _fields(view):
        if number == 1 and isinstance(value, int):
            size = value if value < 1 << 63 else ""  # negative: some exporters' way of saying that it is free
        elif number == 2 and isinstance(value, memoryview):
            size = _text(value)
    return size


def _text(view: memoryview) -> str:
    return str(view, "utf-8")
