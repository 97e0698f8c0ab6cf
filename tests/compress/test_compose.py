"""Plans one after the other as one plan: the same network to the bit, and plans that do not follow are refused."""

from __future__ import annotations

from functools import cache

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgepose.blocks.kpe import KPEConfig, build
from edgepose.compress.compose import _merged, compose
from edgepose.compress.macs import count_macs
from edgepose.compress.plan import RemovedBlock
from edgepose.compress.prune import PruneConfig, PruningPlan, apply_pruning, plan_from_json, plan_pruning, plan_to_json
from edgepose.errors import CheckpointError
from edgepose.spec import Keypoints

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = KPEConfig("small", (64, 64), 8, (16, 32, 32, 48), (1, 2, 1, 1), 16)
BRANCHED = msgspec.structs.replace(SMALL, backbone="reparameterised")
EXAMPLE = torch.zeros(1, 3, 64, 64)


def network(config: KPEConfig = SMALL, seed: int = 0) -> nn.Module:
    return build(config, Keypoints(("head", "left", "right")), seed=seed)


def planned(model: nn.Module, ratio: float, **wanted: object) -> PruningPlan:
    config = {"ratio": ratio, "importance": "l2", "round_to": 4, "min_channels": 4, **wanted}
    return plan_pruning(model, EXAMPLE, msgspec.convert(config, PruneConfig))


@cache
def two(config: KPEConfig = SMALL) -> tuple[PruningPlan, PruningPlan]:
    first = planned(network(config), 0.3)
    return first, planned(apply_pruning(network(config), first), 0.3, importance="l1")


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    found, expected = one.state_dict(), other.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("config", [SMALL, BRANCHED], ids=["residual", "branched"])
def test_one_plan_does_what_two_do(config: KPEConfig) -> None:
    first, second = two(config)
    plan = compose(first, second)
    fresh = network(config, seed=7)
    pruned = apply_pruning(fresh, plan)
    assert_equal(pruned, apply_pruning(apply_pruning(fresh, first), second))
    assert plan.macs_before == first.macs_before
    assert plan.macs_after == second.macs_after == count_macs(pruned, EXAMPLE).total
    assert sum(layer.macs_after for layer in plan.layers if layer.kind != "batch_norm") <= plan.macs_after
    assert plan.config.ratio == pytest.approx(1 - 0.7 * 0.7)
    assert plan_from_json(plan_to_json(plan)) == plan


def test_any_number_of_plans_compose_in_any_grouping() -> None:
    model, plans = network(), []
    for seed, ratio in enumerate((0.1, 0.4, 0.25)):
        plans.append(planned(model, ratio, importance="random", seed=seed))
        model = apply_pruning(model, plans[-1])
    left = compose(compose(plans[0], plans[1]), plans[2])
    right = compose(plans[0], compose(plans[1], plans[2]))
    assert_equal(apply_pruning(network(), left), model)
    assert {layer.name: layer for layer in left.layers} == {layer.name: layer for layer in right.layers}
    assert msgspec.structs.replace(left, layers=right.layers, config=right.config) == right


def test_nothing_before_or_after_changes_nothing() -> None:
    first = two()[0]
    nothing = planned(network(), 0)
    after = msgspec.structs.replace(
        nothing, macs_before=first.macs_after, params_before=first.params_after,
        macs_after=first.macs_after, params_after=first.params_after,
    )  # fmt: skip
    for plan in (compose(nothing, first), compose(first, after)):
        assert plan.layers == first.layers
        assert plan.config.ratio == pytest.approx(first.config.ratio)
        assert (plan.macs_after, plan.params_after) == (first.macs_after, first.params_after)


def test_groups_count_as_left_alone_only_where_both_left_them_alone() -> None:
    guarded = planned(network(), 0.2, protected=("backbone.stem.*",))
    plan = compose(guarded, planned(apply_pruning(network(), guarded), 0.4))
    assert "backbone.stem.0.0" in {group.name for group in guarded.frozen}
    assert "backbone.stem.0.0" not in {group.name for group in plan.frozen}
    assert {group.name for group in plan.frozen} <= {group.name for group in guarded.frozen}


@given(st.lists(st.integers(0, 30), unique=True), st.lists(st.integers(0, 30), unique=True))
def test_names_of_both_lists_come_once_and_in_order(one: list[int], other: list[int]) -> None:
    first, second = ([f"{number:02}" for number in sorted(numbers)] for numbers in (one, other))
    merged = list(_merged(first, second))
    assert sorted(merged) == sorted({*first, *second})
    assert [name for name in merged if name in first] == first
    assert [name for name in merged if name in second] == second


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": "Other"}, "architecture: found Other"),
        ({"input_shape": (1, 3, 96, 96)}, "input_shape"),
        ({"params_before": 7}, r"parameters.*for a network of 7"),
    ],
)
def test_a_plan_for_another_network_is_refused(change: dict[str, object], words: str) -> None:
    first, second = two()
    with pytest.raises(CheckpointError, match=words):
        compose(first, msgspec.structs.replace(second, **change))


def test_a_layer_that_the_first_plan_leaves_otherwise_is_refused() -> None:
    first, second = two()
    name = next(layer.name for layer in second.layers if layer.name in {x.name for x in first.layers})
    layers = tuple(
        msgspec.structs.replace(x, in_channels=x.in_channels + 4) if x.name == name else x for x in second.layers
    )
    with pytest.raises(CheckpointError, match=rf"{name}.*input channels in the second plan"):
        compose(first, msgspec.structs.replace(second, layers=layers))
    layers = tuple(msgspec.structs.replace(x, kind="linear") if x.name == name else x for x in second.layers)
    with pytest.raises(CheckpointError, match=rf"{name}.*a linear layer"):
        compose(first, msgspec.structs.replace(second, layers=layers))


def test_blocks_and_sparsity_in_the_wrong_order_are_refused() -> None:
    first, second = two()
    block = RemovedBlock("backbone.stages.1.1", 1, 1, 0.0, 0.0)
    with pytest.raises(CheckpointError, match=r"stages\.1\.1.*blocks to go before channels"):
        compose(first, msgspec.structs.replace(second, blocks=(block,)))
    sparse = msgspec.structs.replace(first, sparse=(second.layers[0].name,))
    with pytest.raises(CheckpointError, match="sparsity to come last"):
        compose(sparse, second)


def test_blocks_that_went_first_stay_gone() -> None:
    first, second = two()
    block = RemovedBlock("elsewhere", 1, 1, 0.0, 0.0)
    assert compose(msgspec.structs.replace(first, blocks=(block,)), second).blocks == (block,)
