"""docs/engines.md and docs/import.md are true: commands parse, YAML decodes, every field, rule and target is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from edgepose.cli import VERBS, app_of
from edgepose.export.trt_lint import _WORDS, RULES
from edgepose.importer.spec import parse_spec
from edgepose.profiles import load_target, profile_names
from edgepose.runtime.tensorrt import TRUSTED_KEYS
from edgepose.spec import Execution, OpenvinoOptions, OrtOptions, TensorrtBuild, TensorrtExecution
from tests.conftest import REPOSITORY

ENGINES = (REPOSITORY / "docs" / "engines.md").read_text(encoding="utf-8")
IMPORT = (REPOSITORY / "docs" / "import.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in "".join(blocks(text, "sh")).splitlines()]
    return [words for words in lines if words]


@pytest.mark.parametrize("words", commands(ENGINES) + commands(IMPORT), ids=" ".join)
def test_a_command_parses(words: list[str]) -> None:
    assert words[0] == "edgepose"
    assert words[1] in VERBS
    typer.main.get_command(app_of(words[1])).make_context(words[1], words[2:]).close()


def test_the_board_decodes_and_every_field_is_there(tmp_path: Path) -> None:
    (board,) = blocks(ENGINES, "yaml")
    (tmp_path / "board.yaml").write_text(board, encoding="utf-8")
    target = load_target(str(tmp_path / "board.yaml"))
    assert (target.name, target.threads, target.execution.affinity) == ("my-board", 2, "pinned")
    for struct in (TensorrtBuild, TensorrtExecution, OpenvinoOptions, Execution, OrtOptions):
        for name in struct.__struct_fields__:
            if name != "spinning":  # ruinous beside other work, and said where it is defined
                assert name in ENGINES, f"{struct.__name__}.{name} is not described"


def test_the_rules_are_those_of_the_lint() -> None:
    rows = dict(re.findall(r"^\| `([a-z-]+)` \| (.*) \|$", ENGINES, re.MULTILINE))
    assert rows.keys() >= set(RULES)
    for rule in RULES:
        assert rows[rule].startswith("a warning") == (_WORDS[rule].severity == "warning")


def test_targets_and_the_variable_exist() -> None:
    named = re.search(r"`profiles/targets` has (.*?)…", ENGINES, re.DOTALL)
    assert named is not None
    assert set(re.findall(r"`([a-z0-9-]+)`", named[1])) <= set(profile_names("targets"))
    assert f"`{TRUSTED_KEYS}`" in ENGINES


@pytest.mark.parametrize("text", blocks(IMPORT, "yaml"), ids=lambda text: text.split()[1])
def test_a_specification_decodes(text: str) -> None:
    assert parse_spec(text).name in text


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#]+)", ENGINES + IMPORT))))
def test_a_link_leads_somewhere(link: str) -> None:
    assert (REPOSITORY / "docs" / link).exists()
