"""What stays float in every quantised network, what does not although others keep it float, and why: two tables.

Invariant: nothing that is protected multiplies by weights; all convolutions and linear layers are quantised unless a
recipe says otherwise. `benchmarks/protected.py` measures what every entry of both tables costs or would cost.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

from torch import nn

from edgepose.blocks.heads import Centroid, HeatmapHead, RegressionHead, SimCCHead
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

    @property
    def name(self) -> str:
        return self.module.__name__


class Considered(NamedTuple):
    """A kind of layer that is quantised although it is often kept float.

    Attributes:
        name: What it is called.
        members: Names of such modules in a network.
        reason: Why 8 bits do suit it.
    """

    name: str
    members: Callable[[nn.Module], tuple[str, ...]]
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


OUTPUTS = "outputs"
OUTPUTS_REASON = (
    "what the last linear layers say is read at once and not multiplied again: rounding it to 256 codes would make "
    "neighbouring bins tie and save nothing (`compress.coverage` leaves such outputs open)"
)
"""The rule that is about values instead of modules."""


def rules() -> tuple[str, ...]:
    """Names of all rules that `QuantiseConfig.unprotected` may break."""
    return (*(entry.name for entry in PROTECTED), OUTPUTS)


def protected_parts(model: nn.Module, *, without: Collection[str] = ()) -> tuple[str, ...]:
    """Names of a network's modules that the table keeps float, in order of definition.

    Args:
        model: The network.
        without: Names of rules to leave out.
    """
    kinds = tuple(entry.module for entry in PROTECTED if entry.name not in without)
    return tuple(name for name, part in model.named_modules() if isinstance(part, kinds))


def _first_convolution(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, part in model.named_modules() if isinstance(part, nn.Conv2d))[:1]


def _output_layers(model: nn.Module) -> tuple[str, ...]:
    """The layers that read the maps of the last head: earlier stages' heads are not run at inference."""
    found: list[str] = []
    for name, part in model.named_modules():
        prefix = f"{name}." if name else ""
        match part:
            case SimCCHead():
                found = [f"{prefix}x", f"{prefix}y"]
            case HeatmapHead():
                found = [f"{prefix}maps"]
            case RegressionHead():
                found = [f"{prefix}scales"]
    return tuple(found)


def _sigmoids(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, part in model.named_modules() if isinstance(part, nn.Sigmoid))


CONSIDERED: tuple[Considered, ...] = (
    Considered(
        "first convolution",
        _first_convolution,
        "photographs have 256 values per channel to begin with, and its weights have a scale per channel like others",
    ),
    Considered(
        "output layers",
        _output_layers,
        "their weights have a scale per bin or channel and their sums stay 32 bits wide up to the float output; for "
        "SimCC they are a tenth of the multiplications and more",
    ),
    Considered(
        "sigmoid",
        _sigmoids,
        "its values lie between 0 and 1 whatever comes in: 256 codes are steps of 0.4 % of what a gate lets through",
    ),
)
