"""Pruning plans and the compiler: a bundle holds its plan, and a network that was pruned by hand goes on from there."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import pytest
import torch

from edgepose.blocks.card import read_card
from edgepose.compiler import CompileRequest, planned_stages
from edgepose.compress.plan import PruneConfig, PruningPlan, apply_pruning
from edgepose.compress.prune import plan_pruning
from edgepose.errors import CheckpointError
from edgepose.recipe import Prune
from edgepose.stages.compress import replay
from edgepose.stages.networks import load_network
from tests.tiny_checkpoint import Compiled, Tiny, quick

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def cache(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tiny.cache))


@pytest.mark.slow
def test_a_bundle_holds_the_plan_of_its_chain(tiny: Tiny, compiled: Compiled) -> None:
    manifest = compiled("prune-qat-int8").bundle.manifest
    held = manifest.reports["compile"]["plan"]
    assert hashlib.sha256(msgspec.json.encode(held)).hexdigest() == manifest.chain["plan"]
    plan = msgspec.convert(held, PruningPlan)
    assert plan.macs_after == manifest.reports["prune"]["macs_after"]
    apply_pruning(load_network(tiny.checkpoint)[0], plan)
    assert "plan" not in compiled("fp32").bundle.manifest.reports["compile"]


def test_a_network_that_was_pruned_by_hand_can_be_quantised_but_not_pruned_by_a_recipe(
    tiny: Tiny, tmp_path: Path
) -> None:
    network, checkpoint = load_network(tiny.checkpoint)
    size = checkpoint.card.spec.preprocess.input_hw
    plan = plan_pruning(network, torch.zeros(1, 3, *size), PruneConfig(ratio=0.3, importance="l2"))
    replay(tiny.checkpoint, plan, None, tmp_path / "pruned")
    pruned = str(tmp_path / "pruned")

    request = CompileRequest(quick("ptq-int8"), pruned, tiny.data, tmp_path / "out.bundle")
    stages = dict(planned_stages(request))
    assert "ptq" in stages
    assert "prune" not in stages
    again = quick("prune-qat-int8")
    with pytest.raises(CheckpointError, match="compressed already, with other settings"):
        planned_stages(with_recipe(request, again))
    # Equal settings do not make it that recipe's checkpoint: the plan may come from anywhere.
    same = Prune(0.3, importance="l2", epochs=0)
    assert read_card(pruned).lineage[-1].stage == "prune"
    with pytest.raises(CheckpointError, match="compressed already, with other settings"):
        planned_stages(with_recipe(request, msgspec.structs.replace(again, prune=same, quantise=None)))


def with_recipe(request: CompileRequest, recipe: object) -> CompileRequest:
    return CompileRequest(recipe, request.model, request.data, request.out)  # type: ignore[arg-type]
