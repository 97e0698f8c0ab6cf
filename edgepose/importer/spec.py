"""What the user says of a foreign network, as YAML: what it eats, what its outputs mean, and which keypoints they are.

    name: other-pose
    keypoints: coco17
    input: {size: [256, 192], color: rgb, pixels: 0..1, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
    output: {kind: heatmap, alignment: scaled}

Invariant: whatever an ONNX file cannot say and changes the answers has no default here, or one that is right wherever
it is left out; a key that means nothing in its place is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from edgepose.errors import RecipeError, SpecError
from edgepose.spec import Keypoints, PositiveInt
from edgepose.strict_yaml import did_you_mean, parse_yaml, read_yaml

Text = Annotated[str, msgspec.Meta(min_length=1)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Three = tuple[float, float, float]
Values = Literal["probabilities", "logits"]
Zero = Literal["edge", "centre"]
Column = Literal["box", "score", "objectness", "label", "classes", "keypoints", "points", "keypoint_scores", "ignored"]
Coordinate = Literal["x", "y", "score", "ignored"]

KEYPOINT_SETS: dict[str, Keypoints] = {
    "coco17": Keypoints(
        names=(
            "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
            "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee",
            "left_ankle", "right_ankle",
        ),
        skeleton=(
            (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10),
            (1, 2), (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
        ),
        flip_pairs=((1, 2), (3, 4), (5, 6), (7, 8), (9, 10), (11, 12), (13, 14), (15, 16)),
        sigmas=(
            0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072, 0.062, 0.062, 0.107, 0.107, 0.087, 0.087,
            0.089, 0.089,
        ),
    )
}  # fmt: skip
"""Sets that a specification may name instead of spelling them out: COCO's person keypoints, in COCO's order."""

CORNERS = Keypoints(names=("first_corner", "last_corner"), skeleton=((0, 1),))
"""What a box detector predicts."""


class InputImage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the network eats.

    Attributes:
        color: Channel order that it was trained with.
        pixels: Scale of mean and std, and of pixels before these are applied. A network that takes pixels as they are
            has 0..255 and neither mean nor std.
        name: Name of the input; nothing takes the only one.
        layout: Order of its axes: batch, channels, height, width or batch, height, width, channels.
        size: Height and width in pixels; nothing takes what the file says, and is an error where it leaves them open.
        mean: Subtracted per channel, in the order of `color`.
        std: Divided by afterwards.
        padding: A person's box is made so many times larger before it is cropped; nothing is 1.25. Means nothing to
            networks that see the whole frame.
        border: Grey value, 0..255, of what lies outside the frame: 114 for most one-stage networks.
    """

    color: Literal["rgb", "bgr"]
    pixels: Literal["0..255", "0..1"]
    name: str = ""
    layout: Literal["nchw", "nhwc"] = "nchw"
    size: tuple[PositiveInt, PositiveInt] | None = None
    mean: Three = (0.0, 0.0, 0.0)
    std: Three = (1.0, 1.0, 1.0)
    padding: Annotated[float, msgspec.Meta(ge=0.5, le=4)] | None = None
    border: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0

    def __post_init__(self) -> None:
        if min(self.std) <= 0:
            raise ValueError(f"a std of {min(self.std):g}, which must be above 0")
        if self.pixels == "0..1" and max(*self.mean, *self.std) > 2:
            raise ValueError("mean and std of pixels 0..255 beside pixels: 0..1; give both on one scale")


class HeatmapOutput(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="heatmap"
):
    """One map per keypoint.

    Attributes:
        alignment: Input coordinate that the centre of cell j stands for: "tiled" (j + 0.5)·stride - 0.5, "scaled"
            j·stride (most networks), "corners" where the last cell stands for the last pixel (UDP).
        name: Name of the output; nothing takes the only one.
        layout: Order of its axes: batch, keypoints, height, width or batch, height, width, keypoints.
        values: Heat as it is, or logits whose sigmoid is the heat.
        refine: How a peak is found between cells.
    """

    alignment: Literal["tiled", "scaled", "corners"]
    name: str = ""
    layout: Literal["nchw", "nhwc"] = "nchw"
    values: Literal["heat", "logits"] = "heat"
    refine: Literal["none", "quarter", "dark", "softargmax"] = "dark"


