"""How much each channel of a group matters, by six criteria.

Invariant: a score is non-negative, float64, one per channel of the group, and scores of different groups can be ranked
together: "taylor" speaks of the loss everywhere, the others have no common unit and get mean 1 over each group (unless
all are zero). Equal inputs give equal scores.

torch-pruning has estimators of its own; these replace them because its FPGM measures distances between *squared*
weights and its Taylor score passes over batch normalisation, where the signal is.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepose.compress.channel_groups import ChannelGroup, Member
from edgepose.compress.layers import is_depthwise, kind_of, widths
from edgepose.errors import RecipeError
from edgepose.recipe import Importance

Losses = Callable[[nn.Module], Iterable[Tensor]]
"""Given a network, yields one scalar training loss per batch, fresh from its forward pass."""


def channel_scores(
    model: nn.Module,
    group: ChannelGroup,
    importance: Importance,
    *,
    gates: Mapping[str, Tensor],
    seed: int,
) -> Tensor:
    """Scores of all channels of `group`.

    Args:
        model: The network the group was traced from.
        group: Coupled channels.
        importance: The criterion.
        gates: What `gate_products` returned; read by "taylor" only.
        seed: Seed of "random"; read by that one only.

    Returns:
        (group.size,) float64; the lowest go first.
    """
    match importance:
        case "l1":
            scores = _weight_norm(model, group, power=1)
        case "l2":
            scores = _weight_norm(model, group, power=2).sqrt()
        case "bn_scale":
            scores = _norm_scale(model, group)
        case "taylor":
            return _taylor(group, gates)
        case "fpgm":
            scores = _geometric_median(model, group)
        case "random":
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(group.name.encode()))
            scores = torch.rand(group.size, generator=generator, dtype=torch.float64)
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def gate_products(model: nn.Module, losses: Losses) -> dict[str, Tensor]:
    """For every layer, the first-order change of each batch's loss when one of its output channels is shut.

    The derivative by a gate on a channel is the sum of gradient x parameter over what produces the channel: weight and
    bias of a batch normalisation, or the filter and bias of a convolution or linear layer.

    Args:
        model: The network; the losses run on a copy of it, in evaluation mode unless they change that.
        losses: Yields one scalar loss per batch.

    Returns:
        By layer name: (batches, channels) float64.

    Raises:
        RecipeError: There was no batch, or a loss is not finite.
    """
    scored = copy.deepcopy(model).requires_grad_(True).eval()
    layers = {name: layer for name, layer in scored.named_modules() if kind_of(layer) is not None}
    products: dict[str, list[Tensor]] = {name: [] for name in layers}
    with torch.enable_grad():
        for batch, loss in enumerate(losses(scored)):
            if not bool(torch.isfinite(loss)):
                raise RecipeError(f"prune.importance: taylor: batch {batch}", found=f"a loss of {loss.item()}")
            scored.zero_grad(set_to_none=True)
            loss.backward()
            for name, layer in layers.items():
                products[name].append(_gate_product(layer))
    if not any(products.values()):
        raise RecipeError(
            "prune.importance: taylor",
            found="no batch to take gradients from",
            expected="losses of at least one training batch",
            fix="hand over training data, or choose l1, l2, bn_scale or fpgm",
        )
    return {name: torch.stack(rows) for name, rows in products.items()}


def _gate_product(layer: nn.Module) -> Tensor:
    """Sum of gradient x parameter per output channel: (channels,) float64 on the CPU; zeros where nothing arrived."""
    weight, bias = layer.weight, layer.bias
    total = torch.zeros(widths(layer)[1], dtype=torch.float64)
    for parameter in (weight, bias):
        if isinstance(parameter, Tensor):
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            total = total + (gradient * parameter).detach().double().cpu().reshape(parameter.shape[0], -1).sum(1)
    return total


def _weight_norm(model: nn.Module, group: ChannelGroup, *, power: int) -> Tensor:
    """Sum of |w|^power over every weight that goes with a channel, on both of its sides.

    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, summed over coupled layers as in DepGraph.
    """
    scores = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if not isinstance(layer, _BatchNorm):
            scores.index_add_(0, torch.tensor(member.roots), _rows(layer, member).abs().pow(power).sum(1))
    return scores


def _norm_scale(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Sum of |gamma| of the batch normalisations on a channel; the L2 norm of its weights where there is none.

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    scores = torch.zeros(group.size, dtype=torch.float64)
    found = False
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if isinstance(layer, _BatchNorm) and layer.affine:
            found = True
            scale = layer.weight.detach().double().cpu()[list(member.channels)].abs()
            scores.index_add_(0, torch.tensor(member.roots), scale)
    return scores if found else _weight_norm(model, group, power=2).sqrt()


def _taylor(group: ChannelGroup, gates: Mapping[str, Tensor]) -> Tensor:
    """Mean over batches of the squared first-order change of the loss when the channel is shut.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, with gates behind the batch
    normalisation: a convolution in front of one is scale-free, its own sum of gradient x weight says nothing.
    """
    batches = next(iter(gates.values())).shape[0]
    change = torch.zeros(group.size, batches, dtype=torch.float64)
    for member in group.members:
        if member.side == "out" and not member.normalised:
            change.index_add_(0, torch.tensor(member.roots), gates[member.layer][:, list(member.channels)].T)
    return change.square().mean(1)


def _geometric_median(model: nn.Module, group: ChannelGroup) -> Tensor:
    """Sum of distances of a filter to all other filters of its layer, each coupled layer with the same say.

    He et al., "Filter Pruning via Geometric Median", CVPR 2019: a filter close to the others is replaceable.
    """
    scores = torch.zeros(group.size, dtype=torch.float64)
    for member in group.members:
        layer = model.get_submodule(member.layer)
        if member.side == "out" and not isinstance(layer, _BatchNorm):
            filters = _rows(layer, member)
            distances = torch.cdist(filters, filters, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
            mean = distances.mean()
            scores.index_add_(0, torch.tensor(member.roots), distances / mean if mean > 0 else distances)
    return scores


def _rows(layer: nn.Module, member: Member) -> Tensor:
    """The weights that go with each of the member's channels: (channels, weights) float64 on the CPU."""
    weight = layer.weight
    assert isinstance(weight, Tensor)  # narrows the type: `kind_of` lets only layers with weights in
    weight = weight.detach().double().cpu()
    if member.side == "in" and not is_depthwise(layer):
        weight = weight.transpose(0, 1)
    return weight[list(member.channels)].flatten(1)
