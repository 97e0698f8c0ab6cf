"""Outputs that nobody here has labels for are held at the teacher's while the rest is fine-tuned."""

from __future__ import annotations

import msgspec
import pytest
import torch

from edgepose.blocks.heads import Stage
from edgepose.spec import TensorSpec
from edgepose.training.batches import Batch
from edgepose.training.objective import Objective
from tests.training.dots import CONFIG, SPEC

COUNT, JOINTS = 2, SPEC.keypoints.count
BINS = [int(output.shape[2]) for output in SPEC.outputs]
WITH_MOOD = msgspec.structs.replace(SPEC, outputs=(*SPEC.outputs, TensorSpec("mood", ("batch", 3))))
TAUGHT_MOOD = torch.tensor([[1.0, 0, 2], [3, -1, 0]])


def loss_for(mood: torch.Tensor, *, teacher_says_mood: bool = True) -> torch.Tensor:
    shapes = [(COUNT, JOINTS, bins) for bins in BINS]
    targets = tuple(torch.full(shape, 1 / shape[2]) for shape in shapes)
    ones = torch.ones(COUNT, JOINTS)
    batch = Batch(torch.empty(0), targets, ones, torch.zeros(COUNT, JOINTS, 2), ones, ones, torch.zeros(COUNT, 1, 1))
    taught = [torch.zeros(shape) for shape in shapes] + ([TAUGHT_MOOD] if teacher_says_mood else [])
    objective = Objective(WITH_MOOD, msgspec.structs.replace(CONFIG, distill_weight=0.5))
    loss: torch.Tensor = objective([Stage((*(torch.zeros(shape) for shape in shapes), mood), None)], batch, taught)
    return loss


def test_they_follow_the_teacher_by_the_share_of_their_variance() -> None:
    same, off = loss_for(TAUGHT_MOOD), loss_for(TAUGHT_MOOD + 1)
    assert (off - same).item() == pytest.approx(1 / TAUGHT_MOOD.var(correction=0).item(), rel=1e-4)


def test_they_have_a_gradient_only_where_the_teacher_has_them() -> None:
    mood = torch.zeros_like(TAUGHT_MOOD, requires_grad=True)
    loss_for(mood).backward()
    assert mood.grad is not None
    assert mood.grad.abs().sum() > 0
    alone = torch.zeros_like(TAUGHT_MOOD, requires_grad=True)
    loss = loss_for(alone, teacher_says_mood=False)
    assert not loss.requires_grad
