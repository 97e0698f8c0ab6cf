"""What a recipe demands of what was made: `max_drop_points` of the network, `min_int8_macs` of its engines.

Invariant: both figures of a drop are of one metric on one `dev`; where either is missing that is an error, never a
pass. Demands are checked whether stages ran or were found, for they are no part of a stage's key.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from edgepose.blocks.card import Card
from edgepose.errors import AccuracyRegression, AnnotationError, CheckpointError, UsageError
from edgepose.export.int8_share import Achieved, require
from edgepose.pose.metrics import available
from edgepose.recipe import QuantiseAfterTraining, Recipe
from edgepose.stages.assemble import Engines
from edgepose.stages.cache import StageResult

METRIC = "pck_torso_0.2"


def check_metric(recipe: Recipe, card: Card) -> None:
    """Refuse, before any work, a limit that these keypoints cannot be judged by.

    Raises:
        UsageError: The keypoints have no torso, or no such metric as the recipe's `max_drop` names.
    """
    demand = None if recipe.quantise is None else recipe.quantise.max_drop
    known = available(card.keypoints)
    if demand is not None and demand.metric not in known:
        raise UsageError(
            f"recipe {recipe.name}: quantise: max_drop: metric {demand.metric}",
            found=f"keypoints that can be measured by {', '.join(known)}",
            expected="one of these",
            fix="choose another metric, or leave max_drop out",
        )
    if recipe.max_drop_points is not None and METRIC not in available(card.keypoints):
        raise UsageError(
            f"recipe {recipe.name}: max_drop_points",
            found=f"keypoints without a torso ({', '.join(card.keypoints.names)})",
            expected=f"shoulders and hips, for {METRIC} is what it limits",
            fix="leave max_drop_points out, and compare the bundles with `edgepose gate`",
        )


def check_budget(recipe: Recipe, stages: Sequence[StageResult], card: Card) -> None:
    """Compare what the last compression stage left on dev with the float network.

    Args:
        recipe: Has the limit; none means that nothing is checked.
        stages: What ran or was found, in order.
        card: Of the compressed checkpoint.

    Raises:
        AccuracyRegression: More was lost than the limit allows.
        CheckpointError: The float network's figure is not known.
        AnnotationError: Nobody in dev can be measured.
    """
    limit = recipe.max_drop_points
    measured = [stage for stage in stages if "dev" in stage.report]
    if limit is None or not measured:
        return
    stage = measured[-1].stage
    before, after = _float_figure(stages, card), _figure(measured[-1].report["dev"], stage)
    drop = 100 * (before - after)
    if drop > limit:
        raise AccuracyRegression(
            f"recipe {recipe.name}: max_drop_points",
            found=f"{drop:.2f} points of {METRIC} lost on dev after {stage} ({100 * before:.2f} → {100 * after:.2f})",
            expected=f"at most {limit:g}",
            fix="prune less, fine-tune longer, or raise max_drop_points",
        )


def check_int8_macs(recipe: Recipe | None, engines: Engines) -> None:
    """Compare what the INT8 engines really execute in integers with what the recipe demands.

    Args:
        recipe: Has the demand, where it quantises; a network that came quantised is held to the default, as is one
            without a recipe.
        engines: What was built or found.

    Raises:
        ParityError: An engine does too little in integers; names the layers and the reasons.
    """
    for order, result in engines:
        if "int8" not in result.report:
            continue
        asked = None if recipe is None else recipe.quantise
        minimum = (asked or QuantiseAfterTraining()).min_int8_macs
        found = msgspec.convert(result.report["int8"], Achieved)
        require(found, minimum, f"engine {order.backend} for {order.target.name}")


def _float_figure(stages: Sequence[StageResult], card: Card) -> float:
    """What the float network reached on dev: measured in this compile, or when it was trained."""
    for stage in stages:
        if stage.stage == "reference":
            return _figure(stage.report["dev"], stage.stage)
    dev = card.lineage[-1].inputs.get("dev")
    for entry in reversed(card.lineage):  # what was trained last; other trainings may have led up to it
        if entry.stage == "train" and entry.inputs.get("dev") == dev:
            return _figure(entry.report["curve"][entry.report["best_epoch"]], entry.stage)
    raise CheckpointError(
        f"checkpoint {card.name}: lineage",
        found="no figure of the float network on the dev that it was compressed on",
        expected="one that max_drop_points can be judged by",
        fix="compile the float checkpoint with --data DIR, or leave max_drop_points out",
    )


def _figure(row: Mapping[str, Any], stage: str) -> float:
    if row.get(METRIC) is None:  # NaN, in JSON
        raise AnnotationError(
            f"dev: {METRIC} after {stage}", found="nobody with a complete torso", expected="people to measure it on"
        )
    return float(row[METRIC])
