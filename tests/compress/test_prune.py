"""Pruning: what is chosen, that it is exact, that a plan can be replayed, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, get_args

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgepose import recipe
from edgepose.blocks.kpe import KPEConfig, build
from edgepose.compress import plan as plan_module
from edgepose.compress.channel_groups import ChannelGroup, trace_channel_groups
from edgepose.compress.channel_search import Budget, macs_per_channel
from edgepose.compress.importance import channel_scores, gate_products
from edgepose.compress.macs import count_macs
from edgepose.compress.prune import (
    PLAN_COLUMNS,
    PruneConfig,
    PrunedLayer,
    PruningPlan,
    apply_pruning,
    plan_from_json,
    plan_pruning,
    plan_rows,
    plan_table,
    plan_to_json,
    reestimate_batch_norm,
)
from edgepose.errors import CheckpointError, RecipeError
from edgepose.spec import Keypoints

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = ("simcc", "heatmap")
SMALL = KPEConfig("small", (64, 64), 8, (16, 32, 32, 48), (1, 2, 1, 1), 16)
EXAMPLE = torch.zeros(1, 3, 64, 64)


def network(head: str = "simcc", *, seed: int = 0, config: KPEConfig = SMALL) -> nn.Module:
    """A small residual network with lively batch normalisations."""
    model = build(msgspec.structs.replace(config, head=head), Keypoints(("head", "left", "right")), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.weight.data.uniform_(0.5, 1.5, generator=generator)
            part.bias.data.normal_(0, 0.3, generator=generator)
            part.running_mean.normal_(0, 0.3, generator=generator)
            part.running_var.uniform_(0.5, 2, generator=generator)
    return model


def images(count: int = 2, *, seed: int = 3) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def outputs(model: nn.Module, batch: Tensor) -> tuple[Tensor, ...]:
    model.eval()
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(batch)
    return found


def layers(plan: PruningPlan) -> dict[str, PrunedLayer]:
    return {layer.name: layer for layer in plan.layers}


@cache
def planned(head: str = "simcc", **wanted: Any) -> PruningPlan:
    """A plan for `network(head)`; plans are frozen, so tests may share them."""
    return plan_pruning(
        network(head), EXAMPLE, PruneConfig(**{"ratio": 0.5, "round_to": 4, "min_channels": 4} | wanted)
    )


def some_losses(model: nn.Module) -> Iterator[Tensor]:
    for seed in (1, 2):
        yield sum((out.square().mean() for out in model(images(seed=seed))), torch.zeros(()))


# What a plan promises


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("scope", ["global", "uniform"])
def test_plan_removes_the_asked_fraction_and_keeps_the_outputs(head: str, scope: str) -> None:
    model = network(head)
    plan = planned(head, scope=scope)
    pruned = apply_pruning(model, plan)

    assert 1 - plan.macs_after / plan.macs_before == pytest.approx(0.5, abs=0.05)
    assert count_macs(pruned, EXAMPLE).total == plan.macs_after
    assert count_macs(model, EXAMPLE).total == plan.macs_before
    assert sum(p.numel() for p in pruned.parameters()) == plan.params_after < plan.params_before
    assert [o.shape for o in outputs(pruned, images())] == [o.shape for o in outputs(model, images())]
    for layer in plan.layers:
        assert len(layer.kept) == layer.out_channels or len(layer.kept) % 4 == 0
        assert len(layer.kept_in) == layer.in_channels or len(layer.kept_in) % 4 == 0
        module = pruned.get_submodule(layer.name)
        widths = [
            getattr(module, name) for name in ("out_channels", "out_features", "num_features") if hasattr(module, name)
        ]
        assert widths == [len(layer.kept)]


@pytest.mark.parametrize("head", HEADS)
def test_pruned_network_equals_the_full_one_with_removed_channels_unread(head: str) -> None:
    model = network(head)
    plan = planned(head)
    pruned = apply_pruning(model, plan)
    for layer in plan.layers:
        if layer.kind != "batch_norm":
            gone = sorted(set(range(layer.in_channels)) - set(layer.kept_in))
            model.get_submodule(layer.name).weight.data[:, gone] = 0
    for full, small in zip(outputs(model, images()), outputs(pruned, images()), strict=True):
        torch.testing.assert_close(full, small, rtol=1e-4, atol=1e-4)


def test_planning_and_applying_leave_the_network_alone() -> None:
    model = network().train()
    model.backbone.stem[0][1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [part.training for part in model.modules()]
    random_state = torch.random.get_rng_state()

    plan = plan_pruning(model, EXAMPLE, PruneConfig(ratio=0.4, importance="taylor", round_to=4), losses=some_losses)
    pruned = apply_pruning(model, plan)

    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes == [part.training for part in pruned.modules()]
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_state)


def test_equal_requests_give_equal_plans_whatever_the_example_shows() -> None:
    config = PruneConfig(ratio=0.5, round_to=4, min_channels=4)
    first = planned()
    second = plan_pruning(network(), images(), config)
    assert plan_to_json(first) == plan_to_json(second)


def test_residual_stream_is_cut_alike_in_every_layer_that_writes_or_reads_it() -> None:
    plan = layers(planned())
    stage = "backbone.stages.1."
    kept = plan[f"{stage}0.conv2.0"].kept
    assert len(kept) < 32
    writers = ("0.conv2.1", "0.shortcut.0", "0.shortcut.1", "1.conv2.0", "1.conv2.1")
    assert {plan[stage + writer].kept for writer in writers} == {kept}
    readers = (stage + "1.conv1.0", "backbone.stages.2.0.conv1.0", "backbone.stages.2.0.shortcut.0")
    assert {plan[reader].kept_in for reader in readers} == {kept}
    assert plan[stage + "1.conv1.0"].kept != kept  # inside a block the channels are its own


def test_pruned_network_can_be_trained() -> None:
    model = network()
    pruned = apply_pruning(model, planned()).train()
    before = next(iter(some_losses(pruned))).item()
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.01)
    for _ in range(5):
        optimiser.zero_grad()
        loss = next(iter(some_losses(pruned)))
        loss.backward()
        optimiser.step()
    assert loss.item() < before


def test_ratio_zero_is_the_empty_plan() -> None:
    model = network()
    plan = plan_pruning(model, EXAMPLE, PruneConfig(ratio=0))
    assert plan.layers == ()
    assert torch.equal(outputs(apply_pruning(model, plan), images())[0], outputs(model, images())[0])


def test_smallest_ratio_removes_at_least_one_step() -> None:
    plan = plan_pruning(network(), EXAMPLE, PruneConfig(ratio=0.001, round_to=16))
    assert 0 < plan.macs_after < plan.macs_before


# Replay


@pytest.mark.parametrize("head", HEADS)
def test_replaying_a_stored_plan_on_a_fresh_network_takes_the_pruned_weights(head: str) -> None:
    model = network(head)
    plan = planned(head)
    pruned = apply_pruning(model, plan)

    restored = apply_pruning(network(head, seed=7), plan_from_json(plan_to_json(plan)))
    assert not torch.equal(outputs(restored, images())[0], outputs(pruned, images())[0])
    restored.load_state_dict(pruned.state_dict())
    for one, other in zip(outputs(restored, images()), outputs(pruned, images()), strict=True):
        assert torch.equal(one, other)


def test_plan_json_has_one_line_per_layer_and_reads_back() -> None:
    plan = planned(protected=("block.neck.*",))
    text = plan_to_json(plan)
    assert plan_from_json(text) == plan
    assert sum(line.startswith(b'    {"name"') for line in text.splitlines()) == len(plan.layers) + len(plan.frozen)


def test_table_names_every_weighted_layer_and_sums_up() -> None:
    plan = planned()
    rows = plan_table(plan)
    assert {len(row) for row in rows} == {len(PLAN_COLUMNS)}
    assert [row[0] for row in rows[:-2]] == [layer.name for layer in plan.layers if layer.kind != "batch_norm"]
    assert rows[0][1:4] == ("3", str(len(plan.layers[0].kept)), "8")  # the image's channels stay
    assert "→" in rows[1][1]
    assert rows[-1][-2:] == (f"{100 * (1 - plan.macs_after / plan.macs_before):.0f} %", "100.0 %")
    parts = plan_rows(plan)
    assert sum(row.macs_before for row in parts[:-1]) == plan.macs_before
    assert sum(row.macs_after for row in parts[:-1]) == plan.macs_after
    assert sum(row.share for row in parts[:-1]) == pytest.approx(1)
    assert parts[-2].macs_before == parts[-2].macs_after > 0  # the layers that were left alone


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (lambda: network(config=msgspec.structs.replace(SMALL, depths=(1, 1, 1, 1))), "backbone.stages.1.1.conv1.0"),
        (
            lambda: network(config=msgspec.structs.replace(SMALL, widths=(16, 32, 40, 48))),
            "backbone.stages.2.0.conv1.0",
        ),
        (lambda: nn.Sequential(nn.Conv2d(3, 8, 3)), "backbone.stem.0.0"),
    ],
)
def test_another_architecture_is_refused_by_the_layer_that_differs(other: Callable[[], nn.Module], named: str) -> None:
    plan = planned()
    with pytest.raises(CheckpointError, match=named):
        apply_pruning(other(), plan)


def test_pruning_twice_with_one_plan_is_refused() -> None:
    model = network()
    plan = planned()
    with pytest.raises(CheckpointError, match=r"channels, expected .* → "):
        apply_pruning(apply_pruning(model, plan), plan)


def test_a_difference_outside_the_planned_layers_is_refused_by_size() -> None:
    plan = planned()
    wider_input = network(config=msgspec.structs.replace(SMALL, input_hw=(96, 64)))
    with pytest.raises(CheckpointError, match="parameters"):
        apply_pruning(wider_input, plan)


@pytest.mark.parametrize("kept", [(0, 99), (3, 1), (1, 1), ()])
def test_a_plan_with_impossible_channels_is_refused(kept: tuple[int, ...]) -> None:
    plan = planned()
    first = msgspec.structs.replace(plan.layers[0], kept=kept)
    with pytest.raises(CheckpointError, match=first.name):
        apply_pruning(network(), msgspec.structs.replace(plan, layers=(first, *plan.layers[1:])))


@pytest.mark.parametrize(
    "content",
    [b"", b'{"layers": [', b"[]", b'{"schema": 2}', b"\xff"],
)
def test_what_is_no_plan_is_refused_with_its_place(content: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"runs/plan\.json"):
        plan_from_json(content, where="runs/plan.json")


def test_a_plan_of_another_schema_is_refused() -> None:
    text = plan_to_json(planned())
    with pytest.raises(CheckpointError, match="schema"):
        plan_from_json(text.replace(b'"schema": 1', b'"schema": 2'))


# What is left alone


@pytest.mark.parametrize(("head", "frozen"), [("simcc", {"maps", "x", "y"}), ("heatmap", {"maps"})])
def test_outputs_of_the_network_are_found_without_being_named(head: str, frozen: set[str]) -> None:
    plan = planned(head)
    assert {group.name for group in plan.frozen} == {f"block.head.{name}" for name in frozen}
    assert layers(plan)["block.head.maps"].kept == (0, 1, 2)


def test_protected_layers_keep_their_outputs_and_the_plan_says_why() -> None:
    config = PruneConfig(ratio=0.3, round_to=4, protected=("backbone.stem.*", "*.neck.lateral.1.0"))
    plan = plan_pruning(network(), EXAMPLE, config)
    assert not any(layer.name.startswith(("backbone.stem", "block.neck.lateral.1.1")) for layer in plan.layers)
    reasons = {group.name: group.reason for group in plan.frozen}
    assert "'backbone.stem.*'" in reasons["backbone.stem.0.0"]
    assert any("'*.neck.lateral.1.0'" in reason for reason in reasons.values())


def test_a_pattern_that_matches_nothing_is_refused_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match=r"'backbone.stem.0.7'.*did you mean 'backbone.stem.0.\d'"):
        plan_pruning(network(), EXAMPLE, PruneConfig(ratio=0.3, protected=("backbone.stem.0.7",)))


class Flipped(nn.Module):
    """Reverses its channels, which the dependency graph takes for an element-wise operation."""

    def __init__(self) -> None:
        super().__init__()
        self.write = nn.Conv2d(3, 8, 3, padding=1)
        self.read = nn.Conv2d(8, 16, 3, padding=1)
        self.out = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.read(self.write(x).flip(1).relu()).relu())


def test_a_coupling_that_the_graph_gets_wrong_is_noticed_and_left_alone() -> None:
    plan = plan_pruning(Flipped(), EXAMPLE, PruneConfig(ratio=0.3, round_to=2, min_channels=2))
    assert {group.name: group.reason for group in plan.frozen}["write"].startswith("outputs that differ")
    assert layers(plan)["read"].kept_in == tuple(range(8))
    assert len(layers(plan)["read"].kept) < 16


class Assorted(nn.Module):
    """Concatenation, a depthwise convolution, a grouped one, a layer normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 8, 3, padding=1)
        self.right = nn.Conv2d(3, 16, 3, padding=1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.norm = nn.BatchNorm2d(24, affine=False)
        self.point = nn.Conv2d(24, 16, 1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.last = nn.Conv2d(16, 12, 1)
        self.layer_norm = nn.LayerNorm(12)
        self.read = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left(x), self.right(x)], 1)
        mixed = self.grouped(self.point(self.norm(self.depthwise(both)).relu()))
        return self.read(self.layer_norm(self.last(mixed).mean((2, 3))))


