"""The waterfall's sections: what is known appears with its bounds, what is not has a reason, and text stays text."""

from __future__ import annotations

import dataclasses
import re
from functools import cache

import pytest

from edgepose.profiler.pages.report import Report, render_report
from edgepose.profiler.pages.step_charts import Bar, Curve, Stair, sensitivity_chart, staircase_chart, waterfall_chart
from edgepose.profiler.pages.waterfall_page import waterfall_sections
from edgepose.profiler.waterfall import Costs, Evidence, Latency, People, Waterfall, waterfall
from tests.conftest import Golden
from tests.profiler.pages.test_report import Page
from tests.profiler.simulated import KEYPOINTS, record
from tests.profiler.test_waterfall import slice_of

PEOPLE = People("people val", "d" * 64, 60, 60)
RECORDED = {"pck_torso_0.2": 0.5511, "mpjpe_px": 12.25}


def evidence(title: str = "FP32 checkpoint") -> list[Evidence]:
    first, last = record(60), record(60, lost=0.1)
    fast = Latency(0.5, 3, 2, against="fp32", speedup=8.0, low=7.5, high=8.5)
    costs = Costs(197_000_000, 2_243_000, 4_540_000, latency=Latency(4.0, 3, 2))
    engine = Costs(size_bytes=2_000_000, int8_share=0.97, latency=fast)
    return [
        Evidence("fp32", title, "network", "torch", "", RECORDED, costs, first, slice_of(first)),
        Evidence("prune", "pruned", "network", "torch", "it is gone from the cache", {"pck_torso_0.2": 0.5}),
        Evidence("ort int8", "ort int8", "engine", "onnxruntime 1", "", {}, engine, last, slice_of(last)),
    ]


@cache
def found(title: str = "FP32 checkpoint") -> Waterfall:
    return waterfall(evidence(title), KEYPOINTS, PEOPLE)


def page_of(whole: Waterfall) -> Page:
    return Page(render_report(Report("kpe", waterfall=whole)))


def test_everything_that_is_known_appears() -> None:
    text = page_of(found()).text
    for words in (
        "60 persons of people val", "FP32 checkpoint", "ort int8", "pck_torso_0.1", "limb12_extent_0.1", "197.0",
        "2.243", "4.54", "97.0 %", "8.00", "7.50 … 8.50", "low light", "hidden joints", "left wrist", "55.11 %",
        "12.25 px", "Not measured", "pruned: it is gone from the cache", "Times faster than FP32 checkpoint",
    ):  # fmt: skip
        assert words in text, words
    change = found().step("ort int8").changes["pck_torso_0.2"]
    assert f"{change.points:+.2f}" in text
    assert f"{change.low:+.2f} … {change.high:+.2f}" in text
    assert f"{change.detectable_points:.2f}" in text


def test_the_sections_are_as_they_were(golden: Golden) -> None:
    golden("waterfall.html", "\n".join(waterfall_sections(found())).replace("</tr>", "</tr>\n") + "\n")


def test_tables_name_their_rows_columns_and_purpose() -> None:
    page = page_of(found())
    assert page.count("table") == page.count("caption") > 0
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in page.tags if tag == "th")
    assert all(attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg")


def test_foreign_text_stays_text() -> None:
    evil = '<img src=x onerror="alert(1)"> & $title'
    page = page_of(found(evil))
    assert page.count("img") == 0
    assert evil in page.text


def test_without_people_the_recorded_figures_are_shown_and_labelled() -> None:
    bare = [dataclasses.replace(one, accuracy=None, slices={}) for one in evidence()]
    page = page_of(waterfall(bare, KEYPOINTS))
    assert "Recorded when it was made" in page.text
    assert "as recorded" in page.text
    assert "55.11 %" in page.text
    assert "95 % bounds come from" not in page.text
    assert "Joint by joint" not in page.text


def test_without_a_reference_there_are_changes_but_no_totals() -> None:
    rest = evidence()
    rest[0] = dataclasses.replace(rest[0], accuracy=None, why="gone")
    control = Evidence("control", "control", "control", "torch", "gone as well")
    onnx = dataclasses.replace(rest[2], name="onnx", kind="onnx")
    page = page_of(waterfall([control, *rest, onnx], KEYPOINTS, PEOPLE))
    assert "Slice by slice" in page.text
    assert "Joint by joint" not in page.text


def test_a_bundle_that_nothing_is_known_of_has_no_sections() -> None:
    assert waterfall_sections(waterfall([Evidence("onnx", "ONNX", "onnx", "ORT")], KEYPOINTS)) == ()


def numbers_only(svg: str) -> bool:
    return not re.search(r'(?:points|d|x1|y1|x2|y2|cx|cy|width|x|y)="[^"]*(?:nan|inf)', svg)


def test_charts_say_their_numbers_and_units() -> None:
    bars = [Bar("FP32", 55.0), Bar("pruned", 53.5, 55.0, (-2.5, -0.5), 1.4), Bar("lost", float("nan"))]
    svg = waterfall_chart("pck", bars, 55.0)
    assert "pruned: 53.50 %, change -1.50 points" in svg
    assert "1.40 points detectable" in svg
    assert "lost" not in svg
    assert numbers_only(svg)


@pytest.mark.parametrize("bars", [[], [Bar("x", float("nan"))]])
def test_a_waterfall_of_nothing_is_no_chart(bars: list[Bar]) -> None:
    assert waterfall_chart("pck", bars) == ""


def test_one_step_alone_is_a_chart() -> None:
    assert numbers_only(waterfall_chart("pck", [Bar("FP32", 55.0)], 55.0))


def test_sensitivity_names_the_most_sensitive() -> None:
    curves = [Curve(f"layer{n}", ((0.25, 50.0 - n), (0.5, 50.0 - 2 * n))) for n in range(6)]
    svg = sensitivity_chart("pck", 50.0, curves)
    named = re.findall(r'class="key s\d">([^<]+)<', svg)
    assert named == ["layer5", "layer4", "layer3", "layer2"]
    assert "layer5: loses 10.00 points at most" in svg
    assert "% of the layer removed" in svg
    assert numbers_only(svg)
    assert sensitivity_chart("pck", 50.0, []) == ""


def test_the_staircase_shows_what_was_asked_for_and_taken() -> None:
    svg = staircase_chart([Stair(0.5, 2.1, 2.0, 2.2, True), Stair(0.25, 1.3, 1.2, 1.4)], 2.0)
    assert "asked for: 2.00 times" in svg
    assert "50.0 % removed: 2.10 times faster (2.00 to 2.20), taken" in svg
    assert "times faster than unpruned" in svg
    assert numbers_only(svg)
    assert staircase_chart([]) == ""
