"""The stages that write a network down: checkpoint → ONNX → engines, with parity checked after every step.

Invariant: what is compared is always the same rendered people, and the reference is the checkpoint's torch network.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.quantise import convert
from edgepose.compress.ranges import read_ranges, write_ranges
from edgepose.data.render import render_person
from edgepose.errors import ParityError
from edgepose.export.onnx import onnx_from_torch
from edgepose.export.openvino import int8_share_openvino, openvino_from_onnx
from edgepose.export.ort import int8_share_ort, ort_from_onnx
from edgepose.export.parity import KeypointShift, keypoint_shift
from edgepose.export.qdq import dialect_for, quantised_onnx
from edgepose.pose.preprocess import crop_transforms, normalise, warp
from edgepose.runtime import open_session
from edgepose.spec import Backend, Dialect, ModelSpec, Precision
from edgepose.stages.networks import load_network
from edgepose.training.session import TorchSession

FLOAT_ONNX, RANGES, GOLDEN = "float.onnx", "ranges.json", "golden.npz"
_GOLDEN_PEOPLE = 16
_MAX_GAP: dict[Precision, float] = {"fp32": 1e-4, "bf16": 0.02, "fp16": 2e-3, "int8": 0.03}
"""Mean difference of an engine's outputs from torch's, as a share of their range; beyond it the build fails.

Outputs are judged, not keypoints: where a network has no opinion, the keypoint jumps at the smallest difference.
"""


def export(source: Path, opset: int, folder: Path) -> dict[str, Any]:
    """Write the float network with its ranges beside it, and the golden vectors of the torch network."""
    network, checkpoint = load_network(source)
    spec = checkpoint.card.spec
    if checkpoint.card.quantisation is None:
        report = onnx_from_torch(fold_batch_norms(network), spec, folder / FLOAT_ONNX, opset=opset)
    else:
        plain, ranges = convert(network)
        report = onnx_from_torch(plain, spec, folder / FLOAT_ONNX, opset=opset, ranges=ranges)
        write_ranges(folder / RANGES, ranges)
    images = _rendered_people(spec)
    outputs = TorchSession(network, spec).infer({spec.inputs[0].name: images})
    arrays: dict[str, Any] = {"images": images, **outputs}
    np.savez_compressed(folder / GOLDEN, **arrays)
    return {"opset": opset, "parity": msgspec.to_builtins(report)}


def build_engine(
    exported: Path, spec: ModelSpec, backend: Backend, weight_bits: Literal[7, 8], folder: Path
) -> dict[str, Any]:
    """Turn an exported network into one backend's engine and compare it with the golden vectors.

    Raises:
        ParityError: The engine strays too far from the torch network.
    """
    model, dialect = exported / FLOAT_ONNX, _dialect(exported, backend)
    report: dict[str, Any] = {"backend": backend, "dialect": dialect}
    precision: Precision = "fp32"
    if dialect != "float":
        precision, ranges = "int8", read_ranges(exported / RANGES)
        model = folder / "model.onnx"
        written = quantised_onnx(exported / FLOAT_ONNX, ranges, model, dialect=dialect, weight_bits=weight_bits)
        report |= {"weight_bits": weight_bits, "qdq": msgspec.to_builtins(written)}
    match backend:
        case "onnxruntime":
            main = ort_from_onnx(model, folder / "model.onnx") if model.parent != folder else model
        case "openvino":
            main, _ = openvino_from_onnx(model, folder)
            (folder / "model.onnx").unlink(missing_ok=True)
        case _:
            raise AssertionError(backend)  # the compiler asks for executable backends only
    if precision == "int8":
        share = int8_share_ort(main) if backend == "onnxruntime" else int8_share_openvino(main)
        report["int8_share"] = share.share
    shift, differences = _compare(main, backend, precision, spec, exported)
    report |= {
        "main": main.name,
        "precision": precision,
        "shift": msgspec.to_builtins(shift),
        "differences": differences,
    }
    return report


def golden_vectors(exported: Path) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """The golden images (N, 3, h, w) and the torch network's outputs for them."""
    with np.load(exported / GOLDEN, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays.pop("images"), arrays


def _dialect(exported: Path, backend: Backend) -> Dialect:
    return dialect_for(backend) if (exported / RANGES).exists() else "float"


def _compare(
    main: Path, backend: Backend, precision: Precision, spec: ModelSpec, exported: Path
) -> tuple[KeypointShift, dict[str, float]]:
    images, expected = golden_vectors(exported)
    session = open_session(main, backend, threads=1, precision=precision)
    try:
        found: Mapping[str, Any] = session.infer({spec.inputs[0].name: images})
    finally:
        session.close()
    shift = keypoint_shift(expected, found, spec.decoder)
    allowed = _MAX_GAP[precision]
    if not shift.logit_gap <= allowed:
        raise ParityError(
            f"engine {backend} {precision}: outputs",
            found=f"a mean difference of {shift.logit_gap:.2g} of their range from the torch network",
            expected=f"at most {allowed:g}",
            fix=f"a tolerance of {shift.logit_gap:.2g} would have passed; protect sensitive layers or use qat",
        )
    return shift, {name: float(np.abs(found[name] - value).max()) for name, value in expected.items()}


def _rendered_people(spec: ModelSpec) -> NDArray[np.float32]:
    """Golden images are rendered, not photographed: a bundle must not carry somebody's pictures."""
    generator = np.random.default_rng(0)
    crops = []
    for _ in range(_GOLDEN_PEOPLE):
        person = render_person(generator)
        x, y, w, h = person.bbox_xywh
        transform = crop_transforms(np.array([[x, y, x + w, y + h]]), spec.preprocess)
        crops.append(warp(person.image, transform, spec.preprocess.input_hw)[0])
    return normalise(np.stack(crops), spec.preprocess)
