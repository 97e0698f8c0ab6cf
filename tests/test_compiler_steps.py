"""Pruning in steps, through the compiler: each step a stage of its own, one plan in the end, found again as a whole."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import msgspec
import pytest

from edgepose.blocks.card import read_card
from edgepose.blocks.checkpoint import load_checkpoint
from edgepose.compiler import CompileRequest, compile_bundle, planned_stages
from edgepose.compress.plan import PruningPlan, apply_pruning
from edgepose.recipe import Prune, Recipe
from edgepose.stages.networks import load_network
from edgepose.training.loop import Interrupted
from tests.tiny_checkpoint import Tiny, Watch

pytestmark = pytest.mark.usefixtures("one_thread")

PRUNE = Prune(0.4, importance="l1", epochs=2, steps=2, sparse_epochs=1, feature_weight=1.0)
STEPS = ["sparse", "prune-1", "recover-1", "prune", "recover"]
RECIPE = Recipe("steps", "a test", prune=PRUNE)


def request_of(tiny: Tiny, out: Path, **changes: object) -> CompileRequest:
    fields = {"model": f"{tiny.checkpoint}", "data": tiny.data, **changes}
    return CompileRequest(RECIPE, out=out, **fields)  # type: ignore[arg-type]


class Stops(Watch):
    """Stops the run at the first step of one stage's training."""

    def step(self, done: int, total: int, loss: float) -> None:
        if self.begun[-1] == "recover":
            os.kill(os.getpid(), signal.SIGINT)


def test_steps_are_stages_that_resume_and_leave_one_plan(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    request = request_of(tiny, tmp_path / "out.bundle")
    assert [stage for stage, _ in planned_stages(request)][1:6] == STEPS
    with pytest.raises(Interrupted):
        compile_bundle(request, Stops())
    watch = Watch()
    result = compile_bundle(request, watch)
    assert watch.reused == ["reference", *STEPS[:4]]
    reports = result.bundle.manifest.reports
    assert set(STEPS) <= set(reports)
    before, final = reports["prune-1"], reports["prune"]
    assert before["macs_before"] == final["macs_before"] > before["macs_after"] > final["macs_after"]

    (stage,) = [stage for stage in result.stages if stage.stage == "recover"]
    card = read_card(stage.path / "network")
    assert [entry.stage for entry in card.lineage] == ["train", *STEPS]
    assert {entry.inputs.get("teacher") for entry in card.lineage[2:]} == {
        None,
        read_card(tiny.checkpoint).weights_sha256,
    }
    plan = msgspec.convert(card.plan, PruningPlan)
    assert plan.macs_after / plan.macs_before == pytest.approx(0.6, abs=0.1)
    pruned = apply_pruning(load_network(tiny.checkpoint)[0], plan)
    shapes = {name: tensor.shape for name, tensor in load_checkpoint(stage.path / "network").tensors.items()}
    assert {name: tensor.shape for name, tensor in pruned.state_dict().items()} == shapes
    assert_found_again(tiny, stage.path / "network", tmp_path)


def assert_found_again(tiny: Tiny, checkpoint: Path, folder: Path) -> None:
    """A checkpoint that went through all steps is taken as it is, by its lineage."""
    for suffix in (".safetensors", ".json"):
        shutil.copyfile(checkpoint.with_suffix(suffix), (folder / "mine").with_suffix(suffix))
    request = request_of(tiny, folder / "again.bundle", model=str(folder / "mine"))
    assert [(stage, state.split()[0]) for stage, state in planned_stages(request)][:5] == [(s, "reused") for s in STEPS]
    other = msgspec.structs.replace(RECIPE, prune=msgspec.structs.replace(PRUNE, schedule="cubic"))
    stages = planned_stages(CompileRequest(other, str(tiny.checkpoint), tiny.data, folder / "other.bundle"))
    assert all("reused" not in state for _, state in stages)
