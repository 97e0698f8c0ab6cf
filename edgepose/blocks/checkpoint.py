"""Checkpoints: weights as safetensors with a JSON card beside them; never a pickled object.

Invariant: a card names the sha256 of its weights, and loading refuses weights that do not match it. Tensors may be stored
in FP16; they come back as FP32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from edgepose.blocks.kpe import KPEConfig, spec_of
from edgepose.errors import CheckpointError, IntegrityError
from edgepose.spec import Keypoints, ModelSpec
from edgepose.storage import atomic_json, atomic_write

SCHEMA = 1


class Lineage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One stage that a checkpoint went through.

    Attributes:
        stage: "train", "prune", "recover", "qat" or "ptq".
        config: The stage's settings, as written by msgspec.
        inputs: Digests of what went in, by role ("train", "dev", "checkpoint", "teacher").
        report: What came out: per-epoch curve, metrics on dev, seconds.
    """

    stage: str
    config: dict[str, Any]
    inputs: dict[str, str]
    report: dict[str, Any]


class Card(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that is known of a checkpoint besides its tensors.

    Attributes:
        name: Name of the network.
        architecture: Its configuration before any pruning.
        keypoints: The keypoint set it predicts.
        weights_sha256: Digest of the safetensors file.
        lineage: The stages it went through, first to last.
        plan: Pruning plan as JSON, None where nothing was pruned.
        quantisation: What re-creates the fake-quantised module around the tensors, None where it is not quantised.
        metrics: Final figures by data set and metric.
        notes: Data, terms and limits, for people.
    """

    name: str
    architecture: KPEConfig
    keypoints: Keypoints
    weights_sha256: str
    lineage: tuple[Lineage, ...] = ()
    plan: dict[str, Any] | None = None
    quantisation: dict[str, Any] | None = None
    metrics: dict[str, dict[str, float]] = {}
    notes: str = ""
    schema: int = SCHEMA

    @property
    def spec(self) -> ModelSpec:
        """The specification of the network's inputs and outputs."""
        return msgspec.structs.replace(spec_of(self.architecture, self.keypoints), name=self.name)


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A card and its tensors, all FP32 (integer buffers as they are)."""

    card: Card
    tensors: dict[str, Tensor]
    digest: str


def paths_of(path: Path | str) -> tuple[Path, Path]:
    """The weights file and the card that belong to a checkpoint's name, with or without suffix."""
    path = Path(path)
    stem = path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    return stem.with_name(stem.name + ".safetensors"), stem.with_name(stem.name + ".json")


def save_checkpoint(path: Path | str, card: Card, tensors: dict[str, Tensor], *, half: bool = False) -> Card:
    """Write weights, then the card that vouches for them.

    Args:
        path: Where to; suffixes are added.
        card: Its `weights_sha256` is filled in.
        tensors: The state to store.
        half: Store floating tensors in FP16.

    Returns:
        The card as written.

    Raises:
        StorageError: The disk is full or read-only; an older checkpoint there is still whole.
    """
    weights, description = paths_of(path)
    stored = {
        name: (t.half() if half and t.is_floating_point() else t).detach().cpu().contiguous() for name, t in tensors.items()
    }
    raw = safetensors.torch.save(stored)
    card = msgspec.structs.replace(card, weights_sha256=hashlib.sha256(raw).hexdigest())
    weights.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(weights, raw)
    atomic_json(description, msgspec.to_builtins(card))
    return card


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
        return msgspec.json.decode(description.read_bytes(), type=Card)
    except msgspec.DecodeError as err:
        raise CheckpointError(str(description), found=str(err), expected="the card of an edgepose checkpoint") from err


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint and verify its weights against the card.

    Raises:
        CheckpointError: Missing or malformed files.
        IntegrityError: The weights are not those the card was written for.
    """
    card = read_card(path)
    weights, _ = paths_of(path)
    raw = weights.read_bytes()
    digest = hashlib.sha256(raw).hexdigest()
    if digest != card.weights_sha256:
        raise IntegrityError(
            str(weights),
            found=f"sha256 {digest[:12]}…",
            expected=f"{card.weights_sha256[:12]}… as its card says",
            fix="restore the file or train again",
        )
    try:
        tensors = safetensors.torch.load(raw)
    except safetensors.SafetensorError as err:
        raise CheckpointError(str(weights), found=str(err), expected="safetensors") from err
    widened = {name: t.float() if t.dtype == torch.float16 else t for name, t in tensors.items()}
    return Checkpoint(card, widened, digest)


def load_into(module: torch.nn.Module, checkpoint: Checkpoint, where: str) -> None:
    """Load tensors into a module of the same architecture.

    Raises:
        CheckpointError: A tensor is missing, left over or of another shape; the module is unchanged.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - checkpoint.tensors.keys()), sorted(checkpoint.tensors.keys() - own.keys())
    shapes = [n for n in own if n in checkpoint.tensors and own[n].shape != checkpoint.tensors[n].shape]
    if missing or extra or shapes:
        first = (missing or extra or shapes)[0]
        what = "lacks" if missing else "has the unknown tensor" if extra else "has another shape of"
        raise CheckpointError(
            where,
            found=f"a checkpoint of another architecture: it {what} {first!r} ({len(missing) + len(extra) + len(shapes)} in all)",
            expected=f"the tensors of {checkpoint.card.name}",
            fix="use the card that was written with these weights",
        )
    module.load_state_dict(checkpoint.tensors)
