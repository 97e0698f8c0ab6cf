"""Which channels of a network have to be removed together, found by torch-pruning's dependency graph.

Invariant: nothing of torch-pruning leaves this file: a group names layers and axes, so that scores, plans and their
replay need only torch. The graph is traced on a copy; the network that was given does not change.

The graph is that of Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgepose.compress.layers import is_depthwise, kind_of
from edgepose.errors import CheckpointError

Side = Literal["in", "out"]


@dataclass(frozen=True, slots=True)
class Member:
    """One axis of one layer that belongs to a group.

    Attributes:
        layer: Name of the layer (`named_modules`).
        side: The axis: input or output channels ("out" for normalisations and depthwise convolutions, which have one).
        channels: Positions on that axis.
        roots: Channel of the group that each position belongs to, same length as `channels`.
        normalised: An affine batch normalisation directly follows this output.
    """

    layer: str
    side: Side
    channels: tuple[int, ...]
    roots: tuple[int, ...]
    normalised: bool = False


@dataclass(frozen=True, slots=True)
class ChannelGroup:
    """Channels that stand or fall together.

    Attributes:
        name: Name of the layer the group was found from.
        size: Number of channels.
        members: All axes that lose entries when a channel of the group is removed.
        obstacle: Why the group cannot be pruned; empty if nothing is known to stand against it.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    obstacle: str = ""


def trace_channel_groups(model: nn.Module, example: Tensor) -> tuple[ChannelGroup, ...]:
    """All groups of coupled channels, in the order in which their first layer is defined.

    Args:
        model: The network.
        example: (N, 3, h, w) input to trace it with.

    Raises:
        CheckpointError: The network cannot be traced (its forward pass leaves autograd).
    """
    traced = copy.deepcopy(model).requires_grad_(True)
    names = {layer: name for name, layer in traced.named_modules()}
    try:
        with torch.enable_grad():
            # A forward function: left to itself, torch-pruning first tries the batch's items as separate arguments.
            graph = tp.DependencyGraph().build_dependency(traced, example, forward_fn=_forward, verbose=False)
    except (AttributeError, RuntimeError, TypeError, ValueError) as err:
        raise CheckpointError(
            f"pruning {type(model).__name__}",
            found=f"a network that cannot be traced ({err})",
            expected="a forward pass over the example that autograd records",
            fix="try the network on the example, and remove no_grad() from its forward()",
        ) from err
    groups = [_group(graph, found, names) for found in graph.get_all_groups()]
    if not groups:
        raise CheckpointError(
            f"pruning {type(model).__name__}",
            found="no channels that autograd knows of",
            expected="outputs that depend on convolutions or linear layers",
            fix="remove detach() and no_grad() from its forward()",
        )
    order = {name: position for position, name in enumerate(names.values())}
    return tuple(sorted(groups, key=lambda group: order[group.name]))


def _forward(model: nn.Module, example: Tensor) -> Any:
    return model(example)


def _group(graph: Any, found: Sequence[Any], names: dict[nn.Module, str]) -> ChannelGroup:
    members: dict[tuple[str, Side], Member] = {}
    obstacle = ""
    for item in found:
        layer = item.dep.target.module
        if layer not in names:
            if isinstance(layer, nn.Parameter):
                obstacle = obstacle or "a bare parameter depends on it"
            continue  # an operation without weights: addition, activation, reshape
        if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
            continue
        obstacle = obstacle or _layer_obstacle(layer, names[layer])
        if kind_of(layer) is None:
            continue
        out = isinstance(layer, _BatchNorm) or is_depthwise(layer) or graph.is_out_channel_pruning_fn(item.dep.handler)
        key: tuple[str, Side] = (names[layer], "out" if out else "in")
        if any(root is None for root in item.root_idxs):
            obstacle = obstacle or f"the channels of {names[layer]} could not be matched to it"
            continue
        normalised = out and any(_is_affine_norm(node.module) for node in item.dep.target.outputs)
        members[key] = Member(*key, tuple(item.idxs), tuple(item.root_idxs), normalised)
    root = found[0].dep.target.module
    return ChannelGroup(names[root], len(found[0].idxs), tuple(members.values()), obstacle)


def _layer_obstacle(layer: nn.Module, name: str) -> str:
    if kind_of(layer) is None:
        return f"{name} is a {type(layer).__name__}"
    if isinstance(layer, _ConvNd) and layer.groups > 1 and not is_depthwise(layer):
        return f"{name} is a grouped convolution"
    return ""


def _is_affine_norm(layer: object) -> bool:
    return isinstance(layer, _BatchNorm) and bool(layer.affine)
