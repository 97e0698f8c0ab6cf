"""Structured pruning of blocks and channels: plan first (JSON), then apply, as often as wanted.

Invariant: planning changes nothing that it is given, and a pruned network computes exactly what the full one does when
the removed channels' readers are set to zero; this is checked before a plan is handed out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import msgspec
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgepose.compress.channel_groups import ChannelGroup, Side, trace_channel_groups
from edgepose.compress.channel_search import Budget, choose_kept, macs_per_channel
from edgepose.compress.depth import choose_blocks
from edgepose.compress.exactness import inexactness
from edgepose.compress.fold import fold_branches
from edgepose.compress.importance import Losses, channel_scores, gate_products
from edgepose.compress.layers import is_depthwise, kind_of, widths
from edgepose.compress.macs import Macs, count_macs, evaluation_mode
from edgepose.compress.plan import (
    PLAN_COLUMNS,
    FrozenGroup,
    PruneConfig,
    PrunedLayer,
    PruningPlan,
    RemovedBlock,
    apply_pruning,
    parameter_count,
    plan_from_json,
    plan_rows,
    plan_table,
    plan_to_json,
    resized,
    without_blocks,
)
from edgepose.compress.selection import fixed_counts, protected_layers
from edgepose.compress.sparsity import sparse_candidates
from edgepose.errors import CheckpointError, RecipeError

__all__ = [
    "PLAN_COLUMNS",
    "FrozenGroup",
    "PruneConfig",
    "PrunedLayer",
    "PruningPlan",
    "Ranking",
    "RemovedBlock",
    "apply_pruning",
    "check_exact",
    "kept_at",
    "plan_at",
    "plan_from_json",
    "plan_pruning",
    "plan_rows",
    "plan_table",
    "plan_to_json",
    "rank_channels",
    "reestimate_batch_norm",
]


def plan_pruning(
    model: nn.Module, example: Tensor, config: PruneConfig, *, losses: Losses | None = None
) -> PruningPlan:
    """Choose the channels to keep.

    Args:
        model: The trained network; it is not changed. Branches that fold before export are folded before planning.
        example: (N, 3, h, w) float input of the size the network is used at; its values do not matter.
        config: What to remove.
        losses: For importance "taylor" and for `config.depth`, and called for these only: given a network, yields one
            training loss per batch, of the same people every time.

    Returns:
        The plan, checked: the pruned network runs, keeps its output shapes, and equals the full network with the
        readers of the removed channels set to zero.

    Raises:
        RecipeError: The configuration is out of range, matches no layer, or asks for more than can be removed.
        CheckpointError: The network cannot be traced, or pruning it as planned would not be exact.
    """
    ranking = rank_channels(model, example, config, losses=losses)
    return plan_at(ranking, ranking.config.ratio)


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """A network whose channels are ranked, so that plans of any ratio follow without differentiating it again.

    Attributes:
        full: The network with its branches folded.
        blocks: Residual blocks that go.
        whole: Multiply-accumulates of the full network.
        model: The full network without these blocks.
        work: A copy of it in evaluation mode, for trials.
        example: (1, 3, h, w) noise.
        config: What the channels were ranked by; its ratio counts for nothing here.
        groups: Coupled channels that may go.
        frozen: Coupled channels that stay.
        macs: Multiply-accumulates of `model`.
        scores: (size,) importance of the channels of each group.
        fixed: Channels that groups keep, by name, at every ratio.
    """

    full: nn.Module
    blocks: tuple[RemovedBlock, ...]
    whole: int
    model: nn.Module
    work: nn.Module
    example: Tensor
    config: PruneConfig
    groups: tuple[ChannelGroup, ...]
    frozen: tuple[FrozenGroup, ...]
    macs: Macs
    scores: tuple[Tensor, ...]
    fixed: Mapping[str, int]


def rank_channels(model: nn.Module, example: Tensor, config: PruneConfig, *, losses: Losses | None = None) -> Ranking:
    """Find and rank the channels of a network; arguments and errors as of `plan_pruning`, whatever the ratio."""
    config = _checked(config)
    example = _probe(example)
    full = fold_branches(model)
    blocks = _blocks(full, example, config, losses)
    model = without_blocks(full, [block.name for block in blocks])
    gates = _gates(model, config, losses)
    work = copy.deepcopy(model).eval()
    groups, frozen = _prunable_groups(work, example, config)
    fixed = fixed_counts(model, groups, frozen, config)
    macs = count_macs(work, example)
    scores = [channel_scores(work, g, config.importance, gates=gates, seed=config.seed) for g in groups]
    if (
        config.importance == "taylor"
    ):  # what matters is the loss per multiply-accumulate: the rank of a knapsack's items
        scores = [s / macs_per_channel(work, g, macs) for g, s in zip(groups, scores, strict=True)]
    whole = macs.total + sum(block.macs for block in blocks)
    return Ranking(full, blocks, whole, model, work, example, config, tuple(groups), frozen, macs, tuple(scores), fixed)


def kept_at(ranking: Ranking, ratio: float) -> tuple[int, ...]:
    """Channels that each group keeps when that fraction of the multiply-accumulates goes: a shape, in a moment.

    Raises:
        RecipeError: So much cannot be removed.
    """
    config = ranking.config
    budget = Budget(
        ratio, config.scope, config.round_to, config.min_channels, config.max_layer_ratio, ranking.fixed, ranking.whole
    )
    return tuple(choose_kept(ranking.work, ranking.groups, ranking.scores, ranking.macs, budget))


def plan_at(ranking: Ranking, ratio: float) -> PruningPlan:
    """The plan that removes a fraction of the multiply-accumulates, checked as by `plan_pruning`.

    Raises:
        RecipeError: So much cannot be removed.
        CheckpointError: Pruning as planned would not be exact.
    """
    config, model, work, example = ranking.config, ranking.model, ranking.work, ranking.example
    groups, macs = ranking.groups, ranking.macs
    gone = {
        group.name: torch.argsort(score, stable=True)[: group.size - kept].tolist()
        for group, score, kept in zip(groups, ranking.scores, kept_at(ranking, ratio), strict=True)
    }
    layers = _layers(model, groups, gone)
    fault = inexactness(work, layers, example)
    if fault:
        raise CheckpointError(
            f"pruning {type(model).__name__}: postcondition",
            found=fault,
            expected="a network that equals the full one without the readers of the removed channels",
            fix="protect the layers at fault (prune.protected)",
        )
    pruned = resized(model, layers)
    macs_after = count_macs(pruned, example)
    return PruningPlan(
        architecture=type(model).__name__,
        input_shape=tuple(example.shape),
        config=msgspec.structs.replace(config, ratio=ratio),
        layers=tuple(
            msgspec.structs.replace(
                layer, macs_before=macs.layers.get(layer.name, 0), macs_after=macs_after.layers.get(layer.name, 0)
            )
            for layer in layers
        ),
        frozen=ranking.frozen,
        macs_before=ranking.whole,
        macs_after=macs_after.total,
        params_before=parameter_count(ranking.full),
        params_after=parameter_count(pruned),
        made_with=f"torch-pruning {version('torch-pruning')}",
        blocks=ranking.blocks,
        sparse=_sparse_layers(pruned, config),
    )


def check_exact(model: nn.Module, plan: PruningPlan) -> None:
    """Check that a plan, which people may have changed, removes from every layer what its neighbours do without.

    Args:
        model: A network of the planned architecture (`apply_pruning` checks that); it is not changed.
        plan: The plan.

    Raises:
        CheckpointError: The pruned network would not compute what the full one does without the readers of the removed
            channels.
    """
    work = without_blocks(fold_branches(model), [block.name for block in plan.blocks]).eval()
    fault = inexactness(work, plan.layers, _probe(torch.zeros(plan.input_shape)))
    if fault:
        raise CheckpointError(
            f"pruning plan of {plan.architecture}",
            found=fault,
            expected="of every layer those inputs to stay that the layers before it keep",
            fix="make the plan again, and change it by its settings only",
        )


def prunable_groups(
    model: nn.Module, example: Tensor, config: PruneConfig
) -> tuple[tuple[ChannelGroup, ...], tuple[FrozenGroup, ...]]:
    """Groups of coupled channels that may lose some, and the others with the reason why they may not.

    Args:
        model: The network; it is not changed, and its branches are taken as they are.
        example: (N, 3, h, w) float input of the size the network is used at; its values do not matter.
        config: Says which layers are protected.

    Raises:
        RecipeError: A pattern of `config.protected` matches nothing.
        CheckpointError: The network cannot be traced.
    """
    prunable, frozen = _prunable_groups(copy.deepcopy(model).eval(), _probe(example), config)
    return tuple(prunable), frozen


def reestimate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Replace the running statistics of all batch normalisations by those of `batches`, in place.

    Removing channels shifts what the later layers see; this repairs the statistics without training.

    Args:
        model: The network; only running means and variances change, its training mode does not.
        batches: (N, 3, h, w) normalised inputs of the training split; every batch has the same say.

    Returns:
        How many batches there were.

    Raises:
        RecipeError: There was no batch; the statistics are as they were.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    count = 0
    try:
        with evaluation_mode(model), torch.no_grad():
            for images in batches:
                if count == 0:
                    for norm in norms:
                        norm.reset_running_stats()
                        norm.momentum = None  # cumulative average instead of an exponential one
                        norm.train()
                model(images)
                count += 1
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    if count == 0:
        raise RecipeError("re-estimating batch normalisation", found="no batch", expected="at least one")
    return count


def _checked(config: PruneConfig) -> PruneConfig:
    """The constructor of a struct checks nothing; reading it back does."""
    try:
        return msgspec.convert(msgspec.to_builtins(config), PruneConfig)
    except msgspec.ValidationError as err:
        raise RecipeError("prune", found=str(err), fix="correct the recipe's prune section") from err


def _probe(example: Tensor) -> Tensor:
    """Noise of the example's size: on a blank image a network may be silent, and any pruning of it would look exact."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn((1, *example.shape[1:]), generator=generator).to(example)


