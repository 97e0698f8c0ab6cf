"""torch → ONNX: by torch's exporter of today, and by way of TorchScript where that one cannot give the operator set.

Invariant: the written file has the opset, names and shapes it was asked for, passes onnx.checker, and ran at two batch
sizes in ONNX Runtime with torch's outputs; anything else is an error and no file.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgepose.compress.ranges import Ranges
from edgepose.errors import OnnxError, ParityError
from edgepose.export.notes import modules_of, note_known_modules, note_modules
from edgepose.export.parity import ParityReport, Tolerance, compare
from edgepose.spec import ModelSpec, TensorSpec
from edgepose.storage import atomic_file

BATCH = "batch"
_LOWEST_OPSET, _NATIVE_OPSET = 13, 18
EXPORT_TOLERANCE = Tolerance(relative=1e-4)


def onnx_from_torch(
    model: nn.Module,
    spec: ModelSpec,
    path: str | os.PathLike[str],
    *,
    opset: int = 18,
    ranges: Ranges | None = None,
    tolerance: Tolerance = EXPORT_TOLERANCE,
) -> ParityReport:
    """Exports a float network with a free batch dimension.

    Args:
        model: forward(images (N, 3, h, w) float32) → tensor or tuple of tensors in the order of `spec.outputs`.
        spec: Names, shapes and types of input and outputs.
        path: Where the .onnx file goes.
        opset: ONNX operator set, 13 or newer.
        ranges: Also note where these quantisers belong, as `quantised_onnx` needs.
        tolerance: Allowed difference between torch and ONNX Runtime.

    Returns:
        torch against ONNX Runtime at batch 1 and 3.

    Raises:
        OnnxError: The export failed, or its opset, names or shapes are not those asked for.
        ParityError: ONNX Runtime's outputs differ from torch's.
        StorageError: Disk full, read-only or no permission.
    """
    if opset < _LOWEST_OPSET:
        raise OnnxError(
            f"{path}: opset", found=str(opset), expected=f"{_LOWEST_OPSET} or newer", fix="ask for a newer one"
        )
    exported = _export(model, spec, opset, ranges)
    if not _is_as_asked(exported, opset):
        exported = _export_legacy(model, spec, opset, ranges)
    _check_opset(exported, opset, where=str(path))
    with atomic_file(path) as temporary:
        ir.save(exported, temporary)
        check_onnx(temporary, spec, where=str(path))
        return _check_outputs(model, spec, temporary, tolerance)


def check_onnx(path: Path, spec: ModelSpec, *, where: str) -> None:
    """Checks a file against ONNX's rules and against `spec`.

    Raises:
        OnnxError: Broken, or other names, shapes or types.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(path, load_external_data=False).graph
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise OnnxError(where, found=str(err), expected="a valid ONNX file") from err
    held = {initialiser.name for initialiser in graph.initializer}
    for kind, expected, values in (
        ("input", spec.inputs, [value for value in graph.input if value.name not in held]),
        ("output", spec.outputs, list(graph.output)),
    ):
        found = tuple(_spec_of(value) for value in values)
        if found != expected:
            raise OnnxError(f"{where}: {kind}s", found=_spell(found), expected=_spell(expected))


def _export(model: nn.Module, spec: ModelSpec, opset: int, ranges: Ranges | None) -> ir.Model:
    prepared, example = _prepared(model, ranges), _example(spec)
    try:
        with _quiet():
            program = torch.onnx.export(
                prepared,
                (example,),
                dynamo=True,
                opset_version=opset,
                input_names=[value.name for value in spec.inputs],
                output_names=[value.name for value in spec.outputs],
                dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, torch.onnx.OnnxExporterError, RuntimeError, ValueError) as err:
        raise OnnxError(
            f"exporting {spec.name}", found=_last_line(err), expected="a network that ONNX can say"
        ) from err
    if program is None:
        raise OnnxError(f"exporting {spec.name}", found="nothing", expected="a model")
    exported: ir.Model = program.model
    _take_marks(exported, ranges)
    note_modules(exported)
    _strip_traces(exported)
    return exported


