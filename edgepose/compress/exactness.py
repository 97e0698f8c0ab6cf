"""Is pruning exact? A network is run with channels removed and with their readers at zero, and the outputs compared.

Invariant: a network that is looked at is as it was afterwards, whatever happened.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from edgepose.compress.layers import is_depthwise
from edgepose.compress.plan import PrunedLayer, cut


def inexactness(work: nn.Module, layers: Sequence[PrunedLayer], example: Tensor) -> str:
    """Why removing these channels is not the same as reading zeros from them; empty if it is the same.

    Args:
        work: A copy of the network in evaluation mode; its layers are replaced for a while and put back.
        layers: What is removed.
        example: (1, 3, h, w) noise.
    """
    muted, smaller = {}, {}
    for layer in layers:
        module = work.get_submodule(layer.name)
        smaller[layer.name] = copy.deepcopy(module)
        cut(smaller[layer.name], layer)
        if isinstance(module, (_ConvNd, nn.Linear)) and not is_depthwise(module):
            reader = muted[layer.name] = copy.deepcopy(module)
            reader.weight.data[:, sorted(set(range(layer.in_channels)) - set(layer.kept_in))] = 0
    with replaced(work, muted), torch.no_grad():
        expected = list(tensors(work(example)))
    try:
        with replaced(work, smaller), torch.no_grad():
            found = list(tensors(work(example)))
    except (RuntimeError, ValueError, IndexError) as err:
        return f"without its channels the network does not run: {err}"
    for one, other in zip(expected, found, strict=True):
        if one.shape != other.shape:
            return f"its channels reach the network's output: {tuple(one.shape)} would become {tuple(other.shape)}"
        error = (one.double() - other.double()).abs().max().item()
        limit = 1e-4 * max(one.double().abs().max().item(), 1e-6)
        if not error <= limit:  # so written that NaN is an error too
            return f"outputs that differ by {error:.3g} (tolerance {limit:.3g})"
    return ""


@contextmanager
def replaced(work: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Swaps layers of a network by name, and back afterwards."""
    own = {name: work.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            work.set_submodule(name, layer)
        yield
    finally:
        for name, layer in own.items():
            work.set_submodule(name, layer)


def tensors(outputs: object) -> Iterator[Tensor]:
    """The tensors of a forward pass's result, whatever it is nested in, in order."""
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (tuple, list)):
        for part in outputs:
            yield from tensors(part)
    elif isinstance(outputs, dict):
        yield from tensors(list(outputs.values()))
