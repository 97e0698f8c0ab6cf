"""COMPILE: a checkpoint, or a module of one's own, and a recipe to a bundle. `compile_bundle` is the order of stages.

Invariant: nothing is computed twice (stages are found by key) and nothing is half-written (the bundle appears whole).
Importing this module loads no builder; a rerun that finds every stage done never does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from edgepose.blocks.card import Card, Lineage, read_card
from edgepose.blocks.zoo import find_checkpoint, zoo_names
from edgepose.bundle import BundleDraft, GoldenDraft
from edgepose.data.coco import dataset
from edgepose.data.splits import image_digests, people_for
from edgepose.errors import AnnotationError, CheckpointError, UsageError
from edgepose.host import cache_directory, fingerprint
from edgepose.pose.codec import decode
from edgepose.profiles import load_target
from edgepose.recipe import Recipe
from edgepose.spec import ModelSpec
from edgepose.stages.assemble import (
    CompileResult,
    EngineOrder,
    Engines,
    StageObserver,
    Work,
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
from edgepose.stages.budget import check_budget, check_int8_macs, check_metric
from edgepose.stages.cache import StageKey, StageResult, run_state
from edgepose.stages.latency import Form, form_of, measure_achieved, of_order
from edgepose.stages.people import StageData, require_rendered, require_share
from edgepose.stages.precisions import Contest, Timer, contests, settle
from edgepose.stages.settings import Plan, PruneStage, QuantiseStage, plan_of
from edgepose.stages.source import Network, Source
from edgepose.timing.turns import time_in_turns
from edgepose.training.config import TrainConfig

__all__ = ["CompileRequest", "CompileResult", "Network", "Observer", "Source", "compile_bundle", "planned_stages"]

_TORCH = ("torch", "numpy", "opencv-python-headless")
_EXPORT = ("torch", "onnx", "onnxscript", "nncf")


class Observer(StageObserver, Protocol):
    """Told about a compile's progress."""

    def cutting(self, done: int, total: int) -> None:
        """A photograph was read for fine-tuning."""

    def step(self, done: int, total: int, loss: float) -> None:
        """A step of fine-tuning was taken."""

    def epoch(self, row: dict[str, float]) -> None:
        """An epoch of fine-tuning ended."""

    def timed(self, what: str, done: int, total: int) -> None:
        """A shape, or the finished engine, was timed in `done` of `total` pairs of processes."""


@dataclass(frozen=True, slots=True)
class CompileRequest:
    """What to compile.

    Attributes:
        recipe: The stages.
        model: Name of a zoo network, path of a checkpoint, or a network of the user's own; a checkpoint that was made
            of such a network together with its module.
        data: Folder with train.json and images/; needed by every stage that looks at people.
        out: Directory of the bundle.
        replace: Whether another bundle at `out` may be replaced.
        rendered: Folder of `edgepose render`, whose people fill the share of each batch that the recipe's `training`
            says.
    """

    recipe: Recipe
    model: str | Network | Source
    data: Path | None
    out: Path
    replace: bool = False
    rendered: Path | None = None


@dataclass(slots=True, eq=False)
class _Build:
    """One compile on its way: the checkpoint so far and what the stages said."""

    request: CompileRequest
    observer: Observer
    contests: tuple[Contest, ...]
    plan: Plan
    source: Source
    source_card: Card
    checkpoint: Path
    digest: str
    people: StageData | None = None
    form: Form | None = None
    later: tuple[str, ...] = ()
    search: StageResult | None = None
    stages: list[StageResult] = field(default_factory=list)

    @property
    def current(self) -> Source:
        """The checkpoint so far, as stages read it."""
        return Source(self.checkpoint, self.source.module)

    def key(self, stage: str, inputs: dict[str, str], config: Any, tools: tuple[str, ...]) -> StageKey:
        """A stage's key; of a network that is the user's own, what it computes by is an input of every stage."""
        own = self.source_card.own
        return StageKey(stage, inputs if own is None else {**inputs, "module": own.structure}, config, tools)