def test_concatenated_and_depthwise_channels_go_together_and_grouped_ones_stay() -> None:
    model = Assorted()
    plan = plan_pruning(model, EXAMPLE, PruneConfig(ratio=0.4, scope="uniform", round_to=4, min_channels=4))
    planned = layers(plan)
    kept = (*planned["left"].kept, *(8 + c for c in planned["right"].kept))
    assert len(kept) < 24
    assert planned["depthwise"].kept == planned["depthwise"].kept_in == planned["norm"].kept == kept
    assert planned["point"].kept_in == kept
    assert planned["point"].kept == tuple(range(16))
    reasons = " ".join(group.reason for group in plan.frozen)
    assert "grouped is a grouped convolution" in reasons
    assert "layer_norm is a LayerNorm" in reasons
    pruned = apply_pruning(model, plan)
    assert pruned.get_submodule("depthwise").groups == len(kept)
    assert count_macs(pruned, EXAMPLE).total == plan.macs_after


def test_an_example_that_does_not_fit_is_refused() -> None:
    with pytest.raises(CheckpointError, match="cannot be traced"):
        plan_pruning(network(), torch.zeros(1, 4, 64, 64), PruneConfig(ratio=0.3))


def test_a_network_that_leaves_autograd_is_refused() -> None:
    class Detached(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(CheckpointError, match="no channels that autograd knows of"):
        plan_pruning(Detached(nn.Conv2d(3, 8, 1)), EXAMPLE, PruneConfig(ratio=0.3))


# Limits


def test_the_largest_ratio_is_named_and_can_be_had() -> None:
    with pytest.raises(RecipeError, match="at most 0") as caught:
        plan_pruning(network(), EXAMPLE, PruneConfig(ratio=0.99, round_to=4, max_layer_ratio=0.5))
    most = float(caught.value.expected.split("at most ")[1].split(",")[0])
    plan = plan_pruning(network(), EXAMPLE, PruneConfig(ratio=most, round_to=4, max_layer_ratio=0.5))
    assert all(len(layer.kept) >= layer.out_channels / 2 for layer in plan.layers)
    assert any(len(layer.kept) == layer.out_channels / 2 for layer in plan.layers)


def test_no_group_gets_narrower_than_min_channels() -> None:
    plan = plan_pruning(network(), EXAMPLE, PruneConfig(ratio=0.4, round_to=4, min_channels=12))
    assert all(len(layer.kept) >= 12 for layer in plan.layers if len(layer.kept) < layer.out_channels)


@pytest.mark.parametrize(
    "wrong",
    [
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"ratio": 0.5, "round_to": 0},
        {"ratio": 0.5, "max_layer_ratio": 1.0},
        {"ratio": 0.5, "importance": "magic"},
        {"ratio": 0.5, "seed": -1},
    ],
)
def test_values_out_of_range_are_refused_by_field(wrong: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=list(wrong)[-1]):
        plan_pruning(network(), EXAMPLE, PruneConfig(**wrong))


