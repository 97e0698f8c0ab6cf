"""The training loop: a one-cycle schedule, averaged weights, optional teacher; exact resumption.

Invariant: everything a run depends on is in its config, its seed, its data and the weights it starts from, so a run
that was stopped and resumed sees the same batches as one that was not; the best epoch is chosen on `dev` alone.
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import torch
from torch import Tensor, nn

from edgepose.blocks.heads import Stage
from edgepose.blocks.orn import Hide
from edgepose.data.coco import PoseDataset
from edgepose.errors import CheckpointError, EdgeposeError, UsageError
from edgepose.pose import metrics
from edgepose.spec import ModelSpec
from edgepose.storage import atomic_write
from edgepose.training.batches import AugmentedPeople, Batch, layout_of, to_input
from edgepose.training.calibrate import calibrate_visibility
from edgepose.training.config import TrainConfig
from edgepose.training.features import Maps, feature_matching, recording, stages_of
from edgepose.training.objective import Objective
from edgepose.training.optimizers import make_optimizers
from edgepose.training.predict import Crops, cut_crops, predict
from edgepose.training.process import stop_signals, tune_allocator
from edgepose.training.teacher import merged_with_mirrored

if TYPE_CHECKING:
    from edgepose.compress.slimming import GroupLasso


class Observer(Protocol):
    """Told about a run's progress; all three are called from the training process."""

    def cutting(self, done: int, total: int) -> None:
        """A photograph was read."""

    def step(self, done: int, total: int, loss: float) -> None:
        """A step was taken."""

    def epoch(self, row: dict[str, float]) -> None:
        """An epoch ended; the row of the curve that it added."""


class Silent:
    """An observer that says nothing."""

    def cutting(self, done: int, total: int) -> None: ...
    def step(self, done: int, total: int, loss: float) -> None: ...
    def epoch(self, row: dict[str, float]) -> None: ...


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a run is carried out; nothing here changes its result.

    Attributes:
        state: File that holds the run's state; if it exists the run is resumed from it. The caller removes it.
        observer: Told about progress.
        workers: Processes that prepare batches; 0 prepares them in this one.
    """

    state: Path | None = None
    observer: Observer = field(default_factory=Silent)
    workers: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class FitResult:
    """A run's outcome; the model given to `fit` holds the best averaged weights.

    Attributes:
        curve: One row per epoch: epoch, loss, seconds, and the metrics on dev.
        best_epoch: Row that was kept.
        calibration: What was folded into the visibility head and the expected errors afterwards; empty for nothing.
    """

    curve: tuple[dict[str, float], ...]
    best_epoch: int
    calibration: dict[str, float] = field(default_factory=dict)


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal after its state was saved; running again resumes it."""


@dataclass(slots=True, eq=False)
class _State:
    averaged: dict[str, Tensor]
    step: int = 0
    losses: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_epoch: int = -1


def fit(
    model: nn.Module,
    spec: ModelSpec,
    data: tuple[PoseDataset, ...],
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    options: RunOptions = RunOptions(),
) -> FitResult:
    """Train a network in place.

    Args:
        model: Any module that maps images to outputs as `spec` says; fake-quantised ones too.
        spec: Its specification.
        data: The people to train on, the people (dev) that the best epoch is chosen on, with `config.rendered` the
            people that fill this share of every batch, and rendered people that only what an occlusion-robust block
            says of visibility is calibrated on.
        config: Settings.
        teacher: Network whose outputs the loss follows with `config.distill_weight`, its feature maps with
            `config.feature_weight`.
        options: State file, observer, workers.

    Raises:
        CheckpointError: The state belongs to another run.
        UsageError: `config.rendered` without such people, or the reverse; `config.freeze_epochs` without a backbone;
            `config.distill_weight` or `config.feature_weight` without a teacher, or with one that has no feature map in
            common; `config.masking` without an occlusion-robust block; `config.sparsity` for a network whose channels
            cannot be pruned, `config.dense` without it.
        EdgeposeError: The loss is no longer a number.
        Interrupted: SIGINT or SIGTERM; the state was saved.
    """
    _check_parts(model, teacher, config)
    tune_allocator()
    observer, state = options.observer, options.state
    people = _people((data[0], *data[2:3]), spec, config, observer)
    run = _Run(model, spec, cut_crops(data[1], spec), config, teacher)
    run.per_epoch = people.batches_per_epoch
    shapes = [{n: t.shape for n, t in m.state_dict().items()} if m is not None else None for m in (model, teacher)]
    digests = [part.digest for part in data]
    identity = hashlib.sha256(msgspec.json.encode([_settings(config), *digests, spec, shapes])).hexdigest()
    if state is not None and state.exists():
        run.restore(state, identity)
    total = config.epochs * people.batches_per_epoch
    # Closing ends the workers before the interpreter does, which would wait for them for ever.
    remaining = range(run.state.step, total)
    with (
        stop_signals() as stopped,
        _masking(model, config.masking),
        closing(people.numbers(remaining, options.workers)) as batches,
    ):
        saved_s = start_s = time.monotonic()
        for batch in batches:
            loss = run.step(batch)
            observer.step(run.state.step, total, loss)
            if run.state.step % people.batches_per_epoch == 0:
                row = run.end_epoch(time.monotonic() - start_s)
                start_s = time.monotonic()
                observer.epoch(row)
                saved_s = -math.inf
            if state is not None and (stopped.is_set() or time.monotonic() - saved_s > _SAVE_EVERY_S):
                run.save(state, identity)
                saved_s = time.monotonic()
            if stopped.is_set():
                raise Interrupted
    model.load_state_dict(run.state.best)
    model.eval()
    # Fake-quantised networks (their forward pass is replaced) have learnt from a teacher who is calibrated, and scaling
    # their weights would take them out of the quantisers' ranges.
    calibrated = spec.visibility != "" and "forward" not in vars(model)
    calibration = calibrate_visibility(model, spec, data[1], config, *data[3:]) if calibrated else {}
    return FitResult(tuple(run.state.curve), run.state.best_epoch, calibration)


