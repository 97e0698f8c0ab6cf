"""COMPILE: a checkpoint and a recipe to a bundle. Read `compile_bundle` first: it is the order of the stages.

Invariant: nothing is computed twice (stages are found by key) and nothing is half-written (the bundle appears whole).
Importing this module loads no builder; a rerun that finds every stage done never does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from edgepose.blocks.card import Card, read_card
from edgepose.blocks.zoo import find_checkpoint, zoo_names
from edgepose.bundle import Bundle, BundleDraft, EngineDraft, GoldenDraft, read_bundle, write_bundle
from edgepose.data.coco import PoseDataset, dataset
from edgepose.data.splits import image_digests, split_train
from edgepose.errors import AccuracyRegression, AnnotationError, BackendUnavailable, CheckpointError, UsageError
from edgepose.host import fingerprint, weight_bits
from edgepose.pose.codec import decode
from edgepose.profiles import load_target
from edgepose.recipe import Recipe
from edgepose.runtime import EXECUTABLE
from edgepose.spec import Backend, Target
from edgepose.stages.cache import StageKey, StageResult, run_stage, run_state
from edgepose.stages.settings import Plan, QuantiseStage, plan_of

_METRIC = "pck_torso_0.2"
_TORCH = ("torch", "numpy", "opencv-python-headless")
_EXPORT = ("torch", "onnx", "onnxscript", "nncf")
_BUILDERS: dict[str, str] = {"onnxruntime": "onnxruntime", "openvino": "openvino"}


class Observer(Protocol):
    """Told about a compile's progress."""

    def started(self, stage: str) -> None:
        """A stage was looked at."""

    def finished(self, stage: StageResult) -> None:
        """A stage was run, or found."""

    def cutting(self, done: int, total: int) -> None:
        """A photograph was read for fine-tuning."""

    def step(self, done: int, total: int, loss: float) -> None:
        """A step of fine-tuning was taken."""

    def epoch(self, row: dict[str, float]) -> None:
        """An epoch of fine-tuning ended."""


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """What to compile.

    Attributes:
        recipe: The stages.
        model: Name of a zoo network, or path of a checkpoint.
        data: Folder with train.json and images/; needed by every stage that looks at people.
        out: Directory of the bundle.
        replace: Whether another bundle at `out` may be replaced.
    """

    recipe: Recipe
    model: str
    data: Path | None
    out: Path
    replace: bool = False


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What came of a compile.

    Attributes:
        bundle: The bundle on disk.
        stages: The stages in order.
        reused: Whether the bundle was already there.
    """

    bundle: Bundle
    stages: tuple[StageResult, ...]
    reused: bool


@dataclass(slots=True, eq=False)
class _Build:
    """One compile on its way: the checkpoint so far and what the stages said."""

    request: CompileRequest
    observer: Observer
    targets: tuple[Target, ...]
    plan: Plan
    source: Path
    source_card: Card
    checkpoint: Path
    digest: str
    people: tuple[PoseDataset, PoseDataset] | None = None
    stages: list[StageResult] = field(default_factory=list)


def compile_bundle(request: CompileRequest, observer: Observer) -> CompileResult:
    """Compile a checkpoint.

    Raises:
        BadInput: Recipe, checkpoint, data or target cannot be used as asked.
        DataUnavailable: A stage needs people and there is no data.
        AccuracyRegression: More accuracy was lost on dev than the recipe's `max_drop_points`.
        ParityError: Two forms of the network disagree.
    """
    build = _start(request, observer)
    _take_prebuilt(build)
    if build.plan.prune is not None:
        _prune(build, build.plan)
    if build.plan.quantise is not None:
        _quantise(build, build.plan.quantise)
    _check_budget(build)
    exported = _export(build)
    engines = _engines(build, exported)
    return _bundle(build, exported, engines)


def planned_stages(request: CompileRequest) -> tuple[tuple[str, str], ...]:
    """The stages that a compile would go through, in order, and what is known of each; nothing is run.

    Raises:
        BadInput: As `compile_bundle`.
    """
    build = _start(request, _Nobody())
    _take_prebuilt(build)
    stages = [(stage.stage, "reused from a checkpoint that went through it") for stage in build.stages]
    plan = build.plan
    if (plan.prune or plan.quantise) and build.people is None:
        stages.append(("data", "missing: add --data DIR"))
    if plan.prune or plan.quantise:
        stages.append(("reference", "measured on dev"))
    if plan.prune:
        stages.append(("prune", f"{plan.prune.ratio:.0%} of the multiply-accumulates, by {plan.prune.importance}"))
    if plan.recover:
        stages.append(("recover", f"{plan.recover.epochs} epochs"))
    if plan.quantise:
        training = plan.quantise.training
        stages.append(
            (
                plan.quantise.name,
                f"{plan.quantise.calibration_images} people" if training is None else f"{training.epochs} epochs",
            )
        )
    stages.append(("export", f"opset {request.recipe.export.opset}"))
    for target in build.targets:
        stages += [(f"engine-{backend}", f"for {target.name}") for backend in _executable(target)]
    return (*stages, ("bundle", str(request.out)))


class _Nobody:
    def started(self, stage: str) -> None: ...
    def finished(self, stage: StageResult) -> None: ...
    def cutting(self, done: int, total: int) -> None: ...
    def step(self, done: int, total: int, loss: float) -> None: ...
    def epoch(self, row: dict[str, float]) -> None: ...


def _start(request: CompileRequest, observer: Observer) -> _Build:
    targets = tuple(load_target(name) for name in request.recipe.targets)
    for target in targets:
        _executable(target)
    source = find_checkpoint(request.model)
    card = read_card(source)
    people = None
    if request.data is not None:
        people = split_train(dataset(request.data, "train"))
        if people[0].keypoints.names != card.keypoints.names:
            raise CheckpointError(
                f"{request.model}",
                found=f"a network for {card.keypoints.count} keypoints",
                expected=f"the {people[0].keypoints.count} of {request.data}",
                fix="choose data with the network's keypoints, or train a network for these",
            )
    plan = plan_of(request.recipe, targets)
    return _Build(request, observer, targets, plan, source, card, source, card.weights_sha256, people)


def _executable(target: Target) -> tuple[Backend, ...]:
    backends = tuple(backend for backend in target.backends if backend in EXECUTABLE)
    if not backends:
        raise BackendUnavailable(
            f"target {target.name}",
            found=f"the backends {', '.join(target.backends)}, which this release does not build",
            expected=f"one of {', '.join(EXECUTABLE)}",
            fix="compile for another target; `edgepose doctor` says what TensorRT would need",
        )
    return backends


def _take_prebuilt(build: _Build) -> None:
    """Start from a committed or given checkpoint that already went through the recipe's stages.

    A checkpoint counts when its lineage records the very settings that the recipe asks for, made from the same source
    and, where data was given, from the same people.
    """
    recipe = build.request.recipe
    if recipe.prune is None and recipe.quantise is None:
        return
    wanted = _wanted_lineage(build.plan)
    candidates = [build.source]
    sibling = f"{build.source_card.name}-{recipe.name}"
    if sibling in zoo_names():
        candidates.append(find_checkpoint(sibling))
    for path in candidates:
        card = read_card(path)
        tail = card.lineage[-len(wanted) :]
        if [(entry.stage, entry.config) for entry in tail] != wanted:
            continue
        from_here = path == build.source or tail[0].inputs.get("checkpoint") == build.digest
        same_people = build.people is None or tail[0].inputs.get("train") == build.people[0].digest
        if from_here and same_people:
            for entry in tail:
                found = StageResult(entry.stage, "", str(path.parent), entry.report, 0.0, reused=True)
                build.stages.append(found)
                build.observer.finished(found)
            build.checkpoint, build.digest = path, card.weights_sha256
            build.plan = Plan(None, None, None)
            return
    if build.source_card.plan is not None or build.source_card.quantisation is not None:
        raise CheckpointError(
            build.request.model,
            found="a checkpoint that is compressed already, with other settings",
            expected=f"a float checkpoint, or one made by the recipe {recipe.name} as it is now",
            fix="start from the float checkpoint, or use the recipe fp32 to export it as it is",
        )


def _wanted_lineage(plan: Plan) -> list[tuple[str, Any]]:
    stages: list[tuple[str, msgspec.Struct]] = []
    if plan.prune is not None:
        stages.append(("prune", plan.prune))
    if plan.recover is not None:
        stages.append(("recover", plan.recover))
    if plan.quantise is not None:
        stages.append((plan.quantise.name, plan.quantise))
    # As JSON has it, for that is what cards were read from.
    return [(stage, msgspec.json.decode(msgspec.json.encode(config))) for stage, config in stages]


def _people(build: _Build, stage: str) -> tuple[PoseDataset, PoseDataset]:
    if build.people is None:
        raise UsageError(
            f"stage {stage}",
            found="no data",
            expected="a folder with train.json and images/",
            fix="add --data DIR",
        )
    return build.people


def _run(build: _Build, key: StageKey, work: Callable[[Path], dict[str, Any]]) -> StageResult:
    build.observer.started(key.stage)
    result = run_stage(key, work)
    build.stages.append(result)
    build.observer.finished(result)
    return result


def _advance(build: _Build, result: StageResult) -> None:
    build.checkpoint = result.path / "network"
    build.digest = read_card(build.checkpoint).weights_sha256


def _reference(build: _Build) -> None:
    train, dev = _people(build, "reference")
    key = StageKey("reference", {"checkpoint": build.digest, "dev": dev.digest}, None, _TORCH)

    def work(folder: Path) -> dict[str, Any]:
        from edgepose.stages import compress

        return compress.reference(build.source, compress.StageData(train, dev), folder)

    if not any(stage.stage == "reference" for stage in build.stages):
        _run(build, key, work)


def _prune(build: _Build, plan: Plan) -> None:
    assert plan.prune is not None
    settings = plan.prune
    train, dev = _people(build, "prune")
    _reference(build)
    people = {"train": train.digest, "dev": dev.digest}
    source = build.checkpoint

    def prune(folder: Path) -> dict[str, Any]:
        from edgepose.stages import compress

        return compress.prune(source, compress.StageData(train, dev), settings, folder)

    key = StageKey("prune", {"checkpoint": build.digest, **people}, settings, (*_TORCH, "torch-pruning"))
    _advance(build, _run(build, key, prune))
    if plan.recover is None:
        return
    training, pruned = plan.recover, build.checkpoint
    inputs = {"checkpoint": build.digest, "teacher": build.source_card.weights_sha256, **people}
    key = StageKey("recover", inputs, training, _TORCH)
    state = run_state(key)

    def recover(folder: Path) -> dict[str, Any]:
        from edgepose.stages import compress
        from edgepose.training.loop import RunOptions

        options = RunOptions(state, build.observer)
        return compress.recover(pruned, source, compress.StageData(train, dev), training, (folder, options))

    _advance(build, _run(build, key, recover))
    state.unlink(missing_ok=True)


def _quantise(build: _Build, settings: QuantiseStage) -> None:
    train, dev = _people(build, settings.name)
    _check_calibration(build, train.sample(settings.calibration_images, settings.seed))
    _reference(build)
    source = build.checkpoint
    inputs = {"checkpoint": build.digest, "train": train.digest, "dev": dev.digest}
    key = StageKey(settings.name, inputs, settings, (*_TORCH, "nncf"))
    state = run_state(key)

    def quantise(folder: Path) -> dict[str, Any]:
        from edgepose.stages import compress
        from edgepose.training.loop import RunOptions

        options = RunOptions(state, build.observer)
        return compress.quantise(source, compress.StageData(train, dev), settings, (folder, options))

    _advance(build, _run(build, key, quantise))
    state.unlink(missing_ok=True)


def _check_calibration(build: _Build, calibration: PoseDataset) -> None:
    """Ranges fitted to the photographs that accuracy is measured on would flatter it."""
    assert build.request.data is not None
    if not (build.request.data / "val.json").is_file():
        return
    evaluation = image_digests(dataset(build.request.data, "val"))
    both = {name for digest, name in image_digests(calibration).items() if digest in evaluation}
    if both:
        raise AnnotationError(
            f"{build.request.data}: calibration",
            found=f"{len(both)} training photographs that are also in val, {min(both)} the first",
            expected="no photograph in both",
            fix="remove them from train.json",
        )


def _check_budget(build: _Build) -> None:
    limit = build.request.recipe.max_drop_points
    measured = [stage for stage in build.stages if _METRIC in stage.report.get("dev", {})]
    figures = [(stage.stage, stage.report["dev"][_METRIC]) for stage in measured]
    if limit is None or len(figures) < 2:
        return
    (_, before), (stage, after) = figures[0], figures[-1]
    drop = 100 * (before - after)
    if drop > limit:
        raise AccuracyRegression(
            f"recipe {build.request.recipe.name}: max_drop_points",
            found=f"{drop:.2f} points of {_METRIC} lost on dev after {stage} ({100 * before:.2f} → {100 * after:.2f})",
            expected=f"at most {limit:g}",
            fix="prune less, fine-tune longer, or raise max_drop_points",
        )


def _export(build: _Build) -> StageResult:
    opset = build.request.recipe.export.opset
    checkpoint = build.checkpoint

    def work(folder: Path) -> dict[str, Any]:
        from edgepose.stages import export

        return export.export(checkpoint, opset, folder)

    return _run(build, StageKey("export", {"checkpoint": build.digest}, {"opset": opset}, _EXPORT), work)


def _engines(build: _Build, exported: StageResult) -> list[tuple[Target, Backend, StageResult]]:
    spec = build.source_card.spec
    engines = []
    for target in build.targets:
        bits: Literal[7, 8] = weight_bits(fingerprint())[0] if target.weight_bits == "auto" else target.weight_bits
        for backend in _executable(target):
            tools = (_BUILDERS[backend], "onnx", "onnxscript")
            key = StageKey(f"engine-{backend}", {"export": exported.key}, {"weight_bits": bits}, tools)

            def work(folder: Path, backend: Backend = backend, bits: Literal[7, 8] = bits) -> dict[str, Any]:
                from edgepose.stages import export

                return export.build_engine(exported.path, spec, backend, bits, folder)

            engines.append((target, backend, _run(build, key, work)))
    return engines


def _bundle(build: _Build, exported: StageResult, engines: list[tuple[Target, Backend, StageResult]]) -> CompileResult:
    request = build.request
    name = f"{build.source_card.name}-{request.recipe.name}"
    parts = [name, exported.key, [(t.name, b, r.key, t.threads) for t, b, r in engines], build.digest]
    key = hashlib.sha256(msgspec.json.encode(parts)).hexdigest()
    if request.out.exists():
        there = _key_of(request.out)
        if there == key:
            return CompileResult(read_bundle(request.out), tuple(build.stages), reused=True)
        if not request.replace:
            raise UsageError(
                f"--out {request.out}",
                found="something else there" if there is None else "a bundle made from other inputs",
                expected="a new path, for a bundle is never changed",
                fix="choose another --out, or add --replace",
            )
    reports: dict[str, Any] = {s.stage: {**s.report, "seconds": s.seconds} for s in build.stages}
    reports["compile"] = {
        "key": key,
        "recipe": msgspec.to_builtins(request.recipe),
        "model": build.source_card.name,
        "stages": [s.stage for s in build.stages],
    }
    draft = BundleDraft(
        name=name,
        spec=msgspec.structs.replace(build.source_card.spec, name=name),
        onnx=_network_file(exported, engines),
        engines=tuple(_engine_draft(*engine) for engine in engines),
        chain=_chain(build),
        reports=reports,
        golden=_golden(build, exported),
    )
    return CompileResult(write_bundle(request.out, draft, replace=request.replace), tuple(build.stages), reused=False)


def _key_of(path: Path) -> str | None:
    try:
        found = read_bundle(path).manifest.reports.get("compile", {}).get("key")
    except Exception:  # noqa: BLE001 - whatever stands there is not this bundle
        return None
    return str(found) if found else None


def _network_file(exported: StageResult, engines: list[tuple[Target, Backend, StageResult]]) -> Path:
    """The network as ONNX: the quantised file where there is one, the float one otherwise."""
    for _, backend, result in engines:
        if backend == "onnxruntime":
            return result.path / "model.onnx"
    return exported.path / "float.onnx"


def _engine_draft(target: Target, backend: Backend, result: StageResult) -> EngineDraft:
    report = result.report
    files = {path.name: path for path in sorted(result.path.iterdir()) if path.name != "stage.json"}
    builder = _BUILDERS[backend]
    return EngineDraft(
        target=target.name,
        backend=backend,
        precision=report["precision"],
        dialect=report["dialect"],
        files=files,
        main=report["main"],
        builder=f"{builder} {fingerprint().libraries.get(builder, '')}".strip(),
        threads=target.threads,
        tolerances=_tolerances(report),
    )


def _tolerances(report: Mapping[str, Any]) -> dict[str, float]:
    """Twice what was seen here, and at least float noise: other CPUs round elsewhere, but a wrong engine is far off."""
    allowed = {name: max(2 * value, 1e-3) for name, value in report["differences"].items()}
    allowed["keypoints_px"] = max(2 * report["shift"]["max_px"], 0.1)
    return allowed


def _chain(build: _Build) -> dict[str, str]:
    chain = {"checkpoint": build.source_card.weights_sha256}
    for entry in build.source_card.lineage:
        if entry.stage == "train" and "train" in entry.inputs:
            chain = {"dataset": entry.inputs["train"], **chain}
    card = read_card(build.checkpoint)
    if card.plan is not None:
        chain["plan"] = hashlib.sha256(msgspec.json.encode(card.plan)).hexdigest()
    if build.checkpoint != build.source:
        chain["compressed"] = build.digest
    return chain


def _golden(build: _Build, exported: StageResult) -> GoldenDraft:
    with np.load(exported.path / "golden.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    images = arrays.pop("images")
    return GoldenDraft(images, arrays, decode(arrays, build.source_card.spec.decoder)[0])