def test_recipes_offer_exactly_what_pruning_can_do() -> None:
    assert get_args(recipe.Importance) == get_args(plan_module.Importance)
    fields = {field.name for field in msgspec.structs.fields(PruneConfig)}
    shared = {"ratio", "importance", "scope", "protected"}
    assert shared <= fields & set(recipe.Prune.__struct_fields__)


@given(
    size=st.integers(1, 300),
    round_to=st.integers(1, 32),
    min_channels=st.integers(1, 40),
    loss=st.floats(0.01, 0.99),
    wanted=st.tuples(st.floats(0, 300), st.floats(0, 300)),
)
def test_permitted_counts_are_rounded_bounded_and_monotone(
    size: int, round_to: int, min_channels: int, loss: float, wanted: tuple[float, float]
) -> None:
    budget = Budget(0.5, "uniform", round_to, min_channels, loss)
    fewer, more = (budget.permitted(size, min(w, size)) for w in sorted(wanted))
    assert fewer <= more <= size
    assert fewer == size or (fewer % round_to == 0 and fewer >= min_channels)
    assert size - fewer <= loss * size + 1e-6


# What each criterion sees


BLOCK = "backbone.stages.1.1"
SPARSE, FLAT, SHUT, TYPICAL, DEAD = (tuple(range(start, start + 4)) for start in (0, 4, 8, 12, 16))
PLANTED = {"l1": SPARSE, "l2": FLAT, "bn_scale": SHUT, "fpgm": TYPICAL, "taylor": DEAD}


