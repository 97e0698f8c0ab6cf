"""Losses on keypoint outputs, weighted per joint.

Invariant: a joint of weight 0 contributes nothing, to value or gradient; every loss is a mean over the weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import assert_never

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.config import LossConfig
from edgepose.blocks.rle import RealNVP, laplace_divergence, residual_likelihood
from edgepose.errors import SpecError
from edgepose.spec import Decoder, Heatmap, ModelSpec, OneStage, Regression, SimCC

HEATMAP_SCALE = 1000.0
"""Lifts the squared error of mostly empty maps to the magnitude of a cross-entropy: one learning rate serves both."""

DIVERGENCE_SCALE = 100.0
"""The same for the divergence of maps, which counts small errors in empty cells far more than their squares."""

SIMCC_SCALE = 100.0
"""The same for the squared error of probabilities, and for that of coordinates as shares of the input."""

_DEFAULT = LossConfig()


class KeypointLoss(nn.Module):
    """A keypoint loss with what it learns itself: the flow of residual log-likelihood estimation, else nothing.

    Whoever trains a network hands `parameters()` to the optimizer too, and keeps `state_dict()` with a run's state;
    neither belongs to the network. Make one with `make_loss`.
    """

    def __init__(self, decoder: Decoder, config: LossConfig, flow: RealNVP | None) -> None:
        super().__init__()
        self.decoder, self.config, self.flow = decoder, config, flow

    def forward(
        self, outputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor, *, maps: Tensor | None = None
    ) -> Tensor:
        """The loss of one stage.

        Args:
            outputs: The network's outputs, in the order of the specification; those behind the decoder's are left out.
            targets: Label tensors from `pose.codec`: for SimCC (N, K, bins) of x and y, each summing to 1; for heat
                maps (N, K, h, w); for coordinates (N, K, 2), shares of the input's width and height.
            weights: (N, K) float, 0 for joints that do not count; see `joint_weights`.
            maps: (N, K, h, w) keypoint maps behind the outputs (`Stage.maps`); only `spatial` reads them.

        Raises:
            SpecError: `spatial` without maps.
        """
        values = _joint_losses(outputs, targets, self.decoder, (self.config, self.flow), weights)
        if self.config.spatial > 0:
            values = values + self.config.spatial * _spatial(maps, targets, self.decoder)
        return _weighted_mean(values, hardest(values, weights, self.config.ohkm))


def make_loss(spec: ModelSpec, config: LossConfig = _DEFAULT, *, seed: int = 0) -> KeypointLoss:
    """The loss that trains a network.

    Args:
        spec: The network's specification.
        config: Which loss.
        seed: Of the flow's first weights; torch's own generator is left alone.

    Raises:
        SpecError: A loss that the network's outputs do not allow.
    """
    _check(spec.decoder, config)
    if not (isinstance(spec.decoder, Regression) and config.kind == "default"):
        return KeypointLoss(spec.decoder, config, None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KeypointLoss(spec.decoder, config, RealNVP())


def keypoint_loss(
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Tensor,
    decoder: Decoder,
    config: LossConfig = _DEFAULT,
) -> Tensor:
    """The loss that goes with a decoder, as a function: nothing in it learns.

    Residual log-likelihood estimation is left with its Laplacian; `make_loss` has the flow. Arguments are those of
    `KeypointLoss.forward`.

    Raises:
        SpecError: A loss that the outputs do not allow, or one that needs keypoint maps.
    """
    _check(decoder, config)
    loss: Tensor = KeypointLoss(decoder, config, None)(outputs, targets, weights)
    return loss


def joint_weights(weights: Tensor, visible: Tensor, known: Tensor, config: LossConfig) -> Tensor:
    """What each joint counts for: the only place where visibility enters the keypoint loss.

    Args:
        weights: (N, K) float, 0 for joints that do not count.
        visible: (N, K) float, 1 for joints that can be seen, 0 for hidden ones.
        known: (N, K) float, 1 where `visible` is known.
        config: Its `hidden_weight` is the factor for joints known to be hidden.
    """
    hidden = known * (1 - visible)
    return weights * (1 + (config.hidden_weight - 1) * hidden)


def hardest(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Online hard keypoint mining (Chen et al., "Cascaded Pyramid Network", CVPR 2018).

    Args:
        values: (N, K) loss of every joint.
        weights: (N, K) float, 0 for joints that do not count.
        count: How many joints of each person to keep, those with the largest losses; 0 keeps all.

    Returns:
        The weights, 0 for the joints that are left out. Of joints with equal losses the first are kept.
    """
    if count == 0 or count >= values.shape[1]:
        return weights
    ranked = values.detach().masked_fill(weights <= 0, -torch.inf)
    order = ranked.argsort(dim=1, descending=True, stable=True)[:, :count]
    return weights * torch.zeros_like(weights).scatter_(1, order, 1.0)


