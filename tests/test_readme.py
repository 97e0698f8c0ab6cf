"""The README is true: its commands parse, the files it names exist, its Python runs.

Every recipe that it may name is compiled in tests/test_compiler.py.
"""

from __future__ import annotations

import re
import shlex
import shutil
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import pytest
import typer

from edgepose.blocks.config import PRESETS
from edgepose.blocks.zoo import zoo_names
from edgepose.cli import VERBS, app_of
from edgepose.profiles import profile_names
from tests.tiny_checkpoint import Compiled, Tiny

REPOSITORY = Path(__file__).resolve().parents[1]
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    """The command lines of the shell blocks that start `program`, as words, comments left out."""
    lines = "".join(blocks("sh")).replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words and words[0] == program]


def inline() -> list[list[str]]:
    """`edgepose …` in running text; capitals there stand for what the reader puts in."""
    return [text.split() for text in re.findall(r"`(edgepose [^`\n]+)`", README)]


def command_of(verb: str) -> Any:
    return typer.main.get_command(app_of(verb))


def test_the_readme_opens_with_the_two_commands_that_set_everything_up() -> None:
    first = blocks("sh")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


@pytest.mark.parametrize("words", commands("edgepose"), ids=" ".join)
def test_a_command_parses(words: list[str]) -> None:
    verb, arguments = words[1], words[2:]
    assert verb in VERBS
    # Parses every flag and value, and runs nothing.
    command_of(verb).make_context(verb, arguments)


@pytest.mark.parametrize("words", commands("edgepose"), ids=" ".join)
def test_recipes_targets_and_networks_that_a_command_names_exist(words: list[str]) -> None:
    values = dict(pairwise(words))
    if words[1] == "compile" and not words[2].endswith(".yaml"):
        assert words[2] in profile_names("recipes")
    if "/" not in values.get("--model", "/"):
        assert values["--model"] in {*PRESETS, *zoo_names()}
    if "/" not in values.get("--target", "/"):
        assert values["--target"] in profile_names("targets")


@pytest.mark.parametrize("words", inline(), ids=" ".join)
def test_verbs_and_flags_in_running_text_exist(words: list[str]) -> None:
    verb = words[1]
    if verb.isupper() or verb.startswith("-"):
        return
    assert verb in VERBS
    known = {option for parameter in command_of(verb).params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known | {"--help"}


def test_what_make_and_pip_are_asked_for_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    asked = [words[1] for words in commands("make")] + re.findall(r"`make ([a-z-]+)", README)
    assert asked
    assert set(asked) <= targets
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name.strip() for group in re.findall(r"edgepose\[([a-z, -]+)\]", README) for name in group.split(",")}
    assert named <= set(extras)


def test_files_that_the_readme_links_to_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    missing = [link for link in links if not (REPOSITORY / link).exists()]
    assert missing == []


def test_the_python_block_runs(
    tiny: Tiny, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = blocks("python")
    (bundle,) = set(re.findall(r'"([^"]+\.bundle)"', block))
    (photo,) = set(re.findall(r'"([^"]+\.jpg)"', block))
    shutil.copytree(compiled("ptq-int8").bundle.root, tmp_path / bundle)
    source = cv2.imread(str(next(tiny.data.glob("images/*.jpg"))))
    cv2.imwrite(str(tmp_path / photo), cv2.resize(source, (320, 400)))
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})
    (printed,) = capsys.readouterr().out.splitlines()
    promised = re.search(r"print\(.*# (\([\d, ]+\)).*, (\([\d, ]+\))$", block, re.MULTILINE)
    assert promised is not None
    assert printed == " ".join(promised.groups())
