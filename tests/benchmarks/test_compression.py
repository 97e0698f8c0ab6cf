"""The claims about compression: their bars, what they say where a network is absent, and the line they are held to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import side_by_side
from benchmarks.areas import compression
from benchmarks.areas.compression import CLAIMS, Point, above_line
from benchmarks.claim import Claim, row_of
from benchmarks.context import Context
from benchmarks.side_by_side import Table
from benchmarks.subjects import METRIC
from edgepose.blocks import zoo
from edgepose.data.coco import PoseDataset
from edgepose.profiler.accuracy import summary
from tests.benchmarks.test_side_by_side import EQUAL, MORE, SAME, SLOW, row, table
from tests.profiler.simulated import KEYPOINTS, record
from tests.test_compiler import compressed, copy_checkpoint
from tests.timing.fake_turns import FakeTimer
from tests.tiny_checkpoint import Compiled, Tiny

BARS = {
    "kpe_s_speedup_ort": ">= 6.0",
    "kpe_s_speedup_torch": ">= 15.0",
    "kpe_s_loss02_pt": "<= 1.0",
    "kpe_s_loss01_pt": "<= 1.5",
    "orn_s_speedup_ort": ">= 4.0",
    "orn_s_loss02_pt": "<= 1.0",
    "orn_s_loss01_pt": "<= 1.5",
    "int8_ratio_openvino": ">= 3.0",
    "int8_ratio_ort": ">= 2.5",
    "kpe_t_int8_ratio_openvino": ">= 2.0",
    "kpe_t_int8_ratio_ort": ">= 2.0",
    "qat_loss_pt": "<= 0.3",
    "above_zoo_line_pt": "> 0.0",
    "above_equal_macs_pt": "> 0.0",
    "pareto_ort": "== 0",
    "pareto_openvino": "== 0",
    "latency_target_error": "<= 0.1",
}


@pytest.fixture
def context(tmp_path: Path) -> Context:
    """A run in which val is a set of simulated people."""
    made = Context(tmp_path, tmp_path)
    made.once("val", lambda: PoseDataset((), KEYPOINTS, "simulated", tmp_path))
    return made


def claim(name: str) -> Claim:
    return next(entry for entry in CLAIMS if entry.name == f"compression.{name}")


def test_bars_are_those_of_the_issue() -> None:
    assert {entry.name: entry.bar for entry in CLAIMS} == {f"compression.{name}": bar for name, bar in BARS.items()}


@pytest.mark.parametrize("name", sorted(set(BARS) - {"latency_target_error"}))
def test_a_claim_about_an_absent_network_is_a_row_that_names_it(
    name: str, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    found, _ = row_of(claim(name), context)
    assert (found.value, found.holds) == (None, False)
    wanted = "orn-s" if name.startswith("orn") else "kpe-t" if "kpe_t" in name else "kpe-s"
    assert wanted in found.detail["error"]
    assert "not measured" in found.detail["text"]
    assert "no network of that name" in found.detail["error"] or "no kpe-" in found.detail["error"]


def test_everything_that_qat_is_measured_on_is_named_at_once(
    context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    error = row_of(claim("qat_loss_pt"), context)[0].detail["error"]
    for name in ("kpe-s-qat-int8,", "orn-s-qat-int8-control", "kpe-t-inverted"):
        assert name in error


# The line


def points(*found: tuple[str, float, float]) -> list[Point]:
    """Networks by name, time and the share of right joints that they lose."""
    return [Point(name, time, record(400, lost=lost)) for name, time, lost in found]


def height(point: Point) -> float:
    return 100 * summary(point.record, KEYPOINTS)[METRIC]


def test_between_two_networks_the_line_is_straight(context: Context) -> None:
    t, s, m = zoo_points = points(("t", 0.4, 0.3), ("s", 1.0, 0.1), ("m", 2.0, 0.0))
    (small,) = points(("small", 0.7, 0.15))
    found, weights = above_line(zoo_points, small, context)
    assert weights == {"t": pytest.approx(0.5), "s": pytest.approx(0.5)}
    assert found.estimate == pytest.approx(height(small) - (height(t) + height(s)) / 2)
    assert found.low < found.estimate < found.high
    again, weights = above_line([m, t, s], small, context)  # whatever their order
    assert again == found


def test_a_network_on_the_line_is_not_above_it(context: Context) -> None:
    zoo_points = points(("t", 0.4, 0.3), ("s", 1.0, 0.1))
    found, weights = above_line(zoo_points, Point("again", 0.4, zoo_points[0].record), context)
    assert found.estimate == pytest.approx(0.0)
    assert weights["s"] == pytest.approx(0.0)


@pytest.mark.parametrize(("time", "ends"), [(0.1, ("t", "s")), (5.0, ("s", "m"))])
def test_beyond_its_ends_the_line_goes_on(time: float, ends: tuple[str, str], context: Context) -> None:
    zoo_points = points(("t", 0.4, 0.3), ("s", 1.0, 0.1), ("m", 2.0, 0.0))
    heights = {point.name: height(point) for point in zoo_points}
    times = {point.name: point.time for point in zoo_points}
    (small,) = points(("small", time, 0.05))
    found, weights = above_line(zoo_points, small, context)
    assert tuple(weights) == ends
    slope = (heights[ends[1]] - heights[ends[0]]) / (times[ends[1]] - times[ends[0]])
    expected = heights[ends[0]] + slope * (time - times[ends[0]])
    assert found.estimate == pytest.approx(height(small) - expected)


# On bundles


@pytest.fixture
def measured(
    context: Context, tiny: Tiny, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Context:
    """A run in which the zoo's networks are tiny ones, compiled and measured already."""
    folder = tmp_path / "zoo"
    folder.mkdir()
    monkeypatch.setattr(zoo, "_FOLDER", folder)
    whole, small = compiled("ptq-int8").bundle, compiled("prune-qat-int8").bundle
    for name in compression.LINE:
        copy_checkpoint(tiny.checkpoint, folder / name)
        context.once(f"bundle {name} ptq-int8", lambda: whole)
    copy_checkpoint(compressed(compiled, "prune-qat-int8"), folder / "kpe-s-prune-qat-int8")
    context.once("bundle kpe-s prune-qat-int8", lambda: small)
    context.once(f"onnxruntime {whole.digest}", lambda: record(400, lost=0.1))
    context.once(f"onnxruntime {small.digest}", lambda: record(400))
    return context


