"""What compiling and building share: running a stage, the engines that targets get, and the bundle at the end.

Invariant: an engine was built and checked on the host whose fingerprint is in its key, so no other host finds it; and
importing this loads no builder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from edgepose.bundle import Bundle, BundleDraft, EngineDraft, is_pristine, read_bundle, write_bundle
from edgepose.errors import BackendUnavailable, EdgeposeError, MissingDependency, UsageError
from edgepose.host import fingerprint, weight_bits
from edgepose.runtime import EXECUTABLE
from edgepose.spec import Backend, Execution, Precision, Target
from edgepose.stages.cache import StageKey, StageResult, run_stage

_BUILDERS: dict[Backend, str] = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx-cu13",
}
_OF_BUILD = ("onnx", "onnx_ir", "google")
"""Packages that the extra `build` brings, and with it no torch."""

Work = Callable[[Path], dict[str, Any]]


class StageObserver(Protocol):
    """Told which stages were run or found."""

    def started(self, stage: str) -> None:
        """A stage was looked at."""

    def finished(self, stage: StageResult) -> None:
        """A stage was run, or found."""

    def building(self, what: str, done: int, total: int) -> None:
        """`done` of `total` of an engine is built; `what` is the builder's phase."""


@dataclass(frozen=True, slots=True)
class CompileResult:
    """What came of a compile or a build.

    Attributes:
        bundle: The bundle on disk.
        stages: The stages in order.
        reused: Whether the bundle was already there.
        later: Names of targets that it was compressed for, and whose engines `edgepose build` makes on the device.
    """

    bundle: Bundle
    stages: tuple[StageResult, ...]
    reused: bool
    later: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """One engine to build.

    Attributes:
        target: The device it is for.
        backend: The runtime that is to execute it.
        weight_bits: Bits of its weights, where it is quantised.
        precision: Its precision; None is the network's own: INT8 where it is quantised, FP32 where it is not.
    """

    target: Target
    backend: Backend
    weight_bits: Literal[7, 8]
    precision: Precision | None = None

    @property
    def stage(self) -> str:
        """Name of the stage that builds it."""
        return f"engine-{self.backend}" + ("" if self.precision is None else f"-{self.precision}")

    @property
    def is_tensorrt(self) -> bool:
        """Whether it is an engine of TensorRT or TensorRT-RTX."""
        return self.backend in ("tensorrt", "tensorrt-rtx")

    def key(self, inputs: Mapping[str, str]) -> StageKey:
        """What the engine depends on besides `inputs`: weight bits or precision, builders, this host."""
        inputs = {**inputs, "host": fingerprint().digest}
        config: dict[str, Any] = {"weight_bits": self.weight_bits}
        if self.precision is not None:
            config = {"precision": self.precision}
        if self.is_tensorrt:
            target = self.target
            config = {"precision": self.precision, "tensorrt": target.tensorrt, "gpu": target.compute_capability}
            config["batches"] = (target.batch, target.max_batch)
        if self.target.execution != Execution():  # part of what a bundle is made of, though not of the engine's files
            config["execution"] = self.target.execution
        if self.target.batch:
            config["batch"] = self.target.batch
        return StageKey(self.stage, inputs, config, (_BUILDERS[self.backend], "onnx"))


Engines = tuple[tuple[EngineOrder, StageResult], ...]


def engine_orders(targets: Iterable[Target], able: Sequence[Backend] = EXECUTABLE) -> tuple[EngineOrder, ...]:
    """The engines of some targets, in order of preference.

    Args:
        targets: The targets.
        able: What can be built; a target's other backends are left out.

    Raises:
        BackendUnavailable: A target runs nothing of these.
    """
    orders = []
    for target in targets:
        bits = weight_bits(fingerprint())[0] if target.weight_bits == "auto" else target.weight_bits
        backends = [backend for backend in target.backends if backend in able]
        if not backends:
            raise _not_built(target, able)
        orders += [EngineOrder(target, backend, bits) for backend in backends]
    return tuple(orders)


def built_here(targets: Sequence[Target]) -> tuple[tuple[Target, ...], tuple[str, ...]]:
    """The targets whose engines every machine builds, and the names of those that have to be built on the device.

    Where there are only the latter they count among the former, so that building them says what is missing.
    """
    here = tuple(target for target in targets if set(target.backends) & set(EXECUTABLE))
    if not here:
        return tuple(targets), ()
    return here, tuple(target.name for target in targets if target not in here)


def _not_built(target: Target, able: Sequence[Backend]) -> BackendUnavailable:
    """Says how a target gets engines that cannot be built here."""
    place = "on the device"
    if "tensorrt-rtx" in target.backends:
        place = "after pip install 'edgepose[tensorrt-rtx]'"
    return BackendUnavailable(
        f"target {target.name}",
        found=f"the backends {', '.join(target.backends)}, which cannot be built here",
        expected=f"one of {', '.join(able)}",
        fix=f"compile for a CPU, and then, {place}: edgepose build BUNDLE --target {target.name}; "
        "`edgepose doctor` says what is missing",
    )