def _export_legacy(model: nn.Module, spec: ModelSpec, opset: int, ranges: Ranges | None) -> ir.Model:
    from edgepose.export.onnx_legacy import export_legacy

    with _quiet():
        exported, modules = export_legacy(_prepared(model, ranges), spec, opset, _example(spec))
    _take_marks(exported, ranges)
    note_known_modules(exported, modules)
    _strip_traces(exported)
    return exported


def _prepared(model: nn.Module, ranges: Ranges | None) -> nn.Module:
    """A copy in eval mode, with marks where there are ranges."""
    if ranges is None:
        return copy.deepcopy(model).eval()
    from edgepose.export.marks import marked_copy

    return marked_copy(model, ranges).eval()


def _example(spec: ModelSpec) -> Tensor:
    return torch.zeros(2, *_sizes(spec.inputs[0]))  # two: the exporter takes a batch of one for a constant


def _take_marks(exported: ir.Model, ranges: Ranges | None) -> None:
    if ranges is not None:
        from edgepose.export.marks import take_marks

        take_marks(exported, ranges)


def _is_as_asked(exported: ir.Model, opset: int) -> bool:
    """Whether the graph is of that operator set and still knows its modules.

    torch's exporter writes 18 and newer, and has older ones converted: that loses the notes on nodes, and where it
    fails, torch silently gives 18.
    """
    modules = modules_of(exported.metadata_props)
    return exported.opset_imports.get("") == opset and (not modules or any(modules.values()) or opset >= _NATIVE_OPSET)


def _strip_traces(model: ir.Model) -> None:
    """Removes the exporter's notes on nodes: stack traces name the builder's directories."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def _check_opset(model: ir.Model, opset: int, *, where: str) -> None:
    found = model.opset_imports.get("")
    if found != opset:
        raise OnnxError(f"{where}: opset", found=str(found), expected=str(opset), fix="ask for opset 13 to 21")


def _check_outputs(model: nn.Module, spec: ModelSpec, path: Path, tolerance: Tolerance) -> ParityReport:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = np.random.default_rng(0)
    reference: dict[str, NDArray[np.float32]] = {}
    candidate: dict[str, NDArray[np.float32]] = {}
    network = copy.deepcopy(model).eval()
    for batch in (1, 3):
        images = generator.standard_normal((batch, *_sizes(spec.inputs[0])), np.float32)
        with torch.no_grad():
            expected = network(torch.from_numpy(images))
        found = session.run(None, {spec.inputs[0].name: images})
        for value, ours, theirs in zip(spec.outputs, _tuple_of(expected), found, strict=True):
            reference[f"{value.name} (batch {batch})"] = ours.numpy()
            candidate[f"{value.name} (batch {batch})"] = theirs
    report = compare("torch → ONNX", reference, candidate, tolerance)
    report.raise_if_failed(ParityError)
    return report


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's progress and its warnings about absent packages off the terminal."""
    levels = {
        logging.getLogger("torch.onnx"): logging.ERROR,
        logging.getLogger("onnxscript.version_converter"): logging.CRITICAL,  # it prints at length why it fails
    }
    before = {logger: logger.level for logger in levels}
    for logger, level in levels.items():
        logger.setLevel(level)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)


def _sizes(value: TensorSpec) -> tuple[int, ...]:
    """All dimensions but the first, which is the batch."""
    return tuple(int(size) for size in value.shape[1:])


def _tuple_of(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def _spec_of(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = tuple(size.dim_param or size.dim_value for size in tensor.shape.dim)
    return TensorSpec(value.name, shape, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name)


def _spell(specs: tuple[TensorSpec, ...]) -> str:
    return "; ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in specs)


def _last_line(err: BaseException) -> str:
    """The innermost cause in one line: the exporter wraps it in pages of advice."""
    cause = err
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return f"{type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause).strip() else ''}"
