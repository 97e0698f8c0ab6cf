"""The training objective: which terms are there, and whom they listen to."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import torch
from torch import Tensor

from edgepose.blocks.config import LossConfig, ORNConfig, spec_of
from edgepose.blocks.heads import Stage
from edgepose.blocks.losses import distillation_loss, keypoint_loss
from edgepose.blocks.orn_losses import clear_loss, distance_px, error_loss, visibility_loss
from edgepose.pose.codec import encode_simcc
from edgepose.spec import SimCC
from edgepose.training.batches import Batch
from edgepose.training.config import TrainConfig
from edgepose.training.objective import Objective
from tests.training.dots import KEYPOINTS, NETWORK, SPEC

ROBUST = spec_of(msgspec.structs.replace(NETWORK, orn=ORNConfig(16, 1)), KEYPOINTS)
CONFIG = TrainConfig(epochs=1, stage_weight=0.3)


def batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 4, 2, generator=generator) * 63
    targets = encode_simcc(points.numpy(), (64, 64), SimCC(), 3.0)
    weights, visible, known = ((torch.rand(3, 4, generator=generator) < p).float() for p in (0.8, 0.5, 0.7))
    crops = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)
    covered = torch.rand(3, 8, 8, generator=generator)
    return Batch(crops, tuple(torch.from_numpy(t) for t in targets), weights, points, visible, known, covered)


def outputs(seed: int, *, robust: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(3, 4, 128), (3, 4, 128), (3, 4), (3, 4)][: 4 if robust else 2]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def keypoints_alone(found: tuple[Tensor, ...], labels: Batch, weights: Tensor | None = None) -> float:
    weights = labels.weights if weights is None else weights
    return keypoint_loss(found[:2], labels.targets, weights, SimCC()).item()


def test_a_network_of_keypoints_alone_is_trained_on_them_alone() -> None:
    labels, found = batch(), outputs(1, robust=False)
    loss = Objective(SPEC, CONFIG)([Stage(found, None)], labels)
    assert loss.item() == pytest.approx(keypoints_alone(found, labels))


def test_all_terms_with_their_weights() -> None:
    labels, early, found = batch(), outputs(1, robust=False), outputs(2)
    loss = Objective(ROBUST, CONFIG)([Stage(early, None), Stage(found, None)], labels)
    distance = distance_px(found[:2], SimCC(), labels.keypoints)
    expected = keypoints_alone(found, labels) + 0.3 * keypoints_alone(early, labels)
    expected += 0.5 * visibility_loss(found[2], labels.visible, labels.known).item()
    expected += 0.1 * error_loss(found[3], distance, labels.weights).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_what_is_said_of_every_place_is_trained_on_what_was_painted_over() -> None:
    labels, found, clear = batch(), outputs(1), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    with_places, without = (Objective(ROBUST, CONFIG)([Stage(found, None, c)], labels) for c in (clear, None))
    expected = 0.5 * clear_loss(clear, labels.covered).item()
    assert (with_places - without).item() == pytest.approx(expected, rel=1e-4)


def test_hidden_joints_weigh_what_the_loss_config_says() -> None:
    labels, found = batch(), outputs(1, robust=False)
    config = msgspec.structs.replace(CONFIG, loss=LossConfig(hidden_weight=0.0))
    loss = Objective(SPEC, config)([Stage(found, None)], labels)
    seen = labels.weights * (1 - labels.known * (1 - labels.visible))
    assert loss.item() == pytest.approx(keypoints_alone(found, labels, seen))


def test_a_teacher_is_followed_in_everything_that_it_says() -> None:
    labels, found, taught = batch(), outputs(1), outputs(2)
    config = msgspec.structs.replace(CONFIG, distill_weight=0.7)
    loss = Objective(ROBUST, config)([Stage(found, None)], labels, taught)
    expected = 0.3 * keypoints_alone(found, labels) + 0.7 * distillation_loss(found[:2], taught[:2], SimCC()).item()
    expected += 0.5 * visibility_loss(found[2], taught[2].sigmoid(), torch.ones(3, 4)).item()
    expected += 0.1 * (found[3] - taught[3]).abs().mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_labels_of_visibility_do_not_count_beside_a_teacher() -> None:
    """Fine-tuning without occlusion would teach the network that everything is visible."""
    found, taught = outputs(1), outputs(2)
    config = msgspec.structs.replace(CONFIG, distill_weight=0.5)
    labels = batch()
    blind = replace(labels, visible=1 - labels.visible)
    objective = Objective(ROBUST, config)
    losses = [objective([Stage(found, None)], each, taught).item() for each in (labels, blind)]
    assert losses[0] == losses[1]


def test_what_a_teacher_does_not_say_is_learnt_from_labels() -> None:
    """A keypoint network may teach an occlusion-robust one, whose visibility and errors must not stay untrained."""
    labels, found = batch(), outputs(1)
    config = msgspec.structs.replace(CONFIG, distill_weight=1.0)
    loss = Objective(ROBUST, config)([Stage(found, None)], labels, outputs(2, robust=False))
    distance = distance_px(found[:2], SimCC(), labels.keypoints)
    expected = distillation_loss(found[:2], outputs(2, robust=False), SimCC()).item()
    expected += 0.5 * visibility_loss(found[2], labels.visible, labels.known).item()
    expected += 0.1 * error_loss(found[3], distance, labels.weights).item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_that_sees_people_uncovered_is_asked_for_keypoints_alone() -> None:
    """It would call visible what only the student's views hide."""
    labels, found = batch(), outputs(1)
    config = msgspec.structs.replace(CONFIG, distill_weight=0.5, uncovered_teacher=True)
    objective = Objective(ROBUST, config)
    losses = [objective([Stage(found, None)], labels, outputs(2, robust=robust)).item() for robust in (True, False)]
    assert losses[0] == losses[1]


def test_places_are_learnt_from_labels_where_the_teacher_says_nothing_of_visibility() -> None:
    labels, found, clear = batch(), outputs(1), torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    objective = Objective(ROBUST, msgspec.structs.replace(CONFIG, distill_weight=0.5))
    for robust, weight in ((False, 0.5), (True, 0.0)):
        taught = outputs(2, robust=robust)
        with_places, without = (objective([Stage(found, None, c)], labels, taught) for c in (clear, None))
        expected = weight * clear_loss(clear, labels.covered).item()
        assert (with_places - without).item() == pytest.approx(expected, rel=1e-4)


def test_the_flow_of_coordinates_is_trained_and_everything_else_has_no_parameters() -> None:
    coordinates = spec_of(msgspec.structs.replace(NETWORK, head="regression"), KEYPOINTS)
    assert list(Objective(SPEC, CONFIG).parameters()) == []
    assert list(Objective(coordinates, CONFIG).parameters())
