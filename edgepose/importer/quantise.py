"""QUANTISE: a float bundle and calibration images to an INT8 bundle, without torch networks: for imported networks.

Invariant: the source is only read; a recipe asks for nothing that is not done, and what cannot be done to an ONNX file
(pruning, training) is refused before any work.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgepose.bundle import Bundle, BundleDraft, GoldenDraft, check_file, golden_vectors, read_bundle
from edgepose.compress.ranges import Ranges, write_ranges
from edgepose.data.coco import PoseDataset, dataset, read_image
from edgepose.data.splits import split_train
from edgepose.errors import AccuracyRegression, DataUnavailable, UsageError
from edgepose.estimator import PoseEstimator
from edgepose.export.parity import keypoint_shift
from edgepose.export.qdq import quantised_onnx
from edgepose.export.weight_bits import quantisation_of
from edgepose.host import fingerprint
from edgepose.importer.calibrate import Estimator, calibrated
from edgepose.importer.placement import placed
from edgepose.pose.codec import decode
from edgepose.pose.preprocess import crop_transforms, normalise, warp
from edgepose.profiler.accuracy import evaluate, summary
from edgepose.profiles import load_target
from edgepose.recipe import Recipe
from edgepose.runtime.ort import OrtSession
from edgepose.spec import ModelSpec, OneStage
from edgepose.stages import export
from edgepose.stages.assemble import (
    CompileResult,
    StageObserver,
    built_here,
    check_out,
    engine_drafts,
    engine_orders,
    engine_reports,
    finished_bundle,
    key_of,
    observed,
    stage_report,
)
from edgepose.stages.budget import METRIC, check_int8_macs
from edgepose.stages.cache import StageKey
from edgepose.stages.settings import QuantiseStage, plan_of

_PHOTOGRAPHS = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True, slots=True)
class QuantiseRequest:
    """What to quantise.

    Attributes:
        source: A bundle whose network is float.
        recipe: `mode: ptq`, targets, and what may be lost.
        data: Folder with train.json and images/; or any folder of photographs, each of one person who fills it.
        out: Directory of the new bundle.
        replace: Whether another bundle at `out` may be replaced.
    """

    source: Path
    recipe: Recipe
    data: Path | None
    out: Path
    replace: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Images:
    """Calibration images: photographs with a box each, None for the whole of it; and who accuracy is measured on."""

    places: tuple[tuple[Path, tuple[float, float, float, float] | None], ...]
    digest: str
    dev: PoseDataset | None


def quantise_bundle(request: QuantiseRequest, observer: StageObserver) -> CompileResult:
    """Quantise the network of a bundle after training.

    Args:
        request: What to quantise.
        observer: Told which stages ran.

    Raises:
        BadInput: The bundle is no float one, or the recipe asks for what cannot be done to it.
        DataUnavailable: No calibration images.
        AccuracyRegression: More was lost on dev than the recipe allows.
        ParityError: An engine strays from the quantised network, or does too little in integers.
    """
    bundle, recipe = read_bundle(request.source), request.recipe
    targets = tuple(load_target(name) for name in recipe.targets)
    here, later = built_here(targets)
    orders = engine_orders(here)
    settings = _settings(bundle, recipe, plan_of(recipe, targets).quantise)
    origin = {
        "source": {"name": bundle.manifest.name, "digest": bundle.digest}, "recipe": msgspec.to_builtins(recipe),
    }  # fmt: skip
    check_out(request.out, origin, replace=request.replace)
    images = _images(request.data, bundle.manifest.spec, settings, needs_dev=recipe.max_drop_points is not None)

    def quantise(folder: Path) -> dict[str, Any]:
        return _quantise(bundle, settings, images, folder)

    inputs = {"bundle": bundle.digest, "images": images.digest}
    ptq = observed(StageKey("ptq-onnx", inputs, settings, ("onnx", "onnxruntime")), quantise, observer)
    _check_drop(recipe, ptq.report)
    engines = []
    for order in orders:

        def work(folder: Path, order: Any = order) -> dict[str, Any]:
            spec, target = bundle.manifest.spec, order.target
            batch = 0 if isinstance(spec.inputs[0].shape[0], int) else target.batch
            return export.build_engine(ptq.path, spec, order.backend, order.weight_bits, folder, batch=batch)

        engines.append((order, observed(order.key({"ptq": ptq.key}), work, observer)))
    check_int8_macs(recipe, tuple(engines))
    built = [(order.target.name, order.target.threads, result.key) for order, result in engines]
    key = key_of("ptq-onnx", ptq.key, built)
    golden, answers = export.golden_vectors(ptq.path)

    def draft() -> BundleDraft:
        name = f"{bundle.manifest.name}-{recipe.name}"
        old = {engine.path.rpartition("/")[0] for engine in bundle.manifest.engines} | {"build"}
        reports = {name: report for name, report in bundle.manifest.reports.items() if name not in old}
        derived = {"onnx", *(f"engine:{engine.path}" for engine in bundle.manifest.engines)}
        chain = {name: link for name, link in bundle.manifest.chain.items() if name not in derived}
        made = tuple(engines)
        return BundleDraft(
            name=name,
            spec=msgspec.structs.replace(bundle.manifest.spec, name=name),
            onnx=ptq.path / export.MODEL,
            engines=engine_drafts(made),
            chain={**chain, "bundle": bundle.digest},
            reports={
                **reports,
                "ptq": stage_report(ptq),
                **engine_reports(made),
                "build": {**origin, "key": key, "host": fingerprint().digest},
            },
            golden=GoldenDraft(golden, answers, decode(answers, bundle.manifest.spec.decoder)[0]),
        )

    stages = (ptq, *(result for _, result in engines))
    made = finished_bundle(request.out, key, stages, draft, replace=request.replace)
    return replace(made, later=later)


def _settings(bundle: Bundle, recipe: Recipe, quantise: QuantiseStage | None) -> QuantiseStage:
    """The recipe's settings, after everything that cannot be done to an ONNX file was refused."""
    where, fix = f"recipe {recipe.name}", "compile the checkpoint with it, or use a recipe with mode: ptq alone"
    if quantise is None:
        raise UsageError(
            where, found="no quantisation", expected="mode: ptq", fix="use edgepose build for float engines"
        )
    undone = {
        "prune": recipe.prune is not None,
        "mode: qat": quantise.training is not None,
        "quantise: max_drop": quantise.max_drop is not None,
        "precisions": recipe.precisions is not None,
        "range_estimator: histogram": quantise.estimator == "histogram",
    }
    for what, asked in undone.items():
        if asked:
            raise UsageError(where, found=f"{what}, for a bundle", expected="a recipe for ONNX networks", fix=fix)
    if quantisation_of(check_file(bundle, bundle.manifest.model)).dialect != "float":
        raise UsageError(f"bundle {bundle.root}", found="a network that is quantised already", expected="a float one")
    if golden_vectors(bundle) is None:
        raise UsageError(f"bundle {bundle.root}", found="no golden vectors", expected="some, to judge engines by")
    return quantise


