"""What all backbones share: a stem, four stages, and convolutions with batch normalisation.

Invariant: `Backbone.forward` returns one feature map per stage, finest first, with `channels` channels each.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution with batch normalisation, "same" padding and no bias."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Backbone(nn.Module):
    """A stem and stages that run one after the other.

    Args:
        stem: From the image to what the first stage reads.
        stages: Each halves the map, except the first of a stem that is at stride 4 already.
        channels: Channels of the stages' maps.
    """

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module], channels: Sequence[int]) -> None:
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.stem(images)
        features: list[Tensor] = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features
