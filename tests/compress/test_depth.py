"""Depth pruning: which blocks can go, which one is chosen, and that the rest is exactly the network without it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import msgspec
import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.config import KPEConfig
from edgepose.blocks.kpe import build
from edgepose.compress.compose import compose
from edgepose.compress.depth import choose_blocks, residual_blocks
from edgepose.compress.importance import Losses
from edgepose.compress.macs import count_macs
from edgepose.compress.plan import (
    PruneConfig,
    PruningPlan,
    apply_pruning,
    plan_from_json,
    plan_rows,
    plan_to_json,
    without_blocks,
)
from edgepose.compress.prune import plan_pruning, reestimate_batch_norm
from edgepose.errors import CheckpointError, RecipeError
from edgepose.spec import Keypoints

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = torch.zeros(1, 3, 32, 32)
IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
DEPTHS = (1, 3, 2, 1)


def network(kind: str = "residual") -> nn.Module:
    fields = msgspec.to_builtins(KPEConfig("tiny", (32, 32), 8, (8, 8, 16, 16), DEPTHS, 8))
    model = build(msgspec.convert(fields | {"backbone": kind}, KPEConfig), Keypoints(("head", "left", "right")), seed=0)
    reestimate_batch_norm(model, [IMAGES])
    return model.eval()


def idle(model: nn.Module, *blocks: str) -> nn.Module:
    """The network with blocks whose branches say nothing."""
    for block in blocks:
        branch = model.get_submodule(block).get_submodule("conv2.1")
        assert isinstance(branch, nn.BatchNorm2d)
        nn.init.zeros_(branch.weight)
        nn.init.zeros_(branch.bias)
    return model


def distance_from(teacher: nn.Module) -> Losses:
    """Losses that are nought for whoever answers as the teacher does."""
    with torch.no_grad():
        expected = [out.clone() for out in teacher(IMAGES)]

    def losses(model: nn.Module) -> Iterator[Tensor]:
        for half in (slice(0, 2), slice(2, 4)):
            found = model(IMAGES[half])
            yield sum(((a - b[half]) ** 2).mean() for a, b in zip(found, expected, strict=True))

    return losses


@cache
def planned() -> PruningPlan:
    model = idle(network(), "backbone.stages.1.2", "backbone.stages.2.1")
    wanted = PruneConfig(ratio=0.5, round_to=2, min_channels=2, depth=2)
    return plan_pruning(model, EXAMPLE, wanted, losses=distance_from(model))


# Which blocks there are


def test_blocks_with_an_identity_shortcut_are_found_in_every_backbone_and_no_others() -> None:
    names = ("backbone.stages.0.0", "backbone.stages.1.1", "backbone.stages.1.2", "backbone.stages.2.1")
    assert residual_blocks(network(), EXAMPLE) == names  # the first of a stage halves the map, or widens it
    inverted = ("backbone.stages.1.1", "backbone.stages.1.2", "backbone.stages.2.1")
    assert residual_blocks(network("inverted"), EXAMPLE) == inverted
    assert residual_blocks(network("reparameterised"), EXAMPLE) == ()


class Foreign(nn.Module):
    """A network of somebody else's: pre-activation blocks, some of which look residual and are not."""

    def __init__(self) -> None:
        super().__init__()
        self.entry = nn.Conv2d(3, 4, 3, padding=1)
        self.good = Block()
        self.wrapped = nn.Sequential(nn.Sequential(Block()))
        self.scaled = Scaled()
        self.spoiling = Spoiling()
        self.rectified = Rectified()
        self.watched = Block()
        self.two = TwoInputs()
        self.exit = nn.Conv2d(4, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.scaled(self.wrapped(self.good(self.entry(images))))
        x = self.rectified(self.spoiling(x) - 0.1)
        x = self.watched(x) * self.watched.conv.weight.mean()
        out: Tensor = self.exit(self.two(x, x.relu()))
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.drop(self.conv(F.relu(x))), x)


class Scaled(Block):
    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x) + 2 * x
        return out


class Spoiling(Block):
    """Rectifies its input in place, so that the shortcut is not the identity."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x.relu_()) + x
        return out


class Rectified(Block):
    """Rectifies what may be negative."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = x + self.conv(y)
        return out


