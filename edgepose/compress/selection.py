"""Layers that a recipe names by shell pattern: protected ones, and those with a ratio of their own.

Invariant: a pattern that matches nothing, or changes nothing, is an error with a suggestion, never passed over.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from edgepose.compress.channel_groups import ChannelGroup
from edgepose.compress.channel_search import Budget
from edgepose.compress.layers import kind_of
from edgepose.compress.plan import FrozenGroup, PruneConfig
from edgepose.errors import RecipeError


def matching_layers(model: nn.Module, pattern: str, where: str) -> tuple[str, ...]:
    """Names of the layers that a pattern matches, in order of definition.

    Args:
        model: The network.
        pattern: Shell pattern of layer names.
        where: The field that it stands in.

    Raises:
        RecipeError: There are none; the nearest name is suggested.
    """
    names = [name for name, layer in model.named_modules() if kind_of(layer) is not None]
    matched = tuple(name for name in names if fnmatchcase(name, pattern))
    if not matched:
        near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
        raise RecipeError(
            where,
            found=f"{pattern!r}, which matches no layer",
            expected="shell patterns of layer names",
            fix=f"did you mean {near[0]!r}?" if near else "remove it: the network has no such layers",
        )
    return matched


def protected_layers(model: nn.Module, patterns: Sequence[str]) -> dict[str, str]:
    """Layers whose outputs are to stay, each with the pattern that says so."""
    protected: dict[str, str] = {}
    for pattern in patterns:
        protected.update(dict.fromkeys(matching_layers(model, pattern, "prune.protected"), pattern))
    return protected


def fixed_counts(
    model: nn.Module, groups: Sequence[ChannelGroup], frozen: Sequence[FrozenGroup], config: PruneConfig
) -> dict[str, int]:
    """Channels that groups keep because `config.ratios` speaks of one of their layers, by the group's name.

    Args:
        model: The network.
        groups: Coupled channels that may go.
        frozen: Those that may not.
        config: Has the ratios and the limits.

    Raises:
        RecipeError: A pattern matches no layer, none that can be narrowed, or would remove nothing; or two patterns ask
            for different things of layers that can only be narrowed together.
    """
    asked: dict[str, tuple[str, float]] = {}
    counts: dict[str, int] = {}
    budget = Budget(0, config.scope, config.round_to, config.min_channels, 1)
    for pattern, ratio in config.ratios.items():
        matched = set(matching_layers(model, pattern, "prune.ratios"))
        meant = [group for group in groups if any(m.layer in matched for m in group.members if m.side == "out")]
        if not meant:
            raise _immovable(pattern, matched, frozen)
        for group in meant:
            other = asked.setdefault(group.name, (pattern, ratio))
            if other[1] != ratio:
                raise _contradiction(group, other, (pattern, ratio))
            counts[group.name] = budget.permitted(group.size, group.size * (1 - ratio)) if ratio else group.size
        if ratio > 0 and all(counts[group.name] == group.size for group in meant):
            sizes = ", ".join(sorted({str(group.size) for group in meant}))
            raise RecipeError(
                f"prune.ratios: {pattern!r}",
                found=f"{ratio:g} of {sizes} channels, which is nothing in steps of {config.round_to} with at least "
                f"{config.min_channels} left",
                expected="a ratio that removes at least one step",
                fix="raise it, lower round_to or min_channels, or remove the pattern",
            )
    return counts


def _immovable(pattern: str, matched: set[str], frozen: Sequence[FrozenGroup]) -> RecipeError:
    reasons: Mapping[str, str] = {group.name: group.reason for group in frozen}
    reason = next((reasons[name] for name in sorted(matched) if name in reasons), "they are tied to layers that stay")
    return RecipeError(
        f"prune.ratios: {pattern!r}",
        found=f"only layers that cannot be narrowed ({min(matched)}: {reason})",
        expected="a layer that can lose output channels",
        fix="remove the pattern, or protect fewer layers",
    )


def _contradiction(group: ChannelGroup, one: tuple[str, float], other: tuple[str, float]) -> RecipeError:
    return RecipeError(
        f"prune.ratios: {other[0]!r}",
        found=f"{other[1]:g}, and {one[1]:g} by {one[0]!r}, for layers that are narrowed together with {group.name}",
        expected="one ratio for coupled layers",
        fix="give both patterns the same ratio",
    )
