"""In which precision a TensorRT engine multiplies: its kernels, as the engine inspector or the builder's log lists it.

Invariant: what an engine does is the builder's word, layer by layer; what was asked for is the ONNX file's. A layer
that no kernel names counts as not known, never as what was asked for.

Both sources name the ONNX nodes that went into a kernel ("[ONNX Layer: conv1]") and the types of its inputs. Every
optimisation profile has kernels of its own; of those for one layer the most exact type counts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import onnx

from edgepose.errors import EnvironmentFault
from edgepose.export.int8_share import Int8Share, Kernel
from edgepose.export.notes import HEAVY
from edgepose.export.trt_memory import inferred
from edgepose.spec import Backend

_TYPES = {
    "int8": "int8", "fp8": "fp8", "half": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16",
    "float": "fp32", "fp32": "fp32",
}  # fmt: skip
_WIDTH = ("int8", "fp8", "bf16", "fp16", "fp32", "unknown")
"""From the coarsest to the most exact; what is not known comes last."""
_MOVES = frozenset({"kgen", "Reformat", "NoOp", "Constant", "Scale", "Shuffle", "shape_call", "Shape", "Quantize"})
"""Kinds of kernels that multiply no weights, although they may name a product as one of their origins."""


class LayerPrecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A convolution or matrix product of the network.

    Attributes:
        node: Its name in the ONNX file.
        asked: What the file says: int8, fp16, bf16 or fp32.
        achieved: What the engine does; "unknown" where no kernel names it.
        kernel: The engine's kind of kernel.
        macs: Multiplications for one image.
    """

    node: str
    asked: str
    achieved: str
    kernel: str
    macs: int


class EnginePrecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was asked for and what the engine made of it.

    Attributes:
        asked: Precision → share of the multiplications, 0..1.
        achieved: The same of the engine.
        kernels: Kernels of the engine, over all profiles.
        otherwise: Layers that run in another precision than asked for, the largest first.
        source: Who said so: "inspector" or "log".
    """

    asked: dict[str, float]
    achieved: dict[str, float]
    kernels: int
    otherwise: tuple[LayerPrecision, ...]
    source: str


class EngineKernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One kernel of an engine.

    Attributes:
        name: The engine's name for it.
        kind: Its kind ("correlation", "CaskConvolution").
        origins: The ONNX nodes that it computes.
        inputs: Precisions of its inputs, in order.
    """

    name: str
    kind: str
    origins: tuple[str, ...]
    inputs: tuple[str, ...]


def kernels_in_log(lines: Iterable[str]) -> tuple[EngineKernel, ...]:
    """The kernels that a builder lists in its log at the detailed verbosity, TensorRT-RTX's above all."""
    found = []
    for line in (part for message in lines for part in message.split("\n")):  # splitlines splits at \x1e
        head = re.match(r"\s*Name: (.*?), LayerType: (\w+), Inputs: (.*?\]), ", line)
        if head is None:
            continue
        inputs = line.partition("Inputs: ")[2].partition("Outputs: ")[0]
        types = tuple(_precision(name) for name in re.findall(r"Datatype: (\w+)", inputs))
        found.append(EngineKernel(head[1], head[2], _origins(line.partition("Metadata: ")[2]), types))
    return tuple(found)


def kernels_in_inspection(text: str) -> tuple[EngineKernel, ...]:
    """The kernels in the engine inspector's JSON.

    Raises:
        EnvironmentFault: Not such JSON, or an engine that was built without names.
    """
    try:
        layers = msgspec.json.decode(text.encode(), type=dict[str, Any])["Layers"]
        named = [layer for layer in layers if isinstance(layer, dict)]
    except (msgspec.DecodeError, KeyError, TypeError) as err:
        raise EnvironmentFault("engine inspector", found=str(err), expected="JSON with layers") from err
    if layers and not named:
        raise EnvironmentFault("engine inspector", found="names only", expected="layers in detail")
    return tuple(
        EngineKernel(
            str(layer.get("Name", "")),
            str(layer.get("LayerType", "")),
            _origins(str(layer.get("Metadata", ""))) or _names(str(layer.get("Name", ""))),
            tuple(_type_of(value) for value in (*layer.get("Inputs", ()), *layer.get("Constants", ()))),
        )
        for layer in named
    )


