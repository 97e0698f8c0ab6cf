"""Strict YAML: what is accepted, and what each kind of mistake is answered with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from edgepose.errors import RecipeError
from edgepose.strict_yaml import did_you_mean, parse_yaml, read_yaml


class Circle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="shape", tag="circle"):
    radius: Annotated[float, msgspec.Meta(gt=0)]


class Box(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="shape", tag="box"):
    width: float
    sides: tuple[int, ...] = ()


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    colour: Literal["red", "green"] = "red"
    bits: Literal[7, 8, "auto"] = "auto"
    rate: float = 0.1


class Outer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    inner: Inner | None = None
    many: tuple[Inner, ...] = ()
    figure: Circle | Box | None = None
    table: dict[str, float] = {}
    flag: bool = False


def read(text: str) -> Outer:
    return parse_yaml(text, Outer, source="my.yaml")


def refusal(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        read(text)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("my.yaml")
    return message


def test_every_kind_of_value_is_read() -> None:
    text = """
    name: "8.7"
    flag: true
    inner: {colour: green, bits: 7, rate: 1e-3}
    many:
      - bits: auto
      - rate: .5
    figure: {shape: circle, radius: 2}
    table: {a: -1, b: 2.5E2}
    """
    assert read(text) == Outer(
        name="8.7",
        flag=True,
        inner=Inner("green", 7, 0.001),
        many=(Inner(bits="auto"), Inner(rate=0.5)),
        figure=Circle(2.0),
        table={"a": -1.0, "b": 250.0},
    )


def test_absent_and_empty_optional_parts_are_nothing() -> None:
    assert read("name: x\ninner:\n") == read("name: x\ninner: null\n") == read("name: x\n") == Outer("x")


@pytest.mark.parametrize("word", ["yes", "no", "on", "off", "True", "2024-01-01", "0x10", "1_000", ".nan", "1:30"])
def test_words_that_yaml_1_1_would_turn_into_something_else_stay_text(word: str) -> None:
    assert read(f"name: {word}").name == word


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: x\nflagg: true\n", ["line 2: flagg", "unknown key 'flagg'", "did you mean 'flag'?"]),
        ("name: x\ninner:\n  rate: 1\n  color: red\n", ["line 4: inner.color", "did you mean 'colour'?"]),
        ("name: x\nmany:\n  - {}\n  - {zzz: 1}\n", ["line 4: many[1].zzz", "unknown key 'zzz'", "remove it"]),
        ("name: x\ninner: {colour: gren}\n", ["inner.colour", "'gren'", "one of green, red", "did you mean 'green'?"]),
        ("name: x\ninner: {bits: 9}\n", ["inner.bits", "found 9", "one of 7, 8, auto"]),
        ("name: x\ninner: {bits: '7'}\n", ["inner.bits", "found '7'", "one of 7, 8, auto"]),
        ("name: x\ninner: {bits: true}\n", ["inner.bits", "found true"]),
        ("name: x\ninner: {rate: fast}\n", ["line 2: inner.rate", "found 'fast'", "a number"]),
        ("name: x\ninner: 3\n", ["line 2: inner", "found 3", "a mapping"]),
        ("name: x\nmany: {}\n", ["many", "a mapping of 0", "a list"]),
        ("name: x\nflag: yes\n", ["flag", "'yes'", "true or false"]),
        ("name: 8.7\n", ["name", "found 8.7", "expected text", "put it in quotes"]),
        ("flag: true\n", ["line 1", "no key 'name'"]),
        ("name: x\nfigure: {shape: circle, radius: 0}\n", ["figure.radius", "found 0", "> 0"]),
        ("name: x\nfigure: {shape: circel, radius: 1}\n", ["figure.shape", "did you mean 'circle'?"]),
        ("name: x\nfigure: {radius: 1}\n", ["figure", "no key 'shape'", "circle, box"]),
        ("name: x\nfigure: {shape: box, width: 1, radius: 1}\n", ["figure.radius", "one of shape, sides, width"]),
        (
            "name: x\nfigure: {shape: box, width: 1, sides: [1, 2.5]}\n",
            ["figure.sides[1]", "found 2.5", "whole number"],
        ),
        ("name: x\ntable: {a: b}\n", ["line 2: table", "a number"]),
        ("name: x\ninner: {rate: 1e999}\n", ["inner.rate", "1e999"]),
        ("name: x\nname: y\n", ["line 2: name", "the same key twice", "line 1"]),
        ("[1, 2]\n", ["line 1", "a list of 2", "a mapping"]),
        ("just text\n", ["'just text'", "a mapping"]),
        ("", ["an empty file"]),
        ("# only a comment\n", ["an empty file"]),
        ("name: [\n", ["line 2", "not YAML"]),
        ("name: x\n\tflag: true\n", ["line 2", "not YAML"]),
        ("name: x\n---\nname: y\n", ["line 2", "not YAML"]),
        ("name: &a x\n", ["line 1", "anchor", "'a'"]),
        ("name: *a\n", ["line 1", "alias", "'a'"]),
        ("name: !!python/object/apply:os.system [id]\n", ["line 1: name", "tag"]),
        ("name: !thing x\n", ["line 1: name", "the YAML tag !thing"]),
        ("? [a, b]\n: x\n", ["a key that is a list"]),
        ("name: x\x07\n", ["not YAML"]),
        ("[" * 1200, ["nested too deeply"]),
    ],
)
def test_mistake_is_answered_with_place_and_remedy(text: str, parts: list[str]) -> None:
    message = refusal(text)
    for part in parts:
        assert part in message


def test_aliases_cannot_blow_a_file_up() -> None:
    bomb = "a: &a [x, x]\n" + "".join(f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True))
    assert "anchor" in refusal(bomb)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("name: käse".encode("latin-1"))
    for path, part in ((latin, "UTF-8"), (tmp_path / "absent.yaml", "No such file"), (tmp_path, "directory")):
        with pytest.raises(RecipeError, match=part) as caught:
            read_yaml(path, Outer)
        assert str(path) in str(caught.value)


def test_a_hint_is_given_only_for_words_that_resemble_one() -> None:
    assert did_you_mean("importence", ["importance", "ratio"]) == "did you mean 'importance'?"
    assert did_you_mean("xyz", ["importance", "ratio"]) == ""


@given(
    st.builds(
        Outer,
        name=st.text(st.characters(min_codepoint=32, max_codepoint=0x2000, exclude_categories=["C"])),
        inner=st.none() | st.builds(Inner, rate=st.floats(allow_nan=False, allow_infinity=False)),
        many=st.lists(st.builds(Inner, bits=st.sampled_from([7, 8, "auto"])), max_size=3).map(tuple),
        figure=st.none() | st.builds(Circle, radius=st.floats(1e-9, 1e9)),
        table=st.dictionaries(st.text("ab ", min_size=1), st.floats(-1e300, 1e300)),
        flag=st.booleans(),
    )
)
def test_what_is_written_as_json_or_by_pyyaml_reads_back_equal(value: Outer) -> None:
    assert read(msgspec.json.encode(value).decode()) == value
    text = yaml.safe_dump(msgspec.to_builtins(value), allow_unicode=True, default_style='"')
    texts_only = msgspec.convert(yaml.load(text, Loader=yaml.BaseLoader)["name"], str)
    assert texts_only == value.name
    assert read(yaml.safe_dump(msgspec.to_builtins(value), allow_unicode=True)) == value
