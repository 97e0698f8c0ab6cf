"""Decoding YAML text strictly into frozen structs.

Invariant: a text either decodes completely into its struct or raises one RecipeError that names the file, the line, the
key path, what was expected and, for a misspelt key or value, what was probably meant. Nothing is ignored.

The YAML understood is the part of YAML 1.2 that means one thing only: no anchors, tags, merge keys, duplicate keys,
dates or yes/no booleans, and 1e-3 is a number (PyYAML by itself follows YAML 1.1, where it is text).
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
import msgspec.inspect
import yaml

from edgepose.errors import RecipeError

T = TypeVar("T")

KeyPath = tuple[str | int, ...]
"""Keys and list positions that lead from the top of a document to one value."""

_INTEGER = re.compile(r"[-+]?[0-9]{1,18}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_MESSAGE_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$(?P<path>.*)`)?$", re.DOTALL)
_PATH_STEP = re.compile(r"\.([^.\[]+)|\[([0-9]+|\.\.\.)\]")
_EXPECTED = re.compile(r"Expected (?P<expected>.*?)(?:, got `(?P<got>\w+)`)?$", re.DOTALL)

_PLAIN_NAMES = {
    "object": "a mapping (key: value)",
    "array": "a list",
    "str": "text",
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "null": "nothing",
    "|": "or",
}


def read_yaml(path: Path, struct: type[T]) -> T:
    """Decodes the YAML file at `path` into `struct`, a msgspec struct that forbids unknown fields.

    Raises:
        RecipeError: The file cannot be read, is not YAML of the kind described above, or does not fit `struct`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as err:
        raise RecipeError(str(path), found=err.strerror or "an unreadable file", fix="check the path") from err
    except UnicodeDecodeError as err:
        raise RecipeError(str(path), found="bytes that are not UTF-8 text", expected="a YAML file") from err
    return parse_yaml(text, struct, source=str(path))


def parse_yaml(text: str, struct: type[T], *, source: str) -> T:
    """Decodes YAML text into `struct`; `source` names it in errors.

    Raises:
        RecipeError: See read_yaml.
    """
    document = _Document(source, text)
    document.refuse_unknown(document.data, msgspec.inspect.type_info(struct), ())
    try:
        return msgspec.convert(document.data, struct)
    except msgspec.ValidationError as err:
        document.explain(str(err), err)


