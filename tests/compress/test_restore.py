"""Layers given back to floating point: what becomes of the network, and which layers they are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.hooks import hooks_of
from edgepose.compress.quantise import QuantiseConfig, convert, placement_of, prepare, restore, tensors_of
from edgepose.compress.restore import Budget, Prices, find_restoration, quantised_layers, with_float
from edgepose.errors import UsageError
from edgepose.export.engine import int8_share
from edgepose.export.int8_reasons import achieved, read_asked
from edgepose.export.onnx import onnx_from_torch
from edgepose.export.qdq import quantised_onnx
from tests.export.networks import images, network, spec_of

BLOCKS = ("residual", "inverted", "pyramid")
EXAMPLE = torch.from_numpy(images(1, 1))
LAYERS = (
    "stem.0.0", "stem.2.0", "blocks.0.a.0", "blocks.0.b.0", "blocks.1.up.0", "blocks.1.depth.0", "blocks.1.down.0",
    "blocks.2.down.0", "blocks.2.fine.0", "blocks.2.coarse.0", "maps", "x", "y",
)  # fmt: skip


@pytest.fixture(scope="module")
def folded() -> nn.Module:
    return fold_batch_norms(network(BLOCKS))


@pytest.fixture(scope="module")
def wrapped(folded: nn.Module) -> nn.Module:
    return prepare(folded, [images(8, 1), images(8, 2)])


def answers(module: nn.Module) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(module(torch.from_numpy(images(4, 3))))


# What becomes of the network


def test_the_layers_with_quantised_weights_are_candidates(folded: nn.Module, wrapped: nn.Module) -> None:
    assert quantised_layers(wrapped, EXAMPLE) == LAYERS
    partly = prepare(folded, [images(4, 1)], QuantiseConfig(protected=("blocks.1", "x")))
    assert quantised_layers(partly, EXAMPLE) == tuple(n for n in LAYERS if not n.startswith("blocks.1") and n != "x")


def test_with_all_layers_given_back_it_is_the_float_network(folded: nn.Module, wrapped: nn.Module) -> None:
    free = with_float(wrapped, LAYERS, EXAMPLE)
    assert hooks_of(free) == {}
    for ours, theirs in zip(answers(free), answers(folded), strict=True):
        assert torch.equal(ours, theirs)


def test_one_layer_loses_its_weights_rounding_and_nothing_else(wrapped: nn.Module) -> None:
    before, after = set(hooks_of(wrapped)), set(hooks_of(with_float(wrapped, ["blocks.1.depth.0"], EXAMPLE)))
    assert before - after == {"pre_hooks.depth/0/conv2d/0__1"}  # its neighbours are integer on both sides
    assert after < before
    assert set(hooks_of(wrapped)) == before, "the network itself stays as it was"


def test_neighbours_lose_the_quantiser_between_them(wrapped: nn.Module) -> None:
    after = set(hooks_of(with_float(wrapped, ["blocks.1.up.0", "blocks.1.depth.0"], EXAMPLE)))
    gone = set(hooks_of(wrapped)) - after
    assert {place for place in gone if place.startswith("post_hooks")} == {"post_hooks./relu6/0__0"}


def test_the_image_stays_float_for_a_float_first_layer(wrapped: nn.Module) -> None:
    gone = set(hooks_of(wrapped)) - set(hooks_of(with_float(wrapped, ["stem.0.0"], EXAMPLE)))
    assert "post_hooks.images__0" in gone


def test_it_comes_nearer_to_the_float_network(folded: nn.Module, wrapped: nn.Module) -> None:
    exact = answers(folded)
    gaps = [
        sum(float((one - other).abs().mean()) for one, other in zip(answers(module), exact, strict=True))
        for module in (wrapped, with_float(wrapped, LAYERS[1:], EXAMPLE))
    ]
    assert gaps[1] < 0.8 * gaps[0]


def test_it_is_stored_and_restored_like_any_other(folded: nn.Module, wrapped: nn.Module) -> None:
    made = with_float(wrapped, ["maps", "x"], EXAMPLE)
    again = restore(folded, placement_of(made), tensors_of(made))
    assert convert(again)[1] == convert(made)[1]
    assert convert(again)[1].protected == ("maps", "x")
    for ours, theirs in zip(answers(again), answers(made), strict=True):
        assert torch.equal(ours, theirs)


def test_engines_execute_just_these_layers_in_float(wrapped: nn.Module, tmp_path: Path) -> None:
    given_back = {"blocks.0.b.0", "blocks.1.depth.0", "y"}
    plain, ranges = convert(with_float(wrapped, sorted(given_back), EXAMPLE))
    onnx_from_torch(plain, spec_of(), tmp_path / "float.onnx", ranges=ranges)
    quantised_onnx(tmp_path / "float.onnx", ranges, tmp_path / "q.onnx", dialect="u8s8")
    for backend in ("onnxruntime", "openvino"):
        found = achieved(int8_share(tmp_path / "q.onnx", backend), read_asked(tmp_path / "q.onnx"))
        assert {layer.layer for layer in found.float_layers} == given_back
        assert found.asked_share == 1.0


# Which layers they are


class Losses:
    """A network of which each integer layer loses so many points, and the measuring of it."""

    def __init__(self, **points: float) -> None:
        self.points, self.measured = points, list[tuple[str, ...]]()

    def __call__(self, layers: tuple[str, ...]) -> float:
        self.measured.append(layers)
        return 0.5 - sum(loss for layer, loss in self.points.items() if layer not in layers) / 100


COSTS = {"cheap": 0.1, "dear": 4.0, "harmless": 1.0}


def priced() -> Prices:
    return Prices(COSTS, "ms")


def test_layers_go_back_by_gain_per_millisecond_until_the_budget_holds() -> None:
    losses = Losses(cheap=0.5, dear=1.0, harmless=0.0)
    found = find_restoration(priced, losses, Budget(0.5, 1.0))
    assert found.lost == pytest.approx(1.5)
    assert [trial.layer for trial in found.trials] == ["cheap", "dear", "harmless"]
    assert [trial.rate for trial in found.trials] == pytest.approx([5.0, 0.25, 0.0])
    assert found.layers == ("cheap",)  # though "dear" loses more
    assert found.path[0].lost == pytest.approx(1.0)
    assert found.unit == "ms"
    assert found.met
    assert losses.measured == [(), ("cheap",), ("dear",), ("harmless",)]  # nothing is measured twice


def test_nothing_is_tried_where_the_budget_holds_from_the_start() -> None:
    losses = Losses(cheap=0.5)

    def refuses() -> Prices:
        raise AssertionError("prices are not needed")

    found = find_restoration(refuses, losses, Budget(0.5, 0.5))
    assert (found.trials, found.path, found.met, found.unit) == ((), (), True, None)
    assert losses.measured == [()]


def test_a_budget_that_cannot_be_met_ends_with_all_layers_given_back() -> None:
    class Stubborn(Losses):
        def __call__(self, layers: tuple[str, ...]) -> float:
            return super().__call__(layers) - 0.02

    found = find_restoration(priced, Stubborn(cheap=0.5, dear=1.0), Budget(0.5, 1.0))
    assert not found.met
    assert set(found.layers) == set(COSTS)
    assert found.path[-1].lost == pytest.approx(2.0)


def test_layers_that_integers_slow_down_come_first_and_harm_comes_last() -> None:
    costs = {"slower": -0.2, "faster": 5.0, "helps": 3.0, "helps less": 1.0}
    losses = Losses(slower=0.1, faster=0.4, helps=-0.5)
    losses.points["helps less"] = -0.1
    found = find_restoration(lambda: Prices(costs, "ms"), losses, Budget(0.6, 0.0))
    assert [trial.layer for trial in found.trials] == ["slower", "faster", "helps less", "helps"]


def test_an_interrupted_search_goes_on_with_what_was_measured(tmp_path: Path) -> None:
    store = tmp_path / "runs" / "search.json"
    store.parent.mkdir()

    class Interrupted(Losses):
        def __call__(self, layers: tuple[str, ...]) -> float:
            if layers == ("harmless",):
                raise KeyboardInterrupt
            return super().__call__(layers)

    points = {"cheap": 0.5, "dear": 1.0, "harmless": 0.0}
    with pytest.raises(KeyboardInterrupt):
        find_restoration(priced, Interrupted(**points), Budget(0.5, 1.0), store=store)
    rest = Losses(**points)
    found = find_restoration(priced, rest, Budget(0.5, 1.0), store=store)
    assert found.layers == ("cheap",)
    assert rest.measured == [(), ("harmless",)]


@pytest.mark.parametrize("content", [b"", b"{", b'{"identity": "cheap 0.5 0.1", "figures": {"cheap": 0.9}}'])
def test_a_store_of_another_search_or_a_broken_one_is_begun_anew(content: bytes, tmp_path: Path) -> None:
    store = tmp_path / "search.json"
    store.write_bytes(content)
    losses = Losses(cheap=0.5, dear=1.0)
    found = find_restoration(priced, losses, Budget(0.5, 1.0), store=store)
    assert found.layers == ("cheap",)
    assert len(losses.measured) == 4


def test_a_store_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="a file where a directory is needed"):
        find_restoration(priced, Losses(cheap=5.0), Budget(0.5, 1.0), store=tmp_path / "file" / "search.json")
