"""The measuring behind `edgepose report --data`: every step of a bundle's network on the same people.

Invariant: what cannot be opened leaves a reason instead of figures, whether it is gone from the cache or its library is
not installed; a file of the bundle itself that was changed, and people that do not fit the network, are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgepose.blocks.card import read_card
from edgepose.bundle import Bundle, check_engine, check_file
from edgepose.cli.console import Steps, note
from edgepose.cli.subject import Subject, find_subject
from edgepose.data.coco import PoseDataset, dataset
from edgepose.data.splits import split_train
from edgepose.errors import BackendUnavailable, CheckpointError, IntegrityError, MissingDependency, OnnxError, SpecError
from edgepose.estimator import PoseEstimator
from edgepose.host import physical_cores
from edgepose.profiler.accuracy import AccuracyRecord, evaluate
from edgepose.profiler.slices import SliceRecord, lenders_of, measure_slices
from edgepose.profiler.waterfall import Costs, Evidence, Latency, People, Waterfall, waterfall
from edgepose.runtime import open_session
from edgepose.spec import Engine
from edgepose.stages.chain import FLOAT, Link, chain_of
from edgepose.stages.source import Source
from edgepose.timing.record import Arm, CallableArm, LatencyProtocol, ModelArm
from edgepose.timing.turns import time_in_turns

if TYPE_CHECKING:
    from torch import nn

DEV = "dev"
"""The part of train.json that choices are made on; every other split has a file of its own."""

_TITLES = {
    FLOAT: "FP32 checkpoint",
    "prune": "pruned",
    "recover": "recovered",
    "sparse": "trained sparse",
    "ptq": "PTQ, fake-quantised",
    "qat": "QAT, fake-quantised",
}
_TIMING = LatencyProtocol(pairs=3, blocks=16, dropped_blocks=4, block_ms=20.0, warm_up_ms=300.0)


@dataclass(frozen=True, slots=True)
class StepOptions:
    """What is to be measured.

    Attributes:
        data: Folder of the labelled people; None measures no accuracy.
        split: Which of them.
        sample: A random sample of so many; None takes all.
        slices: Whether they are occluded, cut off and so on as well.
        baseline: A network, checkpoint or bundle that the steps have to be compared with too: a control arm. Where it
            names code, checkpoints of a user's own network are loaded with it.
        latency: Whether steps are timed.
        seed: Of the sample and the bootstrap.
    """

    data: Path | None = None
    split: str = "val"
    sample: int | None = None
    slices: bool = False
    baseline: str | None = None
    latency: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class MeasuredSteps:
    """What came out.

    Attributes:
        waterfall: The steps.
        people: Who was measured.
        records: Predictions by name of a step.
    """

    waterfall: Waterfall
    people: PoseDataset | None = None
    records: Mapping[str, AccuracyRecord] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    estimator: PoseEstimator
    costs: Costs


@dataclass(frozen=True, slots=True, eq=False)
class _Candidate:
    """A step, how it is opened and how it is timed.

    Attributes:
        evidence: What is known without opening it.
        opened: Opens it; None where that is not possible.
        arm: Times it; None where that would say nothing.
        forgiven: Errors of opening that leave a reason; all others end the report.
    """

    evidence: Evidence
    opened: Callable[[], AbstractContextManager[_Opened]] | None = None
    arm: Arm | None = None
    forgiven: tuple[type[Exception], ...] = ()


_LOST = (CheckpointError, IntegrityError, MissingDependency)
_CANNOT_RUN = (MissingDependency, BackendUnavailable, OnnxError)


def measure_steps(bundle: Bundle, options: StepOptions, progress: Steps) -> MeasuredSteps:
    """Find the steps of a bundle's network and measure those that can be.

    Raises:
        BadInput: The people do not fit the network, or cannot be read; there is no such baseline.
        DataUnavailable: They are not there.
        IntegrityError: A file of the bundle was changed.
        EnvironmentFault: A process that times a step died.
    """
    people = _people(bundle, options)
    candidates = _candidates(bundle, options)
    measured = _with_macs([_measured(one, people, options, progress) for one in candidates])
    if options.latency:
        measured = _timed(candidates, measured, progress)
    told = None
    if people is not None and options.data is not None:
        torso = next((int(np.isfinite(m.accuracy.torso_px).sum()) for m in measured if m.accuracy is not None), 0)
        told = People(f"{options.data.resolve().name} {options.split}", people.digest, len(people), torso)
    if told is not None:
        progress.told("comparing the steps", 0, 1)
    found = waterfall(measured, bundle.manifest.spec.keypoints, told, seed=options.seed)
    if told is not None:
        progress.told("comparing the steps", 1, 1)
    return MeasuredSteps(found, people, {m.name: m.accuracy for m in measured if m.accuracy is not None})


def _people(bundle: Bundle, options: StepOptions) -> PoseDataset | None:
    if options.data is None:
        return None
    dev = options.split == DEV and not (options.data / f"{DEV}.json").is_file()
    people = split_train(dataset(options.data, "train"))[1] if dev else dataset(options.data, options.split)
    keypoints = bundle.manifest.spec.keypoints
    if people.keypoints.names != keypoints.names:
        raise SpecError(
            f"{people.source}",
            found=f"{people.keypoints.count} keypoints ({', '.join(people.keypoints.names[:3])} …)",
            expected=f"the {keypoints.count} of {bundle.manifest.name} ({', '.join(keypoints.names[:3])} …)",
            fix="choose data with the network's keypoints",
        )
    return people if options.sample is None else people.sample(options.sample, options.seed)


# ------------------------------------------------------------------------------------------------------ finding steps


def _candidates(bundle: Bundle, options: StepOptions) -> list[_Candidate]:
    baseline = find_subject(options.baseline) if options.baseline is not None else None
    links = chain_of(bundle, given=[baseline.path] if baseline and not baseline.is_bundle else [])
    own = baseline.source.module if baseline is not None and baseline.source is not None else None
    found = [_checkpoint(link, own) for link in links]
    if baseline is not None and not (links[0].path is not None and links[0].path == baseline.path):
        found.insert(0, _control(baseline))
    found.append(_onnx(bundle))
    twins = [(engine.backend, engine.precision) for engine in bundle.manifest.engines]
    engines = (
        _engine(bundle, engine, alone=twins.count((engine.backend, engine.precision)) == 1)
        for engine in bundle.manifest.engines
    )
    return [*found, *engines]


def _control(baseline: Subject) -> _Candidate:
    evidence = Evidence("control", f"control: {baseline.text}", "control", "the first engine that runs here")
    source = baseline.source
    if source is not None:
        evidence = replace(evidence, runs_in="torch", costs=Costs(size_bytes=_weights_bytes(source.path)))
        return _Candidate(evidence, lambda: _torch(source, evidence.costs), None, ())

    @contextmanager
    def opened() -> Iterator[_Opened]:
        with PoseEstimator.from_bundle(baseline.path, aim="none") as estimator:
            yield _Opened(estimator, evidence.costs)

    return _Candidate(evidence, opened)


def _checkpoint(link: Link, own: nn.Module | None) -> _Candidate:
    stage, _, number = link.stage.partition("-")  # "prune-1" where it was done in steps
    title = _TITLES.get(stage, stage) + (f", pass {number}" if number else "") + link.name.removeprefix(link.stage)
    path, why = link.path, link.why
    if path is None:
        if link.stage == FLOAT:
            why += "; name it with --baseline"
        return _Candidate(Evidence(link.name, title, "network", "torch", why, link.recorded, Costs(macs=link.macs)))
    costs = Costs(macs=link.macs, size_bytes=_weights_bytes(path))
    evidence = Evidence(link.name, title, "network", "torch", "", link.recorded, costs)
    arm, card = None, read_card(path)
    source = Source(path, None if card.own is None else own)
    # Fake quantisation only imitates what engines do, slowly; and the process that times has no code but edgepose's.
    if card.quantisation is None and card.own is None:
        place = "edgepose.stages.checkpoint_session:torch_call"
        arm = CallableArm(title, place, {"path": str(path), "threads": physical_cores()})
    return _Candidate(evidence, lambda: _torch(source, costs), arm, _LOST)


def _onnx(bundle: Bundle) -> _Candidate:
    runs_in = "ONNX Runtime, not optimised"
    costs = Costs(size_bytes=(bundle.root / bundle.manifest.model).stat().st_size)
    evidence = Evidence("onnx", "ONNX graph", "onnx", runs_in, costs=costs)

    @contextmanager
    def opened() -> Iterator[_Opened]:
        file = check_file(bundle, bundle.manifest.model)
        try:
            from edgepose.runtime.ort import OrtSession
        except ImportError as err:
            raise MissingDependency("onnxruntime", extra="ort", needed_for="running the exported graph") from err
        session = OrtSession(file, threads=physical_cores(), optimise=False)
        with PoseEstimator(session, bundle.manifest.spec, backend="onnxruntime") as estimator:
            yield _Opened(estimator, costs)

    return _Candidate(evidence, opened, None, _CANNOT_RUN)


def _engine(bundle: Bundle, engine: Engine, *, alone: bool) -> _Candidate:
    name = f"{engine.backend} {engine.precision}" + ("" if alone else f" {Path(engine.path).parent}")
    report = bundle.manifest.reports.get(str(Path(engine.path).parent))
    share = report.get("int8_share") if isinstance(report, Mapping) else None
    size = sum((bundle.root / file).stat().st_size for file in engine.files)
    costs = Costs(size_bytes=size, int8_share=share if isinstance(share, float | int) else None)
    evidence = Evidence(name, name, "engine", engine.builder or engine.backend, costs=costs)

    @contextmanager
    def opened() -> Iterator[_Opened]:
        file = check_engine(bundle, engine)
        session = open_session(
            file, engine.backend, threads=engine.threads, precision=engine.precision, execution=engine.execution
        )
        with PoseEstimator(session, bundle.manifest.spec, backend=engine.backend) as estimator:
            yield _Opened(estimator, costs)

    arm = ModelArm(name, str(bundle.root / engine.path), engine.backend, engine.precision, engine.execution)
    return _Candidate(evidence, opened, arm, _CANNOT_RUN)


@contextmanager
def _torch(source: Source, costs: Costs) -> Iterator[_Opened]:
    try:
        from edgepose.stages.checkpoint_session import open_checkpoint
    except ImportError as err:
        raise MissingDependency(
            err.name or "torch", extra="compile", needed_for=f"running {source.path} in torch"
        ) from err
    found = open_checkpoint(source)
    with found.estimator as estimator:
        yield _Opened(estimator, msgspec.structs.replace(costs, macs=found.macs, params=found.params))


def _weights_bytes(path: Path) -> int | None:
    file = path.with_name(path.name + ".safetensors")
    return file.stat().st_size if file.is_file() else None


# ---------------------------------------------------------------------------------------------------------- measuring


def _measured(one: _Candidate, people: PoseDataset | None, options: StepOptions, progress: Steps) -> Evidence:
    evidence = one.evidence
    if one.opened is None:
        return evidence
    if people is None and not options.latency:
        return evidence
    with ExitStack() as stack:
        try:
            opened = stack.enter_context(one.opened())
        except one.forgiven as err:
            note(f"not measured: {evidence.title}: {err}")
            return replace(evidence, why=str(err))
        evidence = replace(evidence, costs=opened.costs)
        if people is None:
            return evidence
        accuracy = evaluate(opened.estimator, people, progress=progress.step(f"evaluating {evidence.title}"))
        slices: dict[str, SliceRecord] = {}
        if options.slices:
            told = progress.step(f"slices of {evidence.title}")
            slices = measure_slices(opened.estimator, people, lenders=lenders_of(people), progress=told)
    return replace(evidence, accuracy=accuracy, slices=slices)


def _with_macs(measured: Sequence[Evidence]) -> list[Evidence]:
    """Graph and engines compute as much as the last checkpoint, which may have been counted by now."""
    macs = [one.costs.macs for one in measured if one.kind == "network"][-1]
    return [
        replace(one, costs=msgspec.structs.replace(one.costs, macs=macs)) if one.kind in ("onnx", "engine") else one
        for one in measured
    ]


def _timed(candidates: Sequence[_Candidate], measured: Sequence[Evidence], progress: Steps) -> list[Evidence]:
    """Adds latencies to the steps that can be timed; those that could not be opened are not."""
    runs = [
        (place, one.arm)
        for place, (one, evidence) in enumerate(zip(candidates, measured, strict=True))
        if one.arm is not None and not evidence.why
    ]
    found = list(measured)
    if len(runs) < 2:
        note("no latency: fewer than two steps can be timed here; `edgepose profile` measures one engine")
        return found
    turns = time_in_turns([arm for _, arm in runs], _TIMING, progress.step("timing the steps"))
    for number, (place, _) in enumerate(runs):
        comparison = turns.between(0, number)
        latency = Latency(comparison.b_ms, len(turns.groups), _TIMING.threads or physical_cores())
        if number:
            low, high = comparison.ci95
            latency = Latency(
                comparison.b_ms,
                latency.processes,
                latency.threads,
                against=measured[runs[0][0]].name,
                speedup=1 / comparison.ratio,
                low=1 / high,
                high=1 / low,
            )
        found[place] = replace(found[place], costs=msgspec.structs.replace(found[place].costs, latency=latency))
    return found
