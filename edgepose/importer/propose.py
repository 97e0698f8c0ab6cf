"""What an ONNX file says about itself: a proposed specification, each line with where it comes from and how sure it is.

Invariant: every line of a proposal is "sure" (the file says so), "likely" (its form or its answers suggest it) or a
"guess" (files do not say such things); no line is without its reason.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, numpy_helper

from edgepose.errors import OnnxError
from edgepose.importer.convert import own_answers
from edgepose.importer.onnx_file import OnnxFile, dims_of, real_inputs
from edgepose.importer.spec import InputImage
from edgepose.importer.surgeon import input_of

Confidence = Literal["sure", "likely", "guess"]
Answers = Mapping[str, NDArray[Any]]

_FREE_HW = (256, 192)
_MOST_JOINTS = 600
_MOST_FLAT_JOINTS = 150  # a flat row of more numbers is a classifier's rather
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True, slots=True)
class Line:
    """One proposed value.

    Attributes:
        key: Where it belongs: "input.color".
        value: What is proposed, as JSON.
        confidence: How sure it is.
        why: Where it comes from.
    """

    key: str
    value: Any
    confidence: Confidence
    why: str


@dataclass(slots=True)
class Proposal:
    """A specification, line by line.

    Attributes:
        lines: In the order of the file.
        problems: What keeps the network from being imported as it is, or has to be decided by its user.
    """

    lines: list[Line] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, key: str, value: Any, confidence: Confidence, why: str) -> None:
        """One more line."""
        self.lines.append(Line(key, value, confidence, why))

    @property
    def confidence(self) -> Confidence:
        """That of the least sure line."""
        levels: tuple[Confidence, ...] = ("guess", "likely", "sure")
        return next((level for level in levels if any(line.confidence == level for line in self.lines)), "guess")


def propose(file: OnnxFile, *, name: str) -> Proposal:
    """Look at a file and what it answers to rendered people and propose its specification.

    Args:
        file: The file, checked.
        name: Name of the network.

    Raises:
        OnnxError: It has no image input, or cannot be executed.
    """
    proposal = Proposal()
    proposal.add("name", name, "sure", "the file's name")
    inputs = real_inputs(file.model.graph)
    if len(inputs) != 1:
        found = ", ".join(value.name for value in inputs) or "none"
        raise OnnxError(f"{file.path}: inputs", found=found, expected="one image")
    (value,) = inputs
    dims, layout = dims_of(value) or (), _layout(dims_of(value) or (), str(file.path))
    hw = tuple(dims[1:3] if layout == "nhwc" else dims[2:4])
    free = [size for size in hw if not isinstance(size, int)]
    used = _FREE_HW if free else (int(hw[0]), int(hw[1]))
    said = InputImage(color="rgb", pixels="0..255", layout=layout, size=used)
    source = input_of(file.model, said, str(file.path))
    ranges = _Ranges.of(file.model.graph, value.name, np.dtype(source.dtype))
    answers = own_answers(file, said, ranges.mean_255, ranges.std_255)
    output = Proposal()
    count = _propose_output(output, answers, used)
    whole = any(line.value == "one-stage" for line in output.lines)
    _propose_keypoints(proposal, count)
    proposal.add("input.layout", layout, "sure", f"the input {value.name!r} has dimensions {list(dims)}")
    if free:
        proposal.add(
            "input.size", list(used), "guess", "the file leaves it open; say what the network was trained with"
        )
    else:
        proposal.add("input.size", list(used), "sure", "the file says so")
    _propose_range(proposal, ranges, whole=whole)
    if isinstance(dims[0], int):
        people = "one by one" if dims[0] == 1 else f"{dims[0]} at a time"
        proposal.problems.append(f"the file fixes the batch at {dims[0]}: people are run {people}")
    proposal.lines += output.lines
    proposal.problems += output.problems
    return proposal


def as_yaml(proposal: Proposal) -> str:
    """The proposal as a specification that `edgepose import` reads, reasons as comments."""
    text = [f"# Proposed by edgepose inspect; {proposal.confidence} overall. Check every line that is not sure."]
    text += [f"# Note: {problem}" for problem in proposal.problems]
    section = ""
    for line in proposal.lines:
        head, _, tail = line.key.partition(".")
        if tail and head != section:
            text.append(f"{head}:")
        section = head if tail else ""
        indent = "  " if tail else ""
        text.append(f"{indent}{tail or head}: {_yaml(line.value)}  # {line.confidence}: {line.why}")
    return "\n".join(text) + "\n"


def _yaml(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][\w./-]*", value) and value not in ("true", "false", "null"):
        return value
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(key)}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_yaml(inner) for inner in value) + "]"
    return json.dumps(value)


def _layout(dims: tuple[int | str, ...], where: str) -> Literal["nchw", "nhwc"]:
    if len(dims) != 4 or 3 not in (dims[1], dims[3]):
        raise OnnxError(f"{where}: input", found=f"dimensions {list(dims)}", expected="an image with 3 channels")
    return "nchw" if dims[1] == 3 else "nhwc"


@dataclass(frozen=True, slots=True)
class _Ranges:
    """What the first operators do to pixels: the mean and std that the network has inside, or that it seems to need."""

    inside: str
    mean_255: tuple[float, float, float]
    std_255: tuple[float, float, float]

    @staticmethod
    def of(graph: GraphProto, name: str, dtype: np.dtype[Any]) -> _Ranges:
        raw = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        if dtype.kind in "iu":
            return _Ranges(f"the input is {dtype.name}", *raw)
        mean, std = (tuple(255 * v for v in row) for row in _IMAGENET)
        held = {tensor.name: tensor for tensor in graph.initializer}
        held |= {
            n.output[0]: n.attribute[0].t
            for n in graph.node
            if n.op_type == "Constant" and n.attribute[0].HasField("t")
        }
        for _ in range(4):
            readers = [node for node in graph.node if name in node.input]
            if len(readers) != 1:
                break
            (node,) = readers
            if node.op_type in ("Cast", "Transpose", "Identity"):
                name = node.output[0]
                continue
            if node.op_type in ("Sub", "Div", "Mul", "Add"):
                constants = [numpy_helper.to_array(held[i]) for i in node.input if i in held]
                if len(constants) == 1 and constants[0].size in (1, 3):
                    shown = ", ".join(f"{v:g}" for v in constants[0].ravel())
                    return _Ranges(f"its first operator is {node.op_type} by [{shown}]", *raw)
            break
        return _Ranges("", (mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def _propose_range(proposal: Proposal, ranges: _Ranges, *, whole: bool) -> None:
    guess = "files do not say it"
    proposal.add("input.color", "rgb", "guess", f"{guess}; most networks from torch are rgb, from OpenCV or Caffe bgr")
    if ranges.inside:
        proposal.add("input.pixels", "0..255", "likely", f"{ranges.inside}, so it normalises pixels itself")
    elif whole:
        proposal.add("input.pixels", "0..1", "guess", f"{guess}; YOLO takes 0..1, RTMO and YOLOX take 0..255")
        proposal.add("input.border", 114, "guess", "what most one-stage networks were trained with")
    else:
        proposal.add("input.pixels", "0..1", "guess", f"{guess}; ImageNet's mean and std are the most frequent")
        proposal.add("input.mean", list(_IMAGENET[0]), "guess", "ImageNet's")
        proposal.add("input.std", list(_IMAGENET[1]), "guess", "ImageNet's")


def _propose_keypoints(proposal: Proposal, count: int) -> None:
    if not count:
        return
    if count == 17:
        proposal.add("keypoints", "coco17", "likely", "there are 17, as many as COCO has; their order is assumed")
        return
    names = [f"keypoint_{i}" for i in range(count)]
    why = f"the outputs have {count}; files do not name them (flip_pairs and sigmas would be useful, too)"
    proposal.add("keypoints", {"names": names}, "guess", why)


def _propose_output(proposal: Proposal, answers: Answers, hw: tuple[int, int]) -> int:
    """Lines about the outputs; returns the number of keypoints, 0 where it says boxes or nothing that is understood."""
    for attempt in (_as_simcc, _as_heatmap, _as_one_stage, _as_regression):
        count = attempt(proposal, answers, hw)
        if count is not None:
            return count
    shapes = "; ".join(f"{name} {list(value.shape)}" for name, value in answers.items())
    found = f"outputs {shapes} for an input of {hw[0]} x {hw[1]}"
    expected = "heat maps, SimCC, coordinates, or candidates with boxes"
    raise OnnxError("outputs", found=found, expected=expected, fix="write the specification by hand")


def _as_simcc(proposal: Proposal, answers: Answers, hw: tuple[int, int]) -> int | None:
    rows = {name: value for name, value in answers.items() if value.ndim == 3}
    for x_name, x in rows.items():
        for y_name, y in rows.items():
            ratio = x.shape[2] / hw[1]
            if x_name == y_name or x.shape[1] != y.shape[1] or ratio < 1 or y.shape[2] / hw[0] != ratio:
                continue
            square = hw[0] == hw[1]
            if square and "y" in x_name.lower().split("_")[-1] and "x" in y_name.lower().split("_")[-1]:
                continue
            why = f"{x.shape[2]} and {y.shape[2]} bins for {hw[1]} x {hw[0]} pixels, {ratio:g} each"
            proposal.add("output.kind", "simcc", "likely", why)
            proposal.add("output.x", x_name, "guess" if square else "sure", "by its name or place" if square else why)
            proposal.add("output.y", y_name, "guess" if square else "sure", "by its name or place" if square else why)
            sums = x.sum(-1)
            summed = bool(x.min() >= 0 and np.allclose(sums, 1, atol=1e-2))
            which = "probabilities" if summed else "logits"
            proposal.add(
                "output.values", which, "likely", f"each row sums to {'1' if summed else f'{sums.mean():.3g}'}"
            )
            return int(x.shape[1])
    return None


def _as_heatmap(proposal: Proposal, answers: Answers, hw: tuple[int, int]) -> int | None:
    maps = {name: value for name, value in answers.items() if value.ndim == 4}
    for layout in ("nchw", "nhwc"):
        for name, value in maps.items():
            count, rows, columns = value.shape[1:] if layout == "nchw" else (value.shape[3], *value.shape[1:3])
            if min(rows, columns) < 4 or hw[0] / rows != hw[1] / columns or rows > hw[0]:
                continue
            why = f"{name!r} is {list(value.shape)}: {count} maps, {hw[0] / rows:g} pixels a cell"
            proposal.add("output.kind", "heatmap", "likely", why)
            if len(answers) > 1:
                proposal.add(
                    "output.name", name, "likely" if len(maps) == 1 else "guess", "it has the form of heat maps"
                )
            proposal.add("output.layout", layout, "sure", why)
            low, high = float(value.min()), float(value.max())
            logits = low < -1 or high > 2
            why = f"its values are {low:.3g} to {high:.3g} for rendered people"
            proposal.add("output.values", "logits" if logits else "heat", "likely" if not logits else "guess", why)
            why = "files do not say where cells are: scaled for most, corners for UDP, tiled for this project's"
            proposal.add("output.alignment", "scaled", "guess", why)
            return int(count)
    return None


def _as_one_stage(proposal: Proposal, answers: Answers, hw: tuple[int, int]) -> int | None:
    columns, why, kind = _columns(answers)
    if not columns:
        return None
    proposal.add("output.kind", "one-stage", "likely", why)
    proposal.add("output.outputs", columns, "likely", why)
    first = answers[next(iter(columns))]
    turned = kind == "columns"
    proposal.add(
        "output.candidates", kind, "sure" if first.shape[1] != first.shape[2] else "guess", f"{list(first.shape)}"
    )
    boxes = np.asarray(first.transpose(0, 2, 1) if turned else first, np.float64)[..., :4]
    ordered = bool(boxes.size and (boxes[..., 2:] >= boxes[..., :2]).mean() > 0.99)
    why = "of its boxes, the third and fourth number are" + (" never" if ordered else " often") + " below the first two"
    proposal.add("output.box", "xyxy" if ordered else "cxcywh", "likely" if boxes.size else "guess", why)
    largest = float(np.abs(boxes).max(initial=0))
    unit = "shares" if boxes.size and largest < 3 else "pixels"
    proposal.add("output.unit", unit, "likely", f"the largest coordinate is {largest:.3g} for {hw[1]} x {hw[0]} pixels")
    names = [column for held in columns.values() for column in held]
    for column in ("score", "classes"):
        if column in names:
            part = _part(answers, columns, column, turned=turned)
            outside = bool(part.size and (part.min() < 0 or part.max() > 1))
            if outside:
                proposal.add("output.logits", [column], "likely", f"it is {part.min():.3g} to {part.max():.3g}")
    if "keypoints" in names or "points" in names:
        return _keypoint_count(answers, columns, turned=turned)
    if "classes" in names:
        proposal.add("output.person", 0, "guess", "COCO's first class is person")
    return 0


def _columns(answers: Answers) -> tuple[dict[str, list[str]], str, str]:
    """What the columns of outputs seem to hold, why, and where candidates are counted."""
    shapes = {name: value.shape for name, value in answers.items()}
    by_last = {name: shape for name, shape in shapes.items() if len(shape) in (3, 4)}
    boxes = [name for name, shape in by_last.items() if len(shape) == 3 and shape[2] in (4, 5)]
    points = [name for name, shape in by_last.items() if len(shape) == 4 and shape[3] in (2, 3)]
    if len(boxes) == 1 and len(shapes) > 1:
        rows = shapes[boxes[0]][1]
        held: dict[str, list[str]] = {boxes[0]: ["box", "score"] if shapes[boxes[0]][2] == 5 else ["box"]}
        for name in points:
            held[name] = ["keypoints"] if shapes[name][3] == 3 else ["points"]
        joints = shapes[points[0]][2] if points else 0
        for name, shape in shapes.items():
            if name in held or len(shape) < 2 or shape[1] != rows:
                continue
            width = int(np.prod(shape[2:]))
            if width == joints and joints and "keypoint_scores" not in str(held):
                held[name] = ["keypoint_scores"]
            elif shapes[boxes[0]][2] == 4 and "score" not in str(held) and "classes" not in str(held):
                held[name] = ["score"] if width == 1 else ["classes"]
        why = "; ".join(f"{name!r} is {list(shapes[name])}" for name in held)
        return held, why, "rows"
    if len(shapes) != 1:
        return {}, "", ""
    ((name, shape),) = shapes.items()
    if len(shape) != 3 or max(shape[1:]) < 5 or min(shape[1:]) < 5:
        return {}, "", ""
    kind = "columns" if shape[1] < shape[2] else "rows"
    width = min(shape[1:])
    why = f"{name!r} is {list(shape)}: {max(shape[1:])} candidates of {width} numbers"
    match width:
        case 5:
            return {name: ["box", "score"]}, why, kind
        case 6:
            return {name: ["box", "score", "label"]}, why, kind
        case 84 | 80 | 24:
            return {name: ["box", "classes"]}, f"{why}, a box and classes", kind
        case 85:
            return {name: ["box", "objectness", "classes"]}, f"{why}, a box, objectness and 80 classes", kind
        case _ if width % 3 == 2:
            return (
                {name: ["box", "score", "keypoints"]},
                f"{why}, 5 and three for each of {(width - 5) // 3} keypoints",
                kind,
            )
        case _ if width % 3 == 0 and kind == "rows" and shape[1] <= 1000:
            text = (
                f"{why}, 6 and three for each of {(width - 6) // 3} keypoints; few candidates, so duplicates are gone"
            )
            return {name: ["box", "score", "label", "keypoints"]}, text, kind
        case _ if width % 3 == 0:
            text = f"{why}, 6 and three for each of {(width - 6) // 3} keypoints"
            return {name: ["box", "objectness", "score", "keypoints"]}, text, kind
        case _:
            return {name: ["box", "classes"]}, f"{why}, taken for a box and {width - 4} classes", kind


_WIDTH = {"box": 4, "score": 1, "objectness": 1, "label": 1}


def _part(answers: Answers, columns: dict[str, list[str]], wanted: str, *, turned: bool) -> NDArray[Any]:
    for name, held in columns.items():
        if wanted in held:
            value = answers[name]
            rows = value.transpose(0, 2, 1) if turned else value.reshape(*value.shape[:2], -1)
            start = sum(_WIDTH.get(column, 0) for column in held[: held.index(wanted)])
            return rows[..., start : start + 1 if wanted == "score" else None]
    return np.zeros(0)


def _keypoint_count(answers: Answers, columns: dict[str, list[str]], *, turned: bool) -> int:
    for name, held in columns.items():
        for column, each in (("keypoints", 3), ("points", 2)):
            if column in held:
                shape = answers[name].shape
                width = shape[1] if turned else int(np.prod(shape[2:]))
                return (width - sum(_WIDTH.get(other, 0) for other in held)) // each
    return 0


def _as_regression(proposal: Proposal, answers: Answers, hw: tuple[int, int]) -> int | None:
    for name, value in answers.items():
        tail = value.shape[1:]
        each = tail[-1] if len(tail) > 1 and tail[-1] in (2, 3) else 2 if tail[-1] % 2 == 0 else 3
        size = int(np.prod(tail))
        if size % each or not 2 <= size // each <= (_MOST_JOINTS if len(tail) > 1 else _MOST_FLAT_JOINTS):
            continue
        count = size // each
        why = f"{name!r} is {list(value.shape)}: {count} keypoints of {each} numbers"
        sure: Confidence = "likely" if len(tail) > 1 else "guess"
        proposal.add("output.kind", "regression", sure, why)
        if len(answers) > 1:
            proposal.add("output.keypoints", name, "guess", "its form")
            for other, values in answers.items():
                if values.shape[1:] in ((count,), (count, 1)):
                    proposal.add("output.scores", other, "likely", f"{list(values.shape)}: one for each keypoint")
                    break
        proposal.add("output.columns", ["x", "y", "score"][:each], "guess", "some networks say y first")
        points = np.asarray(value, np.float64).reshape(len(value), count, each)[..., :2]
        low, high = float(points.min()), float(points.max())
        unit = "pixels" if high > 3 else "centred" if low < -0.2 else "shares"
        proposal.add(
            "output.unit", unit, "likely", f"coordinates are {low:.3g} to {high:.3g} for {hw[1]} x {hw[0]} pixels"
        )
        return count
    return None