def planted_network() -> nn.Module:
    """In one block, each criterion has four channels of its own that it should hold for the least important."""
    model = network()
    block = model.get_submodule(BLOCK)
    write, norm, read = block.conv1[0].weight.data, block.conv1[1], block.conv2[0].weight.data
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(write[0].shape, generator=generator)
    write.copy_(common + 0.7 * torch.randn(write.shape, generator=generator))
    read.copy_(torch.randn(read.shape, generator=generator))
    for channel in SPARSE:  # little in sum, much in square
        write[channel] = 0
        write[channel, channel, 1, 1] = 60
    for channel in FLAT:  # little in square, much in sum
        write[channel] = 0.95 * write[channel].sign()
        read[:, channel] = 0.85 * read[:, channel].sign()
    for channel in TYPICAL:  # the common filter itself, but read loudly
        write[channel] = common
        read[:, channel] *= 1.5
    with torch.no_grad():
        norm.weight.fill_(1.0)
        norm.bias.fill_(1.0)  # alive even where nothing arrives
        norm.running_mean.zero_()
        norm.weight[list(SHUT)] = 0.01
        norm.bias[list(DEAD)] = -100.0
    return model


def block_group(model: nn.Module) -> ChannelGroup:
    example = EXAMPLE.to(next(model.parameters()).dtype)
    return next(g for g in trace_channel_groups(model, example) if g.name == f"{BLOCK}.conv1.0")


