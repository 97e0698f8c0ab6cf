"""Transfer: what a new network takes over, what of it predicts as before, and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from edgepose.blocks.card import Card, Lineage
from edgepose.blocks.checkpoint import Checkpoint, load_checkpoint
from edgepose.blocks.config import KPEConfig, ORNConfig, spec_of
from edgepose.blocks.kpe import KPENet, build
from edgepose.blocks.transfer import continued, transfer
from edgepose.blocks.zoo import find_checkpoint
from edgepose.data.coco import dataset
from edgepose.data.splits import split_train
from edgepose.errors import CheckpointError
from edgepose.pose import metrics
from edgepose.spec import Keypoints
from edgepose.training.batches import to_input
from edgepose.training.predict import cut_crops, predict

TINY = KPEConfig("tiny", (64, 64), 4, (8, 8, 16, 24), (1, 1, 2, 1), 8)
THREE = Keypoints(("head", "left", "right"), flip_pairs=((1, 2),))
FOUR = Keypoints(("right", "tail", "head", "left"))
BACKBONES = ("residual", "inverted", "reparameterised")
HEADS = ("simcc", "heatmap", "regression")


def changed(config: KPEConfig, **fields: Any) -> KPEConfig:
    return msgspec.structs.replace(config, **fields)


@functools.cache
def trained(config: KPEConfig, keypoints: Keypoints = THREE) -> Checkpoint:
    """A network whose every tensor differs from a fresh one, normalisation statistics too."""
    network = build(config, keypoints, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    network.train()
    for part in network.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.momentum = 0.9
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(4, 3, *config.input_hw, generator=generator))
    lineage = Lineage("train", {}, {"train": "d" * 64}, {})
    return Checkpoint(Card(config.name, config, keypoints, "", (lineage,)), network.state_dict(), "c" * 64)


def outputs(network: KPENet, images: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        found: tuple[Tensor, ...] = network.eval()(images)
    return found


def original(checkpoint: Checkpoint) -> KPENet:
    network = build(checkpoint.card.architecture, checkpoint.card.keypoints)
    network.load_state_dict(checkpoint.tensors)
    return network


def images(config: KPEConfig = TINY) -> Tensor:
    return torch.randn(2, 3, *config.input_hw, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("head", HEADS)
def test_the_same_architecture_computes_the_same(head: str) -> None:
    checkpoint = trained(changed(TINY, head=head))
    network, report = transfer(checkpoint, checkpoint.card.architecture, THREE)
    assert len(report.taken) == len(network.state_dict())
    assert not report.fresh
    for before, after in zip(outputs(original(checkpoint), images()), outputs(network, images()), strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("head", HEADS)
def test_keypoints_go_by_their_names(head: str) -> None:
    checkpoint = trained(changed(TINY, head=head))
    network, report = transfer(checkpoint, checkpoint.card.architecture, FOUR)
    assert report.keypoints == ("right", "head", "left")
    assert report.new_keypoints == ("tail",)
    assert not report.fresh
    for before, after in zip(outputs(original(checkpoint), images()), outputs(network, images()), strict=True):
        assert after.shape[1] == 4
        for name in THREE.names:
            there, here = THREE.names.index(name), FOUR.names.index(name)
            assert torch.allclose(before[:, there], after[:, here], atol=1e-5)


def test_keypoints_that_a_later_stage_reads_go_by_their_names_too() -> None:
    config = changed(TINY, refinements=1)
    checkpoint = trained(config)
    network, report = transfer(checkpoint, config, FOUR)
    before, after = checkpoint.tensors, network.state_dict()
    assert not report.fresh
    there, here = [THREE.names.index(n) for n in THREE.names], [FOUR.names.index(n) for n in THREE.names]
    mix, inner = "block.refinements.0.mix.0.weight", "block.refinements.0.block.conv1.0.weight"
    assert torch.equal(after[mix][here][:, here], before[mix][there][:, there])
    features = [*range(TINY.neck)]
    assert torch.equal(
        after[inner][:, features + [TINY.neck + k for k in here]],
        before[inner][:, features + [TINY.neck + k for k in there]],
    )


@pytest.mark.parametrize("head", ["simcc", "heatmap"])
def test_a_new_refinement_stage_starts_near_the_identity(head: str) -> None:
    checkpoint = trained(changed(TINY, head=head))
    network, report = transfer(checkpoint, changed(TINY, head=head, refinements=2), THREE)
    assert report.identity == ("block.refinements.0", "block.refinements.1")
    for before, after in zip(outputs(original(checkpoint), images()), outputs(network, images()), strict=True):
        assert (before - after).abs().max() < 0.05 * before.abs().max()


def test_an_unknown_keypoint_starts_as_the_mean_or_fresh() -> None:
    checkpoint = trained(TINY)
    rows = checkpoint.tensors["block.head.maps.weight"]
    mean, _ = transfer(checkpoint, TINY, FOUR)
    fresh, _ = transfer(checkpoint, TINY, FOUR, unmatched="fresh", seed=5)
    tail = FOUR.names.index("tail")
    untrained = build(TINY, FOUR, seed=5).state_dict()["block.head.maps.weight"]
    assert torch.allclose(mean.state_dict()["block.head.maps.weight"][tail], rows.mean(0))
    assert torch.equal(fresh.state_dict()["block.head.maps.weight"][tail], untrained[tail])
    assert torch.equal(fresh.state_dict()["block.head.maps.weight"][2], rows[0])


def test_keypoints_without_a_common_name_start_fresh_on_a_trained_backbone() -> None:
    checkpoint = trained(TINY)
    network, report = transfer(checkpoint, TINY, Keypoints(("beak", "claw")))
    assert report.fresh == ("block.head.maps.weight", "block.head.maps.bias")
    assert report.keypoints == ()
    name = "backbone.stages.3.0.conv1.0.weight"
    assert torch.equal(network.state_dict()[name], checkpoint.tensors[name])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_deeper_stages_start_as_the_identity(backbone: str) -> None:
    checkpoint = trained(changed(TINY, backbone=backbone))
    deeper = changed(TINY, backbone=backbone, depths=(2, 1, 4, 2))
    network, report = transfer(checkpoint, deeper, THREE)
    assert report.identity == (
        "backbone.stages.0.1",
        "backbone.stages.2.2",
        "backbone.stages.2.3",
        "backbone.stages.3.1",
    )
    assert all(name.startswith(report.identity) for name in report.fresh)
    for before, after in zip(outputs(original(checkpoint), images()), outputs(network, images()), strict=True):
        assert torch.allclose(before, after, atol=1e-3)


def test_a_new_reparameterised_block_is_near_the_identity_in_training_too() -> None:
    checkpoint = trained(changed(TINY, backbone="reparameterised"))
    network, _ = transfer(checkpoint, changed(TINY, backbone="reparameterised", depths=(1, 1, 3, 1)), THREE)
    stages = [list(stage.children()) for stage in network.train().backbone.stages]
    with torch.no_grad():
        before = network.backbone.stem(torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(4)))
        for part in (*stages[0], *stages[1], *stages[2][:2]):
            before = part(before)
        after = stages[2][2](before)
    assert (after - before).abs().mean() < 0.15 * before.abs().mean()


def test_new_blocks_learn() -> None:
    network, report = transfer(trained(TINY), changed(TINY, depths=(1, 1, 3, 1)), THREE)
    assert report.identity == ("backbone.stages.2.2",)
    sum(output.square().sum() for output in network.train()(images())).backward()
    gradient = network.get_parameter("backbone.stages.2.2.conv2.1.weight").grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("head", ["simcc", "heatmap"])
def test_an_occlusion_robust_block_on_top_starts_as_nothing(head: str) -> None:
    checkpoint = trained(changed(TINY, head=head))
    config = changed(TINY, head=head, orn=ORNConfig(width=16, layers=1))
    network, report = transfer(checkpoint, config, THREE)
    assert report.fresh
    assert not any(name in checkpoint.tensors for name in report.fresh)
    found = outputs(network, images())
    for before, after in zip(outputs(original(checkpoint), images()), found, strict=False):
        assert torch.allclose(before, after, atol=1e-5)
    assert len(found) > len(outputs(original(checkpoint), images()))


@pytest.mark.parametrize(
    ("head", "keypoints", "orn"),
    [
        ("simcc", FOUR, ORNConfig(width=16, layers=1)),
        ("heatmap", THREE, ORNConfig(width=16, layers=1)),
        ("regression", FOUR, None),
    ],
)
def test_networks_change_size_and_keypoints_at_once(head: str, keypoints: Keypoints, orn: ORNConfig | None) -> None:
    config = changed(TINY, head=head, orn=orn)
    larger = changed(config, input_hw=(96, 128))
    network, report = transfer(trained(config), larger, keypoints)
    assert not report.fresh
    assert report.resampled
    shapes = [output.shape[1:] for output in spec_of(larger, keypoints).outputs]
    assert [output.shape[1:] for output in outputs(network, images(larger))] == shapes


def test_another_stride_keeps_what_reads_the_same_map() -> None:
    checkpoint = trained(TINY)
    network, report = transfer(checkpoint, changed(TINY, stride=16), THREE)
    assert not report.fresh
    for kept, origin in ((0, 1), (1, 2)):
        weight = network.state_dict()[f"block.neck.lateral.{kept}.0.weight"]
        assert torch.equal(weight, checkpoint.tensors[f"block.neck.lateral.{origin}.0.weight"])


def test_another_head_keeps_backbone_and_neck() -> None:
    _, report = transfer(trained(TINY), changed(TINY, head="heatmap"), THREE)
    assert report.fresh
    assert all(name.startswith("block.head.") for name in report.fresh)


def test_a_backbone_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CheckpointError, match="of which nothing fits"):
        transfer(trained(TINY), changed(TINY, backbone="inverted"), THREE)
    with pytest.raises(CheckpointError, match="the same widths"):
        transfer(trained(TINY), changed(TINY, stem=6, widths=(10, 12, 18, 26)), THREE)


def test_a_compressed_source_is_refused() -> None:
    source = trained(TINY)
    pruned = Checkpoint(msgspec.structs.replace(source.card, plan={"groups": []}), source.tensors, source.digest)
    with pytest.raises(CheckpointError, match="a compressed network"):
        transfer(pruned, TINY, THREE)


def test_a_card_of_other_weights_is_refused() -> None:
    source = trained(TINY)
    with pytest.raises(CheckpointError, match="not those of its architecture"):
        transfer(Checkpoint(source.card, {"backbone.odd": torch.zeros(1)}, ""), TINY, THREE)


def test_the_lineage_goes_on() -> None:
    source = trained(TINY)
    _, report = transfer(source, changed(TINY, depths=(1, 1, 3, 1)), FOUR)
    lineage = continued(source, report, TINY)
    assert [entry.stage for entry in lineage] == ["train", "transfer"]
    assert lineage[-1].inputs == {"checkpoint": source.digest}
    assert lineage[-1].report["new_keypoints"] == ["tail"]
    raw = msgspec.json.encode(lineage)
    assert msgspec.json.encode(msgspec.json.decode(raw, type=tuple[Lineage, ...])) == raw
    assert "2 tensors matched" in str(report)
    assert "keypoints it does not know: tail" in str(report)


def test_a_larger_input_predicts_about_the_same_on_photographs(real_data: Path) -> None:
    source = load_checkpoint(find_checkpoint("kpe-t"))
    people = split_train(dataset(real_data / "lspet", "train"))[1].sample(24, 0)
    truth = np.stack([person.keypoints for person in people.persons])
    figures, peaks = {}, {}
    for side in (160, 192):
        config = changed(source.card.architecture, input_hw=(side, side))
        network, _ = transfer(source, config, source.card.keypoints)
        crops = cut_crops(people, spec_of(config, source.card.keypoints))
        found = predict(network.eval(), spec_of(config, source.card.keypoints), crops)
        figures[side] = metrics.pooled("limb12_extent_0.1", metrics.measure(found, truth, people.keypoints))
        photographs = to_input(torch.from_numpy(crops.pixels[:8]), spec_of(config, source.card.keypoints))
        peaks[side] = outputs(network, photographs)[0].std().item()
    assert figures[160] > 0.25
    assert figures[192] > figures[160] - 0.05
    assert peaks[192] == pytest.approx(peaks[160], rel=0.35)