def compile_bundle(
    request: CompileRequest, observer: Observer | None = None, *, timer: Timer = time_in_turns
) -> CompileResult:
    """Compile a checkpoint, or a network of the user's own.

    Args:
        request: What to compile.
        observer: Told about progress.
        timer: Times the engines of different precisions, where the recipe compares them.

    Raises:
        BadInput: Recipe, checkpoint, data or target cannot be used as asked.
        DataUnavailable: A stage needs people and there is no data.
        AccuracyRegression: More accuracy was lost on dev than the recipe's `max_drop_points`.
        ParityError: Two forms of the network disagree, or an engine does less in integers than the recipe demands.
    """
    build = _start(request, observer or _Nobody())
    _take_prebuilt(build)
    _check_people(build)
    if build.plan.prune is not None:
        _prune(build, build.plan, timer)
    if build.plan.quantise is not None:
        _quantise(build, build.plan.quantise)
    check_budget(request.recipe, build.stages, read_card(build.checkpoint))
    exported = _export(build)
    engines = _engines(build, exported, timer)
    check_int8_macs(request.recipe, engines)
    after = (_side_by_side(build, exported, engines), _achieved(build, engines, timer))
    return _bundle(build, exported, engines, tuple(stage for stage in after if stage is not None))


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
    if plan.sparse:
        stages.append(("sparse", f"{plan.sparse.epochs} epochs"))
    if build.form is not None and plan.prune:
        stages.append(("aim", f"shapes timed in {build.form.precision} in {build.form.backend} on this machine"))
    for step in plan.pruning:
        stages.append((f"prune{step.suffix}", f"{step.prune.goal}, by {step.prune.importance}"))
        if step.recover:
            stages.append((f"recover{step.suffix}", f"{step.recover.epochs} epochs"))
    if plan.quantise:
        training = plan.quantise.training
        stages.append(
            (
                plan.quantise.name,
                f"{plan.quantise.calibration_images} people" if training is None else f"{training.epochs} epochs",
            )
        )
    asked = request.recipe.export
    ends = {"images in": asked.image_input, "keypoints out": asked.decoding}
    stages.append(("export", ", ".join([f"opset {asked.opset}", *(name for name, there in ends.items() if there)])))
    stages += [(stage, f"for {contest.order.target.name}") for contest in build.contests for stage in contest.stages]
    if build.people is not None:
        stages.append(("accuracy", "on dev: in torch, as exported, of each engine"))
    if build.form is not None and plan.prune:
        stages.append(("latency", "the finished engine timed against the unpruned one"))
    return (*stages, ("bundle", str(request.out)))


class _Nobody:
    def started(self, stage: str) -> None: ...
    def finished(self, stage: StageResult) -> None: ...
    def building(self, what: str, done: int, total: int) -> None: ...
    def cutting(self, done: int, total: int) -> None: ...
    def step(self, done: int, total: int, loss: float) -> None: ...
    def epoch(self, row: dict[str, float]) -> None: ...
    def timed(self, what: str, done: int, total: int) -> None: ...


def _start(request: CompileRequest, observer: Observer) -> _Build:
    targets = tuple(load_target(name) for name in request.recipe.targets)
    here, later = built_here(targets)
    orders = engine_orders(here)
    source = _source(request.model)
    card = read_card(source.path)
    check_out(request.out, _origin(request, card), replace=request.replace)
    check_metric(request.recipe, card)
    plan = plan_of(request.recipe, targets)
    people = _people_of(request, card)
    require_share(plan, people)
    quantised = plan.quantise is not None or card.quantisation is not None
    places = contests(orders, request.recipe.precisions, "int8" if quantised else "fp32")
    aims = plan.prune is not None and plan.prune.aimed
    form = form_of(plan, orders, request.recipe.export.opset) if aims else None
    return _Build(request, observer, places, plan, source, card, source.path, card.weights_sha256, people, form, later)


def _people_of(request: CompileRequest, card: Card) -> StageData | None:
    if request.data is None:
        if request.rendered is not None:
            raise UsageError("--rendered", found="no --data", expected="photographs to train on beside them")
        return None
    train, dev = people_for(card.name, card.keypoints, request.data)
    return StageData(train, dev, None if request.rendered is None else dataset(request.rendered, "train"))


def _source(model: str | Network | Source) -> Source:
    if isinstance(model, Source):
        return model
    if isinstance(model, str):
        return Source(find_checkpoint(model))
    from edgepose.stages.networks import store_network

    return Source(store_network(model, cache_directory() / "modules"), model.module)


