"""From a checkpoint to the torch module it describes, whatever stages it went through.

Invariant: the module computes what the checkpoint's last stage computed: pruned by its plan, fake-quantised by its
placement.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec
from torch import nn

from edgepose.blocks.checkpoint import Checkpoint, load_checkpoint, load_into
from edgepose.blocks.kpe import build
from edgepose.compress.plan import PruningPlan, apply_pruning
from edgepose.errors import CheckpointError

T = TypeVar("T")


def load_network(path: Path | str) -> tuple[nn.Module, Checkpoint]:
    """Read a checkpoint and build its network, in evaluation mode.

    Returns:
        The module, fake-quantised where the checkpoint is quantised, and the checkpoint.

    Raises:
        CheckpointError: Files missing, malformed or of another architecture.
        IntegrityError: The weights are not those of the card.
    """
    checkpoint = load_checkpoint(path)
    network = _architecture(checkpoint, str(path))
    if checkpoint.card.quantisation is None:
        load_into(network, checkpoint, str(path))
        return network.eval(), checkpoint
    from edgepose.compress.fold import fold_batch_norms
    from edgepose.compress.quantise import Placement, restore

    placement = _decoded(checkpoint.card.quantisation, Placement, f"{path}: quantisation")
    return restore(fold_batch_norms(network), placement, checkpoint.tensors).eval(), checkpoint


def _architecture(checkpoint: Checkpoint, where: str) -> nn.Module:
    network: nn.Module = build(checkpoint.card.architecture, checkpoint.card.keypoints)
    if checkpoint.card.plan is None:
        return network
    return apply_pruning(network, _decoded(checkpoint.card.plan, PruningPlan, f"{where}: plan"))


def _decoded(value: object, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as err:
        raise CheckpointError(where, found=str(err), expected=f"a {kind.__name__} of this version") from err
