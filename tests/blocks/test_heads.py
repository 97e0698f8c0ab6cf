"""Heads and refinement stages: how they start, what they cost, and that they go through pruning and quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgepose.blocks.backbones import initialise
from edgepose.blocks.config import KPEConfig, spec_of
from edgepose.blocks.heads import RegressionHead, SimCCHead
from edgepose.blocks.kpe import KPEBlock, KPENet, build
from edgepose.blocks.losses import make_loss
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.macs import count_macs
from edgepose.compress.plan import PruneConfig, apply_pruning
from edgepose.compress.prune import plan_pruning
from edgepose.compress.quantise import convert, prepare
from edgepose.errors import SpecError
from edgepose.export.engine import int8_share
from edgepose.export.onnx import onnx_from_torch
from edgepose.export.qdq import quantised_onnx
from edgepose.pose.codec import encode_regression, encode_simcc
from edgepose.runtime import open_session
from edgepose.spec import Keypoints, Regression, SimCC

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = KPEConfig("tiny", (32, 64), 8, (8, 8, 16, 16), (1, 1, 1, 1), 8)
THREE = Keypoints(("head", "left", "right"))
Head = Literal["simcc", "heatmap", "regression"]


def network(head: Head, refinements: int = 0, seed: int = 0) -> KPENet:
    return build(msgspec.structs.replace(TINY, head=head, refinements=refinements), THREE, seed=seed)


def photographs(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 32, 64, generator=torch.Generator().manual_seed(seed))


def trained(net: KPENet) -> KPENet:
    """Weights and statistics as no initialisation leaves them, so that every part has a say."""
    generator = torch.Generator().manual_seed(1)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.1, generator=generator)
            part.running_var.uniform_(0.5, 1.5, generator=generator)
    for name, part in net.named_modules():
        if name.endswith(("head.maps", "head.scales")):
            part.get_parameter("weight").data.normal_(0, 0.3, generator=generator)
    return net.eval()


@torch.no_grad()
def test_coordinates_are_centroids() -> None:
    head = network("regression").block.head
    assert isinstance(head, RegressionHead)
    maps = torch.zeros(1, 3, 4, 8)
    maps[0, 1, 0, 7] = 50
    maps[0, 2, 3, 0], maps[0, 2, 3, 2] = 50, 50 + np.log(3)  # three times as probable
    shares, scales = head.read(maps)
    assert shares[0].flatten().tolist() == pytest.approx(
        [0.5, 0.5, 7.5 / 8, 0.5 / 4, (0.5 + 3 * 2.5) / 4 / 8, 3.5 / 4], abs=1e-4
    )
    assert scales.flatten().tolist() == pytest.approx([0.15] * 6, abs=0.02)


@torch.no_grad()
def test_mixed_precision_does_not_round_coordinates() -> None:
    net = trained(network("regression"))
    with torch.autocast("cpu", torch.bfloat16):
        shares, _ = net(photographs(8))
    assert shares.dtype == torch.float32
    assert not torch.equal(shares, shares.bfloat16().float())


def test_direct_regression_learns() -> None:
    # A bright dot on noise; the middle of the crop is 0.25 off on average.
    net, spec = network("regression").train(), spec_of(msgspec.structs.replace(TINY, head="regression"), THREE)
    loss = make_loss(spec)
    optimizer = torch.optim.AdamW([*net.parameters(), *loss.parameters()], lr=1e-2)
    assert isinstance(spec.decoder, Regression)
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(64.0), indexing="ij")
    errors = []
    for _ in range(40):
        points = torch.rand(8, 1, 2, generator=generator) * torch.tensor([63.0, 31.0])
        dots = torch.exp(-((x - points[..., :1]) ** 2 + (y - points[..., 1:]) ** 2) / 18)[:, None]
        images = 3 * dots.expand(-1, 3, -1, -1) + 0.3 * torch.randn(8, 3, 32, 64, generator=generator)
        target = torch.from_numpy(encode_regression(points.expand(-1, 3, -1).numpy(), spec.decoder))
        outputs = net(images)
        value = loss(outputs, (target,), torch.ones(8, 3))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        errors.append((outputs[0] - target).abs().mean().item())
    assert np.mean(errors[-5:]) < 0.6 * np.mean(errors[:3])
    assert value.item() < 0


@pytest.mark.parametrize("head", ["simcc", "heatmap"])
@torch.no_grad()
def test_later_stages_start_close_to_the_first(head: Head) -> None:
    images, net = photographs(), network(head, refinements=2).eval()
    first, second, third = (stage.outputs for stage in net.stages(images))
    assert len(first) == (2 if head == "simcc" else 1)
    for one, other, last in zip(first, second, third, strict=True):
        assert not torch.equal(one, other)
        unit = one.std() if head == "simcc" else 1.0  # heat maps begin empty, and the labels' peaks are 1
        assert (one - other).abs().max() < 0.1 * unit
        assert (one - last).abs().max() < 0.2 * unit
    assert all(torch.equal(a, b) for a, b in zip(net(images), third, strict=True))
    alone = network(head).eval()
    alone.load_state_dict({name: t for name, t in net.state_dict().items() if "refinements" not in name})
    assert torch.equal(first[0], alone(images)[0]), "the first stage is the network without the others"


@pytest.mark.parametrize("head", ["simcc", "heatmap"])
def test_every_stage_learns_and_hears_of_the_one_before(head: Head) -> None:
    net = network(head, refinements=2).train()
    stages = net.stages(photographs(3))
    torch.stack([(o * torch.randn_like(o)).sum() for stage in stages for o in stage.outputs]).sum().backward()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(stage.maps is not None and stage.maps.shape == (3, 3, 4, 8) for stage in stages)
    net.zero_grad()
    net.stages(photographs(3))[-1].outputs[0].square().sum().backward()
    assert net.block.head.maps.weight.grad is not None


@torch.no_grad()
def test_what_stages_see_of_maps_is_bounded() -> None:
    stage = trained(network("simcc", refinements=1)).double().block.refinements[0]
    features, maps = torch.rand(1, 8, 4, 8).double(), torch.randn(1, 3, 4, 8).double()
    small, large, huge = (stage(features, scale * maps) - scale * maps for scale in (1.0, 1e4, 1e8))
    assert torch.allclose(large, huge, atol=1e-5)
    assert not torch.allclose(small, large, atol=1e-2)


def test_what_a_stage_costs_can_be_read() -> None:
    net = network("simcc", refinements=2)
    macs = count_macs(net, photographs(1))
    cells, channels, keypoints = 4 * 8, 8, 3
    wide = channels + keypoints
    stage = cells * (keypoints**2 + wide * channels * 9 + channels**2 * 9 + wide * channels + channels * keypoints)
    reading = keypoints * cells * (64 + 128)
    assert macs.within("block.refinements.0") == stage, "the first two stages are not read"
    assert macs.within("block.refinements.1") == stage + reading
    assert macs.within("block.refinements") == 2 * stage + reading
    assert macs.within("block.ref") == 0
    assert macs.within("block.head") == cells * channels * keypoints
    assert macs.total == count_macs(network("simcc"), photographs(1)).total + 2 * stage


def test_stages_train_under_intermediate_supervision() -> None:
    net = network("simcc", refinements=1).train()
    spec = spec_of(msgspec.structs.replace(TINY, refinements=1), THREE)
    assert isinstance(spec.decoder, SimCC)
    loss = make_loss(spec)
    points = np.array([[[10.0, 10], [50, 20], [30, 25]]] * 4, np.float32)
    targets = [torch.from_numpy(t) for t in encode_simcc(points, (32, 64), spec.decoder, 3.0)]
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    values: list[list[float]] = []
    for _ in range(12):
        losses = [loss(s.outputs, targets, torch.ones(4, 3), maps=s.maps) for s in net.stages(photographs(4))]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()
        values.append([value.item() for value in losses])
    assert values[0][1] == pytest.approx(values[0][0], rel=1e-2)
    assert values[-1][1] < values[-1][0] < values[0][0]


def test_coordinates_cannot_be_refined() -> None:
    with pytest.raises(SpecError, match=r"refinements: found 1 with a regression head.*simcc or heatmap"):
        network("regression", refinements=1)


def test_bins_belong_to_simcc() -> None:
    with pytest.raises(SpecError, match=r"bins_hw: found \(8, 8\) for a heatmap head"):
        KPEBlock((4,), 3, (4, 4), bins_hw=(8, 8), head="heatmap")
    with pytest.raises(SpecError, match=r"bins_hw: found None for a simcc head"):
        KPEBlock((4,), 3, (4, 4), bins_hw=None, head="simcc")


def test_a_block_of_its_own_starts_like_a_networks() -> None:
    block = KPEBlock((5, 7), 9, (6, 4), bins_hw=(48, 32), width=8)  # an animal, say
    block.make_refined(1)
    initialise(block)
    block.start()
    assert isinstance(block.head, SimCCHead)
    features = [torch.randn(2, 5, 6, 4), torch.randn(2, 7, 3, 2)]
    first, last = block.eval().stages(features)
    assert last.outputs[0].shape == (2, 9, 32)
    assert (first.outputs[0] - last.outputs[0]).abs().max() < 0.1 * first.outputs[0].std()


CASES: list[tuple[Head, int]] = [("simcc", 1), ("heatmap", 1), ("regression", 0)]


@pytest.mark.parametrize(("head", "refinements"), CASES)
def test_heads_and_stages_survive_pruning(head: Head, refinements: int) -> None:
    net = trained(network(head, refinements))
    config = PruneConfig(ratio=0.3, importance="l2", round_to=1, min_channels=2)
    plan = plan_pruning(net, photographs(1), config)
    pruned = apply_pruning(net, plan)
    assert isinstance(pruned, KPENet)
    assert plan.macs_after < 0.8 * plan.macs_before
    touched = {layer.name for layer in plan.layers}
    assert all(any(name.startswith(f"block.refinements.{i}.block") for name in touched) for i in range(refinements))
    images = photographs()
    stages = [stage.outputs for stage in pruned.stages(images)]
    assert len(stages) == refinements + 1
    assert [o.shape for o in stages[-1]] == [o.shape for o in net(images)]
    assert all(torch.equal(a, b) for a, b in zip(pruned(images), stages[-1], strict=True))


@pytest.mark.parametrize(("head", "refinements"), CASES)
def test_quantised_engines_agree_with_the_fake_quantised_network(head: Head, refinements: int, tmp_path: Path) -> None:
    config = msgspec.structs.replace(TINY, head=head, refinements=refinements)
    spec, net = spec_of(config, THREE), trained(network(head, refinements))
    coarse = torch.randn(12, 3, 8, 16, generator=torch.Generator().manual_seed(2))
    smooth = torch.nn.functional.interpolate(coarse, scale_factor=4.0, mode="bilinear")
    folded = fold_batch_norms(net)
    assert isinstance(folded, KPENet)
    fake = prepare(folded, [smooth[:8]])
    assert isinstance(fake, KPENet)
    plain, ranges = convert(fake)
    onnx_from_torch(plain, spec, tmp_path / "float.onnx", ranges=ranges)
    quantised_onnx(tmp_path / "float.onnx", ranges, tmp_path / "int8.onnx", dialect="u8s8")
    feeds = smooth[8:].contiguous()
    found = open_session(tmp_path / "int8.onnx", "onnxruntime", threads=1, precision="int8").infer(
        {"image": feeds.numpy()}
    )
    with torch.no_grad():
        expected = fake(feeds)
        exact = net(feeds)
    for output, reference, unquantised in zip(spec.outputs, expected, exact, strict=True):
        magnitude = (reference.max() - reference.min()).item()
        gap = np.abs(found[output.name] - reference.numpy()) / magnitude
        assert gap.mean() < 0.02
        assert gap.max() < 0.1
        assert (reference - unquantised).abs().mean().item() / magnitude < 0.05
    assert int8_share(tmp_path / "int8.onnx", "onnxruntime").share == 1.0
    (last,) = fake.stages(feeds)
    assert last.maps is None
    assert torch.equal(last.outputs[0], expected[0]), "its quantisers are part of what it is trained on"
