"""BUILD: the network of a bundle to engines for other targets, as a new bundle.

Invariant: the source is only read, every byte that is used was checked against its manifest, and its golden vectors
are what the new engines are judged by. No torch: this runs on the device.

Targets for CPUs without VNNI get seven-bit weights, requantised from the bundle's eight-bit ones; that is not lossless
(see `export.weight_bits`), and compiling for such a target from the checkpoint is a little more accurate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from edgepose.bundle import Bundle, BundleDraft, GoldenDraft, check_file, golden_vectors, read_bundle
from edgepose.errors import BadInput, UsageError
from edgepose.host import engine_cache, fingerprint
from edgepose.profiles import load_target
from edgepose.recipe import Recipe
from edgepose.runtime import EXECUTABLE, installed_backends
from edgepose.spec import Backend, Target
from edgepose.stages.assemble import (
    CompileResult,
    EngineOrder,
    Engines,
    StageObserver,
    check_out,
    engine_drafts,
    engine_orders,
    engine_reports,
    finished_bundle,
    key_of,
    observed,
)
from edgepose.stages.budget import check_int8_macs
from edgepose.stages.engine_latency import EngineTimer, time_engine, timed


@dataclass(frozen=True, slots=True)
class BuildRequest:
    """What to build.

    Attributes:
        source: The bundle whose network is taken; it is not changed.
        targets: Names of targets or paths of target files; the new bundle has engines for these only.
        out: Directory of the new bundle.
        replace: Whether another bundle at `out` may be replaced.
        sign: Private key (Ed25519, PEM) that TensorRT engines are signed with, for machines that trust it.
    """

    source: Path
    targets: Sequence[str]
    out: Path
    replace: bool = False
    sign: Path | None = None


def build_bundle(request: BuildRequest, observer: StageObserver, *, timer: EngineTimer = time_engine) -> CompileResult:
    """Build engines for other targets.

    Args:
        request: What to build.
        observer: Told which engines were built or found.
        timer: Times each engine that runs here, once, when it was built.

    Raises:
        BadInput: No such bundle, target or free name, or a target that cannot run the network's precision.
        IntegrityError: The source was changed since it was written.
        BackendUnavailable: A target runs nothing that can be built here.
        ParityError: An engine strays too far from the golden vectors, or does less in integers than the recipe of the
            bundle demands.
    """
    source, out, replace = request.source, request.out, request.replace
    bundle = read_bundle(source)
    wanted = tuple(load_target(name) for name in dict.fromkeys(request.targets))
    orders = engine_orders(wanted, _able())
    _check_precisions(bundle, wanted)
    _check_outside(out, source)
    origin = {"source": {"name": bundle.manifest.name, "digest": bundle.digest}, "targets": [t.name for t in wanted]}
    check_out(out, origin, replace=replace)
    engines = _engines(bundle, orders, observer, timer)
    check_int8_macs(_recipe_of(bundle), engines)
    signed = _signatures(engines, request.sign)
    built = [(order.target.name, order.target.threads, result.key, *signed) for order, result in engines]
    key = key_of(bundle.digest, built)

    def draft() -> BundleDraft:
        return _draft(bundle, engines, {**origin, "key": key, "host": fingerprint().digest})

    return finished_bundle(out, key, tuple(result for _, result in engines), draft, replace=replace)


def _check_precisions(bundle: Bundle, targets: Sequence[Target]) -> None:
    precision = "int8" if any(e.precision == "int8" for e in bundle.manifest.engines) else "fp32"
    for target in targets:
        if precision not in target.precisions:
            raise UsageError(
                f"target {target.name}",
                found=f"precisions {', '.join(target.precisions)}",
                expected=f"{precision} among them, as {bundle.root} is",
                fix="name another target, or compile the checkpoint with another recipe",
            )


def _able() -> tuple[Backend, ...]:
    """What can be built here: TensorRT's engines where its package is installed."""
    return (*EXECUTABLE, *(backend for backend in installed_backends() if backend not in EXECUTABLE))


def _signatures(engines: Engines, sign: Path | None) -> tuple[str, ...]:
    """Signs the TensorRT engines where a key is given; their signatures' digests."""
    digests = []
    for order, result in engines:
        if order.is_tensorrt:
            from edgepose.runtime.provenance import companions, digest_of, sign_engine

            engine = result.path / result.report["main"]
            companions(engine)[2].unlink(missing_ok=True)  # of a key that was given before
            if sign is not None:
                digests.append(digest_of(sign_engine(engine, sign).read_bytes()))
    return tuple(digests)


