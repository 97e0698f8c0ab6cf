"""Transfer: a network of another size, depth or keypoint set that starts from a checkpoint's weights.

Invariant: a weight is taken over only where it keeps its meaning: rows that belong to a keypoint go by the keypoint's
name, layers that read a whole map are resampled so that they read the same picture, and what is new leaves the
outputs as they were as far as that is possible. The report accounts for every tensor of the new network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, assert_never, cast

import msgspec
import torch
from torch import Tensor, nn

from edgepose.blocks.backbones import InvertedResidual, RepBlock, ResidualBlock
from edgepose.blocks.card import Lineage
from edgepose.blocks.checkpoint import Checkpoint
from edgepose.blocks.config import KPEConfig
from edgepose.blocks.heads import MapHead, Refinement, RegressionHead, SimCCHead
from edgepose.blocks.kpe import KPENet, build
from edgepose.blocks.orn import ORN
from edgepose.blocks.resample import bins_matrix, cells_matrix, readers_matrix, resampled
from edgepose.errors import CheckpointError
from edgepose.spec import Keypoints


class TransferReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What became of every tensor of the new network; names are those of its state dict.

    Attributes:
        source: Name of the network that the weights come from.
        taken: Taken over as they were.
        matched: Taken over keypoint by keypoint.
        resampled: Resampled to another input size or split ratio.
        fresh: As `build` made them.
        identity: Blocks and stages that the source lacks and that start as the identity, or very close to it.
        keypoints: Keypoints that the source knows, too.
        new_keypoints: Keypoints that it does not.
    """

    source: str
    taken: tuple[str, ...]
    matched: tuple[str, ...]
    resampled: tuple[str, ...]
    fresh: tuple[str, ...]
    identity: tuple[str, ...]
    keypoints: tuple[str, ...]
    new_keypoints: tuple[str, ...]

    def __str__(self) -> str:
        """One line for people."""
        counts = [(len(getattr(self, kind)), kind) for kind in ("taken", "matched", "resampled", "fresh")]
        text = f"from {self.source}: " + ", ".join(f"{count} tensors {kind}" for count, kind in counts if count)
        if self.new_keypoints:
            text += f"; keypoints it does not know: {', '.join(self.new_keypoints)}"
        return text


def transfer(
    checkpoint: Checkpoint,
    config: KPEConfig,
    keypoints: Keypoints,
    *,
    unmatched: Literal["mean", "fresh"] = "mean",
    seed: int = 0,
) -> tuple[KPENet, TransferReport]:
    """Build `config`'s network and take over every weight of a checkpoint that fits.

    Args:
        checkpoint: A float network, neither pruned nor quantised.
        config: The network to build. Another input size, stride or split ratio, more blocks per stage, an
            occlusion-robust block on top or another head: all are allowed.
        keypoints: What it is to predict.
        unmatched: How keypoints start whose name the source does not know: as the mean of those it knows, or fresh.
        seed: Of what starts fresh.

    Returns:
        The network, and what became of its tensors.

    Raises:
        CheckpointError: The source is compressed or a module of the user's own, or nothing of its backbone fits.
        SpecError: The configuration cannot be built.
    """
    card = checkpoint.card
    if card.plan is not None or card.quantisation is not None:
        raise CheckpointError(
            f"transfer from {card.name}",
            found="a compressed network",
            expected="a float one with all its channels",
            fix="start from the checkpoint that it was made of",
        )
    network = build(config, keypoints, seed=seed)
    source = _Source(checkpoint, network, config, keypoints)
    kinds: dict[str, list[str]] = {kind: [] for kind in ("taken", "matched", "resampled", "fresh")}
    state = network.state_dict()
    for name, fresh in state.items():
        found = source.fitted(name, fresh, unmatched)
        if found is None or found[1].shape != fresh.shape:
            kinds["fresh"].append(name)
            continue
        kind, state[name] = found
        kinds[kind].append(name)
    if not any(name.startswith("backbone.") and "num_batches" not in name for name in kinds["taken"]):
        raise _nothing_fits(checkpoint, config)
    network.load_state_dict(state)
    identity = (*_deepen(network, card.kpe, config), *_refine(network, card.kpe, config))
    known = tuple(name for name in keypoints.names if name in card.keypoints.names)
    unknown = tuple(name for name in keypoints.names if name not in known)
    listed = {kind: tuple(names) for kind, names in kinds.items()}
    return network, TransferReport(card.name, **listed, identity=identity, keypoints=known, new_keypoints=unknown)


