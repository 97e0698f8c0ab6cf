"""Freezing the backbone for the first epochs: nothing in it moves, then all of it does; resuming changes nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from edgepose.data.coco import PoseDataset
from edgepose.errors import UsageError
from edgepose.training.config import TrainConfig
from edgepose.training.loop import Interrupted, RunOptions, fit
from tests.training.dots import CONFIG, SPEC, Recorder, dots, network

TRAIN = 16
FROZEN = msgspec.structs.replace(CONFIG, epochs=3, freeze_epochs=2, averaging=0.0)
STEPS_PER_EPOCH = TRAIN // CONFIG.batch_size


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[PoseDataset, PoseDataset]:
    folder = tmp_path_factory.mktemp("dots")
    return dots(folder, "train", TRAIN, seed=1), dots(folder, "dev", 4, seed=2)


class Watches(Recorder):
    """Copies the network's state after some step, and may stop the run there."""

    def __init__(self, model: nn.Module, after: int, *, stop: bool = False) -> None:
        super().__init__()
        self.model, self.after, self.stop = model, after, stop
        self.state: dict[str, Tensor] = {}

    def at_step(self, done: int) -> None:
        if done == self.after:
            self.state = copied(self.model)
            if self.stop:
                os.kill(os.getpid(), signal.SIGINT)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def run(data: tuple[PoseDataset, PoseDataset], config: TrainConfig, watch: Watches, state: Path | None = None) -> None:
    fit(watch.model, SPEC, data, config, options=RunOptions(state, watch, workers=0))


def test_the_backbone_stays_as_it_is_and_then_learns(data: tuple[PoseDataset, PoseDataset]) -> None:
    model = network()
    before = copied(model)
    watch = Watches(model, 2 * STEPS_PER_EPOCH)
    run(data, FROZEN, watch)
    backbone = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(watch.state[name], before[name]) for name in backbone)
    assert not torch.equal(watch.state["block.head.maps.weight"], before["block.head.maps.weight"])
    after = copied(model)
    assert not torch.equal(after["backbone.stem.0.0.weight"], before["backbone.stem.0.0.weight"])
    assert not torch.equal(after["backbone.stem.0.1.running_mean"], before["backbone.stem.0.1.running_mean"])
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("after", [1, 2 * STEPS_PER_EPOCH, 2 * STEPS_PER_EPOCH + 1])
def test_resuming_changes_nothing(data: tuple[PoseDataset, PoseDataset], tmp_path: Path, after: int) -> None:
    whole = network()
    run(data, FROZEN, Watches(whole, -1))
    stopped = Watches(network(), after, stop=True)
    with pytest.raises(Interrupted):
        run(data, FROZEN, stopped, tmp_path / "run.state")
    resumed = network()
    run(data, FROZEN, Watches(resumed, -1), tmp_path / "run.state")
    found = copied(resumed)
    assert all(torch.equal(tensor, found[name]) for name, tensor in copied(whole).items())


def test_a_network_without_a_backbone_is_refused(data: tuple[PoseDataset, PoseDataset]) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = self.inner(images)
            return found

    with pytest.raises(UsageError, match="Plain without a part named backbone"):
        fit(Plain(), SPEC, data, FROZEN, options=RunOptions(workers=0))
