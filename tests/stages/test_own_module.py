"""A user's own module as a checkpoint: it comes back with its module, and with no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from edgepose.blocks.attach import describe
from edgepose.blocks.card import Card, read_card
from edgepose.blocks.checkpoint import save_checkpoint
from edgepose.blocks.config import KPEConfig
from edgepose.blocks.transfer import transfer
from edgepose.errors import CheckpointError
from edgepose.spec import Heatmap, Keypoints, Preprocess
from edgepose.stages.networks import load_network, store_network, structure_of
from edgepose.stages.source import Network, Source

HW = (32, 32)
TWO = Keypoints(("left", "right"))


class Own(nn.Module):
    """Heat maps and a number more, with settings in every place where a module may keep them."""

    def __init__(self, stride: int = 4, gain: float = 2.0, slope: float = 0.1, offset: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 5, stride, 2), nn.BatchNorm2d(8), nn.LeakyReLU(slope))
        self.maps = nn.Conv2d(8, 2, 1)
        self.gain = gain
        self.register_buffer("offset", torch.tensor(offset), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(images)
        return self.maps(x) * self.gain + self.get_buffer("offset"), x.mean((2, 3))


def network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    module = Own()
    return Network(module, describe(module, "own", TWO, Preprocess(HW), Heatmap(), extra=("mood",)))


def test_it_comes_back_with_its_module(tmp_path: Path) -> None:
    own = network()
    path = store_network(own, tmp_path)
    card = read_card(path)
    assert card.spec == own.spec
    assert [output.name for output in card.spec.outputs] == ["heatmap", "mood"]
    loaded, _ = load_network(Source(path, Own()))
    images = torch.randn(2, 3, *HW)
    with torch.no_grad():
        for ours, theirs in zip(own.module.eval()(images), loaded(images), strict=True):
            assert torch.equal(ours, theirs)


def test_what_is_stored_is_found_by_its_content(tmp_path: Path) -> None:
    first, again, other = (store_network(network(seed), tmp_path) for seed in (0, 0, 1))
    assert first == again != other
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("other", [Own(stride=2), Own(gain=3.0), Own(slope=0.2), Own(offset=0.25)])
def test_a_module_that_computes_something_else_is_refused(tmp_path: Path, other: nn.Module) -> None:
    path = store_network(network(), tmp_path)
    assert structure_of(other) != structure_of(Own())
    with pytest.raises(CheckpointError, match="computes something else"):
        load_network(Source(path, other))


def test_without_its_module_it_is_refused(tmp_path: Path) -> None:
    path = store_network(network(), tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint holds, expected that module"):
        load_network(path)


def test_it_has_no_architecture_to_transfer_or_build(tmp_path: Path) -> None:
    _, checkpoint = load_network(Source(store_network(network(), tmp_path), Own()))
    with pytest.raises(CheckpointError, match="a module of the user's own"):
        _ = checkpoint.card.kpe
    with pytest.raises(CheckpointError, match="a module of the user's own"):
        transfer(checkpoint, KPEConfig("tiny", HW, 4, (4, 4, 4, 4), (1, 1, 1, 1), 4), TWO)
    save_checkpoint(tmp_path / "bare", Card("bare", None, TWO, ""), {})
    with pytest.raises(CheckpointError, match="without an architecture"):
        load_network(tmp_path / "bare")


def test_a_module_that_cannot_be_traced_is_refused(tmp_path: Path) -> None:
    class Depends(Own):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return super().forward(images) if images.sum() > 0 else super().forward(-images)

    with pytest.raises(CheckpointError, match=r"torch\.fx cannot trace"):
        store_network(Network(Depends(), network().spec), tmp_path)