def _take_prebuilt(build: _Build) -> None:
    """Start from a committed or given checkpoint that already went through the recipe's stages.

    A checkpoint counts when its lineage records the very settings that the recipe asks for, made from the same source
    and, where data was given, from the same people.
    """
    recipe = build.request.recipe
    if recipe.prune is None and recipe.quantise is None:
        return
    wanted = _wanted_lineage(build.plan)
    candidates = [build.source.path]
    sibling = f"{build.source_card.name}-{recipe.name}"
    if sibling in zoo_names():
        candidates.append(find_checkpoint(sibling))
    for path in candidates:
        card = read_card(path)
        tail = card.lineage[-len(wanted) :]
        if not _same_settings(tail, wanted):
            continue
        from_here = path == build.source.path or tail[0].inputs.get("checkpoint") == build.digest
        same_people = build.people is None or tail[0].inputs.get("train") == build.people.train.digest
        if from_here and same_people:
            for entry in tail:
                found = StageResult(entry.stage, "", str(path.parent), entry.report, 0.0, reused=True)
                build.stages.append(found)
                build.observer.finished(found)
            build.checkpoint, build.digest = path, card.weights_sha256
            build.plan = Plan(None, None, None)
            return
    card = build.source_card
    if card.quantisation is not None or (card.plan is not None and recipe.prune is not None):
        raise CheckpointError(
            build.source_card.name,
            found="a checkpoint that is compressed already, with other settings",
            expected=f"a float checkpoint, or one made by the recipe {recipe.name} as it is now",
            fix="start from the float checkpoint, or use the recipe fp32 to export it as it is",
        )


def _wanted_lineage(plan: Plan) -> list[tuple[str, msgspec.Struct]]:
    stages: list[tuple[str, msgspec.Struct]] = []
    if plan.sparse is not None:
        stages.append(("sparse", plan.sparse))
    for step in plan.pruning:
        stages.append((f"prune{step.suffix}", step.prune.asked))
        if step.recover is not None:
            stages.append((f"recover{step.suffix}", step.recover))
    if plan.quantise is not None:
        stages.append((plan.quantise.name, plan.quantise))
    return stages


def _same_settings(tail: Sequence[Lineage], wanted: Sequence[tuple[str, msgspec.Struct]]) -> bool:
    """Settings that an older card does not have are taken at their defaults, which always mean what was before them."""
    if [entry.stage for entry in tail] != [stage for stage, _ in wanted]:
        return False
    try:
        return all(
            _asked(msgspec.convert(entry.config, type(config), strict=True)) == config
            for entry, (_, config) in zip(tail, wanted, strict=True)
        )
    except msgspec.ValidationError:
        return False


def _asked(config: msgspec.Struct) -> msgspec.Struct:
    """What of a stage's settings a recipe says: not the ratio that a search found on some machine."""
    return config.asked if isinstance(config, PruneStage) else config


def _people(build: _Build, stage: str) -> StageData:
    if build.people is None:
        raise UsageError(
            f"stage {stage}",
            found="no data",
            expected="a folder with train.json and images/",
            fix="add --data DIR",
        )
    return build.people


def _run(build: _Build, key: StageKey, work: Work) -> StageResult:
    result = observed(key, work, build.observer)
    build.stages.append(result)
    return result


def _advance(build: _Build, result: StageResult) -> None:
    build.checkpoint = result.path / "network"
    build.digest = read_card(build.checkpoint).weights_sha256


def _reference(build: _Build) -> None:
    people = _people(build, "reference")
    key = build.key("reference", {"checkpoint": build.digest, "dev": people.dev.digest}, None, _TORCH)

    def work(folder: Path) -> dict[str, Any]:
        from edgepose.stages import compress

        return compress.reference(build.source, people, folder)

    if not any(stage.stage == "reference" for stage in build.stages):
        _run(build, key, work)


def _prune(build: _Build, plan: Plan, timer: Timer) -> None:
    _reference(build)
    if plan.sparse is not None:
        _fine_tune(build, "sparse", plan.sparse)
    if plan.prune is not None and build.form is not None:
        build.search = _aim(build, plan.prune, build.form, timer)
        plan = plan.at_ratio(build.search.report["ratio"])
    for step in plan.pruning:
        _cut(build, f"prune{step.suffix}", step.prune, None if step.suffix else build.search)
        if step.recover is not None:
            _fine_tune(build, f"recover{step.suffix}", step.recover)


def _aim(build: _Build, settings: PruneStage, form: Form, timer: Timer) -> StageResult:
    """Find out how much has to go for the recipe's latency."""
    people = _people(build, "aim")
    source = build.current

    def aim(folder: Path) -> dict[str, Any]:
        from edgepose.stages import aim

        run = aim.Run(folder, timer, build.observer.timed)
        return aim.aim(source, people, settings, form, run)

    inputs = {"checkpoint": build.digest, "train": people.train.digest, "host": fingerprint().digest}
    return _run(build, build.key("aim", inputs, {"settings": settings, "form": form}, (*_EXPORT, "torch-pruning")), aim)