@pytest.mark.parametrize("importance", list(PLANTED))
def test_each_criterion_takes_its_own_planted_channels(importance: str) -> None:
    model = planted_network()
    others = tuple(g.name for g in trace_channel_groups(model, EXAMPLE) if g.name != f"{BLOCK}.conv1.0")
    config = PruneConfig(ratio=0.01, importance=importance, round_to=4, protected=others)
    plan = plan_pruning(model, EXAMPLE, config, losses=some_losses)
    kept = layers(plan)[f"{BLOCK}.conv1.0"].kept
    assert set(range(32)) - set(kept) == set(PLANTED[importance])
    assert {layer.name for layer in plan.layers} == {f"{BLOCK}.conv1.0", f"{BLOCK}.conv1.1", f"{BLOCK}.conv2.0"}


def test_random_importance_follows_its_seed_and_nothing_else() -> None:
    def kept(model: nn.Module, seed: int) -> dict[str, tuple[int, ...]]:
        config = PruneConfig(ratio=0.5, importance="random", scope="uniform", round_to=4, seed=seed)
        return {name: layer.kept for name, layer in layers(plan_pruning(model, EXAMPLE, config)).items()}

    assert kept(network(), 1) == kept(network(seed=9), 1)
    assert kept(network(), 1) != kept(network(), 2)
    one = kept(network(), 1)
    assert one[f"{BLOCK}.conv1.0"] != one["backbone.stages.1.0.conv1.0"]  # groups of one size draw differently


