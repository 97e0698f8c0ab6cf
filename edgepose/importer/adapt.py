"""A foreign graph brought into the project's own form, by operators put before its input and behind its outputs.

What comes in is (batch, 3, h, w) float32, already normalised; what goes out is what the decoders of `spec` read. The
network between is left as it is.

Invariant: the operators added here move, cast, scale and squash values, nothing else; what an output means is said by
the user's specification, and every count that it implies is held against what the network really answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from onnx import ModelProto, TensorProto

from edgepose.errors import SpecError
from edgepose.importer.spec import (
    HeatmapOutput,
    ImportSpec,
    OneStageOutput,
    RegressionOutput,
    SimccOutput,
)
from edgepose.importer.surgeon import Arrays, Input, Surgeon
from edgepose.spec import Decoder, Heatmap, OneStage, Preprocess, Regression, SimCC


def preprocess_of(spec: ImportSpec, hw: tuple[int, int]) -> Preprocess:
    """Preprocessing in the run half's terms, mean and std on the scale 0..255."""
    said = spec.input
    scale = 255.0 if said.pixels == "0..1" else 1.0
    mean, std = ((a * scale, b * scale, c * scale) for a, b, c in (said.mean, said.std))
    whole = isinstance(spec.output, OneStageOutput)
    padding = 1.0 if whole else 1.25 if said.padding is None else said.padding
    return Preprocess(hw, said.color, mean, std, padding, said.border)


def adapted(model: ModelProto, spec: ImportSpec, source: Input, answers: Arrays) -> tuple[ModelProto, Decoder]:
    """The graph with operators before and behind it, and how to decode what it then says.

    Args:
        model: As `sized` left it; of opset 13 or newer.
        spec: What the outputs mean.
        source: Its input.
        answers: What it answers to a few images, by name.

    Raises:
        SpecError: Names, sizes or counts that the network does not have.
    """
    surgeon = Surgeon(ModelProto.FromString(model.SerializeToString()), answers)
    surgeon.take_images(source)
    count, output = spec.keypoint_set.count, spec.output
    match output:
        case HeatmapOutput():
            outputs, decoder = _heatmap(surgeon, output, count, source.hw)
        case SimccOutput():
            outputs, decoder = _simcc(surgeon, output, count, source.hw)
        case RegressionOutput():
            outputs, decoder = _regression(surgeon, output, count, source.hw)
        case OneStageOutput():
            outputs, decoder = _one_stage(surgeon, output, count, source.hw)
    return surgeon.finished(outputs), decoder


def _heatmap(surgeon: Surgeon, said: HeatmapOutput, count: int, hw: tuple[int, int]) -> tuple[tuple[str, ...], Decoder]:
    name = surgeon.only(said.name, "output.name")
    shape = surgeon.answer(name, "output.name").shape
    if len(shape) != 4:
        raise SpecError(f"spec: output {name!r}", found=f"shape {shape}", expected="four axes: heat maps")
    maps, rows, columns = shape[1:] if said.layout == "nchw" else (shape[3], *shape[1:3])
    if maps != count:
        turned = shape[3] if said.layout == "nchw" else shape[1]
        fix = f"say layout: {'nhwc' if said.layout == 'nchw' else 'nchw'}" if turned == count else "correct keypoints"
        raise SpecError("spec: keypoints", found=f"{maps} maps in {shape}", expected=f"{count}", fix=fix)
    strides = hw[0] / rows, hw[1] / columns
    if strides[0] != strides[1] or strides[0] < 1:
        found = f"maps of {rows} x {columns} for an input of {hw[0]} x {hw[1]}"
        raise SpecError(f"spec: output {name!r}", found=found, expected="one stride, at least 1, in both directions")
    value = surgeon.floats(name)
    if said.layout == "nhwc":
        value = surgeon.add("Transpose", [value], "maps", perm=[0, 3, 1, 2])
    if said.values == "logits":
        value = surgeon.add("Sigmoid", [value], "heat")
    value = surgeon.named(value, "heatmap")
    return (value,), Heatmap(strides[0], value, said.refine, said.alignment)


