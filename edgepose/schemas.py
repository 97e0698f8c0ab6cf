"""JSON Schemas of recipes, targets, gate rules, training settings and foreign networks, which editors check YAML by.

Invariant: the schemas are generated from the structs that decode the files; a test fails while the files differ.

    python -m edgepose.schemas --write
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import msgspec

from edgepose.importer.spec import ImportSpec
from edgepose.profiler.gate.rules import GateRules
from edgepose.profiles import profiles_root
from edgepose.recipe import Recipe
from edgepose.spec import Target
from edgepose.storage import atomic_write
from edgepose.training.config import TrainConfig

STRUCTS: dict[str, Any] = {
    "gate": GateRules,
    "import": ImportSpec,
    "recipe": Recipe,
    "target": Target,
    "training": TrainConfig,
}


def schema_texts() -> dict[str, bytes]:
    """The schemas as JSON, by file name."""
    texts = {}
    for name, struct in STRUCTS.items():
        schema: dict[str, Any] = {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": f"edgepose {name}",
        }
        schema |= msgspec.json.schema(struct)
        for definition in schema["$defs"].values():
            _describe(definition)
        texts[f"{name}.json"] = msgspec.json.format(msgspec.json.encode(schema), indent=2) + b"\n"
    return texts


def _describe(definition: dict[str, Any]) -> None:
    """Moves what a struct's docstring says of each attribute to that property, where editors show it."""
    summary, _, attributes = inspect.cleandoc(definition.get("description", "")).partition("\nAttributes:\n")
    definition["description"] = " ".join(summary.split())
    for name, text in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", attributes, re.MULTILINE):
        definition["properties"][name]["description"] = " ".join(text.split())


def stale_schemas(folder: Path) -> tuple[str, ...]:
    """Names of the schema files in `folder` that are missing or differ from what the structs say today."""
    return tuple(
        name
        for name, text in schema_texts().items()
        if not (folder / name).is_file() or (folder / name).read_bytes() != text
    )


def main(arguments: list[str] | None = None) -> int:
    """Writes the schemas, or says which are out of date (exit 1)."""
    parser = argparse.ArgumentParser(prog="python -m edgepose.schemas", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the files instead of checking them")
    write = parser.parse_args(arguments).write
    folder = profiles_root() / "schemas"
    stale = stale_schemas(folder)
    for name in stale:
        if write:
            atomic_write(folder / name, schema_texts()[name])
        print(f"{folder / name}: {'written' if write else 'out of date; run python -m edgepose.schemas --write'}")
    return 1 if stale and not write else 0


if __name__ == "__main__":
    sys.exit(main())
