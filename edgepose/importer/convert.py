"""A foreign file and its specification → the project's own ONNX form, with what it answers to known images.

Invariant: nothing is handed on whose answers differ from the file's own in ONNX Runtime, are no numbers, or are the
same whatever the network is shown.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, version_converter

from edgepose.data.render import RenderedPerson, render_person
from edgepose.errors import EnvironmentFault, OnnxError, SpecError
from edgepose.export.parity import ParityReport, Tolerance, compare
from edgepose.importer.adapt import adapted, preprocess_of
from edgepose.importer.onnx_file import OnnxFile, check_graph, dims_of
from edgepose.importer.spec import ImportSpec, InputImage, OneStageOutput
from edgepose.importer.surgeon import Input, input_of, sized
from edgepose.pose.codec import decode
from edgepose.pose.preprocess import crop_transforms, normalise, warp
from edgepose.runtime.ort import OrtSession
from edgepose.spec import Decoder, ModelSpec, OneStage, Preprocess, TensorSpec

MODEL, GOLDEN, SPEC = "model.onnx", "golden.npz", "spec.json"
OPSET = 17
"""What older files are converted to; files between `_KEPT` and this are left as they are."""

_KEPT = 13  # from here on, reductions and slices take their axes as inputs, as the operators added here do
_RESIZE = 11  # before, places of enlarged images were counted from corners
_GOLDEN_PEOPLE = 8
_GOLDEN_VALUES = 2**22  # of all golden images together: 16 MB
_SAME = Tolerance(absolute=1e-5, relative=1e-4)

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Converted:
    """A foreign network in the project's form.

    Attributes:
        model: Its graph: (batch, 3, h, w) float32 in, what the decoder reads out.
        spec: What it eats and says.
        images: (N, 3, h, w) float32, normalised; as many as a fixed batch has.
        answers: What it answers to them, by name.
        notes: What was found and changed, for people.
        parity: The converted opset against the file's own; None where there was nothing to convert.
    """

    model: ModelProto
    spec: ModelSpec
    images: NDArray[np.float32]
    answers: Arrays
    notes: tuple[str, ...]
    parity: ParityReport | None


def write_converted(file: OnnxFile, spec: ImportSpec, folder: Path) -> dict[str, Any]:
    """The import as a stage: `MODEL`, `GOLDEN` and `SPEC` in a folder, and the report; errors as `convert`."""
    found = convert(file, spec)
    onnx.save(found.model, folder / MODEL)
    arrays: Arrays = {f"output:{name}": value for name, value in found.answers.items()}
    np.savez_compressed(folder / GOLDEN, images=found.images, **arrays)  # type: ignore[arg-type]  # numpy's stub
    (folder / SPEC).write_bytes(msgspec.json.encode(found.spec))
    return {
        "file": file.path.name,
        "sha256": file.digest,
        "opset": [file.opset, found.model.opset_import[0].version],
        "notes": list(found.notes),
        "parity": msgspec.to_builtins(found.parity),
        "spec": msgspec.to_builtins(spec),
    }


def read_converted(folder: Path) -> tuple[ModelSpec, NDArray[np.float32], Arrays]:
    """Specification, golden images and answers of a folder that `write_converted` filled."""
    with np.load(folder / GOLDEN, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    answers = {name.removeprefix("output:"): value for name, value in arrays.items() if name != "images"}
    return msgspec.json.decode((folder / SPEC).read_bytes(), type=ModelSpec), arrays["images"], answers


def convert(file: OnnxFile, spec: ImportSpec) -> Converted:
    """Bring a network into the project's form.

    Args:
        file: The network, checked.
        spec: What its user says of it.

    Raises:
        OnnxError: Its operators cannot be converted or executed, it is quantised already, or its answers are no numbers
            or always the same.
        SpecError: The specification does not fit the network.
        ParityError: The converted network answers differently.
    """
    where = str(file.path)
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in file.model.graph.node):
        fix = "import the float network, and quantise it with a recipe"
        raise OnnxError(where, found="a network that is quantised already", expected="a float one", fix=fix)
    source = input_of(file.model, spec.input, where)
    preprocess = preprocess_of(spec, source.hw)
    images = _people(preprocess, source.batch, whole=isinstance(spec.output, OneStageOutput))
    batch, own, notes = _batch_of(file.model, source, images, where)
    _check_numbers(own, where)
    fixed = sized(file.model, source, batch)
    check_graph(fixed, where)
    current, parity = _current(fixed, file.opset, where), None
    if current is not fixed:
        said = _answers(current, source.fed(images), batch, where)
        parity = compare(f"opset {file.opset} → {OPSET}", own, said, _SAME)
        parity.raise_if_failed()
        notes.append(f"opset {file.opset} was converted to {OPSET}; the answers are the same")
    model, decoder = adapted(current, spec, source, own)
    inferred = check_graph(model, where)
    answers = _answers(model, images, batch, where)
    outputs = _output_specs(model, inferred, answers, decoder, batch)
    _check_answers(answers, spec, decoder, where)
    taken = batch or min(len(images), _golden_count(images))
    finished = ModelSpec(
        name=spec.name,
        keypoints=spec.keypoint_set,
        preprocess=preprocess,
        decoder=decoder,
        inputs=(TensorSpec(model.graph.input[0].name, (batch or "batch", 3, *source.hw)),),
        outputs=outputs,
    )
    _check_whole(model, where)
    golden = {name: value[:taken].astype(np.float32) for name, value in answers.items()}
    return Converted(model, finished, images[:taken], golden, (*file.notes, *notes), parity)


def own_answers(
    file: OnnxFile, said: InputImage, mean_255: tuple[float, float, float], std_255: tuple[float, float, float]
) -> Arrays:
    """What a file answers, as it is, to a few rendered people who fill its input.

    Args:
        file: The file.
        said: What is taken for its input.
        mean_255: Subtracted from pixels, 0..255.
        std_255: Divided by afterwards.

    Raises:
        OnnxError: It cannot be executed.
    """
    where = str(file.path)
    source = input_of(file.model, said, where)
    preprocess = Preprocess(source.hw, said.color, mean_255, std_255)
    images = _people(preprocess, source.batch, whole=False, most=4)
    return _batch_of(file.model, source, images, where)[1]


def _people(preprocess: Preprocess, batch: int, *, whole: bool, most: int = _GOLDEN_PEOPLE) -> NDArray[np.float32]:
    """Rendered people as the network sees them, (N, 3, h, w): a bundle must not carry somebody's pictures."""
    height, width = preprocess.input_hw
    count = max(4, min(most, _GOLDEN_VALUES // (3 * height * width)))
    if batch > 1:
        count = batch
    crops = []
    for person in _rendered(count):
        rows, columns = person.image.shape[:2]
        x, y, w, h = person.bbox_xywh
        box = (0, 0, columns, rows) if whole else (x, y, x + w, y + h)
        transform = crop_transforms(np.array([box], np.float64), preprocess)
        crops.append(warp(person.image, transform, preprocess.input_hw, preprocess.border)[0])
    return normalise(np.stack(crops), preprocess)


@cache
def _rendered(count: int) -> tuple[RenderedPerson, ...]:
    generator = np.random.default_rng(0)
    return tuple(render_person(generator) for _ in range(count))


def _golden_count(images: NDArray[np.float32]) -> int:
    return max(2, _GOLDEN_VALUES // int(np.prod(images.shape[1:])))


def _batch_of(
    model: ModelProto, source: Input, images: NDArray[np.float32], where: str
) -> tuple[int, Arrays, list[str]]:
    """The batch size that the network really takes (0: any), its own answers, and what to tell the user."""
    fed = source.fed(images)
    if source.batch:
        people = (
            "one person at a time" if source.batch == 1 else f"{source.batch} people at a time, blank ones included"
        )
        note = f"the file fixes the batch at {source.batch}: it is run {people}"
        return source.batch, _answers(sized(model, source, source.batch), fed, source.batch, where), [note]
    alone = _answers(sized(model, source, 1), fed, 1, where)
    why = ""
    try:
        together = _answers(sized(model, source, 0), fed, 0, where)
        if not compare("one by one → together", alone, together, _SAME).passed:
            why = "it answers differently when several people are shown at once"
    except (OnnxError, EnvironmentFault) as err:
        why = f"several people at once fail ({err.found[:120]})"
    if not why:
        return 0, together, []
    return 1, alone, [f"the file leaves the batch open, but {why}: it is run one person at a time"]


def _answers(model: ModelProto, fed: NDArray[Any], batch: int, where: str) -> Arrays:
    """What ONNX Runtime says, `batch` images at a time (0: all), by name of the output.

    Raises:
        OnnxError: It cannot load or execute the network; or the answers of single images have different sizes.
    """
    with tempfile.TemporaryDirectory(prefix="edgepose-") as folder:
        onnx.save(model, Path(folder, MODEL))
        try:
            session = OrtSession(Path(folder, MODEL), threads=1, quiet=True)
        except OnnxError as err:
            raise OnnxError(where, found=err.found, expected=err.expected) from err
        try:
            name, step = session.inputs[0].name, batch or len(fed)
            parts = [session.infer({name: fed[start : start + step]}) for start in range(0, len(fed), step)]
        except (EnvironmentFault, SpecError) as err:
            found = f"a network that ONNX Runtime cannot execute: {err.found[:300]}"
            raise OnnxError(where, found=found, expected="one that runs", fix="check input.size and layout") from err
        finally:
            session.close()
    joined: Arrays = {}
    for output in parts[0]:
        values = [part[output] for part in parts]
        if any(not isinstance(value, np.ndarray) or value.ndim < 2 or len(value) != step for value in values):
            shape = getattr(values[0], "shape", "no tensor")
            found = f"output {output!r} of shape {shape} for {step} images"
            raise OnnxError(where, found=found, expected="outputs whose first axis is the batch")
        joined[output] = _joined(values)
    return joined


def _joined(values: list[NDArray[Any]]) -> NDArray[Any]:
    """Answers of several runs in one array; lists of candidates of different lengths are filled up with zeros."""
    if len({value.shape[1:] for value in values}) == 1:
        return np.concatenate(values)
    most = max(value.shape[1] for value in values)
    filled = [np.pad(v, [(0, 0), (0, most - v.shape[1]), *[(0, 0)] * (v.ndim - 2)]) for v in values]
    return np.concatenate(filled)


def _current(model: ModelProto, opset: int, where: str) -> ModelProto:
    """The model, in an opset that is not old."""
    if opset >= _KEPT:
        return model
    try:
        current: ModelProto = version_converter.convert_version(model, OPSET)
    except (RuntimeError, ValueError, IndexError, onnx.checker.ValidationError) as err:
        found = f"opset {opset} with operators that cannot be converted ({str(err).strip().splitlines()[0][:200]})"
        raise OnnxError(where, found=found, expected=f"opset {_KEPT} or newer", fix="export it again") from err
    opsets = [entry.version for entry in current.opset_import if entry.domain == ""]
    if opsets != [OPSET]:
        raise OnnxError(where, found=f"opset {opsets} after converting", expected=str(OPSET), fix="export it again")
    current.ir_version = model.ir_version
    if opset < _RESIZE:
        _sample_from_corners(current)
    return current


def _sample_from_corners(model: ModelProto) -> None:
    """Says of each Resize what older opsets meant: the converter leaves it out, and newer ones mean something else."""
    for node in model.graph.node:
        if node.op_type == "Resize" and not any(a.name == "coordinate_transformation_mode" for a in node.attribute):
            modes = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
            node.attribute.extend(onnx.helper.make_attribute(name, mode) for name, mode in modes.items())


def _output_specs(
    model: ModelProto, inferred: ModelProto, answers: Mapping[str, NDArray[Any]], decoder: Decoder, batch: int
) -> tuple[TensorSpec, ...]:
    """The outputs with the shapes that are known of them, which are written into the model as well."""
    known = {value.name: dims_of(value) or () for value in inferred.graph.output}
    specs = []
    for value in model.graph.output:
        measured = answers[value.name].shape
        told = known[value.name] if len(known[value.name]) == len(measured) else ("",) * len(measured)
        shape: list[int | str] = [batch or "batch"]
        for axis in range(1, len(measured)):
            free = isinstance(decoder, OneStage) and axis == 1 and not isinstance(told[axis], int)
            shape.append("candidates" if free else measured[axis])
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))
        specs.append(TensorSpec(value.name, tuple(shape)))
    return tuple(specs)


def _check_answers(answers: Mapping[str, NDArray[Any]], spec: ImportSpec, decoder: Decoder, where: str) -> None:
    _check_numbers(answers, where)
    several = [values for values in answers.values() if values.size and len(values) > 1]
    if several and all((values == values[:1]).all() for values in several):
        fix = "check input.name, pixels, mean and std: the network does not look at its image"
        raise OnnxError(where, found="the same answer to every image", expected="answers that differ", fix=fix)
    keypoints, _ = decode(answers, decoder)
    count = spec.keypoint_set.count
    if keypoints.shape[1:] != (count, 2):
        raise SpecError("spec: keypoints", found=f"{keypoints.shape[1]} in the network", expected=f"{count}")


def _check_numbers(answers: Mapping[str, NDArray[Any]], where: str) -> None:
    for name, values in answers.items():
        broken = int(np.count_nonzero(~np.isfinite(values)))
        if broken:
            found = f"{broken} of {values.size} values of output {name!r} that are NaN or infinite"
            raise OnnxError(where, found=found, expected="numbers", fix="check pixels, mean and std, or the checkpoint")


def _check_whole(model: ModelProto, where: str) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as err:
        raise OnnxError(where, found=str(err)[:300], expected="a valid graph after the import") from err
