"""Specifications of foreign networks: strict, with suggestions, and nothing that means nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepose.errors import SpecError
from edgepose.importer.spec import KEYPOINT_SETS, OneStageOutput, parse_spec, read_spec

GOOD = """
name: other
keypoints: coco17
input: {size: [256, 192], color: rgb, pixels: 0..1, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225]}
output: {kind: heatmap, alignment: scaled}
"""
ONE = "{kind: one-stage, outputs: {o: [box, score, keypoints]}, box: xyxy}"
HEAT = "{kind: heatmap, alignment: scaled}"


def test_a_specification(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(GOOD)
    spec = read_spec(tmp_path / "spec.yaml")
    assert spec.keypoint_set.count == 17
    assert spec.input.size == (256, 192)
    assert parse_spec(GOOD.replace(HEAT, ONE)).output == OneStageOutput(
        outputs={"o": ("box", "score", "keypoints")}, box="xyxy"
    )


def test_known_sets_are_whole() -> None:
    for keypoints in KEYPOINT_SETS.values():
        assert len(set(keypoints.names)) == keypoints.count == len(keypoints.sigmas)
        for left, right in keypoints.flip_pairs:
            assert keypoints.names[left].replace("left", "right") == keypoints.names[right]


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("alignment", "alignement", "line 5: output.alignement: .*did you mean 'alignment'"),
        (", alignment: scaled", "", "no key 'alignment'"),
        ("heatmap", "heatmaps", "did you mean 'heatmap'"),
        ("coco17", "coco19", "keypoints: found 'coco19'.*did you mean 'coco17'"),
        ("keypoints: coco17", "", "no keypoints; name a set"),
        ("coco17", "{names: [a, a]}", "one name twice"),
        ("coco17", "{names: [a, b], flip_pairs: [[0, 2]]}", "flip_pairs: .0, 2., expected indices 0..1"),
        ("color: rgb, ", "", "no key 'color'"),
        ("pixels: 0..1", "pixels: 0-1", "0..255"),
        ("0.485", "123.675", "mean and std of pixels 0..255 beside pixels: 0..1"),
        ("0.229", "0", "a std of 0"),
        ("[256, 192]", "[256, 0]", ">= 1"),
        (HEAT, "{kind: regression, unit: pixels, columns: [x, x]}", "columns"),
        (HEAT, "{kind: regression, unit: pixels, columns: [x, y, score], scales: a, scores: b}", "leave one"),
        (HEAT, "{kind: one-stage, outputs: {o: [score, keypoints]}, box: xyxy}", "no column box"),
        (HEAT, "{kind: one-stage, outputs: {o: [box, keypoints]}, box: xyxy}", "score and classes"),
        (HEAT, "{kind: one-stage, outputs: {o: [box, score], p: [box]}, box: xyxy}", "2 columns box"),
        (HEAT, "{kind: one-stage, outputs: {o: [box, score]}, box: xyxy}", "boxes only"),
        (HEAT, "{kind: one-stage, outputs: {o: [box, score, keypoint_scores]}, box: xyxy}", "without points"),
        (
            "color: rgb" + GOOD[GOOD.index(", pixels") :],
            "color: rgb, pixels: 0..1, padding: 1.5}\noutput: " + ONE,
            "padding",
        ),
    ],
)
def test_what_is_wrong_is_said(old: str, new: str, match: str) -> None:
    assert old in GOOD
    with pytest.raises(SpecError, match=match) as caught:
        parse_spec(GOOD.replace(old, new))
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="No such file"):
        read_spec(tmp_path / "spec.yaml")
