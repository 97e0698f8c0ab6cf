"""The program as a whole: help at once, one line per error, published exit codes."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from edgepose import __version__, errors
from edgepose.__main__ import main
from edgepose.cli import VERBS, Verb, app_of
from edgepose.errors import EdgeposeError
from tests.cli.conftest import Cli

REPOSITORY = Path(__file__).resolve().parents[2]
WRITTEN = [verb for verb, entry in VERBS.items() if find_spec(f"edgepose.cli.{entry.module}") is not None]


def leaves(kind: type[EdgeposeError]) -> list[type[EdgeposeError]]:
    return [kind, *(leaf for child in kind.__subclasses__() for leaf in leaves(child))]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A verb `fail` that raises what it is told to."""

    def install(err: BaseException) -> None:
        module = ModuleType("edgepose.cli.failing")

        def fail() -> None:
            """Fail."""
            raise err

        module.__dict__.update(EXAMPLES=("edgepose fail",), fail=fail)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(VERBS, "fail", Verb("failing", "fail", "fails"))

    return install


# Help


def test_all_verbs_of_the_design_are_there() -> None:
    promised = "demo train compile build run eval profile gate report inspect verify doctor"
    assert set(VERBS) >= set(promised.split())


def test_overview_names_every_verb_and_loads_nothing() -> None:
    code = (
        "import sys; from edgepose.__main__ import main; code = main(['--help'])\n"
        "heavy = {'numpy', 'cv2', 'torch', 'onnxruntime', 'typer', 'rich', 'msgspec'} & set(sys.modules)\n"
        "sys.exit(code or f'loaded {heavy}' if heavy else code)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for verb, entry in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(entry.summary)}$", result.stdout, re.MULTILINE)


def test_overview_costs_less_than_a_fifth_of_a_second() -> None:
    # CPU time, best of three: the machine may be busy with other work.
    code = "import os; from edgepose.__main__ import main; main(['--help']); t = os.times(); print(t.user + t.system)"
    seconds = []
    for _ in range(3):
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        seconds.append(float(result.stdout.splitlines()[-1]))
    assert min(seconds) < 0.2


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_overview_is_what_no_verb_gives(cli: Cli, words: list[str]) -> None:
    outcome = cli(*words)
    assert outcome.code == 0
    assert "usage: edgepose VERB" in outcome.out
    assert "130 interrupted" in outcome.out


def test_version(cli: Cli) -> None:
    assert cli("--version").out == f"edgepose {__version__}\n"


@pytest.mark.parametrize("verb", WRITTEN)
def test_help_of_a_verb_has_examples_and_explains_every_flag(cli: Cli, verb: str) -> None:
    outcome = cli(verb, "--help")
    assert outcome.code == 0
    assert "Examples:" in outcome.out
    assert outcome.err == ""
    command: Any = typer.main.get_command(app_of(verb))
    for parameter in command.params:
        assert parameter.help, f"{parameter.name} has no help"
        for flag in parameter.opts:
            assert not flag.startswith("--") or re.fullmatch(r"--[a-z]+(-[a-z]+)*", flag)


@pytest.mark.parametrize("verb", WRITTEN)
def test_examples_of_a_verb_parse(verb: str) -> None:
    command: Any = typer.main.get_command(app_of(verb))
    module = sys.modules[f"edgepose.cli.{VERBS[verb].module}"]
    for example in module.EXAMPLES:
        program, name, *words = example.split()
        assert (program, name) == ("edgepose", verb)
        command.make_context(name, words).close()


# Errors


def test_unknown_verb_and_flag(cli: Cli) -> None:
    outcome = cli("verfy", "x")
    assert outcome.code == 2
    assert (
        outcome.line
        == "edgepose: command line: found the unknown verb 'verfy', expected a verb; did you mean 'verify'?"
    )
    assert cli("--verbose").code == 2


def test_missing_argument_is_a_usage_error(cli: Cli) -> None:
    outcome = cli("run")
    assert outcome.code == 2
    assert outcome.line == "edgepose run: Missing argument 'BUNDLE'; see edgepose run --help"


PUBLISHED = {
    "EdgeposeError": 1, "BadInput": 2, "AccuracyRegression": 3, "LatencyRegression": 4, "ParityError": 5,
    "EnvironmentFault": 6, "Inconclusive": 7, "IntegrityError": 8,
}  # fmt: skip
TREE = [kind for kind in leaves(EdgeposeError) if kind.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_every_error_ends_with_its_exit_code_and_one_line(cli: Cli, failing: Any, kind: type[EdgeposeError]) -> None:
    made = (
        errors.MissingDependency("torch", extra="compile", needed_for="training")
        if kind is errors.MissingDependency
        else kind("here", found="this\nand that", expected="something else", fix="change it")
    )
    failing(made)
    outcome = cli("fail")
    assert outcome.code == next(PUBLISHED[base.__name__] for base in kind.__mro__ if base.__name__ in PUBLISHED)
    assert outcome.line == f"edgepose fail: {made}"


def test_unexpected_error_is_one_line_that_says_how_to_see_more(cli: Cli, failing: Any) -> None:
    failing(KeyError("nose"))
    outcome = cli("fail")
    assert outcome.code == 1
    assert "KeyError: 'nose'" in outcome.line
    assert "--debug" in outcome.line


def test_debug_shows_where(cli: Cli, failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(KeyError("nose"))
    assert "Traceback" in cli("--debug", "fail").err
    assert "Traceback" in cli("fail", "--debug").err
    monkeypatch.setenv("EDGEPOSE_DEBUG", "1")
    assert "Traceback" in cli("fail").err


@pytest.mark.parametrize(
    ("err", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out.json"), "writing out.json: found no space left"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS), "out.json"), "read-only"),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "memory"),
        (MemoryError(), "memory: found too little of it"),
    ],
)
def test_faults_of_the_machine_exit_6(cli: Cli, failing: Any, err: Exception, words: str) -> None:
    failing(err)
    outcome = cli("fail")
    assert outcome.code == 6
    assert words in outcome.line


def test_ctrl_c_exits_130_with_one_line(cli: Cli, failing: Any) -> None:
    failing(KeyboardInterrupt())
    outcome = cli("fail")
    assert outcome.code == 130
    assert outcome.line.startswith("edgepose fail: interrupted")


def test_reader_that_leaves_early_is_no_error() -> None:
    # The pipe is closed before the program writes; Python would otherwise complain at its end.
    code = "import sys, time; time.sleep(0.3); from edgepose.__main__ import main; sys.exit(main([]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_errors_become_annotations_in_github_actions(cli: Cli, failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(errors.ImageError("photo: 1", found="50 %", expected="all"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    line, annotation = cli("fail").err.splitlines()
    assert line == "edgepose fail: photo: 1: found 50 %, expected all"
    assert annotation == "::error title=edgepose fail::photo: 1: found 50 %25, expected all"


def test_main_reads_the_command_line_of_the_process(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["edgepose", "--version"])
    assert main() == 0
    assert capfd.readouterr().out == f"edgepose {__version__}\n"
