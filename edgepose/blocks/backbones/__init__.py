"""Feature extractors of three kinds, and how they start.

Invariant: `forward` of every kind returns maps at strides 4, 8, 16 and 32 of the input, finest first, with `channels`
channels; every operator in it has integer kernels in all backends.
"""

from __future__ import annotations

from typing import assert_never

from torch import nn

from edgepose.blocks.backbones.inverted import InvertedBackbone, InvertedResidual
from edgepose.blocks.backbones.reparameterised import ReparameterisedBackbone, RepBlock
from edgepose.blocks.backbones.residual import ResidualBackbone, ResidualBlock
from edgepose.blocks.backbones.staged import Backbone, conv_bn
from edgepose.blocks.config import KPEConfig

__all__ = [
    "Backbone",
    "InvertedBackbone",
    "InvertedResidual",
    "RepBlock",
    "ReparameterisedBackbone",
    "ResidualBackbone",
    "ResidualBlock",
    "build_backbone",
    "conv_bn",
    "initialise",
]


def build_backbone(config: KPEConfig) -> Backbone:
    """The backbone that a configuration names; `initialise` it, or load weights."""
    match config.backbone:
        case "residual":
            return ResidualBackbone(config.stem, config.widths, config.depths)
        case "inverted":
            return InvertedBackbone(config.stem, config.widths, config.depths)
        case "reparameterised":
            return ReparameterisedBackbone(config.stem, config.widths, config.depths)
        case _:
            assert_never(config.backbone)


def initialise(module: nn.Module) -> None:
    """Kaiming initialisation for convolutions; the last normalisation of a residual branch starts small."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.groups > 1:  # torch counts the outputs of all groups, although each reads its own inputs only
                part.weight.data.mul_(part.groups**0.5)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for part in module.modules():
        if isinstance(part, ResidualBlock):
            _start_small(part.conv2)
        elif isinstance(part, InvertedResidual) and part.adds:
            _start_small(part.project)


def _start_small(branch: nn.Sequential) -> None:
    nn.init.constant_(branch.get_parameter("1.weight"), 0.2)
