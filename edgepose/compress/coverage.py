"""Quantisers that NNCF leaves out and integer kernels need, and those it adds without need.

Invariant: afterwards every operator with an integer kernel has quantised inputs and outputs, so that the fake-quantised
network is what an engine with full Q/DQ computes; what stays float is protected, or a linear layer's last output.

ONNX Runtime forms an integer kernel only where Q/DQ stand on all inputs and outputs. NNCF leaves an output open where
the next operator stays float, and quantises a second time behind operators that only move values.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import nncf.torch.graph.operator_metatypes as om
import torch
from nncf.common.graph.graph import NNCFNode
from nncf.common.quantization.structs import QuantizationScheme
from nncf.torch.graph.graph import PTNNCFGraph
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, PTQuantizerSpec, SymmetricQuantizer
from torch import Tensor, nn

from edgepose.compress.hooks import add_hook, graph_of, hooks_of, remove_hook

_QUANTISERS = ("asymmetric_quantize", "symmetric_quantize")
_LINEAR = (om.PTLinearMetatype, om.PTMatMulMetatype, om.PTAddmmMetatype)
_WEIGHTED = (
    om.PTConv1dMetatype, om.PTConv2dMetatype, om.PTConv3dMetatype,
    om.PTDepthwiseConv1dSubtype, om.PTDepthwiseConv2dSubtype, om.PTDepthwiseConv3dSubtype,
    *_LINEAR,
)  # fmt: skip
_INTEGER_KERNELS = (
    *_WEIGHTED, om.PTAddMetatype, om.PTMulMetatype, om.PTAvgPool2dMetatype, om.PTMeanMetatype,
    om.PTLeakyRELUMetatype, om.PTSigmoidMetatype, om.PTCatMetatype,
)  # fmt: skip
_RECTIFIERS = (om.PTRELUMetatype, om.PTRELU6Metatype, om.PTHardTanhMetatype)
_MOVERS = (
    om.PTMaxPool2dMetatype, om.PTAdaptiveMaxPool2dMetatype, om.PTReshapeMetatype, om.PTTransposeMetatype,
    om.PTSqueezeMetatype, om.PTSplitMetatype, om.PTGatherMetatype, om.PTDropoutMetatype, om.PTNoopMetatype,
)  # fmt: skip


class _Observer(nn.Module):
    """Keeps the extremes of all it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = float("inf"), float("-inf")

    def forward(self, value: Tensor) -> Tensor:
        self.low, self.high = min(self.low, float(value.min())), max(self.high, float(value.max()))
        return value


def complete_coverage(
    wrapped: nn.Module,
    batches: Sequence[Tensor],
    *,
    symmetric: bool,
    protected: Collection[str],
    round_outputs: bool = False,
) -> tuple[str, ...]:
    """Adds and removes quantisers in place; new ones span the extremes seen in `batches`.

    Args:
        wrapped: What `nncf.quantize` returned.
        batches: Calibration inputs, (B, 3, h, w) float32 each.
        symmetric: New quantisers are signed with zero point 0 instead of unsigned with any.
        protected: Functions that stay float, by NNCF's names.
        round_outputs: Quantise what the last linear layers say, too.

    Returns:
        The places of the new quantisers.
    """
    graph = graph_of(wrapped, batches[0][:1])
    for node in _requantised(graph, hooks_of(wrapped)):
        remove_hook(wrapped, _after(node))
    graph = graph_of(wrapped, batches[0][:1])
    opened = _open_outputs(graph, hooks_of(wrapped), protected, round_outputs=round_outputs)
    places = tuple(_after(node) for node in opened if not _gather(wrapped, graph, node))
    observers = {place: _Observer() for place in places}
    for place, observer in observers.items():
        add_hook(wrapped, place, observer)
    with torch.no_grad():
        for batch in batches:
            wrapped(batch)
    for place, observer in observers.items():
        remove_hook(wrapped, place)
        add_hook(wrapped, place, spanning_quantiser(observer.low, observer.high, symmetric=symmetric))
    return places


