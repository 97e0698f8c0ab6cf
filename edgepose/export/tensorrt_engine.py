"""An ONNX file → a TensorRT engine in a folder: spelt for TensorRT, checked against the lint, built, sealed, compared.

Invariant: no builder sees a file that breaks a rule of the lint, and the report says whose answers were compared with
the network's: the engine's own where it runs here; where it was compiled ahead of time, those of ONNX Runtime to the
very ONNX file that it was compiled from, for the engine itself has not run then.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import ParityError, UsageError
from edgepose.export.engine import MAX_GAP, Reference
from edgepose.export.half import half_onnx
from edgepose.export.int8_reasons import achieved, read_asked
from edgepose.export.parity import KeypointShift, keypoint_shift
from edgepose.export.signed import signed_onnx
from edgepose.export.tensorrt import Plan, PlanOrder, build_plan
from edgepose.export.trt_kernels import LayerPrecision, engine_layers, int8_share_of, precision_report
from edgepose.export.trt_lint import check_for_tensorrt
from edgepose.export.trt_memory import Profile
from edgepose.export.trt_progress import Told
from edgepose.export.weight_bits import quantisation_of
from edgepose.runtime import open_session
from edgepose.runtime.cuda import Cuda, open_cuda
from edgepose.runtime.provenance import STRIPPED_WEIGHTS, Provenance, digest_of, write_engine
from edgepose.runtime.session import Session
from edgepose.runtime.tensorrt import TensorrtOptions
from edgepose.runtime.trt_diagnosis import diagnose
from edgepose.runtime.trt_versions import Flavour
from edgepose.spec import CudaChoice, Precision, Regression, Target
from edgepose.storage import atomic_write

ENGINE = "engine.plan"
_LEAST_PX: dict[Precision, float] = {"fp32": 0.1, "bf16": 0.5, "fp16": 0.5, "int8": 1.0}
"""Median shift of the keypoints that an engine which has not run yet is allowed at least, by precision."""


@dataclass(frozen=True, slots=True)
class EngineWish:
    """The engine that is wanted.

    Attributes:
        target: The device.
        flavour: Who builds and executes it.
        precision: Arithmetic; None is INT8 for a quantised network and the target's `floats` for others.
        told: Called with the builder's phase, how much is done and how much there is.
        cuda: Who calls CUDA; a `Cuda` of one's own will do.
    """

    target: Target
    flavour: Flavour
    precision: Precision | None = None
    told: Told = lambda _what, _done, _whole: None
    cuda: CudaChoice | Cuda = "auto"


def tensorrt_engine(model: Path, wish: EngineWish, reference: Reference, folder: Path) -> dict[str, Any]:
    """Builds an engine.

    Args:
        model: The ONNX file: float, or quantised in either spelling.
        wish: What is wanted.
        reference: What the engine has to answer.
        folder: Where the engine, its provenance and its seal go.

    Returns:
        The report, as of `engine_from_onnx`, and more: "tensorrt", how it was built; "arithmetic", in which precision
        it multiplies; "lint", what could be better about the file; "checked", whether the engine itself was run.

    Raises:
        MissingDependency: TensorRT is not installed.
        BackendUnavailable: TensorRT does not work here, or this is not the target's GPU.
        OnnxError: The file breaks a rule of the lint, or the parser refuses it.
        ParityError: The engine strays too far from the reference.
        UsageError: A precision or an option that cannot be had.
        EnvironmentFault: The builder fails.
    """
    precision, spelt, spelling = _spelt(model, wish, folder)
    try:
        warnings = check_for_tensorrt(spelt)
        plan = build_plan(PlanOrder(spelt, wish.target, wish.flavour, wish.told, wish.cuda))
        _write(plan, spelt, wish, folder)
        report: dict[str, Any] = {"backend": wish.flavour, "precision": precision, "main": ENGINE, **spelling}
        layers = engine_layers(spelt, plan.kernels)
        report |= _arithmetic(spelt, plan, layers, wish.flavour, precision)
        report |= {"tensorrt": msgspec.to_builtins(plan.report), "lint": msgspec.to_builtins(warnings)}
        return {**report, **_compared(spelt, folder / ENGINE, plan, wish, (precision, reference))}
    finally:
        spelt.unlink(missing_ok=True)


def _spelt(model: Path, wish: EngineWish, folder: Path) -> tuple[Precision, Path, dict[str, Any]]:
    """The file that TensorRT reads, in a folder of the engine's, with its precision and what was changed."""
    dialect, out = quantisation_of(model).dialect, folder / "spelt.onnx"
    own: Precision = wish.target.tensorrt.floats if dialect == "float" else "int8"
    precision = wish.precision or own
    if (precision == "int8") != (dialect != "float") or precision == "bf16":
        found = f"{precision}, of a network written as {dialect}"
        raise UsageError(f"target {wish.target.name}: precision", found=found, expected="int8 for quantised networks, "
                         "fp32 or fp16 for others")  # fmt: skip
    if precision == "fp16":
        return precision, out, {"dialect": dialect, "half_nodes": half_onnx(model, out)}
    if dialect == "u8s8":
        signed = signed_onnx(model, out)
        return precision, out, {"dialect": "s8s8", "signed": msgspec.to_builtins(signed)}
    atomic_write(out, model.read_bytes())
    return precision, out, {"dialect": dialect}