def _achieved(build: _Build, engines: Engines, timer: Timer) -> StageResult | None:
    """Time the finished engine, where a latency was aimed at."""
    search, form = build.search, build.form
    if search is None or form is None:
        return None
    finished = next(result for order, result in engines if of_order(form, order))
    inputs = {"aim": search.key, "engine": finished.key, "host": fingerprint().digest}

    def work(_folder: Path) -> dict[str, Any]:
        found = measure_achieved(search, finished, timer, build.observer.timed)
        plain: dict[str, Any] = msgspec.to_builtins(found)
        return plain

    return _run(build, build.key("latency", inputs, None, (form.backend,)), work)


def _cut(build: _Build, stage: str, settings: PruneStage, search: StageResult | None) -> None:
    people = _people(build, stage)
    source = build.current

    def prune(folder: Path) -> dict[str, Any]:
        from edgepose.stages import compress

        return compress.prune(source, people, settings, folder, stage=stage, search=search)

    inputs = {"checkpoint": build.digest, **people.digests}
    if search is not None:
        inputs["aim"] = search.key
    _advance(build, _run(build, build.key(stage, inputs, settings, (*_TORCH, "torch-pruning")), prune))


def _fine_tune(build: _Build, stage: str, training: TrainConfig) -> None:
    """Fine-tune the checkpoint so far with the network that the compile started from as teacher."""
    people = _people(build, stage)
    source, teacher = build.current, build.source
    digests = {"checkpoint": build.digest, "teacher": build.source_card.weights_sha256}
    key = build.key(stage, {**digests, **people.digests_for(training)}, training, _TORCH)
    state = run_state(key)

    def recover(folder: Path) -> dict[str, Any]:
        from edgepose.stages import compress
        from edgepose.training.loop import RunOptions

        run = (folder, RunOptions(state, build.observer))
        return compress.recover(source, teacher, people, training, run, stage=stage)

    _advance(build, _run(build, key, recover))
    state.unlink(missing_ok=True)


def _quantise(build: _Build, settings: QuantiseStage) -> None:
    people = _people(build, settings.name)
    _reference(build)
    source = build.current
    inputs = {"checkpoint": build.digest, **people.digests_for(settings.training)}
    key = build.key(settings.name, inputs, settings, (*_TORCH, "nncf"))
    state = run_state(key)

    def quantise(folder: Path) -> dict[str, Any]:
        from edgepose.stages import compress
        from edgepose.training.loop import RunOptions

        options = RunOptions(state, build.observer)
        return compress.quantise(source, people, settings, (folder, options))

    _advance(build, _run(build, key, quantise))
    state.unlink(missing_ok=True)


def _check_people(build: _Build) -> None:
    """Before any work: is there data, and are ranges fitted to none of the photographs that accuracy is measured on?"""
    settings, data = build.plan.quantise, build.request.data
    if build.plan.prune is not None:
        _people(build, "prune")
    require_rendered(build.plan, build.people)
    if settings is None:
        return
    train = _people(build, settings.name).train
    if data is None or not (data / "val.json").is_file():
        return
    calibration = train.sample(settings.calibration_images, settings.seed)
    evaluation = image_digests(dataset(data, "val"))
    both = {name for digest, name in image_digests(calibration).items() if digest in evaluation}
    if both:
        raise AnnotationError(
            f"{data}: calibration",
            found=f"{len(both)} training photographs that are also in val, {min(both)} the first",
            expected="no photograph in both",
            fix="remove them from train.json",
        )


def _export(build: _Build) -> StageResult:
    asked = build.request.recipe.export
    source = build.current

    def work(folder: Path) -> dict[str, Any]:
        from edgepose.stages import export

        return export.export(source, asked.opset, folder, asked)

    config = msgspec.to_builtins(asked) if asked.has_ends else {"opset": asked.opset}
    return _run(build, build.key("export", {"checkpoint": build.digest}, config, _EXPORT), work)


def _engines(build: _Build, exported: StageResult, timer: Timer) -> Engines:
    spec = build.source_card.spec

    def engine(order: EngineOrder) -> StageResult:
        def work(folder: Path) -> dict[str, Any]:
            if order.precision is not None:
                from edgepose.stages.float_engine import build_float_engine

                batch = order.target.batch
                return build_float_engine(exported.path, spec, order.backend, order.precision, folder, batch=batch)
            from edgepose.stages import export

            batch = order.target.batch
            return export.build_engine(exported.path, spec, order.backend, order.weight_bits, folder, batch=batch)

        return _run(build, order.key({"export": exported.key}), work)

    def timing(key: StageKey, work: Work) -> StageResult:
        return _run(build, key, work)

    return tuple(settle(contest, engine, timing, timer) for contest in build.contests)