def _images(data: Path | None, spec: ModelSpec, settings: QuantiseStage, *, needs_dev: bool) -> _Images:
    if data is None:
        fix = "add --data DIR: a folder of photographs, or one with train.json and images/"
        raise DataUnavailable("calibration images", found="no data", fix=fix)
    if (data / "train.json").is_file():
        train, dev = split_train(dataset(data, "train"))
        chosen = train.sample(settings.calibration_images, settings.seed).persons
        x = [(person.image, tuple(map(float, person.box_xyxy))) for person in chosen]
        places = tuple((path, (box[0], box[1], box[2], box[3])) for path, box in x)
        same = dev.keypoints.names == spec.keypoints.names
        if needs_dev and not same:
            found = f"people with {dev.keypoints.count} keypoints of other names"
            raise UsageError("recipe: max_drop_points", found=found, expected="the network's keypoints on dev")
        return _Images(places, f"{train.digest}-{dev.digest}", dev if same else None)
    if needs_dev:
        raise UsageError("recipe: max_drop_points", found="photographs without labels", expected="train.json in --data")
    files = sorted(path for path in data.glob("*") if path.suffix.lower() in _PHOTOGRAPHS) if data.is_dir() else []
    if not files:
        raise DataUnavailable(f"{data}", found="no photographs", expected=f"files {', '.join(_PHOTOGRAPHS)}")
    picked = np.random.default_rng(settings.seed).permutation(len(files))[: settings.calibration_images]
    taken = [files[place] for place in np.sort(picked)]
    digest = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in taken)).hexdigest()
    return _Images(tuple((path, None) for path in taken), digest, None)


