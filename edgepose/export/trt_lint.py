"""What TensorRT misreads, refuses or runs slowly in a quantised ONNX file: twelve rules, checked before it is built.

Invariant: a file that breaks a rule of severity "error" never reaches TensorRT's parser; which numbers a rule looks at
is what the graph computes: scales and zero points are followed through Identity and Constant nodes.

Each rule was seen in the real parser. The worst is `unsigned`: a uint8 Q/DQ with zero point 0 is read as int8 with no
more than a warning, so that everything above half the range is clipped and the engine is wrong without a word.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgepose.errors import OnnxError
from edgepose.export.files import read_graph
from edgepose.export.notes import HEAVY

Rule = Literal[
    "zero-point", "unsigned", "integer-bias", "activation-channels", "weight-axis", "weight-per-tensor", "placement",
    "residual-add", "custom-domain", "computed-scale", "half-scale", "batch-norm",
]  # fmt: skip
RULES: tuple[Rule, ...] = get_args(Rule)

_QUANTISE, _DEQUANTISE = "QuantizeLinear", "DequantizeLinear"
_CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
_RECTIFIERS = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu", "HardSwish", "Sigmoid"})
_PASSES = frozenset({"Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze"})
"""Between a weight's DequantizeLinear and its reader."""
_DOMAINS = ("", "ai.onnx")
_HALF_SCALES_FROM = 19
_NAMED = 4


@dataclass(frozen=True, slots=True)
class _Words:
    """What is said of a broken rule."""

    severity: Literal["error", "warning"]
    found: str
    expected: str
    fix: str


