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
    assert entry.report["people"] == {"train": 18, "dev": 2}
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
        (["--model", "kpe-x"], "expected one of kpe-t, kpe-s"),
        (["--model", "kpe-tt"], "did you mean 'kpe-t'"),
        (["--head", "boxes"], "simcc, heatmap, regression"),
        (["--backbone", "inverse"], "did you mean 'inverted'"),
        (["--input-size", 100], "a multiple of 32; try 96"),
        (["--head", "regression", "--refinements", 1], "behind a regression head"),
        (["--from", "kpe-xl"], "no network of that name"),
        (["--distill-weight", 0.3], "without a teacher"),
        (["--distill-weight", 0, "--distill-from", "kpe-t"], "who would teach nothing"),
        (["--rendered", "nowhere"], "a share of 0"),
        (["--settings", "absent.yaml"], "absent.yaml"),
        (["--images", 19], "18 photographs to train on, expected at least 19"),
        (["--epochs", 0], "--epochs"),
        (["--distill-from", "kpe-xl"], "no network of that name"),
    ],
)
def test_wrong_flags(cli: Cli, command: list[object], tmp_path: Path, flags: list[object], words: str) -> None:
    outcome = cli(*command, *flags)
    assert outcome.code == 2
    assert words in outcome.line
    assert not list(tmp_path.glob("net*"))


def other_out(command: list[object], out: Path) -> list[object]:
    return [out if str(word).endswith("net") else word for word in command]


def test_an_architecture_is_needed(cli: Cli, people: Path, tmp_path: Path) -> None:
    outcome = cli("train", "--data", people, "--out", tmp_path / "net")
    assert outcome.code == 2
    assert "--model, one of kpe-t" in outcome.line


def test_weights_are_carried_on_with_their_lineage(cli: Cli, command: list[object], tmp_path: Path) -> None:
    assert cli(*command, "--epochs", 1).code == 0
    flags = [word for word in other_out(command, tmp_path / "larger") if word not in ("--model", "tiny")]
    start = tmp_path / "net.safetensors"
    outcome = cli(*flags, "--epochs", 2, "--from", start, "--input-size", 64, "--freeze-epochs", 1)
    assert outcome.code == 0
    assert "from tiny: " in outcome.err
    card = read_card(tmp_path / "larger")
    assert card.architecture.input_hw == (64, 64)
    assert [entry.stage for entry in card.lineage] == ["train", "transfer", "train"]
    assert card.lineage[1].inputs == {"checkpoint": load_checkpoint(tmp_path / "net").digest}
    assert card.lineage[2].config["freeze_epochs"] == 1


def test_a_source_that_does_not_fit_is_refused(cli: Cli, command: list[object]) -> None:
    outcome = cli(*command, "--epochs", 1, "--from", "kpe-t")
    assert outcome.code == 2
    assert "of which nothing fits" in outcome.line


def test_settings_come_from_a_file_and_flags_win(cli: Cli, command: list[object], people: Path, tmp_path: Path) -> None:
    text = "epochs: 7\nlearning_rate: 0.01\naveraging: 0.5\nrendered: 0.5\naugment:\n  mirror: 0\nloss:\n  ohkm: 1\n"
    (tmp_path / "long.yaml").write_text(text)
    settings = ["--settings", tmp_path / "long.yaml", "--rendered", people]
    outcome = cli(*command, *settings, "--epochs", 1, "--images", 12, "--seed", 4)
    assert outcome.code == 0, outcome.err
    (entry,) = read_card(tmp_path / "net").lineage
    assert (entry.config["epochs"], entry.config["learning_rate"], entry.config["seed"]) == (1, 0.01, 4)
    assert (entry.config["augment"]["mirror"], entry.config["loss"]["ohkm"]) == (0, 1)
    assert entry.report["people"] == {"train": 12, "dev": 2, "rendered": 20}
    assert set(entry.inputs) == {"train", "dev", "rendered"}