_SAVE_EVERY_S = 180.0
_YOUNGER = ("feature_weight", "sparsity", "dense", "uncovered_teacher", "mirrored_teacher")


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Settings as a state knows them: those that are younger than some states count where they say something."""
    before = TrainConfig(epochs=config.epochs)
    younger = {name for name in _YOUNGER if getattr(config, name) == getattr(before, name)}
    return {name: value for name, value in msgspec.structs.asdict(config).items() if name not in younger}


def _check_parts(model: nn.Module, teacher: nn.Module | None, config: TrainConfig) -> None:
    """Refuses settings that would do nothing."""
    for name, weight in (("distill_weight", config.distill_weight), ("feature_weight", config.feature_weight)):
        if weight > 0 and teacher is None:
            raise UsageError(
                f"training: {name}",
                found=f"{weight:g} without a teacher",
                expected="a teacher for this share of the loss",
                fix="hand one over, or set it to 0",
            )
    if config.uncovered_teacher and (teacher is None or config.augment.occlusion is None):
        lacks = "a teacher" if teacher is None else "occlusion"
        raise UsageError(
            "training: uncovered_teacher",
            found=f"a run without {lacks}",
            expected="a teacher that sees what is hidden from the network",
            fix="hand one over" if teacher is None else "add augment: {occlusion: {}}, or set it to false",
        )
    if config.mirrored_teacher and config.distill_weight == 0:
        raise UsageError(
            "training: mirrored_teacher",
            found="a run that no teacher's outputs count in",
            expected="a teacher that sees mirror images, too",
            fix="set distill_weight, or set it to false",
        )
    if config.dense and config.sparsity == 0:
        raise UsageError(
            "training: dense",
            found=f"{', '.join(config.dense)} without sparsity",
            expected="layers that sparsity is to leave alone",
            fix="leave it out, or set sparsity",
        )
    if config.masking > 0 and not any(isinstance(part, Hide) for part in model.modules()):
        raise UsageError(
            "training: masking",
            found=f"{config.masking:g} for a network without an occlusion-robust block",
            expected="a block whose keypoints can be masked",
            fix="set it to 0, or put such a block on top",
        )


def _people(data: tuple[PoseDataset, ...], spec: ModelSpec, config: TrainConfig, observer: Observer) -> AugmentedPeople:
    done, total = 0, sum(len(part) for part in data)

    def count() -> None:
        nonlocal done
        done += 1
        observer.cutting(done, total)

    extra = data[1] if len(data) > 1 else None
    return AugmentedPeople(data[0], spec, config, extra=extra, on_patch=count)


class _Run:
    """The moving parts of one run."""

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        dev: Crops,
        config: TrainConfig,
        teacher: nn.Module | None,
    ) -> None:
        self.start = _fingerprint(model, teacher)
        self.layout = layout_of(model)
        self.model = _laid_out(model, self.layout).train()
        self.teacher = _laid_out(teacher, self.layout).eval() if teacher else None
        self.spec, self.dev, self.config = spec, dev, config
        self.per_epoch = 1
        example = torch.zeros(1, 3, *spec.preprocess.input_hw).contiguous(memory_format=self.layout)
        self.features = None
        if self.teacher is not None and config.feature_weight > 0:
            self.features = feature_matching(self.model, self.teacher, example)
        self.penalty = _penalty(self.model, example, config)
        self.objective = Objective(spec, config, self.features)
        self.optimizers = make_optimizers(model, self.objective, config)
        self.state = _State({n: t.detach().clone() for n, t in model.state_dict().items()})
        self.backbone = _backbone(model) if config.freeze_epochs else None

    def step(self, batch: Batch) -> float:
        config, state = self.config, self.state
        rate = _one_cycle(state.step / (config.epochs * self.per_epoch), config)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        images = to_input(batch.crops, self.spec).contiguous(memory_format=self.layout)
        names = self.features.names if self.features is not None else ()
        with recording(self.model, names) as seen:
            stages = self._stages(images)
        taught, shown = self._teacher_says(images, batch, names)
        loss: Tensor = self.objective(stages, batch, taught, (seen, shown))
        if self.penalty is not None:
            loss = loss + config.sparsity * self.penalty()
        value = loss.item()
        if not math.isfinite(value):
            raise EdgeposeError(
                f"training: step {state.step}",
                found=f"a loss of {value}",
                expected="a number",
                fix="lower the learning rate, or train without bf16",
            )
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*self.model.parameters(), *self.objective.parameters()], 5.0)
        for optimizer in self.optimizers:
            optimizer.step()
        state.step += 1
        state.losses += value
        self._average()
        return value

    def _stages(self, images: Tensor) -> list[Stage]:
        """What the network says, stage by stage; its chance is a function of the step, so that runs can be resumed."""
        frozen = self.state.step < self.config.freeze_epochs * self.per_epoch
        with (
            torch.random.fork_rng(devices=[]),
            torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16),
            _frozen(self.backbone if frozen else None),
        ):
            torch.manual_seed(self.config.seed * 1_000_003 + self.state.step)
            return stages_of(self.model, images)

    def _teacher_says(
        self, images: Tensor, batch: Batch, names: Sequence[str]
    ) -> tuple[tuple[Tensor, ...] | None, Maps]:
        """The teacher's outputs, None where nobody asks, and its feature maps of some parts."""
        if self.teacher is None or not (self.config.distill_weight > 0 or names):
            return None, {}
        if batch.uncovered is not None:
            images = to_input(batch.uncovered, self.spec).contiguous(memory_format=self.layout)
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16),
            recording(self.teacher, names) as shown,
        ):
            taught = self.teacher(images)
        if self.config.mirrored_teacher:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.config.bf16):
                taught = merged_with_mirrored(self.teacher, self.spec, images, taught)
        return taught, shown

    def _average(self) -> None:
        # The average must forget the random start: its window grows with the run up to the configured decay.
        decay = min(self.config.averaging, (1 + self.state.step) / (10 + self.state.step))
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                shadow = self.state.averaged[name]
                if tensor.is_floating_point():
                    shadow.lerp_(tensor, 1 - decay)
                else:
                    shadow.copy_(tensor)

    def end_epoch(self, seconds: float) -> dict[str, float]:
        state = self.state
        live = {n: t.detach().clone() for n, t in self.model.state_dict().items()}
        self.model.load_state_dict(state.averaged)
        predicted = predict(self.model, self.spec, self.dev, bf16=self.config.bf16)
        figures = dev_metrics(predicted, self.dev)
        row = {
            "epoch": len(state.curve),
            "loss": state.losses / self.per_epoch,
            "seconds": round(seconds, 1),
            **figures,
        }
        state.losses = 0.0
        state.curve.append(row)
        better = state.best_epoch < 0 or selection(row) >= selection(state.curve[state.best_epoch])
        if better or self.config.sparsity > 0:
            state.best_epoch = len(state.curve) - 1
            state.best = {n: t.clone() for n, t in state.averaged.items()}
        self.model.load_state_dict(live)
        return row

    def save(self, path: Path, identity: str) -> None:
        content: dict[str, Any] = {
            "identity": identity,
            "start": self.start,
            "model": self.model.state_dict(),
            "averaged": self.state.averaged,
            "best": self.state.best,
            "objective": self.objective.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scalars": {"step": self.state.step, "losses": self.state.losses, "best_epoch": self.state.best_epoch},
            "curve": self.state.curve,
        }
        # Through memory: on a full disk torch's own writer raises RuntimeError, which says nothing of disks.
        buffer = io.BytesIO()
        torch.save(content, buffer)
        atomic_write(path, buffer.getvalue())

    def restore(self, path: Path, identity: str) -> None:
        try:
            content = torch.load(path, weights_only=True)
        except Exception as err:  # torch.load raises half a dozen kinds for a damaged file
            raise CheckpointError(
                str(path),
                found=f"an unreadable state ({err})",
                expected="the state of a stopped run",
                fix="delete it to start afresh",
            ) from err
        if not isinstance(content, dict) or content.get("identity") != identity or "start" not in content:
            raise CheckpointError(
                str(path),
                found="the state of a run with other settings or data",
                expected="the run that is being started",
                fix="delete it to start afresh, or repeat the old settings to resume",
            )
        if not torch.allclose(content["start"], self.start, rtol=1e-4, atol=1e-6):
            raise CheckpointError(
                str(path),
                found="the state of a run that started from other weights or follows another teacher",
                expected="the run that is being started",
                fix="delete it to start afresh, or name the old weights to resume",
            )
        self.model.load_state_dict(content["model"])
        self.objective.load_state_dict(content["objective"])
        for optimizer, state in zip(self.optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.state = _State(content["averaged"], **content["scalars"], curve=content["curve"], best=content["best"])


def _laid_out(model: nn.Module, layout: torch.memory_format) -> nn.Module:
    moved: nn.Module = model.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
    return moved


def _fingerprint(*networks: nn.Module | None) -> Tensor:
    """What starting weights are known again by: mean and root mean square of every tensor, (T, 2) float64.

    Not a digest: a resumed run resamples or calibrates them anew, and with other threads their last bits differ.
    """
    tensors = [t.double() for network in networks if network is not None for t in network.state_dict().values()]
    return torch.stack([torch.stack([t.mean(), t.square().mean().sqrt()]) for t in tensors if t.numel()])


def dev_metrics(predicted: Any, dev: Crops) -> dict[str, float]:
    """The figures that epochs are judged by, on people with labels."""
    truth = torch.stack([torch.from_numpy(p.keypoints) for p in dev.data.persons]).numpy()
    joints = metrics.measure(predicted, truth, dev.data.keypoints)
    return {name: metrics.pooled(name, joints) for name in metrics.available(dev.data.keypoints)}


def selection(row: dict[str, float]) -> float:
    """What the best epoch is best in: the area under the PCK curve, or the extent PCK of people without a torso."""
    # Without a single complete torso the area is NaN, and no epoch would ever be better than the first.
    names = ("auc", "limb12_extent_0.1", "pck_extent_0.1")
    return next((row[name] for name in names if math.isfinite(row.get(name, math.nan))), -row["mpjpe_px"])


def _one_cycle(progress: float, config: TrainConfig) -> float:
    if progress < config.warmup:
        return config.learning_rate * (0.05 + 0.95 * progress / config.warmup)
    share = (progress - config.warmup) / (1 - config.warmup)
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * 0.5 * (1 + math.cos(math.pi * share)))


