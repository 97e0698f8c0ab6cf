"""Checkpoints: weights as safetensors with a JSON card beside them; never a pickled object.

Invariant: a card names the sha256 of its weights, and loading refuses weights that do not match it. Large tensors may
be stored in FP16 or in 8 bits; they come back as FP32.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from edgepose.blocks.card import Card, paths_of, read_bytes, read_card
from edgepose.errors import CheckpointError, IntegrityError
from edgepose.storage import atomic_file, atomic_write, json_bytes


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A card and its tensors, all FP32 (integer buffers as they are)."""

    card: Card
    tensors: dict[str, Tensor]
    digest: str


Storage = Literal["fp32", "fp16", "int8"]
"""How large weights are stored."""


def save_checkpoint(path: Path | str, card: Card, tensors: dict[str, Tensor], *, storage: Storage = "fp32") -> Card:
    """Write weights, then the card that vouches for them.

    Args:
        path: Where to; suffixes are added.
        card: Its `weights_sha256` is filled in.
        tensors: The state to store.
        storage: How large weights are stored: as they are, in FP16, or as int8 codes with one scale per output channel
            (round to nearest; for networks kept for comparison, whose size counts for more than their last tenth of a
            point). Vectors and small tensors (biases, normalisation statistics, scales of quantisers) stay FP32, as do
            weights that FP16 cannot hold.

    Returns:
        The card as written.

    Raises:
        StorageError: The disk is full or read-only; an older checkpoint there is still whole.
    """
    weights, description = paths_of(path)
    # Copies: safetensors refuses tensors that share memory.
    stored = {
        part: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        for part, value in _stored(name, tensor, storage).items()
    }
    raw = safetensors.torch.save(stored)
    card = msgspec.structs.replace(card, weights_sha256=hashlib.sha256(raw).hexdigest())
    with atomic_file(description) as temporary:  # a disk that has no room for the card keeps the old weights, too
        temporary.write_bytes(json_bytes(card))
        atomic_write(weights, raw)
    return card


_SMALL = 4096  # elements up to which shorter storage saves nothing worth its rounding
_STEP = "::step"  # after a tensor's name: what one of its int8 codes is worth, per output channel


def _stored(name: str, tensor: Tensor, storage: Storage) -> dict[str, Tensor]:
    """The tensors that stand for one in the file, by name."""
    if storage == "fp32" or tensor.dtype != torch.float32 or tensor.ndim < 2 or tensor.numel() < _SMALL:
        return {name: tensor}
    if storage == "fp16" or not bool(tensor.isfinite().all()):
        half = tensor.half()
        return {name: half if bool(half.isfinite().all()) else tensor}
    step = tensor.abs().amax(tuple(range(1, tensor.ndim)), keepdim=True).clamp(min=1e-12) / 127
    return {name: (tensor / step).round().to(torch.int8), name + _STEP: step}


def _widened(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The FP32 tensors that those of a file stand for."""
    wide: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(_STEP):
            continue
        step = tensors.get(name + _STEP)
        wide[name] = tensor * step if step is not None else tensor.float() if tensor.dtype == torch.float16 else tensor
    return wide


def load_checkpoint(path: Path | str) -> Checkpoint:
    """Read a checkpoint and verify its weights against the card.

    Raises:
        CheckpointError: Missing or malformed files.
        IntegrityError: The weights are not those the card was written for.
    """
    card = read_card(path)
    weights, _ = paths_of(path)
    raw = read_bytes(weights)
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
    return Checkpoint(card, _widened(tensors), digest)


def load_into(module: torch.nn.Module, checkpoint: Checkpoint, where: str) -> None:
    """Load tensors into a module of the same architecture.

    Raises:
        CheckpointError: A tensor is missing, left over or of another shape; the module is unchanged.
    """
    own = module.state_dict()
    missing, extra = sorted(own.keys() - checkpoint.tensors.keys()), sorted(checkpoint.tensors.keys() - own.keys())
    shapes = [n for n in own if n in checkpoint.tensors and own[n].shape != checkpoint.tensors[n].shape]
    if missing or extra or shapes:
        first, count = (missing or extra or shapes)[0], len(missing) + len(extra) + len(shapes)
        what = "lacks" if missing else "has the unknown tensor" if extra else "has another shape of"
        raise CheckpointError(
            where,
            found=f"a checkpoint of another architecture: it {what} {first!r} ({count} in all)",
            expected=f"the tensors of {checkpoint.card.name}",
            fix="use the card that was written with these weights",
        )
    module.load_state_dict(checkpoint.tensors)
