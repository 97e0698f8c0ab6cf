"""Two pruning plans, made one after the other, as one plan for the unpruned network.

Invariant: applying `compose(first, second)` to a network gives to the bit what applying `first` and then `second`
gives, so that a network pruned in steps is, like any other, one plan beside its weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec

from edgepose.compress.plan import PruneConfig, PrunedLayer, PruningPlan
from edgepose.errors import CheckpointError

_FIX = "make the second plan for the network that the first one leaves"


def compose(first: PruningPlan, second: PruningPlan) -> PruningPlan:
    """One plan that does what two do.

    Args:
        first: For the unpruned network.
        second: For the network that `first` leaves.

    Returns:
        The plan for the unpruned network: of each layer the channels that stay both times, counted as the unpruned
        network counts them. Its settings are those of `second`, with the fractions, ratios and blocks of both taken
        together; limits that go by a network's width ("max_layer_ratio") held in each step by itself.

    Raises:
        CheckpointError: The second plan does not follow the first; the text names where.
    """
    _check_sequence(first, second)
    both = {layer.name: layer for layer in first.layers}
    for layer in second.layers:
        both[layer.name] = _composed(both[layer.name], layer) if layer.name in both else layer
    frozen = {group.name for group in second.frozen}
    return msgspec.structs.replace(
        second,
        config=_config(first.config, second.config),
        layers=tuple(both[name] for name in _merged([x.name for x in first.layers], [x.name for x in second.layers])),
        frozen=tuple(group for group in first.frozen if group.name in frozen),
        macs_before=first.macs_before,
        params_before=first.params_before,
        blocks=(*first.blocks, *second.blocks),
        sparse=tuple(_merged(first.sparse, second.sparse)),
    )


def _config(first: PruneConfig, second: PruneConfig) -> PruneConfig:
    return msgspec.structs.replace(
        second,
        ratio=1 - (1 - first.ratio) * (1 - second.ratio),
        ratios={**second.ratios, **first.ratios},
        depth=first.depth + second.depth,
    )


def _check_sequence(first: PruningPlan, second: PruningPlan) -> None:
    for what in ("architecture", "input_shape"):
        if getattr(first, what) != getattr(second, what):
            raise _mismatch(what, str(getattr(second, what)), str(getattr(first, what)))
    if first.params_after != second.params_before:
        raise _mismatch(
            "parameters",
            f"a second plan for a network of {second.params_before:,}",
            f"the {first.params_after:,} that the first one leaves",
        )
    for block in second.blocks:
        if any(layer.name.startswith(f"{block.name}.") for layer in first.layers):
            raise _mismatch(block.name, "a block that goes after channels in it went", "blocks to go before channels")
    for layer in second.layers:
        if layer.name in first.sparse:
            raise _mismatch(layer.name, "channels that go after 2:4 sparsity", "sparsity to come last")


def _composed(first: PrunedLayer, second: PrunedLayer) -> PrunedLayer:
    for left, side, found in (
        (first.kept_in, "input", second.in_channels),
        (first.kept, "output", second.out_channels),
    ):
        if len(left) != found:
            raise _mismatch(first.name, f"{found} {side} channels in the second plan", f"{len(left)}")
    if first.kind != second.kind:
        raise _mismatch(first.name, f"a {second.kind} layer in the second plan", f"a {first.kind} layer")
    return msgspec.structs.replace(
        first,
        kept_in=tuple(first.kept_in[channel] for channel in second.kept_in),
        kept=tuple(first.kept[channel] for channel in second.kept),
        macs_after=second.macs_after,
    )


def _mismatch(where: str, found: str, expected: str) -> CheckpointError:
    return CheckpointError(f"composing pruning plans: {where}", found=found, expected=expected, fix=_FIX)


def _merged(first: Sequence[str], second: Sequence[str]) -> Iterator[str]:
    """Names of both lists, each once and in its list's order; of names that only one has, the first list's go first."""
    common = [name for name in second if name in set(first)]
    own = iter(first)
    rest = iter(second)
    for anchor in common:
        for names, other in ((own, set(second)), (rest, set(first))):
            for name in names:
                if name == anchor:
                    break
                if name not in other:
                    yield name
        yield anchor
    yield from (name for name in own if name not in set(second))
    yield from (name for name in rest if name not in set(first))