def _penalty(model: nn.Module, example: Tensor, config: TrainConfig) -> GroupLasso | None:
    if config.sparsity == 0:
        return None
    from edgepose.compress.slimming import GroupLasso  # with torch-pruning, which nothing else here needs

    return GroupLasso(model, example, config.dense)


def _backbone(model: nn.Module) -> nn.Module:
    """The part that `freeze_epochs` is about."""
    found = getattr(model, "backbone", None)
    if not isinstance(found, nn.Module):
        raise UsageError(
            "training: freeze_epochs",
            found=f"a {type(model).__name__} without a part named backbone",
            expected="a network of a backbone and a block on top",
            fix="train all of it, with freeze_epochs 0",
        )
    return found


@contextmanager
def _frozen(part: nn.Module | None) -> Iterator[None]:
    """No gradients for a part of a network, and its normalisations as in evaluation, for the time of a forward pass.

    Optimisers pass over what has no gradient, so weights do not decay either.
    """
    if part is None:
        yield
        return
    learning = [parameter for parameter in part.parameters() if parameter.requires_grad]
    part.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        part.train()
        for parameter in learning:
            parameter.requires_grad_(True)


@contextmanager
def _masking(model: nn.Module, share: float) -> Iterator[None]:
    """Keypoint masking of the network's occlusion-robust blocks, for the time of a run."""
    blocks = [part for part in model.modules() if isinstance(part, Hide)]
    for block in blocks:
        block.share = share
    try:
        yield
    finally:
        for block in blocks:
            block.share = 0.0
