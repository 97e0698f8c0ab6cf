"""`report --data`: every step of a compiled network on the same people, on the page and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from edgepose.cli import report_steps
from edgepose.timing.record import LatencyProtocol
from tests.cli.conftest import Cli
from tests.profiler.pages.test_report import Page
from tests.tiny_checkpoint import Compiled, Tiny
from tests.tiny_network import flip_a_byte

HEAD = "pck_torso_0.2"
QUICK = ("--no-latency", "--pictures", "0")


@pytest.fixture
def quantised(compiled: Compiled, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny network, quantised, as a copy that may be spoilt; with a cache that may be, too."""
    root = compiled("ptq-int8").bundle.root
    shutil.copytree(tiny.cache, tmp_path / "stages-cache")
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "stages-cache"))
    return Path(shutil.copytree(root, tmp_path / "tiny.bundle"))


def steps_of(path: Path) -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in json.loads(path.read_text())["waterfall"]["steps"]}


def test_every_step_is_measured_on_the_same_people(cli: Cli, quantised: Path, tiny: Tiny, tmp_path: Path) -> None:
    files = ["--out", tmp_path / "page.html", "--json", tmp_path / "page.json"]
    flags = ["--data", tiny.data, "--baseline", tiny.checkpoint, "--no-latency", "--pictures", 2, *files]
    outcome = cli("report", quantised, *flags)
    assert outcome.code == 0, outcome.err
    steps = steps_of(tmp_path / "page.json")
    assert list(steps) == ["fp32", "ptq", "onnx", "onnxruntime int8", "openvino int8"]
    assert all(step["measured"] and not step["why"] for step in steps.values())
    assert steps["openvino int8"]["changes"][HEAD]["against"] == "onnx"
    assert steps["fp32"]["costs"]["macs"] == steps["ptq"]["costs"]["macs"] == steps["onnx"]["costs"]["macs"] > 0
    assert steps["onnxruntime int8"]["costs"]["int8_share"] > 0.9
    page = Page((tmp_path / "page.html").read_text())
    for words in ("FP32 checkpoint", "PTQ, fake-quantised", "ONNX graph", "openvino int8", "6 persons of people val"):
        assert words in page.text, words
    for step in steps.values():
        assert f"{100 * step['metrics'][HEAD]:.2f} %" in page.text
    assert "6 people of people val" in outcome.out
    people = json.loads((tmp_path / "page.json").read_text())["worst_people"]
    assert page.count("img") == 3 * len(people)
    assert not [
        attributes for tag, attributes in page.tags if tag == "img" and "data:image/jpeg" not in str(attributes)
    ]


def test_a_truncated_cache_leaves_a_reason_and_the_recorded_figures(
    cli: Cli, quantised: Path, tiny: Tiny, tmp_path: Path
) -> None:
    for weights in (tmp_path / "stages-cache" / "stages").glob("ptq-*/network.safetensors"):  # other tests' as well
        weights.write_bytes(weights.read_bytes()[:1000])
    outcome = cli("report", quantised, "--data", tiny.data, *QUICK, "--json", tmp_path / "page.json")
    assert outcome.code == 0, outcome.err
    steps = steps_of(tmp_path / "page.json")
    assert not steps["ptq"]["measured"]
    assert "damaged" in steps["ptq"]["why"]
    assert HEAD in steps["ptq"]["recorded"]
    assert steps["onnx"]["measured"]
    assert steps["onnx"]["changes"] == {}
    page = quantised.with_suffix(".html").read_text()
    assert "damaged" in page
    assert "Recorded when it was made" in page


def test_a_float_network_that_is_nowhere_can_be_named(cli: Cli, quantised: Path, tiny: Tiny, tmp_path: Path) -> None:
    assert cli("report", quantised, "--data", tiny.data, *QUICK, "--json", tmp_path / "page.json").code == 0
    assert "--baseline" in steps_of(tmp_path / "page.json")["fp32"]["why"]


def test_another_network_is_a_control(cli: Cli, quantised: Path, tiny: Tiny, tmp_path: Path) -> None:
    control = ("--baseline", quantised)
    outcome = cli("report", quantised, "--data", tiny.data, *QUICK, *control, "--json", tmp_path / "page.json")
    assert outcome.code == 0, outcome.err
    steps = steps_of(tmp_path / "page.json")
    assert next(iter(steps)) == "control"
    assert steps["ptq"]["totals"][HEAD]["against"] == "control"


