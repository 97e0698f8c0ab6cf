"""The workflow that gates pull requests: its form, and its shell steps run as a runner would run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOW = REPOSITORY / "deploy" / "ci" / "github-gate.yml"
EDGEPOSE = Path(sys.executable).parent / "edgepose"


def workflow() -> dict[str, Any]:
    # BaseLoader: YAML 1.1 would turn the key "on" into true.
    return dict(yaml.load(WORKFLOW.read_text(encoding="utf-8"), Loader=yaml.BaseLoader))


def steps() -> list[dict[str, Any]]:
    return list(workflow()["jobs"]["gate"]["steps"])


def shell_steps() -> dict[str, str]:
    return {step["name"]: step["run"] for step in steps() if "run" in step}


def test_steps_come_in_the_order_the_gate_needs() -> None:
    assert [step["name"] for step in steps()] == [
        "Check out the base",
        "Check out the head",
        "Set Python up",
        "Install edgepose",
        "Say what this machine is",
        "Compile the base",
        "Compile the head",
        "Gate",
        "Keep the verdict",
    ]


def test_job_may_read_only_and_ends_by_itself() -> None:
    assert workflow()["permissions"] == {"contents": "read"}
    assert "pull_request" in workflow()["on"]
    assert "pull_request_target" not in workflow()["on"]
    assert int(workflow()["jobs"]["gate"]["timeout-minutes"]) <= 120


def test_nothing_of_the_pull_request_is_pasted_into_a_shell_line() -> None:
    for name, script in shell_steps().items():
        assert "${{" not in script, name


def test_actions_are_pinned_to_a_version() -> None:
    for step in steps():
        if "uses" in step:
            action, _, version = step["uses"].partition("@")
            assert action.startswith("actions/")
            assert version.startswith("v") or len(version) == 40


def test_installed_version_is_this_one() -> None:
    import edgepose

    assert f"edgepose[all]=={edgepose.__version__}" in shell_steps()["Install edgepose"]


@pytest.mark.parametrize("name", shell_steps())
def test_shell_step_is_valid_bash(name: str) -> None:
    result = subprocess.run(["bash", "-n"], input=shell_steps()[name], text=True, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr


class Runner:
    """Runs the steps in a workspace as a GitHub runner does: bash -e, the job's environment, files for outputs."""

    def __init__(self, workspace: Path, env: dict[str, str]) -> None:
        self.workspace = workspace
        self.temp = workspace / "temp"
        self.temp.mkdir(parents=True)
        self.summary = workspace / "summary.md"
        self.env = os.environ | workflow()["env"] | env
        self.env |= {"RUNNER_TEMP": str(self.temp), "GITHUB_STEP_SUMMARY": str(self.summary), "CI": "true"}
        self.env["PATH"] = f"{EDGEPOSE.parent}:{self.env['PATH']}"

    def run(self, name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", shell_steps()[name]],
            cwd=self.workspace,
            env=self.env,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set with a train and a val split of rendered people."""
    root = tmp_path_factory.mktemp("rendered") / "data"
    for split, seed in (("train", 1), ("val", 2)):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "edgepose.data.render",
                root,
                "--count",
                "24",
                "--seed",
                str(seed),
                "--split",
                split,
            ],
            check=True,
            capture_output=True,
        )
    return root


@pytest.mark.slow
def test_unchanged_pull_request_is_not_failed_by_the_gate(tmp_path: Path, rendered: Path) -> None:
    runner = Runner(tmp_path / "runner", {"RECIPE": "ptq-int8", "MODEL": "kpe-t", "RULES": "ci-quick"})
    for side in ("base", "head"):
        shutil.copytree(rendered, runner.workspace / side / "data")
    for name in ("Say what this machine is", "Compile the base", "Compile the head"):
        result = runner.run(name)
        assert result.returncode == 0, result.stdout + result.stderr
    result = runner.run("Gate")
    verdict = json.loads((runner.temp / "gate.json").read_text())
    assert result.returncode == verdict["exit_code"]
    assert verdict["verdict"] in ("pass", "warn", "inconclusive"), result.stdout + result.stderr
    assert "### edgepose gate" in runner.summary.read_text()


@pytest.mark.slow
def test_gate_step_passes_the_exit_code_on_when_there_is_no_data(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "runner", {})
    (runner.workspace / "head").mkdir()
    result = runner.run("Gate")
    assert result.returncode == 6, result.stdout + result.stderr
    assert not runner.summary.exists()
