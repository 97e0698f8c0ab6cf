"""Losses: values by hand, joints that do not count, distillation from an equal teacher."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from edgepose.blocks.losses import distillation_loss, keypoint_loss
from edgepose.pose.codec import encode_heatmap, encode_simcc
from edgepose.spec import Decoder, Heatmap, SimCC

HW = (32, 24)
DECODERS = {"simcc": SimCC(), "heatmap": Heatmap(stride=4.0)}
POINTS = np.array([[[5.0, 7], [20, 30]], [[11, 11], [3, 29]]], np.float32)


def targets_of(decoder: Decoder) -> tuple[Tensor, ...]:
    if isinstance(decoder, SimCC):
        return tuple(torch.from_numpy(t) for t in encode_simcc(POINTS, HW, decoder, 2.0))
    return (torch.from_numpy(encode_heatmap(POINTS, HW, decoder, 2.0)),)


def outputs_of(decoder: Decoder, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(t.shape, generator=generator).requires_grad_() for t in targets_of(decoder)]


@pytest.mark.parametrize("kind", DECODERS)
def test_joints_without_weight_have_no_gradient_and_no_say(kind: str) -> None:
    decoder = DECODERS[kind]
    outputs, targets = outputs_of(decoder), targets_of(decoder)
    weights = torch.tensor([[1.0, 0], [0, 1]])
    loss = keypoint_loss(outputs, targets, weights, decoder)
    loss.backward()
    for output in outputs:
        assert output.grad is not None
        assert not output.grad[0, 1].any()
        assert not output.grad[1, 0].any()
        assert output.grad[0, 0].any()
    disturbed = [o.detach().clone() for o in outputs]
    for output in disturbed:
        output[0, 1] += 100
    assert keypoint_loss(disturbed, targets, weights, decoder).item() == pytest.approx(loss.item())


@pytest.mark.parametrize("kind", DECODERS)
def test_a_batch_without_labels_costs_nothing(kind: str) -> None:
    decoder = DECODERS[kind]
    outputs = outputs_of(decoder)
    loss = keypoint_loss(outputs, targets_of(decoder), torch.zeros(2, 2), decoder)
    loss.backward()
    assert loss.item() == 0
    assert all(o.grad is not None and not o.grad.any() for o in outputs)


@pytest.mark.parametrize("kind", DECODERS)
def test_the_loss_is_a_mean_over_the_weight(kind: str) -> None:
    decoder = DECODERS[kind]
    outputs, targets = outputs_of(decoder), targets_of(decoder)
    single = [keypoint_loss(outputs, targets, torch.eye(4)[i].reshape(2, 2), decoder).item() for i in range(4)]
    together = keypoint_loss(outputs, targets, torch.tensor([[1.0, 1], [1, 0]]), decoder).item()
    assert together == pytest.approx(np.mean(single[:3]), rel=1e-5)


def test_cross_entropy_by_hand() -> None:
    flat = [torch.zeros(t.shape) for t in targets_of(SimCC())]
    expected = (math.log(48) + math.log(64)) / 2  # every bin is as likely as another
    loss = keypoint_loss(flat, targets_of(SimCC()), torch.ones(2, 2), SimCC())
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_labels_themselves_are_the_best_answer() -> None:
    weights = torch.ones(2, 2)
    heat = targets_of(DECODERS["heatmap"])
    assert keypoint_loss(heat, heat, weights, DECODERS["heatmap"]).item() == 0
    labels = targets_of(SimCC())
    perfect = [t.clamp(min=1e-20).log() for t in labels]
    best = keypoint_loss(perfect, labels, weights, SimCC())
    for seed in range(3):
        moved = [p + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)) for p in perfect]
        assert keypoint_loss(moved, labels, weights, SimCC()) > best


@pytest.mark.parametrize("kind", DECODERS)
def test_an_equal_teacher_teaches_nothing(kind: str) -> None:
    decoder = DECODERS[kind]
    outputs = outputs_of(decoder)
    loss = distillation_loss(outputs, [o.detach().clone() for o in outputs], decoder)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert all(o.grad is not None and o.grad.abs().max() < 1e-6 for o in outputs)
    other = distillation_loss(outputs, [o.detach() for o in outputs_of(decoder, seed=1)], decoder)
    assert other.item() > 0.1


def test_distillation_ignores_a_constant_on_logits() -> None:
    outputs = [o.detach() for o in outputs_of(SimCC())]
    assert distillation_loss([o + 3 for o in outputs], outputs, SimCC()).item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("kind", DECODERS)
def test_bfloat16_outputs_are_summed_in_float32(kind: str) -> None:
    decoder = DECODERS[kind]
    outputs, targets = outputs_of(decoder), targets_of(decoder)
    rounded = [o.detach().bfloat16() for o in outputs]
    expected = keypoint_loss([o.float() for o in rounded], targets, torch.ones(2, 2), decoder)
    loss = keypoint_loss(rounded, targets, torch.ones(2, 2), decoder)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item())
    assert distillation_loss(rounded, rounded, decoder).item() == pytest.approx(0, abs=1e-5)
