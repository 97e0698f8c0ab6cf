"""Networks in the style of others, written with torch, exported the way others export theirs, and taken all the way.

Invariant: each finds coloured discs by fixed weights, so that its right answer is known beforehand, and none of it is
made with this project's own blocks or exporter.
"""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from edgepose.data.coco import dataset
from edgepose.estimator import PoseEstimator
from edgepose.importer.bundle import ImportRequest, import_model
from edgepose.importer.quantise import QuantiseRequest, quantise_bundle
from edgepose.importer.spec import parse_spec
from edgepose.profiler.accuracy import evaluate, oks_map
from edgepose.recipe import load_recipe
from edgepose.stages.cache import StageResult

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
            for parameter in (*self.smooth.parameters(), *self.pick.parameters()):
                parameter.zero_()
            assert self.smooth.bias is not None
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
        self.centres: Tensor
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


# ------------------------------------------------------------------------------------------------------- all the way


@dataclass(frozen=True, slots=True)
class Style:
    """A kind of network.

    Attributes:
        network: Makes it.
        spec: What its user would say of it.
        outputs: Names of its outputs.
        hw: Height and width of its input, and of the frames that it is shown.
        opset: Operator set of the claim.
    """

    network: Callable[[], nn.Module]
    spec: str
    outputs: tuple[str, ...]
    hw: tuple[int, int]
    opset: int


STYLES = {
    "heatmap": Style(HeatmapNet, HEATMAP_SPEC, ("output",), HW, 11),
    "simcc": Style(SimccNet, SIMCC_SPEC, ("px", "py"), HW, 9),
    "yolo-pose": Style(YoloPose, YOLO_SPEC, ("output",), FRAME_HW, 17),
}
"""Each of the three operator sets is that of one of them."""


def labelled_discs(folder: Path, split: str, style: str, count: int) -> Path:
    """Writes frames of discs with COCO annotations of them; the folder.

    Args:
        folder: Where SPLIT.json and images/ go.
        split: Name of the annotation file.
        style: Whose keypoints are labelled.
        count: How many frames.
    """
    height, width = STYLES[style].hw
    names = ["head", "feet"] if style == "yolo-pose" else ["red", "green", "blue"]
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, images, annotations = np.random.default_rng(len(split)), [], []
    for number in range(count):
        x, y = rng.uniform(14, width - 14), rng.uniform(14, height - 28)
        others = rng.uniform((12, 12), (width - 12, height - 12), (2, 2))
        places = np.array([[x, y], [x, y + 12]]) if style == "yolo-pose" else np.array([[x, y], *others])
        blue = (-50.0, -50.0) if style == "yolo-pose" else tuple(places[2])
        file = f"{split}{number}.png"
        cv2.imwrite(
            str(folder / "images" / file), disc_frame((height, width), tuple(places[0]), tuple(places[1]), blue)
        )
        box = [x - 12, y - 12, 24, 24] if style == "yolo-pose" else [0, 0, width, height]
        keypoints = [value for px, py in places.tolist() for value in (px, py, 2)]
        images.append({"id": number, "file_name": file, "height": height, "width": width})
        annotations.append(
            {"id": number, "image_id": number, "category_id": 1, "bbox": box, "keypoints": keypoints, "iscrowd": 0,
             "num_keypoints": len(names), "area": box[2] * box[3]}
        )  # fmt: skip
    category = {"id": 1, "name": "discs", "keypoints": names, "skeleton": [], "oks_sigmas": [0.05] * len(names)}
    document = {"images": images, "annotations": annotations, "categories": [category]}
    (folder / f"{split}.json").write_text(json.dumps(document))
    return folder


def taken_all_the_way(folder: Path, style: str) -> dict[str, float]:
    """Exports, imports, quantises, runs and evaluates a network of one style: OKS-AP at 0.5, as it came and in INT8.

    Args:
        folder: Empty folder for whatever is made on the way.
        style: One of `STYLES`.

    Raises:
        EdgeposeError: A step fails.
    """
    kind = STYLES[style]
    folder.mkdir(parents=True)
    model = export(kind.network(), folder / f"{style}.onnx", opset=kind.opset, hw=kind.hw, outputs=kind.outputs)
    data = labelled_discs(folder / "data", "val", style, 48)
    people, watch = dataset(data, "val"), _Nobody()
    request = ImportRequest(model, parse_spec(kind.spec), ("this-cpu",), folder / "float.bundle")
    bundles = {"float": import_model(request, watch).bundle}
    recipe = load_recipe("ptq-int8")
    bundles["int8"] = quantise_bundle(
        QuantiseRequest(bundles["float"].root, recipe, data / "images", folder / "int8.bundle"), watch
    ).bundle
    found = {}
    for name, bundle in bundles.items():
        with PoseEstimator.from_bundle(bundle.root, aim="none") as estimator:
            found[name] = oks_map(evaluate(estimator, people), people)["oks_ap_0.5"]
    return found


class _Nobody:
    def started(self, stage: str) -> None: ...
    def finished(self, stage: StageResult) -> None: ...
    def building(self, what: str, done: int, total: int) -> None: ...
