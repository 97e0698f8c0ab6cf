"""The accuracy of one network in all its forms: torch, the exported file, each engine; on dev, side by side.

Invariant: all forms see the same crops of the same people. A form that is meant to be the very network and is surely
further from it than `GAP_POINTS` is an error that names the first layer that differs, never a figure in a report.
Surely: the whole 95 % interval of the difference, paired over people. Two runtimes round some codes differently, and on
few people such noise alone moves a figure by more than that.

Float forms are held to more: 99 of 100 keypoints stay within `MAX_SHIFT_PX` of torch's. And no form may answer with
what is not a number, or the same to everybody.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from edgepose.compress.hooks import hooks_of
from edgepose.compress.ranges import read_ranges
from edgepose.data.coco import PoseDataset
from edgepose.errors import ParityError
from edgepose.export.ends import spec_with_ends
from edgepose.export.first_difference import Place, Probe, Values, first_difference, float_places, quantised_places
from edgepose.export.ort import values_ort
from edgepose.pose import metrics
from edgepose.pose.codec import decode
from edgepose.pose.preprocess import network_input, to_source
from edgepose.runtime import infer_all, open_session
from edgepose.runtime.ort import OrtSession
from edgepose.runtime.session import Session
from edgepose.spec import Backend, ModelSpec, Precision
from edgepose.stages.cache import StageResult
from edgepose.stages.export import FLOAT_ONNX, MODEL, RANGES, ends_of
from edgepose.stages.networks import load_network
from edgepose.stages.source import Source
from edgepose.stats import paired_bootstrap
from edgepose.training.predict import Crops, cut_crops
from edgepose.training.session import TorchSession

GAP_POINTS = 0.3
"""Most points of the first of `_JUDGED` that dev has a figure of, either way."""

MAX_SHIFT_PX: dict[Precision, float] = {"fp32": 0.1, "fp16": 0.5}
"""Most pixels of the input that the 99th percentile of keypoints may be from torch's."""

_JUDGED = ("pck_torso_0.2", "pck_extent_0.1")
_BATCH = 32
_CODES_FP32 = 0.01  # two runtimes differ by less than a thousandth, a fault of 0.1 px by hardly more than this
_PROBED = 16  # crops that layers are compared on
TORCH, EXPORTED = "torch", "exported"


@dataclass(frozen=True, slots=True)
class Form:
    """An engine.

    Attributes:
        name: What the report calls it: its folder in the bundle.
        path: Its main file.
        backend: Who executes it.
        precision: Its precision.
        same: Whether it is meant to compute what the checkpoint does: not where weights were narrowed to seven bits
            or quantisers taken out.
        batch: Its fixed batch; 0 where it is free.
    """

    name: str
    path: Path
    backend: Backend
    precision: Precision
    same: bool
    batch: int = 0


def form_of(name: str, engine: StageResult) -> Form:
    """The engine that a stage built."""
    report = engine.report
    # A float engine of a quantised network says how far it is from the floats it holds (`stages.float_engine`).
    another = report.get("weight_bits") == 7 or "from_floats" in report
    path, batch = engine.path / report["main"], report.get("batch", 0)
    return Form(name, path, report["backend"], report["precision"], same=not another, batch=batch)


@dataclass(frozen=True, slots=True, eq=False)
class _Network:
    """What is compared, and on what."""

    module: nn.Module
    spec: ModelSpec
    ended: ModelSpec
    exported: Path
    crops: Crops

    @property
    def onnx(self) -> Path:
        quantised = self.exported / MODEL
        return quantised if quantised.exists() else self.exported / FLOAT_ONNX

    def feeds(self, spec: ModelSpec, people: slice) -> dict[str, NDArray[Any]]:
        """What a form of that specification, with ends or without, is fed."""
        return {spec.inputs[0].name: network_input(self.crops.pixels[people], spec)}


@dataclass(frozen=True, slots=True, eq=False)
class _Said:
    """What a form says of everybody.

    Attributes:
        keypoints: (P, K, 2) float32, pixels of the input crop.
        fault: What is wrong with its outputs, whatever they mean; empty where nothing is.
    """

    keypoints: NDArray[np.float32]
    fault: str