def _check_outside(out: Path, source: Path) -> None:
    if out.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"--out {out}", found="the source itself, or a place in it", expected="another place",
            fix="choose another --out: a bundle is never changed",
        )  # fmt: skip


def _recipe_of(bundle: Bundle) -> Recipe | None:
    """The recipe that a bundle was made by; None where it was made by none that is known here."""
    origin = bundle.manifest.reports.get("compile") or bundle.manifest.reports.get("build")
    while isinstance(origin, Mapping) and "recipe" not in origin:  # it was built from another bundle
        origin = origin.get("before")
    if not isinstance(origin, Mapping):
        return None
    try:
        return msgspec.convert(origin["recipe"], Recipe)
    except msgspec.ValidationError:
        return None  # of another version


def _engines(bundle: Bundle, orders: Sequence[EngineOrder], observer: StageObserver, timer: EngineTimer) -> Engines:
    cache = engine_cache(bundle.digest, fingerprint())
    engines = []
    for order in orders:

        def work(folder: Path, order: EngineOrder = order) -> dict[str, Any]:
            build = partial(_build_tensorrt, observer=observer) if order.is_tensorrt else _build_engine
            return timed(order, folder, build(bundle, order, folder), timer)

        engines.append((order, observed(order.key({"bundle": bundle.digest}), work, observer, within=cache)))
    return tuple(engines)


def _build_engine(bundle: Bundle, order: EngineOrder, folder: Path) -> dict[str, Any]:
    from edgepose.export.ends import fix_batch
    from edgepose.export.engine import Reference, engine_from_onnx
    from edgepose.export.weight_bits import narrowed_onnx, quantisation_of

    golden = _golden(bundle)
    model = check_file(bundle, bundle.manifest.model)
    kind = quantisation_of(model)
    if kind.dialect == "s8s8":
        raise UsageError(
            f"bundle {bundle.root}: {bundle.manifest.model}",
            found="signed activations, which only TensorRT runs fast",
            expected="float or u8s8",
            fix=f"compile the checkpoint for {order.target.name}",
        )
    report: dict[str, Any] = {}
    if kind.dialect != "float":
        report["weight_bits"] = min(kind.weight_bits, order.weight_bits)
    if kind.dialect != "float" and order.weight_bits < kind.weight_bits:
        report["narrowed"] = msgspec.to_builtins(narrowed_onnx(model, folder / "model.onnx"))
        model = folder / "model.onnx"
    if order.target.batch:
        fix_batch(model, order.target.batch, folder / "model.onnx")
        model, report["batch"] = folder / "model.onnx", order.target.batch
    reference = Reference(bundle.manifest.spec, golden.inputs, dict(golden.outputs))
    return {**engine_from_onnx(model, kind.dialect, order.backend, reference, folder), **report}


def _build_tensorrt(bundle: Bundle, order: EngineOrder, folder: Path, observer: StageObserver) -> dict[str, Any]:
    from edgepose.export.engine import Reference
    from edgepose.export.tensorrt_engine import EngineWish, tensorrt_engine

    assert order.backend == "tensorrt" or order.backend == "tensorrt-rtx"  # noqa: PLR1714 - mypy narrows by these alone
    golden = _golden(bundle)
    model = check_file(bundle, bundle.manifest.model)
    wish = EngineWish(order.target, order.backend, order.precision, observer.building)
    return tensorrt_engine(model, wish, Reference(bundle.manifest.spec, golden.inputs, dict(golden.outputs)), folder)


def _golden(bundle: Bundle) -> GoldenDraft:
    golden = golden_vectors(bundle)
    if golden is None:
        raise BadInput(
            f"bundle {bundle.root}", found="no golden vectors", expected="some, to judge new engines by",
            fix="compile the network again",
        )  # fmt: skip
    return golden


def _draft(bundle: Bundle, engines: Engines, origin: dict[str, Any]) -> BundleDraft:
    """The source's network, history and golden vectors around other engines."""
    manifest = bundle.manifest
    old = {engine.path.rpartition("/")[0] for engine in manifest.engines}
    reports = {name: report for name, report in manifest.reports.items() if name not in old}
    if "build" in reports:
        origin = {**origin, "before": reports["build"]}
    derived = {"onnx", *(f"engine:{engine.path}" for engine in manifest.engines)}
    chain = {name: link for name, link in manifest.chain.items() if name not in derived}
    return BundleDraft(
        name=manifest.name,
        spec=manifest.spec,
        onnx=check_file(bundle, manifest.model),
        engines=engine_drafts(engines),
        chain={**chain, "bundle": bundle.digest},
        reports={**reports, **engine_reports(engines), "build": origin},
        golden=_golden(bundle),
    )
