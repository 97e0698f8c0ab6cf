"""Architectures of the networks as data, and the specification that follows from them.

Invariant: importing this costs NumPy and msgspec only, so that a rerun can be recognised without loading torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, assert_never

import msgspec

from edgepose.spec import (
    Decoder,
    Heatmap,
    Keypoints,
    ModelSpec,
    PositiveInt,
    Preprocess,
    Regression,
    SimCC,
    TensorSpec,
)


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


class LossConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How a keypoint network's errors are weighed; `losses.make_loss` turns it into a loss.

    Attributes:
        kind: "default": cross-entropy for SimCC, squared error for heat maps, residual log-likelihood for coordinates.
            "mse": squared error of probabilities, maps or coordinates. "kl": Kullback-Leibler divergence from the
            labels, for SimCC and heat maps. "wing": the wing loss of the coordinates; where these are read out of bins
            or maps, beside the default loss.
        ohkm: Only so many joints of each person count, those with the largest losses; 0 counts all.
        hidden_weight: Weight of joints that are known to be hidden, against 1 of all others.
        spatial: Weight of an auxiliary cross-entropy over the cells of SimCC's keypoint maps, which binds x and y.
        wing_px: Errors above this are counted linearly, input pixels.
        wing_curve_px: Curvature of the logarithm below: the smaller, the more small errors count; input pixels.
    """

    kind: Literal["default", "mse", "kl", "wing"] = "default"
    ohkm: Annotated[int, msgspec.Meta(ge=0)] = 0
    hidden_weight: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    spatial: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    wing_px: Annotated[float, msgspec.Meta(gt=0)] = 10.0
    wing_curve_px: Annotated[float, msgspec.Meta(gt=0)] = 2.0


PRESETS: dict[str, KPEConfig] = {
    "kpe-t": KPEConfig("kpe-t", (160, 160), 16, (32, 64, 128, 192), (1, 2, 2, 2), 64),
    "kpe-s": KPEConfig("kpe-s", (160, 160), 32, (48, 96, 160, 192), (1, 3, 3, 1), 96),
    "kpe-m": KPEConfig("kpe-m", (192, 192), 32, (48, 96, 160, 192), (2, 4, 5, 1), 96),
    "kpe-t-inverted": KPEConfig(
        "kpe-t-inverted", (160, 160), 24, (32, 64, 128, 192), (2, 4, 5, 3), 64, backbone="inverted"
    ),
    "kpe-t-rep": KPEConfig(
        "kpe-t-rep", (160, 160), 16, (32, 64, 128, 192), (2, 4, 5, 4), 64, backbone="reparameterised"
    ),
    "orn-s": KPEConfig("orn-s", (160, 160), 32, (48, 96, 160, 192), (1, 3, 3, 1), 96, orn=ORNConfig(192)),
}
"""Networks by name; the zoo holds trained weights for some of them. Those of one size class cost about the same."""


def spec_of(config: KPEConfig, keypoints: Keypoints) -> ModelSpec:
    """The specification that goes with `kpe.build(config, keypoints)`."""
    height, width = config.input_hw
    decoder, outputs = _decoding(config, keypoints.count)
    robust = config.orn is not None
    if robust:
        outputs += tuple(TensorSpec(name, ("batch", keypoints.count)) for name in (_VISIBILITY, _LOG_ERROR))
    return ModelSpec(
        name=config.name,
        keypoints=keypoints,
        preprocess=Preprocess(input_hw=config.input_hw),
        decoder=decoder,
        inputs=(TensorSpec("image", ("batch", 3, height, width)),),
        outputs=outputs,
        visibility=_VISIBILITY if robust else "",
        uncertainty=_LOG_ERROR if robust else "",
    )


_VISIBILITY, _LOG_ERROR = "visibility", "log_error"


def _decoding(config: KPEConfig, count: int) -> tuple[Decoder, tuple[TensorSpec, ...]]:
    """How the head's outputs are read, and what they look like."""
    height, width = config.input_hw
    match config.head:
        case "simcc":
            simcc = SimCC(split_ratio=config.split_ratio)
            return simcc, (
                TensorSpec(simcc.x, ("batch", count, round(width * config.split_ratio))),
                TensorSpec(simcc.y, ("batch", count, round(height * config.split_ratio))),
            )
        case "heatmap":
            heatmap = Heatmap(stride=float(config.stride))
            cells = (height // config.stride, width // config.stride)
            return heatmap, (TensorSpec(heatmap.output, ("batch", count, *cells)),)
        case "regression":
            regression = Regression(config.input_hw)
            names = (regression.keypoints, regression.scales)
            return regression, tuple(TensorSpec(name, ("batch", count, 2)) for name in names)
        case _:
            assert_never(config.head)
