"""Every importance on small copies of every network there is: it runs, costs what was predicted, and is exact.

The copies have the depths, backbones and blocks of the presets; only channels and input are fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import get_args

import msgspec
import pytest
import torch
from torch import Tensor, nn

from edgepose.blocks.config import PRESETS, ORNConfig
from edgepose.blocks.kpe import build
from edgepose.compress.depth import choose_blocks, residual_blocks
from edgepose.compress.fold import fold_branches
from edgepose.compress.importance import channel_scores
from edgepose.compress.macs import count_macs
from edgepose.compress.plan import Importance, PruneConfig, apply_pruning, without_blocks
from edgepose.compress.prune import Ranking, plan_at, rank_channels, reestimate_batch_norm
from edgepose.errors import RecipeError
from edgepose.spec import Keypoints

pytestmark = pytest.mark.usefixtures("one_thread")

NETWORKS = ("kpe-s", "kpe-t", "kpe-t-inverted", "kpe-t-rep", "orn-s")
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@cache
def network(name: str) -> nn.Module:
    """A small copy with weights that make every channel count, occlusion-robust blocks included; not to be changed."""
    preset = PRESETS[name]
    smaller = {"input_hw": (32, 32), "stem": 8, "widths": (8, 8, 16, 16), "neck": 8}
    orn = None if preset.orn is None else ORNConfig(16, preset.orn.layers)
    model = build(msgspec.structs.replace(preset, **smaller, orn=orn), Keypoints(("head", "left", "right")), seed=0)
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.3, generator=generator)
        elif isinstance(part, nn.Linear) and not part.weight.any():  # corrections start at nothing
            part.weight.data.normal_(0, 0.1, generator=generator)
    reestimate_batch_norm(model, [IMAGES])
    return model.eval()


def losses(model: nn.Module) -> Iterator[Tensor]:
    for image in IMAGES:
        yield sum((out.square().mean() for out in model(image[None])), torch.zeros(()))


def answers(model: nn.Module) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = model.eval()(IMAGES)
    return found


@cache
def ranked(name: str) -> Ranking:
    wanted = PruneConfig(ratio=0, importance="taylor", round_to=2, min_channels=2)
    return rank_channels(network(name), IMAGES, wanted, losses=losses)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("importance", get_args(Importance))
def test_every_importance_prunes_every_network_exactly(name: str, importance: Importance) -> None:
    ranking = ranked(name)
    if importance != "taylor":  # the groups are the same, and finding them is most of the work
        config = msgspec.structs.replace(ranking.config, importance=importance)
        scores = tuple(channel_scores(ranking.work, g, importance, gates={}, seed=0) for g in ranking.groups)
        ranking = replace(ranking, config=config, scores=scores)
    plan = plan_at(ranking, 0.4)
    model = network(name)
    pruned, full = apply_pruning(model, plan), fold_branches(model)

    assert 1 - plan.macs_after / plan.macs_before == pytest.approx(0.4, abs=0.06)
    assert count_macs(full, IMAGES).total == plan.macs_before
    assert count_macs(pruned, IMAGES).total == plan.macs_after
    for layer in plan.layers:
        assert len(layer.kept) == layer.out_channels or len(layer.kept) % 2 == 0
        if layer.kind != "batch_norm":
            unread = sorted(set(range(layer.in_channels)) - set(layer.kept_in))
            weight = full.get_parameter(f"{layer.name}.weight")
            if weight.shape[1] == layer.in_channels:  # a depthwise layer reads each channel by itself
                weight.data[:, unread] = 0
    for one, other in zip(answers(full), answers(pruned), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_with_residual_blocks_can_lose_one_and_the_others_say_so(name: str) -> None:
    model = fold_branches(network(name))
    blocks = residual_blocks(model, IMAGES)
    if name == "kpe-t-rep":
        assert blocks == ()
        with pytest.raises(RecipeError, match=r"prune.depth: found 1, expected none: .*folded branches"):
            choose_blocks(model, IMAGES, 1, losses)
        return
    assert len(blocks) >= 3
    (block,) = choose_blocks(model, IMAGES, 1, losses)
    assert block.name in blocks
    rest = without_blocks(model, [block.name])
    assert count_macs(rest, IMAGES).total == count_macs(model, IMAGES).total - block.macs
    assert [out.shape for out in answers(rest)] == [out.shape for out in answers(model)]
    assert residual_blocks(rest, IMAGES) == tuple(name for name in blocks if name != block.name)
