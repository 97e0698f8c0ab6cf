"""The image input of a foreign graph, and adding operators before it and behind its outputs.

Invariant: operators are added and outputs that nobody reads are dropped; what lies between is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto

from edgepose.errors import OnnxError, SpecError
from edgepose.importer.onnx_file import dims_of, node_reads, real_inputs
from edgepose.importer.spec import InputImage
from edgepose.strict_yaml import did_you_mean

Arrays = Mapping[str, NDArray[Any]]

_INPUT_TYPES: dict[int, type] = {
    TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16, TensorProto.DOUBLE: np.float64,
    TensorProto.UINT8: np.uint8, TensorProto.INT8: np.int8, TensorProto.INT32: np.int32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Input:
    """The image input of a foreign network.

    Attributes:
        name: Its name.
        layout: "nchw" or "nhwc".
        dtype: NumPy's type of what it takes.
        hw: Height and width in pixels.
        batch: Size of its first axis; 0 where it is free.
    """

    name: str
    layout: str
    dtype: type
    hw: tuple[int, int]
    batch: int

    def fed(self, images: NDArray[np.float32]) -> NDArray[Any]:
        """Normalised images (N, 3, h, w) float32 as the network takes them."""
        arranged = images if self.layout == "nchw" else images.transpose(0, 2, 3, 1)
        return np.ascontiguousarray(arranged.astype(self.dtype))


def input_of(model: ModelProto, said: InputImage, where: str) -> Input:
    """The image input, as the file and the specification say together.

    Raises:
        OnnxError: The network has several inputs, or one that is no image.
        SpecError: They contradict each other, or neither says the size.
    """
    values = {value.name: value for value in real_inputs(model.graph)}
    if said.name and said.name not in values:
        fix = did_you_mean(said.name, values)
        raise SpecError("spec: input.name", found=repr(said.name), expected=f"one of {', '.join(values)}", fix=fix)
    if len(values) != 1:
        fix = "export the network with its image as the only input, everything else a constant"
        raise OnnxError(f"{where}: inputs", found=", ".join(values) or "none", expected="one image", fix=fix)
    (value,) = values.values()
    dims = dims_of(value)
    if dims is None or len(dims) != 4 or any(size == 0 for size in dims):
        found = f"dimensions {list(dims or ())}"
        raise OnnxError(f"{where}: input {value.name!r}", found=found, expected="an image: batch and three more axes")
    channels, height, width = (1, 2, 3) if said.layout == "nchw" else (3, 1, 2)
    if dims[channels] not in (3, *(size for size in dims if isinstance(size, str))):
        other = "nhwc" if said.layout == "nchw" else "nchw"
        fix = f"say layout: {other}" if dims[1 if other == "nchw" else 3] == 3 else "colour images only"
        found = f"{dims[channels]} channels in dimensions {list(dims)} read as {said.layout}"
        raise SpecError("spec: input.layout", found=found, expected="3", fix=fix)
    elem_type: int = value.type.tensor_type.elem_type
    dtype = _INPUT_TYPES.get(elem_type)
    if dtype is None:
        found = TensorProto.DataType.Name(elem_type)
        raise OnnxError(f"{where}: input {value.name!r}", found=f"type {found}", expected="floats or 8-bit integers")
    raw = said.pixels == "0..255" and not any(said.mean) and set(said.std) == {1.0}
    if np.dtype(dtype).kind in "iu" and not raw:
        found = f"mean and std, or pixels 0..1, for an input of {np.dtype(dtype).name}"
        raise SpecError("spec: input", found=found, expected="pixels: 0..255 and neither mean nor std")
    hw = _size((dims[height], dims[width]), said, where)
    return Input(value.name, said.layout, dtype, hw, dims[0] if isinstance(dims[0], int) else 0)


def _size(dims: tuple[int | str, int | str], said: InputImage, where: str) -> tuple[int, int]:
    sizes = []
    for axis, (size, asked) in enumerate(zip(dims, said.size or (None, None), strict=True)):
        name = ("height", "width")[axis]
        if isinstance(size, int) and asked not in (None, size):
            found = f"{name} {asked}"
            raise SpecError("spec: input.size", found=found, expected=f"{size}, as the file says", fix="correct it")
        if isinstance(size, str) and asked is None:
            fix = "add to the specification's input: size: [height, width]"
            raise SpecError(f"{where}: input", found=f"a {name} left open", expected="a size", fix=fix)
        sizes.append(size if isinstance(size, int) else int(asked or 0))
    if max(sizes) > 8192:
        raise SpecError("spec: input.size", found=f"{sizes}", expected="at most 8192 pixels a side")
    return sizes[0], sizes[1]


def sized(model: ModelProto, source: Input, batch: int) -> ModelProto:
    """A copy whose input has its size, and the batch size given (0: free), written in."""
    copy: ModelProto = ModelProto.FromString(model.SerializeToString())
    (value,) = real_inputs(copy.graph)
    height, width = source.hw
    sizes = (3, height, width) if source.layout == "nchw" else (height, width, 3)
    _write_shape(value, (batch or "batch", *sizes))
    return copy


class Surgeon:
    """A graph that operators are added to; every value behind the batch axis has a known rank."""

    def __init__(self, model: ModelProto, answers: Arrays) -> None:
        self.model, self.answers = model, answers
        self._before: list[onnx.NodeProto] = []
        graph = model.graph
        self._names = {name for node in graph.node for name in (*node.input, *node.output)}
        self._names |= {value.name for value in (*graph.input, *graph.output, *graph.initializer)}

    def take_images(self, source: Input) -> None:
        """The input becomes (batch, 3, h, w) float32."""
        if source.layout == "nchw" and source.dtype is np.float32:
            return
        (value,) = real_inputs(self.model.graph)
        batch = dims_of(value) or (0,)
        images = self._fresh("images")
        current, type_ = images, onnx.helper.np_dtype_to_tensor_dtype(np.dtype(source.dtype))
        if source.dtype is not np.float32:
            cast = source.name if source.layout == "nchw" else self._fresh("images_cast")
            self._before.append(onnx.helper.make_node("Cast", [current], [cast], name=cast, to=type_))
            current = cast
        if source.layout == "nhwc":
            turn = onnx.helper.make_node("Transpose", [current], [source.name], name=source.name, perm=[0, 2, 3, 1])
            self._before.append(turn)
        value.name, value.type.tensor_type.elem_type = images, TensorProto.FLOAT
        _write_shape(value, (batch[0] or "batch", 3, *source.hw))

    def answer(self, name: str, key: str) -> NDArray[Any]:
        """What the network says in the output called `name`."""
        if name not in self.answers:
            fix = did_you_mean(name, self.answers)
            raise SpecError(f"spec: {key}", found=repr(name), expected=f"one of {', '.join(self.answers)}", fix=fix)
        return self.answers[name]

    def only(self, name: str, key: str) -> str:
        """The output called `name`, or the only one."""
        if not name and len(self.answers) != 1:
            found = f"no name, and outputs {', '.join(self.answers)}"
            raise SpecError(f"spec: {key}", found=found, expected="the name of one of them")
        chosen = name or next(iter(self.answers))
        self.answer(chosen, key)
        return chosen

    def floats(self, name: str) -> str:
        """An output as float32."""
        if self.answers[name].dtype == np.float32:
            return name
        return self.add("Cast", [name], "float", to=TensorProto.FLOAT)

    def add(self, operator: str, inputs: Sequence[str | NDArray[Any]], hint: str, **attributes: Any) -> str:
        """One operator behind what is there; arrays become constants."""
        names = []
        for value in inputs:
            if isinstance(value, str):
                names.append(value)
                continue
            name = self._fresh(f"{hint}_constant")
            self.model.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
            names.append(name)
        result = self._fresh(hint)
        self.model.graph.node.append(onnx.helper.make_node(operator, names, [result], name=result, **attributes))
        return result

    def part(self, value: str, axis: int, start: int, stop: int) -> str:
        """Entries start..stop of one axis."""
        bounds = [np.array([number], np.int64) for number in (start, stop, axis)]
        return self.add("Slice", [value, *bounds], "part")

    def shaped(self, value: str, shape: Sequence[int]) -> str:
        """0 keeps an axis, -1 takes what is left."""
        return self.add("Reshape", [value, np.array(shape, np.int64)], "shaped")

    def scaled(self, value: str, factor: NDArray[Any] | float, shift: NDArray[Any] | float) -> str:
        """factor · value + shift, left out where it changes nothing."""
        by, plus = (np.asarray(number, np.float32) for number in (factor, shift))
        if (by != 1).any():
            value = self.add("Mul", [value, by], "scaled")
        return self.add("Add", [value, plus], "shifted") if plus.any() else value

    def named(self, value: str, name: str) -> str:
        """The value under a name for people; left as it is where it is an output of the network's own."""
        return value if value in self.answers else self.add("Identity", [value], name)

    def finished(self, outputs: Sequence[str]) -> ModelProto:
        """The model with these outputs and without what only others needed."""
        graph = self.model.graph
        nodes = [*self._before, *graph.node]
        needed, kept = set(outputs), []
        for node in reversed(nodes):
            if needed & set(node.output):
                kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
                needed |= node_reads(node)
        del graph.node[:]
        graph.node.extend(reversed(kept))
        held = [tensor for tensor in graph.initializer if tensor.name in needed]
        copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in held]
        del graph.initializer[:]
        graph.initializer.extend(copies)
        del graph.output[:]
        graph.output.extend(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
        return self.model

    def _fresh(self, hint: str) -> str:
        name = hint
        for number in count(1):
            if name not in self._names:
                break
            name = f"{hint}_{number}"
        self._names.add(name)
        return name


def _write_shape(value: onnx.ValueInfoProto, shape: Sequence[int | str]) -> None:
    kind = value.type.tensor_type.elem_type
    value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, kind, list(shape)))
