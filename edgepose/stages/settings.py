"""A recipe's stages with everything resolved: what their keys are made of and what a checkpoint's lineage records.

Invariant: plain data, no builder imported; equal settings mean an equal stage.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from edgepose.errors import UsageError
from edgepose.recipe import Importance, Prune, QuantisationAware, Quantise, Recipe, Scope
from edgepose.spec import Target
from edgepose.training.config import TrainConfig


class PruneStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the pruning stage; see `compress.plan.PruneConfig`."""

    ratio: float
    importance: Importance
    scope: Scope
    round_to: int
    protected: tuple[str, ...]
    seed: int


class QuantiseStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of the quantisation stage.

    Attributes:
        calibration_images: Training people that ranges are measured on.
        symmetric: Symmetric activations, which TensorRT needs.
        protected: Modules that stay float.
        seed: Of the choice of calibration people.
        training: Fine-tuning with fake quantisation; None for post-training quantisation.
    """

    calibration_images: int
    symmetric: bool
    protected: tuple[str, ...]
    seed: int
    training: TrainConfig | None = None

    @property
    def name(self) -> Literal["ptq", "qat"]:
        """Name of the stage in reports and lineages."""
        return "ptq" if self.training is None else "qat"


class Plan(msgspec.Struct, frozen=True):
    """What a recipe asks for, stage by stage; None where it does not."""

    prune: PruneStage | None
    recover: TrainConfig | None
    quantise: QuantiseStage | None


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
    )


def _prune(prune: Prune, targets: tuple[Target, ...], seed: int) -> PruneStage:
    round_to = math.lcm(*(target.round_to for target in targets))
    return PruneStage(prune.ratio, prune.importance, prune.scope, round_to, prune.protected, seed)


def _recover(prune: Prune, seed: int) -> TrainConfig:
    return TrainConfig(
        epochs=prune.epochs, learning_rate=prune.learning_rate, distill_weight=prune.distill_weight, seed=seed
    )


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
        training = TrainConfig(
            epochs=quantise.epochs,
            learning_rate=quantise.learning_rate,
            distill_weight=quantise.distill_weight,
            seed=seed,
            bf16=False,
        )
    return QuantiseStage(quantise.calibration_images, symmetric, quantise.protected, seed, training)
