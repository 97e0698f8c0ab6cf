"""What `inspect` proposes: right for styles it knows, honest about what files do not say, and readable by `import`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgepose.errors import OnnxError
from edgepose.importer.onnx_file import read_onnx
from edgepose.importer.propose import Proposal, as_yaml, propose
from edgepose.importer.spec import HeatmapOutput, ImportSpec, OneStageOutput, RegressionOutput, SimccOutput, parse_spec
from tests.importer.conftest import STYLES, Exported
from tests.importer.test_adapt import parrot

Answers = dict[str, NDArray[np.generic]]


def proposed(answers: Answers, folder: Path, hw: tuple[int, int] = (256, 192)) -> tuple[Proposal, ImportSpec]:
    """The proposal for a network with these outputs, and as `import` reads it."""
    onnx.save(parrot(answers, (1, 3, *hw)), folder / "net.onnx")
    proposal = propose(read_onnx(folder / "net.onnx"), name="net")
    return proposal, parse_spec(as_yaml(proposal))


def zeros(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("style", STYLES)
def test_our_three_styles(style: str, exported: Exported) -> None:
    proposal = propose(read_onnx(exported(style, 9)), name=style)
    spec, right = parse_spec(as_yaml(proposal)), parse_spec(STYLES[style][1])
    assert type(spec.output) is type(right.output)
    assert spec.keypoint_set.count == right.keypoint_set.count
    match spec.output, right.output:
        case SimccOutput() as output, SimccOutput() as expected:
            assert (output.x, output.y, output.values) == (expected.x, expected.y, expected.values)
        case OneStageOutput() as output, OneStageOutput() as expected:
            assert (output.outputs, output.box, output.unit) == (expected.outputs, expected.box, expected.unit)
            assert output.candidates == expected.candidates
        case HeatmapOutput() as output, HeatmapOutput():
            assert (output.layout, output.values) == ("nchw", "heat")


def test_every_line_says_how_sure_it_is_and_why(exported: Exported) -> None:
    proposal = propose(read_onnx(exported("heatmap")), name="heatmap")
    sure = {line.key: line.confidence for line in proposal.lines}
    assert sure["input.layout"] == sure["input.size"] == "sure"
    assert sure["input.color"] == sure["input.mean"] == sure["output.alignment"] == "guess"
    assert proposal.confidence == "guess"
    assert all(line.why for line in proposal.lines)
    text = as_yaml(proposal)
    assert text.count("guess: ") == list(sure.values()).count("guess")


def _boxes(count: int, columns: int) -> NDArray[np.float32]:
    rows = np.random.default_rng(0).uniform(0, 1, (1, count, columns)).astype(np.float32)
    rows[..., :4] *= 300
    return rows


def _corners(count: int, columns: int) -> NDArray[np.float32]:
    rows = _boxes(count, columns)
    rows[..., 2:4] += rows[..., :2]
    return rows


@pytest.mark.parametrize(
    ("answers", "outputs", "candidates", "box"),
    [
        ({"o": _boxes(840, 56).transpose(0, 2, 1).copy()}, {"o": ("box", "score", "keypoints")}, "columns", "cxcywh"),
        ({"o": _boxes(840, 57)}, {"o": ("box", "score", "label", "keypoints")}, "rows", "cxcywh"),
        ({"o": _boxes(8400, 57)}, {"o": ("box", "objectness", "score", "keypoints")}, "rows", "cxcywh"),
        (
            {"dets": _corners(20, 5), "keypoints": zeros(1, 20, 17, 3)},
            {"dets": ("box", "score"), "keypoints": ("keypoints",)}, "rows", "xyxy",
        ),
        (
            {"b": _corners(50, 4), "s": zeros(1, 50, 1), "p": zeros(1, 50, 17, 2), "v": zeros(1, 50, 17)},
            {"b": ("box",), "s": ("score",), "p": ("points",), "v": ("keypoint_scores",)}, "rows", "xyxy",
        ),
    ],
)  # fmt: skip
def test_one_stage_networks(
    answers: Answers, outputs: dict[str, tuple[str, ...]], candidates: str, box: str, tmp_path: Path
) -> None:
    _, spec = proposed(answers, tmp_path)
    assert isinstance(spec.output, OneStageOutput)
    assert dict(spec.output.outputs) == outputs
    assert (spec.output.candidates, spec.output.box, spec.output.unit) == (candidates, box, "pixels")
    assert spec.keypoints == "coco17"


@pytest.mark.parametrize(
    ("answers", "columns"),
    [
        ({"o": _boxes(840, 84).transpose(0, 2, 1).copy()}, ("box", "classes")),
        ({"o": _boxes(840, 85)}, ("box", "objectness", "classes")),
        ({"o": _corners(300, 6)}, ("box", "score", "label")),
        ({"o": _corners(300, 5)}, ("box", "score")),
    ],
)
def test_box_detectors(answers: Answers, columns: tuple[str, ...], tmp_path: Path) -> None:
    _, spec = proposed(answers, tmp_path)
    assert isinstance(spec.output, OneStageOutput)
    assert spec.output.columns == columns
    assert spec.keypoints is None


@pytest.mark.parametrize(
    ("value", "columns", "unit", "count"),
    [
        (np.linspace(0, 1, 34, dtype=np.float32).reshape(1, 34), ("x", "y"), "shares", 17),
        (np.linspace(0, 150, 34, dtype=np.float32).reshape(1, 17, 2), ("x", "y"), "pixels", 17),
        (np.linspace(-0.5, 0.5, 42, dtype=np.float32).reshape(1, 14, 3), ("x", "y", "score"), "centred", 14),
    ],
)
def test_coordinates(
    value: NDArray[np.float32], columns: tuple[str, ...], unit: str, count: int, tmp_path: Path
) -> None:
    _, spec = proposed({"o": value}, tmp_path)
    assert isinstance(spec.output, RegressionOutput)
    assert (spec.output.columns, spec.output.unit, spec.keypoint_set.count) == (columns, unit, count)


def test_heat_maps_with_keypoints_last_and_logits(tmp_path: Path) -> None:
    value = np.random.default_rng(0).normal(-6, 3, (1, 64, 48, 14)).astype(np.float32)
    proposal, spec = proposed({"features": zeros(1, 256), "maps": value}, tmp_path)
    assert isinstance(spec.output, HeatmapOutput)
    assert (spec.output.name, spec.output.layout, spec.output.values) == ("maps", "nhwc", "logits")
    assert spec.keypoint_set.names[0] == "keypoint_0"
    assert any("fixes the batch at 1" in problem for problem in proposal.problems)


def test_simcc_of_a_square_input_is_not_sure_which_is_x(tmp_path: Path) -> None:
    answers: Answers = {"simcc_y": zeros(1, 17, 512), "simcc_x": zeros(1, 17, 512)}
    proposal, spec = proposed(answers, tmp_path, (256, 256))
    assert isinstance(spec.output, SimccOutput)
    assert (spec.output.x, spec.output.y) == ("simcc_x", "simcc_y")
    assert {line.key: line.confidence for line in proposal.lines}["output.x"] == "guess"


def test_a_network_that_normalises_pixels_itself(tmp_path: Path) -> None:
    model = parrot({"hm": zeros(1, 17, 64, 48)}, (1, 3, 256, 192))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(255), "scale"))
    model.graph.node.insert(0, helper.make_node("Div", ["image", "scale"], ["scaled"]))
    model.graph.node[1].input[0] = "scaled"
    onnx.save(model, tmp_path / "net.onnx")
    proposal = propose(read_onnx(tmp_path / "net.onnx"), name="net")
    spec = parse_spec(as_yaml(proposal))
    assert (spec.input.pixels, spec.input.mean, spec.input.std) == ("0..255", (0, 0, 0), (1, 1, 1))
    (line,) = [line for line in proposal.lines if line.key == "input.pixels"]
    assert (line.confidence, "Div by [255]" in line.why) == ("likely", True)


def test_an_8_bit_image_with_channels_last_and_an_open_size(tmp_path: Path) -> None:
    model = parrot({"hm": zeros(1, 17, 64, 48)}, (1, "h", "w", 3), TensorProto.UINT8)
    onnx.save(model, tmp_path / "net.onnx")
    proposal = propose(read_onnx(tmp_path / "net.onnx"), name="net")
    spec = parse_spec(as_yaml(proposal))
    assert (spec.input.layout, spec.input.size, spec.input.pixels) == ("nhwc", (256, 192), "0..255")
    assert {line.key: line.confidence for line in proposal.lines}["input.size"] == "guess"


@pytest.mark.parametrize("answers", [{"o": zeros(1, 1000)}, {"o": zeros(1, 1, 7)}, {"o": zeros(1, 64, 256, 192)}])
def test_what_is_not_understood_is_not_guessed(answers: Answers, tmp_path: Path) -> None:
    onnx.save(parrot(answers, (1, 3, 250, 190)), tmp_path / "net.onnx")
    with pytest.raises(OnnxError, match=r"outputs: found .* write the specification by hand"):
        propose(read_onnx(tmp_path / "net.onnx"), name="net")


def test_no_image_or_two(tmp_path: Path) -> None:
    onnx.save(parrot({"o": zeros(1, 34)}, (1, 5, 8, 8)), tmp_path / "net.onnx")
    with pytest.raises(OnnxError, match="an image with 3 channels"):
        propose(read_onnx(tmp_path / "net.onnx"), name="net")
