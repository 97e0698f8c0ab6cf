"""The float engines of a network, quantised or not: what its INT8 engine has to be faster than.

Invariant: a quantised network's float engine is the very network without its quantisers, weights as they were trained;
it is checked against those weights in FP32, and how far it is from the quantised network's answers is in the report.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import ParityError
from edgepose.export.engine import engine_differences, engine_from_onnx
from edgepose.runtime import open_session
from edgepose.spec import Backend, ModelSpec, Precision
from edgepose.stages.export import FLOAT_ONNX, RANGES, finished_onnx, golden_vectors, reference_of


def build_float_engine(
    exported: Path, spec: ModelSpec, backend: Backend, precision: Precision, folder: Path, *, batch: int = 0
) -> dict[str, Any]:
    """Turn an exported network into one backend's float engine.

    Args:
        exported: Folder of the export stage.
        spec: The network's inputs, outputs and decoder, as it was exported, without ends.
        backend: Who is to execute it.
        precision: "fp32" or "bf16".
        folder: Where the engine's files go.
        batch: Fixed batch of the engine; 0 leaves it free.

    Returns:
        The report of `engine_from_onnx`; "differences" and "shift" are from the golden vectors, as bundles promise
        them. Of a BF16 engine that strays too far it has "refused", the reason, and the engine is not to be used.

    Raises:
        ParityError: The FP32 engine strays from the network: a fault, not a matter of precision.
    """
    model = exported / FLOAT_ONNX
    quantised = (exported / RANGES).exists()
    answers = _answers(model, spec, golden_vectors(exported)[0]) if quantised else None
    own = reference_of(exported, spec, answers)
    model = finished_onnx(model, exported, spec, batch, folder)
    try:
        report = engine_from_onnx(model, "float", backend, own, folder, precision=precision)
    except ParityError as err:
        if precision == "fp32":
            raise
        return {"backend": backend, "precision": precision, "refused": str(err)}
    if batch:
        report["batch"] = batch
    if not quantised:
        return report
    shift, differences = engine_differences(folder / report["main"], backend, precision, reference_of(exported, spec))
    from_floats = {"shift": report["shift"], "differences": report["differences"]}
    return {**report, "shift": msgspec.to_builtins(shift), "differences": differences, "from_floats": from_floats}


def _answers(model: Path, spec: ModelSpec, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """What the float network says; its file was checked against torch when it was exported."""
    session = open_session(model, "onnxruntime", threads=1)
    try:
        return dict(session.infer({spec.inputs[0].name: images}))
    finally:
        session.close()
