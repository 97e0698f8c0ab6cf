"""Architectures of the networks as data, and the specification that follows from them.

Invariant: importing this costs NumPy and msgspec only, so that a rerun can be recognised without loading torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgepose.spec import Decoder, Heatmap, Keypoints, ModelSpec, PositiveInt, Preprocess, SimCC, TensorSpec


class ORNConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Architecture of the occlusion-robust block.

    Attributes:
        width: Features of a keypoint token.
        layers: Attention layers.
    """

    width: PositiveInt = 128
    layers: PositiveInt = 2


class KPEConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Architecture of a KPE network.

    Attributes:
        name: Name of the network.
        input_hw: Height and width of the input, multiples of 32.
        stem: Channels after the first convolution.
        widths: Channels at strides 4, 8, 16 and 32.
        depths: Residual blocks at strides 4, 8, 16 and 32.
        neck: Channels of the merged map.
        stride: Stride of the merged map: 4, 8, 16 or 32.
        head: How keypoints are said: two 1-D classifications, heat maps, or coordinates.
        split_ratio: SimCC bins per input pixel.
        backbone: Kind of its blocks: plain residual, inverted residual, or re-parameterisable.
        refinements: Stages that see the first prediction and better it, one after the other.
        orn: The occlusion-robust block on top; None for none.
    """

    name: str
    input_hw: tuple[PositiveInt, PositiveInt]
    stem: PositiveInt
    widths: Annotated[tuple[PositiveInt, ...], msgspec.Meta(min_length=4, max_length=4)]
    depths: Annotated[tuple[PositiveInt, ...], msgspec.Meta(min_length=4, max_length=4)]
    neck: PositiveInt
    stride: Literal[4, 8, 16, 32] = 8
    head: Literal["simcc", "heatmap", "regression"] = "simcc"
    split_ratio: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    backbone: Literal["residual", "inverted", "reparameterised"] = "residual"
    refinements: Annotated[int, msgspec.Meta(ge=0)] = 0
    orn: ORNConfig | None = None


PRESETS: dict[str, KPEConfig] = {
    "kpe-t": KPEConfig("kpe-t", (160, 160), 16, (32, 64, 128, 192), (1, 2, 2, 2), 64),
    "kpe-s": KPEConfig("kpe-s", (160, 160), 32, (48, 96, 192, 256), (1, 2, 2, 2), 96),
    "kpe-t-inverted": KPEConfig(
        "kpe-t-inverted", (160, 160), 24, (32, 64, 128, 192), (2, 4, 5, 3), 64, backbone="inverted"
    ),
    "kpe-t-rep": KPEConfig(
        "kpe-t-rep", (160, 160), 16, (32, 64, 128, 192), (2, 4, 5, 4), 64, backbone="reparameterised"
    ),
}
"""Networks by name; the zoo holds trained weights for some of them. Those of one size class cost about the same."""


def spec_of(config: KPEConfig, keypoints: Keypoints) -> ModelSpec:
    """The specification that goes with `kpe.build(config, keypoints)`."""
    height, width = config.input_hw
    count = keypoints.count
    decoder: Decoder
    if config.head == "simcc":
        decoder = SimCC(split_ratio=config.split_ratio)
        outputs: tuple[TensorSpec, ...] = (
            TensorSpec(decoder.x, ("batch", count, round(width * config.split_ratio))),
            TensorSpec(decoder.y, ("batch", count, round(height * config.split_ratio))),
        )
    else:
        decoder = Heatmap(stride=float(config.stride))
        outputs = (TensorSpec(decoder.output, ("batch", count, height // config.stride, width // config.stride)),)
    return ModelSpec(
        name=config.name,
        keypoints=keypoints,
        preprocess=Preprocess(input_hw=config.input_hw),
        decoder=decoder,
        inputs=(TensorSpec("image", ("batch", 3, height, width)),),
        outputs=outputs,
    )
