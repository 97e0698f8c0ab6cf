"""`edgepose baseline` from the command line: accept, list, trend, and their exit codes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import msgspec
import pytest

from edgepose.profiler.gate.files import json_from_verdict
from edgepose.profiler.gate.verdict import Verdict
from tests.cli.conftest import Cli
from tests.profiler.verdicts import BAD, CONDITIONS, GOOD, accuracy, latency, size, verdict


def written(folder: Path, found: Verdict, name: str = "gate.json") -> Path:
    path = folder / name
    path.write_bytes(json_from_verdict(found))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def test_accept_then_list(cli: Cli, tmp_path: Path, store: Path) -> None:
    words = ("--branch", "main", "--commit", "abc", "--store", store)
    outcome = cli("baseline", "accept", written(tmp_path, GOOD), *words)
    assert outcome.code == 0
    assert "accepted after as the baseline of main on a-processor-at-2-ghz-eeeeeeee: 3 metrics" in outcome.out
    outcome = cli("baseline", "list", "--store", store, "--metric", "latency")
    assert outcome.code == 0
    assert "5.020 ms" in outcome.out
    assert "abc" in outcome.out
    found = json.loads(cli("baseline", "list", "--store", store, "--json").out)
    assert {one["metric"] for one in found} == {"latency", "accuracy pck_torso_0.2", "macs"}
    assert {one["points"] for one in found} == {1}


def test_many_small_steps_exit_with_the_code_of_what_crept(cli: Cli, tmp_path: Path, store: Path) -> None:
    for index in range(12):
        ratio = 1.0 + 0.015 * (index // 4)
        found = verdict(size(), accuracy(diff=0.0), latency(ratio=ratio))
        words = ("--branch", "main", "--commit", f"commit{index}", "--device", "box", "--store", store)
        assert cli("baseline", "accept", written(tmp_path, found), *words).code == 0
    outcome = cli("baseline", "trend", "--store", store)
    assert outcome.code == 4
    assert "main on box: creep: latency: 3.0 % worse than the reference" in outcome.out
    assert "commit4" in outcome.out
    assert cli("baseline", "trend", "--store", store, "--metric", "accuracy pck_torso_0.2").code == 0
    trends = json.loads(cli("baseline", "trend", "--store", store, "--metric", "latency", "--json").out)
    assert [step["commit"] for step in trends[0]["steps"]] == ["commit4", "commit8"]
    loose = tmp_path / "loose.yaml"
    loose.write_text("name: loose\ntrend: {creep_above: 0.2}\n")
    assert cli("baseline", "trend", "--store", store, "--rules", loose).code == 0


def test_a_failed_gate_is_not_accepted_without_a_reason(cli: Cli, tmp_path: Path, store: Path) -> None:
    words = ("--branch", "main", "--commit", "abc", "--store", store)
    outcome = cli("baseline", "accept", written(tmp_path, BAD), *words)
    assert outcome.code == 2
    assert "--note" in outcome.line
    assert not store.exists()
    assert cli("baseline", "accept", written(tmp_path, BAD), *words, "--note", "agreed").code == 0
    assert "agreed" in cli("baseline", "list", "--store", store).out


def test_figures_of_another_host_are_refused_by_name(cli: Cli, tmp_path: Path, store: Path) -> None:
    words = ("--branch", "main", "--commit", "abc", "--device", "box", "--store", store)
    assert cli("baseline", "accept", written(tmp_path, GOOD), *words).code == 0
    elsewhere = msgspec.structs.replace(GOOD, conditions=msgspec.structs.replace(CONDITIONS, host="f" * 64))
    outcome = cli("baseline", "accept", written(tmp_path, elsewhere), *words)
    assert outcome.code == 2
    assert "another host" in outcome.line
    words = ("--branch", "main", "--commit", "abd", "--device", "box", "--store", store)
    outcome = cli("baseline", "accept", written(tmp_path, elsewhere), *words, "--new-series")
    assert "2 of them in new series" in outcome.out


def test_the_commit_is_that_of_the_checkout(
    cli: Cli, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work"
    for words in (["init", "-q", str(work)], ["-C", str(work), "-c", "user.name=a", "-c", "user.email=a@b", "commit",
                  "-q", "--allow-empty", "-m", "first"]):  # fmt: skip
        subprocess.run(["git", *words], check=True)
    head = subprocess.run(["git", "-C", str(work), "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    gate = written(tmp_path, GOOD)
    monkeypatch.chdir(work)
    assert cli("baseline", "accept", gate, "--branch", "main", "--store", store).code == 0
    (first, *_) = json.loads(cli("baseline", "list", "--store", store, "--json").out)
    assert first["last"]["commit"] == head.stdout.strip()


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"verdict": "pass"}'])
def test_what_is_no_verdict_is_refused(cli: Cli, tmp_path: Path, store: Path, content: bytes) -> None:
    (tmp_path / "gate.json").write_bytes(content)
    outcome = cli("baseline", "accept", tmp_path / "gate.json", "--branch", "main", "--store", store)
    assert outcome.code == 2
    assert "gate --json" in outcome.line


def test_nothing_to_show_is_an_error_that_says_what_was_looked_for(cli: Cli, tmp_path: Path, store: Path) -> None:
    assert cli("baseline", "trend", "--store", store).code == 2
    accepted = ("--branch", "main", "--commit", "", "--store", store)
    assert cli("baseline", "accept", written(tmp_path, GOOD), *accepted).code == 0
    assert "nothing of next" in cli("baseline", "list", "--store", store, "--branch", "next").line
