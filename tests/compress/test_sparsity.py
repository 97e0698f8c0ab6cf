"""2:4 sparsity: which weights go, in which layers, and that they stay away whatever happens afterwards."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepose.blocks.config import KPEConfig
from edgepose.blocks.kpe import build
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.plan import PruneConfig, apply_pruning, plan_from_json, plan_to_json
from edgepose.compress.prune import plan_pruning
from edgepose.compress.sparsity import check_pattern, has_pattern, mask_of, pattern_kept, sparse_candidates, sparsify
from edgepose.errors import CheckpointError, RecipeError
from edgepose.spec import Keypoints
from edgepose.training.optimizers import Muon

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def network(**changes: object) -> nn.Module:
    config = KPEConfig("tiny", (32, 32), 8, (8, 8, 16, 16), (1, 1, 1, 1), 8, **changes)  # type: ignore[arg-type]
    return build(config, Keypoints(("head", "left", "right")), seed=0)


def weight_of(model: nn.Module, name: str) -> Tensor:
    return model.get_parameter(f"{name}.weight")


# The mask


@settings(deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4).map(lambda n: 4 * n), st.integers(1, 3), st.integers(1, 3)),
    seed=st.integers(0, 1000),
)
def test_of_every_four_input_channels_the_larger_two_stay(shape: tuple[int, int, int, int], seed: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    kept = weight * mask_of(weight)
    assert has_pattern(kept)
    for o in range(shape[0]):
        for i in range(0, shape[1], 4):
            for y in range(shape[2]):
                for x in range(shape[3]):
                    four, left = weight[o, i : i + 4, y, x], kept[o, i : i + 4, y, x]
                    best = max(combinations(range(4), 2), key=lambda two: float(four[list(two)].abs().sum()))
                    assert left.nonzero().flatten().tolist() == sorted(best)


def test_linear_layers_and_ties() -> None:
    mask = mask_of(torch.tensor([[1.0, -1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 3.0]]))
    assert mask.tolist() == [[True, True, False, False, True, False, False, True]]
    assert not has_pattern(torch.ones(2, 4))
    assert not has_pattern(torch.zeros(2, 6))  # no fours
    assert has_pattern(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))


# The layers


def test_all_layers_whose_inputs_come_in_fours_and_that_are_not_grouped_or_protected() -> None:
    model = network(backbone="inverted")
    found = sparse_candidates(model, ("block.head.x",))
    layers = {
        name: part for name, part in model.named_modules() if isinstance(part, (nn.Conv2d, nn.Linear)) and "." in name
    }
    expected = [
        name
        for name, part in layers.items()
        if not name.endswith("depthwise.0") and name not in ("backbone.stem.0.0", "block.head.x")
    ]
    assert list(found) == expected
    assert {"block.head.y", "block.head.maps", "block.neck.smooth.0"} <= set(found)
    nn.init.zeros_(weight_of(model, "block.head.maps"))
    assert "block.head.maps" not in sparse_candidates(model)


# In the plan


def test_a_plan_makes_the_pruned_network_sparse_and_a_replay_does_so_by_its_own_weights() -> None:
    model = network()
    plan = plan_pruning(
        model, IMAGES, PruneConfig(ratio=0.3, round_to=4, min_channels=4, pattern="2:4", protected=("block.head.*",))
    )
    assert plan.sparse
    assert not any(name.startswith("block.head.") for name in plan.sparse)
    assert plan_from_json(plan_to_json(plan)) == plan
    pruned = apply_pruning(model, plan)
    dense = apply_pruning(model, plan_pruning(model, IMAGES, PruneConfig(**{**_asked(plan.config), "pattern": None})))
    for name in plan.sparse:
        assert torch.equal(weight_of(pruned, name), weight_of(dense, name) * mask_of(weight_of(dense, name)))
    others = pruned.state_dict().keys() - {f"{name}.weight" for name in plan.sparse}
    assert all(torch.equal(pruned.state_dict()[name], dense.state_dict()[name]) for name in others)
    check_pattern(pruned, plan.sparse)
    check_pattern(fold_batch_norms(pruned), plan.sparse)
    fresh = apply_pruning(network(), plan)
    fresh.load_state_dict(pruned.state_dict())
    check_pattern(fresh, plan.sparse)


def _asked(config: PruneConfig) -> dict[str, object]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


def test_sparsity_alone_removes_no_channel() -> None:
    plan = plan_pruning(network(), IMAGES, PruneConfig(ratio=0, pattern="2:4"))
    assert plan.layers == ()
    assert plan.macs_after == plan.macs_before
    assert plan.sparse == sparse_candidates(network())


def test_a_pattern_for_nothing_and_a_plan_for_other_layers_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"prune.pattern: found 2:4 for a network without a layer that can have it"):
        plan_pruning(network(), IMAGES, PruneConfig(ratio=0, pattern="2:4", protected=("*",)))
    plan = plan_pruning(network(), IMAGES, PruneConfig(ratio=0, pattern="2:4"))
    for name in ("backbone.stem.0.0", "backbone.nowhere", "backbone.stem.0.1"):
        forged = plan_from_json(plan_to_json(plan).replace(b'"backbone.stem.2.0"', b'"%s"' % name.encode()))
        with pytest.raises(CheckpointError, match=rf"{name}: found no layer whose input channels come in fours"):
            apply_pruning(network(), forged)


# Afterwards


@pytest.mark.parametrize("optimiser", ["adamw", "sgd with momentum", "muon"])
def test_absent_weights_stay_absent_through_training(optimiser: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    images = torch.randn(8, 8, 4, 4)
    sparsify(model, ("0",))
    before = [p.clone() for p in model.parameters()]
    made: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.1),
        "sgd with momentum": lambda: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9),
        "muon": lambda: Muon([model[0].weight], 0.01, 0.1),
    }[optimiser]()

    def train() -> None:
        for _ in range(3):
            loss = model(images).square().mean()
            made.zero_grad()
            loss.backward()
            made.step()

    with pattern_kept(model, ("0",)):
        train()
        assert torch.equal(model[0].weight != 0, before[0] != 0)
        assert not (model[0].weight.grad[before[0] == 0]).any()  # type: ignore[index]
        assert not torch.equal(model[0].weight, before[0])
    train()  # nothing is left behind
    assert not has_pattern(model[0].weight)


def test_what_is_not_sparse_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Linear(8, 4))
    sparsify(model, ("0",))
    with pytest.raises(CheckpointError, match=r"2:4 sparsity: 1: found four consecutive input channels with more"):
        check_pattern(model, ("0", "1"))
    with pytest.raises(CheckpointError, match="2:4 sparsity: 1"), pattern_kept(model, ("1",)):
        raise AssertionError("not entered")
    with pytest.raises(CheckpointError, match="2:4 sparsity: 0"), pattern_kept(model, ("0",)):
        nn.init.ones_(model[0].weight)  # type: ignore[arg-type]
    with pattern_kept(model, ()):
        pass