class SimccOutput(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="simcc"):
    """Two outputs (batch, keypoints, bins); how many bins a pixel has follows from their sizes.

    Attributes:
        x: Name of the output for x.
        y: Name of the output for y.
        values: Logits, or probabilities after a softmax.
        sharpness: Logits are multiplied by this before the softmax: 10 for networks trained with a temperature of 0.1.
    """

    x: Text
    y: Text
    values: Values = "logits"
    sharpness: Annotated[float, msgspec.Meta(gt=0, le=1000)] = 1.0


class RegressionOutput(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="regression"
):
    """Coordinates said outright.

    Attributes:
        unit: What a coordinate counts: "shares" of the input's width and height, 0..1; "centred" shares, -0.5..0.5;
            "pixels" of the input.
        keypoints: Name of the output of coordinates; nothing takes the only one. Its axes behind the batch may be
            flattened.
        columns: What is said of each keypoint, in order.
        zero: Whether 0 is the outer edge of the first pixel or its centre.
        scores: Name of an output (batch, keypoints) of scores of its own.
        scales: Name of an output (batch, keypoints, 2): the scales of the errors, in shares.
        score_values: What scores are, in columns or of their own.
    """

    unit: Literal["shares", "centred", "pixels"]
    keypoints: str = ""
    columns: Annotated[tuple[Coordinate, ...], msgspec.Meta(min_length=2)] = ("x", "y")
    zero: Zero = "edge"
    scores: str = ""
    scales: str = ""
    score_values: Values = "probabilities"

    def __post_init__(self) -> None:
        for name, least in (("x", 1), ("y", 1), ("score", 0)):
            if not least <= self.columns.count(name) <= 1:
                raise ValueError(f"{self.columns.count(name)} columns {name}, of which there must be one")
        if "score" in self.columns and self.scores:
            raise ValueError("scores and a column score; leave one of them")


