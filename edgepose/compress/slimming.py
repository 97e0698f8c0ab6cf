"""Sparse training: a penalty that makes channels small where pruning could take them.

Invariant: a penalised channel is one that pruning may remove, all that is coupled with it included; protected layers
and the network's outputs are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepose.compress.channel_groups import ChannelGroup, Member
from edgepose.compress.plan import PruneConfig
from edgepose.compress.prune import prunable_groups
from edgepose.errors import UsageError

_ROUND = 1e-8  # keeps the gradient of a channel's length finite at 0


class GroupLasso:
    """The lengths of all channels that pruning could take, added up.

    A channel's length is that of its normalisations' scales: |gamma| where one normalisation has the channel, as in
    network slimming (Liu et al., ICCV 2017), and the root of their squares where several are coupled, so that all of
    them go to zero together (Yuan & Lin, 2006). Channels that nobody normalises are measured by the weights that make
    them.

    Args:
        model: The network that is trained; the penalty reads its parameters as they change.
        example: (N, 3, h, w) float input of the network's size; its values do not matter.
        dense: Shell patterns of layers that are left alone.

    Raises:
        UsageError: No channel of the network can be pruned.
        RecipeError: A pattern matches no layer.
    """

    def __init__(self, model: nn.Module, example: Tensor, dense: Sequence[str] = ()) -> None:
        groups, frozen = prunable_groups(model, example, PruneConfig(ratio=0, protected=tuple(dense)))
        if not groups:
            raise UsageError(
                "training: sparsity",
                found=f"a {type(model).__name__} none of whose channels can be pruned ({frozen[0].reason})",
                expected="channels for the penalty to make small",
                fix="set sparsity to 0",
            )
        self.channels = sum(group.size for group in groups)
        self._groups = [_Lengths(model, group) for group in groups]

    def __call__(self) -> Tensor:
        """The penalty now: a scalar with gradients."""
        return torch.stack([lengths().sum() for lengths in self._groups]).sum()


class _Lengths:
    """The lengths of one group's channels."""

    def __init__(self, model: nn.Module, group: ChannelGroup) -> None:
        self._size = group.size
        own = [member for member in group.members if member.side == "out"]
        scales = [member for member in own if _is_affine(model.get_submodule(member.layer))]
        chosen = scales or [m for m in own if not isinstance(model.get_submodule(m.layer), _BatchNorm)]
        self._parts = [_part(model, member) for member in chosen]

    def __call__(self) -> Tensor:
        """(size,) float32."""
        squares = torch.zeros(self._size)
        for parameter, channels, roots in self._parts:
            rows = parameter[channels].float().reshape(len(channels), -1)
            squares = squares.index_add(0, roots, rows.square().sum(1))
        return (squares + _ROUND**2).sqrt()


def _part(model: nn.Module, member: Member) -> tuple[Tensor, Tensor, Tensor]:
    """A parameter, which of its rows go with the member's channels, and the group's channel of each."""
    parameter = cast("Tensor", model.get_submodule(member.layer).weight)
    return parameter, torch.tensor(member.channels), torch.tensor(member.roots)


def _is_affine(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and bool(layer.affine)
