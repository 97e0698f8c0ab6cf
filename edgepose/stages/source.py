"""What a compile starts from: a checkpoint, and for a network of the user's own the module that its tensors belong to.

Invariant: importing this loads no torch; a module is never written to disk, only its tensors and what they fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgepose.spec import ModelSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class Network:
    """A network of the user's own, to be compiled as it is.

    Attributes:
        module: forward(images (N, 3, h, w) float32) → tuple of tensors in the order of `spec.outputs`; torch.fx can
            trace it. It is not changed.
        spec: What it eats and says. Outputs that neither the decoder nor visibility nor uncertainty name are carried
            through to the engines, and checked there like the others.
    """

    module: nn.Module
    spec: ModelSpec


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A checkpoint on disk.

    Attributes:
        path: The checkpoint.
        module: The module to load it into, where its card does not say how to build one.
    """

    path: Path
    module: nn.Module | None = None
