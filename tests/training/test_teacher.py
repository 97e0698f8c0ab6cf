"""The teacher's flip test."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgepose.blocks.config import ORNConfig, spec_of
from edgepose.errors import SpecError
from edgepose.pose.flip import merge_flipped, mirror_order
from edgepose.spec import Keypoints
from edgepose.training.teacher import merged_with_mirrored
from tests.training.dots import KEYPOINTS, NETWORK

ROBUST = spec_of(msgspec.structs.replace(NETWORK, orn=ORNConfig(16, 1)), KEYPOINTS)
SHAPES = ((4, 128), (4, 128), (4,), (4,))


class Columns(nn.Module):
    """A teacher whose every output is a fixed mixture of the image's columns."""

    def __init__(self, count: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(64, int(np.prod(shape))) for shape in SHAPES[:count])

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        columns = images.mean((1, 2))
        return tuple(part(columns).reshape(-1, *shape) for part, shape in zip(self.parts, SHAPES, strict=False))


def asked(count: int) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    teacher, images = Columns(count), torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = teacher(images)
        return images, plain, merged_with_mirrored(teacher, ROBUST, images, plain)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_it_is_the_flip_test_of_all_that_the_teacher_says(count: int) -> None:
    images, plain, merged = asked(count)
    with torch.no_grad():
        mirrored = Columns(count)(torch.from_numpy(images.numpy()[..., ::-1].copy()))
    names = [output.name for output in ROBUST.outputs[:count]]
    said = msgspec.structs.replace(
        ROBUST, visibility=ROBUST.visibility * (count > 2), uncertainty=ROBUST.uncertainty * (count > 3)
    )
    first, other = ({n: o.numpy() for n, o in zip(names, part, strict=True)} for part in (plain, mirrored))
    expected = merge_flipped(first, other, said)
    assert len(merged) == count
    for name, found, one in zip(names, merged, plain, strict=True):
        np.testing.assert_allclose(found.numpy(), expected[name], rtol=1e-6)
        assert not torch.equal(found, one)


def test_a_teacher_of_mirror_symmetry_is_taken_at_its_word() -> None:
    order = torch.from_numpy(mirror_order(KEYPOINTS))

    class Symmetric(nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            left, right = images[..., :32].mean((1, 2, 3)), images[..., 32:].mean((1, 2, 3))
            side = torch.stack([left, right], 1)[:, [0, 1, 0, 1]]
            return torch.zeros(len(images), 4, 128), side[..., None].expand(-1, -1, 128)

    images = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain = Symmetric()(images)
    assert order.tolist() == [1, 0, 3, 2]
    assert torch.allclose(merged_with_mirrored(Symmetric(), ROBUST, images, plain)[1], plain[1], atol=1e-7)


def test_outputs_that_nobody_can_mirror_stay() -> None:
    extra = msgspec.structs.replace(ROBUST, visibility="", uncertainty="")
    teacher, images = Columns(3), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = teacher(images)
        assert merged_with_mirrored(teacher, extra, images, plain)[2] is plain[2]


def test_sides_without_pairs_are_an_error() -> None:
    names = ("left_eye", "right_eye", "left_ear", "right_ear")
    unpaired = msgspec.structs.replace(ROBUST, keypoints=Keypoints(names))
    teacher, images = Columns(2), torch.randn(2, 3, 64, 64)
    with torch.no_grad(), pytest.raises(SpecError, match="flip_pairs"):
        merged_with_mirrored(teacher, unpaired, images, teacher(images))
