"""KPE, the keypoint-estimation block: a top-down neck and a keypoint head on the feature maps of any backbone.

Invariant: the block's outputs follow `ModelSpec.outputs`, and every convolution in it is pruned and quantised like the
backbone's own, except the keypoint outputs whose sizes the decoder fixes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.backbones import build_backbone, conv_bn, initialise
from edgepose.blocks.config import KPEConfig, ORNConfig
from edgepose.blocks.heads import Head, HeatmapHead, MapHead, Refinement, RegressionHead, SimCCHead, Stage
from edgepose.blocks.orn import ORN, Sizes
from edgepose.errors import SpecError
from edgepose.spec import Keypoints

__all__ = ["HeadKind", "KPEBlock", "KPENet", "SimCCHead", "TopDownNeck", "build"]


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


HeadKind = Literal["simcc", "heatmap", "regression"]


class KPEBlock(nn.Module):
    """Keypoint estimation on the feature maps of any backbone: people, animals, objects.

        block = KPEBlock((64, 128, 256), num_keypoints=9, map_hw=(28, 28), bins_hw=(448, 448))
        block.make_refined(1)  # if you like
        initialise(block); block.start()  # before training from scratch
        x, y = block([at_stride_8, at_stride_16, at_stride_32])  # (N, 9, 448) each: decode with SimCC(split_ratio=2)

    Args:
        in_channels: Channels of the feature maps, finest first; each map is half the size of the one before.
        num_keypoints: Keypoints to predict, K.
        map_hw: Height and width (h, w) of the finest map.
        bins_hw: SimCC bins in y and x; None for any other head.
        width: Channels inside the block.
        head: "simcc": logits (N, K, bins) of x and y. "heatmap": maps (N, K, h, w). "regression": shares (N, K, 2) of
            the input's width and height, and the scales of their errors. None: SimCC with `bins_hw`, else heat maps.

    Raises:
        SpecError: Bins for a head that has none, or none for SimCC.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        num_keypoints: int,
        map_hw: tuple[int, int],
        *,
        bins_hw: tuple[int, int] | None,
        width: int = 64,
        head: HeadKind | None = None,
    ) -> None:
        super().__init__()
        kind = head or ("heatmap" if bins_hw is None else "simcc")
        if (kind == "simcc") != (bins_hw is not None):
            raise SpecError("KPEBlock: bins_hw", found=f"{bins_hw} for a {kind} head", expected="bins for simcc only")
        self.neck = TopDownNeck(in_channels, width)
        self.head = _head(kind, width, num_keypoints, map_hw, bins_hw)
        self.refinements = nn.ModuleList()
        self.orn: ORN | None = None
        levels = len(in_channels) - 1
        self._around = Sizes(
            keypoints=num_keypoints,
            channels=(width, in_channels[-1]),
            map_hw=map_hw,
            coarse_hw=(map_hw[0] >> levels, map_hw[1] >> levels),
            outputs=((bins_hw[1],), (bins_hw[0],)) if bins_hw is not None else (map_hw,),
        )

    def make_refined(self, stages: int) -> None:
        """Put stages behind the head, each of which sees the maps of the one before and betters them.

        Raises:
            SpecError: The head says coordinates outright.
        """
        if isinstance(self.head, RegressionHead) and stages:
            raise SpecError(
                "refinements",
                found=f"{stages} with a regression head",
                expected="0: later stages better maps, and coordinates have none to hand on",
                fix="choose the simcc or heatmap head, or no refinements",
            )
        self.refinements.extend(Refinement(cast("MapHead", self.head)) for _ in range(stages))

    def make_robust(self, config: ORNConfig) -> None:
        """Put an occlusion-robust block on top: corrected outputs, then visibility and expected errors, (N, K) each.

        Raises:
            SpecError: The head says coordinates outright: nothing there can be corrected by adding to it; or its bins
                fall between the cells of the map.
        """
        if isinstance(self.head, RegressionHead):
            raise SpecError(
                "orn", found="a regression head", expected="a simcc or heatmap head", fix="choose one of these"
            )
        columns = self._around.map_hw[1], self._around.map_hw[0]
        for shape, cells in zip(self._around.outputs, columns, strict=False):
            if len(shape) == 1 and shape[0] % cells:
                raise SpecError(
                    "orn",
                    found=f"{shape[0]} bins over {cells} cells",
                    expected="as many bins in every cell of the map",
                    fix="choose a split ratio that makes stride times ratio a whole number",
                )
        self.orn = ORN(config, self._around)

    def start(self) -> None:
        """Give heads and stages the weights that training starts from; call it after `backbones.initialise`."""
        match self.head:
            case SimCCHead():
                self.head.start_as_projection()
            case HeatmapHead():
                self.head.start_near_zero()
            case RegressionHead():
                self.head.start_with_one_scale()
        earlier = cast("MapHead", self.head)
        for stage in self._stages():
            stage.start_as_identity(earlier)
            earlier = stage.head
        if self.orn is not None:
            self.orn.start_silent()

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Feature maps (N, C, h, w), finest first, to the last stage's outputs."""
        merged = self.neck(features)
        if not self.refinements and self.orn is None:
            outputs: tuple[Tensor, ...] = self.head(merged)
            return outputs
        head: Head = self.head
        maps = head.draw(merged)
        for stage in self._stages():
            head, maps = stage.head, stage(merged, maps)
        return head.read(maps) if self.orn is None else self.orn((merged, features[-1]), maps, head.read(maps))

    def stages(self, features: Sequence[Tensor]) -> list[Stage]:
        """What every stage says, for supervision of all of them; the last one's outputs are those of `forward`."""
        merged = self.neck(features)
        maps = self.head.draw(merged)
        said = [Stage(self.head.read(maps), maps)]
        for stage in self._stages():
            maps = stage(merged, maps)
            said.append(Stage(stage.head.read(maps), maps))
        if self.orn is not None:
            outputs, clear = self.orn.look((merged, features[-1]), maps, said[-1].outputs)
            said.append(Stage(outputs, maps, clear))
        return said

    def _stages(self) -> Iterator[Refinement]:
        for stage in self.refinements:
            yield cast("Refinement", stage)


