"""The composite action: its form, and its shell steps run on real bundles as a runner would run them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml

import edgepose
from tests.cli.conftest import write_people
from tests.tiny_network import pair_of_bundles

ACTION = Path(__file__).resolve().parents[2] / "deploy" / "ci" / "gate" / "action.yml"
EDGEPOSE = Path(sys.executable).parent

RULES = """\
name: quick
accuracy: [{metric: pck_extent_0.1, least_persons: 20, widest_pass_points: 60, pass_below_points: 5}]
latency: null
limits: [{metric: engine_bytes, fail_above: 0.05}]
"""


def action() -> dict[str, Any]:
    return dict(yaml.load(ACTION.read_text(encoding="utf-8"), Loader=yaml.BaseLoader))


def steps() -> dict[str, dict[str, Any]]:
    return {step["name"]: step for step in action()["runs"]["steps"]}


class Runner:
    """Runs a step of the action as a GitHub runner does: bash -e, inputs in its environment, files for what it says."""

    def __init__(self, workspace: Path, **inputs: str) -> None:
        self.workspace, self.temp = workspace, workspace / "temp"
        self.temp.mkdir()
        declared = {name: value.get("default") for name, value in action()["inputs"].items()}
        self.inputs = {**declared, **inputs}

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        step = steps()[name]
        env = {key: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", self._input, text) for key, text in step["env"].items()}
        files = {f"GITHUB_{name}": str(self.temp / name) for name in ("OUTPUT", "STEP_SUMMARY")}
        told = {"RUNNER_TEMP": str(self.temp), "CI": "true", "GITHUB_ACTIONS": "true", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [step["shell"], "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=self.workspace,
            env={**os.environ, **told, **files, **env, "PATH": f"{EDGEPOSE}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )

    def _input(self, match: re.Match[str]) -> str:
        return str(self.inputs[match[1]])

    @property
    def outputs(self) -> dict[str, str]:
        lines = (self.temp / "OUTPUT").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)  # as on GitHub, the last one of a name counts


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("workspace")
    pair_of_bundles(folder, "base bundle", "bigger.bundle")
    write_people(folder / "people", "val", 24)
    (folder / "rules.yaml").write_text(RULES)
    return folder


@pytest.fixture
def runner(workspace: Path, request: pytest.FixtureRequest) -> Runner:
    inputs = {"baseline": "base bundle", "data": "people", "rules": "rules.yaml", **getattr(request, "param", {})}
    for old in workspace.glob("temp*"):
        old.rename(workspace / f"old-{len(list(workspace.glob('old-*')))}")
    return Runner(workspace, **inputs)


def test_it_is_a_composite_action_whose_steps_name_their_shell() -> None:
    assert action()["runs"]["using"] == "composite"
    assert all("shell" in step or "uses" in step for step in steps().values())
    assert {name for name, value in action()["inputs"].items() if value.get("required")} == {"baseline", "candidate"}
    assert all(value["description"] for value in (*action()["inputs"].values(), *action()["outputs"].values()))


def test_nothing_that_is_put_in_is_pasted_into_a_shell_line() -> None:
    assert all("${{" not in step["run"] for step in steps().values())


def test_every_input_is_used_and_every_output_comes_from_a_step() -> None:
    text = ACTION.read_text()
    used = set(re.findall(r"inputs\.([\w-]+)", text))
    assert used == set(action()["inputs"])
    ids = {step["id"] for step in steps().values() if "id" in step}
    for output in action()["outputs"].values():
        assert re.fullmatch(r"\$\{\{ steps\.(\w+)\.outputs\.[\w-]+ \}\}", output["value"])[1] in ids  # type: ignore[index]


def test_installed_version_is_this_one() -> None:
    assert action()["inputs"]["install"]["default"] == f"edgepose[all]=={edgepose.__version__}"


@pytest.mark.parametrize("name", steps())
def test_shell_step_is_valid_bash(name: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=steps()[name]["run"], text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("runner", [{"candidate": "base bundle"}], indirect=True)
def test_an_unchanged_bundle_passes_and_every_file_is_there(runner: Runner) -> None:
    result = runner.run("Gate")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = Path(runner.outputs["files"])
    assert runner.outputs == {"files": str(folder), "verdict": "pass", "exit-code": "0"}
    assert folder == runner.temp / "edgepose-gate"
    assert {path.name for path in folder.iterdir()} == {f"gate.{end}" for end in ("json", "xml", "sarif", "md", "html")}
    assert ET.parse(folder / "gate.xml").getroot().get("failures") == "0"
    assert (runner.temp / "STEP_SUMMARY").read_text().startswith("### edgepose gate: pass")


@pytest.mark.parametrize("runner", [{"candidate": "bigger.bundle", "out": "kept here"}], indirect=True)
def test_a_regression_fails_the_step_with_its_code_and_annotates(runner: Runner) -> None:
    result = runner.run("Gate")
    assert result.returncode == 4
    assert (runner.outputs["verdict"], runner.outputs["exit-code"]) == ("fail", "4")
    assert json.loads((runner.workspace / "kept here" / "gate.json").read_text())["exit_code"] == 4
    assert "::error title=edgepose gate%3A fail::engine_bytes" in result.stderr


@pytest.mark.parametrize(
    "runner", [{"candidate": "$(touch pwned); `touch pwned`"}, {"candidate": "--help"}], indirect=True
)
def test_what_is_no_bundle_is_an_error_whatever_it_is_called(runner: Runner) -> None:
    result = runner.run("Gate")
    assert result.returncode == 2, result.stdout + result.stderr
    assert runner.outputs["exit-code"] == "2"
    assert "verdict" not in runner.outputs
    assert not (runner.workspace / "pwned").exists()
