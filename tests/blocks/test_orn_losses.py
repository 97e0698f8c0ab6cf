"""The occlusion-robust block's losses: where they are least, what they leave alone, and distances in pixels."""

from __future__ import annotations

import math

import pytest
import torch

from edgepose.blocks.orn_losses import clear_loss, distance_px, error_loss, visibility_loss
from edgepose.spec import Decoder, Heatmap, Regression, SimCC


def test_the_best_probability_is_the_share_that_is_seen() -> None:
    visible, known = torch.tensor([[1.0, 1.0, 1.0, 0.0]]), torch.ones(1, 4)
    losses = {p: visibility_loss(torch.full((1, 4), math.log(p / (1 - p))), visible, known) for p in (0.6, 0.75, 0.9)}
    assert min(losses, key=lambda p: losses[p].item()) == 0.75
    assert losses[0.75].item() == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


def test_unknown_visibility_does_not_count() -> None:
    logits = torch.tensor([[1.0, -50.0]], requires_grad=True)
    loss = visibility_loss(logits, torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 0.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-1)))
    assert logits.grad is not None
    assert logits.grad[0, 1] == 0
    assert visibility_loss(logits, torch.ones(1, 2), torch.zeros(1, 2)).item() == 0


def test_places_of_which_nobody_knows_do_not_count_and_grids_may_differ() -> None:
    covered = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]], [[-1.0] * 4, [-1.0] * 4]])
    logits = torch.tensor([[[[-9.0, 9.0]]], [[[9.0, -9.0]]]])  # half as many rows and columns
    assert clear_loss(logits, covered).item() == pytest.approx(math.log1p(math.exp(-9)), rel=1e-2)
    assert clear_loss(-logits, covered).item() == pytest.approx(9, abs=1e-3)
    assert clear_loss(logits[1:], covered[1:]).item() == 0


def test_the_best_expected_error_is_the_mean_distance() -> None:
    errors, weights = torch.tensor([[1.0, 2.0, 9.0, 500.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    losses = {m: error_loss(torch.full((1, 4), math.log(m)), errors, weights).item() for m in (3.0, 4.0, 5.0)}
    assert min(losses, key=lambda m: losses[m]) == 4.0
    assert losses[4.0] == pytest.approx(1 + math.log(4))


def test_expected_errors_do_not_move_keypoints_and_stay_finite() -> None:
    errors = torch.tensor([[3.0]], requires_grad=True)
    said = torch.tensor([[-200.0]], requires_grad=True)
    loss = error_loss(said, errors, torch.ones(1, 1))
    loss.backward()
    assert errors.grad is None
    assert math.isfinite(loss.item())


@pytest.mark.parametrize(
    ("outputs", "decoder"),
    [
        ((torch.eye(8)[None, [6, 2]], torch.eye(8)[None, [2, 4]]), SimCC(split_ratio=2.0)),
        ((torch.stack([torch.eye(16)[7].reshape(4, 4), torch.eye(16)[8].reshape(4, 4)])[None],), Heatmap(stride=2.0)),
        ((torch.tensor([[[0.4375, 0.375], [0.1875, 0.625]]]), torch.ones(1, 2, 2)), Regression((4, 8))),
    ],
    ids=["simcc", "heatmap", "regression"],
)
def test_distances_are_in_input_pixels(outputs: tuple[torch.Tensor, ...], decoder: Decoder) -> None:
    places = {
        "SimCC": [[3.0, 1.0], [1.0, 2.0]],
        "Heatmap": [[6.5, 2.5], [0.5, 4.5]],
        "Regression": [[3.0, 1.0], [1.0, 2.0]],
    }[type(decoder).__name__]
    keypoints = torch.tensor([places]) + torch.tensor([[[3.0, 4.0], [0.0, 0.0]]])
    assert distance_px(outputs, decoder, keypoints).tolist() == [[5.0, 0.0]]
