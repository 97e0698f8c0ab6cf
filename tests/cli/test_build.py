"""`edgepose build` through the program: what it says, and its exit codes."""

from __future__ import annotations

from pathlib import Path

from edgepose.bundle import read_bundle
from tests.cli.conftest import Cli, disk_of
from tests.tiny_network import flip_a_byte


def test_build_says_what_it_made_and_what_it_found(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    flags = ["build", bundle, "--target", "x86-cpu", "--target", "this-cpu", "--out", tmp_path / "new.bundle"]
    outcome = cli(*flags)
    assert outcome.code == 0
    assert "engine-openvino" in outcome.out
    assert "written" in outcome.out
    assert {engine.target for engine in read_bundle(tmp_path / "new.bundle").manifest.engines} == {
        "x86-cpu",
        "this-cpu",
    }
    again = cli(*flags)
    assert again.code == 0
    assert "nothing changed" in again.out
    assert "ran," not in again.out
    assert cli("verify", tmp_path / "new.bundle").out.count("answers as recorded") == 4


def test_build_without_a_target(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    outcome = cli("build", bundle, "--out", tmp_path / "new.bundle")
    assert outcome.code == 2
    assert "--target" in outcome.line


def test_build_for_tensorrt_alone(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    outcome = cli("build", bundle, "--target", "jetson-orin-nano", "--out", tmp_path / "new.bundle")
    assert outcome.code == 6
    assert "doctor" in outcome.line
    assert not (tmp_path / "new.bundle").exists()


def test_build_from_a_changed_bundle(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    flip_a_byte(bundle / "model.onnx")
    outcome = cli("build", bundle, "--target", "this-cpu", "--out", tmp_path / "new.bundle")
    assert outcome.code == 8
    assert "model.onnx" in outcome.line


def test_build_on_a_full_disk_leaves_nothing(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    cli("build", bundle, "--target", "this-cpu", "--out", tmp_path / "first.bundle")
    with disk_of(1000):
        outcome = cli("build", bundle, "--target", "this-cpu", "--out", tmp_path / "new.bundle")
    assert outcome.code == 6
    assert "no space" in outcome.line or "limit on the size" in outcome.line
    assert not (tmp_path / "new.bundle").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