def continued(checkpoint: Checkpoint, report: TransferReport, config: KPEConfig) -> tuple[Lineage, ...]:
    """The lineage of a transferred network: its source's, and the transfer."""
    settings = {"architecture": msgspec.to_builtins(config)}
    told = {
        "source": report.source,
        "tensors": {kind: len(getattr(report, kind)) for kind in ("taken", "matched", "resampled", "fresh")},
        "fresh": list(report.fresh),
        "identity": list(report.identity),
        "new_keypoints": list(report.new_keypoints),
    }
    return (*checkpoint.card.lineage, Lineage("transfer", settings, {"checkpoint": checkpoint.digest}, told))


def _nothing_fits(checkpoint: Checkpoint, config: KPEConfig) -> CheckpointError:
    theirs = checkpoint.card.kpe
    return CheckpointError(
        f"transfer from {checkpoint.card.name}",
        found=f"a {theirs.backbone} backbone of widths {theirs.widths}, stem {theirs.stem}, of which nothing fits",
        expected=f"weights for {config.name}: {config.backbone}, widths {config.widths}, stem {config.stem}",
        fix="choose a source with the same kind of backbone and the same widths",
    )


@dataclass(frozen=True, slots=True)
class _KeypointAxis:
    """An axis with `lead` places that belong to no keypoint, then `each` places for every keypoint."""

    axis: int
    lead: int
    each: int


class _Source:
    """A checkpoint's tensors, and what they mean."""

    def __init__(self, checkpoint: Checkpoint, network: nn.Module, config: KPEConfig, keypoints: Keypoints) -> None:
        card = checkpoint.card
        self.config, self.target = card.kpe, config
        self.tensors = checkpoint.tensors
        names = card.keypoints.names
        self.pairs = [(new, names.index(name)) for new, name in enumerate(keypoints.names) if name in names]
        self.same_keypoints = names == keypoints.names
        # Which axes belong to keypoints shows when one more is asked for; on the meta device that costs nothing.
        with torch.device("meta"):
            networks = [build(self.config, _unnamed(len(names) + more)) for more in range(3)]
        self.sized = dict(_sized_axes(network, self.config, config))
        shapes = [{name: tuple(t.shape) for name, t in network.state_dict().items()} for network in networks]
        self.axes = {name: _keypoint_axes([s[name] for s in shapes], len(names)) for name in shapes[0]}
        if self.tensors.keys() != shapes[0].keys():
            raise CheckpointError(
                f"transfer from {card.name}",
                found="tensors that are not those of its architecture",
                expected="a checkpoint as it was written",
                fix="use the card that was written with these weights",
            )

    def name(self, name: str) -> str:
        """What the tensor is called in the source; "" where it has no counterpart there."""
        parts = name.split(".")
        if parts[0] == "backbone" and self.config.backbone != self.target.backbone:
            return ""
        if parts[0] == "block" and parts[1] != "neck" and self.config.head != self.target.head:
            return ""
        if parts[:3] == ["block", "neck", "lateral"]:  # counted from the finest map, which the stride chooses
            strides = (4, 8, 16, 32)
            number = int(parts[3]) + strides.index(self.target.stride) - strides.index(self.config.stride)
            parts[3] = str(number)
        found = ".".join(parts)
        return found if found in self.tensors else ""

    def fitted(self, name: str, fresh: Tensor, unmatched: Literal["mean", "fresh"]) -> tuple[str, Tensor] | None:
        """A tensor as it was, or resampled, or rearranged by the names of the keypoints; None where nothing fits."""
        there = self.name(name)
        if not there:
            return None
        kind, value, axes = "taken", self.tensors[there], self.axes[there]
        for place, matrix in self.sized.get(name, ()):
            if matrix.shape[1] != value.shape[place]:
                return None
            kind, value = "resampled", resampled(value, place, matrix)
        if self.same_keypoints or axes == ():
            return kind, value
        if axes is None or not self.pairs:
            return None
        mask = torch.ones_like(value)
        for axis in axes:
            value = _by_keypoint(value, axis, self.pairs, self.count(fresh, axis), fill=None)
            mask = _by_keypoint(mask, axis, self.pairs, self.count(fresh, axis), fill=0.0)
        if unmatched == "fresh" and value.shape == fresh.shape:
            value = torch.where(mask > 0, value, fresh)
        return "matched", value

    @staticmethod
    def count(fresh: Tensor, axis: _KeypointAxis) -> int:
        return (fresh.shape[axis.axis] - axis.lead) // axis.each


