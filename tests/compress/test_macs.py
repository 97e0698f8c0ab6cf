"""Counting multiply-accumulates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgepose.compress.macs import count_macs


@pytest.mark.parametrize(
    ("layer", "shape", "expected"),
    [
        (nn.Conv2d(3, 8, 3, stride=2, padding=1), (3, 16, 12), 8 * 8 * 6 * 27),
        (nn.Conv2d(8, 8, 5, padding=2, groups=8), (8, 10, 10), 8 * 100 * 25),
        (nn.Linear(20, 7), (14, 20), 14 * 7 * 20),
        (nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1), (4, 5, 5), 4 * 25 * 6 * 16),
        (nn.BatchNorm2d(3), (3, 16, 12), 0),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_counts_by_hand(layer: nn.Module, shape: tuple[int, ...], expected: int, batch: int) -> None:
    assert count_macs(layer, torch.zeros(batch, *shape)).total == expected


def test_counts_by_layer_and_leaves_no_trace() -> None:
    shared = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(shared, nn.BatchNorm2d(3), shared, nn.Dropout()).train()
    model[1].eval()
    statistics = model[1].running_mean.clone()
    macs = count_macs(model, torch.randn(2, 3, 4, 4))
    assert macs.layers == {"0": 2 * 9 * 16}  # used twice, counted twice
    assert macs.total == 2 * 9 * 16
    assert [part.training for part in model] == [True, False, True, True]
    assert torch.equal(model[1].running_mean, statistics)
    assert not shared._forward_hooks


def test_hooks_go_even_when_the_network_fails() -> None:
    layer = nn.Conv2d(3, 3, 1)
    with pytest.raises(RuntimeError):
        count_macs(layer, torch.zeros(1, 5, 4, 4))
    assert not layer._forward_hooks
