"""ORN: silent at first, able to infer a hidden joint from the others, cheap, exported, quantised and pruned."""

from __future__ import annotations

import math

import msgspec
import pytest
import torch
from torch import Tensor, fx, nn

from edgepose.blocks.config import PRESETS, KPEConfig, ORNConfig, spec_of
from edgepose.blocks.kpe import KPENet, build
from edgepose.blocks.orn import ORN, Hide, Look, Mix, Normalise, Pool, Sizes
from edgepose.compress.macs import count_macs
from edgepose.errors import SpecError
from edgepose.spec import Keypoints

KEYPOINTS = Keypoints(tuple("abcde"))
PLAIN = KPEConfig("plain", (64, 96), 8, (8, 16, 16, 24), (1, 1, 1, 1), 16)
ROBUST = msgspec.structs.replace(PLAIN, name="robust", orn=ORNConfig(32, 2))


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def awake(block: ORN) -> None:
    """As if trained: the layers that start at zero say something."""
    generator = torch.Generator().manual_seed(2)
    for layer in (*block.corrections, block.visibility, block.log_error):
        assert isinstance(layer, nn.Linear)
        nn.init.normal_(layer.weight, std=0.3, generator=generator)


def orn_of(network: KPENet) -> ORN:
    assert network.block.orn is not None
    return network.block.orn


@pytest.mark.parametrize(("head", "stride"), [("simcc", 8), ("simcc", 16), ("heatmap", 4)])
def test_outputs_follow_the_specification(head: str, stride: int) -> None:
    config = msgspec.structs.replace(ROBUST, head=head, stride=stride)
    spec, network = spec_of(config, KEYPOINTS), build(config, KEYPOINTS).eval()
    outputs = network(images(3))
    assert [tuple(o.shape[1:]) for o in outputs] == [o.shape[1:] for o in spec.outputs]
    assert [o.name for o in spec.outputs[-2:]] == [spec.visibility, spec.uncertainty] == ["visibility", "log_error"]


@pytest.mark.parametrize("refinements", [0, 1])
def test_a_trained_network_goes_on_unchanged_with_a_new_block(refinements: int) -> None:
    plain = build(msgspec.structs.replace(PLAIN, refinements=refinements), KEYPOINTS, seed=3).eval()
    robust = build(msgspec.structs.replace(ROBUST, refinements=refinements), KEYPOINTS, seed=4).eval()
    missing, unexpected = robust.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(name.startswith("block.orn.") for name in missing)
    before, after = plain(images()), robust(images())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=False))
    assert torch.equal(after[2], torch.zeros(2, 5))  # an even chance
    assert after[3].unique().numel() == 1


def test_earlier_stages_are_the_heads_own_and_the_last_is_what_forward_says() -> None:
    network = build(msgspec.structs.replace(ROBUST, refinements=1), KEYPOINTS).eval()
    awake(orn_of(network))
    stages = network.stages(images())
    assert len(stages) == 3
    assert all(torch.equal(a, b) for a, b in zip(stages[-1].outputs, network(images()), strict=True))
    assert not torch.equal(stages[-1].outputs[0], stages[-2].outputs[0])


def test_coordinates_said_outright_cannot_be_corrected() -> None:
    with pytest.raises(SpecError, match="regression head"):
        build(msgspec.structs.replace(ROBUST, head="regression"), KEYPOINTS)