def test_without_data_nothing_is_measured(cli: Cli, quantised: Path, tmp_path: Path) -> None:
    outcome = cli("report", quantised, "--json", tmp_path / "page.json")
    assert outcome.code == 0
    assert outcome.out == ""
    steps = steps_of(tmp_path / "page.json")
    assert not any(step["measured"] for step in steps.values())
    assert HEAD in steps["ptq"]["recorded"]
    assert "Recorded when it was made" in quantised.with_suffix(".html").read_text()


def test_slices_on_a_sample_of_dev(cli: Cli, quantised: Path, tiny: Tiny, tmp_path: Path) -> None:
    flags = ["--split", "dev", "--people", 2, "--slices", *QUICK, "--json", tmp_path / "page.json"]
    outcome = cli("report", quantised, "--data", tiny.data, *flags)
    assert outcome.code == 0, outcome.err
    whole = json.loads((tmp_path / "page.json").read_text())["waterfall"]
    assert whole["people"]["name"] == "people dev"
    assert whole["people"]["persons"] == 2
    rows = {row["slice"] for row in whole["steps"][-1]["slices"]}
    assert {"clean", "occluded_30", "low_light"} <= rows
    assert "Slice by slice" in quantised.with_suffix(".html").read_text()


def test_engines_are_timed_in_turns(
    cli: Cli, bundle: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = LatencyProtocol(pairs=1, blocks=5, dropped_blocks=1, block_ms=1.0, warm_up_ms=1.0)
    monkeypatch.setattr(report_steps, "_TIMING", quick)
    outcome = cli("report", bundle, "--latency", "--json", tmp_path / "page.json")
    assert outcome.code == 0, outcome.err
    steps = steps_of(tmp_path / "page.json")
    first, second = (steps[name]["costs"]["latency"] for name in ("onnxruntime fp32", "openvino fp32"))
    assert first["speedup"] is None
    assert second["against"] == "onnxruntime fp32"
    assert second["low"] <= second["speedup"] <= second["high"]
    assert f"{second['median_ms']:.3f}" in bundle.with_suffix(".html").read_text()


def test_keypoints_of_another_kind_are_refused(cli: Cli, bundle: Path, tiny: Tiny) -> None:
    outcome = cli("report", bundle, "--data", tiny.data)
    assert outcome.code == 2
    assert "14 keypoints" in outcome.line
    assert not bundle.with_suffix(".html").exists()


def test_keypoints_without_a_torso_are_measured(cli: Cli, bundle: Path, people: Path, tmp_path: Path) -> None:
    outcome = cli("report", bundle, "--data", people, "--no-latency", "--json", tmp_path / "page.json")
    assert outcome.code == 0, outcome.err
    steps = steps_of(tmp_path / "page.json")
    assert steps["openvino fp32"]["changes"]["pck_extent_0.1"]["points"] == 0
    assert not steps["fp32"]["measured"]


def test_data_that_is_not_there(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    assert cli("report", bundle, "--data", tmp_path / "nowhere").code == 6


@pytest.mark.parametrize("flags", [("--split", "dev"), ("--slices",), ("--people", "5"), ("--baseline", "kpe-t")])
def test_flags_that_need_data_are_refused_without(cli: Cli, bundle: Path, flags: tuple[str, ...]) -> None:
    outcome = cli("report", bundle, *flags)
    assert outcome.code == 2
    assert flags[0] in outcome.line


def test_a_changed_engine_is_an_error(cli: Cli, bundle: Path, people: Path) -> None:
    flip_a_byte(bundle / "engines/cpu/onnxruntime/fp32.onnx")
    assert cli("report", bundle, "--data", people, *QUICK).code == 8


def test_json_alone_on_stdout(cli: Cli, bundle: Path, people: Path) -> None:
    outcome = cli("report", bundle, "--data", people, *QUICK, "--json", "-")
    assert outcome.code == 0
    assert json.loads(outcome.out)["bundle"] == "spots"


def test_a_scan_is_drawn(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    scan = tmp_path / "scan.json"
    scan.write_text('{"metric": "pck", "base": 0.5, "rows": [{"layer": "stem", "ratio": 0.5, "pck": 0.4}]}')
    assert cli("report", bundle, "--scan", scan, "--json", tmp_path / "page.json").code == 0
    assert "Sensitivity of layers" in bundle.with_suffix(".html").read_text()
    scan.write_text("[]")
    outcome = cli("report", bundle, "--scan", scan)
    assert outcome.code == 2
    assert "scan.json" in outcome.line