class OneStageOutput(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind", tag="one-stage"
):
    """All people of the whole frame at once; without keypoints, a box detector.

    Attributes:
        outputs: Names of outputs, each with what its columns hold, in order: box 4, score 1, objectness 1 (multiplied
            with the score), label 1, classes as many as are left, keypoints x y score each, points x y each,
            keypoint_scores 1 each, ignored 1.
        box: What the four columns of a box are.
        unit: What a coordinate counts: pixels of the input, or shares of its width and height.
        candidates: Which axis counts candidates: "rows" (batch, candidates, columns) or "columns" (batch, columns,
            candidates).
        zero: Whether 0 is the outer edge of the first pixel or its centre.
        logits: Which of score, objectness, classes and keypoints (their scores) are logits, not probabilities.
        person: Which class is a person, of `classes` or of `label`.
        min_score: Candidates below it are nobody.
        max_iou: Of candidates whose boxes overlap by more than this, the best stays; 1 where the network does it.
    """

    outputs: Annotated[
        dict[Text, Annotated[tuple[Column, ...], msgspec.Meta(min_length=1)]], msgspec.Meta(min_length=1)
    ]
    box: Literal["xyxy", "cxcywh", "xywh"]
    unit: Literal["pixels", "shares"] = "pixels"
    candidates: Literal["rows", "columns"] = "rows"
    zero: Zero = "edge"
    logits: tuple[Literal["score", "objectness", "classes", "keypoints"], ...] = ()
    person: Annotated[int, msgspec.Meta(ge=0)] = 0
    min_score: Share = 0.25
    max_iou: Share = 0.65

    def __post_init__(self) -> None:
        columns = self.columns
        for name in set(columns) - {"ignored"}:
            if columns.count(name) > 1:
                raise ValueError(f"{columns.count(name)} columns {name}, of which there can be one")
        if "box" not in columns:
            raise ValueError("no column box")
        if ("score" in columns) == ("classes" in columns):
            raise ValueError("score and classes together or neither; name the one that the network says")
        if "keypoints" in columns and {"points", "keypoint_scores"} & set(columns):
            raise ValueError("keypoints, which hold scores, beside points or keypoint_scores")
        if "keypoint_scores" in columns and "points" not in columns:
            raise ValueError("keypoint_scores without points")

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of all outputs."""
        return tuple(column for columns in self.outputs.values() for column in columns)

    @property
    def has_keypoints(self) -> bool:
        """Whether it says more than boxes."""
        return bool({"keypoints", "points"} & set(self.columns))


Output = HeatmapOutput | SimccOutput | RegressionOutput | OneStageOutput


class ImportSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A foreign network.

    Attributes:
        name: Name of the network and of its bundle.
        input: What it eats.
        output: What its outputs mean.
        keypoints: What it predicts: the name of a known set (coco17), or names, skeleton, flip_pairs and sigmas. Left
            out for box detectors.
    """

    name: Text
    input: InputImage
    output: Output
    keypoints: Text | Keypoints | None = None

    def __post_init__(self) -> None:
        boxes = isinstance(self.output, OneStageOutput) and not self.output.has_keypoints
        if boxes and self.keypoints is not None:
            raise ValueError("keypoints for a network whose outputs hold boxes only")
        if not boxes and self.keypoints is None:
            raise ValueError("no keypoints; name a set, as in 'keypoints: coco17', or give their names")
        if isinstance(self.keypoints, Keypoints):
            _check_keypoints(self.keypoints)
        if isinstance(self.output, OneStageOutput) and self.input.padding is not None:
            raise ValueError("input.padding for a network that sees the whole frame")

    @property
    def keypoint_set(self) -> Keypoints:
        """The keypoints, looked up.

        Raises:
            SpecError: No set of that name.
        """
        if self.keypoints is None:
            return CORNERS
        if isinstance(self.keypoints, Keypoints):
            return self.keypoints
        if self.keypoints not in KEYPOINT_SETS:
            fix = did_you_mean(self.keypoints, KEYPOINT_SETS) or "give their names: keypoints: {names: […]}"
            known = ", ".join(KEYPOINT_SETS)
            raise SpecError("spec: keypoints", found=repr(self.keypoints), expected=f"one of {known}", fix=fix)
        return KEYPOINT_SETS[self.keypoints]


def read_spec(path: Path) -> ImportSpec:
    """The specification in a YAML file.

    Raises:
        SpecError: It cannot be read, is no YAML, or does not fit; names file, line and key.
    """
    try:
        spec = read_yaml(path, ImportSpec)
    except RecipeError as err:
        raise SpecError(err.where, found=err.found, expected=err.expected, fix=err.fix) from err
    spec.keypoint_set  # noqa: B018 - an unknown name is said before any work
    return spec


def parse_spec(text: str, *, source: str = "spec") -> ImportSpec:
    """The specification in a YAML text; errors as `read_spec`."""
    try:
        spec = parse_yaml(text, ImportSpec, source=source)
    except RecipeError as err:
        raise SpecError(err.where, found=err.found, expected=err.expected, fix=err.fix) from err
    spec.keypoint_set  # noqa: B018 - an unknown name is said before any work
    return spec


def _check_keypoints(keypoints: Keypoints) -> None:
    count = keypoints.count
    if not count or len(set(keypoints.names)) < count:
        raise ValueError("keypoints without names, or with one name twice")
    if keypoints.sigmas and len(keypoints.sigmas) != count:
        raise ValueError(f"{len(keypoints.sigmas)} sigmas for {count} keypoints")
    for kind, pairs in (("skeleton", keypoints.skeleton), ("flip_pairs", keypoints.flip_pairs)):
        for pair in pairs:
            if not all(0 <= place < count for place in pair):
                raise ValueError(f"keypoints.{kind}: {list(pair)}, expected indices 0..{count - 1}")
