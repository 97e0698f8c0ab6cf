"""The JSON Schemas for editors are those of today's structs, and describe what the files may hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgepose import schemas
from edgepose.profiles import profiles_root
from edgepose.spec import Target


def test_written_schemas_are_current() -> None:
    assert schemas.stale_schemas(profiles_root() / "schemas") == (), "run python -m edgepose.schemas --write"


def test_changed_or_missing_schema_is_noticed_and_rewritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schemas, "profiles_root", lambda: tmp_path)
    names = set(schemas.schema_texts())
    assert schemas.main([]) == 1
    assert schemas.main(["--write"]) == 0
    assert {path.name for path in (tmp_path / "schemas").iterdir()} == names
    assert schemas.main([]) == 0
    changed = tmp_path / "schemas" / "target.json"
    changed.write_text(changed.read_text() + " ")
    capsys.readouterr()
    assert schemas.main([]) == 1
    assert "target.json: out of date" in capsys.readouterr().out


def test_every_property_of_a_target_is_described_and_closed() -> None:
    schema = json.loads(schemas.schema_texts()["target.json"])
    target = schema["$defs"]["Target"]
    assert set(target["properties"]) == set(Target.__struct_fields__)
    assert all(prop.get("description") for prop in target["properties"].values())
    assert target["additionalProperties"] is False
