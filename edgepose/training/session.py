"""A torch network behind the `Session` protocol, so that checkpoints are run and measured by the same code as engines.

Invariant: the network runs in evaluation mode, FP32, without gradients; its weights are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from edgepose.spec import ModelSpec, TensorSpec


class TorchSession:
    """Runs a torch module on the CPU.

    Args:
        model: Maps (N, 3, h, w) float32 to a tuple of tensors in the order of `spec.outputs`.
        spec: Names of inputs and outputs.
    """

    def __init__(self, model: nn.Module, spec: ModelSpec) -> None:
        self._model = model.eval()
        self._spec = spec

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self._spec.outputs

    def infer(self, feeds: Mapping[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        tensor = torch.from_numpy(np.ascontiguousarray(feeds[self._spec.inputs[0].name]))
        with torch.inference_mode():
            results = self._model(tensor)
        return {o.name: r.float().numpy() for o, r in zip(self._spec.outputs, results, strict=True)}

    def close(self) -> None:
        """Nothing to release."""
