"""Which people of a training split are held out as `dev`; every choice is made there, never on `val`.

Invariant: the committed ids win; a data set without committed ids is split by the same rule (10 %, seed 0).
"""

from __future__ import annotations

import hashlib
import json
from importlib.resources import files
from pathlib import Path

import numpy as np

from edgepose.data.coco import PoseDataset, dataset
from edgepose.errors import CheckpointError, UsageError
from edgepose.spec import Keypoints

_SHARE, _SEED = 0.1, 0


def dev_ids(train: PoseDataset) -> tuple[int, ...]:
    """Annotation ids of the people held out of a training split, ascending."""
    for entry in files(__package__).iterdir():
        if entry.name.endswith(".json"):
            committed = json.loads(entry.read_text())
            if committed["train_sha256"] == train.digest:
                return tuple(committed["annotation_ids"])
    return draw_dev_ids(train)


def draw_dev_ids(train: PoseDataset) -> tuple[int, ...]:
    """10 % of the people (one at least), drawn with seed 0 from the sorted annotation ids."""
    ids = np.sort(np.array([person.annotation_id for person in train.persons], np.int64))
    count = max(1, round(_SHARE * len(ids)))
    chosen = np.random.default_rng(_SEED).permutation(len(ids))[:count]
    return tuple(int(i) for i in np.sort(ids[chosen]))


def split_train(train: PoseDataset) -> tuple[PoseDataset, PoseDataset]:
    """A training split without its dev people, and those people."""
    held_out = dev_ids(train)
    return train.without(held_out), train.subset(held_out)


def people_for(network: str, keypoints: Keypoints, folder: Path) -> tuple[PoseDataset, PoseDataset]:
    """A folder's training people without dev, and dev, for a network of these very keypoints.

    Args:
        network: Its name, for the error.
        keypoints: What it finds.
        folder: Has train.json and images/.

    Raises:
        CheckpointError: The people are labelled with other keypoints.
        DataUnavailable: There are none.
        AnnotationError: train.json breaks the format.
    """
    people = split_train(dataset(folder, "train"))
    if people[0].keypoints.names != keypoints.names:
        raise CheckpointError(
            network,
            found=f"a network for {keypoints.count} keypoints",
            expected=f"the {people[0].keypoints.count} of {folder}",
            fix="choose data with the network's keypoints, or train a network for these",
        )
    return people


def some_images(train: PoseDataset, count: int, seed: int) -> PoseDataset:
    """The people of `count` photographs, drawn without replacement from those that show anyone.

    Raises:
        UsageError: There are not so many.
    """
    names = sorted({person.image for person in train.persons})
    if count > len(names):
        raise UsageError(
            f"{train.source}",
            found=f"{len(names)} photographs to train on",
            expected=f"at least {count}, as was asked for",
            fix="ask for fewer, or for all",
        )
    chosen = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:count]}
    return train.subset(person.annotation_id for person in train.persons if person.image in chosen)


def image_digests(data: PoseDataset) -> dict[str, str]:
    """sha256 of every photograph's bytes → its file name: tells whether two sets share photographs."""
    files = {person.image for person in data.persons}
    return {hashlib.sha256(path.read_bytes()).hexdigest(): path.name for path in files}
