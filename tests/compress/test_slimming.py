"""Sparse training: what the penalty adds up, whom it leaves alone, and that it makes pruning cheaper."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from edgepose.compress.slimming import GroupLasso
from edgepose.errors import RecipeError, UsageError
from edgepose.training.loop import RunOptions, fit
from tests.training.dots import CONFIG, NETWORK, SPEC, Recorder, dots, network

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Pair(nn.Module):
    """Two normalised convolutions whose sum is rectified, then one that nobody normalises, then the output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.a_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.b, self.b_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.bare, self.out = nn.Conv2d(4, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        both = torch.relu(self.a_norm(self.a(images)) + self.b_norm(self.b(images)))
        found: Tensor = self.out(torch.relu(self.bare(both)))
        return found


def pair() -> Pair:
    torch.manual_seed(0)
    model = Pair()
    for norm in (model.a_norm, model.b_norm):
        norm.weight.data.normal_()
    return model


def test_coupled_channels_are_measured_together_and_bare_ones_by_their_weights() -> None:
    model = pair()
    penalty = GroupLasso(model, EXAMPLE)
    coupled = (model.a_norm.weight.square() + model.b_norm.weight.square()).sqrt().sum()
    bare = model.bare.weight.flatten(1).norm(dim=1).sum()
    assert penalty().item() == pytest.approx((coupled + bare).item(), rel=1e-5)
    assert penalty.channels == 4 + 6  # outputs of the network are not pruned
    model.a_norm.weight.data.mul_(2)
    assert penalty().item() > (coupled + bare).item()  # it follows the weights


def test_gradients_are_finite_at_zero_and_reach_what_is_penalised_only() -> None:
    model = pair()
    model.a_norm.weight.data.zero_()
    model.b_norm.weight.data.zero_()
    GroupLasso(model, EXAMPLE)().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert reached == {"a_norm.weight", "b_norm.weight", "bare.weight"}
    assert all(bool(torch.isfinite(p.grad).all()) for p in model.parameters() if p.grad is not None)


def test_dense_layers_are_left_alone() -> None:
    model = pair()
    penalty = GroupLasso(model, EXAMPLE, ("a",))  # and with it b, which is added to it
    assert penalty().item() == pytest.approx(model.bare.weight.flatten(1).norm(dim=1).sum().item(), rel=1e-5)
    with pytest.raises(RecipeError, match="matches no layer"):
        GroupLasso(model, EXAMPLE, ("c",))


def test_branches_are_penalised_together() -> None:
    model = network(msgspec.structs.replace(NETWORK, backbone="reparameterised"))
    penalty = GroupLasso(model, torch.zeros(1, 3, 64, 64))
    penalty().backward()
    branches = ("conv3", "conv1")
    reached = [n for n, p in model.named_parameters() if p.grad is not None and any(b in n for b in branches)]
    assert reached
    assert all("1.weight" in name for name in reached)  # scales of normalisations


def test_a_network_that_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(UsageError, match=r"sparsity.*Sequential none of whose channels"):
        GroupLasso(nn.Sequential(nn.Conv2d(3, 2, 1)), EXAMPLE)


def test_training_makes_channels_small_and_keeps_the_last_epoch(tmp_path: Path) -> None:
    data = dots(tmp_path, "train", 16, seed=1), dots(tmp_path, "dev", 4, seed=2)

    def trained(sparsity: float) -> tuple[float, int]:
        model = network()
        config = msgspec.structs.replace(CONFIG, epochs=6, sparsity=sparsity, averaging=0.0, learning_rate=0.05)
        result = fit(model, SPEC, data, config, options=RunOptions(observer=Recorder(), workers=0))
        return GroupLasso(model, torch.zeros(1, 3, 64, 64))().item(), result.best_epoch

    (without, _), (with_penalty, kept) = trained(0.0), trained(0.05)
    assert with_penalty < 0.85 * without
    assert kept == 5
