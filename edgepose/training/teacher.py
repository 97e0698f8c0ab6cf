"""The teacher's flip test: what it says of people and of their mirror images, as one answer.

Invariant: a teacher that answers mirror images with mirrored answers is taken at its word.
"""

from __future__ import annotations

import msgspec
import torch
from torch import Tensor, nn

from edgepose.pose.flip import merge_flipped
from edgepose.spec import ModelSpec


def merged_with_mirrored(
    teacher: nn.Module, spec: ModelSpec, images: Tensor, outputs: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The mean of what a teacher says of images and of their mirror images, as `pose.flip` has it.

    Args:
        teacher: The network.
        spec: The student's specification.
        images: (N, 3, h, w) float32, what `outputs` were said of.
        outputs: The teacher's outputs, in the order of the specification; it may lack the last ones.

    Returns:
        As many outputs, those of keypoints, visibility and uncertainty float32; others are as they were.

    Raises:
        SpecError: Nobody knows which keypoints swap places in a mirror image.
    """
    names = [output.name for output in spec.outputs[: len(outputs)]]
    said = msgspec.structs.replace(
        spec,
        visibility=spec.visibility if spec.visibility in names else "",
        uncertainty=spec.uncertainty if spec.uncertainty in names else "",
    )
    plain, mirrored = (
        {name: output.float().numpy() for name, output in zip(names, found, strict=True)}
        for found in (outputs, teacher(images.flip(3)))
    )
    merged = merge_flipped(plain, mirrored, said)
    return tuple(
        torch.from_numpy(merged[name]) if name in merged else output
        for name, output in zip(names, outputs, strict=True)
    )
