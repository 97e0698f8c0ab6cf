"""What a loss is taken against, and which of several engines counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmarks.context import Context
from benchmarks.losses import Loss, control_arm, control_name, reference, worst_loss
from edgepose.blocks import zoo
from edgepose.blocks.card import Lineage, read_card
from edgepose.blocks.zoo import find_checkpoint
from edgepose.data.coco import PoseDataset
from edgepose.errors import CheckpointError
from edgepose.profiles import load_target
from edgepose.recipe import load_recipe
from edgepose.stages.control import control_phases
from edgepose.stages.settings import plan_of
from tests.profiler.simulated import KEYPOINTS, record
from tests.test_compiler import copy_checkpoint
from tests.tiny_checkpoint import Tiny

METRIC, RECIPE = "pck_torso_0.2", "qat-int8"


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A run in which val is a set of simulated people."""
    made = Context(tmp_path, tmp_path)
    made.once("val", lambda: PoseDataset((), KEYPOINTS, "simulated", tmp_path))
    return made


def test_the_engine_that_loses_most_counts_and_so_does_the_widest_bound(context: Context) -> None:
    base, good, bad = record(800), record(800, lost=0.005), record(800, lost=0.03)
    found = worst_loss(("float", base), [("onnxruntime", good), ("openvino", bad)], context, METRIC)
    assert found.detail["backend"] == "openvino"
    assert found.points == found.detail["by_backend"]["openvino"] == pytest.approx(1.6, abs=0.5)
    assert found.points > found.detail["by_backend"]["onnxruntime"] > 0
    assert found.upper > found.points
    assert found.detail["baseline"] - found.detail["candidate"] == pytest.approx(found.points)
    assert "of float" in found.text


@pytest.mark.parametrize(
    ("points", "upper", "value"), [(0.4, 1.1, 0.4), (0.9, 2.1, 1.1), (1.2, 1.5, 1.2), (-0.5, 0.2, -0.5)]
)
def test_a_bound_counts_where_it_exceeds_what_is_promised_of_it(points: float, upper: float, value: float) -> None:
    assert Loss(points, upper, {}).value(1.0, 2.0) == pytest.approx(value)


# The control arm


@pytest.fixture
def small_zoo(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A zoo of one network and nothing else."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    monkeypatch.setattr(zoo, "_FOLDER", folder)
    copy_checkpoint(tiny.checkpoint, folder / "tiny")
    return folder


def put_control(folder: Path, *, source: str = "", **changes: Any) -> None:
    """A control arm of the recipe for the network `tiny`, its settings changed; its weights do not matter here."""
    recipe = load_recipe(RECIPE)
    (phase,) = control_phases(plan_of(recipe, tuple(load_target(name) for name in recipe.targets)))
    card = read_card(folder / "tiny")
    config = msgspec.structs.replace(phase.config, **changes)
    inputs = {"checkpoint": source or card.weights_sha256}
    entry = Lineage("train", msgspec.to_builtins(config), inputs, {})
    card = msgspec.structs.replace(card, lineage=(*card.lineage, entry))
    copy_checkpoint(folder / "tiny", folder / control_name("tiny", RECIPE), card)


def test_an_absent_control_arm_says_how_it_is_made(small_zoo: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tiny-qat-int8-control.*--control-of qat-int8 --from tiny"):
        control_arm("tiny", RECIPE)


def test_the_control_arm_of_a_recipe_is_found(small_zoo: Path) -> None:
    put_control(small_zoo)
    assert control_arm("tiny", RECIPE) == find_checkpoint("tiny-qat-int8-control")


def test_a_control_arm_of_other_settings_or_other_weights_is_refused(small_zoo: Path) -> None:
    put_control(small_zoo, epochs=1)
    with pytest.raises(CheckpointError, match="other settings"):
        control_arm("tiny", RECIPE)
    put_control(small_zoo, source="0" * 64)
    with pytest.raises(CheckpointError, match="other weights"):
        control_arm("tiny", RECIPE)


def test_a_network_that_was_only_renamed_is_no_control_arm(small_zoo: Path) -> None:
    copy_checkpoint(small_zoo / "tiny", small_zoo / control_name("tiny", RECIPE))
    with pytest.raises(CheckpointError, match="other settings"):
        control_arm("tiny", RECIPE)


def test_the_better_of_checkpoint_and_control_is_the_reference(small_zoo: Path, context: Context) -> None:
    put_control(small_zoo)
    context.once(f"torch {find_checkpoint('tiny')}", lambda: record(100, lost=0.2))
    context.once(f"torch {find_checkpoint('tiny-qat-int8-control')}", lambda: record(100))
    assert reference(context, "tiny", RECIPE, METRIC)[0] == "tiny-qat-int8-control"
