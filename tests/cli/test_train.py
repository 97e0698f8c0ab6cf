"""`edgepose train`: a checkpoint with its lineage; a run that was stopped goes on, and nothing is overwritten."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from edgepose.blocks.card import read_card
from edgepose.blocks.checkpoint import load_checkpoint
from tests.cli.conftest import Cli, write_people

torch = pytest.importorskip("torch")


@pytest.fixture
def command(people: Path, tmp_path: Path, tiny_preset: str) -> list[object]:
    flags = ["--data", people, "--out", tmp_path / "net", "--batch-size", 6, "--workers", 0, "--threads", 1]
    return ["train", "--model", tiny_preset, *flags]


def test_training_writes_a_checkpoint_that_eval_understands(
    cli: Cli, command: list[object], people: Path, tmp_path: Path
) -> None:
    outcome = cli(*command, "--epochs", 2, "--seed", 3, "--learning-rate", "1e-3")
    assert outcome.code == 0
    assert "epoch 1 of 2: loss" in outcome.err
    assert "left" in outcome.err
    assert "net.safetensors: best epoch" in outcome.out
    card = read_card(tmp_path / "net")
    (entry,) = card.lineage
    assert (entry.stage, entry.config["epochs"], entry.config["seed"]) == ("train", 2, 3)
    assert set(entry.inputs) == {"train", "dev"}
    assert len(entry.report["curve"]) == 2
    assert card.metrics["dev"]["mpjpe_px"] > 0
    assert not (tmp_path / "net.state").exists()
    assert cli("eval", tmp_path / "net.safetensors", "--data", people).code == 0


def test_existing_checkpoint_is_kept_unless_forced(cli: Cli, command: list[object], tmp_path: Path) -> None:
    (tmp_path / "net.safetensors").write_text("precious")
    outcome = cli(*command, "--epochs", 1)
    assert outcome.code == 2
    assert "--force" in outcome.line
    assert (tmp_path / "net.safetensors").read_text() == "precious"
    assert cli(*command, "--epochs", 1, "--force").code == 0
    assert load_checkpoint(tmp_path / "net").card.name == "tiny"


def test_ctrl_c_saves_the_run_and_the_same_command_finishes_it(cli: Cli, command: list[object], tmp_path: Path) -> None:
    original = signal.getsignal(signal.SIGINT)

    def press_ctrl_c_while_training() -> None:
        deadline_s = time.monotonic() + 60
        while signal.getsignal(signal.SIGINT) is original and time.monotonic() < deadline_s:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press_ctrl_c_while_training, daemon=True).start()
    outcome = cli(*command, "--epochs", 8)
    assert outcome.code == 130
    assert f"the run is saved in {tmp_path / 'net.state'}: give the same command again" in outcome.err
    assert (tmp_path / "net.state").exists()
    assert not (tmp_path / "net.safetensors").exists()
    other = cli(*command, "--epochs", 7)
    assert other.code == 2
    assert "another run" in other.err or "other settings" in other.err
    outcome = cli(*command, "--epochs", 8)
    assert outcome.code == 0
    assert "resuming the run" in outcome.err
    assert len(read_card(tmp_path / "net").lineage[0].report["curve"]) == 8
    assert not (tmp_path / "net.state").exists()


def test_teacher_is_named_in_the_lineage(cli: Cli, command: list[object], people: Path, tmp_path: Path) -> None:
    assert cli(*command, "--epochs", 1).code == 0
    taught = [tmp_path / "taught" if word == tmp_path / "net" else word for word in command]
    assert cli(*taught, "--epochs", 1, "--distill-from", tmp_path / "net.safetensors").code == 0
    (entry,) = read_card(tmp_path / "taught").lineage
    assert entry.inputs["teacher"] == load_checkpoint(tmp_path / "net").digest
    assert entry.config["distill_weight"] == 0.5


def test_teacher_of_another_shape_is_refused(cli: Cli, command: list[object], people: Path, tmp_path: Path) -> None:
    assert cli(*command, "--epochs", 1, "--head", "heatmap").code == 0
    taught = [tmp_path / "taught" if word == tmp_path / "net" else word for word in command]
    outcome = cli(*taught, "--distill-from", tmp_path / "net.safetensors")
    assert outcome.code == 2
    assert "those of the student" in outcome.line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "kpe-m"], "expected one of kpe-t, kpe-s"),
        (["--head", "boxes"], "simcc or heatmap"),
        (["--epochs", 0], "--epochs"),
        (["--distill-from", "kpe-xl"], "no network of that name"),
    ],
)
def test_wrong_flags(cli: Cli, command: list[object], tmp_path: Path, flags: list[object], words: str) -> None:
    outcome = cli(*command, *flags)
    assert outcome.code == 2
    assert words in outcome.line
    assert not list(tmp_path.glob("net*"))


def test_missing_data_exits_6(cli: Cli, command: list[object], tmp_path: Path) -> None:
    assert cli(*command, "--data", tmp_path / "nowhere").code == 6


def test_too_few_people(cli: Cli, command: list[object], tmp_path: Path) -> None:
    write_people(tmp_path / "few", "train", 5)
    outcome = cli(*command, "--data", tmp_path / "few")
    assert outcome.code == 2
    assert "at least 20 people" in outcome.line