def test_a_foreign_network_is_judged_by_what_its_blocks_do() -> None:
    torch.manual_seed(0)
    model = Foreign().eval()
    before = model(IMAGES)
    assert residual_blocks(model, IMAGES) == ("good", "wrapped.0.0")
    assert torch.equal(model(IMAGES), before)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_a_block_that_stands_in_two_places_stays() -> None:
    shared = Block()
    assert residual_blocks(nn.Sequential(nn.Conv2d(3, 4, 1), shared, shared), EXAMPLE) == ()


# Which are chosen


def test_the_blocks_without_which_the_loss_grows_least_go_first() -> None:
    model = idle(network(), "backbone.stages.1.2", "backbone.stages.2.1")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    chosen = choose_blocks(model, EXAMPLE, 3, distance_from(model))
    assert {block.name for block in chosen[:2]} == {"backbone.stages.1.2", "backbone.stages.2.1"}
    assert chosen[0].loss_before == chosen[0].loss_after == chosen[1].loss_after == chosen[2].loss_before == 0
    assert chosen[2].loss_after > 0
    assert chosen[2].params == sum(p.numel() for p in model.get_submodule(chosen[2].name).parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # The third is the best of what is left, seen without the first two.
    rest = without_blocks(model, [block.name for block in chosen[:2]])
    with torch.no_grad():
        found = {
            name: sum(float(loss) for loss in distance_from(model)(without_blocks(rest, [name]))) / 2
            for name in residual_blocks(rest, EXAMPLE)
        }
    assert min(found, key=lambda name: found[name]) == chosen[2].name
    assert chosen[2].loss_after == pytest.approx(found[chosen[2].name])


def test_blocks_with_protected_layers_stay() -> None:
    model = network()
    chosen = choose_blocks(model, EXAMPLE, 1, distance_from(model), ("backbone.stages.0.0.conv1.0",))
    assert chosen[0].name != "backbone.stages.0.0"
    with pytest.raises(RecipeError, match=r"at most 1, backbone\.stages\.2\.1"):
        wanted = PruneConfig(ratio=0, depth=2, protected=("backbone.stages.[01].*",))
        plan_pruning(model, EXAMPLE, wanted, losses=distance_from(model))


def test_a_loss_that_is_no_number_is_the_worst() -> None:
    model = network()

    def losses(candidate: nn.Module) -> Iterator[Tensor]:
        gone = isinstance(candidate.get_submodule("backbone.stages.1.1"), nn.Identity)
        yield torch.tensor(1.0 if gone else float("nan"))

    assert choose_blocks(model, EXAMPLE, 1, losses)[0].name == "backbone.stages.1.1"


def test_more_blocks_than_there_are_no_data_and_no_blocks_are_refused() -> None:
    model = network()
    with pytest.raises(RecipeError, match=r"prune.depth: found 5, expected at most 4, backbone.stages.0.0, .*lower"):
        choose_blocks(model, EXAMPLE, 5, distance_from(model))
    with pytest.raises(RecipeError, match="no batch to judge blocks by"):
        choose_blocks(model, EXAMPLE, 1, lambda _: [])
    with pytest.raises(RecipeError, match=r"prune.depth: found 1 without training losses.*training data"):
        plan_pruning(model, EXAMPLE, PruneConfig(ratio=0, depth=1))
    with pytest.raises(RecipeError, match="expected none: this KPENet has no residual block whose shortcut is the"):
        plan_pruning(network("reparameterised"), EXAMPLE, PruneConfig(ratio=0, depth=1), losses=distance_from(model))


# The plan


def test_a_plan_removes_blocks_then_channels_and_counts_both() -> None:
    model = idle(network(), "backbone.stages.1.2", "backbone.stages.2.1")
    plan = planned()
    gone = [block.name for block in plan.blocks]
    assert sorted(gone) == ["backbone.stages.1.2", "backbone.stages.2.1"]
    assert not any(layer.name.startswith(tuple(gone)) for layer in plan.layers)
    assert plan.layers  # channels go, too
    full = count_macs(model, EXAMPLE)
    assert plan.macs_before == full.total
    assert [block.macs for block in plan.blocks] == [full.within(name) for name in gone]
    assert 1 - plan.macs_after / plan.macs_before == pytest.approx(0.5, abs=0.05)
    pruned = apply_pruning(model, plan)
    assert count_macs(pruned, EXAMPLE).total == plan.macs_after
    assert sum(p.numel() for p in pruned.parameters()) == plan.params_after
    rows = plan_rows(plan)
    assert [row.layer for row in rows[:2]] == [f"{name} (block removed)" for name in gone]
    assert sum(row.macs_before for row in rows[:-1]) == plan.macs_before


def test_the_pruned_network_equals_the_full_one_with_idle_blocks_and_unread_channels() -> None:
    model = idle(network(), "backbone.stages.1.2", "backbone.stages.2.1")
    pruned = apply_pruning(model, planned()).eval()
    for layer in planned().layers:
        if layer.kind != "batch_norm":
            unread = sorted(set(range(layer.in_channels)) - set(layer.kept_in))
            model.get_parameter(f"{layer.name}.weight").data[:, unread] = 0
    with torch.no_grad():
        for full, small in zip(model(IMAGES), pruned(IMAGES), strict=True):
            torch.testing.assert_close(full, small, rtol=1e-4, atol=1e-5)


def test_a_stored_plan_takes_the_pruned_weights_on_a_fresh_network_and_old_plans_still_load() -> None:
    model = idle(network(), "backbone.stages.1.2", "backbone.stages.2.1")
    plan = planned()
    pruned = apply_pruning(model, plan).eval()
    again = plan_from_json(plan_to_json(plan))
    assert again == plan
    fresh = apply_pruning(network(), again).eval()
    fresh.load_state_dict(pruned.state_dict())
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(fresh(IMAGES), pruned(IMAGES), strict=True))
    old = msgspec.to_builtins(plan_pruning(network(), EXAMPLE, PruneConfig(ratio=0.3, round_to=2, min_channels=2)))
    for name in ("blocks", "sparse"):
        del old[name]
    for name in ("ratios", "depth", "pattern"):
        del old["config"][name]
    loaded = plan_from_json(msgspec.json.encode(old))
    assert (loaded.blocks, loaded.sparse, loaded.config.depth) == ((), (), 0)
    apply_pruning(network(), loaded)


