"""What is measured: zoo checkpoints, the bundles compiled from them, and their predictions on lspet.

Invariant: bundles come out of `edgepose.compiler` and predictions out of `edgepose.profiler.accuracy`, as a user's do;
without --full nothing is trained, and what needs training comes from committed checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.context import THREADS, Context
from edgepose.blocks.card import Card, read_card
from edgepose.blocks.zoo import find_checkpoint
from edgepose.bundle import Bundle
from edgepose.compiler import CompileRequest, compile_bundle
from edgepose.data.coco import PoseDataset, dataset
from edgepose.errors import CheckpointError
from edgepose.estimator import PoseEstimator
from edgepose.profiler.accuracy import AccuracyRecord, evaluate, summary
from edgepose.profiler.gate.judge import judge_accuracy
from edgepose.profiler.gate.rules import AccuracyRule
from edgepose.recipe import load_recipe
from edgepose.spec import Backend
from edgepose.stages.cache import StageResult

METRIC = "pck_torso_0.2"


def lspet(context: Context) -> Path:
    """Folder of the photographs that the claims are about."""
    return context.data / "lspet"


def val_people(context: Context) -> PoseDataset:
    """lspet val, on which final figures are measured."""
    return context.once("val", lambda: dataset(lspet(context), "val"))


# ----------------------------------------------------------------------------------------------------------- bundles


_CHANGING = ("sparse", "prune", "recover", "qat")
"""Stages, or what their names begin with where there are several, that only --full may run."""


@dataclass(slots=True)
class _Watcher:
    """Passes a compile's progress on; refuses stages that only --full may run."""

    context: Context
    may_train: bool
    stage: str = ""

    def started(self, stage: str) -> None:
        if stage.partition("-")[0] in _CHANGING and not self.may_train:
            raise CheckpointError(
                f"stage {stage}",
                found="no committed checkpoint that went through it with the recipe's settings",
                expected="one in the zoo, made from the very network and people",
                fix="compile the recipe, commit the compressed checkpoint, and measure again",
            )
        self.stage = stage
        self.context.told(f"compiling: {stage}", 0, 1)

    def finished(self, stage: StageResult) -> None:
        self.context.told(f"compiling: {stage.stage}", 1, 1)

    def building(self, what: str, done: int, total: int) -> None:
        self.context.told(f"{self.stage}: {what}", done, total)

    def cutting(self, done: int, total: int) -> None:
        self.context.told(f"{self.stage}: reading", done, total)

    def step(self, done: int, total: int, _loss: float) -> None:
        self.context.told(f"{self.stage}: fine-tuning", done, total)

    def epoch(self, row: dict[str, float]) -> None:
        """The curve is in the lineage."""

    def timed(self, what: str, done: int, total: int) -> None:
        self.context.told(f"{self.stage}: timing {what}", done, total)


def compiled(context: Context, network: str, recipe: str) -> Bundle:
    """The bundle of a zoo network by a recipe that comes with edgepose; stages come from the cache where they can.

    Raises:
        CheckpointError: No such network, or a recipe with training and no committed checkpoint that went through it.
    """

    def work() -> Bundle:
        request = CompileRequest(
            load_recipe(recipe), network, lspet(context), context.folder / f"{network}-{recipe}.bundle"
        )
        return compile_bundle(request, _Watcher(context, may_train=False)).bundle

    return context.once(f"bundle {network} {recipe}", work)


def compiled_again(context: Context, network: str, recipe: str) -> tuple[Bundle, Path]:
    """The bundle with all its training repeated, and the compressed checkpoint it was made from."""

    def work() -> tuple[Bundle, Path]:
        # Neither the committed checkpoint, found by the recipe's name, nor this user's cache may shorten it.
        asked = msgspec.structs.replace(load_recipe(recipe), name=f"{recipe}-repeated")
        request = CompileRequest(asked, network, lspet(context), context.folder / f"{network}-{asked.name}.bundle")
        with empty_cache(context.folder / "cache"):
            result = compile_bundle(request, _Watcher(context, may_train=True))
        changed = [stage for stage in result.stages if stage.stage in ("prune", "recover", "ptq", "qat")]
        return result.bundle, changed[-1].path / "network"

    return context.once(f"again {network} {recipe}", work)


