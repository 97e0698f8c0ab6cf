"""The arm that runs a checkpoint in torch eager, as fast as eager goes.

Invariant: FP32, batch normalisation folded, inference mode, the input already in the memory layout of the weights;
nothing but the network is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from edgepose.compress.fold import fold_batch_norms
from edgepose.stages.networks import load_network


def torch_eager(checkpoint: str, *, channels_last: bool, threads: int, batch: int = 1) -> Callable[[], object]:
    """A callable that runs the network once.

    Args:
        checkpoint: Path of the checkpoint.
        channels_last: Memory layout of weights and input.
        threads: Threads of torch.
        batch: People per call.
    """
    torch.set_num_threads(threads)
    network, loaded = load_network(checkpoint)
    spec = loaded.card.spec
    layout = torch.channels_last if channels_last else torch.contiguous_format
    folded = fold_batch_norms(network).to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
    shape = (batch, 3, *spec.preprocess.input_hw)
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    images = torch.from_numpy(values).contiguous(memory_format=layout)

    def infer() -> object:
        with torch.inference_mode():
            return folded(images)

    return infer
