"""A quantised network taken apart, so that every layer can be compared by itself.

Invariant: each layer is fed with torch's own codes, so that no rounding of an earlier layer reaches it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor, nn

from edgepose.compress.hooks import hooks_of
from edgepose.export.first_difference import Place
from tests.export.networks import Exported

Arrays = dict[str, NDArray[np.float32]]


def take_apart(quantised: Path, places: Sequence[Place], codes: Arrays, out: Path) -> None:
    """Writes a copy of a quantised network in which every reader of codes reads an input of its own.

    "<value>_feed" are inputs, of the shapes of `codes`; the values themselves are outputs of the copy.
    """
    model = onnx.load(quantised)
    graph = model.graph
    made = {value: node for node in graph.node for value in node.output}
    finals = [value.name for value in graph.output]
    copies = []
    for place in places:
        chain = [made[place.value]]
        while chain[-1].op_type != "QuantizeLinear":  # a rectifier on the codes may stand between
            chain.append(made[chain[-1].input[0]])
        source = f"{place.value}_feed"
        for number, node in enumerate(reversed(chain)):
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            copy.name, copy.input[0] = f"{node.name}_{place.value}_fed", source
            source = copy.output[0] = f"{place.value}_fed{number}"
            copies.append(copy)
        for node in graph.node:
            for port, value in enumerate(node.input):
                if value == place.value:
                    node.input[port] = source
    graph.node.extend(copies)
    for place in places:
        shape = ["batch", *codes[place.value].shape[1:]]
        graph.input.append(helper.make_tensor_value_info(f"{place.value}_feed", TensorProto.FLOAT, shape))
        if place.value not in finals:
            graph.output.append(helper.make_empty_tensor_value_info(place.value))
    ordered = _sorted(list(graph.node), {value.name for value in (*graph.input, *graph.initializer)})
    del graph.node[:]
    graph.node.extend(ordered)
    del graph.value_info[:]
    onnx.save(model, out)


def torch_codes(exported: Exported, places: Sequence[Place], images: NDArray[np.float32]) -> tuple[Arrays, Arrays]:
    """Dequantised codes behind every quantiser of the fake-quantised network, and its outputs, by ONNX name."""
    hooks = hooks_of(exported.fake_quantised)
    sharing = defaultdict(list)  # one quantiser may stand in several places: it is called in their order
    for place in places:
        sharing[id(hooks[place.key])].append(place.value)
    seen: Arrays = {}

    def keep(quantiser: nn.Module, _inputs: object, value: Tensor) -> None:
        seen[sharing[id(quantiser)].pop(0)] = value.numpy()

    quantisers = {id(hooks[place.key]): hooks[place.key] for place in places}
    handles = [quantiser.register_forward_hook(keep) for quantiser in quantisers.values()]
    with torch.no_grad():
        outputs = exported.fake_quantised(torch.from_numpy(images))
    for handle in handles:
        handle.remove()
    names = [output.name for output in exported.spec.outputs]
    return seen, {name: value.numpy() for name, value in zip(names, outputs, strict=True)}


def feeds_of(codes: Mapping[str, NDArray[np.float32]], images: NDArray[np.float32]) -> Arrays:
    return {"image": images, **{f"{value}_feed": array for value, array in codes.items()}}


def _sorted(nodes: list[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    """In order of execution, as ONNX wants it."""
    found, known = [], {*known, ""}
    while nodes:
        ready = [node for node in nodes if known.issuperset(node.input)]
        assert ready, "the graph has a cycle"
        for node in ready:
            known.update(node.output)
        nodes = [node for node in nodes if not known.issuperset(node.output)]
        found += ready
    return found