def _blocks(model: nn.Module, example: Tensor, config: PruneConfig, losses: Losses | None) -> tuple[RemovedBlock, ...]:
    if config.depth == 0:
        return ()
    if losses is None:
        raise RecipeError(
            "prune.depth",
            found=f"{config.depth} without training losses",
            expected="a callable that yields them",
            fix="hand over training data, or leave depth out",
        )
    protected = protected_layers(model, config.protected)
    return choose_blocks(model, example, config.depth, losses, protected)


def _sparse_layers(pruned: nn.Module, config: PruneConfig) -> tuple[str, ...]:
    if config.pattern is None:
        return ()
    layers = sparse_candidates(pruned, config.protected)
    if not layers:
        raise RecipeError(
            "prune.pattern",
            found=f"{config.pattern} for a network without a layer that can have it",
            expected="convolutions or linear layers whose input channels come in fours",
            fix="protect fewer layers, or leave pattern out",
        )
    return layers


def _gates(model: nn.Module, config: PruneConfig, losses: Losses | None) -> dict[str, Tensor]:
    if config.importance != "taylor":
        return {}
    if losses is None:
        raise RecipeError(
            "prune.importance",
            found="taylor without training losses",
            expected="a callable that yields them",
            fix="hand over training data, or choose l1, l2, bn_scale or fpgm",
        )
    return gate_products(model, losses)


