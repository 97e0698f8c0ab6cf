"""`edgepose inspect x.onnx` and `edgepose import` through the program, and every verb that follows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.foreign import HeatmapNet, export
from edgepose.bundle import read_bundle
from tests.cli.conftest import BLUE, RED, Cli, disk_of

SPEC = """
name: spots
keypoints: {names: [blue, red], skeleton: [[0, 1]], sigmas: [0.05, 0.05]}
input: {color: rgb, pixels: 0..1, mean: [0.485, 0.456, 0.406], std: [0.229, 0.224, 0.225], padding: 1.0}
output: {kind: heatmap, alignment: tiled}
"""


class Spots(HeatmapNet):
    """Two maps: blue and red."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).index_select(1, torch.tensor([2, 0]))


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's network, exported at opset 9 with a fixed batch."""
    return export(Spots(), tmp_path_factory.mktemp("foreign") / "spots.onnx", opset=9, batch=1, listed=True)


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    (tmp_path / "spec.yaml").write_text(SPEC)
    return tmp_path / "spec.yaml"


def test_from_inspect_to_eval(cli: Cli, foreign: Path, spec: Path, photo: Path, people: Path, tmp_path: Path) -> None:
    proposed = cli("inspect", foreign)
    assert proposed.code == 0
    assert "kind: heatmap  # likely" in proposed.out
    assert "color: rgb  # guess" in proposed.out
    out = tmp_path / "spots.bundle"
    made = cli("import", foreign, "--spec", spec, "--out", out)
    assert made.code == 0
    assert "engine-openvino" in made.out
    assert "run one person at a time" in made.err
    assert "opset 9 was converted to 17" in made.err
    assert cli("verify", out).out.count("answers as recorded") == 2
    assert cli("run", out, photo, "--json", tmp_path / "poses.json").code == 0
    (row,) = json.loads((tmp_path / "poses.json").read_text())
    for found, true in zip(row["poses"][0]["keypoints"], (BLUE, RED), strict=True):
        assert found == pytest.approx(true, abs=14)  # two pixels of the input
    assert cli("eval", out, "--data", people, "--json", tmp_path / "eval.json").code == 0
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["metrics"]["mpjpe_px"] < 14
    assert figures["persons"] == 24
    assert "spots" in cli("inspect", out).out
    assert "p50" in cli("profile", out, "--duration", "0.1", "--frame", "320x240", "--threads", "1").out
    rules = tmp_path / "rules.yaml"
    rules.write_text("name: sizes\naccuracy: []\nlatency: null\nlimits: [{metric: bundle_bytes, fail_above: 0.1}]\n")
    assert cli("gate", out, out, "--rules", rules).code == 0


def test_the_proposal_is_what_import_reads(cli: Cli, foreign: Path, tmp_path: Path) -> None:
    (tmp_path / "proposed.yaml").write_text(cli("inspect", foreign).out)
    outcome = cli("import", foreign, "--spec", tmp_path / "proposed.yaml", "--out", tmp_path / "p.bundle")
    assert outcome.code == 0
    assert read_bundle(tmp_path / "p.bundle").manifest.spec.keypoints.names == ("keypoint_0", "keypoint_1")


def test_inspect_as_json(cli: Cli, foreign: Path) -> None:
    said = json.loads(cli("inspect", foreign, "--json").out)
    assert said["opset"] == 9
    assert {line["confidence"] for line in said["lines"]} == {"sure", "likely", "guess"}
    assert all(line["why"] for line in said["lines"])


def test_what_cannot_be_imported_is_one_line_and_nothing_is_left(
    cli: Cli, foreign: Path, spec: Path, tmp_path: Path
) -> None:
    out = tmp_path / "spots.bundle"
    (tmp_path / "half.onnx").write_bytes(foreign.read_bytes()[:300])
    for model, text, code in (
        (tmp_path / "half.onnx", SPEC, 2),
        (tmp_path / "none.onnx", SPEC, 2),
        (foreign, SPEC.replace("heatmap", "heatmep"), 2),
        (foreign, SPEC.replace("[blue, red]", "[blue, red, green]").replace("0.05, 0.05", "0.05, 0.05, 0.05"), 2),
    ):
        spec.write_text(text)
        outcome = cli("import", model, "--spec", spec, "--out", out)
        assert outcome.code == code
        assert outcome.line.startswith("edgepose import: ")
        assert not out.exists()
    assert cli("inspect", tmp_path / "half.onnx").code == 2
    spec.write_text(SPEC)
    assert "the input itself" in cli("import", foreign, "--spec", spec, "--out", foreign).line


def test_a_full_disk(cli: Cli, foreign: Path, spec: Path, tmp_path: Path) -> None:
    with disk_of(1000):
        outcome = cli("import", foreign, "--spec", spec, "--out", tmp_path / "spots.bundle")
    assert outcome.code == 6
    assert not (tmp_path / "spots.bundle").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_imported_bundle_is_quantised_by_compile(
    cli: Cli, foreign: Path, spec: Path, photos: Path, tmp_path: Path
) -> None:
    source, out = tmp_path / "spots.bundle", tmp_path / "int8.bundle"
    assert cli("import", foreign, "--spec", spec, "--out", source).code == 0
    made = cli("compile", "ptq-int8", "--model", source, "--data", photos, "--out", out)
    assert made.code == 0
    assert "of MACs in INT8" in made.out
    assert {engine.precision for engine in read_bundle(out).manifest.engines} == {"int8"}
    assert cli("run", out, photos).code == 0
    assert cli("verify", out).out.count("answers as recorded") == 2
    again = cli("compile", "ptq-int8", "--model", source, "--data", photos, "--out", out)
    assert "nothing changed" in again.out
    refused = cli("compile", "qat-int8", "--model", source, "--data", photos, "--out", tmp_path / "qat.bundle")
    assert (refused.code, "mode: qat" in refused.line) == (2, True)
    dry = cli("compile", "ptq-int8", "--model", source, "--out", tmp_path / "dry.bundle", "--dry-run")
    assert (dry.code, "--dry-run" in dry.line) == (2, True)
    missing = cli("compile", "ptq-int8", "--model", source, "--out", tmp_path / "none.bundle")
    assert (missing.code, "add --data DIR" in missing.line) == (6, True)
