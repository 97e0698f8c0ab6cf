"""The inverted-residual backbone: depthwise convolutions between pointwise ones.

Invariant: what a depthwise convolution reads and writes lies within 0..6, so that one scale for all its channels costs
few of the 256 codes; what the bottlenecks add up is never rectified.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from edgepose.blocks.backbones.staged import Backbone, conv_bn


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project linearly (Sandler et al., MobileNetV2, CVPR 2018).

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: Of the depthwise convolution.
        expansion: Channels in between, as a multiple of `inputs`.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expansion: int = 4) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = conv_bn(inputs, hidden, 1)
        self.relu1 = nn.ReLU6()
        self.depthwise = conv_bn(hidden, hidden, 3, stride, groups=hidden)
        self.relu2 = nn.ReLU6()
        self.project = conv_bn(hidden, outputs, 1)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.relu2(self.depthwise(self.relu1(self.expand(x)))))
        return x + out if self.adds else out


class InvertedBackbone(Backbone):
    """One convolution at stride 2, then four stages of inverted residuals.

    Args:
        stem: Channels after the first convolution.
        widths: Channels of the four stages.
        depths: Inverted residuals of the four stages; the first of each halves the map.
        expansion: Channels inside a block, as a multiple of those that it reads.
    """

    def __init__(self, stem: int, widths: Sequence[int], depths: Sequence[int], expansion: int = 4) -> None:
        entry = nn.Sequential(conv_bn(3, stem, 3, 2), nn.ReLU6())
        stages, inputs = [], stem
        for width, depth in zip(widths, depths, strict=True):
            blocks = [InvertedResidual(inputs, width, 2, expansion)]
            blocks += [InvertedResidual(width, width, 1, expansion) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = width
        super().__init__(entry, stages, widths)
