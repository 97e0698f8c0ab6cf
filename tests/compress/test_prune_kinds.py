"""Pruning of every kind of backbone: depthwise convolutions follow their neighbours, branches fold first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import cache

import msgspec
import pytest
import torch
from torch import Tensor, nn

from edgepose.blocks.config import KPEConfig
from edgepose.blocks.kpe import build
from edgepose.compress.fold import fold_batch_norms, fold_branches
from edgepose.compress.macs import count_macs
from edgepose.compress.plan import Importance, PruneConfig, PruningPlan, apply_pruning, plan_from_json, plan_to_json
from edgepose.compress.prune import plan_pruning, reestimate_batch_norm
from edgepose.spec import Keypoints

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("inverted", "reparameterised")
EXAMPLE = torch.zeros(1, 3, 32, 32)
KEYPOINTS = Keypoints(("head", "left", "right"))


def config(kind: str) -> KPEConfig:
    fields = msgspec.to_builtins(KPEConfig("tiny", (32, 32), 8, (8, 8, 8, 8), (2, 1, 2, 1), 8))
    return msgspec.convert(fields | {"backbone": kind}, KPEConfig)


def images(seed: int, count: int = 4) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def trained(kind: str) -> nn.Module:
    """As after training: gains and biases of its own, and the statistics that go with them."""
    model = build(config(kind), KEYPOINTS, seed=0)
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.3, generator=generator)
    reestimate_batch_norm(model, [images(2), images(3)])
    return model.eval()


@cache
def planned(kind: str, importance: Importance = "l2") -> PruningPlan:
    """Plans are frozen, so tests may share them."""
    wanted = PruneConfig(ratio=0.4, importance=importance, round_to=2, min_channels=2)
    return plan_pruning(trained(kind), EXAMPLE, wanted, losses=losses)


def losses(model: nn.Module) -> Iterator[Tensor]:
    for seed in (4, 5):
        yield sum((out.square().mean() for out in model(images(seed))), torch.zeros(()))


def outputs(model: nn.Module) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = model.eval()(images(9))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("importance", ["l2", "bn_scale", "taylor"])
def test_a_plan_removes_the_asked_fraction(kind: str, importance: Importance) -> None:
    plan, model = planned(kind, importance), trained(kind)
    pruned = apply_pruning(model, plan)
    assert 1 - plan.macs_after / plan.macs_before == pytest.approx(0.4, abs=0.05)
    assert count_macs(fold_branches(model), EXAMPLE).total == plan.macs_before
    assert count_macs(pruned, EXAMPLE).total == plan.macs_after
    assert [o.shape for o in outputs(pruned)] == [o.shape for o in outputs(model)]
    # Only what the outputs' sizes fix was left alone.
    assert {group.name for group in plan.frozen} == {"block.head.maps", "block.head.x", "block.head.y"}


def test_depthwise_convolutions_lose_the_channels_that_are_not_expanded_any_more() -> None:
    plan = planned("inverted")
    by_name = {layer.name: layer for layer in plan.layers}
    shrunk = [name for name in by_name if name.endswith(".depthwise.0")]
    assert shrunk
    pruned = apply_pruning(trained("inverted"), plan)
    for name in shrunk:
        block = name.removesuffix(".depthwise.0")
        kept = by_name[name].kept
        assert by_name[f"{block}.expand.0"].kept == kept == by_name[f"{block}.project.0"].kept_in
        layer = pruned.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        assert layer.groups == layer.in_channels == layer.out_channels == len(kept)


def test_a_chain_of_folded_blocks_is_pruned_layer_by_layer() -> None:
    """No shortcut ties its widths together."""
    layers = [layer for layer in planned("reparameterised").layers if layer.name.startswith("backbone.")]
    convolutions = [layer for layer in layers if layer.kind == "conv"]
    assert convolutions
    assert all(layer.name.endswith(".conv.0") for layer in convolutions)
    chain = [name for name, _ in fold_branches(trained("reparameterised")).named_modules() if ".conv.0" in name]
    by_name = {layer.name: layer for layer in convolutions}
    for first, second in itertools.pairwise(chain):
        writer, reader = by_name.get(first), by_name.get(second)
        if writer is not None and len(writer.kept) < writer.out_channels:
            assert reader is not None
            assert reader.kept_in == writer.kept
    assert len({layer.kept for layer in convolutions}) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_replaying_a_stored_plan_on_a_fresh_network_takes_the_pruned_weights(kind: str) -> None:
    plan = planned(kind)
    pruned = apply_pruning(trained(kind), plan)
    again = plan_from_json(plan_to_json(plan))
    fresh = apply_pruning(build(config(kind), KEYPOINTS, seed=7), again)
    fresh.load_state_dict(pruned.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(outputs(fresh), outputs(pruned), strict=True))
    folded = fold_batch_norms(pruned)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    for a, b in zip(outputs(folded), outputs(pruned), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_plan_fits_a_network_whose_branches_are_folded_already() -> None:
    model, plan = trained("reparameterised"), planned("reparameterised")
    one, other = apply_pruning(model, plan), apply_pruning(fold_branches(model), plan)
    assert all(torch.equal(a, b) for a, b in zip(outputs(one), outputs(other), strict=True))
    assert plan_pruning(fold_branches(model), EXAMPLE, plan.config).layers == plan.layers


@pytest.mark.parametrize("kind", KINDS)
def test_a_pruned_network_can_be_trained(kind: str) -> None:
    pruned = apply_pruning(trained(kind), planned(kind)).train()
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.01)
    found = []
    for _ in range(4):
        (loss,) = (sum((out.square().mean() for out in pruned(images(6))), torch.zeros(())),)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    assert found[-1] < found[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())