def idle_quantisers(wrapped: nn.Module, example: Tensor, floats: Collection[str]) -> tuple[str, ...]:
    """Places of activation quantisers that no integer kernel needs: all who make or read their value are float.

    Args:
        wrapped: A fake-quantised network.
        example: (1, 3, h, w) float32.
        floats: Functions that stay float, by NNCF's names, beside those whose weight has no quantiser.
    """
    graph, idle = graph_of(wrapped, example), []
    hooks = hooks_of(wrapped)
    quantisers = [node for node in graph.topological_sort() if node.node_type in _QUANTISERS]
    for place, hook in hooks.items():
        if not isinstance(hook, BaseQuantizer) or hook.narrow_range:  # weights have the narrow range
            continue
        nodes = [node for node in quantisers if _names_hook(node, place)]
        touched = [other for node in nodes for other in _across_movers(graph, node)]
        if not any(_is_integer(graph, node, floats) for node in touched):
            idle.append(place)
    return tuple(idle)


def _across_movers(graph: PTNNCFGraph, start: NNCFNode) -> list[NNCFNode]:
    """Who makes what a node reads and who reads what it makes, beyond movers, rectifiers and quantisers."""
    found = []
    for step in (graph.get_previous_nodes, graph.get_next_nodes):
        following = list(step(start))
        while following:
            node = following.pop()
            if _is_mover(node) or node.metatype in _RECTIFIERS or node.node_type in _QUANTISERS:
                following += step(node)
            else:
                found.append(node)
    return found


def _is_integer(graph: PTNNCFGraph, node: NNCFNode, floats: Collection[str]) -> bool:
    """Whether integers pay for a node: it multiplies by weights in integers, or stands beside one that does."""
    if node.metatype not in _INTEGER_KERNELS or node.node_name in floats:
        return False
    if node.metatype in _WEIGHTED:
        return not _has_float_weight(graph, node)
    beside = [other for other in _across_movers(graph, node) if other.metatype in _WEIGHTED]
    return any(_is_integer(graph, other, floats) for other in beside)


def spanning_quantiser(low: float, high: float, *, symmetric: bool) -> BaseQuantizer:
    """An 8-bit quantiser for one scale that spans low..high and 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    span = max(high - low, 1e-6)  # a tensor that is always zero still needs a scale
    if symmetric:
        quantiser: BaseQuantizer = SymmetricQuantizer(_quantiser_spec(QuantizationScheme.SYMMETRIC, signed=True))
        quantiser._scale_param_storage.data.fill_(max(-low, high, 1e-6))  # noqa: SLF001 - its setter takes no tensors
    else:
        quantiser = AsymmetricQuantizer(_quantiser_spec(QuantizationScheme.ASYMMETRIC, signed=None))
        quantiser.input_low.data.fill_(low)
        quantiser._input_range_param_storage.data.fill_(span)  # noqa: SLF001
    quantiser.initialized = True
    return quantiser


def _quantiser_spec(mode: QuantizationScheme, *, signed: bool | None) -> PTQuantizerSpec:
    return PTQuantizerSpec(
        num_bits=8,
        mode=mode,
        signedness_to_force=signed,
        narrow_range=False,
        half_range=False,
        scale_shape=(1,),
        logarithm_scale=False,
    )


def _after(node: NNCFNode) -> str:
    """The place behind a function's only output."""
    return f"post_hooks.{node.node_name}__0"


def _is_mover(node: NNCFNode) -> bool:
    """Whether the function only moves, repeats or selects values, so that its output has its input's codes."""
    if node.metatype is om.PTInterpolateMetatype:
        attributes = node.layer_attributes
        arguments = (*attributes.op_args, *attributes.op_kwargs.values()) if attributes is not None else ()
        # `nearest` is also interpolate's default.
        return not any(mode in arguments for mode in ("linear", "bilinear", "bicubic", "trilinear", "area"))
    return node.metatype in _MOVERS