def _unnamed(count: int) -> Keypoints:
    return Keypoints(tuple(f"keypoint {number}" for number in range(count)))


def _keypoint_axes(shapes: list[tuple[int, ...]], count: int) -> tuple[_KeypointAxis, ...] | None:
    """The axes that grow with the keypoints; None where one does not grow by the same amount each time.

    Args:
        shapes: The tensor's shape for `count`, `count` + 1 and `count` + 2 keypoints.
        count: Keypoints of the first.
    """
    axes = []
    for axis, sizes in enumerate(zip(*shapes, strict=True)):
        steps = {after - before for before, after in itertools.pairwise(sizes)}
        if len(steps) != 1:
            return None
        (each,) = steps
        if each:
            axes.append(_KeypointAxis(axis, sizes[0] - each * count, each))
    return tuple(axes)


def _sized_axes(
    network: nn.Module, before: KPEConfig, after: KPEConfig
) -> Iterator[tuple[str, tuple[tuple[int, Tensor], ...]]]:
    """The tensors whose size follows the input's, by name, with the matrix for each such axis."""
    if before.input_hw == after.input_hw and _grid(before) == _grid(after):
        return
    maps = _map_hw(before, before.stride), _map_hw(after, after.stride)
    written = _written(before, after)
    for path, module in network.named_modules():
        match module:
            case SimCCHead():
                for layer, matrix in zip("xy", written, strict=True):
                    yield f"{path}.{layer}.weight", ((0, matrix), (1, readers_matrix(*maps)))
                    yield f"{path}.{layer}.bias", ((0, matrix),)
            case RegressionHead():
                yield f"{path}.hidden.weight", ((1, readers_matrix(*maps)),)
            case ORN():
                coarse = _map_hw(before, 32), _map_hw(after, 32)
                yield f"{path}.places", ((0, cells_matrix(*coarse)),)
                yield f"{path}.evidence.weight", ((1, readers_matrix(*maps)),)
                for number, matrix in enumerate(written):
                    yield f"{path}.corrections.{number}.weight", ((0, matrix),)
                    yield f"{path}.corrections.{number}.bias", ((0, matrix),)


def _written(before: KPEConfig, after: KPEConfig) -> tuple[Tensor, ...]:
    """For every output of the head, the matrix along what it says of one keypoint."""
    match after.head:
        case "simcc":
            ratios = before.split_ratio, after.split_ratio
            return tuple(bins_matrix((_bins(before, axis), _bins(after, axis)), ratios) for axis in (1, 0))
        case "heatmap":
            return (cells_matrix(_map_hw(before, before.stride), _map_hw(after, after.stride)),)
        case "regression":
            return ()
        case _:
            assert_never(after.head)


