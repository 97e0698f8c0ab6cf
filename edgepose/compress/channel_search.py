"""How many channels each group keeps, so that the network loses a given fraction of its multiply-accumulates.

Invariant: counts fall monotonically from step to step of the search, so bisection finds the nearest there is; a count
that changes is a multiple of the budget's `round_to` and respects its floors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgepose.compress.channel_groups import ChannelGroup, Side
from edgepose.compress.layers import is_depthwise, widths
from edgepose.compress.macs import Macs
from edgepose.errors import RecipeError
from edgepose.recipe import Scope

_UNIFORM_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Budget:
    """How much goes, and how little a group may keep.

    Attributes:
        ratio: Fraction of the multiply-accumulates to remove; the nearest reachable one is taken, and at least one step
            if it is not 0 and nothing is gone already.
        scope: "global" removes the lowest scores of all groups, "uniform" the same fraction of each group.
        round_to: A count that changes becomes a multiple of this.
        min_channels: Fewest channels.
        max_layer_ratio: Largest fraction of its channels that a group may lose.
        fixed: Channels that groups, by name, keep whatever the search finds for the others.
        whole: Multiply-accumulates that `ratio` speaks of, where some are gone already; 0 for those of the network.
    """

    ratio: float
    scope: Scope
    round_to: int
    min_channels: int
    max_layer_ratio: float
    fixed: Mapping[str, int] = field(default_factory=dict)
    whole: int = 0

    def floor(self, size: int) -> int:
        """Fewest channels that a group of `size` may keep."""
        # The slack forgives binary fractions: 1 - 0.7 of 10 is 3.0000000000000004.
        least = max(self.min_channels, math.ceil(size * (1 - self.max_layer_ratio) - 1e-9))
        return min(size, math.ceil(least / self.round_to) * self.round_to)

    def permitted(self, size: int, wanted: float) -> int:
        """The permitted count nearest to `wanted` (halves up), for a group of `size`."""
        nearest = math.floor(wanted / self.round_to + 0.5) * self.round_to
        return min(size, max(self.floor(size), nearest))


def choose_kept(
    model: nn.Module,
    groups: Sequence[ChannelGroup],
    scores: Sequence[Tensor],
    macs: Macs,
    budget: Budget,
) -> list[int]:
    """Channels that each group keeps.

    Args:
        model: The full network.
        groups: Its prunable groups.
        scores: (size,) importance of the channels of each group; compared between groups by scope "global" only.
        macs: Multiply-accumulates of the full network.
        budget: How much of them to remove, within which limits.

    Returns:
        One count per group.

    Raises:
        RecipeError: The limits do not let that much be removed.
    """
    free = [place for place, group in enumerate(groups) if group.name not in budget.fixed]
    searched = [groups[place] for place in free]
    ranked = [scores[place] for place in free]
    steps, free_at = _uniform(searched, budget) if budget.scope == "uniform" else _ranked(searched, ranked, budget)

    def kept_at(step: int) -> list[int]:
        found = iter(free_at(step))
        return [budget.fixed[group.name] if group.name in budget.fixed else next(found) for group in groups]

    def removed_at(step: int) -> float:
        return 1 - _macs_left(model, groups, kept_at(step), macs) / max(budget.whole or macs.total, 1)

    ratio = budget.ratio
    if ratio == 0 or removed_at(0) >= ratio:
        return kept_at(0)
    most = removed_at(steps)
    if most < ratio:
        raise RecipeError(
            "prune.ratio",
            found=f"{ratio:g}",
            expected=f"at most {math.floor(most * 1000) / 1000:g}, which is all that can be removed here",
            fix="lower ratio, round_to or min_channels, raise max_layer_ratio, or protect fewer layers",
        )
    low, high = 0, steps  # removed_at(low) < ratio <= removed_at(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if removed_at(middle) >= ratio else (middle, high)
    below = removed_at(low)
    return kept_at(low if below > 0 and ratio - below < removed_at(high) - ratio else high)


def macs_per_channel(model: nn.Module, group: ChannelGroup, macs: Macs) -> float:
    """Multiply-accumulates that go with one channel of `group` while all other channels stay."""
    shares = (
        macs.layers[member.layer]
        * len(member.channels)
        / widths(model.get_submodule(member.layer))[member.side == "out"]
        for member in group.members
        if member.layer in macs.layers
    )
    return sum(shares) / group.size


def _uniform(groups: Sequence[ChannelGroup], budget: Budget) -> tuple[int, Callable[[int], list[int]]]:
    def kept_at(step: int) -> list[int]:
        return [budget.permitted(g.size, g.size * (1 - step / _UNIFORM_STEPS)) if step else g.size for g in groups]

    return _UNIFORM_STEPS, kept_at


def _ranked(
    groups: Sequence[ChannelGroup], scores: Sequence[Tensor], budget: Budget
) -> tuple[int, Callable[[int], list[int]]]:
    owners = torch.cat([torch.full((g.size,), i) for i, g in enumerate(groups)]) if groups else torch.zeros(0)
    order = torch.argsort(torch.cat(list(scores)), stable=True) if groups else torch.zeros(0, dtype=torch.int64)
    ranked = owners[order].long()

    def kept_at(step: int) -> list[int]:
        gone = torch.bincount(ranked[:step], minlength=len(groups)).tolist()
        return [
            budget.permitted(g.size, g.size - without) if without else g.size
            for g, without in zip(groups, gone, strict=True)
        ]

    return len(ranked), kept_at


def _macs_left(model: nn.Module, groups: Sequence[ChannelGroup], kept: Sequence[int], macs: Macs) -> float:
    """Multiply-accumulates when every group keeps so many channels, whichever they are."""
    removed: dict[tuple[str, Side], float] = {}
    for group, count in zip(groups, kept, strict=True):
        for member in group.members:
            share = len(member.channels) * (1 - count / group.size)
            removed[member.layer, member.side] = removed.get((member.layer, member.side), 0.0) + share
    left = 0.0
    for name, full in macs.layers.items():
        layer = model.get_submodule(name)
        inputs, outputs = widths(layer)
        share = 1 - removed.get((name, "out"), 0.0) / outputs
        if not is_depthwise(layer):
            share *= 1 - removed.get((name, "in"), 0.0) / inputs
        left += full * share
    return left
