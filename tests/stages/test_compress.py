"""The compression stages on a small trained network: each reads a checkpoint and writes the next one."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch

from edgepose.blocks.card import Card, Lineage, read_card
from edgepose.blocks.checkpoint import load_checkpoint, save_checkpoint
from edgepose.stages.compress import NETWORK, prune, quantise, recover, reference
from edgepose.stages.networks import load_network
from edgepose.stages.people import StageData
from edgepose.stages.settings import PruneStage, QuantiseStage
from edgepose.training.loop import Interrupted, RunOptions, dev_metrics, fit
from edgepose.training.predict import cut_crops, predict
from tests.training.dots import CONFIG, KEYPOINTS, SPEC, Recorder, dots, network
from tests.training.dots import NETWORK as SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = msgspec.structs.replace(SMALL, widths=(16, 16, 32, 32))
PRUNE = PruneStage(ratio=0.4, importance="taylor", scope="global", round_to=8, protected=(), seed=0)
PTQ = QuantiseStage(calibration_images=20, symmetric=False, protected=(), seed=0)
QUICK = RunOptions(workers=0)


@dataclass(frozen=True)
class Trained:
    """A trained checkpoint and the people it may see."""

    source: Path
    data: StageData
    auc: float


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    data = StageData(dots(folder, "train", 32, seed=1), dots(folder, "dev", 8, seed=2))
    model = network(WIDE)
    config = msgspec.structs.replace(CONFIG, epochs=6, learning_rate=0.01)
    result = fit(model, SPEC, (data.train, data.dev), config, options=QUICK)
    lineage = Lineage("train", {}, data.digests, {})
    card = Card("dots", WIDE, KEYPOINTS, "", lineage=(lineage,), metrics={"val": {"auc": 1.0}})
    save_checkpoint(folder / "net", card, model.state_dict())
    return Trained(folder / "net", data, result.curve[result.best_epoch]["auc"])


@pytest.fixture(scope="module")
def pruned(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pruned")
    report = prune(trained.source, trained.data, PRUNE, folder)
    assert 0.45 < report["macs_after"] / report["macs_before"] < 0.75
    return folder / NETWORK


def auc_of(path: Path, data: StageData) -> float:
    model, checkpoint = load_network(path)
    crops = cut_crops(data.dev, checkpoint.card.spec)
    return dev_metrics(predict(model, checkpoint.card.spec, crops), crops)["auc"]


def assert_grown(path: Path, source: Path, stage: str, data: StageData) -> Lineage:
    """The card has one entry more than the one before it, and no figures that were measured on another network."""
    card, before = read_card(path), read_card(source)
    assert card.lineage[:-1] == before.lineage
    assert card.lineage[-1].stage == stage
    assert card.lineage[-1].inputs["checkpoint"] == before.weights_sha256
    assert card.lineage[-1].inputs.items() >= data.digests.items()
    assert card.metrics == {}
    return card.lineage[-1]


def test_the_reference_is_measured_on_dev(trained: Trained, tmp_path: Path) -> None:
    report = reference(trained.source, trained.data, tmp_path)
    assert report["dev"]["auc"] == trained.auc
    assert list(tmp_path.iterdir()) == []


def test_a_pruned_checkpoint_is_smaller_and_measured(trained: Trained, pruned: Path) -> None:
    entry = assert_grown(pruned, trained.source, "prune", trained.data)
    assert entry.config["ratio"] == PRUNE.ratio
    assert sum(t.numel() for t in load_checkpoint(pruned).tensors.values()) < 0.8 * sum(
        t.numel() for t in load_checkpoint(trained.source).tensors.values()
    )
    assert auc_of(pruned, trained.data) == entry.report["dev"]["auc"]
    # Repaired statistics: the network still knows something before any fine-tuning.
    assert entry.report["dev"]["auc"] > 0.3 * trained.auc


def test_recovery_brings_accuracy_back_and_resumes(trained: Trained, pruned: Path, tmp_path: Path) -> None:
    class Stops(Recorder):
        def at_step(self, done: int) -> None:
            if done == 3:
                os.kill(os.getpid(), signal.SIGINT)

    config = msgspec.structs.replace(CONFIG, epochs=3, distill_weight=0.5)
    state, folder = tmp_path / "state", tmp_path / "out"
    with pytest.raises(Interrupted):
        recover(pruned, trained.source, trained.data, config, (folder, RunOptions(state, Stops(), 0)))
    assert not folder.exists()
    rest = Recorder()
    report = recover(pruned, trained.source, trained.data, config, (folder, RunOptions(state, rest, 0)))
    assert rest.steps[0][0] == 4
    entry = assert_grown(folder / NETWORK, pruned, "recover", trained.data)
    assert entry.inputs["teacher"] == read_card(trained.source).weights_sha256
    assert read_card(folder / NETWORK).plan == read_card(pruned).plan
    assert (
        report["dev"]["auc"] == auc_of(folder / NETWORK, trained.data) == report["curve"][report["best_epoch"]]["auc"]
    )
    assert report["dev"]["auc"] > read_card(pruned).lineage[-1].report["dev"]["auc"] - 0.02


def test_quantisation_after_training_keeps_the_accuracy(trained: Trained, tmp_path: Path) -> None:
    report = quantise(trained.source, trained.data, PTQ, (tmp_path, QUICK))
    entry = assert_grown(tmp_path / NETWORK, trained.source, "ptq", trained.data)
    assert entry.report == report
    assert report["calibration_people"] == 20
    assert report["dev"] == report["dev_after_calibration"]
    assert report["dev"]["auc"] == auc_of(tmp_path / NETWORK, trained.data)
    assert abs(report["dev"]["auc"] - trained.auc) < 0.05


def test_quantisation_aware_training_of_a_pruned_network(trained: Trained, pruned: Path, tmp_path: Path) -> None:
    training = msgspec.structs.replace(CONFIG, epochs=2, learning_rate=1e-3, distill_weight=0.5)
    settings = msgspec.structs.replace(PTQ, training=training, protected=("block.head.x",))
    report = quantise(pruned, trained.data, settings, (tmp_path, QUICK))
    assert_grown(tmp_path / NETWORK, pruned, "qat", trained.data)
    card = read_card(tmp_path / NETWORK)
    assert card.plan == read_card(pruned).plan
    assert card.quantisation is not None
    assert card.quantisation["protected"] == ["block.head.x"]
    assert len(report["curve"]) == 2
    assert report["dev"]["auc"] == auc_of(tmp_path / NETWORK, trained.data)
    assert report["dev"]["auc"] > report["dev_after_calibration"]["auc"] - 0.05