_WORDS: dict[Rule, _Words] = {
    "zero-point": _Words(
        "error", "a zero point that is not 0", "symmetric quantisation",
        "quantise with symmetric activations (recipe: quantise: activations: symmetric)",
    ),
    "unsigned": _Words(
        "error", "uint8 codes, which TensorRT silently reads as int8 and so clips at half their range", "int8 codes",
        "quantise with signed symmetric activations (recipe: quantise: activations: symmetric)",
    ),
    "integer-bias": _Words(
        "error", "a bias of int32 codes behind DequantizeLinear", "a bias of floats", "export biases unquantised",
    ),
    "activation-channels": _Words(
        "error", "an activation with a scale for each channel, whose convolution falls back to floats",
        "one scale for each activation", "quantise activations per tensor",
    ),
    "weight-axis": _Words(
        "error", "weight scales along an axis that is not that of the output channels",
        "axis 0 of Conv and axis 1 of ConvTranspose", "quantise weights along their output channels",
    ),
    "weight-per-tensor": _Words(
        "warning", "one scale for all channels of a weight", "one for each output channel",
        "quantise weights per channel: the network will be more accurate",
    ),
    "placement": _Words(
        "warning",
        "Q/DQ where it hinders fusing: between a product and its rectifier, Pad and Conv, or before an output",
        "Q/DQ before the inputs of products only", "move it behind the rectifier, or leave it out",
    ),
    "residual-add": _Words(
        "warning", "a sum whose operands are both quantised, or neither", "Q/DQ on the skip branch alone",
        "leave the branch of the convolution in floats: TensorRT fuses the sum into it",
    ),
    "custom-domain": _Words(
        "error", "operators of a domain that TensorRT has no plugin for", "ONNX's own operators",
        "export with QuantizeLinear and DequantizeLinear instead of a framework's own nodes",
    ),
    "computed-scale": _Words(
        "error", "a scale or zero point that is computed", "a constant", "fold constants, or quantise statically",
    ),
    "half-scale": _Words(
        "error", "a 16-bit scale in an opset that has 32-bit scales only", f"opset {_HALF_SCALES_FROM} or newer",
        f"export at opset {_HALF_SCALES_FROM}, or keep scales in 32 bits",
    ),
    "batch-norm": _Words(
        "error", "batch normalisation behind a quantised convolution", "none: it belongs into the weights",
        "fold batch normalisation before quantising",
    ),
}  # fmt: skip


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A rule that a file breaks.

    Attributes:
        rule: Which.
        severity: "error" where the engine would be wrong or slow beyond use, or would not be built; else "warning".
        nodes: Names of the nodes at fault, in the graph's order; of nodes without names, those of their outputs.
        found: What is there.
        expected: What should be.
        fix: What can be done about it.
    """

    rule: Rule
    severity: Literal["error", "warning"]
    nodes: tuple[str, ...]
    found: str
    expected: str
    fix: str


def lint(model: ir.Model) -> tuple[Finding, ...]:
    """All rules that a graph breaks, errors first."""
    broken: dict[Rule, list[str]] = {}
    graph = _Graph(_opset(model), frozenset(model.graph.outputs), frozenset(key[0] for key in model.functions))
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        for rule in _broken_by(node, graph):
            names = broken.setdefault(rule, [])
            if (name := _name(node)) not in names:
                names.append(name)
    findings = [
        Finding(rule, words.severity, tuple(broken[rule]), words.found, words.expected, words.fix)
        for rule, words in _WORDS.items()
        if rule in broken
    ]
    return tuple(sorted(findings, key=lambda finding: finding.severity))  # "error" comes before "warning"


def check_for_tensorrt(path: str | os.PathLike[str]) -> tuple[Finding, ...]:
    """Checks a file before TensorRT sees it; returns the warnings.

    Raises:
        OnnxError: Not a readable ONNX file, or a rule is broken that makes wrong engines; names rule and nodes.
    """
    model = read_graph(path)
    findings = lint(model)
    errors = [finding for finding in findings if finding.severity == "error"]
    if errors:
        first = errors[0]
        more = f" (and {', '.join(error.rule for error in errors[1:])})" if len(errors) > 1 else ""
        raise OnnxError(
            f"{path}: {first.rule}: {named(first.nodes)}", found=first.found + more,
            expected=f"{first.expected}, for TensorRT", fix=first.fix,
        )  # fmt: skip
    return findings


def named(nodes: tuple[str, ...]) -> str:
    """Some names and how many more there are."""
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return ", ".join(nodes[:_NAMED]) + more


# ----------------------------------------------------------------------------------------------------------- the rules


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """What rules have to know besides a node and its neighbours."""

    opset: int
    outputs: frozenset[ir.Value]
    own_domains: frozenset[str]


def _broken_by(node: ir.Node, graph: _Graph) -> Iterator[Rule]:
    """The rules that a node breaks."""
    if node.domain not in (*_DOMAINS, *graph.own_domains):
        yield "custom-domain"
    elif node.op_type in (_QUANTISE, _DEQUANTISE):
        yield from _broken_codes(node, graph)
        yield from _broken_weight(node)
        yield from _broken_place(node, graph)
    elif node.op_type == "Add":
        if _is_unbalanced(node):
            yield "residual-add"
    elif node.op_type == "BatchNormalization":
        source = _producer(node, 0)
        if source is not None and source.op_type in HEAVY and _is_quantised(source):
            yield "batch-norm"


def _broken_codes(node: ir.Node, graph: _Graph) -> Iterator[Rule]:
    """Zero points, types and scales of a Q or DQ."""
    scale, zero = _constant(_input(node, 1)), _constant(_input(node, 2))
    kind = _code_type(node)
    if scale is None or (_input(node, 2) is not None and zero is None):
        yield "computed-scale"
    if kind == ir.DataType.INT32:
        yield "integer-bias"
    elif zero is not None and np.any(zero):
        yield "zero-point"
    elif kind == ir.DataType.UINT8:
        yield "unsigned"
    if scale is not None and scale.dtype.itemsize == 2 and graph.opset < _HALF_SCALES_FROM:
        yield "half-scale"
    if node.op_type == _QUANTISE and scale is not None and scale.size > 1 and _constant(_input(node, 0)) is None:
        yield "activation-channels"


def _broken_weight(node: ir.Node) -> Iterator[Rule]:
    """Axis and number of a weight's scales."""
    if node.op_type != _DEQUANTISE or _code_type(node) == ir.DataType.INT32:
        return
    scale, shape = _constant(_input(node, 1)), _weight_shape(node)
    if scale is None or shape is None:
        return
    axis = (node.attributes["axis"].as_int() if "axis" in node.attributes else 1) % max(len(shape), 1)
    for reader, channels in _readers_of_weight(node, len(shape)):
        if channels is None or channels >= len(shape):
            continue
        if scale.size == 1 and shape[channels] > 1:
            yield "weight-per-tensor"
        elif scale.size > 1 and axis != channels and not _is_grouped_transposed(reader):
            yield "weight-axis"


def _broken_place(node: ir.Node, graph: _Graph) -> Iterator[Rule]:
    """A Q/DQ pair that stands in the way of a fusion."""
    if node.op_type == _DEQUANTISE:
        if node.outputs[0] in graph.outputs:
            yield "placement"
        return
    before = _producer(node, 0)
    if before is None:
        return
    after = {
        reader.op_type
        for dequantise, _ in node.outputs[0].uses()
        if dequantise.op_type == _DEQUANTISE
        for reader, _ in dequantise.outputs[0].uses()
    }
    if (before.op_type in HEAVY and after & _RECTIFIERS) or (before.op_type == "Pad" and after & _CONVOLUTIONS):
        yield "placement"


def _is_unbalanced(node: ir.Node) -> bool:
    """Whether a sum behind a quantised convolution has Q/DQ on both operands or on neither, or on the wrong one."""
    sources = [_producer(node, port) for port in range(2)]
    if any(_constant(_input(node, port)) is not None for port in range(2)):
        return False
    dequantised = [source is not None and source.op_type == _DEQUANTISE for source in sources]
    origins = [_behind_pair(source) for source in sources]
    fusable = [origin is not None and origin.op_type in HEAVY and _is_quantised(origin) for origin in origins]
    if not any(fusable):
        return False
    if sum(dequantised) != 1:
        return True
    return not fusable[dequantised.index(False)]


