"""What every kind of backbone promises, and how it starts."""

from __future__ import annotations

from typing import get_args, get_type_hints

import msgspec
import pytest
import torch
from torch import nn

from edgepose.blocks.backbones import InvertedBackbone, ReparameterisedBackbone, ResidualBackbone, build_backbone
from edgepose.blocks.config import PRESETS, KPEConfig
from edgepose.blocks.kpe import build
from edgepose.compress.fold import fold_branches
from edgepose.compress.macs import count_macs
from edgepose.data.render import LSP14
from edgepose.spec import Keypoints

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("residual", "inverted", "reparameterised")
THREE = Keypoints(("head", "left", "right"))


def tiny(kind: str) -> KPEConfig:
    config = KPEConfig("tiny", (64, 96), 4, (8, 12, 16, 20), (1, 2, 1, 2), 8)
    return msgspec.convert({**msgspec.to_builtins(config), "backbone": kind}, KPEConfig)


def test_every_kind_of_the_configuration_has_its_backbone() -> None:
    assert get_args(get_type_hints(KPEConfig)["backbone"]) == KINDS
    kinds = [type(build_backbone(tiny(kind))) for kind in KINDS]
    assert kinds == [ResidualBackbone, InvertedBackbone, ReparameterisedBackbone]


@pytest.mark.parametrize("kind", KINDS)
def test_features_halve_from_stride_4(kind: str) -> None:
    backbone = build_backbone(tiny(kind)).eval()
    features = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(f.shape[1:]) for f in features] == [(8, 16, 24), (12, 8, 12), (16, 4, 6), (20, 2, 3)]
    assert backbone.channels == (8, 12, 16, 20)


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_learns(kind: str) -> None:
    network = build(tiny(kind), THREE).train()
    outputs = network(torch.randn(3, 3, 64, 96))
    sum((o * torch.randn_like(o)).sum() for o in outputs).backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_network_neither_fades_nor_explodes(kind: str) -> None:
    """In training mode, from image to coarsest map; and no filter is so small that its first step turns it around."""
    config = msgspec.structs.replace(tiny(kind), widths=(16, 16, 16, 16), depths=(3, 3, 3, 3))
    network = build(config, THREE).train()
    features = network.backbone(torch.randn(8, 3, 128, 128))
    assert all(0.3 < f.std() < 3 for f in features)
    for part in network.backbone.modules():
        if isinstance(part, nn.Conv2d):
            expected = (2 * part.groups / (part.out_channels * part.kernel_size[0] ** 2)) ** 0.5
            assert part.weight.std().item() == pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_normalisation_of_residual_branches_starts_small_and_no_other(kind: str) -> None:
    network = build(tiny(kind), THREE)
    small = [
        name
        for name, part in network.named_modules()
        if isinstance(part, nn.BatchNorm2d) and part.affine and bool((part.weight == 0.2).all())
    ]
    expected = {
        "residual": [f"backbone.stages.{i}.{j}.conv2.1" for i, j in ((0, 0), (1, 0), (1, 1), (2, 0), (3, 0), (3, 1))],
        "inverted": [f"backbone.stages.{i}.1.project.1" for i in (1, 3)],
        "reparameterised": [],
    }
    assert small == expected[kind]


def test_names_of_the_residual_network_never_change() -> None:
    """The zoo's checkpoints go by them."""
    names = list(build_backbone(tiny("residual")).state_dict())
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    stem = [f"stem.{i}.{rest}" for i in (0, 2) for rest in ("0.weight", *(f"1.{n}" for n in norm))]
    assert names[:12] == stem
    parts = ("conv1", "conv2", "shortcut")
    first = [f"stages.1.0.{part}.{rest}" for part in parts for rest in ("0.weight", *(f"1.{n}" for n in norm))]
    assert [name for name in names if name.startswith("stages.1.0.")] == first
    assert {name.split(".")[0] for name in names} == {"stem", "stages"}


@pytest.mark.parametrize("name", ["kpe-t-inverted", "kpe-t-rep"])
def test_presets_of_other_kinds_cost_what_kpe_t_does(name: str) -> None:
    def macs(config: KPEConfig) -> int:
        return count_macs(fold_branches(build(config, LSP14)), torch.zeros(1, 3, *config.input_hw)).total

    assert macs(PRESETS[name]) == pytest.approx(macs(PRESETS["kpe-t"]), rel=0.15)
    assert PRESETS[name].name == name
    assert PRESETS[name].backbone != PRESETS["kpe-t"].backbone


def test_a_card_from_before_there_were_kinds_means_the_residual_network() -> None:
    fields = msgspec.to_builtins(PRESETS["kpe-t"])
    del fields["backbone"]
    assert msgspec.convert(fields, KPEConfig) == PRESETS["kpe-t"]
