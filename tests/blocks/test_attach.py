"""Attaching a block to a backbone: the graph is cut where it is told to be, and wrong names say what there is."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.attach import Attached, attach, describe, feature_shapes
from edgepose.blocks.backbones import ReparameterisedBackbone, RepBlock, ResidualBackbone
from edgepose.blocks.kpe import KPEBlock
from edgepose.compress.fold import fold_batch_norms
from edgepose.errors import SpecError
from edgepose.spec import Keypoints, Preprocess, SimCC

HW = (64, 96)
THREE = Keypoints(("head", "left", "right"))


class Classifier(nn.Module):
    """A user's network: stages, an `nn.Sequential` inside, and a tail that no feature needs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU())
        self.layer1 = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(6, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.stem(images)))
        x = F.dropout(x.mean((2, 3)), 0.5, self.training)  # in the tail: what is cut off may do as it likes
        classes: Tensor = self.fc(self.drop(x))
        return classes


def block(channels: tuple[int, ...] = (6, 8), map_hw: tuple[int, int] = (16, 24)) -> KPEBlock:
    return KPEBlock(channels, 3, map_hw, bins_hw=(128, 192), width=8)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *HW, generator=torch.Generator().manual_seed(1))


def test_features_are_listed_with_their_shapes_and_nothing_is_left_behind() -> None:
    backbone = Classifier().train()
    shapes = feature_shapes(backbone, HW)
    assert shapes["stem"] == (4, 32, 48)
    assert shapes["layer1"] == shapes["layer1.2"] == (6, 16, 24)
    assert shapes["layer2"] == (8, 8, 12)
    assert shapes["output"] == (5,)
    assert backbone.training
    assert int(backbone.layer1.get_buffer("1.num_batches_tracked")) == 0
    assert not any(part._forward_hooks for part in backbone.modules())


def test_attached_block_computes_what_hooks_would_show() -> None:
    torch.manual_seed(0)
    backbone, head = Classifier().eval(), block().eval()
    network = attach(backbone, head, out=("layer1", "layer2"), input_hw=HW).eval()
    with torch.no_grad():
        fine = backbone.layer1(backbone.stem(images()))
        expected = head([fine, backbone.layer2(fine)])
        found = network(images())
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_parts_are_shared_keep_their_names_and_unused_ones_are_gone() -> None:
    backbone = Classifier()
    network = attach(backbone, block(), out=("layer1", "layer2"), input_hw=HW)
    assert network.get_parameter("backbone.layer1.0.weight") is backbone.layer1[0].weight
    names = {name.split(".")[1] for name in network.state_dict() if name.startswith("backbone.")}
    assert names == {"stem", "layer1", "layer2"}
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in network.modules())


def test_results_of_the_backbone_are_kept_behind_the_blocks_outputs() -> None:
    torch.manual_seed(0)

    class TwoResults(Classifier):
        def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            x = self.layer2(self.layer1(self.stem(images)))
            return {"classes": self.fc(x.mean((2, 3))), "map": x}

    backbone = TwoResults().eval()
    network = attach(
        backbone, block(), out=("layer1", "layer2"), input_hw=HW, keep=("output[classes]", "stem.0")
    ).eval()
    with torch.no_grad():
        x, y, classes, first = network(images())
        assert torch.equal(classes, backbone(images())["classes"])
        assert torch.equal(first, backbone.stem[0](images()))
    assert (x.shape, y.shape) == ((2, 3, 192), (2, 3, 128))


def test_features_inside_blocks_and_in_lists_are_reached() -> None:
    torch.manual_seed(0)

    class Wrapped(nn.Module):
        """Calls a backbone that returns a list, and needs only a part of it."""

        def __init__(self) -> None:
            super().__init__()
            self.body = ResidualBackbone(4, (6, 8, 8, 8), (1, 1, 1, 1))

        def forward(self, images: Tensor) -> Tensor:
            maps: Tensor = self.body(images)[-1]
            return maps.mean((2, 3))

    wrapped = Wrapped().eval()
    assert feature_shapes(wrapped, HW)["body[1]"] == (8, 8, 12)
    from_list = attach(wrapped, block(), out=("body[0]", "body[1]"), input_hw=HW).eval()
    inside = attach(wrapped, from_list.block, out=("body.stages.0", "body.stages.1.0.relu2"), input_hw=HW).eval()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(from_list(images()), inside(images()), strict=True))
    assert not any(name.startswith("backbone.body.stages.2") for name in inside.state_dict())


