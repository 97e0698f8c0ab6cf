"""The code in docs/attach.md runs as it stands."""

from __future__ import annotations

import re

import pytest

from tests.conftest import REPOSITORY

torch = pytest.importorskip("torch")


def test_the_code_runs_and_says_what_the_text_says() -> None:
    text = (REPOSITORY / "docs" / "attach.md").read_text(encoding="utf-8")
    found: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "docs/attach.md", "exec"), found)
    shapes, spec = found["shapes"], found["spec"]
    assert isinstance(shapes, dict)
    assert {name: shapes[name] for name in ("stem", "fine", "coarse", "output")} == {
        "stem": (16, 48, 48),
        "fine": (24, 24, 24),
        "coarse": (48, 12, 12),
        "output": (10,),
    }
    assert [output.name for output in spec.outputs] == ["simcc_x", "simcc_y", "visibility", "log_error", "classes"]  # type: ignore[attr-defined]
    assert (spec.visibility, spec.uncertainty) == ("visibility", "log_error")  # type: ignore[attr-defined]
    assert callable(found["compile_mine"])


def test_the_commands_are_those_of_the_program() -> None:
    import typer

    from edgepose.cli import app_of

    text = (REPOSITORY / "docs" / "attach.md").read_text(encoding="utf-8")
    flags = {option for parameter in typer.main.get_command(app_of("train")).params for option in parameter.opts}
    named = set(re.findall(r"(--[a-z-]+)", "\n".join(re.findall(r"^edgepose train .*$", text, re.MULTILINE))))
    assert named
    assert named <= flags