def _prunable_groups(
    work: nn.Module, example: Tensor, config: PruneConfig
) -> tuple[list[ChannelGroup], tuple[FrozenGroup, ...]]:
    """Groups that may lose channels, and the others with the reason.

    Whether a group can lose channels is tried, not guessed: one channel is removed and the network run. This finds the
    network's outputs, and every place where the graph couples what does not belong together (a flattened map, say).
    """
    protected = protected_layers(work, config.protected)
    prunable, frozen = [], []
    for group in trace_channel_groups(work, example):
        guarded = [m.layer for m in group.members if m.side == "out" and m.layer in protected]
        reason = group.obstacle
        if guarded:
            reason = f"{guarded[0]} is protected by {protected[guarded[0]]!r}"
        elif not reason and group.size == 1:
            reason = "it has a single channel"
        elif not reason:
            reason = inexactness(work, _layers(work, [group], {group.name: [0]}), example)
        if reason:
            frozen.append(FrozenGroup(group.name, group.size, reason))
        else:
            prunable.append(group)
    return prunable, tuple(frozen)


def _layers(model: nn.Module, groups: Sequence[ChannelGroup], gone: dict[str, list[int]]) -> tuple[PrunedLayer, ...]:
    """What becomes of every layer when the channels `gone` (by group name) are removed."""
    removed: dict[tuple[str, Side], set[int]] = {}
    for group in groups:
        roots = set(gone[group.name])
        for member in group.members:
            channels = {c for c, root in zip(member.channels, member.roots, strict=True) if root in roots}
            removed.setdefault((member.layer, member.side), set()).update(channels)
    layers = []
    for name, layer in model.named_modules():
        kind = kind_of(layer)
        without_out = removed.get((name, "out"), set())
        one_sided = isinstance(layer, _BatchNorm) or is_depthwise(layer)
        without_in = without_out if one_sided else removed.get((name, "in"), set())
        if kind is not None and (without_in or without_out):
            inputs, outputs = widths(layer)
            kept_in = tuple(c for c in range(inputs) if c not in without_in)
            kept = tuple(c for c in range(outputs) if c not in without_out)
            layers.append(PrunedLayer(name, kind, inputs, kept_in, outputs, kept))
    return tuple(layers)
