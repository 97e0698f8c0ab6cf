"""Keypoint heads: what turns features into coordinates, and stages that better an earlier head's answer.

A head works in two steps. `draw` makes one map per keypoint out of features; `read` makes the decoder's outputs out of
the maps. Refinement stages and the occlusion-robust block stand between the two.

Invariant: `head(features)` is `head.read(head.draw(features))`; every operator with weights has integer kernels in all
backends, and the sizes of the outputs are those of `blocks.config.spec_of`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from edgepose.blocks.backbones import ResidualBlock, conv_bn


class Stage(NamedTuple):
    """What a network says at one of its stages.

    Attributes:
        outputs: Tensors in the order of `ModelSpec.outputs`; earlier stages have those of the decoder only.
        maps: (N, K, h, w) float, one map per keypoint, unbounded; None where a network cannot hand them out.
        clear: (N, 1, h, w) float, logits of nothing being in front, cell by cell; None where nobody says.
    """

    outputs: tuple[Tensor, ...]
    maps: Tensor | None
    clear: Tensor | None = None


class SimCCHead(nn.Module):
    """One map per keypoint, flattened and read by two linear layers shared over keypoints (Li et al., ECCV 2022).

    Args:
        channels: Channels of the features.
        num_keypoints: Keypoints to predict.
        map_hw: Height and width of the features.
        bins_hw: Bins in y and x.
    """

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

    def another(self) -> SimCCHead:
        """A head of the same sizes with weights of its own."""
        bins_hw = (self.y.out_features, self.x.out_features)
        return SimCCHead(self.maps.in_channels, self.maps.out_channels, self.map_hw, bins_hw)

    @torch.no_grad()
    def start_like(self, earlier: SimCCHead) -> None:
        """Read maps as an earlier stage does, and draw next to nothing on top of its maps."""
        self.x.load_state_dict(earlier.x.state_dict())
        self.y.load_state_dict(earlier.y.state_dict())
        _draw_little(self.maps)

    def draw(self, features: Tensor) -> Tensor:
        """(N, C, h, w) to (N, K, h, w)."""
        maps: Tensor = self.maps(features)
        return maps

    def read(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K, h, w) to logits (N, K, bins) of x and y."""
        flat = maps.flatten(2)
        return self.x(flat), self.y(flat)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.read(self.draw(features))


_PROJECTION_GAIN = 0.05  # of one map cell on the logits: more makes the first steps overshoot


class HeatmapHead(nn.Module):
    """One heat map per keypoint through a 3x3 and a 1x1 convolution.

    Args:
        channels: Channels of the features.
        num_keypoints: Keypoints to predict.
    """

    def __init__(self, channels: int, num_keypoints: int) -> None:
        super().__init__()
        self.hidden = conv_bn(channels, channels, 3)
        self.relu = nn.ReLU()
        self.maps = nn.Conv2d(channels, num_keypoints, 1)

    def start_near_zero(self) -> None:
        """Start with almost empty maps, as labels are: from large random ones most epochs go into emptying them."""
        nn.init.normal_(self.maps.weight, std=0.001)

    def another(self) -> HeatmapHead:
        """A head of the same sizes with weights of its own."""
        return HeatmapHead(self.maps.in_channels, self.maps.out_channels)

    def start_like(self, _earlier: HeatmapHead) -> None:
        """Draw next to nothing on top of an earlier stage's maps."""
        _draw_little(self.maps)

    def draw(self, features: Tensor) -> Tensor:
        """(N, C, h, w) to (N, K, h, w)."""
        maps: Tensor = self.maps(self.relu(self.hidden(features)))
        return maps

    def read(self, maps: Tensor) -> tuple[Tensor]:
        """The maps themselves."""
        return (maps,)

    def forward(self, features: Tensor) -> tuple[Tensor]:
        return self.read(self.draw(features))


class Centroid(nn.Module):
    """The mean place under a map's softmax (Sun et al., "Integral Human Pose Regression", ECCV 2018).

    A module of its own, without weights, so that it can be kept from quantisation.

    Args:
        map_hw: Height and width of the maps.
    """

    def __init__(self, map_hw: tuple[int, int]) -> None:
        super().__init__()
        height, width = map_hw
        self.map_hw = map_hw
        self.register_buffer("x", (torch.arange(width) + 0.5) / width, persistent=False)
        self.register_buffer("y", (torch.arange(height) + 0.5) / height, persistent=False)

    def forward(self, flat: Tensor) -> Tensor:
        """Maps (N, K, h·w) to shares (N, K, 2) of their width and height, float32 whatever autocast says."""
        share = flat.float().softmax(-1).unflatten(2, self.map_hw)
        return torch.stack([(share.sum(2) * self.x).sum(-1), (share.sum(3) * self.y).sum(-1)], -1)


