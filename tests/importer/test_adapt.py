"""Outputs in the style of others to keypoints: each against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper

from edgepose.errors import OnnxError, SpecError
from edgepose.importer.adapt import adapted, preprocess_of
from edgepose.importer.onnx_file import check_graph
from edgepose.importer.spec import ImportSpec, parse_spec
from edgepose.importer.surgeon import input_of, sized
from edgepose.pose.codec import decode, people_candidates
from edgepose.pose.one_stage import people_of
from edgepose.runtime.ort import OrtSession
from edgepose.spec import Decoder, OneStage

Answers = dict[str, NDArray[np.generic]]


def parrot(answers: Answers, dims: tuple[int | str, ...] = (1, 3, 16, 8), kind: int = TensorProto.FLOAT) -> ModelProto:
    """A network that says the same whatever it is shown, though it looks at it."""
    nodes = [
        helper.make_node("Cast", ["image"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["mean"], keepdims=0),
        helper.make_node("Mul", ["mean", "nought"], ["nothing"]),
    ]
    held = [numpy_helper.from_array(np.float32(0), "nought")]
    for name, value in answers.items():
        of = helper.np_dtype_to_tensor_dtype(value.dtype)
        held.append(numpy_helper.from_array(value, f"{name}_said"))
        nodes.append(helper.make_node("Cast", ["nothing"], [f"{name}_nothing"], to=of))
        nodes.append(helper.make_node("Add", [f"{name}_said", f"{name}_nothing"], [name]))
    outputs = [helper.make_empty_tensor_value_info(name) for name in answers]
    for value, array in zip(outputs, answers.values(), strict=True):
        of = helper.np_dtype_to_tensor_dtype(array.dtype)
        value.CopyFrom(helper.make_tensor_value_info(value.name, of, array.shape))
    graph = helper.make_graph(nodes, "parrot", [helper.make_tensor_value_info("image", kind, dims)], outputs, held)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def spec_of(output: str, *, names: str = "[a, b]", image: str = "") -> ImportSpec:
    keypoints = f"keypoints: {{names: {names}}}" if names else ""
    return parse_spec(f"name: n\n{keypoints}\ninput: {{color: bgr, pixels: 0..255{image}}}\noutput: {output}\n")


def said(answers: Answers, spec: ImportSpec, folder: Path, model: ModelProto | None = None) -> tuple[Answers, Decoder]:
    """What the adapted network answers to an image of ones, and its decoder."""
    network = model or parrot(answers)
    source = input_of(network, spec.input, "net.onnx")
    built, decoder = adapted(sized(network, source, 1), spec, source, answers)
    check_graph(built, "net.onnx")
    onnx.save(built, folder / "adapted.onnx")
    session = OrtSession(folder / "adapted.onnx", threads=1)
    assert session.inputs[0].shape == (1, 3, *source.hw)
    assert session.inputs[0].dtype == "float32"
    return session.infer({session.inputs[0].name: np.ones((1, 3, *source.hw), np.float32)}), decoder


def decoded(answers: Answers, spec: ImportSpec, folder: Path) -> tuple[list[object], list[object]]:
    outputs, decoder = said(answers, spec, folder)
    keypoints, scores = decode(outputs, decoder)
    return keypoints[0].round(4).tolist(), scores[0].round(4).tolist()


def maps(cells: tuple[tuple[int, int], ...], heat: float = 0.75) -> NDArray[np.float32]:
    """(1, K, 8, 4) for an input of 16 x 8: one warm cell, given as column and row, per keypoint."""
    values = np.zeros((1, len(cells), 8, 4), np.float32)
    for keypoint, (column, row) in enumerate(cells):
        values[0, keypoint, row, column] = heat
    return values


# Heat maps


def test_heat_maps(tmp_path: Path) -> None:
    heat = maps(((1, 2), (3, 7)))
    spec = spec_of("{kind: heatmap, alignment: scaled, refine: none}")
    assert decoded({"hm": heat}, spec, tmp_path) == ([[2, 4], [6, 14]], [0.75, 0.75])
    tiled = spec_of("{kind: heatmap, alignment: tiled, refine: none}")
    assert decoded({"hm": heat}, tiled, tmp_path)[0] == [[2.5, 4.5], [6.5, 14.5]]
    corners = spec_of("{kind: heatmap, alignment: corners, refine: none}")
    found, _ = decoded({"hm": heat}, corners, tmp_path)
    np.testing.assert_allclose(found, [[7 / 3, 2 * 15 / 7], [7, 15]], atol=1e-3)  # 7 / 3 and 15 / 7 a cell


def test_heat_maps_with_keypoints_last_as_logits_in_half_precision(tmp_path: Path) -> None:
    logits = np.where(maps(((1, 2), (3, 7))) > 0, np.log(3), -5).astype(np.float16).transpose(0, 2, 3, 1)
    spec = spec_of("{kind: heatmap, alignment: scaled, refine: none, layout: nhwc, values: logits, name: hm}")
    answers = {"features": np.zeros((1, 5), np.float32), "hm": np.ascontiguousarray(logits)}
    keypoints, scores = decoded(answers, spec, tmp_path)
    assert keypoints == [[2, 4], [6, 14]]
    assert scores == pytest.approx([0.75, 0.75], abs=1e-3)  # sigmoid of log 3


# SimCC


def test_simcc_of_logits_and_of_probabilities(tmp_path: Path) -> None:
    x, y = np.zeros((1, 2, 16), np.float32), np.zeros((1, 2, 32), np.float32)
    for keypoint, (px, py) in enumerate(((3.0, 5.0), (6.0, 12.5))):
        x[0, keypoint] = np.exp(-((np.arange(16) / 2 - px) ** 2))
        y[0, keypoint] = np.exp(-((np.arange(32) / 2 - py) ** 2))
    spec = spec_of("{kind: simcc, x: px, y: py, sharpness: 20}")
    keypoints, _ = decoded({"px": x, "py": y}, spec, tmp_path)
    np.testing.assert_allclose(keypoints, [[3, 5], [6, 12.5]], atol=0.05)
    sharp = [np.exp(20 * values) / np.exp(20 * values).sum(-1, keepdims=True) for values in (x, y)]
    spec = spec_of("{kind: simcc, x: px, y: py, values: probabilities}")
    again, _ = decoded({"px": sharp[0], "py": sharp[1]}, spec, tmp_path)
    np.testing.assert_allclose(again, keypoints, atol=0.01)


# Coordinates


@pytest.mark.parametrize(
    ("extra", "value", "expected"),
    [
        ("unit: shares", [[0.25, 0.5], [1, 0]], [[1.5, 7.5], [7.5, -0.5]]),  # 0.25 of 8 less half a pixel
        ("unit: shares, zero: centre", [[0.25, 0.5], [1, 0]], [[2, 8], [8, 0]]),
        ("unit: centred", [[-0.25, 0], [0.5, -0.5]], [[1.5, 7.5], [7.5, -0.5]]),
        ("unit: pixels, zero: centre", [[3, 9], [0, 15]], [[3, 9], [0, 15]]),
        ("unit: pixels", [[3, 9], [0, 15]], [[2.5, 8.5], [-0.5, 14.5]]),
    ],
)
def test_coordinates(extra: str, value: list[list[float]], expected: list[list[float]], tmp_path: Path) -> None:
    points = np.array([value], np.float32)
    spec = spec_of(f"{{kind: regression, {extra}}}")
    assert decoded({"xy": points}, spec, tmp_path) == (expected, [1, 1])
    assert decoded({"xy": points.reshape(1, 4)}, spec, tmp_path)[0] == expected


def test_coordinates_with_scores_in_any_order(tmp_path: Path) -> None:
    rows = np.array([[[[9, 3, 0, 7], [15, 0, np.log(3), 7]]]], np.float32)  # (1, 1, K, 4), as MoveNet and BlazePose
    spec = spec_of(
        "{kind: regression, unit: pixels, zero: centre, columns: [y, x, score, ignored], score_values: logits}"
    )
    assert decoded({"rows": rows}, spec, tmp_path) == ([[3, 9], [0, 15]], [0.5, 0.75])
    own = {"xy": rows[0, :, :, :2].copy(), "sure": np.array([[[0.25], [0.5]]], np.float32)}
    spec = spec_of("{kind: regression, unit: pixels, zero: centre, keypoints: xy, columns: [y, x], scores: sure}")
    assert decoded(own, spec, tmp_path) == ([[3, 9], [0, 15]], [0.25, 0.5])


# One stage


def people(outputs: Answers, decoder: Decoder) -> dict[str, list[object]]:
    assert isinstance(decoder, OneStage)
    found = people_of(people_candidates(outputs, decoder), 0, decoder)
    return {name: getattr(found, name).round(3).tolist() for name in found._fields}


def test_yolo_pose_with_candidates_in_columns(tmp_path: Path) -> None:
    rows = np.zeros((1, 6, 11), np.float32)  # cx cy w h score, then x y score twice
    rows[0, 0] = [4, 8, 2, 6, 0.5, 3, 6, 0.25, 5, 10, 0.75]
    rows[0, 3] = [4.1, 8, 2, 6, 0.9, 3.5, 6.5, 1, 4.5, 9.5, 0.125]  # the same person, surer
    output = "{kind: one-stage, outputs: {o: [box, score, keypoints]}, box: cxcywh, candidates: columns}"
    found = people(*said({"o": rows.transpose(0, 2, 1).copy()}, spec_of(output), tmp_path))
    assert found == {
        "boxes": [[pytest.approx(2.6), 4.5, pytest.approx(4.6), 10.5]],  # edges, less half a pixel
        "scores": [pytest.approx(0.9)],
        "keypoints": [[[3, 6], [4, 9]]],
        "keypoint_scores": [[1, 0.125]],
    }


def test_yolo_pose_of_an_older_kind_with_objectness_as_logits(tmp_path: Path) -> None:
    rows = np.full((1, 6, 10), -9.0, np.float32)  # cx cy w h objectness score, then x y of each
    rows[0, 2] = [0.5, 0.5, 0.25, 0.5, np.log(3), 0.8, 0.25, 0.5, 0.75, 0.5]
    output = (
        "{kind: one-stage, outputs: {o: [box, objectness, score, points]}, box: cxcywh, unit: shares, "
        "logits: [objectness]}"
    )
    found = people(*said({"o": rows}, spec_of(output), tmp_path))
    assert found["boxes"] == [[2.5, 3.5, 4.5, 11.5]]  # shares of 8 and 16
    assert found["scores"] == [pytest.approx(0.6)]
    assert found["keypoints"] == [[[1.5, 7.5], [5.5, 7.5]]]
    assert found["keypoint_scores"] == [[pytest.approx(0.6)] * 2]


def test_rtmo_whose_duplicates_are_gone_already(tmp_path: Path) -> None:
    answers: Answers = {
        "dets": np.array([[[1, 2, 5, 10, 0.7], [1, 2, 5, 10.5, 0.6], [0, 0, 0, 0, 0]]], np.float32),
        "keypoints": np.arange(18, dtype=np.float32).reshape(1, 3, 2, 3) / 20,
    }
    output = "{kind: one-stage, outputs: {dets: [box, score], keypoints: [keypoints]}, box: xyxy, max_iou: 1}"
    found = people(*said(answers, spec_of(output), tmp_path))
    assert found["scores"] == [pytest.approx(0.7), pytest.approx(0.6)]
    np.testing.assert_allclose(found["keypoints"][1], [[-0.2, -0.15], [-0.05, 0.0]], atol=2e-3)
    assert found["keypoint_scores"][0] == [pytest.approx(0.1), pytest.approx(0.25)]


def test_yolo_nas_pose_in_four_outputs(tmp_path: Path) -> None:
    answers: Answers = {
        "b": np.array([[[1, 2, 5, 10]]], np.float32),
        "s": np.array([[[0.7]]], np.float32),
        "p": np.array([[[[1, 2], [3, 4]]]], np.float32),
        "v": np.array([[[0.5, 0.25]]], np.float32),
    }
    output = "{kind: one-stage, outputs: {b: [box], s: [score], p: [points], v: [keypoint_scores]}, box: xyxy}"
    found = people(*said(answers, spec_of(output), tmp_path))
    assert found["keypoints"] == [[[0.5, 1.5], [2.5, 3.5]]]
    assert found["keypoint_scores"] == [[0.5, 0.25]]


def test_a_detector_with_classes(tmp_path: Path) -> None:
    rows = np.zeros((1, 7, 7), np.float32)  # x y w h, then three classes
    rows[0, 1] = [1, 2, 4, 8, 0.1, 0.2, 0.9]
    rows[0, 2] = [2, 2, 1, 1, 0.9, 0.9, 0.1]
    output = "{kind: one-stage, outputs: {o: [box, classes]}, box: xywh, person: 2}"
    outputs, decoder = said({"o": rows}, spec_of(output, names=""), tmp_path)
    found = people(outputs, decoder)
    assert found["boxes"] == [[0.5, 1.5, 4.5, 9.5]]
    assert found["keypoints"] == [[[0.5, 1.5], [4.5, 9.5]]]
    assert set(outputs) == {"boxes", "scores"}


def test_a_detector_with_labels(tmp_path: Path) -> None:
    rows = np.array([[[1, 2, 5, 10, 0.8, 0], [2, 2, 6, 9, 0.9, 17], [0, 0, 8, 16, 0.4, 0]]], np.float32)
    output = "{kind: one-stage, outputs: {o: [box, score, label]}, box: xyxy}"
    found = people(*said({"o": rows}, spec_of(output, names=""), tmp_path))
    assert found["scores"] == [pytest.approx(0.8), pytest.approx(0.4)]


# The input


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8])
def test_an_image_with_channels_last_and_other_types(kind: int, tmp_path: Path) -> None:
    spec = spec_of("{kind: heatmap, alignment: scaled, refine: none}", image=", layout: nhwc")
    answers: Answers = {"hm": maps(((1, 2), (3, 7)))}
    outputs, decoder = said(answers, spec, tmp_path, parrot(answers, (1, 16, 8, 3), kind))
    assert decode(outputs, decoder)[0][0].tolist() == [[2, 4], [6, 14]]


def test_preprocessing_is_written_on_one_scale() -> None:
    text = (
        "name: n\nkeypoints: coco17\ninput: {color: rgb, pixels: 0..1, mean: [0.5, 0.4, 0.2], std: [0.5, 0.2, 0.1]}\n"
    )
    spec = parse_spec(text + "output: {kind: heatmap, alignment: scaled}")
    said = preprocess_of(spec, (16, 8))
    assert said.mean == pytest.approx((127.5, 102, 51))
    assert said.std == pytest.approx((127.5, 51, 25.5))
    assert (said.padding, said.border, said.color) == (1.25, 0, "rgb")


# Specifications that do not fit

HEAT: Answers = {"hm": maps(((1, 2), (3, 7)))}
ROWS: Answers = {"o": np.zeros((1, 6, 11), np.float32)}


@pytest.mark.parametrize(
    ("answers", "output", "names", "match"),
    [
        (HEAT, "{kind: heatmap, alignment: tiled, name: hn}", "[a, b]", "found 'hn', expected one of hm; did you mean"),
        (HEAT, "{kind: heatmap, alignment: tiled}", "[a, b, c]", "found 2 maps in .*, expected 3; correct keypoints"),
        (HEAT, "{kind: heatmap, alignment: tiled, layout: nhwc}", "[a, b]", "found 4 maps.*say layout: nchw"),
        (HEAT | ROWS, "{kind: heatmap, alignment: tiled}", "[a, b]", "no name, and outputs hm, o"),
        ({"hm": maps(((1, 2),))[..., :3]}, "{kind: heatmap, alignment: tiled}", "[a]", "8 x 3 for an input of 16 x 8"),
        (ROWS, "{kind: heatmap, alignment: tiled}", "[a, b]", "expected four axes"),
        (ROWS, "{kind: simcc, x: o, y: p}", "[a, b]", "expected .batch, 2 keypoints, bins"),
        (
            {"x": np.zeros((1, 2, 16), np.float32), "y": np.zeros((1, 2, 32), np.float32)},
            "{kind: simcc, x: y, y: x}", "[a, b]", "swap x and y",
        ),
        (ROWS, "{kind: regression, unit: shares}", "[a, b]", "66 values a person.*2 keypoints of 2 columns"),
        (ROWS, "{kind: one-stage, outputs: {p: [box, score, keypoints]}, box: xyxy}", "[a, b]", "one of o"),
        (ROWS, "{kind: one-stage, outputs: {o: [box, score, keypoints]}, box: xyxy}", "[a]", "11 columns.*expected 8"),
        (
            {"o": np.zeros((1, 11, 6), np.float32)},
            "{kind: one-stage, outputs: {o: [box, score, keypoints]}, box: xyxy}", "[a, b]", "say candidates: columns",
        ),
        (ROWS, "{kind: one-stage, outputs: {o: [box, classes]}, box: xyxy, person: 7}", "", "class 7, expected 0 to 6"),
    ],
)  # fmt: skip
def test_outputs_that_the_network_does_not_have(
    answers: Answers, output: str, names: str, match: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=match):
        said(answers, spec_of(output, names=names), tmp_path)


@pytest.mark.parametrize(
    ("dims", "kind", "image", "match"),
    [
        ((1, 3, 16, 8), TensorProto.FLOAT, ", name: imag", "did you mean 'image'"),
        ((1, 3, 16, 8), TensorProto.FLOAT, ", size: [16, 16]", "width 16, expected 8"),
        ((1, 3, 16, 8), TensorProto.FLOAT, ", layout: nhwc", "8 channels.*say layout: nchw"),
        ((1, 1, 16, 8), TensorProto.FLOAT, "", "1 channels.*colour images only"),
        (("n", 3, "h", "w"), TensorProto.FLOAT, "", "height left open.*add to the specification"),
        (("n", 3, "h", "w"), TensorProto.FLOAT, ", size: [9999, 8]", "at most 8192"),
        ((1, 3, 16, 8), TensorProto.UINT8, ", std: [255, 255, 255]", "mean and std.*uint8"),
    ],
)
def test_inputs_that_the_network_does_not_have(dims: tuple[int | str, ...], kind: int, image: str, match: str) -> None:
    spec = spec_of("{kind: heatmap, alignment: scaled}", image=image)
    with pytest.raises(SpecError, match=match):
        input_of(parrot(HEAT, dims, kind), spec.input, "net.onnx")


@pytest.mark.parametrize(("dims", "kind"), [((1, 3, 16), TensorProto.FLOAT), ((1, 3, 16, 8), TensorProto.INT64)])
def test_inputs_that_are_no_images(dims: tuple[int, ...], kind: int) -> None:
    with pytest.raises(OnnxError, match=r"expected an image|expected floats"):
        input_of(parrot(HEAT, dims, kind), spec_of("{kind: heatmap, alignment: scaled}").input, "net.onnx")