def test_blocks_keep_what_they_do_in_training() -> None:
    backbone = ReparameterisedBackbone(4, (6, 8, 8, 8), (1, 2, 1, 1))
    network = attach(backbone, block(), out=("stages.0", "stages.1"), input_hw=HW).train()
    seen = [part for part in network.modules() if isinstance(part, RepBlock)]
    network(images())
    assert [int(part.total.get_buffer("num_batches_tracked")) for part in seen] == [1] * 4
    folded = fold_batch_norms(network)
    with torch.no_grad():
        for before, after in zip(network.eval()(images()), folded(images()), strict=True):
            assert torch.allclose(before, after, atol=1e-4)


def test_it_trains_and_survives_copying_and_exporting() -> None:
    network = attach(Classifier(), block(), out=("layer1", "layer2"), input_hw=HW).train()
    sum(output.square().mean() for output in network(images())).backward()
    assert network.get_parameter("backbone.stem.0.weight").grad is not None
    copied = copy.deepcopy(network).eval()
    program = torch.export.export(copied, (images(),), strict=False)
    with torch.no_grad():
        for ours, theirs in zip(copied(images()), program.module()(images()), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        (("layer1", "layer3"), "did you mean 'layer2'"),
        (("layer1", "layer3"), "layer2 8x8x12"),
        ((), "names of features: stem.0 4x32x48"),
        (("output",), "shape \\(5,\\) behind the batch, expected a feature map"),
        (("layer2", "layer1"), "finest first"),
        (("stem", "layer2"), "maps of 32x48 and 8x12"),
        (("stem", "layer1"), "found a block for maps of 6, 8 channels, expected 4, 6, as stem, layer1 have"),
    ],
)
def test_names_that_do_not_fit_say_what_would(out: tuple[str, ...], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        attach(Classifier(), block(), out=out, input_hw=HW)


def test_a_block_for_another_input_size_is_refused() -> None:
    with pytest.raises(SpecError, match="build it with map_hw=\\(16, 24\\)"):
        attach(Classifier(), block(map_hw=(8, 8)), out=("layer1", "layer2"), input_hw=HW)


class Depends(Classifier):
    """Control flow that depends on values, around what is named."""

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.layer1(self.stem(images))
        return self.layer2(x) if x.sum() > 0 else x


class Differs(Classifier):
    """A forward that drops features in training only, before what is named."""

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = self.stem(images)
        if self.training:
            x = x * 2
        return self.layer2(self.layer1(x)).mean((2, 3))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("backbone", "words"),
    [(Depends, "cannot trace"), (Differs, "other things in training")],
)
def test_a_backbone_that_cannot_be_cut_is_refused(backbone: Callable[[], nn.Module], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        attach(backbone(), block(), out=("layer1", "layer2"), input_hw=HW)


def test_images_that_the_backbone_cannot_take_are_refused() -> None:
    with pytest.raises(SpecError, match="running the backbone"):
        feature_shapes(nn.Sequential(nn.Flatten(), nn.Linear(7, 3)), HW)


def test_the_specification_follows_from_a_run() -> None:
    network = attach(Classifier(), block(), out=("layer1", "layer2"), input_hw=HW, keep=("stem",))
    spec = describe(network, "mine", THREE, Preprocess(HW), SimCC(), extra=("edges",))
    assert [(output.name, output.shape) for output in spec.outputs] == [
        ("simcc_x", ("batch", 3, 192)),
        ("simcc_y", ("batch", 3, 128)),
        ("edges", ("batch", 4, 32, 48)),
    ]
    assert spec.inputs[0].shape == ("batch", 3, *HW)
    with pytest.raises(SpecError, match=r"found 3 .* expected 2"):
        describe(network, "mine", THREE, Preprocess(HW), SimCC())
    with pytest.raises(SpecError, match="something for each keypoint"):
        describe(network, "mine", Keypoints(("a", "b")), Preprocess(HW), SimCC(), extra=("edges",))


def test_every_stage_of_the_block_is_there_for_training() -> None:
    torch.manual_seed(0)
    refined = KPEBlock((6, 8), 3, (16, 24), bins_hw=(128, 192), width=8)
    refined.make_refined(1)
    network = attach(Classifier(), refined, out=("layer1", "layer2"), input_hw=HW, keep=("stem",)).eval()
    first, last = network.stages(images())
    assert len(first.outputs) == 2
    assert all(torch.equal(a, b) for a, b in zip(last.outputs, network(images()), strict=True))


def test_a_block_may_return_a_single_tensor() -> None:
    class Sum(nn.Module):
        def forward(self, maps: list[Tensor]) -> Tensor:
            return maps[0].mean((2, 3))

    network = attach(Classifier(), Sum(), out=("layer2",), input_hw=HW)
    assert isinstance(network, Attached)
    assert [output.shape for output in network(images())] == [(2, 8)]
