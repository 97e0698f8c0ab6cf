from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgepose.compress.fold import fold_batch_norms, fold_branches, foldable_pairs
from edgepose.errors import CheckpointError


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.running_mean.normal_(0.0, 0.5, generator=generator)
            part.running_var.uniform_(0.1, 2.0, generator=generator)
            if part.affine:
                part.weight.data.uniform_(-1.5, 1.5, generator=generator)
                part.bias.data.normal_(0.0, 0.5, generator=generator)
    return model.eval()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, bias=False),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.Conv2d(6, 6, 3, groups=6, bias=False),
        nn.ConvTranspose2d(6, 8, 4, 2, 1, bias=False),
        nn.ConvTranspose2d(6, 8, 4, 2, 1, groups=2),
    ],
    ids=["plain", "grouped with bias", "depthwise", "transposed", "grouped transposed"],
)
@pytest.mark.parametrize("affine", [True, False])
def test_the_folded_network_computes_the_same(layer: nn.Module, affine: bool) -> None:
    channels = layer.out_channels
    model = randomised(nn.Sequential(layer, nn.BatchNorm2d(channels, affine=affine), nn.ReLU()))
    folded = fold_batch_norms(model)
    images = torch.randn(3, 6, 9, 9)
    torch.testing.assert_close(folded(images), model(images), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())


def test_linear_layers_fold_too() -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4)))
    values = torch.randn(7, 5)
    torch.testing.assert_close(fold_batch_norms(model)(values), model(values), rtol=1e-5, atol=1e-5)


def test_the_argument_is_left_alone_and_other_names_stay() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = fold_batch_norms(model)
    assert model.training
    assert not folded.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(folded.state_dict()) == {"0.weight", "0.bias"}


class ReadTwice(nn.Module):
    """The convolution's output is also used unnormalised."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


class UsedTwice(nn.Module):
    """One convolution, two normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.one, self.two = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.conv(self.one(self.conv(x))))


@pytest.mark.parametrize("kind", [ReadTwice, UsedTwice])
def test_what_cannot_be_folded_exactly_stays(kind: type[nn.Module]) -> None:
    model = randomised(kind())
    assert foldable_pairs(model) == ()
    images = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(fold_batch_norms(model)(images), model(images))


class Twice(nn.Module):
    """x + x as two branches; folds to one multiplication."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y + y

    def fold_branches(self) -> nn.Module:
        double = nn.Conv2d(3, 3, 1, groups=3, bias=False)
        nn.init.constant_(double.weight, 2.0)
        return nn.Sequential(self.inner, double).train(self.training)


def test_branches_fold_wherever_they_stand_and_before_normalisations() -> None:
    shared = Twice()
    model = nn.Sequential(Twice(Twice()), shared, nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.add_module("again", nn.Sequential(nn.Conv2d(4, 3, 1), shared))
    randomised(model)
    images = torch.randn(2, 3, 5, 5)
    folded = fold_branches(model)
    torch.testing.assert_close(folded(images), model(images))
    assert not any(isinstance(part, Twice) for part in folded.modules())
    assert folded.get_submodule("1") is folded.get_submodule("again.1")
    assert any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    assert sum(isinstance(part, Twice) for part in model.modules()) == 3
    both = fold_batch_norms(model)
    torch.testing.assert_close(both(images), model(images), rtol=1e-5, atol=1e-5)
    assert not any(isinstance(part, nn.BatchNorm2d | Twice) for part in both.modules())


def test_a_network_that_is_one_block_with_branches_folds_too() -> None:
    images = torch.randn(2, 3, 5, 5)
    assert torch.equal(fold_branches(Twice())(images), 2 * images)


def test_folding_branches_keeps_the_training_mode() -> None:
    model = nn.Sequential(Twice(), nn.Conv2d(3, 4, 1)).train()
    assert all(part.training for part in fold_branches(model).modules())
    assert not any(part.training for part in fold_branches(model.eval()).modules())


class DataDependent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def test_a_network_that_cannot_be_traced_is_named() -> None:
    with pytest.raises(CheckpointError, match=r"DataDependent.*cannot trace"):
        fold_batch_norms(DataDependent())