def _write(plan: Plan, spelt: Path, wish: EngineWish, folder: Path) -> None:
    build, content = wish.target.tensorrt, plan.content
    provenance = Provenance(
        sha256=digest_of(content), size_bytes=len(content), built=plan.host, hardware=build.hardware,
        version_compatible=build.version_compatible, dla=build.dla_core is not None, stripped=build.strip_weights,
        source=digest_of(spelt.read_bytes()), target=wish.target.name,
    )  # fmt: skip
    write_engine(folder / ENGINE, content, provenance)
    if build.strip_weights:
        atomic_write(folder / STRIPPED_WEIGHTS, spelt.read_bytes())


def _arithmetic(
    spelt: Path, plan: Plan, layers: tuple[LayerPrecision, ...], flavour: Flavour, precision: Precision
) -> dict[str, Any]:
    """What was asked for and achieved; of an INT8 engine also as other backends report it."""
    found = msgspec.to_builtins(precision_report(layers, len(plan.kernels), plan.source))
    if precision != "int8":
        return {"arithmetic": found}
    done = achieved(int8_share_of(layers, flavour), read_asked(spelt))
    return {"arithmetic": found, "int8_share": done.share, "int8": msgspec.to_builtins(done)}


# ----------------------------------------------------------------------------------------------------------- comparing


def _compared(
    spelt: Path, engine: Path, plan: Plan, wish: EngineWish, expected: tuple[Precision, Reference]
) -> dict[str, Any]:
    """How far the engine's answers are from the reference's, or those of what it was compiled from."""
    precision, reference = expected
    runs = _runs_here(plan, wish)
    options = TensorrtOptions(cuda=wish.cuda, dla_core=wish.target.tensorrt.dla_core or 0)
    session = (
        open_session(engine, wish.flavour, tensorrt=options) if runs else open_session(spelt, "onnxruntime", threads=1)
    )
    try:
        found = _answers(session, reference, plan.report.profiles)
    finally:
        session.close()
    spec = reference.spec
    shift = keypoint_shift(reference.outputs, found, spec.decoder)
    differences = {name: float(np.abs(found[name] - value).max()) for name, value in reference.outputs.items()}
    if isinstance(spec.decoder, Regression) and not spec.decoder.scales:  # decoded in the graph: the shift judges them
        del differences[spec.decoder.keypoints]
    _check(shift, wish, precision)
    report = {"shift": msgspec.to_builtins(shift), "differences": differences}
    if runs:
        return {**report, "checked": "the engine, on this GPU"}
    allowed = {
        name: max(2 * differences[name], 2 * MAX_GAP[precision] * float(np.abs(value).max()), 1e-3)
        for name, value in reference.outputs.items()
        if name in differences
    }
    allowed["keypoints_px"] = max(2 * shift.median_px, _LEAST_PX[precision])
    return {**report, "tolerances": allowed, "checked": "the ONNX file it was compiled from, by ONNX Runtime; the "
            "engine has not run: there is no GPU for it here"}  # fmt: skip


def _runs_here(plan: Plan, wish: EngineWish) -> bool:
    """Whether the engine can be executed: what was built on a device always can."""
    if wish.flavour == "tensorrt":
        return True
    if diagnose(wish.flavour):
        return False
    cuda = open_cuda(wish.cuda) if isinstance(wish.cuda, str) else wish.cuda
    return cuda.device().compute_capability in plan.host.compute_capabilities


def _answers(session: Session, reference: Reference, profiles: tuple[Profile, ...]) -> dict[str, NDArray[np.float32]]:
    """What the session says to the reference's images, in batches that it takes.

    Raises:
        ParityError: Another batch of a profile, its smallest or largest, gets other answers.
    """
    images, size = reference.images, session.inputs[0].shape[0]
    batch = size if isinstance(size, int) else max((best for _, best, _ in profiles), default=len(images))
    least = size if isinstance(size, int) else min((low for low, _, _ in profiles), default=1)
    parts = [_infer(session, images[first : first + batch], least) for first in range(0, len(images), batch)]
    found = {output: np.concatenate([part[output] for part in parts]) for output in parts[0]}
    for size in sorted({size for profile in profiles for size in profile} - {batch}):
        for output, value in _infer(session, np.resize(images, (size, *images.shape[1:])), size).items():
            expected = np.resize(found[output], value.shape)
            gap = float(np.abs(value - expected).mean() / max(float(np.abs(expected).max()), 1e-12))
            if not gap <= MAX_GAP["fp16"]:
                raise ParityError(
                    f"engine: {output} at batch {size}", found=f"answers {gap:.2g} of their range off",
                    expected=f"those at batch {batch}", fix="report this: the engine is wrong",
                )  # fmt: skip
    return found


def _infer(session: Session, images: NDArray[Any], least: int) -> dict[str, NDArray[np.float32]]:
    """Answers to some images, filled up to the smallest batch that the session takes."""
    count = len(images)
    fed = np.resize(images, (max(count, least), *images.shape[1:]))
    return {output: value[:count] for output, value in session.infer({session.inputs[0].name: fed}).items()}


def _check(shift: KeypointShift, wish: EngineWish, precision: Precision) -> None:
    if not shift.logit_gap <= MAX_GAP[precision]:
        raise ParityError(
            f"engine {wish.flavour} {precision} for {wish.target.name}: outputs",
            found=f"a mean difference of {shift.logit_gap:.2g} of their range from the network",
            expected=f"at most {MAX_GAP[precision]:g}",
            fix="compile with symmetric activations" if precision == "int8" else "build it with floats: fp32",
        )
