"""2:4 sparsity: of every four weights along the input channels two are zero, as NVIDIA's sparse tensor cores want it.

Invariant: the zeros are the mask. A layer that once has the pattern keeps it through every step of fine-tuning, through
folding of normalisations (whole output channels are scaled) and through quantisation (zero is code zero), so nothing
beside the weights has to be stored.

Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021. TensorRT looks for the pattern at every output channel
and every kernel position of a convolution, over consecutive input channels, and over the inputs of a matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim.optimizer import register_optimizer_step_post_hook

from edgepose.compress.layers import kind_of, widths
from edgepose.errors import CheckpointError
from edgepose.recipe import GROUP, KEPT


def sparse_candidates(model: nn.Module, protected: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of the layers that the pattern is for, in order of definition.

    Convolutions that are not grouped and linear layers whose input channels come in fours: not the first convolution,
    which reads three colours, and no depthwise one. Layers whose weights are all zero are left out, as nothing in them
    says which to keep.

    Args:
        model: The network.
        protected: Shell patterns of layers that stay dense.
    """
    found = []
    for name, layer in model.named_modules():
        grouped = isinstance(layer, _ConvNd) and layer.groups > 1
        if kind_of(layer) not in ("conv", "linear") or grouped or widths(layer)[0] % GROUP:
            continue
        if any(fnmatchcase(name, pattern) for pattern in protected) or not bool(_weight(layer).any()):
            continue
        found.append(name)
    return tuple(found)


def mask_of(weight: Tensor) -> Tensor:
    """Where the larger two of every four weights along the input channels are; of equals the first.

    Args:
        weight: (outputs, inputs, …), inputs a multiple of 4.

    Returns:
        bool, same shape.
    """
    sizes = weight.detach().abs().movedim(1, -1)
    fours = sizes.reshape(-1, GROUP)
    order = torch.argsort(fours, dim=1, descending=True, stable=True)
    mask = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, order[:, :KEPT], True)
    return mask.reshape(sizes.shape).movedim(-1, 1)


def has_pattern(weight: Tensor) -> bool:
    """Whether at most two of every four weights (outputs, inputs, …) along the inputs are there."""
    if weight.shape[1] % GROUP:
        return False
    return int((weight.detach() != 0).movedim(1, -1).reshape(-1, GROUP).sum(1).max()) <= KEPT


@torch.no_grad()
def sparsify(model: nn.Module, layers: Sequence[str]) -> None:
    """Set the smaller two of every four weights of the named layers to zero, in place."""
    for name in layers:
        weight = _weight(model.get_submodule(name))
        weight.mul_(mask_of(weight))


@contextmanager
def pattern_kept(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """While this lasts, whatever optimiser trains `model` leaves the zeros of the named layers alone.

    Gradients of absent weights are dropped, so that they count in no norm; and as some optimisers mix a matrix's
    entries (Muon), what grew back is removed after every step.

    Args:
        model: The network, fake-quantised or not; its layers have the pattern.
        layers: Their names; none makes this do nothing.

    Raises:
        CheckpointError: A layer does not have the pattern, at the beginning or at the end.
    """
    check_pattern(model, layers)
    masks = [(weight, weight != 0) for weight in (_weight(model.get_submodule(name)) for name in layers)]

    def restore(*_: Any) -> None:
        with torch.no_grad():
            for weight, mask in masks:
                weight.mul_(mask)

    handles = [weight.register_hook(mask.mul) for weight, mask in masks if weight.requires_grad]
    if masks:
        handles.append(register_optimizer_step_post_hook(restore))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    check_pattern(model, layers)


def check_pattern(model: nn.Module, layers: Sequence[str]) -> None:
    """Check that the named layers are 2:4.

    Raises:
        CheckpointError: One is not.
    """
    for name in layers:
        if not has_pattern(_weight(model.get_submodule(name))):
            raise CheckpointError(
                f"2:4 sparsity: {name}",
                found="four consecutive input channels with more than two weights",
                expected="two zeros among them, as its plan says",
                fix="apply the plan again, and fine-tune with pattern_kept",
            )


def _weight(layer: nn.Module) -> nn.Parameter:
    weight = layer.weight
    assert isinstance(weight, nn.Parameter)  # narrows the type: `kind_of` lets only layers with weights in
    return weight
