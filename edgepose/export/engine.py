"""An ONNX file → one backend's engine, checked against what the torch network answered.

Invariant: no engine is handed on whose outputs stray further from the reference than its precision explains.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import ParityError, UsageError
from edgepose.export.int8_reasons import achieved, read_asked
from edgepose.export.int8_share import Int8Share
from edgepose.export.parity import KeypointShift, keypoint_shift
from edgepose.runtime import infer_all, open_session
from edgepose.spec import Backend, Dialect, ModelSpec, Precision, Regression

_MODEL = "model.onnx"
MAX_GAP: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.02, "fp16": 2e-3, "int8": 0.03}
"""Mean difference of an engine's outputs from torch's, as a share of their range; beyond it the build fails.

Outputs are judged, not keypoints: where a network has no opinion, the keypoint jumps at the smallest difference.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What an engine has to answer.

    Attributes:
        spec: The network's inputs, outputs and decoder.
        images: (N, 3, h, w) float32, normalised, or (N, h, w, 3) uint8 where the network takes images.
        outputs: The torch network's outputs for them, by name.
    """

    spec: ModelSpec
    images: NDArray[Any]
    outputs: dict[str, NDArray[np.float32]]


def engine_from_onnx(
    model: Path,
    dialect: Dialect,
    backend: Backend,
    reference: Reference,
    folder: Path,
    *,
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Build an engine in a folder of its own and compare it with the reference.

    Args:
        model: The ONNX file; it may lie in `folder`, and goes away there if it is no part of the engine.
        dialect: How its quantisation is written.
        backend: Who is to execute it.
        reference: What it has to answer.
        folder: Where the engine's files go.
        precision: Arithmetic of what is not quantised; None is FP32. What is quantised is INT8 and nothing else.

    Returns:
        The report: backend, dialect, main file, precision, share of integer multiplications, differences.

    Raises:
        ParityError: The engine strays too far from the reference.
        OnnxError: The backend refuses the file.
        UsageError: A precision that the dialect or the backend does not have.
        BackendUnavailable: A precision that this processor does not have.
    """
    own: Precision = "fp32" if dialect == "float" else "int8"
    precision = precision or own
    if (precision == "int8") != (own == "int8"):
        raise UsageError("engine: precision", found=f"{precision}, of a network written as {dialect}", expected=own)
    report: dict[str, Any] = {"backend": backend, "dialect": dialect, "precision": precision}
    asked = read_asked(model) if own == "int8" else None  # before the file goes away
    main = engine_file(model, backend, folder)
    if asked is not None and (backend == "onnxruntime" or backend == "openvino"):  # noqa: PLR1714 - mypy narrows by these alone
        done = achieved(int8_share(main, backend), asked)
        report |= {"int8_share": done.share, "int8": msgspec.to_builtins(done)}
    shift, differences = engine_differences(main, backend, precision, reference)
    _check(shift, backend, precision)
    return {**report, "main": main.name, "shift": msgspec.to_builtins(shift), "differences": differences}


def engine_file(model: Path, backend: Backend, folder: Path) -> Path:
    """Build an engine in a folder of its own, unchecked, and return its main file; arguments as `engine_from_onnx`.

    Raises:
        OnnxError: The backend refuses the file.
    """
    match backend:
        case "onnxruntime":
            from edgepose.export.ort import ort_from_onnx

            return ort_from_onnx(model, folder / _MODEL) if model.parent != folder else model
        case "openvino":
            from edgepose.export.openvino import openvino_from_onnx

            main, _ = openvino_from_onnx(model, folder)
            (folder / _MODEL).unlink(missing_ok=True)
            return main
        case "tensorrt" | "tensorrt-rtx":
            fix = "write the bundle for a CPU first, and then: edgepose build BUNDLE --target TARGET"
            raise UsageError(f"engine: {backend}", found="a bundle that is only being made", expected="one", fix=fix)


def int8_share(path: str | os.PathLike[str], backend: Literal["onnxruntime", "openvino"]) -> Int8Share:
    """Measures an engine file: .onnx for ONNX Runtime, .onnx or .xml for OpenVINO.

    Raises:
        OnnxError: The runtime refuses the file.
    """
    match backend:
        case "onnxruntime":
            from edgepose.export.ort import int8_share_ort

            return int8_share_ort(path)
        case "openvino":
            from edgepose.export.openvino import int8_share_openvino

            return int8_share_openvino(path)
        case _:
            assert_never(backend)


def engine_differences(
    main: Path, backend: Backend, precision: Precision, reference: Reference
) -> tuple[KeypointShift, dict[str, float]]:
    """How far an engine's answers are from the reference's: of keypoints, and the largest of each output, by name."""
    spec = reference.spec
    session = open_session(main, backend, threads=1, precision=precision)
    try:
        found = infer_all(session, {spec.inputs[0].name: reference.images})
    finally:
        session.close()
    shift = keypoint_shift(reference.outputs, found, spec.decoder)
    differences = {name: float(np.abs(found[name] - value).max()) for name, value in reference.outputs.items()}
    if isinstance(spec.decoder, Regression) and not spec.decoder.scales:
        # Decoded in the graph: a keypoint that the network has no opinion on may jump anywhere; the shift judges them.
        del differences[spec.decoder.keypoints]
    return shift, differences


def _check(shift: KeypointShift, backend: Backend, precision: Precision) -> None:
    allowed = MAX_GAP[precision]
    if not shift.logit_gap <= allowed:
        raise ParityError(
            f"engine {backend} {precision}: outputs",
            found=f"a mean difference of {shift.logit_gap:.2g} of their range from the torch network",
            expected=f"at most {allowed:g}",
            fix=f"a tolerance of {shift.logit_gap:.2g} would have passed; protect sensitive layers or use qat",
        )
