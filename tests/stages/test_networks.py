"""From a checkpoint back to its network: plain, pruned, fake-quantised, and plans that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

from edgepose.blocks.card import Card
from edgepose.blocks.checkpoint import save_checkpoint
from edgepose.blocks.config import KPEConfig
from edgepose.blocks.kpe import build
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.plan import PruneConfig, PruningPlan, apply_pruning
from edgepose.compress.prune import plan_pruning, reestimate_batch_norm
from edgepose.errors import CheckpointError, IntegrityError
from edgepose.spec import Keypoints
from edgepose.stages.networks import load_network

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = KPEConfig("tiny", (64, 64), 16, (16, 16, 32, 32), (1, 1, 1, 1), 16)
KEYPOINTS = Keypoints(("head", "left", "right"))
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def lively() -> nn.Module:
    """A network whose normalisations do something."""
    network = build(CONFIG, KEYPOINTS, seed=3)
    generator = torch.Generator().manual_seed(1)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.bias.data.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
    return network.eval()


def save(path: Path, network: nn.Module, **changes: Any) -> None:
    card = Card("tiny", CONFIG, KEYPOINTS, "", **changes)
    save_checkpoint(path, card, network.state_dict())


def assert_same_answers(first: nn.Module, second: nn.Module) -> None:
    with torch.no_grad():
        for a, b in zip(first(IMAGES), second(IMAGES), strict=True):
            assert torch.equal(a, b)


@pytest.fixture(scope="module")
def plan() -> PruningPlan:
    return plan_pruning(lively(), IMAGES[:1], PruneConfig(ratio=0.4, round_to=8))


def test_a_plain_network_comes_back(tmp_path: Path) -> None:
    network = lively()
    save(tmp_path / "net", network)
    loaded, checkpoint = load_network(tmp_path / "net")
    assert not loaded.training
    assert checkpoint.card.plan is None
    assert_same_answers(loaded, network)


def test_a_pruned_network_comes_back(tmp_path: Path, plan: PruningPlan) -> None:
    pruned = apply_pruning(lively(), plan)
    with torch.no_grad():
        next(pruned.parameters()).mul_(1.1)  # as after fine-tuning: not to be had from the plan alone
    save(tmp_path / "net", pruned, plan=msgspec.to_builtins(plan))
    loaded, checkpoint = load_network(tmp_path / "net")
    assert sum(p.numel() for p in loaded.parameters()) == plan.params_after < plan.params_before
    assert msgspec.convert(checkpoint.card.plan, PruningPlan) == plan
    assert_same_answers(loaded, pruned)


def test_a_pruned_and_fake_quantised_network_comes_back(tmp_path: Path, plan: PruningPlan) -> None:
    from edgepose.compress.quantise import QuantiseConfig, placement_of, prepare, tensors_of

    pruned = apply_pruning(lively(), plan)
    wrapped = prepare(fold_batch_norms(pruned), [IMAGES], QuantiseConfig(subset_size=2, bias_correction="none"))
    card = Card(
        "tiny",
        CONFIG,
        KEYPOINTS,
        "",
        plan=msgspec.to_builtins(plan),
        quantisation=msgspec.to_builtins(placement_of(wrapped)),
    )
    save_checkpoint(tmp_path / "net", card, tensors_of(wrapped))
    loaded, _ = load_network(tmp_path / "net")
    assert_same_answers(loaded, wrapped)
    with torch.no_grad():
        assert not torch.equal(loaded(IMAGES)[0], pruned(IMAGES)[0])  # it is quantised indeed
    broken = msgspec.structs.replace(card, quantisation={"quantisers": "many"})
    save_checkpoint(tmp_path / "broken", broken, tensors_of(wrapped))
    with pytest.raises(CheckpointError, match=r"broken: quantisation: found .*a Placement of this version"):
        load_network(tmp_path / "broken")
    save_checkpoint(tmp_path / "full", msgspec.structs.replace(card, plan=None), tensors_of(wrapped))
    with pytest.raises(CheckpointError):
        load_network(tmp_path / "full")


@pytest.mark.parametrize("kind", ["inverted", "reparameterised"])
def test_other_kinds_come_back_from_every_stage(tmp_path: Path, kind: str) -> None:
    """Branches are there until something was pruned or quantised, and nobody who loads has to know."""
    from edgepose.compress.quantise import QuantiseConfig, placement_of, prepare, tensors_of

    fields = {**msgspec.to_builtins(CONFIG), "backbone": kind, "input_hw": (32, 32), "widths": (8, 8, 8, 8)}
    config, images = msgspec.convert(fields, KPEConfig), IMAGES[..., :32, :32].contiguous()
    trained = build(config, KEYPOINTS, seed=3)
    reestimate_batch_norm(trained, [images])
    plan = plan_pruning(trained, images, PruneConfig(ratio=0.4, round_to=2, min_channels=2))
    pruned = apply_pruning(trained, plan)
    quantised = prepare(fold_batch_norms(trained), [images], QuantiseConfig(subset_size=2))
    both = prepare(fold_batch_norms(pruned), [images], QuantiseConfig(subset_size=2))
    card = Card("tiny", config, KEYPOINTS, "")
    planned = msgspec.structs.replace(card, plan=msgspec.to_builtins(plan))
    for stage, network, described in (
        ("train", trained.eval(), card),
        ("prune", pruned.eval(), planned),
        ("ptq", quantised, msgspec.structs.replace(card, quantisation=msgspec.to_builtins(placement_of(quantised)))),
        ("both", both, msgspec.structs.replace(planned, quantisation=msgspec.to_builtins(placement_of(both)))),
    ):
        tensors = network.state_dict() if described.quantisation is None else tensors_of(network)
        save_checkpoint(tmp_path / stage, described, tensors)
        loaded, _ = load_network(tmp_path / stage)
        with torch.no_grad():
            assert all(torch.equal(a, b) for a, b in zip(loaded(images), network(images), strict=True)), stage


def test_weights_and_plan_must_belong_together(tmp_path: Path, plan: PruningPlan) -> None:
    save(tmp_path / "unpruned", lively(), plan=msgspec.to_builtins(plan))
    with pytest.raises(CheckpointError, match="unpruned: found a checkpoint of another architecture"):
        load_network(tmp_path / "unpruned")
    save(tmp_path / "planless", apply_pruning(lively(), plan))
    with pytest.raises(CheckpointError, match="planless: found a checkpoint of another architecture"):
        load_network(tmp_path / "planless")


def test_a_plan_of_another_version_is_refused(tmp_path: Path, plan: PruningPlan) -> None:
    save(tmp_path / "net", lively(), plan={**msgspec.to_builtins(plan), "schema": 2})
    with pytest.raises(CheckpointError, match=r"net: plan: found .*a PruningPlan of this version"):
        load_network(tmp_path / "net")


def test_changed_weights_are_an_integrity_error(tmp_path: Path) -> None:
    save(tmp_path / "net", lively())
    path = tmp_path / "net.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(IntegrityError):
        load_network(tmp_path / "net")
