"""Losses on keypoint outputs, weighted per joint.

Invariant: a joint of weight 0 contributes nothing, to value or gradient; every loss is a mean over the weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor

from edgepose.spec import Decoder, Heatmap, SimCC


def keypoint_loss(outputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor, decoder: Decoder) -> Tensor:
    """The loss that goes with a decoder: cross-entropy for SimCC, squared error for heat maps.

    Args:
        outputs: The network's outputs, in the order of the specification.
        targets: Tensors of the same shapes, from `pose.codec`; SimCC targets sum to 1 over the bins.
        weights: (N, K) float, 0 for joints that do not count.
        decoder: Tells what the outputs are.
    """
    match decoder:
        case SimCC():
            losses = [_soft_cross_entropy(o, t, weights) for o, t in zip(outputs, targets, strict=True)]
            return torch.stack(losses).mean()
        case Heatmap():
            error = (outputs[0].float() - targets[0]).square().flatten(2).mean(-1)
            return HEATMAP_SCALE * _weighted_mean(error, weights)


HEATMAP_SCALE = 1000.0
"""Lifts the squared error of mostly empty maps to the magnitude of a cross-entropy: one learning rate serves both."""


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], decoder: Decoder) -> Tensor:
    """Distance of the student's outputs from the teacher's (Hinton et al., 2015), over all joints, labelled or not."""
    match decoder:
        case SimCC():
            ones = torch.ones(student[0].shape[:2], device=student[0].device)
            losses = [
                _soft_cross_entropy(s, t.float().softmax(-1), ones) - _entropy(t)
                for s, t in zip(student, teacher, strict=True)
            ]
            return torch.stack(losses).mean()
        case Heatmap():
            return HEATMAP_SCALE * F.mse_loss(student[0].float(), teacher[0].float())


def _soft_cross_entropy(logits: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    return _weighted_mean(-(target * logits.float().log_softmax(-1)).sum(-1), weights)


def _entropy(logits: Tensor) -> Tensor:
    log = logits.float().log_softmax(-1)
    return -(log.exp() * log).sum(-1).mean()


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)
