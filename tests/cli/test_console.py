"""What is printed: bars on a terminal only, one line per step elsewhere, plain tables, colour where it is wanted."""

from __future__ import annotations

import io
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from edgepose.cli import console

REPOSITORY = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def become_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called by tests, not a fixture: pytest captures anew between set-up and call."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    return terminal


def test_steps_leave_one_line_each_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with console.steps() as progress:
        for done in range(1, 101):
            progress.told("reading", done, 100)
        for done in range(1, 4):
            progress.told("training", done, 3, f"loss {1 / done:.2f}")
            progress.told("training", done, 3, f"loss {1 / done:.2f}")
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == ["reading: done in 0.0 s", "training: done in 0.0 s, loss 0.33"]


def test_long_steps_say_how_much_is_left(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter([0.0, *(20.0 * tick for tick in range(1, 7))])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now_s))
    with console.steps() as progress:
        for done in range(1, 7):
            progress.told("training", done, 6)
    assert capfd.readouterr().err.splitlines() == [
        "training: 2 of 6, about 80 s left",
        "training: 4 of 6, about 40 s left",
        "training: done in 2 min",
    ]


def test_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_a_terminal(monkeypatch)
    with console.steps() as progress:
        assert progress.bar is not None
        progress.told("reading", 1, 2)
        progress.told("training", 1, 2, "loss 0.5")
    assert "━" in terminal.getvalue()
    assert "training" in terminal.getvalue()


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("GITHUB_ACTIONS", "true"), ("TERM", "dumb")])
def test_ci_gets_no_bar_even_with_a_terminal(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    become_a_terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    with console.steps() as progress:
        assert progress.bar is None


def test_colour_is_for_terminals_that_want_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = become_a_terminal(monkeypatch)
    console.show_facts({"a": "b"}, title="title")
    assert "\x1b[1m" in terminal.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.truncate(0)
    console.show_table(("name",), [("x",)], title="title")
    assert "\x1b[3" not in terminal.getvalue()


def test_tables_are_plain_text_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    rows = [("pck_torso_0.2", "54.40 %"), ("mpjpe_px", "9.87 px"), ("[bold]odd[/bold]", "–")]
    console.show_table(("metric", "value"), rows, title="figures")
    out, err = capfd.readouterr()
    assert err == ""
    assert [line.rstrip() for line in out.splitlines()] == [
        "figures",
        "metric              value",
        "pck_torso_0.2     54.40 %",
        "mpjpe_px          9.87 px",
        "[bold]odd[/bold]        –",
    ]


def test_long_cells_are_not_folded_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    console.show_facts({"digest": "a" * 64, "path": "b" * 70})
    assert len(capfd.readouterr().out.splitlines()) == 2


def test_json_goes_to_stdout_for_a_dash(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    console.write_json(Path("-"), {"a": [1]})
    console.write_json(tmp_path / "x.json", {"a": [1]})
    assert capfd.readouterr().out == (tmp_path / "x.json").read_text() == '{\n  "a": [\n    1\n  ]\n}\n'


def test_annotations_are_escaped() -> None:
    assert console.annotation("error", "a: b, c", "100 %\nmore") == "::error title=a%3A b%2C c::100 %25%0Amore"


@pytest.mark.parametrize(("seconds", "text"), [(0.44, "0.4 s"), (12.4, "12 s"), (150, "2 min"), (7500, "2 h 05 min")])
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_doctor_on_a_real_terminal_folds_to_its_width() -> None:
    main_end, program_end = pty.openpty()
    env = {**os.environ, "TERM": "xterm", "COLUMNS": "72"} | {"CI": "", "NO_COLOR": "1"}
    env.pop("GITHUB_ACTIONS", None)
    code = "from edgepose.cli.console import show_facts; show_facts({'name': 'word ' * 40})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=env, stdout=program_end)
    os.close(program_end)
    text = b""
    with open(main_end, "rb", buffering=0, closefd=True) as end:  # noqa: PTH123 - a descriptor, not a path
        try:
            while part := end.read(1000):
                text += part
        except OSError:  # the program has closed its end
            pass
    assert process.wait(timeout=60) == 0
    lines = text.decode().replace("\r", "").splitlines()
    assert len(lines) > 2
    assert max(map(len, lines)) <= 72
