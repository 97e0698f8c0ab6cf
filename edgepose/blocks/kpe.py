"""KPE, the keypoint-estimation block: a top-down neck and a keypoint head on the feature maps of any backbone.

Invariant: the block's outputs follow `ModelSpec.outputs`, and every convolution in it is pruned and quantised like the
backbone's own, except the keypoint outputs whose sizes the decoder fixes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.backbones import ResidualBackbone, conv_bn, initialise
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

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        flat = self.maps(features).flatten(2)
        return self.x(flat), self.y(flat)


class HeatmapHead(nn.Module):
    """One heat map per keypoint through a 3x3 and a 1x1 convolution."""

    def __init__(self, channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.hidden = conv_bn(channels, channels, 3)
        self.relu = nn.ReLU()
        self.maps = nn.Conv2d(channels, num_keypoints, 1)

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
        self.backbone = ResidualBackbone(config.stem, config.widths, config.depths)
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
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    network = KPENet(config, keypoints.count)
    initialise(network)
    torch.random.set_rng_state(state)
    return network