def side_by_side(source: Source, dev: PoseDataset, exported: Path, engines: Sequence[Form]) -> dict[str, Any]:
    """Measure a network in all its forms.

    Args:
        source: The checkpoint.
        dev: The people.
        exported: Folder of the export stage.
        engines: Its engines.

    Returns:
        The report: figures by form and metric, and the points between each form and torch.

    Raises:
        ParityError: A form that is meant to be the same is too far off; names the first layer that differs.
    """
    module, checkpoint = load_network(source)
    spec = checkpoint.card.spec
    network = _Network(module, spec, spec_with_ends(spec, ends_of(exported)), exported, cut_crops(dev, spec))
    said = {TORCH: _answers(TorchSession(module, spec), network, spec)}
    written = OrtSession(network.onnx, threads=1, optimise=False)
    said[EXPORTED] = _answers(written, network, spec)
    for form in engines:
        session = open_session(form.path, form.backend, threads=1, precision=form.precision)
        said[form.name] = _answers(session, network, network.ended)
    shifts = {name: _shift(said[TORCH], form) for name, form in said.items() if name != TORCH}
    _check_outputs(EXPORTED, said, shifts, (network, None))
    for form in engines:
        _check_outputs(form.name, said, shifts, (network, form))
    transforms = network.crops.transforms
    joints = {name: _measured(to_source(form.keypoints, transforms), dev) for name, form in said.items()}
    figures = {
        name: {m: metrics.pooled(m, found) for m in metrics.available(dev.keypoints)} for name, found in joints.items()
    }
    gaps = {name: _gaps(figures[TORCH], row) for name, row in figures.items() if name != TORCH}
    metric = next((metric for metric in _JUDGED if np.isfinite(figures[TORCH].get(metric, np.nan))), None)
    bounds = {}
    if metric is not None:
        bounds = {name: _bounds(metric, joints[TORCH], joints[name], dev) for name in gaps}
        _check(EXPORTED, metric, figures, bounds, (network, None))
        for form in engines:
            if form.same:
                _check(form.name, metric, figures, bounds, (network, form))
    return {
        "people": len(dev.persons),
        "figures": figures,
        "gaps": gaps,
        "shifts": shifts,
        "judged": {"metric": metric, "limit_points": GAP_POINTS, "ci95": bounds},
    }


def _answers(session: Session, network: _Network, spec: ModelSpec) -> _Said:
    """What a form of that specification says of everybody; the session is closed."""
    found, constant, fault = [], dict[str, NDArray[Any]](), ""
    people = len(network.crops.pixels)
    try:
        for start in range(0, people, _BATCH):
            outputs = infer_all(session, network.feeds(spec, slice(start, start + _BATCH)))
            found.append(decode(outputs, spec.decoder)[0])
            broken = next((name for name, value in outputs.items() if not np.isfinite(value).all()), "")
            fault = fault or (broken and f"values of output {broken!r} that are NaN or infinite")
            if start == 0:
                constant = {name: value[:1] for name, value in outputs.items()}
            constant = {name: one for name, one in constant.items() if (outputs[name] == one).all()}
    finally:
        session.close()
    if constant and people > 1 and not fault:
        fault = f"output {next(iter(constant))!r}, which is the same for all {people} people"
    return _Said(np.concatenate(found), fault)


def _shift(torch: _Said, form: _Said) -> dict[str, float]:
    """How far a form's keypoints are from torch's, in pixels of the input."""
    distance = np.linalg.norm(form.keypoints.astype(np.float64) - torch.keypoints, axis=-1)
    return {"median_px": float(np.median(distance)), "p99_px": float(np.percentile(distance, 99))}


def _check_outputs(
    name: str,
    said: Mapping[str, _Said],
    shifts: Mapping[str, Mapping[str, float]],
    compared: tuple[_Network, Form | None],
) -> None:
    """Refuse a form that answers nonsense, or a float one whose keypoints are elsewhere.

    Raises:
        ParityError: Names the first layer that differs.
    """
    network, form = compared
    quantised = (network.exported / RANGES).exists()
    precision: Precision = ("int8" if quantised else "fp32") if form is None else form.precision
    limit, shift = MAX_SHIFT_PX.get(precision, np.inf), shifts[name]["p99_px"]
    if said[name].fault and not said[TORCH].fault:
        found, expected = said[name].fault, "numbers that differ from person to person"
    elif (form is None or form.same) and not shift <= limit:
        found, expected = f"keypoints {shift:.3g} px from torch's (99th percentile)", f"at most {limit:g} px"
    else:
        return
    raise ParityError(
        f"parity on dev, {len(network.crops.pixels)} crops: {name}",
        found=f"{found}; the first layer that differs is {_first_layer(network, form)}",
        expected=expected,
        fix="look into that layer, or protect it",
    )


def _measured(predicted: NDArray[np.float32], dev: PoseDataset) -> metrics.JointErrors:
    return metrics.measure(predicted, np.stack([person.keypoints for person in dev.persons]), dev.keypoints)


