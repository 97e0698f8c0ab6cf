"""Which layer of a network is the first that two forms of it disagree about: bisection over intermediate values.

Invariant: nothing here knows a backend: values are asked for by name, and whoever answers may need a run for each.

Rounding moves a value by one code here and there, and what follows amplifies that, so a layer counts as different where
its mean difference is more than one code. Along a chain of layers differences stay once they are there, which halves
the places to look at with every run; where branches run side by side, what was found is traced back to its sources.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgepose.compress.ranges import Ranges
from edgepose.export.int8_reasons import origin
from edgepose.export.marks import marks_of
from edgepose.export.notes import HEAVY, modules_of

Values = Mapping[str, NDArray[Any]]
Probe = Callable[[tuple[str, ...]], Values]
"""Runs one form of the network and returns the values asked for, by name; all forms on the same images."""

_MANY_CODES = 1.0
_CODES = 255


class Place(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A value of a network that its forms can be compared in.

    Attributes:
        layer: The module that makes it.
        value: Its name in the ONNX file.
        key: The quantiser behind it, as `Range.key`; "" in a float network.
        step: Difference between neighbouring codes; 0 in a float network, where 1/255 of the value's range counts.
        sources: Values of the places that it is computed from.
    """

    layer: str
    value: str
    key: str = ""
    step: float = 0.0
    sources: tuple[str, ...] = ()


class Difference(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far two forms are apart in one place.

    Attributes:
        layer: The module.
        codes: Mean difference in codes; infinite where a value is not a number.
    """

    layer: str
    codes: float

    @property
    def text(self) -> str:
        return f"{self.layer} ({self.codes:.2g} codes off on average)"


def quantised_places(float_onnx: Path, quantised_onnx: Path, ranges: Ranges) -> tuple[Place, ...]:
    """The quantised activations of a network, in order of execution; without those that only a respelt node reads.

    Raises:
        OnnxError: The float file has no marks.
    """
    plain, written = ir.load(float_onnx), ir.load(quantised_onnx)
    graph, modules = tuple(plain.graph), modules_of(plain.metadata_props)
    order = {
        value.name: number
        for number, node in enumerate(written.graph)
        if node.op_type == "DequantizeLinear"
        for value in node.outputs
    }
    by_key, found = ranges.by_key, []
    for mark in marks_of(plain, where=str(float_onnx)):
        if mark.kind == "weight":
            continue
        readers = [f"{mark.source}_for_{reader.node}_dequantised" for reader in mark.readers]
        value = next((name for name in (f"{mark.source}_dequantised", *readers, mark.source) if name in order), None)
        if value is not None:
            found.append(Place(_layer(mark.source, graph, modules), value, mark.key, by_key[mark.key].scale[0]))
    return _with_sources(sorted(found, key=lambda place: order[place.value]), written.graph)


def float_places(float_onnx: Path) -> tuple[Place, ...]:
    """What the convolutions and matrix products of a float network make, in order of execution."""
    model = ir.load(float_onnx)
    modules = modules_of(model.metadata_props)
    places = [
        Place(modules.get(node.name or "", "") or node.name or "", node.outputs[0].name or "")
        for node in model.graph
        if node.op_type in HEAVY
    ]
    return _with_sources(places, model.graph)


def _layer(value: str, graph: tuple[ir.Node, ...], modules: Mapping[str, str]) -> str:
    """The module that makes a value; of sums and the like, what they are and a module in front of them."""
    module = modules.get(origin(value, graph), "")
    made = {output.name: node for node in graph for output in node.outputs}
    node: ir.Node | None = made.get(value)
    while node is not None and node.op_type in ("Relu", "Clip"):
        source = node.inputs[0]
        node = None if source is None else source.producer()
    if node is None or not module:
        return module or value
    return module if node.op_type in HEAVY else f"the {node.op_type} behind {module}"


def _with_sources(places: Sequence[Place], graph: ir.Graph) -> tuple[Place, ...]:
    values, made = {place.value for place in places}, {v.name: node for node in graph for v in node.outputs}
    found = []
    for place in places:
        sources, seen, open_nodes = [], set(), [made[place.value]]
        while open_nodes:
            for value in open_nodes.pop().inputs:
                if value is None or value.name in seen:
                    continue
                seen.add(value.name)
                producer = value.producer()
                if value.name in values and value.name is not None:
                    sources.append(value.name)
                elif producer is not None:
                    open_nodes.append(producer)
        found.append(msgspec.structs.replace(place, sources=tuple(sources)))
    return tuple(found)


def first_difference(
    places: Sequence[Place], reference: Probe, candidate: Probe, *, many_codes: float = _MANY_CODES
) -> Difference | None:
    """Bisect.

    Args:
        places: Where to look, in order of execution.
        reference: Asked for all places at once.
        candidate: Asked for one place at a time: an engine fuses what nobody asks for.
        many_codes: Mean difference from which on a place counts as different.

    Returns:
        The first place that differs, all of whose sources agree; None where the last one agrees, so that only what is
        behind them can differ.
    """
    if not places:
        return None
    expected = reference(tuple(place.value for place in places))
    gaps: dict[int, float] = {}

    def differs(number: int) -> bool:
        if number in gaps:
            return gaps[number] > many_codes
        place = places[number]
        gaps[number] = _codes_apart(place, expected[place.value], candidate((place.value,))[place.value])
        return gaps[number] > many_codes

    if not differs(len(places) - 1):
        return None
    low, high = 0, len(places) - 1
    while low < high:
        middle = (low + high) // 2
        if differs(middle):
            high = middle
        else:
            low = middle + 1
    numbers = {place.value: number for number, place in enumerate(places)}
    found: int | None = high
    while found is not None:
        high = found
        found = next((numbers[source] for source in places[high].sources if differs(numbers[source])), None)
    return Difference(places[high].layer, gaps[high])


def _codes_apart(place: Place, expected: NDArray[Any], found: NDArray[Any]) -> float:
    reference, candidate = np.asarray(expected, np.float64), np.asarray(found, np.float64)
    if reference.shape != candidate.shape or not np.isfinite(candidate).all():
        return float("inf")
    step = place.step or max(float(np.ptp(reference)) / _CODES, 1e-12)
    return float(np.abs(reference - candidate).mean() / step)
