"""The card beside a checkpoint's weights: architecture, lineage, metrics. No tensors here, and no torch.

Invariant: a card is complete: with it and its weights file the network can be built, run and judged; a network of the
user's own needs the user's module besides, because no code is ever read from a card.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from edgepose.blocks.config import KPEConfig, spec_of
from edgepose.errors import CheckpointError
from edgepose.spec import Keypoints, ModelSpec

SCHEMA = 1


class Lineage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage that a checkpoint went through.

    Attributes:
        stage: "train", "transfer", "sparse", "prune", "recover", "qat" or "ptq"; of several prunings and recoveries
            all but the last are numbered ("prune-1").
        config: The stage's settings, as written by msgspec.
        inputs: Digests of what went in, by role ("train", "dev", "rendered", "checkpoint", "teacher").
        report: What came out: per-epoch curve, metrics on dev, seconds.
    """

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    report: dict[str, Any]


class OwnModule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A module of the user's own.

    Attributes:
        spec: What it eats and says.
        structure: Digest of all that it computes by besides its tensors; see `stages.networks.structure_of`.
    """

    spec: ModelSpec
    structure: str


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is known of a checkpoint besides its tensors.

    Attributes:
        name: Name of the network.
        architecture: Its configuration before any pruning; None for a module of the user's own.
        keypoints: The keypoint set it predicts.
        weights_sha256: Digest of the safetensors file.
        lineage: The stages it went through, first to last.
        plan: Pruning plan as JSON, None where nothing was pruned.
        quantisation: What re-creates the fake-quantised module around the tensors, None where it is not quantised.
        metrics: Final figures by data set and metric.
        notes: Data, terms and limits, for people.
        own: The user's module; None where `architecture` says how to build the network.
    """

    name: str
    architecture: KPEConfig | None
    keypoints: Keypoints
    weights_sha256: str
    lineage: tuple[Lineage, ...] = ()
    plan: dict[str, Any] | None = None
    quantisation: dict[str, Any] | None = None
    metrics: dict[str, dict[str, float]] = {}
    notes: str = ""
    schema: int = SCHEMA
    own: OwnModule | None = None

    @property
    def kpe(self) -> KPEConfig:
        """The configuration of a KPE network.

        Raises:
            CheckpointError: It is a module of the user's own.
        """
        if self.architecture is None:
            raise CheckpointError(
                f"network {self.name}",
                found="a module of the user's own" if self.own else "a card without an architecture",
                expected="a network that edgepose can build",
                fix="name it package.module:factory@CHECKPOINT, use it where its code is, or take one of the zoo",
            )
        return self.architecture

    @property
    def spec(self) -> ModelSpec:
        """The specification of the network's inputs and outputs.

        Raises:
            CheckpointError: The card says nothing of the network.
        """
        spec = self.own.spec if self.own is not None else spec_of(self.kpe, self.keypoints)
        return msgspec.structs.replace(spec, name=self.name)


def paths_of(path: Path | str) -> tuple[Path, Path]:
    """The weights file and the card that belong to a checkpoint's name, with or without suffix."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def read_card(path: Path | str) -> Card:
    """Read only the card: no tensors, quick.

    Raises:
        CheckpointError: No checkpoint there, or its card is not one.
    """
    weights, description = paths_of(path)
    for file in (description, weights):
        if not file.is_file():
            raise CheckpointError(
                str(file),
                found="no such file",
                expected="a checkpoint: NAME.safetensors with NAME.json beside it",
                fix="check the path, or name a network of the zoo",
            )
    try:
        card = msgspec.json.decode(read_bytes(description), type=Card)
    except msgspec.DecodeError as err:
        raise CheckpointError(str(description), found=str(err), expected="the card of an edgepose checkpoint") from err
    if card.schema != SCHEMA:
        raise CheckpointError(
            f"{description}: schema",
            found=str(card.schema),
            expected=str(SCHEMA),
            fix="use the edgepose that wrote the checkpoint, or train again",
        )
    return card


def read_bytes(path: Path) -> bytes:
    """The content of one of a checkpoint's files.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as err:
        raise CheckpointError(str(path), found=err.strerror or str(err), expected="a readable file") from err
