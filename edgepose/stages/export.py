"""The stages that write a network down: checkpoint → ONNX → engines, with parity checked after every step.

Invariant: what is compared is always the same rendered people, and the reference is the checkpoint's torch network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch import nn

from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.plan import PruningPlan
from edgepose.compress.quantise import convert
from edgepose.compress.ranges import read_ranges, write_ranges
from edgepose.data.render import render_person
from edgepose.export.engine import Reference, engine_from_onnx
from edgepose.export.onnx import onnx_from_torch
from edgepose.export.qdq import dialect_for, quantised_onnx
from edgepose.export.sparsity import check_sparse_onnx
from edgepose.pose.preprocess import crop_transforms, normalise, warp
from edgepose.spec import Backend, ModelSpec
from edgepose.stages.networks import load_network, pruning_of
from edgepose.stages.source import Source
from edgepose.training.session import TorchSession

FLOAT_ONNX, MODEL, RANGES, GOLDEN = "float.onnx", "model.onnx", "ranges.json", "golden.npz"
_GOLDEN_PEOPLE = 16


def export(source: Source | Path, opset: int, folder: Path) -> dict[str, Any]:
    """Write the float network, with its ranges and the quantised network beside it, and the torch network's answers.

    Raises:
        ParityError: ONNX Runtime answers differently, or weights are not as sparse as the network's plan says.
    """
    network, checkpoint = load_network(source)
    spec = checkpoint.card.spec
    if checkpoint.card.quantisation is None:
        plain = fold_batch_norms(network)
        report = onnx_from_torch(plain, spec, folder / FLOAT_ONNX, opset=opset)
    else:
        plain, ranges = convert(network)
        report = onnx_from_torch(plain, spec, folder / FLOAT_ONNX, opset=opset, ranges=ranges)
        write_ranges(folder / RANGES, ranges)
        quantised_onnx(folder / FLOAT_ONNX, ranges, folder / MODEL, dialect="u8s8")
    _check_sparsity(folder, plain, pruning_of(checkpoint))
    images = _rendered_people(spec)
    outputs = TorchSession(network, spec).infer({spec.inputs[0].name: images})
    arrays: dict[str, Any] = {"images": images, **outputs}
    np.savez_compressed(folder / GOLDEN, **arrays)
    return {"opset": opset, "parity": msgspec.to_builtins(report)}


def _check_sparsity(folder: Path, plain: nn.Module, plan: PruningPlan | None) -> None:
    """Refuse files in which weights that the plan made sparse are so no more."""
    names = () if plan is None else plan.sparse
    layers = {name: plain.get_parameter(f"{name}.weight").detach().numpy() for name in names}
    for name in (FLOAT_ONNX, MODEL):
        if (folder / name).exists():
            check_sparse_onnx(folder / name, layers)


def build_engine(
    exported: Path, spec: ModelSpec, backend: Backend, weight_bits: Literal[7, 8], folder: Path
) -> dict[str, Any]:
    """Turn an exported network into one backend's engine and compare it with the golden vectors.

    Raises:
        ParityError: The engine strays too far from the torch network.
    """
    reference = Reference(spec, *golden_vectors(exported))
    model = exported / FLOAT_ONNX
    if not (exported / RANGES).exists():
        return engine_from_onnx(model, "float", backend, reference, folder)
    dialect, ranges = dialect_for(backend), read_ranges(exported / RANGES)
    written = quantised_onnx(model, ranges, folder / MODEL, dialect=dialect, weight_bits=weight_bits)
    report = engine_from_onnx(folder / MODEL, dialect, backend, reference, folder)
    return {**report, "weight_bits": weight_bits, "qdq": msgspec.to_builtins(written)}


def golden_vectors(exported: Path) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """The golden images (N, 3, h, w) and the torch network's outputs for them."""
    with np.load(exported / GOLDEN, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays.pop("images"), arrays


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