class _Document:
    """A parsed YAML text that remembers on which line each key stands.

    Attributes:
        data: The text as dicts, lists and scalars.
    """

    def __init__(self, source: str, text: str) -> None:
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        try:
            _refuse_aliases(source, text)
            node = yaml.compose(text, Loader=yaml.BaseLoader)
            self.data = self._value(node, ()) if node is not None else None
        except yaml.MarkedYAMLError as err:
            mark = err.problem_mark or err.context_mark
            line = f": line {mark.line + 1}" if mark else ""
            raise RecipeError(
                source + line, found=f"text that is not YAML ({err.problem})", fix="check the indentation and quotes"
            ) from err
        except yaml.YAMLError as err:
            raise RecipeError(source, found=f"text that is not YAML ({err})", expected="a YAML file") from err
        except RecursionError as err:
            raise RecipeError(source, found="a text nested too deeply", expected="a few levels") from err
        if node is None:
            raise RecipeError(source, found="an empty file", expected="a YAML mapping (key: value)")

    def fail(self, path: KeyPath, *, found: str, expected: str = "", fix: str = "") -> RecipeError:
        """The error for what stands at `path`."""
        where = self.source
        line = next((self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines), None)
        if line is not None:
            where += f": line {line}"
        if path:
            where += f": {_dotted(path)}"
        return RecipeError(where, found=found, expected=expected, fix=fix)

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if node.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
            raise self.fail(path, found=f"the YAML tag {node.tag}", expected="plain values", fix="remove the tag")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*path, position)) for position, item in enumerate(node.value)]
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.fail(path, found="a key that is a list or a mapping", expected="text")
            key = key_node.value
            here = (*path, key)
            if key in result:
                first = self.lines[here]
                self.lines[here] = key_node.start_mark.line + 1
                raise self.fail(here, found="the same key twice", expected=f"only the one of line {first}")
            self.lines[here] = key_node.start_mark.line + 1
            result[key] = self._value(value_node, here)
        return result

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> str | int | float | bool | None:
        text: str = node.value
        if node.style is not None:  # quoted or a block: text whatever it looks like
            return text
        if text in ("", "~", "null"):
            return None
        if text in ("true", "false"):
            return text == "true"
        if _INTEGER.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            number = float(text)
            if not math.isfinite(number):
                raise self.fail(path, found=text, expected="a number that a double can hold")
            return number
        return text

    def refuse_unknown(self, value: Any, kind: msgspec.inspect.Type, path: KeyPath) -> None:
        """Raises for unknown keys and unknown choices, which deserve a "did you mean"; msgspec checks the rest."""
        if isinstance(kind, msgspec.inspect.Metadata):
            kind = kind.type
        if isinstance(kind, msgspec.inspect.UnionType):
            self._refuse_unknown_in_union(value, kind, path)
        elif isinstance(kind, msgspec.inspect.StructType) and isinstance(value, dict):
            fields = {field.encode_name: field for field in kind.fields}
            tag_keys = () if kind.tag_field is None else (kind.tag_field,)
            for key, item in value.items():
                if key in fields:
                    self.refuse_unknown(item, fields[key].type, (*path, key))
                elif key not in tag_keys:
                    raise self._unknown_key(path, key, sorted((*fields, *tag_keys)))
        elif isinstance(kind, msgspec.inspect.LiteralType) and isinstance(value, (str, int, float)):
            self._refuse_unknown_choice(
                value, [choice for choice in kind.values if isinstance(choice, (str, int))], path
            )
        elif isinstance(kind, msgspec.inspect.CollectionType) and isinstance(value, list):
            for position, item in enumerate(value):
                self.refuse_unknown(item, kind.item_type, (*path, position))
        elif isinstance(kind, msgspec.inspect.DictType) and isinstance(value, dict):
            for key, item in value.items():
                self.refuse_unknown(item, kind.value_type, (*path, key))

    def _unknown_key(self, path: KeyPath, key: str, known: list[str]) -> RecipeError:
        return self.fail(
            (*path, key),
            found=f"the unknown key {key!r}",
            expected=f"one of {', '.join(known)}",
            fix=did_you_mean(key, known) or "remove it",
        )

    def _refuse_unknown_choice(self, value: Any, known: Iterable[str | int], path: KeyPath) -> None:
        if any(value == choice and type(value) is type(choice) for choice in known):
            return
        raise self.fail(
            path,
            found=_shown(value),
            expected=f"one of {', '.join(str(choice) for choice in known)}",
            fix=did_you_mean(str(value), [str(choice) for choice in known]),
        )

    def _refuse_unknown_in_union(self, value: Any, kind: msgspec.inspect.UnionType, path: KeyPath) -> None:
        structs = [member for member in kind.types if isinstance(member, msgspec.inspect.StructType)]
        if isinstance(value, dict) and structs:
            tag_field = structs[0].tag_field
            if tag_field is None:
                self.refuse_unknown(value, structs[0], path)
                return
            known = {member.tag: member for member in structs}
            if tag_field not in value:
                options = ", ".join(str(tag) for tag in known)
                raise self.fail(path, found=f"no key {tag_field!r}", expected=f"{tag_field}: one of {options}")
            self._refuse_unknown_choice(value[tag_field], tuple(str(tag) for tag in known), (*path, tag_field))
            self.refuse_unknown(value, known[value[tag_field]], path)
        else:
            checked: tuple[type[msgspec.inspect.Type], ...] = (msgspec.inspect.CollectionType, msgspec.inspect.DictType)
            if len([member for member in kind.types if not isinstance(member, msgspec.inspect.NoneType)]) == 1:
                checked += (msgspec.inspect.LiteralType,)
            for member in kind.types:
                if isinstance(member, checked):
                    self.refuse_unknown(value, member, path)

    def explain(self, message: str, err: Exception) -> NoReturn:
        """Raises msgspec's complaint with file, line, key path and the value that was found."""
        match = _MESSAGE_PATH.match(message)
        what, path = (match["what"], self._resolved(match["path"] or "")) if match else (message, ())
        if missing := re.fullmatch(r"Object missing required field `(.*)`", what):
            raise self.fail(path, found=f"no key {missing[1]!r}", fix=f"add a line '{missing[1]}: …'") from err
        if expected := _EXPECTED.fullmatch(what):
            wanted = " ".join(_PLAIN_NAMES.get(word, word) for word in expected["expected"].replace("`", "").split())
            quoted = wanted == "text" and expected["got"] in ("int", "float", "bool", "null")
            fix = "put it in quotes" if quoted else ""
            raise self.fail(path, found=_shown(self._at(path)), expected=wanted, fix=fix) from err
        raise self.fail(path, found=what) from err

    def _resolved(self, text: str) -> KeyPath:
        """msgspec's path ("prune.keep[2]") as keys; what it leaves open ("[...]", a key of a mapping) ends the path."""
        path: KeyPath = ()
        for key, position in _PATH_STEP.findall(text):
            if position == "...":
                break
            path = (*path, key or int(position))
        return path

    def _at(self, path: KeyPath) -> Any:
        value: Any = self.data
        for step in path:
            value = value[step]
        return value


def _refuse_aliases(source: str, text: str) -> None:
    """Aliases can make ten lines expand to gigabytes, and nothing here is long enough to need them."""
    for token in yaml.scan(text, Loader=yaml.BaseLoader):
        if isinstance(token, (yaml.AliasToken, yaml.AnchorToken)):
            raise RecipeError(
                f"{source}: line {token.start_mark.line + 1}",
                found=f"the YAML anchor or alias {token.value!r}",
                expected="plain values",
                fix="write the value out, or put the text in quotes",
            )


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (dict, list)):
        return f"a {'mapping' if isinstance(value, dict) else 'list'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _dotted(path: Iterable[str | int]) -> str:
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for a misspelt word, or empty text where nothing known resembles it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else ""