def _gather(wrapped: nn.Module, graph: PTNNCFGraph, node: NNCFNode) -> bool:
    """Puts the quantiser that stands before some readers of a function's output behind the function, for all of them.

    NNCF places it so where other readers are protected; kernels are integer only where the output itself is quantised.
    """
    hooks = hooks_of(wrapped)
    readers, before = list(graph.get_next_nodes(node)), []
    while readers:
        reader = readers.pop()
        if reader.node_type in _QUANTISERS:
            before += [place for place in hooks if place.startswith("pre_hooks") and _names_hook(reader, place)]
        elif _is_mover(reader):
            readers += graph.get_next_nodes(reader)
    for place in before:
        remove_hook(wrapped, place)
    if before:
        add_hook(wrapped, _after(node), hooks[before[0]])
    return bool(before)


def _requantised(graph: PTNNCFGraph, hooks: dict[str, nn.Module]) -> list[NNCFNode]:
    """Movers with a quantiser behind them although what they move is quantised already."""
    found = []
    for node in graph.topological_sort():
        if not _is_mover(node) or _after(node) not in hooks:
            continue
        source = graph.get_previous_nodes(node)[0]
        while _is_mover(source):
            source = graph.get_previous_nodes(source)[0]
        if source.node_type in _QUANTISERS:
            found.append(node)
    return found


def _open_outputs(
    graph: PTNNCFGraph, hooks: dict[str, nn.Module], protected: Collection[str], *, round_outputs: bool
) -> list[NNCFNode]:
    """Functions whose output lacks a quantiser, in order of execution."""
    quantised: set[int] = set()
    found: list[NNCFNode] = []
    for node in graph.topological_sort():
        inputs = [n for n in graph.get_previous_nodes(node) if n.node_type != "nncf_model_const"]
        carried = bool(inputs) and all(n.node_id in quantised for n in inputs)
        if node.node_type in _QUANTISERS or _after(node) in hooks:
            quantised.add(node.node_id)
        elif _is_mover(node) or node.metatype in _RECTIFIERS:
            if carried:
                quantised.add(node.node_id)
        elif node.metatype in _INTEGER_KERNELS and carried and node.node_name not in protected:
            if _has_float_weight(graph, node):
                continue  # NNCF's own exceptions, such as squeeze-and-excitation
            if node.metatype is om.PTCatMetatype and _share_one_quantiser(inputs, hooks):
                quantised.add(node.node_id)
                continue
            target = _rectified(graph, node)
            if _after(target) in hooks:
                continue  # the rectifier behind it is quantised: one kernel does both
            if not round_outputs and node.metatype in _LINEAR and _ends_float(graph, target, protected):
                continue
            found.append(target)
            quantised.update({node.node_id, target.node_id})
    return found


def _has_float_weight(graph: PTNNCFGraph, node: NNCFNode) -> bool:
    """Whether a parameter goes into a function's weight port without a quantiser."""
    return any(
        edge.input_port_id == 1 and edge.from_node.node_type == "nncf_model_const"
        for edge in graph.get_input_edges(node)
    )


def _rectified(graph: PTNNCFGraph, node: NNCFNode) -> NNCFNode:
    """The rectifier that will be fused into `node`, else `node` itself."""
    after = graph.get_next_nodes(node)
    return after[0] if len(after) == 1 and after[0].metatype in _RECTIFIERS else node


def _ends_float(graph: PTNNCFGraph, node: NNCFNode, protected: Collection[str]) -> bool:
    """Whether only outputs of the network, protected functions, or such without integer kernels read the result."""
    after = [n for n in graph.get_next_nodes(node) if n.node_name not in protected]
    return all(n.metatype not in _INTEGER_KERNELS and n.node_type not in _QUANTISERS for n in after)


def _share_one_quantiser(inputs: Sequence[NNCFNode], hooks: dict[str, nn.Module]) -> bool:
    """Whether NNCF gave all inputs of a concatenation one scale."""
    behind = {id(hook) for place, hook in hooks.items() if any(_names_hook(node, place) for node in inputs)}
    return len(behind) == 1 and all(node.node_type in _QUANTISERS for node in inputs)


def _names_hook(node: NNCFNode, place: str) -> bool:
    """Whether a quantiser node of the graph is the hook at `place`: its module path ends in "post_hook__a-b__0[0]"."""
    kind, _, key = place.partition(".")
    return f"{kind[:-1]}__{key.replace('.', ':').replace('/', '-')}[0]/" in f"{node.node_name}/"
