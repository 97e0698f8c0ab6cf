"""The networks: budgets, shapes that follow the specification, operators, initialisation."""

from __future__ import annotations

import msgspec
import pytest
import torch
from torch import nn

from edgepose.blocks.backbones import ResidualBackbone
from edgepose.blocks.config import PRESETS, KPEConfig, spec_of
from edgepose.blocks.kpe import KPEBlock, SimCCHead, build
from edgepose.blocks.orn import Hide
from edgepose.compress.macs import count_macs
from edgepose.compress.protected import PROTECTED
from edgepose.data.render import LSP14
from edgepose.errors import SpecError
from edgepose.spec import Heatmap, Keypoints, ModelSpec, Regression, SimCC

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = KPEConfig("tiny", (64, 96), 4, (8, 8, 16, 16), (1, 1, 1, 2), 8)
THREE = Keypoints(("head", "left", "right"))


@pytest.mark.parametrize(("name", "gmac"), [("kpe-t", 0.4), ("kpe-s", 0.8)])
def test_presets_keep_their_budgets(name: str, gmac: float) -> None:
    config = PRESETS[name]
    network = build(config, LSP14)
    found = count_macs(network, torch.zeros(1, 3, *config.input_hw)).total / 1e9
    assert 0.3 * gmac < found <= gmac
    # In FP16 the zoo's files stay below 16 MB.
    assert sum(p.numel() for p in network.parameters()) * 2 < 15e6


@pytest.mark.parametrize("stride", [4, 8, 16, 32])
@pytest.mark.parametrize("head", ["simcc", "heatmap", "regression"])
def test_outputs_follow_the_specification(head: str, stride: int) -> None:
    config = msgspec.structs.replace(TINY, head=head, stride=stride)
    spec = spec_of(config, THREE)
    images = torch.randn(2, *spec.inputs[0].shape[1:])  # type: ignore[arg-type]
    outputs = build(config, THREE).eval()(images)
    assert isinstance(outputs, tuple)
    assert [tuple(o.shape) for o in outputs] == [(2, *o.shape[1:]) for o in spec.outputs]
    assert all(torch.isfinite(o).all() for o in outputs)


def test_specifications_by_hand() -> None:
    simcc = spec_of(msgspec.structs.replace(TINY, split_ratio=1.5), THREE)
    assert simcc.decoder == SimCC(split_ratio=1.5)
    assert [(o.name, o.shape) for o in simcc.outputs] == [
        ("simcc_x", ("batch", 3, 144)),
        ("simcc_y", ("batch", 3, 96)),
    ]
    assert simcc.inputs[0].shape == ("batch", 3, 64, 96)
    heat = spec_of(msgspec.structs.replace(TINY, head="heatmap", stride=4), THREE)
    assert heat.decoder == Heatmap(stride=4.0)
    assert [(o.name, o.shape) for o in heat.outputs] == [("heatmap", ("batch", 3, 16, 24))]
    assert msgspec.json.decode(msgspec.json.encode(heat), type=ModelSpec) == heat
    said = spec_of(msgspec.structs.replace(TINY, head="regression"), THREE)
    assert said.decoder == Regression((64, 96))
    assert [(o.name, o.shape) for o in said.outputs] == [("keypoints", ("batch", 3, 2)), ("scales", ("batch", 3, 2))]


@pytest.mark.parametrize("head", ["simcc", "heatmap"])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_only_operators_that_every_backend_quantises(name: str, head: str) -> None:
    network = build(msgspec.structs.replace(PRESETS[name], head=head), LSP14)
    parts = [part for part in network.modules() if not isinstance(part, nn.ModuleList)]
    leaves = {type(part) for part in parts if not list(part.children())}
    floats = {entry.module for entry in PROTECTED} | {Hide}  # the latter does something in training only
    assert leaves - floats <= {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Linear, nn.Identity}
    convolutions = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    assert all(c.groups in (1, c.in_channels) for c in convolutions)  # plain or depthwise, none grouped


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    first, second, third = (build(TINY, THREE, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["backbone.stem.0.0.weight"], third["backbone.stem.0.0.weight"])


def test_building_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build(TINY, THREE, seed=1)
    assert torch.equal(torch.rand(3), expected)
    with pytest.raises(TypeError):
        build(msgspec.structs.replace(TINY, widths=(8, 8, 8, None)), THREE, seed=1)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("input_hw", [(64, 100), (48, 64), (33, 32)])
def test_input_sizes_are_multiples_of_32(input_hw: tuple[int, int]) -> None:
    with pytest.raises(SpecError, match=r"tiny: input_hw: found .*multiples of 32"):
        build(msgspec.structs.replace(TINY, input_hw=input_hw), THREE)


@pytest.mark.parametrize(
    "change", [{"widths": [8, 8, 8]}, {"stride": 5}, {"head": "offset"}, {"stem": 0}, {"refinements": -1}]
)
def test_malformed_configurations_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(msgspec.to_builtins(TINY) | change, KPEConfig)


def test_features_halve_from_stride_4() -> None:
    backbone = ResidualBackbone(4, (8, 12, 16, 20), (1, 2, 1, 1)).eval()
    features = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape[1:]) for f in features] == [(8, 16, 24), (12, 8, 12), (16, 4, 6), (20, 2, 3)]
    assert backbone.channels == (8, 12, 16, 20)


def test_the_block_sits_on_any_backbones_maps() -> None:
    block = KPEBlock((5, 7), 3, (6, 4), bins_hw=(20, 10), width=8).eval()
    x, y = block([torch.randn(2, 5, 6, 4), torch.randn(2, 7, 3, 2)])
    assert (x.shape, y.shape) == ((2, 3, 10), (2, 3, 20))
    (heat,) = KPEBlock((5, 7), 3, (6, 4), bins_hw=None).eval()([torch.randn(2, 5, 6, 4), torch.randn(2, 7, 3, 2)])
    assert heat.shape == (2, 3, 6, 4)


def test_a_fresh_simcc_head_reads_a_cell_where_it_lies() -> None:
    head = build(TINY, THREE).block.head
    assert isinstance(head, SimCCHead)
    maps = torch.zeros(1, 1, 8, 12)
    maps[0, 0, 5, 2] = 1
    x, y = (layer(maps.flatten(2)).argmax().item() for layer in (head.x, head.y))
    assert abs(x - 2.5 * 16) <= 8  # 12 cells of 16 bins
    assert abs(y - 5.5 * 16) <= 8


@pytest.mark.parametrize("head", ["simcc", "heatmap", "regression"])
def test_every_weight_learns(head: str) -> None:
    network = build(msgspec.structs.replace(TINY, head=head), THREE).train()
    outputs = network(torch.randn(3, 3, 64, 96))
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []
