"""Photographs of four coloured dots, a labelled set that the smallest network learns within seconds.

Invariant: the set depends on its size and seed only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np
from torch import nn

from edgepose.blocks.config import KPEConfig, spec_of
from edgepose.blocks.kpe import build
from edgepose.data.augment import AugmentConfig
from edgepose.data.coco import PoseDataset, dataset
from edgepose.spec import Keypoints, ModelSpec
from edgepose.training.config import TrainConfig

NAMES = ("left_shoulder", "right_shoulder", "right_hip", "left_hip")
COLOURS = np.array([[255, 40, 40], [40, 255, 40], [40, 40, 255], [230, 230, 230]], np.float64)
KEYPOINTS = Keypoints(NAMES, flip_pairs=((0, 1), (2, 3)))
NETWORK = KPEConfig("dots", (64, 64), 8, (8, 8, 16, 16), (1, 1, 1, 1), 16)
SPEC = spec_of(NETWORK, KEYPOINTS)
CONFIG = TrainConfig(
    epochs=3,
    batch_size=8,
    learning_rate=5e-3,
    averaging=0.9,
    seed=3,
    bf16=False,
    augment=AugmentConfig(rotation_deg=15, cutout=0.2),
)


def network(config: KPEConfig = NETWORK, seed: int = 0) -> nn.Module:
    return build(config, KEYPOINTS, seed=seed)


def dots(folder: Path, split: str, count: int, *, seed: int = 0, spec: ModelSpec = SPEC) -> PoseDataset:
    """Draw the pictures, write FOLDER/SPLIT.json and read it back."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    y, x = np.mgrid[:72, :72]
    for number in range(1, count + 1):
        centre, turn = rng.uniform(30, 42, 2), rng.uniform(-0.5, 0.5)
        corners = np.array([[14, -14], [-14, -14], [-12, 14], [12, 14]]) * rng.uniform(0.8, 1.3)
        rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        joints = corners @ rotation.T + centre
        frame = rng.uniform(0, 60, (72, 72, 3))
        for (px, py), colour in zip(joints, COLOURS, strict=True):
            dot = np.exp(-((x - px) ** 2 + (y - py) ** 2) / 18)[..., None]
            frame = frame * (1 - dot) + colour * dot
        name = f"{split}_{number}.png"
        cv2.imwrite(str(folder / "images" / name), np.rint(frame).astype(np.uint8))
        low, size = joints.min(0) - 5, np.ptp(joints, axis=0) + 10
        images.append({"id": number, "file_name": name})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": [*low, *size],
                "keypoints": np.c_[joints, np.full(len(joints), 2)].flatten().tolist(),
            }
        )
    category = {"id": 1, "keypoints": list(spec.keypoints.names), "flip_pairs": [list(p) for p in KEYPOINTS.flip_pairs]}
    document = {"images": images, "annotations": annotations, "categories": [category]}
    (folder / f"{split}.json").write_text(json.dumps(document))
    return dataset(folder, split)


@dataclass
class Recorder:
    """An observer that remembers, and calls `at_step` after each step."""

    cut: list[tuple[int, int]] = field(default_factory=list)
    steps: list[tuple[int, int, float]] = field(default_factory=list)
    rows: list[dict[str, float]] = field(default_factory=list)

    def cutting(self, done: int, total: int) -> None:
        self.cut.append((done, total))

    def step(self, done: int, total: int, loss: float) -> None:
        self.steps.append((done, total, loss))
        self.at_step(done)

    def epoch(self, row: dict[str, float]) -> None:
        self.rows.append(row)

    def at_step(self, done: int) -> None:
        """Overridden by tests that disturb a run."""
