"""The layers that pruning can resize, and their channels.

Invariant: a layer has two sides, input and output channels; where they are one (batch normalisation, depthwise
convolution) both counts are the same.
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

Kind = Literal["conv", "linear", "batch_norm"]


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind of a layer that pruning can resize, None for any other."""
    if isinstance(layer, _ConvTransposeNd):
        return None
    if isinstance(layer, _ConvNd):
        return "conv"
    if isinstance(layer, nn.Linear):
        return "linear"
    return "batch_norm" if isinstance(layer, _BatchNorm) else None


def is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, _ConvNd) and 1 < layer.groups == layer.in_channels == layer.out_channels


def widths(layer: nn.Module) -> tuple[int, int]:
    """Input and output channels of a layer that `kind_of` knows."""
    if isinstance(layer, _ConvNd):
        return layer.in_channels, layer.out_channels
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, _BatchNorm):
        return layer.num_features, layer.num_features
    raise TypeError(f"{type(layer).__name__} has no channels that pruning knows of")
