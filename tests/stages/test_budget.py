"""What a recipe demands of engines, whether they were built now or found."""

from __future__ import annotations

import msgspec
import pytest

from edgepose.errors import ParityError
from edgepose.export.int8_share import Achieved, FloatLayer
from edgepose.profiles import load_target
from edgepose.recipe import QuantiseAfterTraining, Recipe
from edgepose.stages.assemble import Engines, engine_orders
from edgepose.stages.budget import check_int8_macs
from edgepose.stages.cache import StageResult

GATE = FloatLayer("blocks.2.gate", "FusedConv", 4_000, "its input or weight has no quantiser", protected=False)
FALLEN = FloatLayer("neck.up", "ConvTranspose", 3_000, "quantised, but onnxruntime runs it as ConvTranspose", False)
MEANT = FloatLayer("head.x", "MatMul", 50_000, "protected", protected=True)


def engines(found: Achieved | None) -> Engines:
    (order, *_) = engine_orders([load_target("this-cpu")])
    report = {} if found is None else {"int8": msgspec.json.decode(msgspec.json.encode(found))}
    return ((order, StageResult("engine-onnxruntime", "key", "", report, 0.0, reused=True)),)


def recipe(minimum: float | None) -> Recipe:
    quantise = None if minimum is None else QuantiseAfterTraining(min_int8_macs=minimum)
    return Recipe("mine", "Mine.", quantise=quantise)


def test_all_guilty_layers_are_listed_with_their_reasons() -> None:
    found = Achieved(0.43, 0.86, 100_000, (MEANT, GATE, FALLEN))
    check_int8_macs(recipe(0.86), engines(found))
    with pytest.raises(ParityError) as caught:
        check_int8_macs(recipe(0.9), engines(found))
    text = str(caught.value)
    assert caught.value.exit_code == 5
    assert "engine onnxruntime for this-cpu: min_int8_macs: found 86.0%" in text
    assert "blocks.2.gate (4.0 %: its input or weight has no quantiser)" in text
    assert "neck.up (3.0 %: quantised, but onnxruntime runs it as ConvTranspose)" in text
    assert "expected at least 90.0%" in text
    assert "head.x" not in text


def test_many_layers_are_counted_not_listed() -> None:
    layers = tuple(msgspec.structs.replace(GATE, layer=f"gate{n}") for n in range(11))
    with pytest.raises(ParityError, match=r"gate7 .* and 3 more"):
        check_int8_macs(recipe(0.9), engines(Achieved(0.5, 0.5, 100_000, layers)))


def test_a_network_that_came_quantised_is_held_to_the_default() -> None:
    with pytest.raises(ParityError, match=r"at least 95\.0%"):
        check_int8_macs(recipe(None), engines(Achieved(0.94, 0.94, 100_000, (GATE,))))
    check_int8_macs(recipe(None), engines(Achieved(0.1, 0.96, 100_000, (MEANT, GATE))))


def test_float_engines_are_asked_for_nothing() -> None:
    check_int8_macs(recipe(1.0), engines(None))
