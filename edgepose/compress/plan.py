"""The pruning plan: which blocks go, which channels of which layers stay; its JSON, its application, its table.

Invariant: `apply_pruning` needs the plan and a network of the planned architecture and nothing else: no example, no
trained weights, no torch-pruning. So a pruned checkpoint is a plan beside a state dict.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import msgspec
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from edgepose.compress.fold import fold_branches
from edgepose.compress.layers import Kind, is_depthwise, kind_of, widths
from edgepose.compress.sparsity import sparsify
from edgepose.errors import CheckpointError
from edgepose.recipe import GROUP, Importance, Pattern, Scope
from edgepose.spec import PositiveInt

Count = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, lt=1)]


class PruneConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to remove, and what to leave.

    Attributes:
        ratio: Fraction of the network's multiply-accumulates to remove, those that go with `ratios` and `depth`
            included; the nearest that `round_to` permits is taken.
        importance: Criterion by which channels of a group are ranked (see `edgepose.compress.importance`).
        scope: "global" ranks the channels of all groups together, so that unimportant layers become narrower than
            others; "uniform" takes the same fraction of every group. "taylor" is meant for "global": it ranks by the
            loss that a removed multiply-accumulate costs. The other criteria compare groups by convention only.
        round_to: Channel counts of the layers that change are multiples of this; take it from the target.
        min_channels: No group gets narrower than this.
        max_layer_ratio: No group loses more than this fraction of its channels.
        protected: Shell patterns of layers whose outputs keep all channels ("backbone.stem.*"), in addition to the
            network's outputs, which are found by themselves. Blocks with such a layer stay, and it stays dense.
        seed: Seed of importance "random".
        ratios: Shell patterns of layers, each with the fraction of their output channels to remove, whatever `ratio`
            takes elsewhere; 0 keeps them all. Coupled layers are narrowed together. `round_to` and `min_channels`
            hold here, too, `max_layer_ratio` does not.
        depth: Residual blocks to remove before any channels: those without which the training loss grows least.
        pattern: "2:4" also sets two of every four consecutive input channels of a weight to zero, for engines that
            skip them; they are counted nowhere here.
    """

    ratio: Share
    importance: Importance = "l2"
    scope: Scope = "global"
    round_to: PositiveInt = 16
    min_channels: PositiveInt = 8
    max_layer_ratio: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.75
    protected: tuple[str, ...] = ()
    seed: Count = 0
    ratios: dict[str, Share] = {}
    depth: Count = 0
    pattern: Pattern | None = None


class RemovedBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A residual block that goes as a whole: its output is its input.

    Attributes:
        name: Name of the block (`named_modules`).
        macs: Multiply-accumulates that go with it.
        params: Parameters that go with it.
        loss_before: Mean training loss with it, blocks that were chosen before being gone.
        loss_after: Mean training loss without it, before any repair.
    """

    name: str
    macs: Count
    params: Count
    loss_before: float
    loss_after: float


class PrunedLayer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A layer of which some channels go, on either side.

    Attributes:
        name: Name of the layer (`named_modules`).
        kind: What it is.
        in_channels: Input channels of the full layer.
        kept_in: Positions among them that stay, ascending; for batch normalisations and depthwise convolutions, whose
            sides are one, the same as `kept`.
        out_channels: Output channels of the full layer.
        kept: Positions among them that stay, ascending.
        macs_before: Multiply-accumulates of the full layer for one image.
        macs_after: Multiply-accumulates that stay.
    """

    name: str
    kind: Kind
    in_channels: PositiveInt
    kept_in: tuple[Count, ...]
    out_channels: PositiveInt
    kept: tuple[Count, ...]
    macs_before: Count = 0
    macs_after: Count = 0


class FrozenGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Coupled channels that were left alone: the layer they were found from, how many, and why."""

    name: str
    channels: PositiveInt
    reason: str


class PruningPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that is needed to prune a network of one architecture in the same way again.

    Attributes:
        architecture: Class of the network, for people.
        input_shape: Shape of the input that the multiply-accumulates are counted for, batch 1.
        config: What was asked for.
        layers: Every convolution, linear layer and batch normalisation that changes, in order of definition.
            Those of removed blocks are not among them.
        frozen: Groups that could not or should not be pruned.
        macs_before: Multiply-accumulates of the full network.
        macs_after: Multiply-accumulates of the pruned network.
        params_before: Parameters of the full network.
        params_after: Parameters of the pruned network.
        made_with: Name and version of the library whose graph coupled the layers.
        schema: Version of this format.
        blocks: Residual blocks that are removed, in the order in which they were chosen.
        sparse: Layers whose weights become 2:4 sparse, in order of definition.
    """

    architecture: str
    input_shape: tuple[PositiveInt, ...]
    config: PruneConfig
    layers: tuple[PrunedLayer, ...]
    frozen: tuple[FrozenGroup, ...]
    macs_before: Count
    macs_after: Count
    params_before: Count
    params_after: Count
    made_with: str
    schema: Literal[1] = 1
    blocks: tuple[RemovedBlock, ...] = ()
    sparse: tuple[str, ...] = ()


