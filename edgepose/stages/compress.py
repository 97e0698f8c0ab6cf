"""The stages that change a network: prune, recover, post-training quantisation, quantisation-aware training.

Invariant: each reads one checkpoint and writes one whose lineage has grown by one entry; figures are measured on dev.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from edgepose.blocks.card import Card, Lineage
from edgepose.blocks.checkpoint import Checkpoint, save_checkpoint
from edgepose.blocks.losses import keypoint_loss
from edgepose.compress.fold import fold_batch_norms
from edgepose.data.coco import PoseDataset
from edgepose.spec import ModelSpec
from edgepose.stages.networks import load_network
from edgepose.stages.settings import PruneStage, QuantiseStage
from edgepose.stages.source import Source
from edgepose.training.batches import AugmentedPeople, layout_of, to_input
from edgepose.training.config import TrainConfig
from edgepose.training.loop import RunOptions, dev_metrics, fit
from edgepose.training.predict import Crops, cut_crops, predict

NETWORK = "network"
"""Name of the checkpoint in a stage's folder."""


@dataclass(frozen=True, slots=True, eq=False)
class StageData:
    """People that the compression stages may see.

    Attributes:
        train: Training people without dev.
        dev: The people that choices are made on.
    """

    train: PoseDataset
    dev: PoseDataset

    @property
    def digests(self) -> dict[str, str]:
        return {"train": self.train.digest, "dev": self.dev.digest}


def reference(source: Source | Path, data: StageData, _folder: Path) -> dict[str, Any]:
    """Measure the checkpoint that is to be compressed on dev."""
    network, checkpoint = load_network(source)
    return {"dev": _figures(network, checkpoint.card.spec, data)}


def prune(source: Source | Path, data: StageData, settings: PruneStage, folder: Path) -> dict[str, Any]:
    """Remove channels, then repair the normalisation statistics on training people."""
    from edgepose.compress.plan import PruneConfig, apply_pruning
    from edgepose.compress.prune import plan_pruning, reestimate_batch_norm

    config = PruneConfig(**msgspec.to_builtins(settings))

    network, checkpoint = load_network(source)
    spec = checkpoint.card.spec
    height, width = spec.preprocess.input_hw
    losses = _losses(spec, data.train.sample(_TAYLOR_PEOPLE, config.seed), config.seed)
    plan = plan_pruning(network, torch.zeros(1, 3, height, width), config, losses=losses)
    pruned = apply_pruning(network, plan)
    crops = cut_crops(data.train.sample(_TAYLOR_PEOPLE, config.seed), spec)
    reestimate_batch_norm(pruned, list(_batches(crops, spec)))
    report = {
        "macs_before": plan.macs_before,
        "macs_after": plan.macs_after,
        "params_before": plan.params_before,
        "params_after": plan.params_after,
        "dev": _figures(pruned, spec, data),
    }
    card = _grown(checkpoint, "prune", settings, data.digests, report)
    card = msgspec.structs.replace(card, plan=msgspec.to_builtins(plan))
    save_checkpoint(folder / NETWORK, card, pruned.state_dict())
    return report


def recover(
    source: Source | Path, teacher: Source | Path, data: StageData, config: TrainConfig, run: tuple[Path, RunOptions]
) -> dict[str, Any]:
    """Fine-tune a pruned network with the unpruned one as teacher."""
    network, checkpoint = load_network(source)
    taught, teaching = load_network(teacher)
    report = _fine_tune(network, taught, checkpoint.card.spec, data, (config, run[1]))
    inputs = {**data.digests, "teacher": teaching.digest}
    save_checkpoint(run[0] / NETWORK, _grown(checkpoint, "recover", config, inputs, report), network.state_dict())
    return report


def quantise(
    source: Source | Path, data: StageData, config: QuantiseStage, run: tuple[Path, RunOptions]
) -> dict[str, Any]:
    """Fold, calibrate and, with `config.training`, fine-tune; the float network is the teacher."""
    from edgepose.compress.quantise import QuantiseConfig, placement_of, prepare, tensors_of

    network, checkpoint = load_network(source)
    spec = checkpoint.card.spec
    people = data.train.sample(config.calibration_images, config.seed)
    crops = cut_crops(people, spec)
    settings = QuantiseConfig(symmetric=config.symmetric, protected=config.protected, subset_size=len(people))
    wrapped = prepare(fold_batch_norms(network), list(_batches(crops, spec)), settings)
    report: dict[str, Any] = {"calibration_people": len(people), "dev_after_calibration": _figures(wrapped, spec, data)}
    if config.training is None:
        report["dev"] = report["dev_after_calibration"]
    else:
        report |= _fine_tune(wrapped, network, spec, data, (config.training, run[1]))
    card = _grown(checkpoint, config.name, config, data.digests, report)
    card = msgspec.structs.replace(card, quantisation=msgspec.to_builtins(placement_of(wrapped)))
    save_checkpoint(run[0] / NETWORK, card, tensors_of(wrapped))
    return report


_TAYLOR_PEOPLE = 512  # people whose gradients rank channels and whose activations repair normalisation statistics


def _fine_tune(
    network: nn.Module, teacher: nn.Module, spec: ModelSpec, data: StageData, run: tuple[TrainConfig, RunOptions]
) -> dict[str, Any]:
    result = fit(network, spec, (data.train, data.dev), run[0], teacher=teacher, options=run[1])
    return {
        "curve": list(result.curve),
        "best_epoch": result.best_epoch,
        **({"calibration": result.calibration} if result.calibration else {}),
        "dev": _figures(network, spec, data),
    }


def _figures(network: nn.Module, spec: ModelSpec, data: StageData) -> dict[str, float]:
    crops = cut_crops(data.dev, spec)
    return dev_metrics(predict(network, spec, crops), crops)


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
