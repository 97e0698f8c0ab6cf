"""Quantisation held to a budget: the part of the quantise stage that gives layers back to floating point.

Invariant: every figure is of the same people of dev, by the same function; nothing is retrained.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from edgepose.compress.macs import count_macs
from edgepose.compress.quantise import convert
from edgepose.compress.restore import (
    Budget,
    Prices,
    Restoration,
    find_restoration,
    quantised_layers,
    with_float,
)
from edgepose.errors import AccuracyRegression, AnnotationError, EdgeposeError
from edgepose.recipe import MaxDrop
from edgepose.spec import ModelSpec

Figures = Callable[[nn.Module], dict[str, float]]


@dataclass(frozen=True, slots=True, eq=False)
class Judge:
    """What networks are judged by.

    Attributes:
        spec: Their inputs and outputs.
        figures: All metrics on dev, by name.
        reference: Those of the float network.
        store: File that keeps measurements over interruptions; None keeps none.
    """

    spec: ModelSpec
    figures: Figures
    reference: dict[str, float]
    store: Path | None = None


def restored(wrapped: nn.Module, demand: MaxDrop, judge: Judge) -> tuple[nn.Module, dict[str, Any]]:
    """Give layers back to floating point until no more than `demand.points` are lost.

    Args:
        wrapped: The fake-quantised network, trained or not; it is not changed.
        demand: The budget.
        judge: What it is judged by.

    Returns:
        The network and the report: the budget, what was tried, and the path.

    Raises:
        AnnotationError: Nobody in dev can be measured by it.
        AccuracyRegression: Not even with all layers in floating point.
    """
    budget = Budget(_figure(judge.reference, demand.metric), demand.points)
    example = torch.zeros(1, 3, *judge.spec.preprocess.input_hw)

    def measure(layers: tuple[str, ...]) -> float:
        network = with_float(wrapped, layers, example) if layers else wrapped
        return _figure(judge.figures(network), demand.metric)

    found = find_restoration(lambda: prices_of(wrapped, judge.spec), measure, budget, store=judge.store)
    if judge.store is not None:
        judge.store.unlink(missing_ok=True)
    report = {"metric": demand.metric, **msgspec.to_builtins(found)}
    if not found.met:
        raise _missed(found, demand)
    return (with_float(wrapped, found.layers, example) if found.path else wrapped), report


def prices_of(wrapped: nn.Module, spec: ModelSpec) -> Prices:
    """What each quantised layer saves by being integer.

    Milliseconds, from ONNX Runtime's own profile of the float and the quantised network on this machine; where the
    network cannot be exported and timed, or a layer is not found in both profiles, multiply-accumulates for all.
    """
    example = torch.zeros(1, 3, *spec.preprocess.input_hw)
    layers = quantised_layers(wrapped, example)
    try:
        saved = _saved_ms(wrapped, spec)
    except (EdgeposeError, ImportError):
        saved = {}
    if all(layer in saved for layer in layers):
        return Prices({layer: saved[layer] for layer in layers}, "ms")
    macs = count_macs(convert(wrapped)[0], example)
    return Prices({layer: float(macs.within(layer)) for layer in layers}, "macs")


def _saved_ms(wrapped: nn.Module, spec: ModelSpec) -> dict[str, float]:
    import onnx_ir as ir

    from edgepose.export.notes import modules_of
    from edgepose.export.onnx import onnx_from_torch
    from edgepose.export.ort import kernel_times_ms
    from edgepose.export.qdq import quantised_onnx

    plain, ranges = convert(wrapped)
    with tempfile.TemporaryDirectory(prefix="edgepose-") as folder:
        before, after = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx_from_torch(plain, spec, before, ranges=ranges)
        quantised_onnx(before, ranges, after, dialect="u8s8")
        modules = modules_of(ir.load(before).metadata_props)
        float_ms, int8_ms = kernel_times_ms(before), kernel_times_ms(after)
    saved: dict[str, float] = {}
    for node in float_ms.keys() & int8_ms.keys() & modules.keys():  # a layer that runs twice saves twice
        saved[modules[node]] = saved.get(modules[node], 0.0) + float_ms[node] - int8_ms[node]
    return saved


def _figure(figures: dict[str, float], metric: str) -> float:
    figure = figures[metric]
    if math.isnan(figure):
        raise AnnotationError(
            f"dev: {metric}", found="nobody whom it can be measured on", expected="people with a complete torso"
        )
    return figure


def _missed(found: Restoration, demand: MaxDrop) -> AccuracyRegression:
    last = found.path[-1].lost if found.path else found.lost
    return AccuracyRegression(
        "recipe: quantise: max_drop",
        found=f"{last:.2f} points of {demand.metric} lost on dev with all {len(found.path)} layers given back to float",
        expected=f"at most {demand.points:g}",
        fix="fine-tune longer or with a smaller learning rate, or raise max_drop",
    )
