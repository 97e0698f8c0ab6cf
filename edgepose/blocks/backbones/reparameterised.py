"""The re-parameterisable backbone: branches while it trains, one 3x3 convolution per block afterwards.

Invariant: what `RepBlock.fold_branches` returns computes what the block computes in evaluation mode, up to float
rounding, and normalises with the statistics that the block saw: pruning and fine-tuning go on from it as from any other
network.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.backbones.staged import Backbone, conv_bn


class RepBlock(nn.Module):
    """A 3x3, a 1x1 and an identity branch, each normalised, added and rectified (Ding et al., RepVGG, CVPR 2021)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv3 = conv_bn(inputs, outputs, 3, stride)
        self.conv1 = conv_bn(inputs, outputs, 1)
        self.identity = nn.BatchNorm2d(inputs) if stride == 1 and inputs == outputs else None
        # Only watches: variances of branches do not add up to the variance of their sum, which `fold_branches` needs.
        self.total = nn.BatchNorm2d(outputs, affine=False)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        # Not a strided 1x1 convolution: for less than 16 channels, its gradient corrupts memory in torch's CPU kernels
        # for channels_last (oneDNN issue 6035).
        out = self.conv3(x) + self.conv1(x[..., :: self.stride, :: self.stride])
        if self.identity is not None:
            out = out + self.identity(x)
        if self.total.training:
            with torch.no_grad():
                self.total(out)
        rectified: Tensor = self.relu(out)
        return rectified

    @torch.no_grad()
    def fold_branches(self) -> nn.Sequential:
        """One 3x3 convolution ("conv.0"), its batch normalisation ("conv.1") and ReLU; computed in float64."""
        conv = self.conv3[0]
        assert isinstance(conv, nn.Conv2d)
        weights, shifts = zip(*self._branches(), strict=True)
        weight, shift = torch.stack(weights).sum(0), torch.stack(shifts).sum(0)
        mean, variance = self.total.running_mean, self.total.running_var
        assert mean is not None
        assert variance is not None
        fused = conv_bn(conv.in_channels, conv.out_channels, 3, self.stride).to(conv.weight)
        merged, norm = fused[0], fused[1]
        assert isinstance(merged, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        merged.weight.copy_(weight)
        # Gain and bias undo the normalisation exactly, whatever the statistics: gain · (z - m) / σ + bias = z + shift.
        norm.load_state_dict({
            "weight": (variance.double() + norm.eps).sqrt(),
            "bias": mean,
            "running_mean": mean.double() - shift,
            "running_var": variance,
            "num_batches_tracked": self.total.num_batches_tracked,
        })  # fmt: skip
        return nn.Sequential(OrderedDict(conv=fused, relu=nn.ReLU())).train(self.training)

    def _branches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each branch as the weight of a 3x3 convolution and a bias, float64."""
        for branch in (self.conv3, self.conv1):
            weight, norm = branch.get_parameter("0.weight").double(), branch[1]
            assert isinstance(norm, nn.BatchNorm2d)
            gain, shift = _affine(norm)
            margin = (3 - weight.shape[-1]) // 2
            yield F.pad(weight, [margin] * 4) * gain.reshape(-1, 1, 1, 1), shift
        if self.identity is not None:
            gain, shift = _affine(self.identity)
            yield F.pad(torch.diag(gain)[..., None, None], [1] * 4), shift


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a normalisation multiplies by and adds in evaluation mode: (channels,) float64 each."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain = norm.weight.double() * torch.rsqrt(norm.running_var.double() + norm.eps)
    return gain, norm.bias.double() - norm.running_mean.double() * gain


class ReparameterisedBackbone(Backbone):
    """A chain of re-parameterisable blocks: one at stride 2, then four stages.

    Args:
        stem: Channels after the first block.
        widths: Channels of the four stages.
        depths: Blocks, that is 3x3 convolutions once folded, of the four stages; the first of each halves the map.
    """

    def __init__(self, stem: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        entry = RepBlock(3, stem, 2)
        stages, inputs = [], stem
        for width, depth in zip(widths, depths, strict=True):
            blocks = [RepBlock(inputs, width, 2)] + [RepBlock(width, width) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = width
        super().__init__(entry, stages, widths)