def _gaps(torch: Mapping[str, float], form: Mapping[str, float]) -> dict[str, float]:
    """Points of PCK that a form has more than torch."""
    return {name: 100 * (form[name] - torch[name]) for name in torch if "pck" in name}


def _bounds(
    metric: str, torch: metrics.JointErrors, form: metrics.JointErrors, dev: PoseDataset
) -> tuple[float, float]:
    """95 % bounds of the points that a form has more than torch; people of one photograph are drawn together."""
    (base, counted), (other, _) = (metrics.joint_values(metric, joints) for joints in (torch, form))
    mine, theirs, joints = (np.where(counted, v, 0.0).sum(axis=1, keepdims=True) for v in (base, other, 1.0))
    photographs = np.array([person.image_id for person in dev.persons])
    pairs = paired_bootstrap(mine, theirs, joints, seed=0, clusters=photographs)
    low, high = pairs.bounds(0.025)
    return 100 * float(low[0]), 100 * float(high[0])


def _check(
    name: str,
    metric: str,
    figures: Mapping[str, Mapping[str, float]],
    bounds: Mapping[str, tuple[float, float]],
    compared: tuple[_Network, Form | None],
) -> None:
    low, high = bounds[name]
    if low <= GAP_POINTS and high >= -GAP_POINTS:
        return
    before, after = figures[TORCH][metric], figures[name][metric]
    first = _first_layer(*compared)
    raise ParityError(
        f"accuracy on dev: {name}",
        found=f"{metric} {100 * after:.2f}, in torch {100 * before:.2f} (difference {low:+.2f} to {high:+.2f}); the "
        f"first layer that differs is {first}",
        expected=f"at most {GAP_POINTS:g} points between them",
        fix="look into that layer, or protect it",
    )


def _first_layer(network: _Network, form: Form | None) -> str:
    """What `first_difference` finds between torch and the exported file, or between that file and an engine."""
    probed = slice(form.batch if form is not None and form.batch else _PROBED)
    feeds = network.feeds(network.spec, probed)
    ranges = network.exported / RANGES
    places: Sequence[Place]
    if ranges.exists():
        places = quantised_places(network.exported / FLOAT_ONNX, network.onnx, read_ranges(ranges))
    elif form is not None:
        places = float_places(network.onnx)
    else:
        places = ()  # exporting has compared a float network with torch to four digits
    if form is None:
        places = _single(places, network.module)

    def written(names: tuple[str, ...]) -> Values:
        return values_ort(network.onnx, names, feeds, optimise=False)

    if form is None:
        found = first_difference(places, _torch_probe(network, places), written)
    else:
        probe = _engine_probe(form, network.feeds(network.ended, probed))
        codes = _CODES_FP32 if form.precision == "fp32" else 1.0
        found = first_difference(places, written, probe, many_codes=codes)
    return "behind all that could be compared" if found is None else found.text


def _single(places: Sequence[Place], module: nn.Module) -> list[Place]:
    """Places whose quantiser stands nowhere else: of a shared one it is not known which value it was called with."""
    hooks = hooks_of(module) if places else {}
    counts = Counter(id(hook) for hook in hooks.values())
    return [place for place in places if counts[id(hooks[place.key])] == 1]


def _torch_probe(network: _Network, places: Sequence[Place]) -> Probe:
    """Values behind the quantisers of the fake-quantised network, by their names in the exported file."""
    seen: dict[str, NDArray[Any]] = {}
    hooks, values = hooks_of(network.module), {place.key: place.value for place in places}
    handles = [
        hooks[key].register_forward_hook(lambda _m, _i, value, name=name: seen.update({name: value.numpy()}))
        for key, name in values.items()
    ]
    try:
        TorchSession(network.module, network.spec).infer(network.feeds(network.spec, slice(_PROBED)))
    finally:
        for handle in handles:
            handle.remove()
    return lambda names: {name: seen[name] for name in names}


def _engine_probe(form: Form, feeds: Mapping[str, NDArray[Any]]) -> Probe:
    match form.backend:
        case "onnxruntime":
            return lambda names: values_ort(form.path, names, feeds, optimise=True)
        case "openvino":
            from edgepose.export.openvino import values_openvino

            hint = "bf16" if form.precision == "bf16" else "f32"
            return lambda names: values_openvino(form.path, names, feeds, precision=hint)
        case "tensorrt" | "tensorrt-rtx":
            raise AssertionError(form.backend)  # such engines are not executed here
