"""Why an engine does not compute all of a network in integers: its kernels against what its ONNX file asks for.

Invariant: whether a kernel is integer is the runtime's word; the file only says which module it belongs to and what was
meant to stay float.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from edgepose.export.files import read_graph
from edgepose.export.int8_share import Achieved, FloatLayer, Int8Share
from edgepose.export.notes import HEAVY, floats_of, modules_of


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What a quantised ONNX file says of its layers.

    Attributes:
        graph: Its nodes.
        modules: Module names by node.
        left: Nodes left float, and whether they belong to protected parts.
    """

    graph: tuple[ir.Node, ...]
    modules: dict[str, str]
    left: dict[str, bool]


def read_asked(model: Path) -> Asked:
    """Read a file's notes.

    Raises:
        OnnxError: Not a readable ONNX file, or its notes are not those that edgepose writes.
    """
    loaded = read_graph(model)
    metadata = loaded.metadata_props
    left = {entry.node: entry.protected for entry in floats_of(metadata)}
    return Asked(tuple(loaded.graph), modules_of(metadata), left)


def achieved(share: Int8Share, asked: Asked) -> Achieved:
    """Explain an engine's float kernels: what its runtime executes against what its file asks for."""
    layers = []
    for kernel in share.float_kernels:
        node = origin(kernel.name, asked.graph)
        layers.append(
            FloatLayer(
                layer=asked.modules.get(node, "") or kernel.name,
                operator=kernel.operator,
                macs=kernel.macs,
                reason=_reason(asked.left.get(node), share.backend, kernel.operator),
                protected=asked.left.get(node, False),
            )
        )
    meant = sum(layer.macs for layer in layers if layer.protected)
    integer, rest = sum(k.macs for k in share.kernels if k.integer), share.macs - meant
    ordered = tuple(sorted(layers, key=lambda layer: -layer.macs))
    return Achieved(share.share, integer / rest if rest else 1.0, share.macs, ordered)


def origin(kernel: str, graph: Sequence[ir.Node]) -> str:
    """The name of the convolution or matrix product that a runtime's kernel comes from; "" where it is not known.

    Runtimes lengthen the names of nodes ("node_conv2d_token_3", "node_conv2d/WithoutBiases"), or call a fused kernel by
    the value it makes ("relu_4_nchwc").
    """
    bare = re.sub(r"(_token_\d+|_nchwc)+$", "", kernel).partition("/")[0]
    for node in graph:
        if node.name == bare and node.op_type in HEAVY:
            return bare
    made = {value.name: node for node in graph for value in node.outputs}
    found = {node.name: node for node in graph}.get(bare) or made.get(bare)
    seen = 0
    while found is not None and seen < _FUSED_DEPTH:
        if found.op_type in HEAVY:
            return found.name or ""
        # Of a sum, the operand that is a product of its own is what was fused.
        sources = [value.producer() for value in found.inputs if value is not None]
        found = next((s for s in sources if s is not None and s.op_type in HEAVY), sources[0] if sources else None)
        seen += 1
    return ""


_FUSED_DEPTH = 4  # product, sum, rectifier and one more at most


def _reason(protected: bool | None, backend: str, operator: str) -> str:
    match protected:
        case True:
            return "protected"
        case False:
            return "its input or weight has no quantiser"
        case None:
            return f"quantised, but {backend} runs it as {operator}"
