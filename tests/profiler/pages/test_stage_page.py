"""Sections from the reports of stages: recognised by their shape, left out where the shape is another."""

from __future__ import annotations

from typing import Any

import msgspec

from edgepose.compress.restore import Budget, Restoration
from edgepose.compress.staircase import Timing
from edgepose.profiler.pages.stage_page import Scan, ScanRow, sensitivity_section, stage_sections
from edgepose.stages.latency import Achieved, Form, Stair, Staircase
from tests.profiler.pages.test_report import Page

TIMING = {"speedup": 2.02, "low": 1.98, "high": 2.07, "pairs": 6, "ms": 0.5, "unpruned_ms": 1.01}
STAIRCASE = {
    "asked_speedup": 2.0,
    "target_latency_ms": None,
    "stairs": [
        {"ratio": 0.5, "macs": 5, "macs_left": 0.52, "channels": 9, "kept": {}, "timing": TIMING, "chosen": True},
        {"ratio": 0.3, "macs": 7, "macs_left": 0.7, "channels": 9, "kept": {}, "timing": {**TIMING, "speedup": 1.4}},
    ],
}
PRECISIONS = {
    "kept": "int8",
    "text": "int8 is kept: fp32 takes 2.10 x its time",
    "absent": {"bf16": "ONNX Runtime has no BF16 kernels on CPUs"},
    "compared": [
        {"precision": "fp32", "bytes": 9_000_000, "shift_px": 0.0, "int8_share": 0.0},
        {
            "precision": "int8", "bytes": 2_000_000, "shift_px": 0.15, "int8_share": 0.97, "ratio_to_first": 0.48,
            "ci95_to_first": [0.46, 0.5],
        },
    ],
}  # fmt: skip
RESTORATION = {
    "budget": {"reference": 0.55, "points": 0.5},
    "unit": "ms",
    "lost": 1.25,
    "trials": [{"layer": "head.x", "gain": 0.8, "cost": 0.01, "rate": 80.0}],
    "path": [{"layer": "head.x", "lost": 0.45}],
    "met": True,
}


def page_of(reports: dict[str, Any]) -> Page:
    return Page("".join(stage_sections(reports)))


def test_what_a_search_for_a_latency_reports_is_recognised() -> None:
    """Of the real structs: the shapes that are looked for here are theirs."""
    timing = Timing(speedup=2.02, low=1.98, high=2.07, pairs=6, ms=0.5, unpruned_ms=1.01)
    stair = Stair(ratio=0.5, macs=52, macs_left=0.52, channels=9, kept={}, timing=timing, chosen=True)
    form = Form("this-cpu", "onnxruntime", 2, 18, "int8")
    found = Staircase(2.0, None, form, "cpu", 100, 20, 30, (stair,), 0.5, timing, timing, "a", "b")
    achieved = Achieved(2.0, None, timing, timing, timing, 0.01, "int8", "asked for 2.00 x: achieved 2.02 x")
    page = page_of({"latency": msgspec.to_builtins(found), "achieved": msgspec.to_builtins(achieved)})
    assert "48.0 %" in page.text
    assert "achieved 2.02 x" in page.text


def test_shapes_that_were_timed() -> None:
    page = page_of({"latency": STAIRCASE})
    assert "Aiming at a latency" in page.text
    assert "48.0 %" in page.text
    assert "1.98 … 2.07" in page.text
    assert page.count("svg") == 1


def test_precisions_that_were_compared() -> None:
    text = page_of({"engines/this-cpu/onnxruntime": {"precision": "int8", "precisions": PRECISIONS}}).text
    for words in ("Precisions compared", "0.48", "0.46 … 0.50", "97.0 %", "kept", "No bf16: ONNX Runtime has no BF16"):
        assert words in text, words


def test_layers_given_back() -> None:
    text = page_of({"ptq": {"restoration": RESTORATION}}).text
    assert "ptq: 1.25 points lost with all layers integer; 1 given back, the budget holds." in text
    assert "+0.80" in text


def test_a_budget_that_held_from_the_start_is_said() -> None:
    found = Restoration(Budget(0.55, 0.5), lost=0.25)
    text = page_of({"ptq": {"max_drop": {"metric": "pck_torso_0.2", **msgspec.to_builtins(found)}}}).text
    assert "ptq: 0.25 points lost with all layers integer; 0 given back, the budget holds." in text


def test_reports_of_another_shape_are_left_out() -> None:
    odd: dict[str, Any] = {
        "latency": {"asked_speedup": "fast", "stairs": 3},
        "ptq": {"restoration": {**RESTORATION, "path": "head.x"}},
        "engine": {"precisions": ["fp32"]},
        "prune": {"dev": {"pck_torso_0.2": 0.5}},
        "note": "text",
    }
    assert stage_sections(odd) == ()


def test_foreign_text_stays_text() -> None:
    evil = "<script>alert(1)</script>"
    reports = {"engine": {"precisions": {**PRECISIONS, "text": evil, "absent": {evil: evil}}}}
    page = page_of(reports)
    assert page.count("script") == 0
    assert evil in page.text


def test_a_scan_lists_the_most_sensitive_layer_first() -> None:
    rows = tuple(ScanRow(f"layer{n}", ratio, 0.5 - n * ratio / 10) for n in (1, 3, 2) for ratio in (0.25, 0.5))
    page = Page(sensitivity_section(Scan("pck_torso_0.2", 0.5, (*rows, ScanRow("layer9", 0.5, None))), "scan.json"))
    assert "scan.json: the whole network has 50.00 %" in page.text
    table = page.text[page.text.index("most sensitive first") :]
    assert table.index("layer3-") < table.index("layer2-") < table.index("layer1-")
    assert "-15.00" in page.text
    assert "layer9" not in page.text


def test_a_scan_of_nobody_says_so() -> None:
    page = Page(sensitivity_section(Scan("pck_torso_0.2", None, (ScanRow("stem", 0.5, None),)), "scan.json"))
    assert "nobody could be measured" in page.text
    assert page.count("svg") == 0
