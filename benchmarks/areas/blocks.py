"""The networks: what one that saw rendered people only knows about photographs.

Invariant: the network is compared with the best that a predictor can do without looking at the photograph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from benchmarks.claim import Claim, Measured
from benchmarks.context import THREADS, Context
from benchmarks.subjects import METRIC, lspet, points, run_record, run_record_lines, torch_record, val_people
from edgepose.blocks.card import Card, Lineage, read_card
from edgepose.blocks.zoo import find_checkpoint
from edgepose.data.coco import PoseDataset, dataset
from edgepose.errors import CheckpointError
from edgepose.pose import metrics
from edgepose.pose.preprocess import crop_transforms, to_source
from edgepose.spec import Preprocess

RENDERED = "kpe-t-rendered"


def rendered_to_real(context: Context) -> Measured:
    """Points by which the network trained on rendered people beats the mean pose on photographs."""
    checkpoint = find_checkpoint(RENDERED)
    card = read_card(checkpoint)
    mean = _mean_pose_figures(context, card.spec.preprocess)
    network = points(context, torch_record(context, checkpoint))
    value = network - 100 * mean[METRIC]
    text = f"{METRIC} {network:.2f} after training on rendered people alone, {100 * mean[METRIC]:.2f} by the mean pose"
    detail: dict[str, Any] = {"network_points": network, "mean_pose": mean, "run_record": run_record(card)}
    lines = list(run_record_lines(card))
    if context.full:
        again = points(context, torch_record(context, _trained_again(context, card)))
        detail["repeated_points"] = again
        text += f"; {again:.2f} by a repeated run, and the worse of both counts"
        repeated = read_card(_trained_again(context, card))
        detail["repeated_run_record"] = run_record(repeated)
        lines += ["repeated:", *run_record_lines(repeated)]
        value = min(value, again - 100 * mean[METRIC])
    return Measured(value, text, detail, tuple(lines))


def _mean_pose_figures(context: Context, preprocess: Preprocess) -> dict[str, float]:
    """Every metric on val of the mean pose of lspet train, placed in each person's crop."""
    people = val_people(context)
    pose = mean_pose(dataset(lspet(context), "train"), preprocess)
    truth = np.stack([person.keypoints for person in people.persons])
    predicted = placed(pose, people, preprocess)
    joints = metrics.measure(predicted, truth, people.keypoints)
    return {name: metrics.pooled(name, joints) for name in metrics.available(people.keypoints)}


def mean_pose(people: PoseDataset, preprocess: Preprocess) -> NDArray[np.float64]:
    """The mean of each labelled joint, (K, 2) float64 pixels of the network's input crop."""
    transforms = crop_transforms(_boxes(people), preprocess)
    points_px = np.stack([person.keypoints for person in people.persons]).astype(np.float64)
    labelled = points_px[..., 2] > 0
    inside = np.einsum("nij,nkj->nki", transforms[:, :, :2], points_px[..., :2]) + transforms[:, None, :, 2]
    total: NDArray[np.float64] = np.where(labelled[..., None], inside, 0.0).sum(axis=0)
    pose: NDArray[np.float64] = total / labelled.sum(axis=0)[:, None]
    return pose


def placed(pose: NDArray[np.float64], people: PoseDataset, preprocess: Preprocess) -> NDArray[np.float32]:
    """A pose of the input crop in everybody's crop, (P, K, 2) float32 pixels of the source images."""
    everybody = np.broadcast_to(pose, (len(people), *pose.shape)).astype(np.float32)
    return to_source(everybody, crop_transforms(_boxes(people), preprocess))


def _boxes(people: PoseDataset) -> NDArray[np.float64]:
    return np.stack([person.box_xyxy for person in people.persons])


# --------------------------------------------------------------------------------------------------- repeating the run


def _trained_again(context: Context, card: Card) -> Path:
    """Renders the people of a run record again and trains on them again: hours."""

    def work() -> Path:
        import torch

        from edgepose.blocks.checkpoint import save_checkpoint
        from edgepose.blocks.kpe import build
        from edgepose.data.render import RenderConfig, write_coco
        from edgepose.data.splits import split_train
        from edgepose.training.config import TrainConfig
        from edgepose.training.loop import RunOptions, fit

        render, train = _entry(card, "render"), _entry(card, "train")
        folder = context.folder / "rendered"
        config = msgspec.convert(render.config["render"], RenderConfig)
        count, seed = int(render.config["count"]), int(render.config["seed"])
        write_coco(folder, "train", count, seed, config, progress=context.step("rendering people"))
        people = split_train(dataset(folder, "train"))
        settings = msgspec.convert(train.config, TrainConfig)
        torch.set_num_threads(THREADS)
        torch.manual_seed(settings.seed)
        network = build(card.architecture, card.keypoints)  # as `edgepose train` starts
        result = fit(network, card.spec, people, settings, options=RunOptions(None, _Watcher(context)))
        report = {"curve": list(result.curve), "best_epoch": result.best_epoch}
        inputs = {"train": people[0].digest, "dev": people[1].digest}
        lineage = (render, Lineage("train", msgspec.to_builtins(settings), inputs, report))
        path = context.folder / f"{card.name}-repeated"
        save_checkpoint(path, Card(card.name, card.architecture, card.keypoints, "", lineage), network.state_dict())
        return path

    return context.once(f"trained again {card.name}", work)


def _entry(card: Card, stage: str) -> Lineage:
    for entry in card.lineage:
        if entry.stage == stage:
            return entry
    raise CheckpointError(
        f"{card.name}: lineage",
        found=f"no stage {stage!r}",
        expected="how the people were rendered (count, seed, render) and how the network was trained",
        fix="write both into the card",
    )


class _Watcher:
    """Passes the progress of training on."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def cutting(self, done: int, total: int) -> None:
        self._context.told("reading people", done, total)

    def step(self, done: int, total: int, _loss: float) -> None:
        self._context.told("training", done, total)

    def epoch(self, row: dict[str, float]) -> None:
        """The curve is in the run record."""


CLAIMS = (
    Claim(
        "blocks.rendered_to_real",
        "points",
        ">= 5.0",
        f"{METRIC} on photographs after training on rendered people, above the mean pose",
        rendered_to_real,
    ),
)
