"""What compressing a network loses, against the better of its float checkpoint and the control arm of the recipe.

Invariant: all arms are measured on the same people, the worse of the two engines counts, and a control arm is one only
if its lineage says that it began with the float checkpoint's weights and was trained as the recipe trains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.context import Context
from benchmarks.subjects import bundle_record, compiled, torch_record, val_people
from edgepose.blocks.card import Card, read_card
from edgepose.blocks.zoo import find_checkpoint, zoo_names
from edgepose.errors import CheckpointError
from edgepose.profiler.accuracy import AccuracyRecord, summary
from edgepose.profiler.gate.judge import judge_accuracy
from edgepose.profiler.gate.rules import AccuracyRule
from edgepose.profiles import load_target
from edgepose.recipe import load_recipe
from edgepose.spec import Backend

BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")


def control_name(network: str, recipe: str) -> str:
    """What the control arm of a recipe is called in the zoo; `edgepose train --control-of` trains it."""
    return f"{network}-{recipe}-control"


@dataclass(frozen=True, slots=True)
class Loss:
    """What a network lost by a recipe, in points, on the worse engine.

    Attributes:
        points: The loss.
        upper: Its one-sided 95 % upper bound.
        detail: The parts, for machines.
    """

    points: float
    upper: float
    detail: dict[str, Any]

    def value(self, bar: float, upper_bar: float) -> float:
        """The worse of the figure and of its bound, moved so that both may reach `bar`."""
        return max(self.points, self.upper - (upper_bar - bar))

    @property
    def text(self) -> str:
        return (
            f"{self.points:+.2f} (upper 95 % bound {self.upper:+.2f}) on {self.detail['backend']}, "
            f"{self.detail['candidate']:.2f} against {self.detail['baseline']:.2f} of {self.detail['reference']}"
        )


def lost(context: Context, network: str, recipe: str, metric: str, *, control: str = "") -> Loss:
    """What compiling a network by a recipe loses on val.

    Args:
        context: The run.
        network: Of the zoo.
        recipe: That comes with edgepose.
        metric: A share of joints.
        control: Recipe whose control arm is compared with; "" for `recipe`.

    Raises:
        CheckpointError: Network, control arm or compressed checkpoint are not in the zoo, or not of each other.
    """
    name, base = reference(context, network, control or recipe, metric)
    bundle = compiled(context, network, recipe)
    found = [(backend, bundle_record(context, bundle, backend)) for backend in BACKENDS]
    return worst_loss((name, base), found, context, metric)


def worst_loss(
    base: tuple[str, AccuracyRecord], found: Sequence[tuple[str, AccuracyRecord]], context: Context, metric: str
) -> Loss:
    """The largest loss of several engines, each against the same reference; bounds of the one with the largest bound.

    Args:
        base: Name and predictions of the reference.
        found: Name and predictions of each engine.
        context: Knows the people.
        metric: A share of joints.
    """
    keypoints = val_people(context).keypoints
    rule = AccuracyRule(metric=metric, alpha=0.05)
    judged = [(name, judge_accuracy(base[1], record, keypoints, rule)) for name, record in found]
    name, worst = min(judged, key=lambda pair: pair[1].diff_points)
    upper = max(outcome.loss_bounds[1] for _, outcome in judged)
    detail = {
        "metric": metric,
        "backend": name,
        "reference": base[0],
        "baseline": 100 * worst.baseline,
        "candidate": 100 * worst.candidate,
        "loss": -worst.diff_points,
        "upper95": upper,
        "detectable": worst.detectable_points,
        "persons": worst.persons,
        "by_backend": {name: -outcome.diff_points for name, outcome in judged},
    }
    return Loss(-worst.diff_points, upper, detail)


def reference(context: Context, network: str, recipe: str, metric: str) -> tuple[str, AccuracyRecord]:
    """The better of a float checkpoint and the control arm of a recipe, by a metric on val.

    Raises:
        CheckpointError: One of them is absent, or the control arm is another recipe's.
    """
    control = control_arm(network, recipe)
    keypoints = val_people(context).keypoints
    arms = [(path.name, torch_record(context, path)) for path in (find_checkpoint(network), control)]
    return max(arms, key=lambda arm: summary(arm[1], keypoints)[metric])


def control_arm(network: str, recipe: str) -> Path:
    """The committed control arm: the network trained as long as the recipe trains it, but not compressed.

    Raises:
        CheckpointError: There is none, or it was trained otherwise or from other weights.
    """
    from edgepose.stages.control import control_phases
    from edgepose.stages.settings import plan_of

    name = control_name(network, recipe)
    fix = f"edgepose train --control-of {recipe} --from {network} --out {name}, and commit what it writes"
    if name not in zoo_names():
        expected = "the float network trained for the recipe's epochs, which losses are taken against"
        raise CheckpointError(f"control arm {name}", found="no network of that name", expected=expected, fix=fix)
    settings = load_recipe(recipe)
    phases = control_phases(plan_of(settings, tuple(load_target(target) for target in settings.targets)))
    path = find_checkpoint(name)
    card = read_card(path)
    _check_control(card, [msgspec.to_builtins(phase.config) for phase in phases], _digest(network), fix)
    return path


def _check_control(card: Card, configs: Sequence[dict[str, Any]], source: str, fix: str) -> None:
    from edgepose.training.config import TrainConfig

    tail = card.lineage[-len(configs) :]
    asked = [msgspec.convert(config, TrainConfig) for config in configs]
    try:  # a card that is older than a setting has it at its default
        same = [msgspec.convert(entry.config, TrainConfig) for entry in tail] == asked
    except msgspec.ValidationError:
        same = False
    if not same or tail[0].inputs.get("checkpoint") != source:
        found = "other settings" if not same else "other weights that it began with"
        raise CheckpointError(f"control arm {card.name}", found=found, expected="the recipe's, as it is now", fix=fix)


def _digest(network: str) -> str:
    return read_card(find_checkpoint(network)).weights_sha256
