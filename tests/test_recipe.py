"""Recipes: what ships, what a field may hold, what a mistake is answered with."""

from __future__ import annotations

import typing
from pathlib import Path

import msgspec
import pytest

from edgepose.errors import RecipeError
from edgepose.profiles import load_target, profile_names
from edgepose.recipe import (
    Export,
    Importance,
    Prune,
    QuantisationAware,
    QuantiseAfterTraining,
    Recipe,
    Scope,
    find_profile,
    load_recipe,
)
from edgepose.strict_yaml import parse_yaml

HEAD = "name: mine\ndescription: a test\n"


def read(text: str) -> Recipe:
    return parse_yaml(HEAD + text, Recipe, source="mine.yaml")


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text)
    return str(caught.value)


def test_the_four_recipes_come_along() -> None:
    assert {"fp32", "ptq-int8", "qat-int8", "prune-qat-int8"} <= set(profile_names("recipes"))


@pytest.mark.parametrize("name", profile_names("recipes"))
def test_shipped_recipe_reads_names_itself_and_its_targets_exist(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    for target in recipe.targets:
        load_target(target)


def test_shipped_recipes_do_what_their_names_say() -> None:
    fp32, ptq, qat, pruned = (load_recipe(name) for name in ("fp32", "ptq-int8", "qat-int8", "prune-qat-int8"))
    assert (fp32.prune, fp32.quantise) == (None, None)
    assert isinstance(ptq.quantise, QuantiseAfterTraining)
    assert ptq.prune is None
    assert isinstance(qat.quantise, QuantisationAware)
    assert qat.prune is None
    assert isinstance(pruned.quantise, QuantisationAware)
    assert pruned.prune is not None


def test_stages_that_are_left_out_do_not_happen() -> None:
    recipe = read("")
    assert recipe == Recipe("mine", "a test", targets=("this-cpu",), export=Export(18))
    assert recipe.prune is None
    assert recipe.quantise is None


def test_targets_of_the_command_line_replace_the_recipes_own() -> None:
    assert load_recipe("fp32", targets=["x86-cpu", "this-cpu", "x86-cpu"]).targets == ("x86-cpu", "this-cpu")
    assert load_recipe("fp32").targets == ("this-cpu",)


def test_recipe_is_read_from_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(HEAD + "prune: {ratio: 0.5}\n")
    assert load_recipe(str(path)).prune == Prune(0.5)
    path.write_text(HEAD + "prune:\n  ratios:\n    backbone.stages.3.*: 0.5\n  depth: 2\n  pattern: 2:4\n")
    assert load_recipe(str(path)).prune == Prune(ratios={"backbone.stages.3.*": 0.5}, depth=2, pattern="2:4")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("qantise: {mode: ptq}\n", ["mine.yaml: line 3: qantise", "did you mean 'quantise'?"]),
        ("quantise:\n  mode: ptq\n  epochs: 3\n", ["line 5: quantise.epochs", "unknown key 'epochs'"]),
        ("quantise: {mode: int4}\n", ["quantise.mode", "'int4'", "one of ptq, qat"]),
        ("quantise: {calibration_images: 3}\n", ["quantise", "no key 'mode'", "ptq"]),
        ("quantise: {mode: qat, calibration_images: 0}\n", ["quantise.calibration_images", "found 0", ">= 1"]),
        ("quantise: {mode: qat, epochs: 0}\n", ["quantise.epochs", "found 0"]),
        ("prune: {}\n", ["prune", "none of ratio, speedup and target_latency_ms", "add one of them"]),
        ("prune: {ratio: 0.5, speedup: 2}\n", ["prune", "ratio and speedup together", "leave one of them"]),
        ("prune: {speedup: 2, target_latency_ms: 4}\n", ["speedup and target_latency_ms together"]),
        ("prune: {speedup: 1}\n", ["prune.speedup", "found 1", "> 1"]),
        ("prune: {target_latency_ms: 0}\n", ["prune.target_latency_ms", "found 0", "> 0"]),
        ("prune: {ratio: 1.0}\n", ["prune.ratio", "found 1.0", "< 1.0"]),
        ("prune: {ratio: 0}\n", ["prune.ratio", "> 0.0"]),
        ("prune: {ratio: 0.5, importance: tailor}\n", ["prune.importance", "'tailor'", "did you mean 'taylor'?"]),
        ("prune: {ratio: 0.5, distill_weight: 2}\n", ["prune.distill_weight", "<= 1.0"]),
        ("prune: {ratio: 0.5, protected: [1]}\n", ["prune.protected[0]", "text"]),
        ("prune: {ratios: {backbone.*: 1.0}}\n", ["line 3: prune.ratios", "< 1.0"]),
        ("prune: {ratios: {backbone.*: 0}}\n", ["none of ratio", "or ratios, depth or pattern"]),
        ("prune: {depth: -1}\n", ["prune.depth", ">= 0"]),
        ("prune: {pattern: 1:4}\n", ["prune.pattern", "'1:4'", "'2:4'"]),
        ("prune: {depth: 1, steps: 2}\n", ["2 steps towards none of ratio, speedup and target_latency_ms"]),
        ("export: {opset: 12}\n", ["export.opset", "found 12", ">= 13"]),
        ("targets: []\n", ["targets", "a list of 0"]),
        ("targets: this-cpu\n", ["targets", "'this-cpu'", "a list"]),
        ("targets: [this-cpu, this-cpu]\n", ["the target 'this-cpu' twice"]),
        ("max_drop_points: -1\n", ["max_drop_points", ">= 0.0"]),
        ("seed: 1.5\n", ["seed", "a whole number"]),
    ],
)
def test_mistake_is_answered_with_place_and_remedy(text: str, parts: list[str]) -> None:
    message = refusal(text)
    for part in parts:
        assert part in message


