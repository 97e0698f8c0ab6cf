"""docs/compression.md is true: its commands parse, its recipe decodes, every field, rule and link is there."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
import typer

from benchmarks.readme import BEGIN, END, NOTHING
from edgepose.blocks.zoo import zoo_names
from edgepose.cli import VERBS, app_of
from edgepose.compiler import CompileRequest, planned_stages
from edgepose.recipe import MaxDrop, Prune, QuantisationAware, QuantiseAfterTraining, Recipe, load_recipe
from edgepose.strict_yaml import parse_yaml
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "compression.md"
TEXT = PAGE.read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def commands(program: str) -> list[list[str]]:
    lines = [shlex.split(line, comments=True) for line in "".join(blocks("sh")).splitlines()]
    return [words for words in lines if words and words[0] == program]


@pytest.mark.parametrize("words", commands("edgepose"), ids=" ".join)
def test_a_command_parses(words: list[str]) -> None:
    verb, arguments = words[1], words[2:]
    assert verb in VERBS
    command = typer.main.get_command(app_of(verb))
    if verb == "prune":
        command, arguments = command.commands[arguments[0]], arguments[1:]  # type: ignore[attr-defined]
    command.make_context(verb, arguments).close()
    for name in re.findall(r"\bkpe-[a-z]\b", " ".join(words)):
        assert name in zoo_names()


@pytest.mark.parametrize("words", commands("python"), ids=" ".join)
def test_a_benchmark_takes_these_flags(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    script = REPOSITORY / words[1]
    source = script.read_text(encoding="utf-8")
    for flag in [word for word in words if word.startswith("--")]:
        assert f'"{flag}"' in source


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    path = tmp_path / "small.yaml"
    path.write_text(block)
    recipe = load_recipe(str(path))
    assert recipe.max_drop_points == 1.5
    stages = dict(planned_stages(CompileRequest(recipe, "kpe-s", None, tmp_path / "small.bundle")))
    assert {"aim", "prune", "recover", "qat"} <= set(stages)


@pytest.mark.parametrize("kind", [Prune, QuantisationAware, MaxDrop, Recipe], ids=lambda kind: kind.__name__)
def test_every_field_is_explained(kind: type[msgspec.Struct]) -> None:
    spelt = "\n".join(re.findall(r"`([^`\n]+)`", TEXT)) + "\n".join(blocks("yaml"))
    absent = [field.name for field in msgspec.structs.fields(kind) if not re.search(rf"\b{field.name}\b", spelt)]
    assert absent == []


def test_small_pieces_of_recipes_decode() -> None:
    (ratios,) = re.findall(r"`(\{\"[^`]*\})`", TEXT)
    assert parse_yaml(f"ratios: {ratios}", Prune, source=PAGE.name).ratios
    (drop,) = re.findall(r"`max_drop: ([^`]*)`", TEXT)
    assert parse_yaml(f"mode: ptq\nmax_drop: {drop}", QuantiseAfterTraining, source=PAGE.name).max_drop == MaxDrop(0.5)
    (latency,) = re.findall(r"`(target_latency_ms: [\d.]+)`", TEXT)
    assert parse_yaml(latency, Prune, source=PAGE.name).target_latency_ms


def test_every_rule_is_named() -> None:
    from edgepose.compress.protected import CONSIDERED, PROTECTED, rules

    named = re.findall(r"`(\w+)`", TEXT)
    assert set(rules()) <= set(named)
    assert {entry.name for entry in PROTECTED} <= set(named)
    for layer in CONSIDERED:
        assert layer.name in TEXT.replace("\n", " ")


def test_files_that_it_names_and_links_to_exist() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, anchor = link.partition("#")
        target = (PAGE.parent / path).resolve() if path else PAGE
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads], link
    for name in re.findall(r"`((?:edgepose|profiles)/[\w/.-]+)`", TEXT):
        assert (REPOSITORY / name).exists(), name


def test_the_network_of_ones_own_is_what_its_spec_says() -> None:
    from edgepose.cli.factory import check_network, network_of

    (block,) = blocks("python")
    module = ModuleType("networks_of_the_page")
    exec(compile(block, str(PAGE), "exec"), module.__dict__)
    sys.modules[module.__name__] = module
    try:
        network = network_of(f"{module.__name__}:small")
        check_network("small", network)
    finally:
        del sys.modules[module.__name__]
    assert network.spec.keypoints.names == ("left_eye", "right_eye")


def test_figures_come_from_measuring_alone() -> None:
    """No figure stands outside the table that benchmarks/readme.py writes."""
    before, _, rest = TEXT.partition(BEGIN)
    held, _, after = rest.partition(END)
    assert held == NOTHING or held.startswith("| claim |")
    assert not re.findall(r"\d+(?:\.\d+)? (?:×|x faster|times (?:as fast|faster)|ms\b)", before + after)
