"""What `edgepose train` does once its flags are understood: build or transfer, train, show progress, save.

Invariant: torch is imported inside functions, so that a wrong flag is told at once; a checkpoint's lineage names by
digest everything that went into it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgepose.blocks.card import Card, Lineage
from edgepose.blocks.config import KPEConfig, spec_of
from edgepose.cli.console import Steps, duration, note, steps
from edgepose.data.coco import PoseDataset
from edgepose.errors import CheckpointError, MissingDependency
from edgepose.host import physical_cores
from edgepose.spec import ModelSpec
from edgepose.training.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from edgepose.training.loop import FitResult


@dataclass(frozen=True, slots=True)
class People:
    """Whom a run sees.

    Attributes:
        train: They are learnt from.
        dev: They choose the best epoch.
        rendered: They fill a share of every batch; None for none.
    """

    train: PoseDataset
    dev: PoseDataset
    rendered: PoseDataset | None = None

    @property
    def sets(self) -> tuple[PoseDataset, PoseDataset] | tuple[PoseDataset, PoseDataset, PoseDataset]:
        """As `fit` takes them."""
        return (self.train, self.dev) if self.rendered is None else (self.train, self.dev, self.rendered)

    @property
    def digests(self) -> dict[str, str]:
        """By role, for the lineage."""
        return {role: part.digest for role, part in zip(("train", "dev", "rendered"), self.sets, strict=False)}


@dataclass(frozen=True, slots=True)
class Training:
    """What a run is made of.

    Attributes:
        architecture: The network.
        config: Settings of the loop.
        people: Whom it sees.
        source: Checkpoint that its weights come from; None starts from scratch.
        teacher: Checkpoint to learn from; None for none.
        state: File that the run goes on from.
        workers: Processes that prepare batches.
    """

    architecture: KPEConfig
    config: TrainConfig
    people: People
    source: Path | None
    teacher: Path | None
    state: Path
    workers: int

    def carry_out(self, out: Path) -> FitResult | None:
        """Trains and saves; None where the run was interrupted.

        Raises:
            CheckpointError: Source or teacher do not fit.
            EdgeposeError: Whatever training raises.
        """
        import torch

        from edgepose.training.loop import Interrupted, RunOptions, fit

        torch.manual_seed(self.config.seed)
        spec = spec_of(self.architecture, self.people.train.keypoints)
        teacher, digest = _teacher(self.teacher, spec)
        network, before = self._network()
        if self.state.exists():
            note(f"resuming the run whose state is {self.state}")
        with steps() as shown:
            options = RunOptions(self.state, _Watcher(shown, self.config.epochs), self.workers)
            try:
                result = fit(network, spec, self.people.sets, self.config, teacher=teacher, options=options)
            except Interrupted:
                return None
        inputs = self.people.digests | ({"teacher": digest} if digest else {})
        self._save(out, network, (*before, self._entry(inputs, result)))
        self.state.unlink(missing_ok=True)
        return result

    def _network(self) -> tuple[nn.Module, tuple[Lineage, ...]]:
        """The network to train, and what it went through before."""
        from edgepose.blocks.kpe import build

        keypoints = self.people.train.keypoints
        if self.source is None:
            return build(self.architecture, keypoints, seed=self.config.seed), ()
        from edgepose.blocks.checkpoint import load_checkpoint
        from edgepose.blocks.transfer import continued, transfer

        checkpoint = load_checkpoint(self.source)
        network, report = transfer(checkpoint, self.architecture, keypoints, seed=self.config.seed)
        note(str(report))
        return network, continued(checkpoint, report, self.architecture)

    def _entry(self, inputs: dict[str, str], result: FitResult) -> Lineage:
        report: dict[str, Any] = {
            "people": {
                role: len(part) for role, part in zip(("train", "dev", "rendered"), self.people.sets, strict=False)
            },
            "curve": list(result.curve),
            "best_epoch": result.best_epoch,
            **({"calibration": result.calibration} if result.calibration else {}),
        }
        return Lineage("train", msgspec.to_builtins(self.config), inputs, report)

    def _save(self, out: Path, network: nn.Module, lineage: tuple[Lineage, ...]) -> None:
        from edgepose.blocks.checkpoint import save_checkpoint

        report = lineage[-1].report
        best = report["curve"][report["best_epoch"]]
        measured = {name: value for name, value in best.items() if name not in ("epoch", "loss", "seconds")}
        keypoints = self.people.train.keypoints
        card = Card(self.architecture.name, self.architecture, keypoints, "", lineage, metrics={"dev": measured})
        save_checkpoint(out, card, network.state_dict())


def require_torch(threads: int) -> None:
    """Loads what training needs, and sets its threads (0 for all cores).

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import torch

        from edgepose.training import loop as _loop  # noqa: F401
    except ImportError as err:
        raise MissingDependency(err.name or "torch", extra="compile", needed_for="training") from err
    torch.set_num_threads(threads or physical_cores())


def figures(row: dict[str, float]) -> str:
    """What an epoch reached on dev, in a few words."""
    shown = [name for name in ("pck_torso_0.2", "pck_torso_0.1", "auc", "pck_extent_0.1") if name in row]
    return ", ".join(f"{name} {100 * row[name]:.2f}" for name in shown)


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
        note(f"epoch {done} of {self._epochs}: loss {row['loss']:.3f}, dev {figures(row)}{left}")


def _teacher(path: Path | None, spec: ModelSpec) -> tuple[nn.Module | None, str]:
    if path is None:
        return None, ""
    from edgepose.stages.networks import load_network

    network, checkpoint = load_network(path)
    theirs = checkpoint.card.spec
    # A student may say more than its teacher, visibility for instance; that it learns from labels.
    said = spec.outputs[: len(theirs.outputs)]
    if (theirs.outputs, theirs.keypoints.names, theirs.inputs) != (said, spec.keypoints.names, spec.inputs):
        raise CheckpointError(
            f"--distill-from {path}",
            found=f"a teacher whose outputs are {[tensor.shape for tensor in theirs.outputs]}",
            expected=f"those of the student: {[tensor.shape for tensor in spec.outputs]}, from the same input",
            fix="choose a teacher of the same input size, head and keypoints",
        )
    return network, checkpoint.digest
