"""Batches of augmented people for training, made in worker processes.

Invariant: batch b of epoch e is a function of (seed, e, b) alone: a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from edgepose.data.augment import Patch, augment, cut_patch
from edgepose.data.coco import PoseDataset
from edgepose.errors import AnnotationError, SpecError
from edgepose.pose.codec import encode_heatmap, encode_simcc
from edgepose.spec import Heatmap, ModelSpec, SimCC
from edgepose.training.config import TrainConfig


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One training batch.

    Attributes:
        crops: (N, h, w, 3) uint8 BGR.
        targets: Label tensors in the order of the network's outputs.
        weights: (N, K) float32, 0 for joints that do not count.
    """

    crops: Tensor
    targets: tuple[Tensor, ...]
    weights: Tensor


def check_people(data: PoseDataset, spec: ModelSpec) -> None:
    """Refuse people that a network cannot be trained or measured on.

    Raises:
        AnnotationError: There is nobody.
        SpecError: Their keypoints are not the network's.
    """
    if not data.persons:
        raise AnnotationError(
            str(data.source),
            found="nobody with a labelled keypoint",
            expected="at least one person",
            fix="label some people, or choose another split",
        )
    if data.keypoints.names != spec.keypoints.names:
        raise SpecError(
            str(data.source),
            found=f"{data.keypoints.count} keypoints ({', '.join(data.keypoints.names[:3])} …)",
            expected=f"the {spec.keypoints.count} of {spec.name} ({', '.join(spec.keypoints.names[:3])} …)",
            fix="train a network for this keypoint set",
        )


class AugmentedPeople(Dataset[Batch]):
    """All batches of a run by number; patches are cut once and shared with the workers by forking."""

    def __init__(
        self,
        data: PoseDataset,
        spec: ModelSpec,
        config: TrainConfig,
        *,
        on_patch: Callable[[], None] | None = None,
    ) -> None:
        check_people(data, spec)
        self.spec, self.config, self.batch_size = spec, config, config.batch_size
        self.patches: list[Patch] = []
        for person in data.persons:
            self.patches.append(cut_patch(person, spec.preprocess))
            if on_patch:
                on_patch()
        self.batches_per_epoch = max(1, len(self.patches) // config.batch_size)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __getitem__(self, number: int) -> Batch:
        epoch, position = divmod(number, self.batches_per_epoch)
        order = np.random.default_rng((self.config.seed, epoch)).permutation(len(self.patches))
        rows = order[position * self.batch_size : (position + 1) * self.batch_size]
        crops, points, weights = [], [], []
        for row in rows:
            rng = np.random.default_rng((self.config.seed, epoch, int(row)))
            crop, xy, weight = augment(
                self.patches[row], self.spec.preprocess, self.spec.keypoints, self.config.augment, rng
            )
            crops.append(crop)
            points.append(xy)
            weights.append(weight)
        targets = self._encode(np.stack(points))
        return Batch(torch.from_numpy(np.stack(crops)), targets, torch.from_numpy(np.stack(weights)))

    def _encode(self, points: np.ndarray) -> tuple[Tensor, ...]:
        hw, decoder = self.spec.preprocess.input_hw, self.spec.decoder
        match decoder:
            case SimCC():
                return tuple(torch.from_numpy(t) for t in encode_simcc(points, hw, decoder, self.config.sigma_px))
            case Heatmap():
                # Narrower than this, a Gaussian falls between the cells and no refinement finds its centre.
                sigma_px = max(self.config.sigma_px, 0.75 * decoder.stride)
                return (torch.from_numpy(encode_heatmap(points, hw, decoder, sigma_px)),)

    def numbers(self, numbers: Sequence[int], workers: int) -> Generator[Batch]:
        """The batches with these numbers, in order, prepared ahead by `workers` processes (0: in this one)."""
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=list(numbers),
            num_workers=workers,
            worker_init_fn=_start_worker,
            prefetch_factor=4 if workers else None,
        )
        yield from loader


def _start_worker(_: int) -> None:
    # Signals are for the training process, which stops between steps; its workers end with it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    os.nice(1)


def to_input(crops: Tensor, spec: ModelSpec) -> Tensor:
    """(N, h, w, 3) uint8 BGR → the network's (N, 3, h, w) float32 input, channels last in memory."""
    preprocess = spec.preprocess
    pixels = crops.permute(0, 3, 1, 2)
    if preprocess.color == "rgb":
        pixels = pixels.flip(1)
    mean = torch.tensor(preprocess.mean).view(1, 3, 1, 1)
    std = torch.tensor(preprocess.std).view(1, 3, 1, 1)
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)
