"""What `edgepose train` does once its flags are understood: build or transfer, train, show progress, save.

Invariant: torch is imported inside functions, so that a wrong flag is told at once; a checkpoint's lineage names by
digest everything that went into it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgepose.blocks.card import Card, Lineage, read_card
from edgepose.blocks.config import KPEConfig
from edgepose.cli.console import Steps, duration, note, steps
from edgepose.cli.render import HELD_OUT
from edgepose.data.coco import PoseDataset, dataset
from edgepose.errors import CheckpointError, MissingDependency
from edgepose.host import physical_cores
from edgepose.spec import ModelSpec
from edgepose.stages.source import Source
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
        held_out: Rendered people that visibility is calibrated on; None for none, and always without `rendered`.
    """

    train: PoseDataset
    dev: PoseDataset
    rendered: PoseDataset | None = None
    held_out: PoseDataset | None = None

    def judged_on(self, rendered: Path | None) -> People:
        """With the people that `edgepose render` held out, where there are any."""
        if rendered is None or not (rendered / f"{HELD_OUT}.json").is_file():
            return self
        return replace(self, held_out=dataset(rendered, HELD_OUT))

    @property
    def sets(self) -> tuple[PoseDataset, ...]:
        """As `fit` takes them."""
        return (self.train, self.dev, *(part for part in (self.rendered, self.held_out) if part is not None))

    @property
    def digests(self) -> dict[str, str]:
        """By role, for the lineage."""
        roles = ("train", "dev", "rendered", "held_out")
        return {role: part.digest for role, part in zip(roles, self.sets, strict=False)}


@dataclass(frozen=True, slots=True)
class Training:
    """What a run is made of.

    Attributes:
        architecture: The network; None for the user's own in `source`, as it is.
        config: Settings of the loop.
        people: Whom it sees.
        source: What its weights come from; None starts from scratch.
        teacher: What it learns from; None for none.
        state: File that the run goes on from.
        workers: Processes that prepare batches.
    """

    architecture: KPEConfig | None
    config: TrainConfig
    people: People
    source: Source | None
    teacher: Source | None
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
        card = self._card()
        teacher, digest = _teacher(self.teacher, card.spec)
        network, card = self._network(card)
        if self.state.exists():
            note(f"resuming the run whose state is {self.state}")
        with steps() as shown:
            options = RunOptions(self.state, _Watcher(shown, self.config.epochs), self.workers)
            try:
                result = fit(network, card.spec, self.people.sets, self.config, teacher=teacher, options=options)
            except Interrupted:
                return None
        inputs = self.people.digests | ({"teacher": digest} if digest else {})
        if self.architecture is None:
            inputs["checkpoint"] = card.weights_sha256
        self._save(out, network, card, self._entry(inputs, result))
        self.state.unlink(missing_ok=True)
        return result

    def _card(self) -> Card:
        """What the network is."""
        if self.architecture is not None:
            return Card(self.architecture.name, self.architecture, self.people.train.keypoints, "")
        assert self.source is not None  # without an architecture there is something to start from
        return read_card(self.source.path)

    def _network(self, card: Card) -> tuple[nn.Module, Card]:
        """The network to train, and its card with what it went through before."""
        from edgepose.blocks.kpe import build
        from edgepose.stages.networks import load_network

        keypoints = self.people.train.keypoints
        if self.source is None:
            return build(card.kpe, keypoints, seed=self.config.seed), card
        if self.architecture is None:
            return load_network(self.source)[0], card
        from edgepose.blocks.checkpoint import load_checkpoint
        from edgepose.blocks.transfer import continued, transfer

        checkpoint = load_checkpoint(self.source.path)
        network, report = transfer(checkpoint, self.architecture, keypoints, seed=self.config.seed)
        note(str(report))
        lineage = continued(checkpoint, report, self.architecture)
        return network, msgspec.structs.replace(card, lineage=lineage)

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

    def _save(self, out: Path, network: nn.Module, card: Card, entry: Lineage) -> None:
        from edgepose.blocks.checkpoint import save_checkpoint

        report = entry.report
        best = report["curve"][report["best_epoch"]]
        measured = {name: value for name, value in best.items() if name not in ("epoch", "loss", "seconds")}
        card = msgspec.structs.replace(card, lineage=(*card.lineage, entry), metrics={"dev": measured})
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


def _teacher(source: Source | None, spec: ModelSpec) -> tuple[nn.Module | None, str]:
    if source is None:
        return None, ""
    from edgepose.stages.networks import load_network

    network, checkpoint = load_network(source)
    theirs = checkpoint.card.spec
    # A student may say more than its teacher, visibility for instance; that it learns from labels.
    said = spec.outputs[: len(theirs.outputs)]
    if (theirs.outputs, theirs.keypoints.names, theirs.inputs) != (said, spec.keypoints.names, spec.inputs):
        raise CheckpointError(
            f"--distill-from {source.path}",
            found=f"a teacher whose outputs are {[tensor.shape for tensor in theirs.outputs]}",
            expected=f"those of the student: {[tensor.shape for tensor in spec.outputs]}, from the same input",
            fix="choose a teacher of the same input size, head and keypoints",
        )
    return network, checkpoint.digest
