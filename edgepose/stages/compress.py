"""The stages that change a network: prune, recover, post-training quantisation, quantisation-aware training.

Invariant: each reads one checkpoint and writes one whose lineage has grown by one entry; figures are measured on dev.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor, nn

from edgepose.blocks.card import Card, Lineage
from edgepose.blocks.checkpoint import Checkpoint, save_checkpoint
from edgepose.blocks.losses import keypoint_loss
from edgepose.compress.fold import fold_batch_norms
from edgepose.data.coco import PoseDataset
from edgepose.errors import CheckpointError
from edgepose.spec import ModelSpec
from edgepose.stages.cache import StageResult
from edgepose.stages.latency import PLAN
from edgepose.stages.networks import load_network, pruning_of
from edgepose.stages.people import StageData
from edgepose.stages.settings import PruneStage, QuantiseStage
from edgepose.stages.source import Source
from edgepose.training.batches import AugmentedPeople, layout_of, to_input
from edgepose.training.config import TrainConfig
from edgepose.training.loop import RunOptions, dev_metrics, fit
from edgepose.training.predict import Crops, cut_crops, predict

if TYPE_CHECKING:
    from edgepose.compress.plan import PruningPlan
    from edgepose.compress.prune import Ranking

NETWORK = "network"
"""Name of the checkpoint in a stage's folder."""


def reference(source: Source | Path, data: StageData, _folder: Path) -> dict[str, Any]:
    """Measure the checkpoint that is to be compressed on dev."""
    network, checkpoint = load_network(source)
    return {"dev": _figures(network, checkpoint.card.spec, data)}


def prune(
    source: Source | Path,
    data: StageData,
    settings: PruneStage,
    folder: Path,
    *,
    stage: str = "prune",
    search: StageResult | None = None,
) -> dict[str, Any]:
    """Remove channels, then repair the normalisation statistics on training people.

    Of a network that is pruned already so much more goes that `settings.ratio` of the unpruned one is gone; the plan on
    the card and the figures in the report are for all of it. Where a search for a latency led here, a network that is
    not pruned yet gets the very plan that was timed, and what the search saw is in the report.
    """
    from edgepose.compress.compose import compose
    from edgepose.compress.plan import PruneConfig, plan_from_json
    from edgepose.compress.prune import plan_pruning

    config = PruneConfig(**settings.criteria)

    network, checkpoint = load_network(source)
    earlier = pruning_of(checkpoint)
    if earlier is not None:
        left = 1 - (1 - config.ratio) * earlier.macs_before / earlier.macs_after
        config = msgspec.structs.replace(config, ratio=max(0.0, left))
    spec = checkpoint.card.spec
    if search is not None and earlier is None:
        plan = plan_from_json((search.path / PLAN).read_bytes())
    else:
        losses = _losses(spec, data.train.sample(_TAYLOR_PEOPLE, config.seed), config.seed)
        plan = plan_pruning(network, _blank(spec), config, losses=losses)
    pruned = _pruned(network, plan, spec, data)
    if earlier is not None:
        plan = compose(earlier, plan)
    report = {
        **_outcome(plan, pruned, spec, data),
        **({} if search is None else {"latency": search.report}),
    }
    card = _grown(checkpoint, stage, settings, data.digests, report)
    card = msgspec.structs.replace(card, plan=msgspec.to_builtins(plan))
    save_checkpoint(folder / NETWORK, card, pruned.state_dict())
    return report


def plan_network(source: Source | Path, data: StageData | None, settings: PruneStage) -> PruningPlan:
    """What pruning with these settings would remove from a checkpoint's network.

    Args:
        source: The checkpoint; it may be pruned already, and the plan is for what is left.
        data: Training people, for importance "taylor" and for depth; None where neither is asked for.
        settings: With a ratio.

    Raises:
        RecipeError: The settings ask for what cannot be had.
        CheckpointError: The network cannot be traced, or the checkpoint is quantised.
    """
    from edgepose.compress.plan import PruneConfig
    from edgepose.compress.prune import plan_pruning

    network, checkpoint = load_network(source)
    check_prunable(checkpoint.card)
    spec, config = checkpoint.card.spec, PruneConfig(**settings.criteria)
    people = None if data is None else data.train.sample(_TAYLOR_PEOPLE, config.seed)
    losses = None if people is None else _losses(spec, people, config.seed)
    return plan_pruning(network, _blank(spec), config, losses=losses)


