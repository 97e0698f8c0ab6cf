"""Folding what only training needs: parallel branches into one layer, batch normalisation into the layer before it.

Invariant: a folded copy computes the same function in eval mode, up to float rounding; the argument is not changed.

Whatever compresses or exports a network calls one of the two functions here first, so that nobody else has to know
which networks have branches: pruning `fold_branches`, which leaves something to fine-tune, quantisation and export
`fold_batch_norms`, which does both.

Quantisers are calibrated on the folded network on purpose: a normalisation left behind a quantised convolution keeps
ONNX Runtime from forming an integer kernel, and weight ranges only make sense for the weights that are really used.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Protocol, runtime_checkable

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepose.errors import CheckpointError

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


@runtime_checkable
class Branched(Protocol):
    """A block with branches that training needs and one layer can replace."""

    def fold_branches(self) -> nn.Module:
        """A new module, in the block's training mode, that computes the same in eval mode."""


def fold_branches(model: nn.Module) -> nn.Module:
    """A copy of `model`, in the same training mode, in which every `Branched` block is what it folds to.

    The copy can be fine-tuned: its batch normalisations stay. A network without such blocks is just copied.
    """
    folded = copy.deepcopy(model)
    if isinstance(folded, Branched):
        return folded.fold_branches()
    replacements: dict[int, nn.Module] = {}
    for name, part in reversed(list(folded.named_modules(remove_duplicate=False))):  # inner blocks first
        if isinstance(part, Branched):
            if id(part) not in replacements:  # a block that stands in two places stays one
                replacements[id(part)] = part.fold_branches()
            folded.set_submodule(name, replacements[id(part)])
    return folded


def fold_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of `model`, in eval mode, whose branches and batch normalisations are folded.

    A folded normalisation leaves an `nn.Identity` in its place, so module names, and with them the keys of all other
    weights, stay as they were; its layer gains a bias. Normalisations that follow no layer, or a layer that is also
    read elsewhere or used more than once, stay.

    Args:
        model: Any module that torch.fx can trace (no data-dependent control flow).

    Raises:
        CheckpointError: torch.fx cannot trace the module.
    """
    folded = fold_branches(model).eval()
    for layer_name, norm_name in foldable_pairs(folded):
        _fold_pair(folded.get_submodule(layer_name), folded.get_submodule(norm_name))
        parent, _, child = norm_name.rpartition(".")
        setattr(folded.get_submodule(parent), child, nn.Identity())
    return folded


def foldable_pairs(model: nn.Module) -> tuple[tuple[str, str], ...]:
    """Names of (layer, normalisation) that can be folded, in order of execution.

    Raises:
        CheckpointError: torch.fx cannot trace the module.
    """
    graph = trace(model)
    modules = dict(model.named_modules())
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    pairs = []
    for node in graph.nodes:
        if node.op != "call_module" or not isinstance(modules[str(node.target)], _BatchNorm):
            continue
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        layer, norm = modules[str(source.target)], modules[str(node.target)]
        once = calls[str(source.target)] == 1 and calls[str(node.target)] == 1
        if once and isinstance(layer, _FOLDABLE) and norm.running_mean is not None:
            pairs.append((str(source.target), str(node.target)))
    return tuple(pairs)


def trace(model: nn.Module) -> fx.Graph:
    """The graph of a network's forward; every compression goes by it.

    Raises:
        CheckpointError: torch.fx cannot trace the module.
    """
    try:
        return fx.Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as err:
        raise CheckpointError(
            f"tracing {type(model).__name__}",
            found=f"a network that torch.fx cannot trace ({err})",
            expected="no control flow that depends on tensor values",
            fix="move such code out of forward",
        ) from err


@torch.no_grad()
def _fold_pair(layer: nn.Module, norm: nn.Module) -> None:
    """Scales the layer's weights and replaces its bias; computed in float64 so that only the last rounding is left."""
    assert isinstance(layer, _FOLDABLE)
    assert isinstance(norm, _BatchNorm)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight = layer.weight
    gain = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        gain = gain * norm.weight.double()
    shift = -norm.running_mean.double() * gain
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    if layer.bias is not None:
        shift = shift + layer.bias.double() * gain
    layer.weight = nn.Parameter((weight.double() * _along_outputs(layer, gain)).to(weight.dtype))
    layer.bias = nn.Parameter(shift.to(weight.dtype))


def _along_outputs(layer: nn.Module, gain: torch.Tensor) -> torch.Tensor:
    """`gain` (C,) shaped to multiply the layer's weight along its output channels."""
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return gain.reshape(-1, *[1] * (layer.weight.dim() - 1))  # type: ignore[operator]
    # Transposed weights are (inputs, outputs / groups, …), the inputs sorted by group.
    per_group = gain.reshape(layer.groups, 1, -1)
    expanded = per_group.expand(layer.groups, layer.weight.shape[0] // layer.groups, -1)
    return expanded.reshape(layer.weight.shape[0], -1, *[1] * (layer.weight.dim() - 2))