def observed(key: StageKey, work: Work, observer: StageObserver, *, within: Path | None = None) -> StageResult:
    """Run a stage or find it, and say so.

    Args:
        key: What it depends on.
        work: Fills an empty folder and returns the report.
        observer: Told.
        within: Folder of the cache that it belongs to; None is the one of all stages.

    Raises:
        MissingDependency: A library that the stage needs is not installed.
        EdgeposeError: Whatever the stage raises.
    """
    observer.started(key.stage)
    try:
        result = run_stage(key, work, within=within)
    except ModuleNotFoundError as err:
        extra = "build" if err.name in _OF_BUILD else "compile"
        raise MissingDependency(err.name or str(err), extra=extra, needed_for=f"stage {key.stage}") from err
    observer.finished(result)
    return result


def finished_bundle(
    out: Path, key: str, stages: tuple[StageResult, ...], draft: Callable[[], BundleDraft], *, replace: bool
) -> CompileResult:
    """Find the bundle that these stages make, or write it.

    Args:
        out: Its directory.
        key: Digest of everything it depends on; the draft's report has it.
        stages: What it is made of.
        draft: Makes the draft, if it is needed.
        replace: Whether another bundle at `out` may be replaced.

    Raises:
        UsageError: `out` is taken.
        StorageError: Disk full, read-only or no permission.
    """
    there = _origin_of(out)
    if there is not None and there.get("key") == key:
        return CompileResult(read_bundle(out), stages, reused=True)
    if out.exists() and not replace:
        raise _taken(out, there)
    return CompileResult(write_bundle(out, draft(), replace=replace), stages, reused=False)


def check_out(out: Path, origin: Mapping[str, Any], *, replace: bool) -> None:
    """Refuse a taken name before any work, as far as that can be known: what is computed decides the rest.

    Args:
        out: Directory of the bundle to be.
        origin: What is known already of the report of its compile or build.
        replace: Whether another bundle there may be replaced.

    Raises:
        UsageError: `out` is taken, or holds what is no bundle.
    """
    if not out.exists():
        return
    there = _origin_of(out)
    if replace and not is_pristine(out):
        fix = "choose another --out, or remove it yourself"
        raise UsageError(f"--out {out}", found="something that is no bundle", expected="a bundle to replace", fix=fix)
    wanted = msgspec.json.decode(msgspec.json.encode(origin))  # as manifests are read
    if not replace and (there is None or any(there.get(name) != value for name, value in wanted.items())):
        raise _taken(out, there)


def _origin_of(path: Path) -> dict[str, Any] | None:
    """The report of the compile or build that made the bundle at `path`; None where none did, or none stands there."""
    try:
        reports = read_bundle(path).manifest.reports
    except EdgeposeError:
        return None
    found = reports.get("build") or reports.get("compile")
    return found if isinstance(found, dict) else None


def _taken(out: Path, there: Mapping[str, Any] | None) -> UsageError:
    return UsageError(
        f"--out {out}",
        found="something else there" if there is None else "a bundle made from other inputs",
        expected="a new path, for a bundle is never changed",
        fix="choose another --out, or add --replace",
    )


def engine_drafts(engines: Engines) -> tuple[EngineDraft, ...]:
    """Engines as a bundle takes them."""
    return tuple(_engine_draft(order, result) for order, result in engines)


def engine_reports(engines: Engines) -> dict[str, Any]:
    """What building the engines said, by the folder they have in the bundle."""
    drafts = engine_drafts(engines)
    return {draft.folder: stage_report(result) for draft, (_, result) in zip(drafts, engines, strict=True)}


def stage_report(result: StageResult) -> dict[str, Any]:
    """What a bundle's manifest says of a stage."""
    return {**result.report, "seconds": result.seconds}


def key_of(*parts: object) -> str:
    """Digest of what a bundle depends on."""
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def _engine_draft(order: EngineOrder, result: StageResult) -> EngineDraft:
    report, builder = result.report, _BUILDERS[order.backend]
    return EngineDraft(
        target=order.target.name,
        backend=order.backend,
        precision=report["precision"],
        dialect=report["dialect"],
        files=result.files,
        main=report["main"],
        builder=f"{builder} {fingerprint().libraries.get(builder, '')}".strip(),
        threads=order.target.threads,
        execution=order.target.execution,
        tolerances=_tolerances(report),
    )


def _tolerances(report: Mapping[str, Any]) -> dict[str, float]:
    """Twice what was seen here, and at least float noise: other CPUs round elsewhere, but a wrong engine is far off."""
    if "tolerances" in report:  # of an engine that has not run, nothing was seen
        return dict(report["tolerances"])
    allowed = {name: max(2 * value, 1e-3) for name, value in report["differences"].items()}
    allowed["keypoints_px"] = max(2 * report["shift"]["median_px"], 0.1)
    return allowed