def replay(source: Source | Path, plan: PruningPlan, data: StageData | None, path: Path) -> dict[str, Any]:
    """Apply a stored plan to a checkpoint of the planned architecture.

    Args:
        source: The checkpoint; where it is pruned already, the plan is for what is left.
        plan: The plan.
        data: People who repair the normalisation statistics and measure the outcome on dev; None does neither.
        path: Where the pruned checkpoint goes.

    Raises:
        CheckpointError: The plan is for another network, or the checkpoint is quantised.
    """
    from edgepose.compress.compose import compose
    from edgepose.compress.plan import plan_to_json
    from edgepose.compress.prune import check_exact

    network, checkpoint = load_network(source)
    check_prunable(checkpoint.card)
    spec, earlier = checkpoint.card.spec, pruning_of(checkpoint)
    pruned = _pruned(network, plan, spec, data)
    check_exact(network, plan)
    digest = hashlib.sha256(plan_to_json(plan)).hexdigest()
    whole = plan if earlier is None else compose(earlier, plan)
    report = _outcome(whole, pruned, spec, data)
    inputs = {**({} if data is None else data.digests), "plan": digest}
    # Beside the settings that the plan was made with, its digest: no recipe is taken to have made this checkpoint.
    card = _grown(checkpoint, "prune", plan.config, inputs, report)
    save_checkpoint(path, msgspec.structs.replace(card, plan=msgspec.to_builtins(whole)), pruned.state_dict())
    return report


def check_prunable(card: Card) -> None:
    """Refuse a checkpoint that cannot be pruned any more.

    Raises:
        CheckpointError: It is quantised.
    """
    if card.quantisation is not None:
        raise CheckpointError(
            card.name, found="a quantised checkpoint", expected="a float one", fix="prune before quantising"
        )


def _pruned(network: nn.Module, plan: PruningPlan, spec: ModelSpec, data: StageData | None) -> nn.Module:
    from edgepose.compress.plan import apply_pruning
    from edgepose.compress.prune import reestimate_batch_norm

    pruned = apply_pruning(network, plan)
    if data is not None:
        crops = cut_crops(data.train.sample(_TAYLOR_PEOPLE, plan.config.seed), spec)
        reestimate_batch_norm(pruned, list(_batches(crops, spec)))
    return pruned


def _outcome(plan: PruningPlan, pruned: nn.Module, spec: ModelSpec, data: StageData | None) -> dict[str, Any]:
    """What a pruning stage reports."""
    report: dict[str, Any] = {
        "macs_before": plan.macs_before,
        "macs_after": plan.macs_after,
        "params_before": plan.params_before,
        "params_after": plan.params_after,
    }
    if plan.blocks:
        report["blocks_removed"] = [block.name for block in plan.blocks]
    if plan.sparse:
        from edgepose.compress.macs import count_macs

        macs = count_macs(pruned, _blank(spec))
        share = sum(macs.layers[name] for name in plan.sparse) / max(macs.total, 1)
        report["sparse"] = {"pattern": plan.config.pattern, "layers": len(plan.sparse), "macs_share": share}
    return report if data is None else {**report, "dev": _figures(pruned, spec, data)}


def ranked_channels(network: nn.Module, spec: ModelSpec, data: StageData, settings: PruneStage) -> Ranking:
    """The channels of a network, ranked as `prune` ranks them."""
    from edgepose.compress.plan import PruneConfig
    from edgepose.compress.prune import rank_channels

    config = PruneConfig(**{**settings.criteria, "ratio": 0.0})
    losses = _losses(spec, data.train.sample(_TAYLOR_PEOPLE, config.seed), config.seed)
    return rank_channels(network, _blank(spec), config, losses=losses)


def recover(
    source: Source | Path,
    teacher: Source | Path,
    data: StageData,
    config: TrainConfig,
    run: tuple[Path, RunOptions],
    *,
    stage: str = "recover",
) -> dict[str, Any]:
    """Fine-tune a network, a pruned one say, with another as teacher.

    Args:
        source: The network.
        teacher: The unpruned network.
        data: People.
        config: Settings of the run.
        run: Folder for the checkpoint, and how the run is carried out.
        stage: What the lineage calls it.
    """
    network, checkpoint = load_network(source)
    taught, teaching = load_network(teacher)
    report = _fine_tune(network, taught, checkpoint, data, (config, run[1]))
    inputs = {**data.digests_for(config), "teacher": teaching.digest}
    save_checkpoint(run[0] / NETWORK, _grown(checkpoint, stage, config, inputs, report), network.state_dict())
    return report


