"""Claims about occlusion, on records whose answers are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import occlusion
from benchmarks.areas.blocks import (
    AUGMENTED,
    ORN,
    PLAIN,
    orn_clean,
    orn_vs_augmented,
    orn_vs_plain,
    visibility_auroc,
    visibility_ece,
)
from benchmarks.context import Context
from edgepose.blocks.card import read_card
from edgepose.blocks.zoo import find_checkpoint
from edgepose.data.render import LSP14
from edgepose.errors import AnnotationError, CheckpointError, SpecError
from edgepose.pose import metrics
from edgepose.profiler.slices import SliceRecord

PEOPLE = 60
POSE = np.stack([np.arange(14) * 10.0, np.arange(14) * 10.0, np.full(14, 2.0)], 1).astype(np.float32)


def record(wrong: float, seed: int = 0) -> SliceRecord:
    """People of whom a share of all joints is missed by far."""
    truth = np.repeat(POSE[None], PEOPLE, axis=0)
    predicted = truth[..., :2].copy()
    missed = np.random.default_rng(seed).random((PEOPLE, 14)) < wrong
    predicted[missed] += 1000
    return SliceRecord(
        name="x",
        annotation_id=np.arange(PEOPLE),
        errors=metrics.measure(predicted, truth, LSP14),
        hidden=np.zeros((PEOPLE, 14), np.bool_),
        known=np.ones((PEOPLE, 14), np.bool_),
        visibility=None,
    )


def context_with(folder: Path, **wrong: float) -> Context:
    """A run in which every network has been measured already."""
    context = Context(folder, folder)
    for arm, networks in (("orn", ORN), ("plain", PLAIN), ("augmented", AUGMENTED)):
        for seed, network in enumerate(networks):
            found = {name: record(wrong[arm], seed) for name in ("clean", occlusion.OCCLUDED)}
            context.once(f"slices {network}", lambda found=found: found)  # type: ignore[misc]
            context.once(f"cost {network}", lambda: occlusion.Cost(macs=1000, epochs=100))
    return context


def test_gains_are_in_points_and_point_to_the_candidate(tmp_path: Path) -> None:
    context = context_with(tmp_path, orn=0.1, plain=0.5, augmented=0.3)
    gain = orn_vs_plain(context).value
    assert 30 < gain < 50
    lower = orn_vs_augmented(context)
    assert 10 < lower.value < lower.detail["points"] < 30


def test_equal_networks_gain_nothing(tmp_path: Path) -> None:
    context = context_with(tmp_path, orn=0.2, plain=0.2, augmented=0.2)
    assert orn_vs_plain(context).value == 0
    assert orn_vs_augmented(context).value == 0
    assert orn_clean(context).value == 0


def test_a_clean_loss_within_the_bar_does_not_hold_if_its_bound_is_not(tmp_path: Path) -> None:
    measured = orn_clean(context_with(tmp_path, orn=0.21, plain=0.2, augmented=0.2))
    point, low = measured.detail["points"], measured.detail["ci95"][0]
    assert point < 0
    assert measured.value == pytest.approx(min(point, low + 1.2))


@pytest.mark.parametrize("cost", [occlusion.Cost(1051, 100), occlusion.Cost(949, 100), occlusion.Cost(1000, 101)])
def test_networks_of_another_size_or_training_are_not_compared(tmp_path: Path, cost: occlusion.Cost) -> None:
    context = context_with(tmp_path, orn=0.1, plain=0.2, augmented=0.2)
    context._kept[f"cost {ORN[0]}"] = (cost, None)
    with pytest.raises(CheckpointError, match="epochs of training"):
        orn_vs_plain(context)


def test_the_cost_of_a_network_comes_from_its_weights_and_its_card(tmp_path: Path) -> None:
    found = occlusion.cost(Context(tmp_path, tmp_path), "kpe-t")
    card = read_card(find_checkpoint("kpe-t"))
    assert 0.05e9 < found.macs < 0.4e9
    assert found.epochs == sum(len(entry.report["curve"]) for entry in card.lineage if entry.stage == "train") > 0


def test_networks_measured_on_other_people_are_not_compared(tmp_path: Path) -> None:
    context = context_with(tmp_path, orn=0.1, plain=0.2, augmented=0.2)
    few = record(0.2)
    context._kept[f"slices {PLAIN[0]}"] = (
        {
            "clean": few,
            occlusion.OCCLUDED: SliceRecord(
                few.name, few.annotation_id + 1, few.errors, few.hidden, few.known, few.visibility
            ),
        },
        None,
    )
    with pytest.raises(Exception, match="same"):
        orn_vs_plain(context)


def seen(hidden_share: float, said_of_hidden: float) -> SliceRecord:
    """People of whom a share of the joints is hidden; of those that can be seen the network says 1."""
    hidden = np.zeros((PEOPLE, 14), np.bool_)
    hidden[: round(hidden_share * PEOPLE)] = True
    return replace(record(0.0), hidden=hidden, visibility=np.where(hidden, said_of_hidden, 1.0))


def test_visibility_is_as_good_as_on_the_worse_kind_of_picture(tmp_path: Path) -> None:
    context = Context(tmp_path, tmp_path)
    known = {"photographs": seen(0.5, 0.0), "rendered": seen(0.5, 1.0), "coco17": record(0.0)}
    context.once(f"visibility {ORN[0]}", lambda: known)
    auroc, ece = visibility_auroc(context), visibility_ece(context)
    assert (auroc.value, ece.value) == (0.5, 0.5)
    assert "photographs 1.000" in auroc.text
    assert "coco17" not in auroc.text  # nothing is hidden in it here
    assert auroc.detail["coco17"]["hidden_joints"] == 0


def test_visibility_that_would_mean_little_is_not_shown(tmp_path: Path) -> None:
    few, silent = Context(tmp_path, tmp_path), Context(tmp_path, tmp_path)
    few.once(f"visibility {ORN[0]}", lambda: {"photographs": seen(0.1, 0.0), "rendered": seen(0.5, 0.0)})
    with pytest.raises(AnnotationError, match=r"visibility on photographs: found 10\.0 % hidden"):
        visibility_auroc(few)
    nothing = replace(seen(0.5, 0.0), visibility=None)
    silent.once(f"visibility {ORN[0]}", lambda: {"photographs": nothing, "rendered": nothing})
    with pytest.raises(SpecError, match="does not say which joints can be seen"):
        visibility_ece(silent)
