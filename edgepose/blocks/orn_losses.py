"""What the occlusion-robust block's own outputs are trained on: what is covered, which joints can be seen, and how far
each one is off.

Invariant: joints whose visibility is not known, or that are not labelled, contribute nothing; neither loss moves the
keypoints, whose error is measured on values cut off from the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor

from edgepose.errors import SpecError
from edgepose.spec import Decoder, Heatmap, OneStage, Regression, SimCC

_LEAST_LOG_PX = -3.0  # 0.05 px: no label is as exact, and below it one outlier's gradient would outweigh a batch


def visibility_loss(logits: Tensor, visible: Tensor, known: Tensor) -> Tensor:
    """Cross-entropy of the visibility head, unbalanced: balancing would spoil the calibration of its probabilities.

    Args:
        logits: (N, K) float.
        visible: (N, K) float, 1 seen, 0 hidden; a teacher's probabilities will do.
        known: (N, K) float, 0 where nobody knows.
    """
    losses = F.binary_cross_entropy_with_logits(logits.float(), visible, reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1e-6)


def clear_loss(logits: Tensor, covered: Tensor) -> Tensor:
    """Cross-entropy of what the block says of every place of the picture.

    Args:
        logits: (N, 1, h, w) float, of nothing being in front.
        covered: (N, H, W) float, share of each cell that something is in front of; below 0 where nobody knows.
    """
    known = F.interpolate((covered >= 0).float()[:, None], logits.shape[2:], mode="area")
    clear = 1 - F.interpolate(covered.clamp(min=0)[:, None], logits.shape[2:], mode="area")
    losses = F.binary_cross_entropy_with_logits(logits.float(), clear, reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1e-6)


def error_loss(log_error: Tensor, error_px: Tensor, weights: Tensor) -> Tensor:
    """Negative log-likelihood of distances under the Laplace law (Kendall & Gal, NeurIPS 2017), up to a constant.

    It is least where exp(log_error) is the mean distance.

    Args:
        log_error: (N, K) float, ln of the expected distance in input pixels.
        error_px: (N, K) float, distance of the decoded keypoint from its label; no gradient flows into it.
        weights: (N, K) float, 0 for joints that do not count.
    """
    said = log_error.float().clamp(min=_LEAST_LOG_PX)
    losses = error_px.detach() * torch.exp(-said) + said
    return (losses * weights).sum() / weights.sum().clamp(min=1e-6)


@torch.no_grad()
def distance_px(outputs: Sequence[Tensor], decoder: Decoder, keypoints: Tensor) -> Tensor:
    """Distance of the decoded keypoints from their labels, in input pixels.

    Args:
        outputs: The decoder's outputs, (N, K, …) each.
        decoder: Tells what they are; peaks are taken whole, without refinement.
        keypoints: (N, K, 2) float32, input pixels.
    """
    match decoder:
        case SimCC():
            bins = torch.stack([output.argmax(-1) for output in outputs], -1)
            found = bins.float() / decoder.split_ratio
        case Heatmap():
            width = outputs[0].shape[-1]
            peak = outputs[0].flatten(2).argmax(-1)
            cells = torch.stack([peak % width, peak // width], -1).float()
            found = (cells + 0.5) * decoder.stride - 0.5
        case Regression():
            height, width = decoder.input_hw
            found = outputs[0].float() * torch.tensor([width, height]) - 0.5
        case OneStage():
            raise SpecError("training", found="a one-stage network", expected="one that is shown a person at a time")
    distance: Tensor = torch.linalg.vector_norm(found - keypoints, dim=-1)
    return distance