class RegressionHead(nn.Module):
    """Coordinates and the scales of their errors, said outright: the centroid of one map per keypoint.

    The paper (RLE; Li et al., ICCV 2021) reads both off globally pooled features, which have lost the place and leave a
    small backbone to spell it out in channels. Tried on dots under noise (160 steps, two seeds), mean errors were 3.7
    and 5.5 px for a map's centroid, 6.0 and 10.1 px for pooled features, and 5.1 and 13.3 px for two linear layers on
    the flattened map. All that multiplies by weights is quantised as in the other heads. The scales are read by two
    linear layers off the same map.

    Args:
        channels: Channels of the features.
        num_keypoints: Keypoints to predict.
        map_hw: Height and width of the features.
    """

    def __init__(self, channels: int, num_keypoints: int, map_hw: tuple[int, int]) -> None:
        super().__init__()
        self.maps = nn.Conv2d(channels, num_keypoints, 1)
        self.centroid = Centroid(map_hw)
        self.hidden = nn.Linear(map_hw[0] * map_hw[1], _HIDDEN)
        self.relu = nn.ReLU()
        self.scales = nn.Linear(_HIDDEN, 2)

    def start_with_one_scale(self) -> None:
        """Start with nearly the same scale for all joints, about as large as the errors are."""
        nn.init.normal_(self.scales.weight, std=0.001)
        nn.init.constant_(self.scales.bias, math.log(_FIRST_SCALE / (1 - _FIRST_SCALE)))

    def draw(self, features: Tensor) -> Tensor:
        """(N, C, h, w) to (N, K, h, w)."""
        maps: Tensor = self.maps(features)
        return maps

    def read(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K, h, w) to shares (N, K, 2) of the input's width and height, and the scales of their errors, 0..1."""
        flat = maps.flatten(2)
        return self.centroid(flat), torch.sigmoid(self.scales(self.relu(self.hidden(flat))))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return self.read(self.draw(features))


_HIDDEN = 64
_FIRST_SCALE = 0.15  # of the input's side


MapHead = SimCCHead | HeatmapHead
"""Heads whose maps can be bettered stage by stage."""

Head = SimCCHead | HeatmapHead | RegressionHead


class Refinement(nn.Module):
    """A later stage: sees features and the maps so far, and draws what is to be changed on the maps.

    The maps are mixed by a 1x1 convolution, normalised and clipped to 0..6, so that neither training nor 8-bit ranges
    depend on how far they have grown (Wei et al., Convolutional Pose Machines, CVPR 2016; Newell et al., ECCV 2016).
    Only `head.draw` runs at inference in all stages but the last.

    Args:
        first: The first stage's head; the stage gets one of its own that is like it.
    """

    def __init__(self, first: MapHead) -> None:
        super().__init__()
        channels, num_keypoints = first.maps.in_channels, first.maps.out_channels
        self.mix = conv_bn(num_keypoints, num_keypoints, 1)
        self.clip = nn.ReLU6()
        self.block = ResidualBlock(channels + num_keypoints, channels)
        self.head = first.another()

    def start_as_identity(self, earlier: MapHead) -> None:
        """Begin very close to what the stage before says, read by `earlier`."""
        self.head.start_like(earlier)  # type: ignore[arg-type]  # both heads are of one kind

    def forward(self, features: Tensor, maps: Tensor) -> Tensor:
        """Features (N, C, h, w) and maps (N, K, h, w) to better maps (N, K, h, w)."""
        seen = self.block(torch.cat([features, self.clip(self.mix(maps))], 1))
        return maps + self.head.draw(seen)


def _draw_little(maps: nn.Conv2d) -> None:
    # Not zero: at zero the layers before would learn nothing in the first step.
    nn.init.normal_(maps.weight, std=0.001)
    nn.init.zeros_(cast("nn.Parameter", maps.bias))