def distillation_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], decoder: Decoder) -> Tensor:
    """Distance of the student's outputs from the teacher's (Hinton et al., 2015), over all joints, labelled or not.

    Args:
        student: Outputs, in the order of the specification; those behind the decoder's are left out.
        teacher: The same of the teacher.
        decoder: Tells what the outputs are.
    """
    match decoder:
        case SimCC():
            ones = torch.ones(student[0].shape[:2], device=student[0].device)
            losses = [
                _weighted_mean(_cross_entropy(s, t.float().softmax(-1)), ones) - _entropy(t)
                for s, t in zip(student[:2], teacher[:2], strict=True)
            ]
            return torch.stack(losses).mean()
        case Heatmap():
            return HEATMAP_SCALE * F.mse_loss(student[0].float(), teacher[0].float())
        case Regression():
            return laplace_divergence((student[0], student[1]), (teacher[0], teacher[1])).mean()
        case OneStage():
            raise _one_stage()


def _check(decoder: Decoder, config: LossConfig) -> None:
    """Refuses what `decoder` cannot be trained with."""
    if config.kind == "kl" and isinstance(decoder, Regression):
        raise SpecError("loss: kind", found="kl for a regression head", expected="default, mse or wing")
    if config.spatial > 0 and not isinstance(decoder, SimCC):
        raise SpecError("loss: spatial", found=f"{config.spatial:g}", expected="0: only SimCC says x and y apart")


def _joint_losses(
    outputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    decoder: Decoder,
    loss: tuple[LossConfig, RealNVP | None],
    weights: Tensor,
) -> Tensor:
    """(N, K) float32, the loss of every joint."""
    match decoder:
        case SimCC():
            axes = [_simcc_axis(o.float(), t, decoder, loss[0]) for o, t in zip(outputs[:2], targets, strict=True)]
            return torch.stack(axes).mean(0)
        case Heatmap():
            return _heatmap(outputs[0].float(), targets[0], decoder, loss[0])
        case Regression():
            shares = outputs[0].float()
            # A label that does not count may be anything; its loss must still be finite, or 0 times it is not 0.
            labels = torch.where(weights[..., None] > 0, targets[0], shares.detach())
            return _regression((shares, outputs[1]), labels, decoder, loss)
        case OneStage():
            raise _one_stage()


def _one_stage() -> SpecError:
    return SpecError("training", found="a one-stage network", expected="one that is shown a person at a time")


def _simcc_axis(logits: Tensor, target: Tensor, decoder: SimCC, config: LossConfig) -> Tensor:
    """Logits and labels (N, K, B) of one axis to (N, K)."""
    match config.kind:
        case "default":
            return _cross_entropy(logits, target)
        case "kl":
            entropy: Tensor = -torch.xlogy(target, target).sum(-1)
            return _cross_entropy(logits, target) - entropy
        case "mse":
            return SIMCC_SCALE * (logits.softmax(-1) - target).square().sum(-1)
        case "wing":
            bins = torch.arange(logits.shape[-1], device=logits.device) / decoder.split_ratio
            error = ((logits.softmax(-1) - target) * bins).sum(-1)
            return _cross_entropy(logits, target) + wing(error, config)
        case _:
            assert_never(config.kind)


def _heatmap(maps: Tensor, target: Tensor, decoder: Heatmap, config: LossConfig) -> Tensor:
    """Maps and labels (N, K, h, w) to (N, K)."""
    match config.kind:
        case "default" | "mse":
            return HEATMAP_SCALE * (maps - target).square().flatten(2).mean(-1)
        case "kl":
            return DIVERGENCE_SCALE * poisson_divergence(maps, target).flatten(2).mean(-1)
        case "wing":
            error = decoder.stride * (soft_argmax(maps) - soft_argmax(target))
            return HEATMAP_SCALE * (maps - target).square().flatten(2).mean(-1) + wing(error, config).mean(-1)
        case _:
            assert_never(config.kind)


