"""Blocks with branches, and the single convolution that they fold to."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepose.blocks.backbones import RepBlock
from edgepose.compress.prune import reestimate_batch_norm

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lively(inputs: int, outputs: int, stride: int, seed: int) -> RepBlock:
    """Gains of both signs, and statistics that training did not make."""
    generator = torch.Generator().manual_seed(seed)
    block = RepBlock(inputs, outputs, stride)
    for part in block.modules():
        if isinstance(part, nn.Conv2d):
            part.weight.data.normal_(0, 0.3, generator=generator)
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 1, generator=generator)
            part.running_var.uniform_(0.1, 3, generator=generator)
            if part.affine:
                part.weight.data.uniform_(-2, 2, generator=generator)
                part.bias.data.normal_(0, 1, generator=generator)
    return block.eval()


@settings(max_examples=30, deadline=None)
@given(
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    stride=st.sampled_from([1, 2]),
    hw=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    seed=st.integers(0, 1000),
)
def test_a_folded_block_computes_the_same(
    inputs: int, outputs: int, stride: int, hw: tuple[int, int], seed: int
) -> None:
    block = lively(inputs, outputs, stride, seed)
    folded = block.fold_branches()
    x = noise(2, inputs, *hw, seed=seed)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), block(x), rtol=1e-5, atol=1e-5)
        exact, wide = copy.deepcopy(block).double(), x.double()
        torch.testing.assert_close(exact.fold_branches()(wide), exact(wide), rtol=1e-12, atol=1e-12)
    kinds = [type(part) for part in folded.modules() if not list(part.children())]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]


def test_a_channel_that_has_gone_silent_folds_too() -> None:
    block = lively(3, 3, 1, seed=1)
    for norm in (block.conv3[1], block.conv1[1], block.identity):
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.data[1] = norm.bias.data[1] = 0
    assert block.total.running_var is not None
    assert block.total.running_mean is not None
    block.total.running_var[1] = block.total.running_mean[1] = 0
    x = noise(2, 3, 5, 5, seed=2)
    with torch.no_grad():
        found = block.fold_branches()(x)
        torch.testing.assert_close(found, block(x), rtol=1e-5, atol=1e-5)
    assert not found[:, 1].any()


def test_folding_leaves_the_block_alone_and_keeps_the_mode() -> None:
    block = lively(4, 4, 1, seed=3)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    assert not any(part.training for part in block.fold_branches().modules())
    assert all(part.training for part in block.train().fold_branches().modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in block.state_dict().items())
    assert all(p.requires_grad for p in block.fold_branches().parameters())


def test_a_folded_block_normalises_with_the_statistics_of_what_it_sees() -> None:
    """So re-estimating them, as pruning does, on the same images changes next to nothing."""
    block = lively(4, 4, 1, seed=4)
    batches = [noise(8, 4, 9, 9, seed=seed) + 0.5 for seed in range(6)]
    reestimate_batch_norm(block, batches)
    folded = block.fold_branches()
    again = copy.deepcopy(folded)
    reestimate_batch_norm(again, batches)
    for name, tensor in folded.state_dict().items():
        # Not exact: the branches were normalised batch by batch.
        torch.testing.assert_close(again.state_dict()[name], tensor, rtol=0.02, atol=0.02)
    with torch.no_grad():
        sums = torch.cat([folded.get_submodule("conv")(x) for x in batches])
    torch.testing.assert_close(sums.std((0, 2, 3)), folded.get_parameter("conv.1.weight").data, rtol=0.02, atol=0)
    torch.testing.assert_close(sums.mean((0, 2, 3)), folded.get_parameter("conv.1.bias").data, rtol=0, atol=0.05)


def test_statistics_of_the_sum_are_taken_in_training_only_and_change_nothing() -> None:
    block = lively(4, 4, 1, seed=5)
    x = noise(4, 4, 6, 6, seed=6)
    block(x)
    assert block.total.num_batches_tracked == 0
    silent = copy.deepcopy(block).train()
    silent.total.eval()
    block.train()
    first, second = block(x), silent(x)
    assert torch.equal(first, second)
    assert (int(block.total.num_batches_tracked), int(silent.total.num_batches_tracked)) == (1, 0)  # type: ignore[arg-type]
    first.square().sum().backward()
    second.square().sum().backward()
    for one, other in zip(block.parameters(), silent.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


def test_gradients_do_not_depend_on_the_memory_layout() -> None:
    """Of a block on RGB images above all: strided 1x1 convolutions of so few channels corrupt memory on CPUs."""
    block, images = lively(3, 16, 2, seed=7).train(), noise(16, 3, 64, 64, seed=8)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        copied = copy.deepcopy(block).to(memory_format=layout)  # type: ignore[call-overload]
        for _ in range(5):
            copied.zero_grad()
            copied(images.contiguous(memory_format=layout)).square().mean().backward()
        gradients.append([p.grad for p in copied.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
