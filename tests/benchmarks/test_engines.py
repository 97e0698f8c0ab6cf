"""The claims about engines: their bars, what is measured of tiny networks, what is said of what is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import foreign
from benchmarks.areas import engines
from benchmarks.areas.engines import CLAIMS, local_targets
from benchmarks.claim import Claim, row_of
from benchmarks.context import Context
from edgepose.errors import OnnxError
from tests.tiny_checkpoint import Compiled

BARS = {
    "rtx_aot_models": ">= 1.0",
    "parity_px": "<= 0.1",
    "int8_macs_ort": ">= 0.95",
    "int8_macs_openvino": ">= 0.95",
    "build_s": "<= 60",
    "rebuild_s": "<= 2",
    "foreign_imports": "== 3",
    "fused_pre_post_px": "<= 0.05",
    "trt_api_conformance": "== 0",
}


def claim(name: str) -> Claim:
    return next(entry for entry in CLAIMS if entry.name == f"engines.{name}")


def test_bars_are_those_of_the_issue() -> None:
    assert {entry.name: entry.bar for entry in CLAIMS} == {f"engines.{name}": bar for name, bar in BARS.items()}


def test_local_targets_are_those_of_cpus() -> None:
    assert set(local_targets()) == {"this-cpu", "x86-cpu"}


def test_without_the_compiler_for_rtx_nothing_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda _name: None)
    row, _ = row_of(claim("rtx_aot_models"), Context(tmp_path, tmp_path))
    assert (row.value, row.holds) == (None, False)
    assert "edgepose[tensorrt-rtx]" in row.detail["error"]


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_least_share_of_all_bundles_counts(
    backend: str, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "INT8_BUNDLES", (("tiny", "ptq-int8"),))
    monkeypatch.setattr(engines, "compiled", lambda _context, _network, recipe: compiled(recipe).bundle)
    name = {"onnxruntime": "int8_macs_ort", "openvino": "int8_macs_openvino"}[backend]
    row, _ = row_of(claim(name), Context(tmp_path, tmp_path))
    (bundle,) = row.detail["bundles"].values()
    assert row.value == bundle["asked_share"] == 1.0
    assert row.holds


def test_building_again_is_found(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "compiled", lambda _context, _network, recipe: compiled(recipe).bundle)
    context = Context(tmp_path, tmp_path)
    first, again = (row_of(claim(name), context)[0] for name in ("build_s", "rebuild_s"))
    assert first.value is not None
    assert again.value is not None
    assert again.value < first.value
    assert "4 engines for this-cpu, x86-cpu" in first.detail["text"]


def test_networks_of_others_are_taken_all_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    row, _ = row_of(claim("foreign_imports"), Context(tmp_path, tmp_path / "work"))
    assert (row.value, row.holds) == (3, True)
    assert {entry["opset"] for entry in row.detail["networks"].values()} == {9, 11, 17}


def test_a_network_that_cannot_be_imported_counts_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def spoilt(folder: Path, style: str) -> dict[str, float]:
        if style == "simcc":
            raise OnnxError("simcc.onnx", found="a cycle")
        return {"float": 1.0, "int8": 1.0 if style == "heatmap" else 0.5}

    monkeypatch.setattr(foreign, "taken_all_the_way", spoilt)
    row, _ = row_of(claim("foreign_imports"), Context(tmp_path, tmp_path))
    assert (row.value, row.holds) == (1, False)
    assert row.detail["networks"]["simcc"]["error"] == "simcc.onnx: found a cycle"


def test_names_of_tensorrt_are_walked(tmp_path: Path) -> None:
    row, _ = row_of(claim("trt_api_conformance"), Context(tmp_path, tmp_path))
    assert (row.value, row.holds) == (0, True)
    assert row.detail["tests"]["passed"] > 20