def _regression(
    outputs: tuple[Tensor, Tensor], target: Tensor, decoder: Regression, loss: tuple[LossConfig, RealNVP | None]
) -> Tensor:
    """Coordinates with scales, and labels, (N, K, 2) each, to (N, K)."""
    config, flow = loss
    match config.kind:
        case "default":
            return residual_likelihood(*outputs, target, flow)
        case "mse":
            return SIMCC_SCALE * (outputs[0] - target).square().mean(-1)
        case "wing":
            height, width = decoder.input_hw
            return wing((outputs[0] - target) * target.new_tensor([width, height]), config).mean(-1)
        case "kl":
            raise SpecError("loss: kind", found="kl for a regression head", expected="default, mse or wing")
        case _:
            assert_never(config.kind)


def wing(error_px: Tensor, config: LossConfig) -> Tensor:
    """The wing loss (Feng et al., CVPR 2018) in units of its width: ln(1 + |e| / ε), and linear from the width on."""
    size = error_px.abs()
    width, curve = config.wing_px, config.wing_curve_px
    offset = 1 - math.log1p(width / curve)  # joins the two
    return torch.where(size < width, torch.log1p(size / curve), size / width - offset)


def soft_argmax(maps: Tensor) -> Tensor:
    """Heat maps (N, K, h, w) with peaks of about 1 to positions (N, K, 2) in cells, x first, differentiably.

    The mean position of the cells (Sun et al., "Integral Human Pose Regression", ECCV 2018), weighted by the squares of
    what is above 0: a softmax sharp enough to outweigh the empty cells would snap a peak of this size to its cell. A
    little weight stands on the middle of the map, where empty maps are read; labels are to be read the same way.
    """
    height, width = maps.shape[2:]
    share = maps.clamp(min=0).square()
    total = share.sum((2, 3)) + _EMPTY
    x = (share.sum(2) * torch.arange(width, device=maps.device)).sum(-1) + _EMPTY * (width - 1) / 2
    y = (share.sum(3) * torch.arange(height, device=maps.device)).sum(-1) + _EMPTY * (height - 1) / 2
    return torch.stack([x / total, y / total], -1)


_EMPTY = 0.01  # of the squares' sum, which is above 1 for a peak
_FLOOR = 0.02  # map values below this count as this where they divide


def poisson_divergence(maps: Tensor, target: Tensor) -> Tensor:
    """The Kullback-Leibler divergence t·ln(t / m) - t + m of heat maps that need not add up to 1, cell by cell.

    A heat map's values are its scores, so it must not be normalised. The derivative is (m - t) / m; below a floor the
    divisor stays there, which makes the loss finite and smooth for all maps, negative ones too, and 0 only at m = t.
    """
    low = torch.where(maps < _FLOOR, maps, _FLOOR)
    low_target = target.clamp(max=_FLOOR)
    high, high_target = maps.clamp(min=_FLOOR), target.clamp(min=_FLOOR)
    # The derivative's integral from t to m, in the part below the floor and in the part above.
    below = ((low - target).square() - (low_target - target).square()) / (2 * _FLOOR)
    above = high - high_target - target * (high / high_target).log()
    return below + above


def _spatial(maps: Tensor | None, targets: Sequence[Tensor], decoder: Decoder) -> Tensor:
    """Cross-entropy (N, K) of the softmax over all cells against the product of the labels of x and y."""
    if maps is None or not isinstance(decoder, SimCC):
        raise SpecError(
            "loss: spatial",
            found="outputs without keypoint maps",
            expected="those of KPENet.stages",
            fix="set it to 0 for networks that cannot hand maps out, such as fake-quantised ones",
        )
    x = targets[0] @ _cells_of_bins(targets[0], maps.shape[3], decoder)
    y = targets[1] @ _cells_of_bins(targets[1], maps.shape[2], decoder)
    return _cross_entropy(maps.flatten(2), (y[..., :, None] * x[..., None, :]).flatten(2))


def _cells_of_bins(target: Tensor, cells: int, decoder: SimCC) -> Tensor:
    """(bins, cells): the share of each bin that lies in each cell.

    Pixel centres are integers, so a cell begins half a pixel, which is split_ratio / 2 bins, before its first pixel.
    """
    bins = target.shape[-1]
    position = torch.arange(bins, device=target.device)[:, None]
    start = torch.arange(1, cells, device=target.device) * (bins / cells) - 0.5 * decoder.split_ratio
    before = torch.clamp(start[None, :] - (position - 0.5), 0, 1).to(target.dtype)  # of each bin, in front of each edge
    edges = torch.cat([torch.zeros_like(before[:, :1]), before, torch.ones_like(before[:, :1])], 1)
    return edges.diff(dim=1)


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(target * logits.float().log_softmax(-1)).sum(-1)


def _entropy(logits: Tensor) -> Tensor:
    log = logits.float().log_softmax(-1)
    return -(log.exp() * log).sum(-1).mean()


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-6)