def engine_layers(path: str | os.PathLike[str], kernels: Sequence[EngineKernel]) -> tuple[LayerPrecision, ...]:
    """Every convolution and matrix product of an ONNX file, and how an engine computes it.

    Args:
        path: The file that the engine was built from.
        kernels: The engine's.

    Raises:
        OnnxError: Not a readable ONNX file.
    """
    graph = inferred(path).graph
    by_origin: dict[str, list[EngineKernel]] = {}
    for kernel in kernels:
        for origin in kernel.origins:
            by_origin.setdefault(origin, []).append(kernel)
    types, shapes = _values_of(graph)
    made = {name: node for node in graph.node for name in node.output}
    layers = []
    for node in graph.node:
        if node.op_type not in HEAVY:
            continue
        candidates = by_origin.get(node.name, [])
        multiplying = [kernel for kernel in candidates if kernel.kind not in _MOVES] or candidates
        precisions = [kernel.inputs[0] if kernel.inputs else "unknown" for kernel in multiplying] or ["unknown"]
        layers.append(
            LayerPrecision(
                node=node.name,
                asked=_asked(node, made, types),
                achieved=max(precisions, key=_WIDTH.index),
                kernel=", ".join(sorted({kernel.kind for kernel in multiplying})),
                macs=_macs(node, shapes),
            )
        )
    return tuple(layers)


def precision_report(layers: Sequence[LayerPrecision], kernels: int, source: str) -> EnginePrecision:
    """Shares of what was asked for and achieved, and the layers between them."""
    otherwise = sorted((layer for layer in layers if layer.asked != layer.achieved), key=lambda layer: -layer.macs)
    return EnginePrecision(
        asked=_shares((layer.asked, layer.macs) for layer in layers),
        achieved=_shares((layer.achieved, layer.macs) for layer in layers),
        kernels=kernels,
        otherwise=tuple(otherwise),
        source=source,
    )


def int8_share_of(layers: Sequence[LayerPrecision], backend: Backend) -> Int8Share:
    """The layers as `int8_reasons.achieved` takes them."""
    kernels = tuple(
        Kernel(layer.node, layer.kernel or "not found in the engine", layer.achieved == "int8", layer.macs)
        for layer in layers
    )
    return Int8Share(backend=backend, kernels=kernels)


def _origins(metadata: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\[ONNX Layer: ([^\]]*)\]", metadata))


def _names(name: str) -> tuple[str, ...]:
    """The nodes that a fused layer's own name lists ("conv1 + relu1")."""
    return tuple(part.strip() for part in name.split(" + "))


def _type_of(value: Any) -> str:
    """Precision of one tensor of the inspector's JSON: newer versions have "Datatype", older ones say it in words."""
    if not isinstance(value, Mapping):
        return "unknown"
    words = str(value.get("Datatype") or value.get("Format/Datatype") or value.get("Format") or "")
    return next((found for word in re.findall(r"\w+", words) if (found := _precision(word)) != "unknown"), "unknown")


def _precision(name: str) -> str:
    return _TYPES.get(name.lower(), "unknown")


def _values_of(graph: onnx.GraphProto) -> tuple[dict[str, int], dict[str, tuple[int, ...]]]:
    """Element type and shape of every value, for one image."""
    types, shapes = {}, {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
        shapes[value.name] = tuple(max(size.dim_value, 1) for size in value.type.tensor_type.shape.dim)
    for tensor in graph.initializer:
        types[tensor.name], shapes[tensor.name] = tensor.data_type, tuple(tensor.dims)
    return types, shapes


def _asked(node: onnx.NodeProto, made: Mapping[str, onnx.NodeProto], types: Mapping[str, int]) -> str:
    sources = [made.get(name) for name in node.input[:2]]
    if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
        return "int8"
    kind = types.get(node.input[0], 0)
    if kind == onnx.TensorProto.FLOAT16:
        return "fp16"
    return "bf16" if kind == onnx.TensorProto.BFLOAT16 else "fp32"


def _macs(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Multiplications of a node for one image; 0 where a shape is not known."""
    first, weight, output = (shapes.get(name, ()) for name in (node.input[0], node.input[1], node.output[0]))
    match node.op_type:
        case "Conv":
            return int(np.prod(output)) * int(np.prod(weight[1:])) if output and weight else 0
        case "ConvTranspose":
            return int(np.prod(first)) * int(np.prod(weight[1:])) if first and weight else 0
        case "Gemm":
            transposed = next((a.i for a in node.attribute if a.name == "transA"), 0)
            return int(np.prod(output)) * first[0 if transposed else 1] if output and len(first) == 2 else 0
        case _:
            return int(np.prod(output)) * first[-1] if output and first else 0


def _shares(parts: Iterable[tuple[str, int]]) -> dict[str, float]:
    macs: dict[str, int] = {}
    for precision, count in parts:
        macs[precision] = macs.get(precision, 0) + count
    whole = max(sum(macs.values()), 1)
    return {name: macs[name] / whole for name in _WIDTH if name in macs}
