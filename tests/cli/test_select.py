"""`select`, and the choice that `run` makes by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Cli


def test_select_shows_what_run_goes_by_from_then_on(cli: Cli, bundle: Path, photo: Path) -> None:
    only = ("--backend", "onnxruntime", "--threads", "1")
    outcome = cli("select", bundle, *only, "--json")
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)
    assert found["aim"] == "latency"
    (trial,) = found["trials"]
    assert (trial["backend"], trial["threads"], trial["fault"]) == ("onnxruntime", 1, "")
    assert trial["ms"] > 0
    outcome = cli("select", bundle, *only)
    assert outcome.code == 0
    assert "chosen" in outcome.out
    assert "the only one that serves" in outcome.err


def test_run_chooses_for_an_aim_and_says_why(cli: Cli, bundle: Path, photo: Path) -> None:
    outcome = cli("run", bundle, photo, "--backend", "onnxruntime", "--aim", "memory")
    assert outcome.code == 0
    assert "settings measured for memory" in outcome.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("select", "--aim", "speed"), "--aim: found 'speed', expected latency, throughput, memory, energy or none"),
        (("select", "--aim", "none"), "leave this command out instead"),
        (("run", "PHOTO", "--aim", "speed"), "--aim: found 'speed'"),
    ],
)
def test_an_aim_that_is_none_is_refused(cli: Cli, bundle: Path, photo: Path, words: tuple[str, ...], said: str) -> None:
    verb, *rest = words
    outcome = cli(verb, bundle, *(photo if word == "PHOTO" else word for word in rest))
    assert outcome.code == 2
    assert said in outcome.line


def test_an_unknown_aim_of_the_environment_is_named(
    cli: Cli, bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPOSE_AIM", "speed")
    assert "$EDGEPOSE_AIM: found 'speed'" in cli("run", bundle, photo).line
