"""KPE, the keypoint-estimation block: a top-down neck and a keypoint head on the feature maps of any backbone.

Invariant: the block's outputs follow `ModelSpec.outputs`, and every convolution in it is pruned and quantised like the
backbone's own, except the keypoint outputs whose sizes the decoder fixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.backbones import build_backbone, conv_bn, initialise
from edgepose.blocks.config import KPEConfig
from edgepose.errors import SpecError
from edgepose.spec import Keypoints


class TopDownNeck(nn.Module):
    """Merge feature maps coarse to fine: 1x1 convolutions, nearest upsampling, addition (Lin et al., FPN, CVPR 2017).

    Args:
        channels: Channels of the maps to merge, finest first; each is half the size of the one before.
        width: Channels of the merged map.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(conv_bn(c, width, 1) for c in channels)
        self.smooth = conv_bn(width, width, 3)
        self.relu = nn.ReLU()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        maps = [lateral(f) for lateral, f in zip(self.lateral, features, strict=True)]
        merged = maps[-1]
        for finer in reversed(maps[:-1]):
            merged = finer + F.interpolate(merged, scale_factor=2.0, mode="nearest")
        out: Tensor = self.relu(self.smooth(merged))
        return out


class SimCCHead(nn.Module):
    """One map per keypoint, flattened and read by two linear layers shared over keypoints (Li et al., ECCV 2022)."""

    def __init__(self, channels: int, num_keypoints: int, map_hw: tuple[int, int], bins_hw: tuple[int, int]) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, num_keypoints, 1)
        self.x = nn.Linear(map_hw[0] * map_hw[1], bins_hw[1])
        self.y = nn.Linear(map_hw[0] * map_hw[1], bins_hw[0])
        self.map_hw = map_hw

    @torch.no_grad()
    def start_as_projection(self) -> None:
        """Start the linear layers as projections of the map onto its axes, interpolated to the bins.

        From there SimCC learns as fast as a heat map does; from random weights it first has to find out which cell of
        the flattened map lies where, which costs a small data set most of its epochs.
        """
        for axis, layer in enumerate((self.y, self.x)):
            cells, bins = self.map_hw[axis], layer.out_features
            step = bins / cells
            centres = (torch.arange(cells) + 0.5) * step - 0.5
            distance = (torch.arange(bins)[:, None] - centres[None, :]) / (0.6 * step)
            profile = _PROJECTION_GAIN * torch.exp(-0.5 * distance.square())
            shape = (bins, cells, 1) if axis == 0 else (bins, 1, cells)
            layer.weight.mul_(0.1).add_(profile.reshape(shape).expand(bins, *self.map_hw).reshape(bins, -1))
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        flat = self.maps(features).flatten(2)
        return self.x(flat), self.y(flat)


_PROJECTION_GAIN = 0.05  # of one map cell on the logits: more makes the first steps overshoot


class HeatmapHead(nn.Module):
    """One heat map per keypoint through a 3x3 and a 1x1 convolution."""

    def __init__(self, channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.hidden = conv_bn(channels, channels, 3)
        self.relu = nn.ReLU()
        self.maps = nn.Conv2d(channels, num_keypoints, 1)

    def start_near_zero(self) -> None:
        """Start with almost empty maps, as labels are: from large random ones most epochs go into emptying them."""
        nn.init.normal_(self.maps.weight, std=0.001)

    def forward(self, features: Tensor) -> tuple[Tensor]:
        return (self.maps(self.relu(self.hidden(features))),)


class KPEBlock(nn.Module):
    """Keypoint estimation on the feature maps of any backbone.

    Args:
        in_channels: Channels of the feature maps, finest first; each map is half the size of the one before.
        num_keypoints: Keypoints to predict.
        map_hw: Height and width of the finest map.
        bins_hw: SimCC bins in y and x; None gives heat maps at the finest map's resolution.
        width: Channels inside the block.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_keypoints: int,
        map_hw: tuple[int, int],
        *,
        bins_hw: tuple[int, int] | None,
        width: int = 64,
    ) -> None:
        super().__init__()
        self.neck = TopDownNeck(in_channels, width)
        self.head: nn.Module = (
            HeatmapHead(width, num_keypoints) if bins_hw is None else SimCCHead(width, num_keypoints, map_hw, bins_hw)
        )

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.head(self.neck(features))
        return outputs


class KPENet(nn.Module):
    """A backbone with a KPE block: (N, 3, h, w) float32 → SimCC logits x and y, or heat maps."""

    def __init__(self, config: KPEConfig, num_keypoints: int) -> None:
        super().__init__()
        self.first = (4, 8, 16, 32).index(config.stride)
        height, width = config.input_hw
        self.backbone = build_backbone(config)
        simcc = config.head == "simcc"
        self.block = KPEBlock(
            config.widths[self.first :],
            num_keypoints,
            (height // config.stride, width // config.stride),
            bins_hw=(round(height * config.split_ratio), round(width * config.split_ratio)) if simcc else None,
            width=config.neck,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.block(self.backbone(images)[self.first :])
        return outputs


def build(config: KPEConfig, keypoints: Keypoints, *, seed: int = 0) -> KPENet:
    """A freshly initialised network.

    Raises:
        SpecError: The input size is not a multiple of 32.
    """
    if any(side % 32 for side in config.input_hw):
        raise SpecError(f"{config.name}: input_hw", found=str(config.input_hw), expected="multiples of 32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = KPENet(config, keypoints.count)
        initialise(network)
        head = network.block.head
        if isinstance(head, SimCCHead):
            head.start_as_projection()
        elif isinstance(head, HeatmapHead):
            head.start_near_zero()
    return network