def test_depth_alone_leaves_all_channels() -> None:
    model = network()
    plan = plan_pruning(model, EXAMPLE, PruneConfig(ratio=0, depth=1), losses=distance_from(model))
    assert len(plan.blocks) == 1
    assert plan.layers == ()
    assert plan.macs_after == plan.macs_before - plan.blocks[0].macs
    # What blocks took is never given back, and counts: no channel goes for a ratio that is reached already.
    less = plan_pruning(model, EXAMPLE, PruneConfig(ratio=0.01, depth=1, round_to=2), losses=distance_from(model))
    assert less.macs_after == plan.macs_after


def test_a_plan_for_other_blocks_is_refused_by_name() -> None:
    plan = planned()
    wider = msgspec.structs.replace(plan, blocks=(msgspec.structs.replace(plan.blocks[0], params=7),))
    with pytest.raises(CheckpointError, match=rf"{plan.blocks[0].name}: found a block of .* expected 7, as planned"):
        apply_pruning(network(), wider)
    elsewhere = msgspec.structs.replace(
        plan, blocks=(msgspec.structs.replace(plan.blocks[0], name="backbone.nowhere"),)
    )
    with pytest.raises(CheckpointError, match=r"backbone.nowhere: found no such block in this KPENet"):
        apply_pruning(network(), elsewhere)


def test_plans_made_one_after_the_other_keep_the_blocks_of_the_first() -> None:
    first = planned()
    pruned = apply_pruning(network(), first)
    second = plan_pruning(pruned, EXAMPLE, PruneConfig(ratio=0.2, round_to=2, min_channels=2))
    both = compose(first, second)
    assert both.blocks == first.blocks
    assert both.config.depth == 2
    stepwise, once = apply_pruning(pruned, second), apply_pruning(network(), both)
    assert stepwise.state_dict().keys() == once.state_dict().keys()
    assert all(
        torch.equal(a, b) for a, b in zip(stepwise.state_dict().values(), once.state_dict().values(), strict=True)
    )
