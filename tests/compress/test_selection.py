"""Layers named by pattern: ratios of their own, beside what the rest of the network loses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from edgepose.blocks.config import KPEConfig
from edgepose.blocks.kpe import build
from edgepose.compress.macs import count_macs
from edgepose.compress.plan import PruneConfig, PruningPlan, apply_pruning
from edgepose.compress.prune import kept_at, plan_pruning, rank_channels
from edgepose.errors import RecipeError
from edgepose.profiles import load_target
from edgepose.recipe import Prune, Recipe
from edgepose.spec import Keypoints
from edgepose.stages.settings import plan_of

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = torch.zeros(1, 3, 32, 32)
FIRST, SECOND = "backbone.stages.1.0.conv1.0", "backbone.stages.2.0.conv1.0"  # inside blocks: tied to nobody


def network(width: int = 16) -> nn.Module:
    widths = (width, width, 2 * width, 2 * width)
    config = KPEConfig("tiny", (32, 32), width, widths, (1, 1, 1, 1), width)
    return build(config, Keypoints(("head", "left", "right")), seed=0).eval()


def planned(ratio: float = 0.0, **changes: object) -> PruningPlan:
    settings = {"round_to": 2, "min_channels": 2, **changes}
    return plan_pruning(network(), EXAMPLE, PruneConfig(ratio=ratio, **settings))  # type: ignore[arg-type]


def kept(plan: PruningPlan) -> dict[str, int]:
    return {layer.name: len(layer.kept) for layer in plan.layers}


def test_only_the_named_layers_are_narrowed_where_nothing_else_is_asked_for() -> None:
    plan = planned(ratios={FIRST: 0.5, "backbone.stages.2.*.conv1.?": 0.25})
    assert kept(plan)[FIRST] == 8
    assert kept(plan)[SECOND] == 24
    changed = {layer.name for layer in plan.layers if len(layer.kept) < layer.out_channels}
    assert changed == {FIRST, SECOND, "backbone.stages.1.0.conv1.1", "backbone.stages.2.0.conv1.1"}
    pruned = apply_pruning(network(), plan)
    assert count_macs(pruned, EXAMPLE).total == plan.macs_after < plan.macs_before
    assert [o.shape for o in pruned(EXAMPLE)] == [o.shape for o in network()(EXAMPLE)]


def test_the_rest_makes_up_for_what_the_named_layers_keep() -> None:
    for scope in ("global", "uniform"):
        plan = planned(0.5, ratios={FIRST: 0.75, SECOND: 0.0}, scope=scope)
        assert kept(plan)[FIRST] == 4
        assert kept(plan).get(SECOND, 32) == 32
        assert 1 - plan.macs_after / plan.macs_before == pytest.approx(0.5, abs=0.08)


def test_coupled_layers_are_narrowed_together_and_beyond_the_limit_of_the_search() -> None:
    plan = planned(ratios={"block.neck.lateral.0.0": 0.875}, max_layer_ratio=0.5)
    laterals = {name: count for name, count in kept(plan).items() if name.startswith("block.neck.lateral.")}
    assert set(laterals.values()) == {2}
    assert len(laterals) == 2 * 3  # a convolution and its normalisation each


def test_what_is_gone_by_ratios_alone_counts_for_the_whole() -> None:
    alone = planned(ratios={"backbone.stages.*": 0.5})
    removed = 1 - alone.macs_after / alone.macs_before
    ranking = rank_channels(network(), EXAMPLE, alone.config)
    assert kept_at(ranking, removed / 2) == kept_at(ranking, 0.0)  # more is gone than asked for; nothing comes back
    with pytest.raises(RecipeError, match=r"prune.ratio: found 0.99, expected at most 0\."):
        kept_at(ranking, 0.99)


def test_patterns_that_match_nothing_or_nothing_that_can_go_or_remove_nothing_are_refused() -> None:
    for ratios, words in (
        ({f"{FIRST}0": 0.5}, rf"prune.ratios: found '{FIRST}0', which matches no layer.*did you mean '{FIRST}'"),
        ({"block.head.x": 0.5}, r"prune.ratios: 'block.head.x': found only layers that cannot be narrowed .*output"),
        ({FIRST: 0.01}, rf"prune.ratios: '{FIRST}': found 0.01 of 16 channels, which is nothing in steps of 2"),
        ({FIRST: 0.5, "backbone.stages.1.*": 0.25}, r"found 0.25, and 0.5 by .*one ratio for coupled layers"),
        ({FIRST: 1.0}, r"prune: found .*< 1"),
    ):
        with pytest.raises(RecipeError, match=words):
            planned(ratios=ratios)
    with pytest.raises(RecipeError, match="is protected by 'backbone"):
        planned(ratios={FIRST: 0.5}, protected=("backbone.stages.1.*",))
    planned(ratios={FIRST: 0.5, "backbone.stages.1.0.conv1.1": 0.5})  # two names of one thing


@pytest.mark.parametrize(("targets", "step"), [(("this-cpu",), 16), (("jetson-orin-nano",), 32)])
def test_channels_come_in_the_steps_that_the_targets_kernels_like(targets: tuple[str, ...], step: int) -> None:
    recipe = Recipe("mine", "", prune=Prune(0.5, importance="l2", ratios={FIRST: 0.6}), targets=targets)
    settings = plan_of(recipe, tuple(load_target(name) for name in targets)).prune
    assert settings is not None
    assert settings.round_to == step == math.lcm(*(load_target(name).round_to for name in targets))
    model = network(64)
    plan = plan_pruning(model, EXAMPLE, PruneConfig(**settings.criteria))
    convolutions = [layer for layer in plan.layers if layer.kind == "conv"]
    assert convolutions
    for layer in convolutions:
        assert len(layer.kept) == layer.out_channels or len(layer.kept) % step == 0
        assert len(layer.kept_in) == layer.in_channels or len(layer.kept_in) % step == 0
    assert kept(plan)[FIRST] == 32