def _side_by_side(build: _Build, exported: StageResult, engines: Engines) -> StageResult | None:
    """Measure the network in torch, as exported and of each engine, where there are people to do it on."""
    if build.people is None:
        return None
    dev, source = build.people.dev, build.current
    built = {draft.folder: result for draft, (_, result) in zip(engine_drafts(engines), engines, strict=True)}

    def work(_folder: Path) -> dict[str, Any]:
        from edgepose.stages import side_by_side

        forms = [side_by_side.form_of(name, result) for name, result in built.items()]
        return side_by_side.side_by_side(source, dev, exported.path, forms)

    keys = {name: result.key for name, result in built.items()}
    inputs = {"checkpoint": build.digest, "dev": dev.digest, "export": exported.key, **keys}
    return _run(build, build.key("accuracy", inputs, None, (*_EXPORT, "onnxruntime")), work)


def _bundle(build: _Build, exported: StageResult, engines: Engines, after: tuple[StageResult, ...]) -> CompileResult:
    request, name = build.request, f"{build.source_card.name}-{build.request.recipe.name}"
    built = [(order.target.name, order.target.threads, result.key) for order, result in engines]
    key = key_of(name, exported.key, built, build.digest)

    def draft() -> BundleDraft:
        origin = {**_origin(request, build.source_card), "key": key, "stages": [stage.stage for stage in build.stages]}
        plan = read_card(build.checkpoint).plan
        if plan is not None:
            origin["plan"] = plan
        ran = build.stages[: build.stages.index(exported) + 1]  # engines and what decided between them come apart
        golden, spec = _golden(build, exported)
        return BundleDraft(
            name=name,
            spec=msgspec.structs.replace(spec, name=name),
            onnx=_network_file(exported),
            engines=engine_drafts(engines),
            chain=_chain(build),
            reports={
                **{s.stage: stage_report(s) for s in ran if s is not build.search},  # that one is in prune's report
                **engine_reports(engines),
                **{s.stage: stage_report(s) for s in after},
                "compile": origin,
            },
            golden=golden,
        )

    made = finished_bundle(request.out, key, tuple(build.stages), draft, replace=request.replace)
    return replace(made, later=build.later)


def _origin(request: CompileRequest, card: Card) -> dict[str, Any]:
    """What of a bundle's origin is known before anything is computed."""
    return {"recipe": msgspec.to_builtins(request.recipe), "model": card.name}


def _network_file(exported: StageResult) -> Path:
    """The network as ONNX: with its ends where it has some, quantised where there is such a file, else float."""
    names = ("ended.onnx", "model.onnx", "float.onnx")
    return next(path for path in (exported.path / name for name in names) if path.exists())


_COMPRESSING = ("sparse", "prune", "recover", "ptq", "qat")
"""What stages of a lineage that compress are called, or begin with where there are several."""


def _chain(build: _Build) -> dict[str, str]:
    """The same whether the compressed checkpoint was made now, found in the zoo or handed over."""
    card = read_card(build.checkpoint)
    trained = [place for place, entry in enumerate(card.lineage) if entry.stage == "train"]
    last = trained[-1] if trained else -1  # what came before it, the weights that training began with included
    chain = {"dataset": card.lineage[last].inputs["train"]} if trained and "train" in card.lineage[last].inputs else {}
    compression = [entry for entry in card.lineage[last + 1 :] if entry.stage.partition("-")[0] in _COMPRESSING]
    if not compression:
        return {**chain, "checkpoint": card.weights_sha256}
    chain["checkpoint"] = compression[0].inputs["checkpoint"]
    if card.plan is not None:
        chain["plan"] = hashlib.sha256(msgspec.json.encode(card.plan)).hexdigest()
    return {**chain, "compressed": card.weights_sha256}


def _golden(build: _Build, exported: StageResult) -> tuple[GoldenDraft, ModelSpec]:
    """The golden vectors, and what the network of the bundle eats and says: with its ends, where it has some."""
    with np.load(exported.path / "golden.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    images, spec, asked = arrays.pop("images"), build.source_card.spec, build.request.recipe.export
    if asked.has_ends:
        from edgepose.export.ends import answers_with_ends, spec_with_ends

        arrays, spec = answers_with_ends(arrays, spec, asked), spec_with_ends(spec, asked)
    if asked.image_input:
        images = np.load(exported.path / "pixels.npy", allow_pickle=False)
    return GoldenDraft(images, arrays, decode(arrays, spec.decoder)[0]), spec
