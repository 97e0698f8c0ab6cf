"""Small random networks with the operators that pose networks use, and what exporting them gives."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from edgepose.blocks.orn import Mix, Normalise, Sum
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.quantise import QuantiseConfig, convert, prepare
from edgepose.compress.ranges import Ranges
from edgepose.export.onnx import onnx_from_torch
from edgepose.export.parity import ParityReport
from edgepose.spec import Heatmap, Keypoints, ModelSpec, Preprocess, SimCC, TensorSpec

SIDE = 32
KEYPOINTS = Keypoints(("a", "b", "c"))


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(c, c, 3), conv_bn(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.a(x))))


class InvertedResidual(nn.Module):
    """Linear bottleneck: the sum is not rectified."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.up, self.depth, self.down = (
            conv_bn(c, 2 * c, 1),
            conv_bn(2 * c, 2 * c, 3, groups=2 * c),
            conv_bn(2 * c, c, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu6(self.depth(F.relu6(self.up(x)))))


class Concat(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.a, self.b, self.c = conv_bn(c, c, 1), conv_bn(c, c, 3), conv_bn(2 * c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(torch.cat([F.relu(self.a(x)), self.b(x)], 1)))


class Pools(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.mix = conv_bn(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.mix(F.max_pool2d(x, 3, 1, 1) + F.avg_pool2d(x, 3, 1, 1)))


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.squeeze, self.excite = nn.Conv2d(c, c // 2, 1), nn.Conv2d(c // 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


class Pyramid(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.fine, self.coarse = conv_bn(c, c, 3, 2), conv_bn(c, c, 1), conv_bn(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fine(x) + F.interpolate(self.coarse(F.relu(self.down(x))), scale_factor=2.0, mode="nearest")


class Smooth(nn.Module):
    """Resizing that computes new values, unlike the nearest neighbours of the pyramid."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.down, self.after = conv_bn(c, c, 3, 2), conv_bn(c, c, 3)

    def forward(self, x: Tensor) -> Tensor:
        resized = F.interpolate(F.relu(self.down(x)), scale_factor=2.0, mode="bilinear", align_corners=False)
        return F.relu(self.after(resized))


class Separable(nn.Module):
    """A depthwise convolution that reads what a pool and a shortcut read, too."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.depth, self.point = conv_bn(c, c, 5, groups=c), conv_bn(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.point(F.relu(self.depth(x))) + F.max_pool2d(x, 3, 1, 1))


class Attention(nn.Module):
    """Every place of the map looks at every other, through the parts that the occlusion-robust block is made of."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.mix, self.sum = Normalise(), Mix(2), Sum()
        self.query, self.key, self.value, self.gate, self.out = (nn.Linear(c, c) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        seen = self.norm(tokens)
        mixed = self.mix(self.query(seen), self.key(seen), F.relu(self.value(seen)), F.relu(self.gate(seen)))
        return self.sum(tokens, self.out(mixed)).transpose(1, 2).reshape(x.shape)


BLOCKS: dict[str, type[nn.Module]] = {
    "residual": Residual, "inverted": InvertedResidual, "concat": Concat, "pools": Pools, "gate": Gate,
    "pyramid": Pyramid, "smooth": Smooth, "separable": Separable, "attention": Attention,
}  # fmt: skip


class Network(nn.Module):
    def __init__(self, blocks: tuple[str, ...], head: str, c: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, c, 3, 2), nn.ReLU(), conv_bn(c, c, 3, 2), nn.ReLU())
        # A ModuleList, because NNCF's names leave it out.
        self.blocks = nn.ModuleList(BLOCKS[name](c) for name in blocks)
        self.maps = nn.Conv2d(c, KEYPOINTS.count, 1)
        self.head = head
        if head == "simcc":
            self.x, self.y = nn.Linear((SIDE // 4) ** 2, 2 * SIDE), nn.Linear((SIDE // 4) ** 2, 2 * SIDE)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        maps = self.maps(x)
        if self.head == "heatmap":
            return (maps,)
        flat = maps.flatten(2)
        return self.x(flat), self.y(flat)


def network(blocks: tuple[str, ...], head: str = "simcc", seed: int = 0) -> Network:
    """Normalisation statistics as after training: neither zero nor one, some gains negative."""
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    made = Network(blocks, head)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0.0, 0.1)
            part.running_var.uniform_(0.2, 1.0)
            part.weight.data.uniform_(-0.5, 1.5)
            part.bias.data.normal_(0.0, 0.2)
    torch.random.set_rng_state(state)
    return made.eval()


def spec_of(head: str = "simcc") -> ModelSpec:
    k, bins = KEYPOINTS.count, 2 * SIDE
    simcc = (TensorSpec("simcc_x", ("batch", k, bins)), TensorSpec("simcc_y", ("batch", k, bins)))
    heatmap = (TensorSpec("heatmap", ("batch", k, SIDE // 4, SIDE // 4)),)
    return ModelSpec(
        name="test",
        keypoints=KEYPOINTS,
        preprocess=Preprocess(input_hw=(SIDE, SIDE)),
        decoder=SimCC() if head == "simcc" else Heatmap(),
        inputs=(TensorSpec("image", ("batch", 3, SIDE, SIDE)),),
        outputs=simcc if head == "simcc" else heatmap,
    )


def images(count: int, seed: int) -> np.ndarray:
    """Smooth, like photographs: (count, 3, SIDE, SIDE) float32."""
    coarse = np.random.default_rng(seed).standard_normal((count, 3, SIDE // 4, SIDE // 4)).astype(np.float32)
    tensor = F.interpolate(torch.from_numpy(coarse), size=(SIDE, SIDE), mode="bilinear")
    return tensor.numpy()


@dataclass(frozen=True)
class Exported:
    spec: ModelSpec
    fake_quantised: nn.Module
    float_module: nn.Module
    ranges: Ranges
    float_onnx: Path
    report: ParityReport


def export(folder: Path, blocks: tuple[str, ...], head: str, config: QuantiseConfig, seed: int = 0) -> Exported:
    fake_quantised = prepare(fold_batch_norms(network(blocks, head, seed)), [images(8, 1), images(8, 2)], config)
    float_module, ranges = convert(fake_quantised)
    path = folder / "float.onnx"
    report = onnx_from_torch(float_module, spec_of(head), path, ranges=ranges)
    return Exported(spec_of(head), fake_quantised, float_module, ranges, path, report)
