"""The control arm: trained as the compressed network is, without what compresses; stopped and found again."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import msgspec
import pytest

from edgepose.blocks.card import Card, Lineage, read_card
from edgepose.blocks.checkpoint import load_checkpoint, save_checkpoint
from edgepose.errors import CheckpointError, UsageError
from edgepose.stages.cache import StageResult
from edgepose.stages.control import control_phases, train_control
from edgepose.stages.people import StageData
from edgepose.stages.settings import Plan, PruneStage, QuantiseStage
from edgepose.stages.source import Source
from edgepose.training.loop import Interrupted
from tests.training.dots import CONFIG, KEYPOINTS, NETWORK, Recorder, dots, network

pytestmark = pytest.mark.usefixtures("one_thread")

PRUNE = PruneStage(ratio=0.4, importance="l1", scope="global", round_to=8, protected=(), seed=0)
TRAINING = msgspec.structs.replace(CONFIG, epochs=2, distill_weight=0.5)
QAT = QuantiseStage(8, False, (), 0, msgspec.structs.replace(TRAINING, epochs=1, learning_rate=1e-4))
PLAN = Plan(PRUNE, TRAINING, QAT, steps=2)


class Watch(Recorder):
    """Remembers stages, too; `stop_after` steps it stops the run."""

    def __init__(self, stop_after: int = 0) -> None:
        super().__init__()
        self.stages: list[StageResult] = []
        self.stop_after = stop_after

    def started(self, stage: str) -> None: ...

    def finished(self, stage: StageResult) -> None:
        self.stages.append(stage)

    def at_step(self, done: int) -> None:
        if len(self.steps) == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def data(tmp_path: Path) -> StageData:
    return StageData(dots(tmp_path, "train", 16, seed=1), dots(tmp_path, "dev", 4, seed=2))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    card = Card("dots", NETWORK, KEYPOINTS, "", lineage=(Lineage("train", {}, {}, {}),))
    save_checkpoint(tmp_path / "net", card, network().state_dict())
    return Source(tmp_path / "net")


def test_phases_are_the_recipes_fine_tunings_without_what_compresses() -> None:
    sparse = msgspec.structs.replace(TRAINING, sparsity=1e-3, dense=("backbone.*",))
    phases = control_phases(msgspec.structs.replace(PLAN, sparse=sparse))
    assert [phase.name for phase in phases] == ["sparse", "recover-1", "recover", "qat"]
    assert [phase.config.epochs for phase in phases] == [2, 1, 1, 1]
    assert phases[0].config == TRAINING
    assert phases[-1].config == QAT.training
    assert [phase.follows_source for phase in phases] == [True, True, True, False]


@pytest.mark.parametrize(
    "plan", [Plan(None, None, None), Plan(PRUNE, None, msgspec.structs.replace(QAT, training=None))]
)
def test_a_recipe_that_trains_nothing_has_no_control(plan: Plan) -> None:
    with pytest.raises(UsageError, match="a recipe without fine-tuning"):
        control_phases(plan)


def test_the_control_is_trained_phase_by_phase_with_the_recipes_teachers(
    source: Source, data: StageData, tmp_path: Path
) -> None:
    phases = train_control(source, data, PLAN, tmp_path / "control", (Watch(), 0))
    assert [phase.stage for phase in phases] == ["control-recover-1", "control-recover", "control-qat"]
    card, before = read_card(tmp_path / "control"), read_card(source.path)
    assert card.lineage[:1] == before.lineage
    new = card.lineage[1:]
    assert [entry.stage for entry in new] == ["train"] * 3
    assert [entry.inputs["teacher"] for entry in new[:2]] == [before.weights_sha256] * 2
    assert new[2].inputs["teacher"] == new[2].inputs["checkpoint"]  # as in quantisation-aware training
    assert [entry.config["epochs"] for entry in new] == [1, 1, 1]
    assert (card.plan, card.quantisation) == (None, None)
    assert card.metrics["dev"]["auc"] == phases[-1].report["dev"]["auc"]
    assert load_checkpoint(tmp_path / "control").tensors.keys() == load_checkpoint(source.path).tensors.keys()
    again = train_control(source, data, PLAN, tmp_path / "again", (Watch(), 0))
    assert all(phase.reused for phase in again)
    assert read_card(tmp_path / "again").weights_sha256 == card.weights_sha256


def test_a_stopped_control_goes_on(source: Source, data: StageData, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train_control(source, data, PLAN, tmp_path / "control", (Watch(stop_after=3), 0))  # in the second phase
    assert not (tmp_path / "control.safetensors").exists()
    watch = Watch()
    train_control(source, data, PLAN, tmp_path / "control", (watch, 0))
    assert [stage.reused for stage in watch.stages] == [True, False, False]
    assert watch.steps[0][0] == 2  # of the second phase's two
    assert not list((tmp_path / "cache" / "runs").glob("*.state"))


def test_a_compressed_checkpoint_is_refused(source: Source, data: StageData, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(source.path)
    card = msgspec.structs.replace(checkpoint.card, quantisation={})
    save_checkpoint(tmp_path / "int8", card, checkpoint.tensors)
    with pytest.raises(CheckpointError, match="a compressed checkpoint"):
        train_control(Source(tmp_path / "int8"), data, PLAN, tmp_path / "control", (Watch(), 0))