def test_rendered_people_are_made_and_held_out_ones_calibrate(cli: Cli, people: Path, tmp_path: Path) -> None:
    photographs, rendered = tmp_path / "photographs", tmp_path / "rendered"
    assert cli("render", "--out", photographs, "--people", 24, "--held-out", 1).code == 0
    outcome = cli("render", "--out", rendered, "--people", 6, "--held-out", 3, "--seed", 1)
    assert outcome.code == 0
    assert "6 people in train.json, 3 of other textures in held_out.json" in outcome.out
    again = cli("render", "--out", rendered)
    assert again.code == 2
    assert "train.json and held_out.json there already" in again.line
    (tmp_path / "orn.yaml").write_text("epochs: 1\nbatch_size: 4\nrendered: 0.25\naugment: {occlusion: {}}\n")
    flags = ["--data", photographs, "--rendered", rendered, "--settings", tmp_path / "orn.yaml", "--input-size", 64]
    assert cli("train", "--model", "orn-s", *flags, "--workers", 0, "--out", tmp_path / "orn").code == 0
    (entry,) = read_card(tmp_path / "orn").lineage
    assert set(entry.inputs) == {"train", "dev", "rendered", "held_out"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: 3\nlearning_rat: 0.1\n", "did you mean 'learning_rate'"),
        ("epochs: 3\naugment:\n  miror: 0.1\n", "line 3: augment.miror"),
        ("epochs: 0\n", "epochs"),
        ("epochs: 3\ndistill_weight: 0.5\n", "without a teacher"),
        ("epochs: 3\nrendered: 0.25\n", "no folder and a share of 0.25"),
        ("epochs: 3\noptimizer: adam\n", "did you mean 'adamw'"),
    ],
)
def test_wrong_settings(cli: Cli, command: list[object], tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    outcome = cli(*command, "--settings", tmp_path / "bad.yaml")
    assert outcome.code == 2
    assert words in outcome.line


def test_head_backbone_and_stages_are_chosen(cli: Cli, command: list[object], tmp_path: Path) -> None:
    assert cli(*command, "--epochs", 1, "--head", "heatmap", "--backbone", "inverted", "--refinements", 1).code == 0
    found = read_card(tmp_path / "net").architecture
    assert (found.head, found.backbone, found.refinements) == ("heatmap", "inverted", 1)


def test_missing_data_exits_6(cli: Cli, command: list[object], tmp_path: Path) -> None:
    assert cli(*command, "--data", tmp_path / "nowhere").code == 6


def test_too_few_people(cli: Cli, command: list[object], tmp_path: Path) -> None:
    write_people(tmp_path / "few", "train", 5)
    outcome = cli(*command, "--data", tmp_path / "few")
    assert outcome.code == 2
    assert "at least 20 people" in outcome.line


# The control arm of a recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    text = "name: small\ndescription: d\nprune: {ratio: 0.3, epochs: 2, steps: 2}\nquantise: {mode: qat, epochs: 1}\n"
    (tmp_path / "small.yaml").write_text(text)
    return tmp_path / "small.yaml"


def test_a_recipes_control_is_trained_by_one_command(
    cli: Cli, command: list[object], people: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    assert cli(*command, "--epochs", 1).code == 0
    flags = ["--data", people, "--out", tmp_path / "control", "--workers", 0, "--threads", 1]
    outcome = cli("train", "--from", tmp_path / "net", "--control-of", recipe, *flags)
    assert outcome.code == 0
    assert "control.safetensors: 3 epochs in 3 phases, on dev" in outcome.out
    lineage = read_card(tmp_path / "control").lineage
    assert [(entry.stage, entry.config["epochs"]) for entry in lineage] == [("train", 1)] * 4
    assert lineage[1].inputs["teacher"] == lineage[1].inputs["checkpoint"] == read_card(tmp_path / "net").weights_sha256
    taken = cli("train", "--from", tmp_path / "net", "--control-of", recipe, *flags)
    assert taken.code == 2
    assert "--force" in taken.line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", 3], "--epochs: found given beside --control-of"),
        (["--distill-from", "kpe-t"], "--distill-from: found given beside --control-of"),
        ([], "--control-of: found no network, expected --from"),
    ],
)
def test_flags_that_the_recipe_decides_are_refused(
    cli: Cli, people: Path, recipe: Path, tmp_path: Path, flags: list[object], words: str
) -> None:
    outcome = cli("train", "--data", people, "--out", tmp_path / "control", "--control-of", recipe, *flags)
    assert outcome.code == 2
    assert words in outcome.line


def test_a_recipe_without_training_has_no_control(cli: Cli, people: Path, tmp_path: Path) -> None:
    flags = ["--data", people, "--out", tmp_path / "control", "--from", "kpe-t"]
    outcome = cli("train", "--control-of", "ptq-int8", *flags)
    assert outcome.code == 2
    assert "a recipe without fine-tuning" in outcome.line