def test_name_is_required() -> None:
    with pytest.raises(RecipeError, match="no key 'name'"):
        parse_yaml("description: nameless\n", Recipe, source="mine.yaml")


def test_recipe_survives_json() -> None:
    for name in profile_names("recipes"):
        recipe = load_recipe(name)
        assert msgspec.json.decode(msgspec.json.encode(recipe), type=Recipe) == recipe


def test_find_profile_is_reachable_beside_the_recipe() -> None:
    assert find_profile("recipes", "fp32").name == "fp32.yaml"


def test_choices_are_those_that_pruning_knows() -> None:
    plan = pytest.importorskip("edgepose.compress.plan", reason="pruning needs edgepose[compile]")
    hints = typing.get_type_hints(plan.PruneConfig)
    assert typing.get_args(Importance) == typing.get_args(hints["importance"])
    assert typing.get_args(Scope) == typing.get_args(hints["scope"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("schedule: cubic", "schedule cubic for one step"),
        ("sparsity: 0.001", "sparsity 0.001 without sparse_epochs"),
        ("steps: 3, epochs: 2", "2 epochs for 3 steps"),
        ("epochs: 0, feature_weight: 1", "feature_weight 1 without epochs"),
        ("steps: 0", ">= 1"),
        ("schedule: steep, steps: 2", "'steep'"),
    ],
)
def test_settings_of_steps_that_mean_nothing_in_their_place_are_refused(text: str, words: str) -> None:
    assert words in refusal(f"prune: {{ratio: 0.5, {text}}}\n")


def test_pruning_in_steps_after_sparse_training_with_feature_maps() -> None:
    text = "ratio: 0.5, steps: 4, schedule: cubic, sparse_epochs: 5, sparsity: 0.001, feature_weight: 2"
    prune = read(f"prune: {{{text}}}\n").prune
    assert prune is not None
    assert (prune.steps, prune.schedule, prune.sparse_epochs, prune.sparsity) == (4, "cubic", 5, 0.001)
    assert prune.feature_weight == 2
