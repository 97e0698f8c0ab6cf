"""Counting multiply-accumulates of a network by running it once.

Invariant: counts are per image (batch 1) and cover convolutions and linear layers only, which is where a pose network's
arithmetic is; nothing about the module changes, not even its training mode.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd


@dataclass(frozen=True, slots=True)
class Macs:
    """Multiply-accumulates of one forward pass for one image.

    Attributes:
        total: Sum over all layers.
        layers: By layer name (`named_modules`), in the order of definition; a layer that runs twice counts twice.
    """

    total: int
    layers: dict[str, int]

    def within(self, part: str) -> int:
        """What a part of the network costs, by its module name ("block.refinements.0")."""
        return sum(count for name, count in self.layers.items() if f"{name}.".startswith(f"{part}."))


def count_macs(model: nn.Module, example: Tensor) -> Macs:
    """Multiply-accumulates of the convolutions and linear layers of `model`.

    Args:
        model: The network; it is run in evaluation mode and left as it was.
        example: (N, 3, h, w) input; only its first image is used.
    """
    counts: dict[str, int] = {}
    handles = []
    for name, layer in model.named_modules():
        if isinstance(layer, (_ConvNd, nn.Linear)):
            counts[name] = 0
            handles.append(layer.register_forward_hook(_counter(counts, name)))
    try:
        with evaluation_mode(model), torch.no_grad():
            model(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    return Macs(sum(counts.values()), counts)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Puts every part of `model` into evaluation mode and restores each part's own mode afterwards."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _counter(counts: dict[str, int], name: str) -> Any:
    def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, _ConvTransposeNd):  # every input element meets every weight of its channel once
            counts[name] += inputs[0].numel() * layer.weight[0].numel()
        elif isinstance(layer, (_ConvNd, nn.Linear)):
            counts[name] += output.numel() * layer.weight[0].numel()

    return count
