"""Batches of augmented people for training, made in worker processes.

Invariant: batch b of epoch e is a function of (seed, e, b) alone: a resumed run sees what an uninterrupted one sees.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from edgepose.data.augment import Patch, View, augment, cut_patch
from edgepose.data.coco import PoseDataset
from edgepose.errors import AnnotationError, SpecError, UsageError
from edgepose.pose.codec import encode_heatmap, encode_regression, encode_simcc
from edgepose.spec import Heatmap, ModelSpec, OneStage, Regression, SimCC
from edgepose.training.config import TrainConfig


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One training batch.

    Attributes:
        crops: (N, h, w, 3) uint8 BGR.
        targets: Label tensors in the order of the network's outputs.
        weights: (N, K) float32, 0 for joints that do not count.
        keypoints: (N, K, 2) float32, pixels of the crop.
        visible: (N, K) float32, 1 where a joint can be seen, 0 where it is hidden.
        known: (N, K) float32, 1 where `visible` is known.
        covered: (N, h/8, w/8) float32, the share of each cell that was painted over; -1 in pictures of people with
            joints labelled hidden, where something else may be in front as well.
        uncovered: (N, h, w, 3) uint8 BGR, the crops without what was pasted in front; None where no teacher sees them.
    """

    crops: Tensor
    targets: tuple[Tensor, ...]
    weights: Tensor
    keypoints: Tensor
    visible: Tensor
    known: Tensor
    covered: Tensor
    uncovered: Tensor | None = None


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
    """All batches of a run by number; patches are cut once and shared with the workers by forking.

    Args:
        data: The people; an epoch shows each of them once.
        spec: The network's specification.
        config: Settings of the run.
        extra: People that fill the share `config.rendered` of every batch, in an order of their own.
        on_patch: Called whenever a photograph was read.

    Raises:
        AnnotationError: There is nobody.
        SpecError: Other keypoints than the network's.
        UsageError: A share of other people is asked for and there are none, or the reverse.
    """

    def __init__(
        self,
        data: PoseDataset,
        spec: ModelSpec,
        config: TrainConfig,
        *,
        extra: PoseDataset | None = None,
        on_patch: Callable[[], None] | None = None,
    ) -> None:
        self.spec, self.config = spec, config
        self.patches = _cut(data, spec, on_patch)
        self.extra = _cut(extra, spec, on_patch) if extra is not None else []
        extra_rows = round(config.batch_size * config.rendered)
        if bool(extra_rows) != bool(self.extra) or extra_rows >= config.batch_size:
            raise UsageError(
                "training: rendered",
                found=f"{config.rendered:g} of a batch of {config.batch_size}, and {len(self.extra)} people for it",
                expected="a second set of people exactly where a share of each batch, but not all, is to come from it",
            )
        self.rows, self.extra_rows = config.batch_size - extra_rows, extra_rows
        self.batches_per_epoch = max(1, len(self.patches) // self.rows)

    def __len__(self) -> int:
        return self.batches_per_epoch

    def __getitem__(self, number: int) -> Batch:
        progress = min(1.0, number / (self.config.epochs * self.batches_per_epoch))
        chosen = list(self._chosen(number))
        views = [
            augment(
                patch, self.spec.preprocess, self.spec.keypoints, self.config.augment, np.random.default_rng(seed),
                progress=progress, donors=self.patches, keep_uncovered=self.config.uncovered_teacher,
            )
            for patch, seed in chosen
        ]  # fmt: skip
        points = np.stack([view.keypoints for view in views])
        return Batch(
            crops=torch.from_numpy(np.stack([view.crop for view in views])),
            targets=self._encode(points),
            weights=torch.from_numpy(np.stack([view.weights for view in views])),
            keypoints=torch.from_numpy(points),
            visible=torch.from_numpy(np.stack([view.visible for view in views])),
            known=torch.from_numpy(np.stack([view.known for view in views])),
            covered=torch.from_numpy(np.stack([_cells(p, view) for (p, _), view in zip(chosen, views, strict=True)])),
            uncovered=_stacked([view.uncovered for view in views if view.uncovered is not None]),
        )

    def _chosen(self, number: int) -> Iterator[tuple[Patch, tuple[int, ...]]]:
        """The people of a batch, and what the randomness of their views starts from."""
        seed = self.config.seed
        epoch, position = divmod(number, self.batches_per_epoch)
        order = np.random.default_rng((seed, epoch)).permutation(len(self.patches))
        for row in order[position * self.rows : (position + 1) * self.rows]:
            yield self.patches[row], (seed, epoch, int(row))
        for place in range(number * self.extra_rows, (number + 1) * self.extra_rows):
            turn, position = divmod(place, len(self.extra))
            row = np.random.default_rng((seed, turn, _EXTRA)).permutation(len(self.extra))[position]
            yield self.extra[row], (seed, turn, int(row), _EXTRA)

    def _encode(self, points: np.ndarray) -> tuple[Tensor, ...]:
        hw, decoder = self.spec.preprocess.input_hw, self.spec.decoder
        match decoder:
            case SimCC():
                return tuple(torch.from_numpy(t) for t in encode_simcc(points, hw, decoder, self.config.sigma_px))
            case Heatmap():
                # Narrower than this, a Gaussian falls between the cells and no refinement finds its centre.
                sigma_px = max(self.config.sigma_px, 0.75 * decoder.stride)
                return (torch.from_numpy(encode_heatmap(points, hw, decoder, sigma_px)),)
            case Regression():
                return (torch.from_numpy(encode_regression(points, decoder)),)
            case OneStage():
                raise SpecError("training", found="a one-stage network", expected="one that is shown one person")

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


_CELL_PX = 8


def _cells(patch: Patch, view: View) -> np.ndarray:
    """(h/8, w/8) float32, what of each cell was painted over; see `Batch.covered`."""
    hw = view.covered.shape[0] // _CELL_PX, view.covered.shape[1] // _CELL_PX
    if (patch.keypoints[:, 2] == 1).any():
        return np.full(hw, -1, np.float32)
    cells = cv2.resize(view.covered, hw[::-1], interpolation=cv2.INTER_AREA)
    return np.asarray(cells, np.float32) / 255


def _stacked(crops: list[np.ndarray]) -> Tensor | None:
    return torch.from_numpy(np.stack(crops)) if crops else None


_EXTRA = 1  # keeps the second set's randomness apart from the first's


def _cut(data: PoseDataset, spec: ModelSpec, on_patch: Callable[[], None] | None) -> list[Patch]:
    check_people(data, spec)
    patches = []
    for person in data.persons:
        patches.append(cut_patch(person, spec.preprocess))
        if on_patch:
            on_patch()
    return patches


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


def layout_of(model: nn.Module) -> torch.memory_format:
    """How a network's tensors are to lie in memory while gradients are taken.

    Channels last is faster, but on CPUs the gradient of a strided 1x1 convolution of less than 16 channels corrupts
    memory then (oneDNN issue 6035).
    """
    corrupts = any(
        isinstance(part, nn.Conv2d)
        and part.kernel_size == (1, 1)
        and max(part.stride) > 1
        and part.in_channels < _LEAST_CHANNELS
        for part in model.modules()
    )
    return torch.contiguous_format if corrupts else torch.channels_last


_LEAST_CHANNELS = 16