def test_the_block_costs_less_than_a_twentieth_of_the_network() -> None:
    people = Keypoints(tuple(f"joint {i}" for i in range(14)))
    example = torch.zeros(1, 3, 160, 160)
    macs = [count_macs(build(PRESETS[name], people), example).total for name in ("kpe-s", "orn-s")]
    # Products of activations with activations, which the count leaves out: pooling, and two layers' scores and values.
    block = PRESETS["orn-s"].orn
    assert block is not None
    uncounted = 14 * 400 * PRESETS["orn-s"].neck + block.layers * 14 * (14 + 25) * (block.width // 2 + 2 * block.width)
    assert macs[0] < macs[1] < 1.05 * macs[0] - uncounted


def test_every_joint_hears_of_every_other_and_of_the_context() -> None:
    block = ORN(ORNConfig(16, 1), Sizes(5, (8, 6), (4, 4), (2, 2), ((8,), (8,))))
    awake(block)
    pictures = 2
    maps = torch.randn(pictures, 5, 4, 4, requires_grad=True)
    coarse = torch.randn(pictures, 6, 2, 2, requires_grad=True)
    outputs = block((torch.randn(pictures, 8, 4, 4), coarse), maps, (torch.zeros(pictures, 5, 8),) * 2)
    outputs[0][:, 2].sum().backward()
    assert maps.grad is not None
    assert (maps.grad.abs().sum((0, 2, 3)) > 0).all()
    assert coarse.grad is not None
    assert (coarse.grad.abs().sum((0, 1)) > 0).all()


def test_pooling_looks_at_the_peak() -> None:
    flat = torch.full((1, 2, 16), -20.0)
    flat[0, 0, 5] = flat[0, 1, 12] = 20.0
    features = torch.arange(32.0).reshape(1, 2, 4, 4)
    assert torch.allclose(Pool()(flat, features), torch.tensor([[[5.0, 21.0], [12.0, 28.0]]]))


@pytest.mark.parametrize("head", ["simcc", "heatmap"])
def test_what_is_in_front_is_looked_up_where_the_keypoint_was_found(head: str) -> None:
    clear = torch.arange(6.0).reshape(1, 1, 2, 3)
    at_column_2_row_1 = torch.zeros(1, 1, 12), torch.zeros(1, 1, 8)
    at_column_2_row_1[0][..., 9], at_column_2_row_1[1][..., 5] = 50.0, 50.0
    heatmap = torch.zeros(1, 1, 2, 3)
    heatmap[..., 1, 2] = 1.0
    found = Look()(clear, at_column_2_row_1 if head == "simcc" else (heatmap,))
    assert found.shape == (1, 1, 1)
    assert found.item() == pytest.approx(5.0, abs=1e-3)
    anywhere = tuple(torch.zeros_like(o) for o in at_column_2_row_1) if head == "simcc" else (heatmap * 0,)
    nowhere = Look()(clear, anywhere)
    assert nowhere.item() == pytest.approx(2.5)


def test_bins_that_fall_between_cells_are_refused() -> None:
    with pytest.raises(SpecError, match="as many bins in every cell"):
        build(msgspec.structs.replace(ROBUST, split_ratio=1.3), KEYPOINTS)


def test_calibrating_scales_all_that_visibility_is_the_sum_of() -> None:
    network = build(ROBUST, KEYPOINTS).eval()
    block = orn_of(network)
    awake(block)
    nn.init.normal_(block.clear[2].weight)  # type: ignore[arg-type]
    before = network(images())[2]
    block.correct(1.7, -0.4, 0.0)
    assert torch.allclose(network(images())[2], 1.7 * before - 0.4, atol=1e-4)


def test_normalised_vectors_have_unit_root_mean_square() -> None:
    found = Normalise()(torch.randn(3, 4, 32) * 100)
    assert torch.allclose(found.square().mean(-1), torch.ones(3, 4), atol=1e-4)
    assert torch.isfinite(Normalise()(torch.zeros(1, 1, 8))).all()


def test_mixing_by_hand() -> None:
    # Two heads: the first finds both keys equally near, the second sees the second key alone.
    query, key = torch.tensor([[[1.0, 9.0]]]), torch.tensor([[[3.0, -9.0], [3.0, 9.0]]])
    value, gate = torch.tensor([[[2.0, 7.0], [4.0, 5.0]]]), torch.tensor([[[0.5, 10.0]]])
    assert Mix(2)(query, key, value, gate)[0, 0].tolist() == pytest.approx([0.5 * 3.0, 10 * 5.0])


# Keypoint masking


@pytest.mark.parametrize("width", [1, 8, 9, 12])
def test_any_width_and_a_single_keypoint_will_do(width: int) -> None:
    config = msgspec.structs.replace(ROBUST, orn=ORNConfig(width, 1))
    outputs = build(config, Keypoints(("nose",))).eval()(images(1))
    assert [tuple(output.shape) for output in outputs] == [(1, 1, 192), (1, 1, 128), (1, 1), (1, 1)]


def hidden(share: float) -> tuple[Tensor, Tensor]:
    hide = Hide()
    hide.share = share
    torch.manual_seed(0)
    flat, (output,) = hide(torch.ones(4000, 10, 3), (torch.ones(4000, 10, 2, 2),))
    return flat, output


def test_the_expected_share_of_keypoints_is_withheld_whole() -> None:
    flat, output = hidden(0.2)
    gone = flat[..., 0] == 0
    assert gone.float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(gone, (flat == 0).all(-1))
    assert torch.equal(gone, (output == 0).all(-1).all(-1))
    shares = gone.float().mean(1)
    assert shares.min() == 0  # some pictures stay whole
    assert shares.max() > 0.5


def test_nothing_is_withheld_in_evaluation_or_without_a_share() -> None:
    network = build(ROBUST, KEYPOINTS)
    orn_of(network).hide.share = 0.5
    network.eval()
    assert torch.equal(network(images())[0], network(images())[0])
    assert (hidden(0.0)[0] == 1).all()


def test_a_joint_without_evidence_is_inferred_from_the_others() -> None:
    """Joint 2 lies opposite of joint 0 and has no map of its own: only attention can place it."""
    torch.manual_seed(0)
    block = ORN(ORNConfig(32, 1), Sizes(3, (4, 4), (1, 16), (1, 2), ((16,),)))
    optimizer = torch.optim.Adam(block.parameters(), 3e-3)
    context = (torch.zeros(64, 4, 1, 16), torch.zeros(64, 4, 1, 2))

    def batch() -> tuple[Tensor, Tensor]:
        place = torch.randint(0, 16, (64,))
        maps = torch.zeros(64, 3, 1, 16)
        maps[torch.arange(64), 0, 0, place] = 8
        return maps, 15 - place

    for _ in range(180):
        maps, wanted = batch()
        found = block(context, maps, (maps.flatten(2),))[0]
        loss = nn.functional.cross_entropy(found[:, 2], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    maps, wanted = batch()
    assert (block(context, maps, (maps.flatten(2),))[0][:, 2].argmax(-1) == wanted).float().mean() > 0.9


# What happens to it later


def test_corrections_change_probabilities_and_errors_as_asked() -> None:
    network = build(ROBUST, KEYPOINTS).eval()
    awake(orn_of(network))
    before = network(images())
    orn_of(network).correct(2.0, -0.5, math.log(3))
    after = network(images())
    assert all(torch.equal(a, b) for a, b in zip(before[:2], after[:2], strict=True))
    assert torch.allclose(after[2], 2 * before[2] - 0.5, atol=1e-5)
    assert torch.allclose(after[3].exp(), 3 * before[3].exp(), rtol=1e-4)


def test_only_named_parameters_depend_on_the_size_of_the_input() -> None:
    small, large = (build(msgspec.structs.replace(ROBUST, input_hw=hw), KEYPOINTS) for hw in ((64, 96), (96, 128)))
    shapes = {name: tensor.shape for name, tensor in orn_of(small).state_dict().items()}
    changed = {n.partition(".")[0] for n, t in orn_of(large).state_dict().items() if t.shape != shapes[n]}
    assert changed == {"places", *ORN.sized_layers}


def test_the_network_can_be_traced_symbolically() -> None:
    traced = fx.GraphModule(network := build(ROBUST, KEYPOINTS).eval(), fx.Tracer().trace(network))
    assert all(torch.equal(a, b) for a, b in zip(traced(images()), network(images()), strict=True))