@contextmanager
def empty_cache(folder: Path) -> Iterator[None]:
    """Stages find nothing that was made before the block, and leave nothing behind it."""
    before = os.environ.get("EDGEPOSE_CACHE")
    os.environ["EDGEPOSE_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["EDGEPOSE_CACHE"]
        else:
            os.environ["EDGEPOSE_CACHE"] = before


def committed(network: str, recipe: str, bundle: Bundle) -> Path:
    """The committed checkpoint that a compressed bundle was made from.

    Raises:
        CheckpointError: There is none, or the bundle was made from another.
    """
    path = find_checkpoint(f"{network}-{recipe}")
    digest = read_card(path).weights_sha256
    if bundle.manifest.chain.get("compressed") != digest:
        raise CheckpointError(
            f"bundle {bundle.manifest.name}",
            found=f"compressed weights {str(bundle.manifest.chain.get('compressed'))[:12]}",
            expected=f"those of the committed checkpoint {path.name}, {digest[:12]}",
        )
    return path


# ------------------------------------------------------------------------------------------------------- predictions


def torch_record(context: Context, checkpoint: Path) -> AccuracyRecord:
    """What a checkpoint predicts on val, in torch: FP32, or fake-quantised where it is quantised."""

    def work() -> AccuracyRecord:
        import torch

        from edgepose.stages.networks import load_network
        from edgepose.training.session import TorchSession

        torch.set_num_threads(THREADS)
        network, loaded = load_network(checkpoint)
        spec = loaded.card.spec
        with PoseEstimator(TorchSession(network, spec), spec, backend="torch") as estimator:
            told = context.step(f"predicting with {checkpoint.name} in torch")
            return evaluate(estimator, val_people(context), progress=told)

    return context.once(f"torch {checkpoint}", work)


def bundle_record(context: Context, bundle: Bundle, backend: Backend) -> AccuracyRecord:
    """What an engine of a bundle predicts on val."""

    def work() -> AccuracyRecord:
        with PoseEstimator.from_bundle(bundle.root, backend, THREADS, aim="none") as estimator:
            told = context.step(f"predicting with {bundle.manifest.name} in {backend}")
            return evaluate(estimator, val_people(context), progress=told)

    return context.once(f"{backend} {bundle.digest}", work)


def points(context: Context, record: AccuracyRecord) -> float:
    """`pck_torso_0.2` of a record in points, 0..100."""
    return 100 * summary(record, val_people(context).keypoints)[METRIC]


def drop(context: Context, base: AccuracyRecord, candidate: AccuracyRecord) -> dict[str, Any]:
    """The points that a candidate loses against a baseline, with bounds, and every other metric of both."""
    keypoints = val_people(context).keypoints
    judged = judge_accuracy(base, candidate, keypoints, AccuracyRule(metric=METRIC))
    return {
        "drop_points": -judged.diff_points,
        "ci95": [-judged.ci95[1], -judged.ci95[0]],
        "persons": judged.persons,
        "joints": judged.joints,
        "baseline": summary(base, keypoints),
        "candidate": summary(candidate, keypoints),
    }


# ---------------------------------------------------------------------------------------------------------- records


def run_record(card: Card) -> dict[str, Any]:
    """How a checkpoint was made: each stage's settings, inputs and report, and the digest of the weights."""
    return {
        "name": card.name,
        "weights_sha256": card.weights_sha256,
        "stages": [msgspec.to_builtins(entry) for entry in card.lineage],
    }


def run_record_lines(card: Card, *, first: int = 0) -> tuple[str, ...]:
    """The same for people, from stage `first` on: settings with the seed, then the curve epoch by epoch."""
    lines = [f"run record of {card.name}, weights sha256 {card.weights_sha256}"]
    for entry in card.lineage[first:]:
        lines.append(f"  {entry.stage}: seed {entry.config.get('seed', '–')}, config {_json(entry.config)}")
        for row in entry.report.get("curve", []):
            figures = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name in _SHOWN)
            lines.append(f"    {figures}")
        if "best_epoch" in entry.report:
            lines.append(f"    best epoch on dev: {entry.report['best_epoch']}")
    return tuple(lines)


_SHOWN = ("epoch", "loss", METRIC, "auc", "mpjpe_px")


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