def _quantise(bundle: Bundle, settings: QuantiseStage, images: _Images, folder: Path) -> dict[str, Any]:
    """The stage: the marked float network, its ranges, the quantised network and what that answers."""
    spec = bundle.manifest.spec
    placement = placed(check_file(bundle, bundle.manifest.model), settings.protected)
    estimator: Estimator = "mean-minmax" if settings.estimator == "default" else settings.estimator  # type: ignore[assignment]
    activations = calibrated(placement, _crops(images, spec), estimator=estimator, symmetric=settings.symmetric)
    ranges = Ranges((*activations, *placement.weights), placement.protected)
    ir.save(placement.model, folder / export.FLOAT_ONNX)
    write_ranges(folder / export.RANGES, ranges)
    written = quantised_onnx(folder / export.FLOAT_ONNX, ranges, folder / export.MODEL, dialect="u8s8")
    golden = golden_vectors(bundle)
    assert golden is not None
    answers = _answers(folder / export.MODEL, spec, golden.inputs, optimise=False)
    arrays: dict[str, Any] = {"images": golden.inputs, **answers}
    np.savez_compressed(folder / export.GOLDEN, **arrays)
    floats: dict[str, NDArray[np.float32]] = {name: value.astype(np.float32) for name, value in golden.outputs.items()}
    report: dict[str, Any] = {
        "calibration_people": len(images.places),
        "protected": list(placement.protected),
        "qdq": msgspec.to_builtins(written),
        "from_float": msgspec.to_builtins(keypoint_shift(floats, answers, spec.decoder)),
    }
    if images.dev is not None:
        report["dev_float"] = _figures(folder / export.FLOAT_ONNX, spec, images.dev)
        report["dev"] = _figures(folder / export.MODEL, spec, images.dev)
    return report


def _crops(images: _Images, spec: ModelSpec) -> Iterator[NDArray[np.float32]]:
    """Calibration images as the network takes them, one batch each."""
    preprocess, batch = spec.preprocess, spec.inputs[0].shape[0]
    for path, person in images.places:
        frame = read_image(path)
        whole = person is None or isinstance(spec.decoder, OneStage)
        box = (0, 0, frame.shape[1], frame.shape[0]) if whole else person
        transform = crop_transforms(np.array([box], np.float64), preprocess)
        crop = normalise(warp(frame, transform, preprocess.input_hw, preprocess.border), preprocess)
        yield np.repeat(crop, batch, axis=0) if isinstance(batch, int) else crop


def _answers(model: Path, spec: ModelSpec, images: NDArray[np.float32], *, optimise: bool) -> dict[str, Any]:
    session = OrtSession(model, threads=1, optimise=optimise)
    try:
        return session.infer({spec.inputs[0].name: images})
    finally:
        session.close()


def _figures(model: Path, spec: ModelSpec, people: PoseDataset) -> dict[str, float]:
    with PoseEstimator(OrtSession(model, threads=1), spec, backend="onnxruntime") as estimator:
        return summary(evaluate(estimator, people), people.keypoints)


def _check_drop(recipe: Recipe, report: dict[str, Any]) -> None:
    if recipe.max_drop_points is None:
        return
    before, after = report["dev_float"].get(METRIC), report["dev"].get(METRIC)
    if before is None or after is None:
        raise UsageError("recipe: max_drop_points", found=f"no {METRIC} on dev", expected="people with a torso")
    drop = 100 * (before - after)
    if drop > recipe.max_drop_points:
        raise AccuracyRegression(
            f"recipe {recipe.name}: max_drop_points",
            found=f"{drop:.2f} points of {METRIC} lost on dev ({100 * before:.2f} → {100 * after:.2f})",
            expected=f"at most {recipe.max_drop_points:g}",
            fix="protect layers, take more calibration images, or raise max_drop_points",
        )
