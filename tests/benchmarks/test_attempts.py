"""The table of long runs: what it makes of records."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.attempts import OCCLUDED, main, table


def record(name: str, **more: Any) -> dict[str, Any]:
    figures = {"clean": [62.71, 60.0, 65.0], "occluded": [41.37, 39.0, 43.0], "hidden": [31.18, 29.0, 33.0]}
    return {"name": name, "what": "softmax", "visibility": {}, **figures, **more}


def test_a_run_is_shown_with_its_difference_and_what_it_says_of_visibility() -> None:
    said = {"auroc": [0.688, 0.67, 0.7], "ece": [0.091, 0.08, 0.1]}
    gain = {"clean": [0.08, -0.86, 1.05], OCCLUDED: [0.59, -0.17, 1.37]}
    found = table([record("orn", visibility=said, gain=gain, against="kpe-s")]).splitlines()
    shown = "| orn | softmax | 62.7 | 41.4 | 31.2 | 0.688 | 0.091 | +0.59 [-0.17, +1.37] (kpe-s) |"
    assert found[2] == shown


def test_a_run_that_says_nothing_of_visibility_stands_alone() -> None:
    assert table([record("kpe")]).splitlines()[2].endswith("| – | – | – |")
    assert len(table([]).splitlines()) == 2


def test_a_run_without_a_name_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["attempts.py", "orn-s", "--what", "more layers"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "--name" in capsys.readouterr().err


def test_weights_that_are_not_there_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["attempts.py", "orn-xl", "--name", "a", "--what", "b"])
    assert main() == 2
    assert "no network of that name" in capsys.readouterr().err
