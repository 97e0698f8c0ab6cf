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
from edgepose.export.ends import answers_with_ends, fix_batch, onnx_with_ends, spec_with_ends
from edgepose.export.engine import Reference, engine_from_onnx
from edgepose.export.onnx import onnx_from_torch
from edgepose.export.qdq import dialect_for, quantised_onnx
from edgepose.export.sparsity import check_sparse_onnx
from edgepose.pose.preprocess import crop_transforms, normalise, warp
from edgepose.recipe import Export
from edgepose.spec import Backend, ModelSpec
from edgepose.stages.networks import load_network, pruning_of
from edgepose.stages.source import Source
from edgepose.training.session import TorchSession

FLOAT_ONNX, MODEL, RANGES, GOLDEN = "float.onnx", "model.onnx", "ranges.json", "golden.npz"
ENDED, ENDS, PIXELS = "ended.onnx", "ends.json", "pixels.npy"
_GOLDEN_PEOPLE = 16


def export(source: Source | Path, opset: int, folder: Path, ends: Export | None = None) -> dict[str, Any]:
    """Write the float network, with its ranges and the quantised network beside it, and the torch network's answers.

    Args:
        source: The checkpoint.
        opset: Version of the ONNX operator set.
        folder: Where the files go.
        ends: What is to stand before and behind the network in engines; None is nothing. The files named so far stay
            without: they are what engines are made of. With ends there is a third, the network as engines have it.

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
    pixels = _rendered_people(spec)
    images = normalise(pixels, spec.preprocess)
    outputs = TorchSession(network, spec).infer({spec.inputs[0].name: images})
    arrays: dict[str, Any] = {"images": images, **outputs}
    np.savez_compressed(folder / GOLDEN, **arrays)
    said = {"opset": opset, "parity": msgspec.to_builtins(report)}
    if ends is None or not ends.has_ends:
        return said
    written = MODEL if (folder / MODEL).exists() else FLOAT_ONNX
    onnx_with_ends(folder / written, spec, ends, folder / ENDED)
    np.save(folder / PIXELS, pixels)
    (folder / ENDS).write_bytes(msgspec.json.encode(ends))
    return {**said, "image_input": ends.image_input, "decoding": ends.decoding}


def _check_sparsity(folder: Path, plain: nn.Module, plan: PruningPlan | None) -> None:
    """Refuse files in which weights that the plan made sparse are so no more."""
    names = () if plan is None else plan.sparse
    layers = {name: plain.get_parameter(f"{name}.weight").detach().numpy() for name in names}
    for name in (FLOAT_ONNX, MODEL):
        if (folder / name).exists():
            check_sparse_onnx(folder / name, layers)


def build_engine(
    exported: Path, spec: ModelSpec, backend: Backend, weight_bits: Literal[7, 8], folder: Path, *, batch: int = 0
) -> dict[str, Any]:
    """Turn an exported network into one backend's engine and compare it with the golden vectors.

    Args:
        exported: Folder of the export stage.
        spec: The network's inputs, outputs and decoder, as it was exported, without ends.
        backend: Who is to execute it.
        weight_bits: Bits of its weights, where it is quantised.
        folder: Where the engine's files go.
        batch: Fixed batch of the engine; 0 leaves it free.

    Raises:
        ParityError: The engine strays too far from the torch network.
    """
    reference = reference_of(exported, spec)
    model = exported / FLOAT_ONNX
    if not (exported / RANGES).exists():
        model = finished_onnx(model, exported, spec, batch, folder)
        return {**engine_from_onnx(model, "float", backend, reference, folder), **_fixed(batch)}
    dialect, ranges = dialect_for(backend), read_ranges(exported / RANGES)
    written = quantised_onnx(model, ranges, folder / MODEL, dialect=dialect, weight_bits=weight_bits)
    model = finished_onnx(folder / MODEL, exported, spec, batch, folder)
    report = engine_from_onnx(model, dialect, backend, reference, folder)
    return {**report, "weight_bits": weight_bits, "qdq": msgspec.to_builtins(written), **_fixed(batch)}


def finished_onnx(model: Path, exported: Path, spec: ModelSpec, batch: int, folder: Path) -> Path:
    """What an engine is made of: a network with its ends and a fixed batch, as far as they were asked for.

    Args:
        model: The network, float or quantised.
        exported: Folder of the export stage, which knows the ends.
        spec: What the network eats and says without ends.
        batch: Fixed batch; 0 leaves it free.
        folder: Where a changed network goes; else it stays where it is.
    """
    ends = ends_of(exported)
    if ends.has_ends:
        onnx_with_ends(model, spec, ends, folder / MODEL)
        model = folder / MODEL
    if batch:
        fix_batch(model, batch, folder / MODEL)
        model = folder / MODEL
    return model


def _fixed(batch: int) -> dict[str, Any]:
    return {"batch": batch} if batch else {}


def ends_of(exported: Path) -> Export:
    """What stands before and behind the exported network in its engines."""
    file = exported / ENDS
    return msgspec.json.decode(file.read_bytes(), type=Export) if file.exists() else Export()


def reference_of(exported: Path, spec: ModelSpec, answers: dict[str, NDArray[np.float32]] | None = None) -> Reference:
    """What an engine has to answer to the golden images, ends included.

    Args:
        exported: Folder of the export stage.
        spec: What the network eats and says without ends.
        answers: Its raw outputs; None takes what torch answered.
    """
    images, outputs = golden_vectors(exported)
    ends = ends_of(exported)
    said = answers_with_ends(outputs if answers is None else answers, spec, ends)
    fed = np.load(exported / PIXELS, allow_pickle=False) if ends.image_input else images
    return Reference(spec_with_ends(spec, ends), fed, said)


def golden_vectors(exported: Path) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """The golden images (N, 3, h, w) and the torch network's outputs for them."""
    with np.load(exported / GOLDEN, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    return arrays.pop("images"), arrays


def _rendered_people(spec: ModelSpec) -> NDArray[np.uint8]:
    """(N, h, w, 3) uint8 BGR, rendered, not photographed: a bundle must not carry anyone's pictures."""
    generator = np.random.default_rng(0)
    crops = []
    for _ in range(_GOLDEN_PEOPLE):
        person = render_person(generator)
        x, y, w, h = person.bbox_xywh
        transform = crop_transforms(np.array([[x, y, x + w, y + h]]), spec.preprocess)
        crops.append(warp(person.image, transform, spec.preprocess.input_hw)[0])
    return np.stack(crops)
