"""A recipe's stages with everything resolved: what their keys are made of and what a checkpoint's lineage records.

Invariant: plain data, no builder imported; equal settings mean an equal stage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from edgepose.errors import RecipeError, UsageError
from edgepose.recipe import (
    Importance,
    MaxDrop,
    Pattern,
    Prune,
    QuantisationAware,
    Quantise,
    RangeEstimator,
    Recipe,
    Schedule,
    Scope,
)
from edgepose.spec import Target
from edgepose.strict_yaml import did_you_mean
from edgepose.training.config import TrainConfig


class PruneStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the pruning stage; see `compress.plan.PruneConfig`.

    Attributes:
        ratio: Fraction of the multiply-accumulates to remove; None as long as a goal below is to be turned into it.
        speedup: What the ratio is to be found for: see `recipe.Prune`.
        target_latency_ms: Likewise.
        ratios: Layers with a ratio of their own.
        depth: Residual blocks to remove.
        pattern: What weights are left sparse in.
    """

    ratio: float | None
    importance: Importance
    scope: Scope
    round_to: int
    protected: tuple[str, ...]
    seed: int
    speedup: float | None = None
    target_latency_ms: float | None = None
    ratios: dict[str, float] = {}
    depth: int = 0
    pattern: Pattern | None = None

    @property
    def aimed(self) -> bool:
        """Whether the ratio follows from a latency."""
        return self.speedup is not None or self.target_latency_ms is not None

    @property
    def asked(self) -> PruneStage:
        """What the recipe says: without a ratio that was found on some machine."""
        return msgspec.structs.replace(self, ratio=None) if self.aimed else self

    @property
    def criteria(self) -> dict[str, Any]:
        """The fields of `compress.plan.PruneConfig`."""
        goals = ("speedup", "target_latency_ms")
        return {name: value for name, value in msgspec.structs.asdict(self).items() if name not in goals}

    @property
    def goal(self) -> str:
        """What is to be reached, in words."""
        parts = [f"{self.ratio:.0%} of the multiply-accumulates"] if self.ratio and not self.aimed else []
        parts += [f"to be {self.speedup:g} x as fast"] if self.speedup is not None else []
        parts += [f"to take {self.target_latency_ms:g} ms"] if self.target_latency_ms is not None else []
        parts += [f"{ratio:.0%} of {pattern}" for pattern, ratio in self.ratios.items() if ratio]
        parts += [f"{self.depth} residual blocks"] if self.depth else []
        parts += [f"{self.pattern} sparse"] if self.pattern else []
        return ", ".join(parts)


class QuantiseStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the quantisation stage.

    Attributes:
        calibration_images: Training people that ranges are measured on.
        symmetric: Symmetric activations, which TensorRT needs.
        protected: Modules that stay float.
        seed: Of the choice of calibration people.
        training: Fine-tuning with fake quantisation; None for post-training quantisation.
        estimator: How activation ranges follow from calibration data.
        max_drop: Layers go back to float until no more than this is lost; None leaves all integer.
    """

    calibration_images: int
    symmetric: bool
    protected: tuple[str, ...]
    seed: int
    training: TrainConfig | None = None
    estimator: RangeEstimator = "default"
    max_drop: MaxDrop | None = None

    @property
    def name(self) -> Literal["ptq", "qat"]:
        """Name of the stage in reports and lineages."""
        return "ptq" if self.training is None else "qat"


class PruneStep(msgspec.Struct, frozen=True):
    """One of the steps that a network is pruned in.

    Attributes:
        prune: Its pruning; the ratio is a fraction of the unpruned network's multiply-accumulates.
        recover: Fine-tuning behind it; None for none.
        suffix: What its stages' names end in: "-1", "-2", … and nothing for the last one.
    """

    prune: PruneStage
    recover: TrainConfig | None
    suffix: str


class Plan(msgspec.Struct, frozen=True):
    """What a recipe asks for, stage by stage; None where it does not.

    Attributes:
        prune: Pruning, as if it were in one step.
        recover: Fine-tuning behind it, as if it were in one step.
        quantise: Quantisation.
        steps: Steps that pruning takes.
        schedule: What they leave.
        sparse: Sparse training before it.
    """

    prune: PruneStage | None
    recover: TrainConfig | None
    quantise: QuantiseStage | None
    steps: int = 1
    schedule: Schedule = "equal"
    sparse: TrainConfig | None = None

    def at_ratio(self, ratio: float) -> Plan:
        """The same, where a search found that so much has to go."""
        assert self.prune is not None
        return msgspec.structs.replace(self, prune=msgspec.structs.replace(self.prune, ratio=ratio))

    @property
    def pruning(self) -> tuple[PruneStep, ...]:
        """Pruning and recovery step by step; empty where nothing is pruned."""
        if self.prune is None:
            return ()
        steps = []
        for number in range(1, self.steps + 1):
            whole = self.prune.ratio
            ratio = None if whole is None else _ratio_after(whole, number / self.steps, self.schedule)
            prune = _part_of(self.prune, ratio, number, self.steps)
            recover = None if self.recover is None else _part(self.recover, number, self.steps)
            steps.append(PruneStep(prune, recover, "" if number == self.steps else f"-{number}"))
        return tuple(steps)


def _ratio_after(ratio: float, share: float, schedule: Schedule) -> float:
    """The fraction of multiply-accumulates that is gone when this share of the steps is done."""
    if share == 1:
        return ratio
    match schedule:
        case "equal":
            return 1 - math.pow(1 - ratio, share)
        case "cubic":
            return ratio * (1 - (1 - share) ** 3)


def _part_of(prune: PruneStage, ratio: float | None, number: int, steps: int) -> PruneStage:
    """What one of several steps removes: blocks and ratios of single layers come first, sparsity comes last."""
    return msgspec.structs.replace(
        prune,
        ratio=ratio,
        ratios=prune.ratios if number == 1 else dict.fromkeys(prune.ratios, 0.0),
        depth=prune.depth if number == 1 else 0,
        pattern=prune.pattern if number == steps else None,
    )


def _part(recover: TrainConfig, number: int, steps: int) -> TrainConfig:
    """The epochs behind one of several steps, with views of their own."""
    epochs = recover.epochs // steps + (recover.epochs % steps if number == steps else 0)
    return msgspec.structs.replace(recover, epochs=epochs, seed=recover.seed + number - 1)


def plan_of(recipe: Recipe, targets: tuple[Target, ...]) -> Plan:
    """Resolve a recipe for its targets.

    Raises:
        UsageError: The recipe asks for what one of the targets cannot run.
    """
    prune = recipe.prune
    return Plan(
        prune=None if prune is None else _prune(prune, targets, recipe.seed),
        recover=None if prune is None or prune.epochs == 0 else _recover(prune, recipe.seed),
        quantise=None if recipe.quantise is None else _quantise(recipe.quantise, targets, recipe.seed),
        steps=1 if prune is None else prune.steps,
        schedule="equal" if prune is None else prune.schedule or "equal",
        sparse=None if prune is None or prune.sparse_epochs == 0 else _sparse(prune, recipe.seed),
    )


def _prune(prune: Prune, targets: tuple[Target, ...], seed: int) -> PruneStage:
    round_to = math.lcm(*(target.round_to for target in targets))
    return PruneStage(
        prune.ratio if prune.speedup or prune.target_latency_ms else prune.ratio or 0.0,
        prune.importance,
        prune.scope,
        round_to,
        prune.protected,
        seed,
        speedup=prune.speedup,
        target_latency_ms=prune.target_latency_ms,
        ratios=prune.ratios,
        depth=prune.depth,
        pattern=prune.pattern,
    )


def _recover(prune: Prune, seed: int) -> TrainConfig:
    own = TrainConfig(
        epochs=max(prune.epochs, 1),  # of sparse training before pruning, where none follows
        learning_rate=prune.learning_rate,
        distill_weight=prune.distill_weight,
        feature_weight=prune.feature_weight,
        seed=seed,
    )
    return _with(own, prune.training, "prune")


_FIELDS = tuple(field.name for field in msgspec.structs.fields(TrainConfig))
_SAID_ELSEWHERE = (
    "epochs", "learning_rate", "distill_weight", "feature_weight", "seed", "sparsity", "dense", "bf16",
)  # fmt: skip


def _with(own: TrainConfig, changes: Mapping[str, Any], where: str) -> TrainConfig:
    """Settings of fine-tuning with what the recipe says besides its own fields.

    Raises:
        RecipeError: There is no such setting, it has a field of its own, or it cannot be that.
    """
    for name in changes:
        if name not in _FIELDS:
            fix = did_you_mean(name, _FIELDS)
            raise RecipeError(
                f"{where}.training.{name}", found="no such setting", expected="one of TrainConfig", fix=fix
            )
        if name in _SAID_ELSEWHERE:
            found = "a setting that is not the fine-tuning's to choose"
            raise RecipeError(
                f"{where}.training.{name}", found=found, fix="leave it out, or use the field of that name"
            )
    try:
        return msgspec.convert({**msgspec.to_builtins(own), **changes}, TrainConfig)
    except msgspec.ValidationError as err:
        raise RecipeError(f"{where}.training", found=str(err), expected="what edgepose train --settings takes") from err


def _sparse(prune: Prune, seed: int) -> TrainConfig:
    training = msgspec.structs.replace(_recover(prune, seed), epochs=prune.sparse_epochs)
    return msgspec.structs.replace(
        training, sparsity=_SPARSITY if prune.sparsity is None else prune.sparsity, dense=prune.protected
    )


_SPARSITY = 1e-4


def _quantise(quantise: Quantise, targets: tuple[Target, ...], seed: int) -> QuantiseStage:
    for target in targets:
        if "int8" not in target.precisions:
            raise UsageError(
                f"target {target.name}", found=f"precisions {', '.join(target.precisions)}", expected="int8 among them",
                fix="choose a recipe without quantisation",
            )  # fmt: skip
    tensorrt = any(backend.startswith("tensorrt") for target in targets for backend in target.backends)
    symmetric = tensorrt if quantise.activations == "auto" else quantise.activations == "symmetric"
    if tensorrt and not symmetric:
        raise UsageError(
            "recipe: quantise: activations",
            found="asymmetric, for a target that runs TensorRT",
            expected="symmetric or auto",
            fix="TensorRT reads zero points as 0; compile for that target by itself",
        )
    training = None
    if isinstance(quantise, QuantisationAware):
        # NNCF computes scales in the autocast type, and bfloat16 is too coarse for them.
        own = TrainConfig(
            epochs=quantise.epochs,
            learning_rate=quantise.learning_rate,
            distill_weight=quantise.distill_weight,
            feature_weight=quantise.feature_weight,
            seed=seed,
            bf16=False,
        )
        training = _with(own, quantise.training, "quantise")
    return QuantiseStage(
        quantise.calibration_images,
        symmetric,
        quantise.protected,
        seed,
        training,
        quantise.range_estimator,
        quantise.max_drop,
    )
