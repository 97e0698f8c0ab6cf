"""Settings of stages: what a recipe comes down to, step by step, and that older cards go on meaning the same."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.profiles import load_target
from edgepose.recipe import Prune, QuantisationAware, Recipe
from edgepose.stages.settings import Plan, PruneStage, plan_of
from edgepose.training.config import TrainConfig


def plan(**prune: object) -> Plan:
    recipe = Recipe("mine", "a test", prune=msgspec.convert({"ratio": 0.6, **prune}, Prune), seed=7)
    return plan_of(recipe, (load_target("x86-cpu"),))


def test_one_step_is_the_whole_and_bears_the_plain_names() -> None:
    whole = plan(epochs=5)
    (step,) = whole.pruning
    assert (step.prune, step.recover, step.suffix) == (whole.prune, whole.recover, "")
    assert whole.sparse is None


@settings(deadline=None, max_examples=40)
@given(
    ratio=st.floats(0.01, 0.99), steps=st.integers(1, 12), epochs=st.integers(12, 60),
    schedule=st.sampled_from(["equal", "cubic"]),
)  # fmt: skip
def test_steps_add_up_to_the_whole(ratio: float, steps: int, epochs: int, schedule: str) -> None:
    found = plan(ratio=ratio, steps=steps, epochs=epochs, **({"schedule": schedule} if steps > 1 else {}))
    removed = [step.prune.ratio for step in found.pruning]
    assert removed == sorted(removed)
    assert removed[0] > 0
    assert removed[-1] == ratio
    recoveries = [step.recover for step in found.pruning if step.recover is not None]
    assert sum(recovery.epochs for recovery in recoveries) == epochs
    assert recoveries[-1].epochs == max(recovery.epochs for recovery in recoveries)
    assert [recovery.seed for recovery in recoveries] == list(range(7, 7 + steps))  # views of their own
    assert [step.suffix for step in found.pruning] == [*(f"-{n}" for n in range(1, steps)), ""]


def test_equal_steps_leave_the_same_share_and_cubic_ones_end_gently() -> None:
    equal = [step.prune.ratio or 0.0 for step in plan(ratio=0.875, steps=3).pruning]
    assert equal == pytest.approx([0.5, 0.75, 0.875])
    cubic = [step.prune.ratio or 0.0 for step in plan(ratio=0.8, steps=4, schedule="cubic").pruning]
    gone = [after - before for before, after in zip([0.0, *cubic], cubic, strict=False)]
    assert gone == sorted(gone, reverse=True)
    assert cubic[1] == pytest.approx(0.8 * (1 - 0.5**3))


def test_no_epochs_mean_pruning_in_steps_without_recovery() -> None:
    assert [step.recover for step in plan(steps=3, epochs=0).pruning] == [None, None, None]


def test_sparse_training_spares_what_pruning_spares() -> None:
    sparse = plan(sparse_epochs=4, protected=("backbone.stem.*",), feature_weight=2.0).sparse
    assert sparse is not None
    assert (sparse.epochs, sparse.sparsity, sparse.dense) == (4, 1e-4, ("backbone.stem.*",))
    assert (sparse.feature_weight, sparse.distill_weight) == (2.0, 0.5)
    assert plan(sparse_epochs=4, sparsity=0.01).sparse.sparsity == 0.01  # type: ignore[union-attr]


def test_feature_weights_reach_both_fine_tunings() -> None:
    quantise = QuantisationAware(feature_weight=3.0)
    recipe = Recipe("mine", "a test", prune=Prune(0.5, feature_weight=2.0), quantise=quantise)
    found = plan_of(recipe, (load_target("x86-cpu"),))
    assert found.recover is not None
    assert found.recover.feature_weight == 2.0
    assert found.quantise is not None
    assert found.quantise.training is not None
    assert found.quantise.training.feature_weight == 3.0


def test_settings_of_older_cards_mean_what_they_meant() -> None:
    """A lineage entry without a younger setting equals the stage of a recipe that does not name that setting."""
    recover = {"epochs": 10, "learning_rate": 1e-3, "distill_weight": 0.5, "seed": 7}
    found = plan(epochs=10)
    assert msgspec.convert(recover, TrainConfig) == found.recover
    prune = {"ratio": 0.6, "importance": "taylor", "scope": "global", "round_to": 16, "protected": [], "seed": 7}
    assert msgspec.convert(prune, PruneStage) == found.prune


def test_blocks_and_ratios_of_layers_go_in_the_first_step_and_sparsity_comes_in_the_last() -> None:
    found = plan(ratios={"backbone.*": 0.5}, depth=2, pattern="2:4", steps=3, epochs=3)
    first, second, last = (step.prune for step in found.pruning)
    assert (first.depth, first.ratios, first.pattern) == (2, {"backbone.*": 0.5}, None)
    assert (second.depth, second.ratios, second.pattern) == (0, {"backbone.*": 0.0}, None)  # they keep what they have
    assert (last.depth, last.ratios, last.pattern) == (0, {"backbone.*": 0.0}, "2:4")
    (only,) = plan(ratios={"backbone.*": 0.5}, depth=2, pattern="2:4").pruning
    assert (only.prune.depth, only.prune.ratios, only.prune.pattern) == (2, {"backbone.*": 0.5}, "2:4")
    assert only.prune.goal == "60% of the multiply-accumulates, 50% of backbone.*, 2 residual blocks, 2:4 sparse"
    assert plan(ratio=None, depth=2).prune == msgspec.structs.replace(plan(depth=2).prune, ratio=0.0)


def test_settings_on_older_cards_ask_for_none_of_it() -> None:
    settings = plan().prune
    stored = {
        name: value
        for name, value in msgspec.to_builtins(settings).items()
        if name not in ("ratios", "depth", "pattern", "speedup", "target_latency_ms")
    }
    assert msgspec.convert(stored, PruneStage, strict=True) == settings