def _simcc(surgeon: Surgeon, said: SimccOutput, count: int, hw: tuple[int, int]) -> tuple[tuple[str, ...], Decoder]:
    ratios, outputs = [], []
    for key, name, size in (("x", said.x, hw[1]), ("y", said.y, hw[0])):
        shape = surgeon.answer(name, f"output.{key}").shape
        if len(shape) != 3 or shape[1] != count:
            found = f"shape {shape}"
            raise SpecError(f"spec: output.{key}: {name!r}", found=found, expected=f"(batch, {count} keypoints, bins)")
        ratios.append(shape[2] / size)
        value = surgeon.floats(name)
        if said.values == "probabilities":
            value = surgeon.add("Log", [surgeon.add("Max", [value, np.array(1e-12, np.float32)], "positive")], "logits")
        elif said.sharpness != 1:
            value = surgeon.scaled(value, said.sharpness, 0)
        outputs.append(surgeon.named(value, f"simcc_{key}"))
    if said.x == said.y or ratios[0] != ratios[1]:
        found = f"{ratios[0]:g} bins per pixel in {said.x!r} and {ratios[1]:g} in {said.y!r}"
        swapped = math.isclose(ratios[0] * hw[1] / hw[0], ratios[1] * hw[0] / hw[1])
        fix = "swap x and y" if swapped and said.x != said.y else ""
        raise SpecError("spec: output", found=found, expected="two outputs with as many bins per pixel", fix=fix)
    if said.values == "probabilities" and said.sharpness != 1:
        raise SpecError("spec: output.sharpness", found=f"{said.sharpness:g} of probabilities", expected="logits")
    return tuple(outputs), SimCC(ratios[0], *outputs)


def _regression(
    surgeon: Surgeon, said: RegressionOutput, count: int, hw: tuple[int, int]
) -> tuple[tuple[str, ...], Decoder]:
    name = surgeon.only(said.keypoints, "output.keypoints")
    shape, columns = surgeon.answer(name, "output.keypoints").shape, said.columns
    if math.prod(shape[1:]) != count * len(columns) or len(shape) < 2:
        found = f"{math.prod(shape[1:])} values a person in {shape}"
        expected = f"{count} keypoints of {len(columns)} columns ({', '.join(columns)})"
        raise SpecError(f"spec: output {name!r}", found=found, expected=expected, fix="correct keypoints or columns")
    value = surgeon.floats(name)
    if shape[1:] != (count, len(columns)):
        value = surgeon.shaped(value, (0, count, len(columns)) if len(shape) > 2 else (-1, count, len(columns)))

    def column(wanted: str) -> str:
        place = columns.index(wanted)
        return surgeon.part(value, 2, place, place + 1)

    points = value if columns == ("x", "y") else surgeon.add("Concat", [column("x"), column("y")], "points", axis=2)
    size = np.array([hw[1], hw[0]], np.float32)
    half = np.float32(0.5) / size if said.zero == "centre" else np.zeros(2, np.float32)
    match said.unit:
        case "shares":
            points = surgeon.scaled(points, 1, half)
        case "centred":
            points = surgeon.scaled(points, 1, half + np.float32(0.5))
        case "pixels":
            points = surgeon.scaled(points, 1 / size, half)
    outputs = {"keypoints": surgeon.named(points, "keypoints"), "scores": "", "scales": ""}
    if "score" in columns:
        outputs["scores"] = surgeon.shaped(column("score"), (0, count))
    tails: dict[str, tuple[str, tuple[int, ...]]] = {
        "scores": (said.scores, (count,)),
        "scales": (said.scales, (count, 2)),
    }
    for key, (own, tail) in tails.items():
        if own:
            there = surgeon.answer(own, f"output.{key}").shape
            if math.prod(there[1:]) != math.prod(tail):
                raise SpecError(f"spec: output.{key}: {own!r}", found=f"shape {there}", expected=f"(batch, {count}, …)")
            outputs[key] = surgeon.floats(own)
            if there[1:] != tail:
                outputs[key] = surgeon.shaped(outputs[key], (0, *tail))
    if outputs["scores"] and said.score_values == "logits":
        outputs["scores"] = surgeon.add("Sigmoid", [outputs["scores"]], "scores")
    for key in ("scores", "scales"):
        outputs[key] = outputs[key] and surgeon.named(outputs[key], key)
    decoder = Regression(hw, outputs["keypoints"], outputs["scales"], outputs["scores"])
    return tuple(filter(None, (decoder.keypoints, decoder.scales, decoder.scores))), decoder


_WIDTHS = {"box": 4, "score": 1, "objectness": 1, "label": 1, "ignored": 1}


def _one_stage(
    surgeon: Surgeon, said: OneStageOutput, count: int, hw: tuple[int, int]
) -> tuple[tuple[str, ...], Decoder]:
    parts: dict[str, str] = {}
    for name, columns in said.outputs.items():
        parts |= _columns(surgeon, said, name, columns, count)
    boxes = surgeon.named(_pixels(surgeon, _corners(surgeon, parts["box"], said.box), said, hw, repeat=2), "boxes")
    scores = surgeon.named(_scores(surgeon, parts, said), "scores")
    if not said.has_keypoints:
        return (boxes, scores), OneStage(boxes, scores, "", "", said.min_score, said.max_iou)
    sure = ""
    if "keypoints" in parts:
        triples = surgeon.shaped(parts["keypoints"], (0, -1, count, 3))
        points = surgeon.part(triples, 3, 0, 2)
        sure = surgeon.shaped(surgeon.part(triples, 3, 2, 3), (0, -1, count))
    else:
        points = surgeon.shaped(parts["points"], (0, -1, count, 2))
        sure = parts.get("keypoint_scores", "")
    if sure and "keypoints" in said.logits:
        sure = surgeon.add("Sigmoid", [sure], "keypoint_scores")
    keypoints = surgeon.named(_pixels(surgeon, points, said, hw), "keypoints")
    sure = sure and surgeon.named(sure, "keypoint_scores")
    decoder = OneStage(boxes, scores, keypoints, sure, said.min_score, said.max_iou)
    return tuple(filter(None, (boxes, scores, keypoints, sure))), decoder


