"""Facts of a bundle: what a network costs before anything is run, read from the files themselves.

Invariant: a fact that is known is exact, the same on every machine and every day; one that the files do not tell is
absent, never estimated. What has to be measured (memory) is listed here too, and marked as measured.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple
from xml.etree import ElementTree as ET

from edgepose.bundle import Bundle, check_file
from edgepose.errors import OnnxError
from edgepose.profiler.onnx_wire import Node, OnnxGraph, Shape, Tensor, read_onnx
from edgepose.spec import Engine

Unit = Literal["bytes", "count", "MACs", "share"]


class Fact(NamedTuple):
    """What a fact is.

    Attributes:
        unit: Of its value.
        better: Which way is better.
        measured: Whether it comes from a running process instead of the files.
    """

    unit: Unit
    better: Literal["lower", "higher"] = "lower"
    measured: bool = False


FACTS: dict[str, Fact] = {
    "macs": Fact("MACs"),  # multiplications of convolutions and matrix products for one image
    "parameters": Fact("count"),  # weights and biases, without scales and zero points
    "network_nodes": Fact("count"),  # of model.onnx
    "engine_nodes": Fact("count"),  # of the engine's own graph, where it is one that can be read
    "int8_macs_share": Fact("share", "higher"),  # what the network asks for
    "executed_int8_share": Fact("share", "higher"),  # what the runtime made of it when the engine was built
    "engine_bytes": Fact("bytes"),
    "bundle_bytes": Fact("bytes"),
    "peak_memory_bytes": Fact("bytes", measured=True),
    "steady_memory_bytes": Fact("bytes", measured=True),
}
FAMILIES: dict[str, Fact] = {
    "nodes.": Fact("count"),  # by operator of model.onnx: nodes.Conv
    "macs.": Fact("MACs"),  # by arithmetic: macs.int8, macs.fp32
    "parameters.": Fact("count"),  # by type: parameters.int8
}
"""Facts with an open end: a name that begins so is 0 where the network has nothing of the kind."""

_WEIGHT_PORT = {
    "Conv": 1, "FusedConv": 1, "ConvInteger": 1, "ConvTranspose": 1, "QLinearConv": 3, "MatMul": 1, "FusedMatMul": 1,
    "MatMulInteger": 1, "QLinearMatMul": 3, "Gemm": 1, "FusedGemm": 1, "QGemm": 3,
}  # fmt: skip
"""Operators that multiply, and which of their inputs holds the weights."""
_INTEGER = frozenset({"QLinearConv", "ConvInteger", "QLinearMatMul", "MatMulInteger", "QGemm"})
_SAME_SHAPE = frozenset({"QuantizeLinear", "DequantizeLinear", "Cast", "Identity"})
_NO_WEIGHTS = frozenset({"", "int64", "uint64", "uint32", "bool"})  # shapes, axes, masks


def known_fact(name: str) -> Fact | None:
    """What the fact called `name` is; None where there is none."""
    if name in FACTS:
        return FACTS[name]
    return next((fact for prefix, fact in FAMILIES.items() if name.startswith(prefix) and name != prefix), None)


def value_of(facts: Mapping[str, float], name: str) -> float | None:
    """A fact's value; None where it is not known."""
    if name in facts or name in FACTS:
        return facts.get(name)
    prefix = name.partition(".")[0] + "."
    return 0.0 if any(key.startswith(prefix) for key in facts) else None


def spelt(value: float, unit: Unit) -> str:
    """A value for people: "2.33 MB", "531.2 M", "98.2 %"."""
    match unit:
        case "bytes":
            return f"{value / 1e6:.2f} MB"
        case "share":
            return f"{100 * value:.1f} %"
        case "MACs":
            return f"{value / 1e6:.1f} M"
        case "count":
            return f"{value:,.0f}"


def allowance(better: Literal["lower", "higher"], unit: Unit, share: float, absolute: float) -> str:
    """How much worse a fact may become, for people: "+5.0 %", "+5.0 % or 0.07 MB, whichever is more"."""
    relative = f"{'+' if better == 'lower' else '-'}{100 * share:.1f} %"
    return f"{relative} or {spelt(absolute, unit)}, whichever is more" if absolute else relative


def bundle_facts(bundle: Bundle, engine: Engine) -> dict[str, float]:
    """Everything that the files of a bundle tell of its network and of one engine.

    Raises:
        IntegrityError: A file is missing or was changed.
        OnnxError: The network or the engine's graph cannot be read.
    """
    facts = {
        "engine_bytes": float(sum((bundle.root / name).stat().st_size for name in engine.files)),
        "bundle_bytes": float(sum((bundle.root / name).stat().st_size for name in bundle.manifest.files)),
        **network_facts(read_onnx(check_file(bundle, bundle.manifest.model))),
    }
    nodes = _engine_nodes(check_file(bundle, engine.path))
    if nodes is not None:
        facts["engine_nodes"] = float(nodes)
    shares = {
        float(report["int8_share"])
        for report in bundle.manifest.reports.values()
        if isinstance(report, Mapping)
        and isinstance(report.get("int8_share"), int | float)
        and (report.get("backend"), report.get("precision")) == (engine.backend, engine.precision)
    }
    if len(shares) == 1:  # engines of several targets share a backend: which one is meant is not said
        facts["executed_int8_share"] = shares.pop()
    return facts


