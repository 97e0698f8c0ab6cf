"""From a checkpoint to the torch module it describes, whatever stages it went through; and a user's module to one.

Invariant: the module computes what the checkpoint's last stage computed: pruned by its plan, fake-quantised by its
placement.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import TypeVar

import msgspec
from torch import nn

from edgepose.blocks.card import Card, OwnModule
from edgepose.blocks.checkpoint import Checkpoint, load_checkpoint, load_into, save_checkpoint
from edgepose.blocks.kpe import build
from edgepose.compress.fold import trace
from edgepose.compress.plan import PruningPlan, apply_pruning
from edgepose.errors import CheckpointError
from edgepose.stages.source import Network, Source

T = TypeVar("T")


def load_network(source: Source | Path | str) -> tuple[nn.Module, Checkpoint]:
    """Read a checkpoint and build its network, in evaluation mode.

    Returns:
        The module, fake-quantised where the checkpoint is quantised, and the checkpoint.

    Raises:
        CheckpointError: Files missing, malformed or of another architecture.
        IntegrityError: The weights are not those of the card.
    """
    if not isinstance(source, Source):
        source = Source(Path(source))
    checkpoint, where = load_checkpoint(source.path), str(source.path)
    network = _architecture(checkpoint, source.module, where)
    if checkpoint.card.quantisation is None:
        load_into(network, checkpoint, where)
        return network.eval(), checkpoint
    from edgepose.compress.fold import fold_batch_norms
    from edgepose.compress.quantise import Placement, restore

    placement = _decoded(checkpoint.card.quantisation, Placement, f"{where}: quantisation")
    return restore(fold_batch_norms(network), placement, checkpoint.tensors).eval(), checkpoint


def pruning_of(checkpoint: Checkpoint) -> PruningPlan | None:
    """The plan that a checkpoint's network was pruned by; None where it was not.

    Raises:
        CheckpointError: It is not a plan of this version.
    """
    card = checkpoint.card
    return None if card.plan is None else _decoded(card.plan, PruningPlan, f"checkpoint {card.name}: plan")


def store_network(network: Network, folder: Path) -> Path:
    """Write a user's network as a checkpoint that `load_network` reads together with the module.

    Args:
        network: The module and its specification.
        folder: Where checkpoints of such networks lie, one folder each, named by what is in it.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: torch.fx cannot trace the module.
        StorageError: Disk full, read-only or no permission.
    """
    own = OwnModule(network.spec, structure_of(network.module))
    digest = hashlib.sha256(msgspec.json.encode(own))
    tensors = network.module.state_dict()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    path = folder / digest.hexdigest()[:24] / "network"
    save_checkpoint(path, Card(network.spec.name, None, network.spec.keypoints, "", own=own), tensors)
    return path


def structure_of(module: nn.Module) -> str:
    """sha256 of all that a module computes by besides its stored tensors: layers, settings, graph, other buffers.

    Raises:
        CheckpointError: torch.fx cannot trace the module.
    """
    module = copy.deepcopy(module).eval()
    stored = module.state_dict()
    digest = hashlib.sha256(trace(module).python_code("self").src.encode())
    for name, part in module.named_modules():
        if not list(part.children()):
            digest.update(f"{name}: {part}\n".encode())
    for name, tensor in module.named_buffers():
        if name not in stored:
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _architecture(checkpoint: Checkpoint, own: nn.Module | None, where: str) -> nn.Module:
    network = _built(checkpoint.card, own, where)
    if checkpoint.card.plan is None:
        return network
    return apply_pruning(network, _decoded(checkpoint.card.plan, PruningPlan, f"{where}: plan"))


def _built(card: Card, own: nn.Module | None, where: str) -> nn.Module:
    if card.own is None:
        return build(card.kpe, card.keypoints)
    if own is None:
        raise CheckpointError(
            where,
            found="weights of a user's own module, whose code no checkpoint holds",
            expected="that module beside them",
            fix="name it package.module:factory@CHECKPOINT, or in Python load_network(Source(path, module))",
        )
    if structure_of(own) != card.own.structure:
        raise CheckpointError(
            where,
            found=f"a {type(own).__name__} that computes something else than the one the weights were stored from",
            expected="the same layers, settings and graph",
            fix="build the module as it was, or compile it anew",
        )
    return copy.deepcopy(own)


def _decoded(value: object, kind: type[T], where: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as err:
        raise CheckpointError(where, found=str(err), expected=f"a {kind.__name__} of this version") from err