def _grid(config: KPEConfig) -> tuple[int, float]:
    return config.stride, config.split_ratio


def _map_hw(config: KPEConfig, stride: int) -> tuple[int, int]:
    height, width = config.input_hw
    return height // stride, width // stride


def _bins(config: KPEConfig, axis: int) -> int:
    return round(config.input_hw[axis] * config.split_ratio)


def _by_keypoint(
    value: Tensor, axis: _KeypointAxis, pairs: list[tuple[int, int]], count: int, *, fill: float | None
) -> Tensor:
    """`value` with its places along an axis sorted anew; unknown keypoints get `fill`, None for the mean of all."""
    moved = value.movedim(axis.axis, 0)
    old = moved[axis.lead :].unflatten(0, (-1, axis.each))
    mean = old.float().mean(0).to(old.dtype)
    new = (mean if fill is None else torch.full_like(mean, fill)).expand(count, *mean.shape).clone()
    for to, origin in pairs:
        new[to] = old[origin]
    return torch.cat([moved[: axis.lead], new.flatten(0, 1)]).movedim(0, axis.axis)


def _deepen(network: KPENet, before: KPEConfig, after: KPEConfig) -> Iterator[str]:
    """Turn the blocks that deepen a stage into identities; gives their names."""
    if before.backbone != after.backbone or before.widths != after.widths:
        return
    stages = network.backbone.stages
    for number, (old, new) in enumerate(zip(before.depths, after.depths, strict=True)):
        blocks = cast("nn.Sequential", stages[number])
        for position in range(old, new):
            if _start_as_identity(blocks[position], blocks[position - 1]):
                yield f"backbone.stages.{number}.{position}"


def _refine(network: KPENet, before: KPEConfig, after: KPEConfig) -> Iterator[str]:
    """Let refinement stages that the source lacks begin very close to what the last one it has says."""
    if before.head != after.head:
        return
    earlier = cast("MapHead", network.block.head)
    for number, stage in enumerate(cast("Iterable[Refinement]", network.block.refinements)):
        if number >= before.refinements:
            stage.start_as_identity(earlier)
            yield f"block.refinements.{number}"
        earlier = stage.head


def _start_as_identity(block: nn.Module, behind: nn.Module) -> bool:
    """Let a block that follows `behind` pass on what it gets: the last normalisation of its branches starts at zero."""
    match block:
        case ResidualBlock() if isinstance(block.shortcut, nn.Identity):
            _silence(block.conv2)
        case InvertedResidual() if block.adds:
            _silence(block.project)
        case RepBlock() if block.identity is not None and isinstance(behind, RepBlock):
            _silence(block.conv3)
            _silence(block.conv1)
            _pass_on(block, behind)
        case _:
            return False
    return True


@torch.no_grad()
def _silence(branch: nn.Sequential) -> None:
    nn.init.zeros_(branch.get_parameter("1.weight"))
    nn.init.zeros_(branch.get_parameter("1.bias"))


@torch.no_grad()
def _pass_on(block: RepBlock, behind: RepBlock) -> None:
    """A normalised shortcut passes on what it gets, in training too, if it multiplies by what it divides by.

    The block behind knows mean and variance before its ReLU; those after it follow for normally distributed values.
    """
    mean, deviation = behind.total.get_buffer("running_mean"), behind.total.get_buffer("running_var").sqrt()
    ratio = (mean / deviation.clamp(min=1e-6)).double()
    density, below = torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi), torch.special.ndtr(ratio)
    first = ratio * below + density
    second = (ratio.square() + 1) * below + ratio * density
    new_mean, variance = first * deviation, (second - first.square()).clamp(min=0) * deviation.square()
    assert block.identity is not None
    for norm in (block.identity, block.total):
        norm.get_buffer("running_mean").copy_(new_mean)
        norm.get_buffer("running_var").copy_(variance)
    block.identity.weight.copy_((variance + block.identity.eps).sqrt())
    block.identity.bias.copy_(new_mean)
