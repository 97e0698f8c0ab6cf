"""Checkpoints of any stage as estimators, and as calls that a measuring process can time.

Invariant: what runs is the module that `load_network` builds, in torch, FP32, in evaluation mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.macs import count_macs
from edgepose.estimator import PoseEstimator
from edgepose.stages.networks import load_network
from edgepose.stages.source import Source
from edgepose.training.session import TorchSession

_HOOKS = "__nncf"  # where NNCF keeps its quantisers


@dataclass(frozen=True, slots=True, eq=False)
class OpenCheckpoint:
    """A checkpoint that is ready to run.

    Attributes:
        estimator: Runs it; whoever opened it closes it.
        macs: Multiply-accumulates of its convolutions and linear layers for one person.
        params: Trained parameters, those of fake quantisers aside.
        quantised: Whether it is fake-quantised.
    """

    estimator: PoseEstimator
    macs: int
    params: int
    quantised: bool


def open_checkpoint(source: Source | Path) -> OpenCheckpoint:
    """Load a checkpoint, one of a user's own network with its module.

    Raises:
        CheckpointError: It cannot be read, or needs a module of the user's own.
        IntegrityError: The weights are not those of its card.
    """
    network, checkpoint = load_network(source)
    spec = checkpoint.card.spec
    height, width = spec.preprocess.input_hw
    macs = count_macs(network, torch.zeros(1, 3, height, width)).total
    quantised = checkpoint.card.quantisation is not None
    params = sum(tensor.numel() for name, tensor in network.named_parameters() if not name.startswith(_HOOKS))
    return OpenCheckpoint(PoseEstimator(TorchSession(network, spec), spec, backend="torch"), macs, params, quantised)


def torch_call(path: str, threads: int, *, channels_last: bool = True) -> Callable[[], object]:
    """One inference of one person, for a `CallableArm`: torch eager, as fast as eager goes.

    Batch normalisation is folded, and the input is in the memory layout of the weights already.

    Args:
        path: The checkpoint, which is not quantised.
        threads: Of torch.
        channels_last: Memory layout of weights and input; mostly the quicker one on CPUs.
    """
    torch.set_num_threads(threads)
    network, checkpoint = load_network(path)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    folded = fold_batch_norms(network).to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
    generator = torch.Generator().manual_seed(0)
    shape = (1, 3, *checkpoint.card.spec.preprocess.input_hw)
    images = torch.randn(shape, generator=generator).contiguous(memory_format=layout)

    def infer() -> object:
        with torch.inference_mode():
            return folded(images)

    return infer