def test_no_network_of_equal_macs_says_what_to_train(measured: Context) -> None:
    found, _ = row_of(claim("above_equal_macs_pt"), measured)
    assert not found.holds
    assert "kpe-t with" in found.detail["error"]
    assert "as kpe-t-equal" in found.detail["error"]


def test_a_network_of_equal_macs_is_compared_person_by_person(
    measured: Context, compiled: Compiled, tiny: Tiny, tmp_path: Path
) -> None:
    other = compiled("prune-qat-int8").bundle
    copy_checkpoint(tiny.checkpoint, tmp_path / "zoo" / "kpe-t-equal")
    measured.once("bundle kpe-t-equal ptq-int8", lambda: other)
    found, _ = row_of(claim("above_equal_macs_pt"), measured)
    assert found.value == 0.0  # it is the same network
    assert not found.holds
    assert found.detail["macs"][0] == found.detail["macs"][1] > 0


def test_the_line_is_drawn_from_times_of_one_run(measured: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    times = dict.fromkeys(("tiny-ptq-int8", "tiny-prune-qat-int8"), 1.0)
    monkeypatch.setattr(compression, "time_in_turns", FakeTimer(times))
    found, _ = row_of(claim("above_zoo_line_pt"), measured)
    rows = found.detail["rows"]
    assert len(rows) == 4
    assert all(0.9 < entry["time_over_kpe_s_int8"] < 1.1 for entry in rows)
    assert np.isfinite(found.value or np.nan)
    low, high = found.detail["ci95"]
    assert low <= (found.value or 0.0) <= high


# The front


@pytest.mark.parametrize(
    ("rival", "beaten"), [(("NNCF, defaults", EQUAL, MORE), 1), (("NNCF, defaults", SLOW, SAME), 0)]
)
def test_the_front_counts_who_beats_this_project(
    rival: tuple[str, tuple[float, float], tuple[float, float]],
    beaten: int,
    context: Context,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def compared(_context: Context, _subject: object, backend: str, people: tuple[str, object]) -> Table:
        calls.append(f"{backend} {people[0]}")
        return table(row(*rival))

    monkeypatch.setattr(side_by_side, "subject", lambda *_: None)
    monkeypatch.setattr(side_by_side, "compare", compared)
    found, lines = row_of(claim("pareto_openvino"), context)
    assert (found.value, found.holds) == (beaten, not beaten)
    assert found.detail["rows"][1]["label"] == "NNCF, defaults"
    assert any("NNCF, defaults" in line for line in lines)
    row_of(claim("pareto_openvino"), context)
    assert calls == ["openvino val"]  # once, and on val
