"""Networks in the style of others, written with torch, and exported the way others export theirs.

Invariant: each finds coloured discs by fixed weights, so that its right answer is known beforehand, and none of it is
made with this project's own blocks or exporter.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HW = (64, 48)
FRAME_HW = (64, 96)


class Discs(nn.Module):
    """How red, green and blue each place is, from ImageNet-normalised RGB: (N, 3, h, w) to (N, 3, h/4, w/4), 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.smooth = nn.Conv2d(3, 6, 4, stride=4)
        self.norm = nn.BatchNorm2d(6)
        self.pick = nn.Conv2d(6, 3, 1)
        with torch.no_grad():
            self.smooth.weight.zero_()
            self.smooth.bias.zero_()
            self.pick.weight.zero_()
            self.pick.bias.zero_()
            for channel in range(3):
                for sign in (0, 1):  # twice, so that there are channels that could go
                    self.smooth.weight[channel + 3 * sign, channel] = STD[channel] / 16
                    self.smooth.bias[channel + 3 * sign] = MEAN[channel]
                    self.pick.weight[channel, channel + 3 * sign] = 0.5

    def forward(self, images: Tensor) -> Tensor:
        """Means of 4 x 4 pixels."""
        found: Tensor = torch.relu(self.pick(torch.relu(self.norm(self.smooth(images)))))
        return found


class HeatmapNet(nn.Module):
    """Heat maps at half the input's size, upsampled bilinearly from a quarter."""

    def __init__(self) -> None:
        super().__init__()
        self.discs = Discs()

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = nn.functional.interpolate(self.discs(images), scale_factor=2.0, mode="bilinear")
        return maps


class SimccNet(nn.Module):
    """Logits of x and y, two bins per pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.discs = Discs()
        height, width = HW
        self.x, self.y = nn.Linear(width // 4, width * 2, bias=False), nn.Linear(height // 4, height * 2, bias=False)
        with torch.no_grad():
            for linear, cells in ((self.x, width // 4), (self.y, height // 4)):
                bins = torch.arange(8 * cells) / 2
                centres = torch.arange(cells) * 4 + 1.5
                linear.weight.copy_(torch.clamp(1 - (bins[:, None] - centres).abs() / 4, min=0))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = self.discs(images)
        return 12 * self.x(maps.sum(2)), 12 * self.y(maps.sum(3))


class YoloPose(nn.Module):
    """Each cell is a candidate: (N, 4 + 1 + 3 K, A), cx cy w h score, then x y score of each keypoint, K = 2.

    A person is a red disc with a green one 12 pixels below; the box has its centre on the red one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.discs = Discs()
        height, width = FRAME_HW
        y, x = torch.meshgrid(torch.arange(height // 4), torch.arange(width // 4), indexing="ij")
        self.register_buffer("centres", torch.stack([x, y]).float().flatten(1)[None] * 4 + 2)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.discs(images).flatten(2)
        red, green = maps[:, :1], maps[:, 1:2]
        centres = self.centres.expand(images.shape[0], -1, -1)
        size = torch.full_like(centres, 24.0)
        below = centres + torch.tensor([0.0, 12.0]).reshape(1, 2, 1)
        whole: Tensor = torch.cat([centres, size, red, centres, red, below, red * 0 + green.amax(2, keepdim=True)], 1)
        return whole


def export(
    network: nn.Module,
    path: Path,
    *,
    opset: int,
    hw: tuple[int, int] = HW,
    outputs: tuple[str, ...] = ("output",),
    batch: int = 0,
    listed: bool = False,
    folded: bool = True,
) -> Path:
    """Exports with torch's older exporter, as most networks in the wild were.

    Args:
        network: (N, 3, h, w) float32 in.
        path: Where the file goes.
        opset: Operator set.
        hw: Height and width of the input.
        outputs: Names.
        batch: Fixed batch; 0 leaves it free.
        listed: Whether initialisers are listed as inputs.
        folded: Whether batch normalisation is folded into convolutions.
    """
    free = {name: {0: "n"} for name in ("input", *outputs)}
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(),
            (torch.zeros(batch or 1, 3, *hw),),
            str(path),
            opset_version=opset,
            input_names=["input"],
            output_names=list(outputs),
            dynamic_axes=None if batch else free,
            keep_initializers_as_inputs=listed,
            training=torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE,
            dynamo=False,
        )
    return path


def disc_frame(
    hw: tuple[int, int], red_xy: tuple[float, float], green_xy: tuple[float, float], blue_xy: tuple[float, float]
) -> np.ndarray:
    """A (H, W, 3) uint8 BGR frame, black with three soft discs; centres in pixels."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    frame = np.zeros((*hw, 3), np.uint8)
    for channel, (cx, cy) in ((2, red_xy), (1, green_xy), (0, blue_xy)):
        frame[..., channel] = np.round(250 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 5.0**2)))
    return frame


COLOURS = """
name: {name}
keypoints: {{names: [red, green, blue], sigmas: [0.05, 0.05, 0.05]}}
input: {{color: rgb, pixels: 0..1, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], padding: 1.0}}
output: {output}
"""
HEATMAP_SPEC = COLOURS.format(name="heat", output="{kind: heatmap, alignment: tiled}")
SIMCC_SPEC = COLOURS.format(name="simcc", output="{kind: simcc, x: px, y: py}")
YOLO_SPEC = """
name: yolo
keypoints: {names: [head, feet], sigmas: [0.05, 0.05]}
input: {color: rgb, pixels: 0..1, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], border: 114}
output:
  kind: one-stage
  outputs: {output: [box, score, keypoints]}
  box: cxcywh
  candidates: columns
  min_score: 0.6
  max_iou: 0.3
"""


class Everything(nn.Module):
    """What backbones are made of, weights at random: residual sums, depthwise, SiLU, gates, concatenation, BN apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.point = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 16, 1)
        self.down, self.down_bn = nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32)
        self.gate, self.up = nn.Conv2d(32, 32, 1), nn.ConvTranspose2d(32, 16, 2, 2)
        self.mix, self.head = nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 3, 1)
        for norm in (self.bn, self.down_bn):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.bn(self.stem(images)))
        inner = nn.functional.silu(self.depth(first))
        first = torch.relu(first + self.point(inner))
        low = torch.relu(self.down_bn(self.down(nn.functional.max_pool2d(first, 3, 1, 1))))
        low = low * torch.sigmoid(self.gate(low.mean((2, 3), keepdim=True)))
        whole: Tensor = self.head(torch.relu(self.mix(torch.cat([first, self.up(low)], 1))))
        return torch.sigmoid(whole)
