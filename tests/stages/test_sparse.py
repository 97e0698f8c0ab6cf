"""What pruning leaves sparse and which blocks it removes: kept by every later stage, and read off the ONNX files."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from edgepose.blocks.card import Card, Lineage, read_card
from edgepose.blocks.checkpoint import save_checkpoint
from edgepose.compress.plan import PruningPlan
from edgepose.compress.sparsity import check_pattern, sparsify
from edgepose.errors import CheckpointError, ParityError
from edgepose.stages.compress import NETWORK, prune, quantise, recover
from edgepose.stages.export import FLOAT_ONNX, MODEL, export
from edgepose.stages.networks import load_network
from edgepose.stages.people import StageData
from edgepose.stages.settings import PruneStage, QuantiseStage
from edgepose.training.loop import RunOptions
from tests.training.dots import CONFIG, KEYPOINTS, dots, network
from tests.training.dots import NETWORK as SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = msgspec.structs.replace(SMALL, widths=(16, 16, 32, 32), depths=(1, 2, 1, 1))
PRUNE = PruneStage(
    ratio=0.4, importance="l2", scope="global", round_to=8, protected=("block.head.x",), seed=0, depth=1, pattern="2:4"
)
TRAINING = msgspec.structs.replace(CONFIG, epochs=1, learning_rate=0.01, distill_weight=0.5)
QUICK = RunOptions(workers=0)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> StageData:
    folder = tmp_path_factory.mktemp("people")
    return StageData(dots(folder, "train", 16, seed=1), dots(folder, "dev", 4, seed=2))


@pytest.fixture(scope="module")
def pruned(people: StageData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("pruned")
    card = Card("dots", WIDE, KEYPOINTS, "", lineage=(Lineage("train", {}, people.digests, {}),))
    save_checkpoint(folder / "net", card, network(WIDE).state_dict())
    report = prune(folder / "net", people, PRUNE, folder)
    plan = plan_of(folder / NETWORK)
    assert report["blocks_removed"] == [block.name for block in plan.blocks]
    assert len(plan.blocks) == 1
    assert report["sparse"]["layers"] == len(plan.sparse) > 5
    assert 0.3 < report["sparse"]["macs_share"] < 1
    return folder / NETWORK


def plan_of(path: Path) -> PruningPlan:
    return msgspec.convert(read_card(path).plan, PruningPlan)


def zeros_of(path: Path) -> dict[str, torch.Tensor]:
    model = load_network(path)[0]
    return {name: model.get_parameter(f"{name}.weight") == 0 for name in plan_of(path).sparse}


def assert_kept(path: Path, pruned: Path) -> None:
    """The plan, and every single zero."""
    plan = plan_of(pruned)
    assert plan_of(path) == plan
    check_pattern(load_network(path)[0], plan.sparse)
    found = zeros_of(path)
    assert all(torch.equal(found[name], zero) for name, zero in zeros_of(pruned).items())


def test_recovery_and_export_keep_the_zeros(people: StageData, pruned: Path, tmp_path: Path) -> None:
    before = load_network(pruned)[0].state_dict()
    recover(pruned, pruned.parent / "net", people, TRAINING, (tmp_path, QUICK))
    assert_kept(tmp_path / NETWORK, pruned)
    after = load_network(tmp_path / NETWORK)[0].state_dict()
    sparse = plan_of(pruned).sparse
    assert all(not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in sparse)
    export(tmp_path / NETWORK, 18, tmp_path)
    assert (tmp_path / FLOAT_ONNX).exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_quantisation_aware_training_and_export_keep_the_zeros(people: StageData, pruned: Path, tmp_path: Path) -> None:
    training = msgspec.structs.replace(TRAINING, bf16=False)
    settings = QuantiseStage(calibration_images=8, symmetric=False, protected=(), seed=0, training=training)
    quantise(pruned, people, settings, (tmp_path, QUICK))
    assert_kept(tmp_path / NETWORK, pruned)
    export(tmp_path / NETWORK, 18, tmp_path)
    stored = {i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / MODEL).graph.initializer}
    for layer in plan_of(pruned).sparse:
        codes = stored[f"{layer}.weight_codes"]
        fours = np.moveaxis(codes, 1 if codes.ndim == 4 else 0, -1).reshape(-1, 4)
        assert np.count_nonzero(fours, axis=1).max() <= 2
        assert np.count_nonzero(codes)


def test_weights_that_lost_their_pattern_are_refused_by_training_and_by_export(
    people: StageData, pruned: Path, tmp_path: Path
) -> None:
    model, checkpoint = load_network(pruned)
    layer = plan_of(pruned).sparse[1]
    with torch.no_grad():
        model.get_parameter(f"{layer}.weight").add_(0.01)
    save_checkpoint(tmp_path / "broken", checkpoint.card, model.state_dict())
    with pytest.raises(CheckpointError, match=f"2:4 sparsity: {layer}"):
        recover(tmp_path / "broken", pruned, people, TRAINING, (tmp_path / "out", QUICK))
    with pytest.raises(ParityError, match=f"{layer}: found weights that are not 2:4 sparse") as caught:
        export(tmp_path / "broken", 18, tmp_path)
    assert caught.value.exit_code == 5
    sparsify(model, plan_of(pruned).sparse)
    check_pattern(model, plan_of(pruned).sparse)