def _head(
    kind: HeadKind, width: int, num_keypoints: int, map_hw: tuple[int, int], bins_hw: tuple[int, int] | None
) -> Head:
    match kind:
        case "simcc":
            assert bins_hw is not None  # the block has made sure
            return SimCCHead(width, num_keypoints, map_hw, bins_hw)
        case "heatmap":
            return HeatmapHead(width, num_keypoints)
        case "regression":
            return RegressionHead(width, num_keypoints, map_hw)


class KPENet(nn.Module):
    """A backbone with a KPE block: (N, 3, h, w) float32 → the tensors of `ModelSpec.outputs`.

    Attributes:
        refinements: Stages behind the first.
    """

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
            head=config.head,
        )
        self.refinements = config.refinements
        self.block.make_refined(config.refinements)
        if config.orn is not None:
            self.block.make_robust(config.orn)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.block(self.backbone(images)[self.first :])
        return outputs

    def stages(self, images: Tensor) -> list[Stage]:
        """What every stage says, first to last, for training; the last one's outputs are those of `forward`.

        A fake-quantised copy has its quantisers in `forward` only, so it answers with the last stage, without maps.
        """
        if "forward" in vars(self):  # replaced on the instance, as NNCF does
            return [Stage(self(images), None)]
        return self.block.stages(self.backbone(images)[self.first :])


def build(config: KPEConfig, keypoints: Keypoints, *, seed: int = 0) -> KPENet:
    """A freshly initialised network.

    Raises:
        SpecError: The input size is not a multiple of 32, or the head can neither be refined nor corrected.
    """
    if any(side % 32 for side in config.input_hw):
        raise SpecError(f"{config.name}: input_hw", found=str(config.input_hw), expected="multiples of 32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = KPENet(config, keypoints.count)
        initialise(network)
        network.block.start()
    return network
