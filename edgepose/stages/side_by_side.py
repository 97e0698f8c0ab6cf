"""The accuracy of one network in all its forms: torch, the exported file, each engine; on dev, side by side.

Invariant: all forms see the same crops of the same people. A form that is meant to be the very network and is surely
further from it than `GAP_POINTS` is an error that names the first layer that differs, never a figure in a report.
Surely: the whole 95 % interval of the difference, paired over people. Two runtimes round some codes differently, and on
few people such noise alone moves a figure by more than that.
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
from edgepose.export.first_difference import Place, Probe, Values, first_difference, float_places, quantised_places
from edgepose.export.ort import values_ort
from edgepose.pose import metrics
from edgepose.pose.codec import decode
from edgepose.pose.preprocess import normalise, to_source
from edgepose.profiler.stats import paired_bootstrap
from edgepose.runtime import open_session
from edgepose.runtime.ort import OrtSession
from edgepose.runtime.session import Session
from edgepose.spec import Backend, ModelSpec, Precision
from edgepose.stages.cache import StageResult
from edgepose.stages.export import FLOAT_ONNX, MODEL, RANGES
from edgepose.stages.networks import load_network
from edgepose.stages.source import Source
from edgepose.training.predict import Crops, cut_crops
from edgepose.training.session import TorchSession

GAP_POINTS = 0.3
"""Most points of the first of `_JUDGED` that dev has a figure of, either way."""

_JUDGED = ("pck_torso_0.2", "pck_extent_0.1")
_BATCH = 32
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
    """

    name: str
    path: Path
    backend: Backend
    precision: Precision
    same: bool


def form_of(name: str, engine: StageResult) -> Form:
    """The engine that a stage built."""
    report = engine.report
    # A float engine of a quantised network says how far it is from the floats it holds (`stages.float_engine`).
    another = report.get("weight_bits") == 7 or "from_floats" in report
    return Form(name, engine.path / report["main"], report["backend"], report["precision"], same=not another)


@dataclass(frozen=True, slots=True, eq=False)
class _Network:
    """What is compared, and on what."""

    module: nn.Module
    spec: ModelSpec
    exported: Path
    crops: Crops

    @property
    def onnx(self) -> Path:
        quantised = self.exported / MODEL
        return quantised if quantised.exists() else self.exported / FLOAT_ONNX

    def feeds(self, stop: int | None = None) -> NDArray[np.float32]:
        """(N, 3, h, w) float32, normalised."""
        return normalise(self.crops.pixels[:stop], self.spec.preprocess)


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
    network = _Network(module, spec, exported, cut_crops(dev, spec))
    predicted = {TORCH: _predictions(TorchSession(module, spec), network)}
    written = OrtSession(network.onnx, threads=1, optimise=False)
    predicted[EXPORTED] = _predictions(written, network)
    for form in engines:
        session = open_session(form.path, form.backend, threads=1, precision=form.precision)
        predicted[form.name] = _predictions(session, network)
    joints = {name: _measured(keypoints, dev) for name, keypoints in predicted.items()}
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
        "judged": {"metric": metric, "limit_points": GAP_POINTS, "ci95": bounds},
    }


def _predictions(session: Session, network: _Network) -> NDArray[np.float32]:
    """(P, K, 2) float32, pixels of the source image; the session is closed."""
    spec, pixels, found = network.spec, network.crops.pixels, []
    try:
        for start in range(0, len(pixels), _BATCH):
            images = normalise(pixels[start : start + _BATCH], spec.preprocess)
            found.append(decode(session.infer({spec.inputs[0].name: images}), spec.decoder)[0])
    finally:
        session.close()
    return to_source(np.concatenate(found), network.crops.transforms)


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
    feeds = {network.spec.inputs[0].name: network.feeds(_PROBED)}
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
        found = first_difference(places, written, _engine_probe(form, feeds))
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
        TorchSession(network.module, network.spec).infer({network.spec.inputs[0].name: network.feeds(_PROBED)})
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
