"""What may stand before and behind a network in its ONNX file: uint8 images in, keypoints out.

Invariant: both ends compute what `pose.preprocess.normalise` and `pose.codec.decode` do, and the network between them
is not touched: its values keep their names, and its Q/DQ their places.

With the ends in the graph a runtime fuses them with what is beside them, and a program of another language needs
neither NumPy nor this package: it hands over crops as they come from a camera and gets keypoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgepose.errors import OnnxError, SpecError
from edgepose.export.decode_graph import Nodes, heatmap_nodes, regression_scores, simcc_nodes
from edgepose.export.files import read_graph, write_graph
from edgepose.pose.codec import decode, output_names
from edgepose.recipe import Export
from edgepose.spec import Heatmap, ModelSpec, OneStage, Preprocess, Regression, SimCC, TensorSpec

PIXELS, KEYPOINTS, SCORES = "pixels", "keypoints", "scores"
_LOWEST_OPSET = 13


def spec_with_ends(spec: ModelSpec, export: Export) -> ModelSpec:
    """What the run half has to know of a network with these ends.

    A network with decoding says coordinates outright: its decoder is a `Regression` with scores.

    Raises:
        SpecError: A one-stage network, which does not say one person's keypoints.
    """
    if not export.has_ends:
        return spec
    batch = spec.inputs[0].shape[0]
    if export.image_input:
        image = TensorSpec(PIXELS, (batch, *spec.preprocess.input_hw, 3), "uint8")
        spec = msgspec.structs.replace(spec, inputs=(image,))
    if not export.decoding:
        return spec
    if isinstance(spec.decoder, OneStage):
        found = "a one-stage network, whose people are sorted out frame by frame"
        raise SpecError("export: decoding", found=found, expected="SimCC, heat maps or regression", fix="leave it off")
    raw, count = set(output_names(spec.decoder)), spec.keypoints.count
    outputs = (
        TensorSpec(KEYPOINTS, (batch, count, 2)),
        TensorSpec(SCORES, (batch, count)),
        *(output for output in spec.outputs if output.name in {spec.visibility, spec.uncertainty} - raw),
    )
    decoder = Regression(spec.preprocess.input_hw, KEYPOINTS, "", SCORES)
    return msgspec.structs.replace(spec, outputs=outputs, decoder=decoder)


def onnx_with_ends(model: Path, spec: ModelSpec, export: Export, out: Path) -> None:
    """Writes a copy of a network with these ends.

    Args:
        model: The ONNX file, quantised or not; may be `out`.
        spec: What it eats and says without them.
        export: Which ends.
        out: Where the copy goes.

    Raises:
        OnnxError: An opset below 13, or a file that is not what `spec` says.
        SpecError: A network that cannot be decoded in the graph.
        StorageError: Disk full, read-only or no permission.
    """
    ended = spec_with_ends(spec, export)
    read = read_graph(model)
    opset = read.opset_imports.get("") or 0
    if opset < _LOWEST_OPSET:
        fix = "export it again with a newer opset"
        raise OnnxError(f"{model}: opset", found=str(opset), expected=f"{_LOWEST_OPSET} or newer", fix=fix)
    if export.image_input:
        _take_images(read.graph, spec, ended.inputs[0])
    if export.decoding:
        _say_keypoints(read.graph, spec, ended)
    write_graph(read, out, what="a valid graph with its ends")


def answers_with_ends(
    outputs: Mapping[str, NDArray[np.float32]], spec: ModelSpec, export: Export
) -> dict[str, NDArray[np.float32]]:
    """What a network that answers `outputs` has to answer with these ends, by NumPy.

    Args:
        outputs: Its raw outputs by name, batch first.
        spec: What it says without them.
        export: Which ends.
    """
    if not export.decoding:
        return dict(outputs)
    keypoints, scores = decode(outputs, spec.decoder)
    height, width = spec.preprocess.input_hw
    shares = (keypoints + np.float32(0.5)) / np.array([width, height], np.float32)
    kept = {name: outputs[name] for name in (spec.visibility, spec.uncertainty) if name}
    return {KEYPOINTS: shares.astype(np.float32), SCORES: scores, **kept}


def fix_batch(model: Path, batch: int, out: Path) -> None:
    """Writes a copy of a network whose batch is a number; `out` may be `model`.

    Raises:
        StorageError: Disk full, read-only or no permission.
    """
    read = read_graph(model)
    for value in (*read.graph.inputs, *read.graph.outputs):
        if value.shape is not None and len(value.shape):
            value.shape = ir.Shape([batch, *list(value.shape)[1:]])
    for node in read.graph:
        for result in node.outputs:  # what was inferred for a free batch
            if not any(output is result for output in read.graph.outputs):
                result.shape = None
    write_graph(read, out, what="a valid graph of one batch size")


def _take_images(graph: ir.Graph, spec: ModelSpec, image: TensorSpec) -> None:
    op = Nodes("image")
    old = graph.inputs[0]
    taken = _input(image)
    tensor = _normalised(op, taken, spec.preprocess)
    ir.convenience.replace_all_uses_with(old, tensor)
    graph.inputs[0] = taken
    tensor.name = f"{old.name}_normalised" if old.name == image.name else old.name
    tensor.type, tensor.shape = old.type, old.shape
    graph.insert_before(graph[0], op.nodes)
    _register(graph, op)


def _normalised(op: Nodes, image: ir.Value, preprocess: Preprocess) -> ir.Value:
    """See `pose.preprocess.normalise`: (N, h, w, 3) uint8 BGR to (N, 3, h, w) float32."""
    planes = op("Transpose", op("Cast", image, to=ir.DataType.FLOAT), perm=[0, 3, 1, 2])
    if preprocess.color == "rgb":
        planes = op("Gather", planes, np.array([2, 1, 0], np.int64), axis=1)
    scale = (1.0 / np.array(preprocess.std, np.float32)).reshape(1, 3, 1, 1)
    shift = np.array(preprocess.mean, np.float32).reshape(1, 3, 1, 1) * scale
    return op("Sub", op("Mul", planes, scale), shift)


def _say_keypoints(graph: ir.Graph, spec: ModelSpec, ended: ModelSpec) -> None:
    op = Nodes("decode")
    raw = {output.name: output for output in graph.outputs}
    missing = [name for name in output_names(spec.decoder) if name not in raw]
    if missing:
        raise OnnxError("outputs", found=f"{sorted(filter(None, raw))}", expected=f"{missing[0]!r} among them")
    shares, scores = _decoded(op, {name: value for name, value in raw.items() if name}, spec)
    results = {KEYPOINTS: shares, SCORES: scores}
    for value in raw.values():  # of the network, which may bear the names of what is decoded from them
        if value.name in results:
            value.name = f"{value.name}_raw"
    for name, result in results.items():
        result.name = name
    kept = [raw[output.name] for output in ended.outputs[2:]]
    graph.extend(op.nodes)
    _register(graph, op)
    graph.outputs.clear()
    for output, value in zip(ended.outputs, [shares, scores, *kept], strict=True):
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(list(output.shape))
        graph.outputs.append(value)


def _decoded(op: Nodes, raw: Mapping[str, ir.Value], spec: ModelSpec) -> tuple[ir.Value, ir.Value]:
    """Shares of the input's size (N, K, 2) and scores (N, K)."""
    decoder, sizes = spec.decoder, {output.name: output.shape for output in spec.outputs}
    match decoder:
        case SimCC():
            bins = int(sizes[decoder.x][2]), int(sizes[decoder.y][2])
            points, scores = simcc_nodes(op, raw[decoder.x], raw[decoder.y], bins, decoder)
        case Heatmap():
            joints, height, width = (int(size) for size in sizes[decoder.output][1:])
            points, scores = heatmap_nodes(op, raw[decoder.output], (joints, height, width), decoder)
        case Regression():
            shares = raw[decoder.keypoints]
            given = raw.get(decoder.scales), raw.get(decoder.scores)
            return op("Identity", shares), regression_scores(op, shares, *given, decoder)
        case OneStage():
            raise AssertionError(decoder)  # spec_with_ends has refused it
    height, width = spec.preprocess.input_hw
    outer = op("Add", points, np.array(0.5, np.float32))
    return op("Div", outer, np.array([width, height], np.float32)), scores


def _input(spec: TensorSpec) -> ir.Value:
    kind = ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype)))
    return ir.Value(name=spec.name, shape=ir.Shape(list(spec.shape)), type=kind)


def _register(graph: ir.Graph, op: Nodes) -> None:
    for constant in op.constants:
        graph.register_initializer(constant)