@pytest.mark.parametrize("importance", [*PLANTED, "random"])
def test_scores_are_normalised_and_never_negative(importance: str) -> None:
    model = planted_network()
    gates = gate_products(model, some_losses)
    for group in trace_channel_groups(model, EXAMPLE):
        if not group.name.startswith("block.head"):
            scores = channel_scores(model, group, importance, gates=gates, seed=0)
            assert scores.shape == (group.size,)
            assert scores.dtype == torch.float64
            assert scores.min() >= 0
            assert importance == "taylor" or scores.mean().item() == pytest.approx(1)


def test_global_scope_takes_from_idle_layers_and_uniform_from_all() -> None:
    model = planted_network()
    block = model.get_submodule(BLOCK)
    block.conv1[0].weight.data[:16] *= 1e-3
    block.conv2[0].weight.data[:, :16] *= 1e-3
    changed = {}
    for scope in ("global", "uniform"):
        plan = plan_pruning(model, EXAMPLE, PruneConfig(ratio=0.04, scope=scope, round_to=4))
        changed[scope] = layers(plan)
    idle = f"{BLOCK}.conv1.0"
    assert set(changed["global"]) == {idle, f"{BLOCK}.conv1.1", f"{BLOCK}.conv2.0"}
    assert set(range(16, 32)) < set(changed["global"][idle].kept)
    assert set(changed["uniform"]) - set(changed["global"])


def test_taylor_scores_are_the_squared_change_of_the_loss_to_first_order() -> None:
    model = network().double().eval()

    def losses(scored: nn.Module) -> Iterator[Tensor]:
        yield sum((out.square().mean() for out in scored(images(1).double())), torch.zeros((), dtype=torch.float64))

    group = block_group(model)
    scores = channel_scores(model, group, "taylor", gates=gate_products(model, losses), seed=0)
    norm = model.get_submodule(f"{BLOCK}.conv1.1")
    changes = []
    for channel in range(group.size):
        ends = []
        for gate in (1 - 1e-5, 1 + 1e-5):
            scale = torch.ones(group.size, dtype=torch.float64)
            scale[channel] = gate
            handle = norm.register_forward_hook(lambda _m, _i, out, s=scale: out * s[:, None, None])
            with torch.no_grad():
                ends.append(next(iter(losses(model))).item())
            handle.remove()
        changes.append(((ends[1] - ends[0]) / 2e-5) ** 2)
    expected = torch.tensor(changes, dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-9 * expected.max().item())