# ---------------------------------------------------------------------------------------------------- reading the graph


def _opset(model: ir.Model) -> int:
    imports = model.opset_imports
    return int(imports.get("", imports.get("ai.onnx", 0)))


def _name(node: ir.Node) -> str:
    return node.name or next((value.name for value in node.outputs if value.name), node.op_type)


def _input(node: ir.Node, port: int) -> ir.Value | None:
    return node.inputs[port] if port < len(node.inputs) else None


def _producer(node: ir.Node, port: int) -> ir.Node | None:
    """What makes an input; Identity is looked through."""
    value = _input(node, port)
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type == "Identity":
        value = _input(producer, 0)
        producer = None if value is None else value.producer()
    return producer


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The number of a value, through Identity and Constant nodes; None where it is computed."""
    while value is not None:
        if value.const_value is not None:
            return value.const_value.numpy()
        producer = value.producer()
        if producer is None:
            return None
        if producer.op_type == "Constant":
            return _constant_of(producer)
        if producer.op_type != "Identity":
            return None
        value = producer.inputs[0]
    return None


def _constant_of(node: ir.Node) -> NDArray[Any] | None:
    for name, attribute in node.attributes.items():
        match name:
            case "value":
                return attribute.as_tensor().numpy()
            case "value_float" | "value_floats":
                return np.asarray(attribute.value, np.float32)
            case "value_int" | "value_ints":
                return np.asarray(attribute.value, np.int64)
    return None


def _code_type(node: ir.Node) -> ir.DataType | None:
    """Type of the codes that a Q makes or a DQ reads; None where nothing says it."""
    zero = _input(node, 2)
    if zero is not None:
        return _dtype(zero)
    if node.op_type == _QUANTISE:  # without a zero point, ONNX makes uint8 unless it is told otherwise
        told = node.attributes["output_dtype"].as_int() if "output_dtype" in node.attributes else 0
        return ir.DataType(told) if told else ir.DataType.UINT8
    codes = _input(node, 0)
    source = _producer(node, 0)
    if source is not None and source.op_type == _QUANTISE:
        return _code_type(source)
    return None if codes is None else _dtype(codes)


def _dtype(value: ir.Value) -> ir.DataType | None:
    array = _constant(value)
    if value.const_value is not None:
        return value.const_value.dtype
    return value.dtype if array is None else ir.DataType.from_numpy(array.dtype)


def _weight_shape(dequantise: ir.Node) -> tuple[int, ...] | None:
    """Shape of the weight that a DQ gives back: stored as codes, or quantised from stored floats."""
    codes = _constant(_input(dequantise, 0))
    source = _producer(dequantise, 0)
    if codes is None and source is not None and source.op_type == _QUANTISE:
        codes = _constant(_input(source, 0))
    return None if codes is None else codes.shape


def _readers_of_weight(dequantise: ir.Node, rank: int) -> Iterator[tuple[ir.Node, int | None]]:
    """The products that read a weight, and which axis of what the DQ gives holds their output channels."""
    pending: list[tuple[ir.Node, list[int] | None]] = [(dequantise, list(range(rank)))]
    while pending:
        node, axes = pending.pop()
        for reader, port in node.outputs[0].uses():
            if reader.op_type in HEAVY and port == 1:
                channels = _channel_axis(reader, rank)
                yield reader, None if axes is None or channels is None else axes[channels]
            elif reader.op_type in _PASSES and port == 0:
                pending.append((reader, _moved(reader, axes)))


def _moved(node: ir.Node, axes: list[int] | None) -> list[int] | None:
    """Where the axes of a weight are behind another node; None where that is not followed."""
    if node.op_type == "Identity" or axes is None:
        return axes
    if node.op_type != "Transpose":
        return None
    order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else list(reversed(range(len(axes))))
    return [axes[place] for place in order]


def _channel_axis(node: ir.Node, rank: int) -> int | None:
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            return 0 if "transB" in node.attributes and node.attributes["transB"].as_int() else 1
        case _:  # MatMul
            return rank - 1 if rank >= 2 else None


def _is_grouped_transposed(node: ir.Node) -> bool:
    """A ConvTranspose in groups has no axis of output channels."""
    return node.op_type == "ConvTranspose" and "group" in node.attributes and node.attributes["group"].as_int() > 1


def _is_quantised(node: ir.Node) -> bool:
    """Whether a product reads both its operands through DQ."""
    sources = [_producer(node, port) for port in range(2)]
    return all(source is not None and source.op_type == _DEQUANTISE for source in sources)


def _behind_pair(source: ir.Node | None) -> ir.Node | None:
    """What stands before a Q/DQ pair; the node itself where there is none."""
    if source is None or source.op_type != _DEQUANTISE:
        return source
    quantise = _producer(source, 0)
    return None if quantise is None else _producer(quantise, 0)