def network_facts(graph: OnnxGraph) -> dict[str, float]:
    """What a network consists of: nodes by operator, parameters by type, multiplications by arithmetic."""
    facts = {"network_nodes": float(len(graph.nodes))}
    facts |= {f"nodes.{name}": float(n) for name, n in sorted(Counter(node.operator for node in graph.nodes).items())}
    sizes = _parameters(graph)
    facts["parameters"] = float(sum(sizes.values()))
    facts |= {f"parameters.{kind}": float(size) for kind, size in sorted(sizes.items())}
    macs = _macs(graph)
    if macs is not None:
        facts["macs"] = sum(macs.values())
        facts |= {f"macs.{kind}": count for kind, count in sorted(macs.items())}
        if facts["macs"]:
            facts["int8_macs_share"] = macs.get("int8", 0.0) / facts["macs"]
    return facts


def _parameters(graph: OnnxGraph) -> Counter[str]:
    """Elements of constants by type, without those of quantisers and of shapes."""
    quantisers = {
        name
        for node in graph.nodes
        if node.operator in ("QuantizeLinear", "DequantizeLinear")
        for name in node.inputs[1:]
    }
    sizes: Counter[str] = Counter()
    for name, tensor in graph.constants.items():
        size = _volume(tensor.shape)
        if size is not None and tensor.shape and name not in quantisers and tensor.type not in _NO_WEIGHTS:
            sizes[tensor.type] += size
    return sizes


def _macs(graph: OnnxGraph) -> dict[str, float] | None:
    """Multiplications for one image by arithmetic; None where the file does not give a shape that they depend on."""
    makers = {name: node for node in graph.nodes for name in node.outputs}
    people = _batch(graph)
    counts: dict[str, float] = {}
    for node in graph.nodes:
        if node.operator not in _WEIGHT_PORT:
            continue
        count = _multiplications(node, graph, makers)
        if count is None:
            return None
        kind = _arithmetic(node, graph, makers)
        counts[kind] = counts.get(kind, 0.0) + count / people
    return counts


def _batch(graph: OnnxGraph) -> int:
    """Images per call of a network whose batch is fixed, else 1."""
    shapes = [graph.values[name].shape for name in graph.inputs]
    first = shapes[0][0] if shapes and shapes[0] else 1
    return first if isinstance(first, int) and first > 0 else 1


def _multiplications(node: Node, graph: OnnxGraph, makers: Mapping[str, Node]) -> int | None:
    port = _WEIGHT_PORT[node.operator]
    if len(node.inputs) <= port or not node.outputs:
        return None
    weight = _tensor_of(node.inputs[port], graph, makers)
    first = _tensor_of(node.inputs[0], graph, makers)
    output = _tensor_of(node.outputs[0], graph, makers)
    if weight is None:
        return None
    if node.operator == "ConvTranspose":
        return _product(_size_of(first), _volume(weight.shape[1:]))
    if "Conv" in node.operator:
        return _product(_size_of(output), _volume(weight.shape[1:]))
    if "Gemm" in node.operator:  # weights may be transposed: what is not the output's last size is summed over
        columns = output.shape[-1] if output and output.shape else None
        inner = _volume(weight.shape)
        if not isinstance(columns, int) or not columns or inner is None:
            return None
        return _product(_size_of(output), inner // columns)
    inner_size = first.shape[-1] if first and first.shape else None
    return _product(_size_of(output), inner_size if isinstance(inner_size, int) else None)


def _tensor_of(name: str, graph: OnnxGraph, makers: Mapping[str, Node]) -> Tensor | None:
    """Shape and type of a constant or value; through operators that keep the shape where the file is silent."""
    for _ in range(8):
        known = graph.constants.get(name) or graph.values.get(name)
        if known is not None and known.shape:
            return known
        maker = makers.get(name)
        if maker is None or maker.operator not in _SAME_SHAPE or not maker.inputs:
            return None
        name = maker.inputs[0]
    return None


def _arithmetic(node: Node, graph: OnnxGraph, makers: Mapping[str, Node]) -> str:
    """The type of the weights, or "int8" where both factors are dequantised integers."""
    weight = node.inputs[_WEIGHT_PORT[node.operator]]
    makes = [makers.get(name) for name in (node.inputs[0], weight)]
    if node.operator in _INTEGER or all(maker and maker.operator == "DequantizeLinear" for maker in makes):
        return "int8"
    known = graph.constants.get(weight) or graph.values.get(weight)
    return known.type if known and known.type else "fp32"


def _volume(shape: Shape) -> int | None:
    """Elements; a free first size is the batch and counts as 1."""
    sizes = [1 if index == 0 and isinstance(size, str) else size for index, size in enumerate(shape)]
    return None if any(isinstance(size, str) for size in sizes) else math.prod(int(size) for size in sizes)


def _size_of(tensor: Tensor | None) -> int | None:
    return None if tensor is None else _volume(tensor.shape)


def _product(left: int | None, right: int | None) -> int | None:
    return None if left is None or right is None else left * right


def _engine_nodes(path: Path) -> int | None:
    """Nodes of an engine's own graph, constants aside; None where its format is nobody else's business."""
    if path.suffix == ".onnx":
        return len(read_onnx(path).nodes)
    if path.suffix != ".xml":
        return None
    try:
        layers = [layer.get("type") for layer in ET.parse(path).iterfind("./layers/layer")]  # noqa: S314 - hash-checked
    except ET.ParseError as err:
        raise OnnxError(str(path), found=f"no OpenVINO network ({err})", expected="XML") from err
    return sum(kind not in ("Const", "Parameter", "Result") for kind in layers)
