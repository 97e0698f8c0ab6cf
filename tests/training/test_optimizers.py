"""Optimisers: Muon's steps are orthogonal and as long as AdamW's, and the right weights get them."""

from __future__ import annotations

import copy
import math

import msgspec
import pytest
import torch
from torch import nn

from edgepose.blocks.config import KPEConfig, ORNConfig
from edgepose.blocks.kpe import build
from edgepose.training.optimizers import Muon, make_optimizers, orthogonalised
from tests.training.dots import CONFIG, KEYPOINTS

MUON = msgspec.structs.replace(CONFIG, optimizer="muon")
WIDE = KPEConfig("wide", (64, 64), 16, (16, 24, 32, 48), (1, 1, 1, 1), 32, orn=ORNConfig(32, 1))


@pytest.mark.parametrize("shape", [(24, 24), (16, 90), (90, 16)])
def test_singular_values_come_out_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    found = torch.linalg.svdvals(orthogonalised(matrix))
    assert found.min() > 0.3
    assert found.max() < 1.35


def test_the_directions_are_those_of_the_nearest_orthogonal_matrix() -> None:
    matrix = torch.randn(20, 60, generator=torch.Generator().manual_seed(1))
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    cosine = nn.functional.cosine_similarity(orthogonalised(matrix).flatten(), (u @ v).flatten(), dim=0)
    assert cosine > 0.97


def test_a_step_is_as_long_as_one_of_adamw() -> None:
    weight = nn.Parameter(torch.zeros(32, 16, 3, 3))
    weight.grad = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(2)) * 1e-4
    Muon([weight], 0.01, 0.0).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


def test_weights_decay_and_those_without_a_gradient_stay() -> None:
    moved, still = nn.Parameter(torch.ones(16, 16)), nn.Parameter(torch.ones(16, 16))
    moved.grad = torch.zeros(16, 16)
    Muon([moved, still], 0.5, 0.1).step()
    assert torch.allclose(moved, torch.full((16, 16), 0.95))
    assert torch.equal(still, torch.ones(16, 16))


def test_hidden_weights_go_to_muon_and_everything_is_trained_once() -> None:
    network, loss = build(WIDE, KEYPOINTS), nn.Linear(2, 3)
    plain, muon = make_optimizers(network, loss, MUON)
    names = {id(p): n for n, p in [*network.named_parameters(), *loss.named_parameters(prefix="loss")]}
    chosen = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    rest = [names[id(p)] for group in plain.param_groups for p in group["params"]]
    assert sorted([*chosen, *rest]) == sorted(names.values())
    assert {
        "backbone.stages.1.0.conv1.0.weight",
        "block.neck.smooth.0.weight",
        "block.orn.layers.0.out.weight",
    } <= chosen
    assert {"backbone.stem.0.0.weight", "block.orn.identity", "block.head.x.weight", "loss.weight"} <= set(rest)


def test_adamw_alone_unless_asked() -> None:
    (only,) = make_optimizers(build(WIDE, KEYPOINTS), nn.Identity(), CONFIG)
    decayed, others = only.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (CONFIG.weight_decay, 0.0)
    assert all(p.ndim > 1 for p in decayed["params"])
    assert all(p.ndim <= 1 for p in others["params"])


def test_a_restored_state_takes_the_same_steps() -> None:
    torch.manual_seed(0)
    first = nn.Parameter(torch.randn(16, 20))
    gradients = torch.randn(4, 16, 20)

    def steps(weight: nn.Parameter, optimizer: Muon, which: range) -> None:
        for i in which:
            weight.grad = gradients[i].clone()
            optimizer.step()

    running = Muon([first], 0.01, 0.05)
    steps(first, running, range(2))
    second = nn.Parameter(first.detach().clone())
    resumed = Muon([second], 0.01, 0.05)
    resumed.load_state_dict(copy.deepcopy(running.state_dict()))
    steps(first, running, range(2, 4))
    steps(second, resumed, range(2, 4))
    assert torch.equal(first, second)


def test_it_minimises() -> None:
    torch.manual_seed(0)
    weight, wanted = nn.Parameter(torch.zeros(16, 16)), torch.randn(16, 16)
    optimizer = Muon([weight], 0.3, 0.0)
    for step in range(60):
        for group in optimizer.param_groups:
            group["lr"] = 0.3 * (1 + math.cos(math.pi * step / 60)) / 2
        loss = optimizer.step(lambda: _loss(weight, wanted))
    assert loss < 0.05  # from 1


def _loss(weight: nn.Parameter, wanted: torch.Tensor) -> float:
    weight.grad = None
    loss = (weight - wanted).square().mean()
    loss.backward()
    return loss.item()