def quantise(
    source: Source | Path, data: StageData, config: QuantiseStage, run: tuple[Path, RunOptions]
) -> dict[str, Any]:
    """Fold, calibrate and, with `config.training`, fine-tune; the float network is the teacher.

    With `config.max_drop` layers are given back to floating point until the budget holds.
    """
    from edgepose.compress.quantise import QuantiseConfig, placement_of, prepare, tensors_of

    network, checkpoint = load_network(source)
    spec = checkpoint.card.spec
    people = data.train.sample(config.calibration_images, config.seed)
    batches = list(_batches(cut_crops(people, spec), spec))
    folded = fold_batch_norms(network)
    settings = QuantiseConfig(
        symmetric=config.symmetric,
        estimator=config.estimator,
        protected=config.protected,
        subset_size=len(people),
    )
    wrapped = prepare(folded, batches, settings)
    calibrated = _figures(wrapped, spec, data)
    report: dict[str, Any] = {"calibration_people": len(people), "dev_after_calibration": calibrated}
    other = prepare(folded, batches, msgspec.structs.replace(settings, symmetric=not config.symmetric))
    report["activations"] = _sides(config.symmetric, calibrated, _figures(other, spec, data))
    if config.training is None:
        report["dev"] = report["dev_after_calibration"]
    else:
        report |= _fine_tune(wrapped, network, checkpoint, data, (config.training, run[1]))
    if config.max_drop is not None:
        from edgepose.stages.restore import Judge, restored

        store = None if run[1].state is None else run[1].state.with_suffix(".restored.json")
        judge = Judge(spec, lambda made: _figures(made, spec, data), _figures(network, spec, data), store)
        wrapped, report["max_drop"] = restored(wrapped, config.max_drop, judge)
        if report["max_drop"]["path"]:
            report["dev_all_integer"], report["dev"] = report["dev"], _figures(wrapped, spec, data)
    card = _grown(checkpoint, config.name, config, data.digests_for(config.training), report)
    card = msgspec.structs.replace(card, quantisation=msgspec.to_builtins(placement_of(wrapped)))
    save_checkpoint(run[0] / NETWORK, card, tensors_of(wrapped))
    return report


def _sides(symmetric: bool, chosen: dict[str, float], other: dict[str, float]) -> dict[str, Any]:
    """What asymmetric and symmetric activations reach on dev after calibration, and the points between them."""
    signed, unsigned = (chosen, other) if symmetric else (other, chosen)
    return {
        "chosen": "symmetric" if symmetric else "asymmetric",
        "asymmetric": unsigned,
        "symmetric": signed,
        "symmetric_costs_points": {name: 100 * (unsigned[name] - signed[name]) for name in _SHOWN if name in signed},
    }


_SHOWN = ("pck_torso_0.2", "pck_torso_0.1", "pck_extent_0.1")
_TAYLOR_PEOPLE = 512  # people whose gradients rank channels and whose activations repair normalisation statistics


def _fine_tune(
    network: nn.Module, teacher: nn.Module, checkpoint: Checkpoint, data: StageData, run: tuple[TrainConfig, RunOptions]
) -> dict[str, Any]:
    """Train a network that was made of a checkpoint's; what its plan left sparse stays so."""
    from edgepose.compress.sparsity import pattern_kept

    plan, spec = pruning_of(checkpoint), checkpoint.card.spec
    with pattern_kept(network, () if plan is None else plan.sparse):
        result = fit(network, spec, data.people_for(run[0]), run[0], teacher=teacher, options=run[1])
    return {
        "curve": list(result.curve),
        "best_epoch": result.best_epoch,
        **({"calibration": result.calibration} if result.calibration else {}),
        "dev": _figures(network, spec, data),
    }


def _blank(spec: ModelSpec) -> Tensor:
    """(1, 3, h, w): an input of the right size."""
    return torch.zeros(1, 3, *spec.preprocess.input_hw)


def _figures(network: nn.Module, spec: ModelSpec, data: StageData) -> dict[str, float]:
    crops = cut_crops(data.dev, spec)
    return dev_metrics(predict(network, spec, crops), crops)


def batches_of(people: PoseDataset, spec: ModelSpec) -> Iterator[Tensor]:
    """Evaluation crops of people as inputs of a network, (N, 3, h, w) float32, N up to 32."""
    return _batches(cut_crops(people, spec), spec)


def _batches(crops: Crops, spec: ModelSpec) -> Iterator[Tensor]:
    for start in range(0, len(crops.pixels), 32):
        yield to_input(torch.from_numpy(crops.pixels[start : start + 32]), spec).contiguous()


def _losses(spec: ModelSpec, people: PoseDataset, seed: int) -> Any:
    """The training losses that Taylor importance differentiates, one per batch."""
    batches = AugmentedPeople(people, spec, TrainConfig(epochs=1, batch_size=32, seed=seed))

    def losses(network: nn.Module) -> Iterator[Tensor]:
        for number in range(len(batches)):
            batch = batches[number]
            images = to_input(batch.crops, spec).contiguous(memory_format=layout_of(network))
            yield keypoint_loss(network(images), batch.targets, batch.weights, spec.decoder)

    return losses


def _grown(
    checkpoint: Checkpoint, stage: str, config: msgspec.Struct, inputs: dict[str, str], report: dict[str, Any]
) -> Card:
    entry = Lineage(stage, msgspec.to_builtins(config), {**inputs, "checkpoint": checkpoint.digest}, report)
    return msgspec.structs.replace(checkpoint.card, lineage=(*checkpoint.card.lineage, entry), metrics={})
