"""The plain residual backbone.

Invariant: everything is a 3x3 or 1x1 convolution, an addition or a ReLU; parameter names never change, the zoo's
checkpoints go by them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from edgepose.blocks.backbones.staged import Backbone, conv_bn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al., CVPR 2016, basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2 = conv_bn(outputs, outputs, 3)
        self.shortcut = nn.Identity() if stride == 1 and inputs == outputs else conv_bn(inputs, outputs, 1, stride)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.relu2(self.conv2(self.relu1(self.conv1(x))) + self.shortcut(x))
        return out


class ResidualBackbone(Backbone):
    """Plain residual network: a two-convolution stem at stride 4, then four stages of residual blocks.

    Args:
        stem: Channels after the first convolution.
        widths: Channels of the four stages.
        depths: Residual blocks of the four stages.
    """

    def __init__(self, stem: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        entry = nn.Sequential(conv_bn(3, stem, 3, 2), nn.ReLU(), conv_bn(stem, widths[0], 3, 2), nn.ReLU())
        stages, inputs = [], widths[0]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [ResidualBlock(inputs, width, 1 if i == 0 else 2)]
            blocks += [ResidualBlock(width, width) for _ in range(depth - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = width
        super().__init__(entry, stages, widths)