def apply_pruning(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy of `model` without the blocks and channels that the plan removes, its branches folded (`fold_branches`).

    Args:
        model: A network of the planned architecture, trained or fresh, branches folded or not; it is not changed.
        plan: Which channels stay.

    Returns:
        The pruned network, with the weights of the channels that stay (of sparse layers the larger two of every four),
        in the same training mode.

    Raises:
        CheckpointError: The network is not of the planned architecture; the layer that differs is named.
    """
    model = fold_branches(model)
    found = parameter_count(model)
    for block in plan.blocks:
        _check_block(model, block)
    model = without_blocks(model, [block.name for block in plan.blocks])
    for layer in plan.layers:
        _check_layer(model, layer)
    if found != plan.params_before:
        raise CheckpointError(
            f"pruning plan of {plan.architecture}",
            found=f"a {type(model).__name__} of {found:,} parameters",
            expected=f"the {plan.params_before:,} of the network it was planned for",
            fix="build the network with the configuration, head and input size of the planned one",
        )
    pruned = resized(model, plan.layers)
    if parameter_count(pruned) != plan.params_after:
        raise CheckpointError(
            f"pruning plan of {plan.architecture}",
            found=f"{parameter_count(pruned):,} parameters after pruning",
            expected=f"the {plan.params_after:,} that it promises",
            fix="make the plan again",
        )
    _check_sparse(pruned, plan)
    sparsify(pruned, plan.sparse)
    return pruned


def without_blocks(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of `model` in which the named blocks hand on what they are given; all other names stay."""
    shallower = copy.deepcopy(model)
    for name in names:
        shallower.set_submodule(name, nn.Identity())
    return shallower


def plan_to_json(plan: PruningPlan) -> bytes:
    """The plan as JSON, one line per layer; equal plans give equal bytes."""
    fields = msgspec.structs.asdict(plan)
    lines = []
    for name, value in fields.items():
        if isinstance(value, tuple) and value and isinstance(value[0], msgspec.Struct):
            items = b",\n    ".join(msgspec.json.encode(item) for item in value)
            lines.append(b'  "%s": [\n    %s\n  ]' % (name.encode(), items))
        else:
            lines.append(b'  "%s": %s' % (name.encode(), msgspec.json.encode(value)))
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def plan_from_json(content: bytes, *, where: str = "pruning plan") -> PruningPlan:
    """Read a plan.

    Args:
        content: What `plan_to_json` wrote.
        where: Where it comes from, for the error.

    Raises:
        CheckpointError: It is not a plan of this schema.
    """
    try:
        return msgspec.json.decode(content, type=PruningPlan)
    except msgspec.DecodeError as err:
        raise CheckpointError(
            where, found=f"no pruning plan ({err})", expected="JSON of schema 1", fix="make the plan again"
        ) from err


PLAN_COLUMNS = ("layer", "inputs", "kept", "of", "MMAC before", "MMAC after", "removed", "share")


class PlanRow(NamedTuple):
    """A line of a plan's table.

    Attributes:
        layer: Name of a layer or of a removed block, or what else the line is about.
        inputs: Input channels that stay, None where there are none to speak of.
        inputs_of: Input channels of the full layer.
        kept: Output channels that stay.
        of: Output channels of the full layer.
        macs_before: Multiply-accumulates in the full network.
        macs_after: Multiply-accumulates that stay.
        share: Part of the pruned network's multiply-accumulates, 0..1.
    """

    layer: str
    inputs: int | None
    inputs_of: int | None
    kept: int | None
    of: int | None
    macs_before: int
    macs_after: int
    share: float


def plan_rows(plan: PruningPlan) -> tuple[PlanRow, ...]:
    """Removed blocks, every convolution and linear layer that changes, what does not change, and the sum of all."""
    whole = max(plan.macs_after, 1)

    def row(name: str, before: int, after: int, *counts: int) -> PlanRow:
        inputs, inputs_of, kept, of = counts or (None, None, None, None)
        return PlanRow(name, inputs, inputs_of, kept, of, before, after, after / whole)

    rows = [row(f"{block.name} (block removed)", block.macs, 0) for block in plan.blocks]
    for layer in plan.layers:
        if layer.kind != "batch_norm":
            counts = (len(layer.kept_in), layer.in_channels, len(layer.kept), layer.out_channels)
            rows.append(row(layer.name, layer.macs_before, layer.macs_after, *counts))
    rest = plan.macs_before - sum(r.macs_before for r in rows)
    rows.append(row("layers that stay as they are", rest, plan.macs_after - sum(r.macs_after for r in rows)))
    return (*rows, row("whole network", plan.macs_before, plan.macs_after))


def plan_table(plan: PruningPlan) -> list[tuple[str, ...]]:
    """The rows of `plan_rows` for printing under `PLAN_COLUMNS`."""
    return [
        (
            row.layer,
            "" if row.inputs is None else _change(row.inputs_of, row.inputs),
            "" if row.kept is None else str(row.kept),
            "" if row.of is None else str(row.of),
            f"{row.macs_before / 1e6:.1f}",
            f"{row.macs_after / 1e6:.1f}",
            f"{100 * (1 - row.macs_after / row.macs_before):.0f} %" if row.macs_before else "",
            f"{100 * row.share:.1f} %",
        )
        for row in plan_rows(plan)
    ]


def resized(model: nn.Module, layers: Sequence[PrunedLayer]) -> nn.Module:
    """A copy of `model` with each of `layers`, which have to fit it, cut down to the channels that stay."""
    smaller = copy.deepcopy(model)
    for layer in layers:
        cut(smaller.get_submodule(layer.name), layer)
    return smaller


def cut(module: nn.Module, layer: PrunedLayer) -> None:
    """Cut one layer down to the channels that stay, in place."""
    if isinstance(module, _BatchNorm):
        module.num_features = len(layer.kept)
        for name in ("weight", "bias", "running_mean", "running_var"):
            _keep(module, name, 0, layer.kept)
    elif isinstance(module, (_ConvNd, nn.Linear)):
        depthwise = is_depthwise(module)
        _keep(module, "weight", 0, layer.kept)
        _keep(module, "bias", 0, layer.kept)
        if not depthwise:
            _keep(module, "weight", 1, layer.kept_in)
        _set_widths(module, len(layer.kept_in), len(layer.kept), depthwise=depthwise)


def _set_widths(module: _ConvNd | nn.Linear, inputs: int, outputs: int, *, depthwise: bool) -> None:
    if isinstance(module, nn.Linear):
        module.in_features, module.out_features = inputs, outputs
    else:
        module.in_channels, module.out_channels = inputs, outputs
        module.groups = outputs if depthwise else module.groups


def _keep(module: nn.Module, name: str, axis: int, kept: Sequence[int]) -> None:
    """Keep only some entries of a parameter or buffer along one axis; one that is None stays None."""
    tensor = getattr(module, name)
    if tensor is None:
        return
    part = tensor.detach().index_select(axis, torch.tensor(kept, device=tensor.device))
    is_parameter = isinstance(tensor, nn.Parameter)
    setattr(module, name, nn.Parameter(part, requires_grad=tensor.requires_grad) if is_parameter else part)


def _check_block(model: nn.Module, block: RemovedBlock) -> None:
    where, fix = f"pruning plan: {block.name}", "build the network with the configuration of the planned one"
    try:
        found = parameter_count(model.get_submodule(block.name))
    except AttributeError as err:
        raise CheckpointError(
            where, found=f"no such block in this {type(model).__name__}", expected="a residual block", fix=fix
        ) from err
    if found != block.params:
        raise CheckpointError(
            where, found=f"a block of {found:,} parameters", expected=f"{block.params:,}, as planned", fix=fix
        )


def _check_sparse(model: nn.Module, plan: PruningPlan) -> None:
    names = {name for name, layer in model.named_modules() if kind_of(layer) in ("conv", "linear")}
    for name in plan.sparse:
        if name not in names or widths(model.get_submodule(name))[0] % GROUP:
            raise CheckpointError(
                f"pruning plan: {name}",
                found="no layer whose input channels come in fours",
                expected="one that can be 2:4 sparse",
                fix="make the plan again",
            )


def _check_layer(model: nn.Module, layer: PrunedLayer) -> None:
    where = f"pruning plan: {layer.name}"
    fix = "build the network with the configuration of the planned one"
    try:
        module = model.get_submodule(layer.name)
    except AttributeError as err:
        raise CheckpointError(
            where, found=f"no such layer in this {type(model).__name__}", expected=f"a {layer.kind} layer", fix=fix
        ) from err
    kind = kind_of(module)
    if kind != layer.kind:
        raise CheckpointError(where, found=f"a {type(module).__name__}", expected=f"a {layer.kind} layer", fix=fix)
    if widths(module) != (layer.in_channels, layer.out_channels):
        inputs, outputs = widths(module)
        raise CheckpointError(
            where,
            found=f"{inputs} → {outputs} channels",
            expected=f"{layer.in_channels} → {layer.out_channels}",
            fix=fix,
        )
    for kept, total in ((layer.kept_in, layer.in_channels), (layer.kept, layer.out_channels)):
        ascending = all(a < b for a, b in itertools.pairwise(kept))
        if not kept or not ascending or kept[-1] >= total:
            raise CheckpointError(
                where, found="kept channels out of order or range", expected=f"ascending, below {total}", fix=fix
            )


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _change(before: int | None, after: int | None) -> str:
    return str(before) if before == after else f"{before} → {after}"