def test_taylor_takes_the_cheapest_loss_per_multiply_accumulate() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Conv2d(16, 2, 3, padding=1)
    )
    groups = [g for g in trace_channel_groups(model, EXAMPLE) if g.name != "4"]
    macs = count_macs(model, EXAMPLE)
    # One channel of the first convolution: its 27 weights and 16 of its reader; of the second: 16 and 18.
    assert [macs_per_channel(model, g, macs) for g in groups] == [64 * 64 * (27 + 16), 64 * 64 * (16 + 18)]

    def losses(scored: nn.Module) -> Iterator[Tensor]:
        yield scored(images(1)).square().mean()

    gates = gate_products(model, losses)
    worth = torch.cat(
        [channel_scores(model, g, "taylor", gates=gates, seed=0) / macs_per_channel(model, g, macs) for g in groups]
    )
    plan = plan_pruning(
        model, EXAMPLE, PruneConfig(ratio=0.4, importance="taylor", round_to=1, min_channels=1), losses=losses
    )
    kept = [*layers(plan)["0"].kept, *(16 + c for c in layers(plan)["2"].kept)]
    gone = sorted(set(range(32)) - set(kept))
    assert worth[gone].max() <= worth[kept].min()


def test_taylor_without_losses_or_batches_or_with_a_nan_is_refused() -> None:
    config = PruneConfig(ratio=0.3, importance="taylor")
    with pytest.raises(RecipeError, match="without training losses"):
        plan_pruning(network(), EXAMPLE, config)
    with pytest.raises(RecipeError, match="no batch"):
        plan_pruning(network(), EXAMPLE, config, losses=lambda _model: [])
    with pytest.raises(RecipeError, match="batch 0: found a loss of nan"):
        plan_pruning(network(), EXAMPLE, config, losses=lambda _model: [torch.tensor(float("nan"))])


# Batch normalisation


def test_reestimated_statistics_are_those_of_the_batches() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3, momentum=0.3)).train()
    model[0].eval()
    batches = [images(4, seed=1) * 2 + 1, images(4, seed=2) - 3]
    assert reestimate_batch_norm(model, batches) == 2
    means = torch.stack([b.mean((0, 2, 3)) for b in batches])
    variances = torch.stack([b.transpose(0, 1).flatten(1).var(1) for b in batches])
    torch.testing.assert_close(model[1].running_mean, means.mean(0))
    torch.testing.assert_close(model[1].running_var, variances.mean(0))
    assert (model[1].momentum, model[1].training, model[0].training) == (0.3, True, False)


def test_reestimation_brings_a_pruned_network_back_to_normalised_features() -> None:
    model = network()
    pruned = apply_pruning(model, planned())
    weights = {name: p.clone() for name, p in pruned.named_parameters()}
    batch = images(8)
    reestimate_batch_norm(pruned, [batch])
    seen = {}
    norm = pruned.get_submodule("block.neck.smooth.1")
    handle = norm.register_forward_hook(lambda _m, _i, out: seen.update(out=(out - _m.bias[:, None, None])))
    outputs(pruned, batch)
    handle.remove()
    centred = (seen["out"].mean((0, 2, 3)) / norm.weight).abs().max().item()
    assert centred < 0.05
    assert all(torch.equal(weights[name], p) for name, p in pruned.named_parameters())


def test_reestimation_without_batches_changes_nothing() -> None:
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RecipeError, match="no batch"):
        reestimate_batch_norm(model, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
