"""`edgepose train`: a network from labelled photographs.

Invariant: the people held out as `dev` choose the best epoch, and `val` is never read; a run that was stopped, by
Ctrl-C or a kill, goes on from its state when the same command is given again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgepose.blocks.card import Card, Lineage, paths_of
from edgepose.blocks.config import PRESETS, KPEConfig, spec_of
from edgepose.blocks.zoo import find_checkpoint
from edgepose.cli.console import Steps, duration, note, say, steps
from edgepose.cli.options import SeedFlag
from edgepose.data.coco import PoseDataset, dataset
from edgepose.data.splits import split_train
from edgepose.errors import AnnotationError, CheckpointError, MissingDependency, UsageError
from edgepose.host import physical_cores
from edgepose.spec import ModelSpec
from edgepose.strict_yaml import did_you_mean
from edgepose.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from edgepose.training.loop import FitResult

EXAMPLES = (
    "edgepose train --model kpe-s --data lspet --out runs/kpe-s",
    "edgepose train --model kpe-t --data lspet --out runs/kpe-t --epochs 20 --learning-rate 1e-3 --seed 1",
    "edgepose train --model kpe-s --data lspet --out runs/taught --distill-from runs/teacher.safetensors",
)

_EPOCHS = {"kpe-t": 18, "kpe-s": 29}
"""What the zoo was trained with; longer is better. Other presets take the largest."""

_LEAST_DEV = 2  # people in dev, below which choosing an epoch means nothing


def train(
    model: Annotated[str, typer.Option("--model", help="Architecture: kpe-t, kpe-s.")],
    data: Annotated[Path, typer.Option("--data", help="Folder with train.json and images/.")],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint: OUT.safetensors and OUT.json.")],
    head: Annotated[str, typer.Option("--head", help="simcc or heatmap.")] = "simcc",
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Default: enough for the model.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="People per step.")] = 32,
    learning_rate: Annotated[float, typer.Option("--learning-rate", min=1e-9, help="Peak of the schedule.")] = 1.5e-3,
    seed: SeedFlag = 0,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that prepare batches.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Threads of torch, 0 for all cores.")] = 0,
    distill_from: Annotated[
        str | None, typer.Option("--distill-from", help="Teacher: a checkpoint or a name of the zoo.")
    ] = None,
    distill_weight: Annotated[
        float, typer.Option("--distill-weight", min=0.0, max=1.0, help="Share of the teacher in the loss.")
    ] = 0.5,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is at OUT.")] = False,
) -> int:
    """Train a network on DATA/train.json; 10 % of its people are held out to choose the best epoch.

    Ctrl-C saves the run beside OUT; the same command goes on from there.
    """
    weights, card = paths_of(out)
    state = weights.with_suffix(".state")
    if not force and (taken := next((path for path in (weights, card) if path.exists()), None)):
        fix = "choose another name, or pass --force to replace it"
        raise UsageError(f"--out {out}", found=f"{taken.name}, which is there already", expected="a free name", fix=fix)
    architecture = _architecture(model, head)
    config = TrainConfig(
        epochs=epochs or _EPOCHS.get(model, max(_EPOCHS.values())),
        batch_size=batch_size,
        learning_rate=learning_rate,
        distill_weight=distill_weight if distill_from else 0.0,
        seed=seed,
    )
    people = _people(data)
    run = _Training(architecture, config, people, _teacher_path(distill_from), state, workers)
    _require_torch(threads)
    if state.exists():
        note(f"resuming the run whose state is {state}")
    result, network, teacher_digest = run.carry_out()
    if result is None or network is None:
        return _interrupted(state)
    _save(out, run, result, network, teacher_digest)
    state.unlink(missing_ok=True)
    best = result.curve[result.best_epoch]
    say(f"{weights}: best epoch {result.best_epoch + 1} of {config.epochs}, on dev {_figures(best)}")
    return 0


@dataclass(frozen=True, slots=True)
class _Training:
    """What a run is made of.

    Attributes:
        architecture: The network.
        config: Settings of the loop.
        people: Training people, and those held out.
        teacher: Checkpoint to learn from; None for none.
        state: File that the run goes on from.
        workers: Processes that prepare batches.
    """

    architecture: KPEConfig
    config: TrainConfig
    people: tuple[PoseDataset, PoseDataset]
    teacher: Path | None
    state: Path
    workers: int

    def carry_out(self) -> tuple[FitResult | None, nn.Module | None, str]:
        """Trains; gives the result, the network and the teacher's digest, or None where the run was interrupted."""
        import torch

        from edgepose.blocks.kpe import build
        from edgepose.training.loop import Interrupted, RunOptions, fit

        torch.manual_seed(self.config.seed)
        keypoints = self.people[0].keypoints
        spec = spec_of(self.architecture, keypoints)
        teacher, digest = _teacher(self.teacher, spec)
        network = build(self.architecture, keypoints)
        with steps() as shown:
            options = RunOptions(self.state, _Watcher(shown, self.config.epochs), self.workers)
            try:
                result = fit(network, spec, self.people, self.config, teacher=teacher, options=options)
            except Interrupted:
                return None, None, digest
        return result, network, digest


