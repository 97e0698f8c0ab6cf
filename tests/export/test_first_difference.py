"""The first layer that differs is found, by values that really come from the forms of a network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgepose.errors import OnnxError
from edgepose.export.first_difference import Place, Values, first_difference, float_places, quantised_places
from edgepose.export.openvino import values_openvino
from edgepose.export.ort import values_ort
from edgepose.export.qdq import quantised_onnx
from tests.export.networks import Exported, images

FEEDS = {"image": images(4, 9)}
Probing = Callable[[Path], Callable[[tuple[str, ...]], Values]]


def optimised(path: Path) -> Callable[[tuple[str, ...]], Values]:
    return lambda names: values_ort(path, names, FEEDS, optimise=True)


def in_openvino(path: Path) -> Callable[[tuple[str, ...]], Values]:
    return lambda names: values_openvino(path, names, FEEDS)


def written(path: Path) -> Callable[[tuple[str, ...]], Values]:
    return lambda names: values_ort(path, names, FEEDS, optimise=False)


@pytest.fixture(scope="module")
def quantised(simcc: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("difference") / "q.onnx"
    quantised_onnx(simcc.float_onnx, simcc.ranges, path, dialect="u8s8")
    return path


def with_wrong_weights(path: Path, layer: str, out: Path) -> Path:
    """A copy in which one layer's codes have the wrong sign."""
    model = onnx.load(path)
    (codes,) = [value for value in model.graph.initializer if value.name == f"{layer}.weight_codes"]
    codes.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(codes), codes.name))
    onnx.save(model, out)
    return out


def test_places_are_in_order_of_execution_and_named_by_module(simcc: Exported, quantised: Path) -> None:
    places = quantised_places(simcc.float_onnx, quantised, simcc.ranges)
    layers = [place.layer for place in places]
    assert layers[:4] == ["image", "stem.0.0", "stem.2.0", "blocks.0.a.0"]
    assert layers[-1] == "maps"
    (sum_of_branches,) = [place for place in places if place.layer == "the Add behind blocks.1.fine.0"]
    behind = {place.value: place.layer for place in places}
    assert {behind[source] for source in sum_of_branches.sources} == {"blocks.1.fine.0", "blocks.1.coarse.0"}
    assert len(places) == sum(entry.kind == "activation" for entry in simcc.ranges.ranges)
    assert all(place.step == simcc.ranges.by_key[place.key].scale[0] for place in places)
    assert [place.layer for place in float_places(simcc.float_onnx)][-3:] in (["maps", "x", "y"], ["maps", "y", "x"])


@pytest.mark.parametrize("probing", [optimised, in_openvino, written])
@pytest.mark.parametrize("layer", ["stem.0.0", "blocks.0.b.0", "blocks.1.coarse.0", "maps"])
def test_a_wrong_layer_is_found(layer: str, probing: Probing, simcc: Exported, quantised: Path, tmp_path: Path) -> None:
    wrong = with_wrong_weights(quantised, layer, tmp_path / "wrong.onnx")
    places = quantised_places(simcc.float_onnx, quantised, simcc.ranges)
    found = first_difference(places, written(quantised), probing(wrong))
    assert found is not None
    assert found.layer == layer
    assert found.codes > 1
    assert layer in found.text


@pytest.mark.parametrize("probing", [optimised, in_openvino])
def test_engines_that_only_round_otherwise_differ_nowhere(probing: Probing, simcc: Exported, quantised: Path) -> None:
    places = quantised_places(simcc.float_onnx, quantised, simcc.ranges)
    assert first_difference(places, written(quantised), probing(quantised)) is None


def test_a_layer_behind_all_places_is_not_blamed_on_one(simcc: Exported, quantised: Path, tmp_path: Path) -> None:
    wrong = with_wrong_weights(quantised, "x", tmp_path / "wrong.onnx")
    places = quantised_places(simcc.float_onnx, quantised, simcc.ranges)
    assert first_difference(places, written(quantised), optimised(wrong)) is None


def test_bisection_asks_for_few_places_one_at_a_time() -> None:
    places = tuple(Place(f"layer{n}", f"value{n}", "key", 1.0) for n in range(64))
    asked: list[tuple[str, ...]] = []

    def candidate(names: tuple[str, ...]) -> dict[str, NDArray[np.float64]]:
        asked.append(names)
        return {name: np.full(3, 9.0 if int(name[5:]) >= 37 else 0.0) for name in names}

    found = first_difference(places, lambda names: {name: np.zeros(3) for name in names}, candidate)
    assert found is not None
    assert (found.layer, found.codes) == ("layer37", 9.0)
    assert len(asked) <= 8
    assert all(len(names) == 1 for names in asked)


def test_branches_side_by_side_do_not_hide_the_first_difference() -> None:
    """Of two branches the later one agrees, so bisection alone would blame their sum."""
    places = (Place("left", "l", "", 1.0), Place("right", "r", "", 1.0), Place("sum", "s", "", 1.0, ("r", "l")))
    far = {"l": np.full(3, 5.0), "r": np.zeros(3), "s": np.full(3, 5.0)}
    found = first_difference(places, lambda _: dict.fromkeys(far, np.zeros(3)), lambda names: {names[0]: far[names[0]]})
    assert found is not None
    assert found.layer == "left"


@pytest.mark.parametrize("broken", [np.full(3, np.nan), np.zeros(4)])
def test_what_cannot_be_compared_differs(broken: NDArray[np.float64]) -> None:
    found = first_difference([Place("a", "v")], lambda _: {"v": np.zeros(3)}, lambda _: {"v": broken})
    assert found is not None
    assert found.codes == float("inf")


def test_nothing_to_compare_finds_nothing() -> None:
    assert first_difference([], lambda _: {}, lambda _: {}) is None


def test_a_value_that_is_not_there_is_an_error(quantised: Path) -> None:
    with pytest.raises(OnnxError, match=r"no such value|cannot"):
        values_openvino(quantised, ["no such value"], FEEDS)
