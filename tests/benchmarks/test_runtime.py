"""The claims about the runtime: their bars, and what is measured, on a tiny network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import runtime_arms
from benchmarks.areas import runtime
from benchmarks.areas.runtime import CLAIMS
from benchmarks.claim import Claim, row_of
from benchmarks.context import Context
from benchmarks.faults import KINDS, Faulty
from benchmarks.soak import soak
from edgepose.bundle import Bundle
from tests.fakes import FakeSession, spot_outputs, spot_spec
from tests.tiny_network import spot_bundle

BARS = {
    "session_overhead_us": "<= 20",
    "session_alloc_bytes": "<= 4096",
    "frame_ratio_1": "<= 1.15",
    "frame_ratio_8": "<= 1.15",
    "rtmlib_px": "<= 0.5",
    "throughput_ratio": ">= 0.95",
    "import_ms": "<= 60",
    "cold_start_ratio": "<= 1.2",
    "soak_growth_mb": "<= 5",
    "faults_survived": ">= 500",
    "jitter_px": "<= 1.0",
}


@pytest.fixture
def spots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The bundle that is measured instead of the zoo's."""
    bundle = spot_bundle(tmp_path)
    monkeypatch.setattr(runtime, "small", lambda _context: bundle)
    return bundle


def claim(name: str) -> Claim:
    return next(entry for entry in CLAIMS if entry.name == f"runtime.{name}")


def test_bars_are_those_of_the_issue() -> None:
    assert {entry.name: entry.bar for entry in CLAIMS} == {f"runtime.{name}": bar for name, bar in BARS.items()}


@pytest.mark.parametrize("name", ["session_overhead_us", "session_alloc_bytes"])
def test_what_a_session_adds_is_measured_in_both_backends(name: str, spots: Bundle, tmp_path: Path) -> None:
    row, _ = row_of(claim(name), Context(tmp_path, tmp_path))
    assert row.value is not None
    (parts,) = (row.detail[key] for key in ("backends", "bytes") if key in row.detail)
    assert parts.keys() == {"onnxruntime", "openvino"}


def test_a_copy_of_the_crop_would_be_noticed(spots: Bundle) -> None:
    whole, raw = runtime._calls(spots, "onnxruntime")
    images = runtime_arms.crops(spots, 1)

    def copying() -> object:
        kept = images.copy()
        return whole(), kept

    assert runtime._allocated(copying) - runtime._allocated(raw) >= images.nbytes
    assert runtime._allocated(whole) - runtime._allocated(raw) < images.nbytes


def test_arms_answer_the_same_crops(spots: Bundle) -> None:
    raw = runtime_arms.raw(str(spots.root), 2, 1)()
    poses = runtime_arms.frame(str(spots.root), 2, 1)()
    assert [len(values) for values in raw] == [2, 2]  # type: ignore[attr-defined]
    assert len(poses) == 2  # type: ignore[arg-type]


def test_faults_are_survived_and_counted(spots: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_FAULTS", 12)
    row, _ = row_of(claim("faults_survived"), Context(tmp_path, tmp_path))
    assert row.value == 12
    assert row.detail["kinds"] == list(KINDS)
    assert not row.holds  # five hundred are asked for


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("raise", "kill")])
def test_a_fault_is_one_answer_and_the_next_is_right(kind: str) -> None:
    faulty = Faulty(lambda: FakeSession(spot_spec(), spot_outputs))  # type: ignore[arg-type,return-value]
    images = np.random.default_rng(0).random((2, *faulty.inputs[0].shape[1:]), np.float32)  # type: ignore[arg-type]
    right = faulty.infer({"images": images})
    faulty.next_fault = kind  # type: ignore[assignment]
    wrong = faulty.infer({"images": images})
    if kind != "hang":
        assert not any(np.array_equal(wrong[name], right[name]) for name in right)
    again = faulty.infer({"images": images})
    assert all(np.array_equal(again[name], right[name]) for name in right)


def test_a_leak_is_noticed(spots: Bundle) -> None:
    found = soak(spots.root, 12_000, leak_bytes=4096)  # this process is large, and so is a hundredth of it
    assert found.growth_mb > 5
    assert not found.clean


def test_start_and_import_are_timed(spots: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime, "_ROUNDS", {"importing": 4, "first poses": 4})
    for name in ("import_ms", "cold_start_ratio"):
        row, _ = row_of(claim(name), Context(tmp_path, tmp_path))
        assert row.value is not None, row.detail["text"]
        assert min(value for key, value in row.detail.items() if key.endswith("_ms")) > 0