class _Watcher:
    """Shows a run: bars for reading and steps, and one line per epoch."""

    def __init__(self, shown: Steps, epochs: int) -> None:
        self._shown, self._epochs = shown, epochs
        self._first: float | None = None
        self._start_s = 0.0

    def cutting(self, done: int, total: int) -> None:
        self._shown.told("reading photographs", done, total)

    def step(self, done: int, total: int, loss: float) -> None:
        self._shown.told("training, steps", done, total, f"loss {loss:.3f}")

    def epoch(self, row: dict[str, float]) -> None:
        """A line with the figures on dev and the time left, judged by the epochs of this process."""
        done = int(row["epoch"]) + 1
        if self._first is None:
            self._first, self._start_s = done - 1, time.monotonic() - row["seconds"]
        spent_s = time.monotonic() - self._start_s
        left_s = spent_s / max(done - self._first, 1) * (self._epochs - done)
        left = f", about {duration(left_s)} left" if done < self._epochs else ""
        note(f"epoch {done} of {self._epochs}: loss {row['loss']:.3f}, dev {_figures(row)}{left}")


def _figures(row: dict[str, float]) -> str:
    shown = [name for name in ("pck_torso_0.2", "pck_torso_0.1", "auc", "pck_extent_0.1") if name in row]
    return ", ".join(f"{name} {100 * row[name]:.2f}" for name in shown)


def _architecture(model: str, head: str) -> KPEConfig:
    import msgspec

    if model not in PRESETS:
        expected = f"one of {', '.join(PRESETS)}"
        raise UsageError("--model", found=repr(model), expected=expected, fix=did_you_mean(model, tuple(PRESETS)))
    match head:
        case "simcc" | "heatmap":
            return msgspec.structs.replace(PRESETS[model], head=head)
        case _:
            raise UsageError("--head", found=repr(head), expected="simcc or heatmap")


def _people(data: Path) -> tuple[PoseDataset, PoseDataset]:
    people = dataset(data, "train")
    if not people.persons:
        raise AnnotationError(f"{people.source}", found="no labelled person", expected="people to train on")
    train_people, dev = split_train(people)
    if len(dev) < _LEAST_DEV:
        found = f"{len(people)} people, of whom {len(dev)} are held out to choose the best epoch"
        raise AnnotationError(f"{people.source}", found=found, expected="at least 20 people", fix="label more")
    return train_people, dev


def _require_torch(threads: int) -> None:
    try:
        import torch

        from edgepose.training import loop as _loop  # noqa: F401
    except ImportError as err:
        raise MissingDependency(err.name or "torch", extra="compile", needed_for="training") from err
    torch.set_num_threads(threads or physical_cores())


def _teacher_path(distill_from: str | None) -> Path | None:
    if distill_from is None:
        return None
    from edgepose.blocks.card import read_card

    path = find_checkpoint(distill_from)
    read_card(path)
    return path


def _teacher(path: Path | None, spec: ModelSpec) -> tuple[nn.Module | None, str]:
    if path is None:
        return None, ""
    from edgepose.stages.networks import load_network

    network, checkpoint = load_network(path)
    theirs = checkpoint.card.spec
    if (theirs.outputs, theirs.keypoints.names, theirs.inputs) != (spec.outputs, spec.keypoints.names, spec.inputs):
        raise CheckpointError(
            f"--distill-from {path}",
            found=f"a teacher whose outputs are {[tensor.shape for tensor in theirs.outputs]}",
            expected=f"those of the student: {[tensor.shape for tensor in spec.outputs]}, from the same input",
            fix="choose a teacher of the same input size, head and keypoints",
        )
    return network, checkpoint.digest


def _save(out: Path, run: _Training, result: FitResult, network: nn.Module, teacher_digest: str) -> None:
    import msgspec

    from edgepose.blocks.checkpoint import save_checkpoint

    inputs = {"train": run.people[0].digest, "dev": run.people[1].digest}
    if teacher_digest:
        inputs["teacher"] = teacher_digest
    report: dict[str, Any] = {"curve": list(result.curve), "best_epoch": result.best_epoch}
    lineage = Lineage("train", msgspec.to_builtins(run.config), inputs, report)
    best = result.curve[result.best_epoch]
    figures = {name: value for name, value in best.items() if name not in ("epoch", "loss", "seconds")}
    keypoints = run.people[0].keypoints
    card = Card(run.architecture.name, run.architecture, keypoints, "", (lineage,), metrics={"dev": figures})
    save_checkpoint(out, card, network.state_dict())


def _interrupted(state: Path) -> int:
    note(f"edgepose train: interrupted; the run is saved in {state}: give the same command again to go on from there")
    return 130
