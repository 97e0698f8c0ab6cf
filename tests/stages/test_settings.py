"""What a recipe's quantisation comes to, and that older settings go on meaning what they meant."""

from __future__ import annotations

import msgspec
import pytest

from edgepose.errors import RecipeError, UsageError
from edgepose.profiles import load_target
from edgepose.recipe import MaxDrop, Recipe
from edgepose.stages.settings import QuantiseStage, plan_of
from edgepose.strict_yaml import parse_yaml

CPU, JETSON = load_target("this-cpu"), load_target("jetson-orin-nano")
BOTH_KINDS = pytest.mark.parametrize("mode", ["ptq", "qat"])


def recipe(text: str) -> Recipe:
    return parse_yaml(f"name: mine\ndescription: a test\nquantise: {{{text}}}\n", Recipe, source="mine.yaml")


def stage(text: str, *targets: object) -> QuantiseStage:
    found = plan_of(recipe(text), targets or (CPU,)).quantise  # type: ignore[arg-type]
    assert found is not None
    return found


@BOTH_KINDS
def test_the_estimator_and_the_budget_reach_the_stage(mode: str) -> None:
    found = stage(f"mode: {mode}, range_estimator: histogram, max_drop: {{points: 0.5}}")
    assert (found.name, found.estimator) == (mode, "histogram")
    assert found.max_drop == MaxDrop(0.5, "pck_torso_0.2")


@BOTH_KINDS
def test_without_them_all_is_as_before(mode: str) -> None:
    found = stage(f"mode: {mode}")
    assert (found.estimator, found.max_drop) == ("default", None)
    before = {
        name: value for name, value in msgspec.to_builtins(found).items() if name not in ("estimator", "max_drop")
    }
    assert msgspec.convert(before, QuantiseStage, strict=False) == found


@BOTH_KINDS
def test_auto_is_symmetric_where_a_target_runs_tensorrt_and_asymmetric_elsewhere(mode: str) -> None:
    assert not stage(f"mode: {mode}").symmetric
    assert stage(f"mode: {mode}", CPU, JETSON).symmetric
    assert stage(f"mode: {mode}, activations: symmetric").symmetric
    with pytest.raises(UsageError, match="asymmetric, for a target that runs TensorRT"):
        stage(f"mode: {mode}, activations: asymmetric", JETSON)


@BOTH_KINDS
def test_the_least_share_of_integers_is_no_part_of_the_stage(mode: str) -> None:
    """What is demanded of the engines does not make another network."""
    assert stage(f"mode: {mode}, min_int8_macs: 0.5") == stage(f"mode: {mode}")
    assert recipe(f"mode: {mode}").quantise.min_int8_macs == 0.95  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("range_estimator: mse", ["range_estimator", "'mse'"]),
        ("min_int8_macs: 95", ["min_int8_macs", "95", "<= 1"]),
        ("max_drop: 0.5", ["max_drop"]),
        ("max_drop: {points: -1}", ["max_drop.points", ">= 0"]),
        ("max_drop: {metric: auc, points: 1}", ["max_drop.metric", "'auc'"]),
        ("max_drop: {metric: pck_torso_0.1}", ["max_drop", "points"]),
    ],
)
@BOTH_KINDS
def test_what_means_nothing_is_refused_in_the_file(mode: str, text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(f"mode: {mode}, {text}")
    for word in words:
        assert word in str(caught.value)


# Settings of fine-tuning that have no field of their own


def pruning(text: str) -> Recipe:
    return parse_yaml(f"name: mine\ndescription: a test\nprune: {{ratio: 0.5, {text}}}\n", Recipe, source="mine.yaml")


def test_fine_tuning_takes_what_training_takes() -> None:
    asked = "learning_rate: 2.0e-3, training: {optimizer: muon, batch_size: 64, augment: {cutout: 0.0}}"
    found = plan_of(pruning(f"epochs: 7, {asked}"), (CPU,)).recover
    assert found is not None
    assert (found.optimizer, found.batch_size, found.augment.cutout) == ("muon", 64, 0.0)
    assert (found.epochs, found.learning_rate) == (7, 2e-3)
    sparse = plan_of(pruning(f"epochs: 0, sparse_epochs: 3, {asked}"), (CPU,))
    assert sparse.recover is None
    assert sparse.sparse is not None
    assert (sparse.sparse.epochs, sparse.sparse.optimizer) == (3, "muon")
    aware = stage("mode: qat, training: {warmup: 0.2}").training
    assert aware is not None
    assert (aware.warmup, aware.bf16) == (0.2, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{optimiser: muon}", ["prune.training.optimiser", "did you mean 'optimizer'"]),
        ("{epochs: 3}", ["prune.training.epochs", "field of that name"]),
        ("{rendered: 1.5}", ["prune.training", "rendered"]),
        ("{batch_size: 1}", ["prune.training", ">= 2", "batch_size"]),
        ("{optimizer: sgd}", ["prune.training", "sgd"]),
        ("{augment: {cutouts: 0.1}}", ["prune.training", "cutouts"]),
    ],
)
def test_what_training_does_not_take_is_refused(text: str, words: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_of(pruning(f"training: {text}"), (CPU,))
    for word in words:
        assert word in str(caught.value)


def test_settings_of_a_fine_tuning_that_is_left_out_are_refused() -> None:
    with pytest.raises(RecipeError, match="optimizer without epochs"):
        pruning("epochs: 0, training: {optimizer: muon}")
