"""What the zoo's weights are worth to somebody with a hundred labelled photographs, or with other keypoints.

Invariant: both arms of a comparison see the same people, the same number of times, with the same settings; only what
their weights start from differs. The source never saw a picture of the kind that it is transferred to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from benchmarks.context import THREADS, Context, TrainingWatcher
from benchmarks.subjects import METRIC, lspet, val_people
from edgepose.blocks.config import KPEConfig, spec_of
from edgepose.blocks.zoo import find_checkpoint
from edgepose.data.augment import AugmentConfig
from edgepose.data.coco import PoseDataset, dataset
from edgepose.data.splits import some_images, split_train
from edgepose.estimator import PoseEstimator
from edgepose.profiler.accuracy import AccuracyRecord, evaluate, oks_map, summary
from edgepose.training.config import TrainConfig

if TYPE_CHECKING:
    from edgepose.blocks.checkpoint import Checkpoint

IMAGES, SEEDS = 100, (0, 1, 2)
_DEV_PEOPLE = 60  # whoever has a hundred photographs does not hold out six hundred
_SETTINGS = TrainConfig(
    epochs=40, batch_size=20, learning_rate=1.5e-3, optimizer="muon", averaging=0.99, augment=AugmentConfig(cutout=0.0)
)


def few_photographs(context: Context, source: str) -> list[dict[str, float]]:
    """PCK in points on val after training on `IMAGES` photographs of lspet: one row per seed.

    Args:
        context: The run of the claims.
        source: Network of the zoo that never saw a photograph.
    """
    checkpoint = _checkpoint(source)
    train, dev = split_train(dataset(lspet(context), "train"))
    val = val_people(context)
    rows = []
    for seed in SEEDS:
        people = some_images(train, IMAGES, seed), dev.sample(_DEV_PEOPLE, seed)
        row: dict[str, float] = {"seed": seed}
        for arm, start in _arms(checkpoint):
            record = _Arm(context, f"{arm}, seed {seed}", people, val, seed).record(checkpoint.card.kpe, start)
            row[arm] = 100 * summary(record, val.keypoints)[METRIC]
        rows.append(row)
    return rows


def other_keypoints(context: Context, source: str) -> dict[str, float]:
    """OKS-mAP on a third of coco17's photographs after training on the others, 17 keypoints, from scratch and not.

    Args:
        context: The run of the claims.
        source: Network of the zoo with other keypoints.
    """
    checkpoint = _checkpoint(source)
    everybody = dataset(context.data / "coco17", "train")
    photographs = len({person.image for person in everybody.persons})
    seen = some_images(everybody, round(2 / 3 * photographs), seed=0)
    unseen = everybody.without(person.annotation_id for person in seen.persons)
    train, dev = split_train(seen)
    return {
        arm: oks_map(
            _Arm(context, f"coco17 {arm}", (train, dev), unseen, 0).record(checkpoint.card.kpe, start), unseen
        )["oks_ap"]
        for arm, start in _arms(checkpoint)
    }


def _checkpoint(name: str) -> Checkpoint:
    from edgepose.blocks.checkpoint import load_checkpoint

    return load_checkpoint(find_checkpoint(name))


def _arms(checkpoint: Checkpoint) -> tuple[tuple[str, Checkpoint | None], ...]:
    return ("scratch", None), ("transferred", checkpoint)


@dataclass(frozen=True, slots=True)
class _Arm:
    """One training run on few photographs.

    Attributes:
        context: The run of the claims.
        told: What it is called.
        people: To train on, and to choose the epoch on.
        measured: Whom it is measured on.
        seed: Of weights, batches and views.
    """

    context: Context
    told: str
    people: tuple[PoseDataset, PoseDataset]
    measured: PoseDataset
    seed: int

    def record(self, architecture: KPEConfig, start: Checkpoint | None) -> AccuracyRecord:
        """What a network makes of the measured people after training from a checkpoint, or from scratch."""
        import torch

        from edgepose.blocks.kpe import build
        from edgepose.blocks.transfer import transfer
        from edgepose.training.loop import RunOptions, fit
        from edgepose.training.session import TorchSession

        torch.set_num_threads(THREADS)
        keypoints, seed = self.people[0].keypoints, self.seed
        spec = spec_of(architecture, keypoints)
        network = build(architecture, keypoints, seed=seed)
        if start is not None:
            network, _ = transfer(start, architecture, keypoints, seed=seed)
        settings = msgspec.structs.replace(_SETTINGS, seed=seed)
        options = RunOptions(None, TrainingWatcher(self.context, self.told))
        fit(network, spec, self.people, settings, options=options)
        with PoseEstimator(TorchSession(network, spec), spec, backend="torch") as estimator:
            return evaluate(estimator, self.measured, progress=self.context.step(f"{self.told}: measuring"))
