"""Prediction over a labelled set inside the training loop: fast, batched over people, on crops cut once.

Invariant: crops are those of `pose.preprocess`, so figures agree with the ones measured through a bundle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgepose.data.coco import PoseDataset, read_image
from edgepose.pose.codec import decode
from edgepose.pose.preprocess import crop_transforms, to_source, warp
from edgepose.spec import ModelSpec
from edgepose.training.batches import check_people, to_input


@dataclass(frozen=True, slots=True, eq=False)
class Crops:
    """The evaluation crops of a labelled set.

    Attributes:
        data: The people.
        pixels: (P, h, w, 3) uint8 BGR.
        transforms: (P, 2, 3) float64, source → input.
    """

    data: PoseDataset
    pixels: NDArray[np.uint8]
    transforms: NDArray[np.float64]


def cut_crops(data: PoseDataset, spec: ModelSpec) -> Crops:
    """Cut every person's evaluation crop once.

    Raises:
        AnnotationError: There is nobody.
        SpecError: The people have other keypoints than the network.
        ImageError: A photograph cannot be read.
    """
    check_people(data, spec)
    boxes = np.stack([person.box_xyxy for person in data.persons])
    transforms = crop_transforms(boxes, spec.preprocess)
    hw = spec.preprocess.input_hw
    pixels = [warp(read_image(p.image), t[None], hw)[0] for p, t in zip(data.persons, transforms, strict=True)]
    return Crops(data, np.stack(pixels), transforms)


def predict(
    model: nn.Module, spec: ModelSpec, crops: Crops, *, batch_size: int = 64, bf16: bool = False
) -> NDArray[np.float32]:
    """Keypoints of every person, (P, K, 2) float32, pixels of the source image."""
    was_training = model.training
    model.eval()
    names = [output.name for output in spec.outputs]
    found = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for start in range(0, len(crops.pixels), batch_size):
            batch = torch.from_numpy(crops.pixels[start : start + batch_size])
            outputs = model(to_input(batch, spec))
            found.append(decode({n: o.float().numpy() for n, o in zip(names, outputs, strict=True)}, spec.decoder)[0])
    model.train(was_training)
    return to_source(np.concatenate(found), crops.transforms)