def _columns(surgeon: Surgeon, said: OneStageOutput, name: str, columns: tuple[str, ...], count: int) -> dict[str, str]:
    """The parts of one output, (batch, candidates, columns) each."""
    key = f"output.outputs: {name!r}"
    shape = surgeon.answer(name, "output.outputs").shape
    value = surgeon.floats(name)
    if len(shape) == 2 and len(columns) == 1 and columns[0] in ("score", "objectness", "label"):
        value, shape = surgeon.shaped(value, (0, -1, 1)), (*shape, 1)
    elif said.candidates == "columns" and len(shape) == 3:
        value = surgeon.add("Transpose", [value], "rows", perm=[0, 2, 1])
        shape = (shape[0], shape[2], shape[1])
    if len(shape) not in (3, 4):
        raise SpecError(f"spec: {key}", found=f"shape {shape}", expected="(batch, candidates, columns)")
    across = math.prod(shape[2:])
    widths = {**_WIDTHS, "keypoints": 3 * count, "points": 2 * count, "keypoint_scores": count}
    fixed = sum(widths[column] for column in columns if column != "classes")
    if (across != fixed and "classes" not in columns) or across < fixed + ("classes" in columns):
        detail = ", ".join(column if column == "classes" else f"{column} {widths[column]}" for column in columns)
        other = {"rows": "columns", "columns": "rows"}[said.candidates]
        fix = f"say candidates: {other}" if shape[1] == fixed else "correct keypoints, or what the columns hold"
        found = f"{across} columns in {surgeon.answers[name].shape}"
        expected = f"{fixed}{' and classes' if 'classes' in columns else ''} ({detail})"
        raise SpecError(f"spec: {key}", found=found, expected=expected, fix=fix)
    if len(shape) == 4:
        value = surgeon.shaped(value, (0, -1, across))
    parts, start = {}, 0
    for column in columns:
        stop = start + (across - fixed if column == "classes" else widths[column])
        if column != "ignored":
            parts[column] = value if stop - start == across else surgeon.part(value, 2, start, stop)
        start = stop
    if "classes" in parts and said.person >= across - fixed:
        found, expected = f"class {said.person}", f"0 to {across - fixed - 1}"
        raise SpecError("spec: output.person", found=found, expected=expected)
    return parts


def _corners(surgeon: Surgeon, box: str, kind: str) -> str:
    """(batch, candidates, 4) of some kind to x1 y1 x2 y2."""
    if kind == "xyxy":
        return box
    place, size = surgeon.part(box, 2, 0, 2), surgeon.part(box, 2, 2, 4)
    first = place
    if kind == "cxcywh":
        first = surgeon.add("Sub", [place, surgeon.scaled(size, 0.5, 0)], "first_corner")
    return surgeon.add("Concat", [first, surgeon.add("Add", [first, size], "last_corner")], "corners", axis=2)


def _pixels(surgeon: Surgeon, value: str, said: OneStageOutput, hw: tuple[int, int], repeat: int = 1) -> str:
    """Coordinates whose last axis is x, y or x, y, x, y, to pixels measured from the outer edge."""
    size = np.tile(np.array([hw[1], hw[0]], np.float32), repeat)
    return surgeon.scaled(value, size if said.unit == "shares" else 1, 0.5 if said.zero == "centre" else 0)


def _scores(surgeon: Surgeon, parts: Mapping[str, str], said: OneStageOutput) -> str:
    """One score per candidate, (batch, candidates): that it is a person."""

    def probability(name: str) -> str:
        return surgeon.add("Sigmoid", [parts[name]], name) if name in said.logits else parts[name]

    if "classes" in parts:
        score = surgeon.part(probability("classes"), 2, said.person, said.person + 1)
    else:
        score = probability("score")
    if "objectness" in parts:
        score = surgeon.add("Mul", [score, probability("objectness")], "confidence")
    if "label" in parts:
        near = surgeon.add("Abs", [surgeon.scaled(parts["label"], 1, -said.person)], "label")
        person = surgeon.add("Less", [near, np.array(0.5, np.float32)], "is_person")
        score = surgeon.add("Mul", [score, surgeon.add("Cast", [person], "person", to=TensorProto.FLOAT)], "confidence")
    return surgeon.shaped(score, (0, -1))


def described(decoder: Decoder) -> dict[str, Any]:
    """The decoder as a report holds it."""
    plain: dict[str, Any] = msgspec.to_builtins(decoder)
    return plain
