"""What stays float in every quantised network, and why: one table, to be reviewed as a whole.

Invariant: nothing in it multiplies by weights; all convolutions and linear layers are quantised unless a recipe says
otherwise.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from edgepose.blocks.heads import Centroid
from edgepose.blocks.orn import Look, Mix, Normalise, Pool, Sum


class Protected(NamedTuple):
    """A kind of module whose functions are not quantised.

    Attributes:
        module: The kind.
        operators: What it is made of in ONNX.
        reason: Why 8 bits do not suit it.
    """

    module: type[nn.Module]
    operators: tuple[str, ...]
    reason: str


PROTECTED: tuple[Protected, ...] = (
    Protected(
        Sum,
        ("Add",),
        "adds terms of unlike ranges, corrections to logits among them: with 256 codes neighbouring bins would tie and "
        "the peak not stand out from them; there are no multiplications to save",
    ),
    Protected(
        Normalise,
        ("Mul", "ReduceMean", "Sqrt", "Reciprocal"),
        "squares and a reciprocal root span more magnitudes than 8 bits hold, and no engine has such integer kernels",
    ),
    Protected(
        Mix,
        ("MatMul", "Softmax", "Mul"),
        "products of activations with activations, 0.1 % of the network's multiplications: codes around them cost more "
        "time than integers save, and the exponential of the scores multiplies their rounding error",
    ),
    Protected(
        Pool,
        ("Softmax", "MatMul"),
        "probabilities over hundreds of cells: most are below 1/256, the step of 8 bits, but not their sum",
    ),
    Protected(
        Look,
        ("Softmax", "ReduceSum", "MatMul", "Mul"),
        "probabilities over hundreds of bins, most below 1/256, times one map: fewer multiplications than one of the "
        "network's channels",
    ),
    Protected(
        Centroid,
        ("Softmax", "ReduceSum", "Mul"),
        "probabilities over hundreds of cells, most below 1/256, and the coordinates themselves, which 256 codes would "
        "put most of a pixel apart; a handful of operations per keypoint, without weights",
    ),
)


def protected_parts(model: nn.Module) -> tuple[str, ...]:
    """Names of a network's modules that the table keeps float, in order of definition."""
    kinds = tuple(entry.module for entry in PROTECTED)
    return tuple(name for name, part in model.named_modules() if isinstance(part, kinds))
