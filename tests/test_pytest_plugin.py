"""The pytest plugin, in a pytest of its own that finds it by its entry point: which tests fail, and what is kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.tiny_network import pair_of_bundles

REPOSITORY = Path(__file__).resolve().parents[1]

SIZES = "name: sizes\naccuracy: []\nlatency: null\nlimits: [{metric: engine_bytes, fail_above: 0.05}]\n"
PEOPLE = "name: people\naccuracy: [{metric: pck_extent_0.1, least_persons: 1000}]\nlatency: null\n"

SUITE = """\
def test_same(edgepose_gate):
    assert edgepose_gate("good.bundle", "good.bundle", rules="sizes.yaml").verdict == "pass"

def test_bigger(edgepose_gate):
    edgepose_gate("good.bundle", "bigger.bundle", rules="sizes.yaml")

def test_judged_by_itself(edgepose_gate):
    assert edgepose_gate.verdict("good.bundle", "bigger.bundle", rules="sizes.yaml").exit_code == 4

def test_undecided(edgepose_gate):
    edgepose_gate("good.bundle", "good.bundle", rules="people.yaml", data="people")

def test_missing(edgepose_gate):
    edgepose_gate("good.bundle", "none.bundle", rules="sizes.yaml")
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of somebody else's: bundles, rules, people, tests."""
    from tests.cli.conftest import write_people

    folder = tmp_path_factory.mktemp("suite")
    pair_of_bundles(folder, "good.bundle", "bigger.bundle")
    write_people(folder / "people", "val", 24)
    (folder / "sizes.yaml").write_text(SIZES)
    (folder / "people.yaml").write_text(PEOPLE)
    (folder / "test_it.py").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH whose metadata declares the entry points of pyproject.toml, as an installation would."""
    points = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"]
    folder = tmp_path_factory.mktemp("site")
    info = folder / "edgepose_declared-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgepose-declared\nVersion: 0\n")
    lines = [f"[{group}]\n" + "".join(f"{n} = {v}\n" for n, v in found.items()) for group, found in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return folder


def run(folder: Path, site: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": f"{site}{os.pathsep}{REPOSITORY}", "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def result(suite: Path, installed: Path) -> subprocess.CompletedProcess[str]:
    return run(suite, installed, "--edgepose-gate-out", "kept", "--junitxml", "tests.xml")


def test_regressions_and_undecided_gates_fail_their_tests_and_nothing_else(
    result: subprocess.CompletedProcess[str],
) -> None:
    assert result.returncode == 1, result.stdout + result.stderr
    assert "3 failed, 2 passed" in result.stdout
    failed = {line.split("::")[1].split()[0] for line in result.stdout.splitlines() if line.startswith("FAILED")}
    assert failed == {"test_bigger", "test_undecided", "test_missing"}
    assert "verdict: fail (exit code 4)" in result.stdout
    assert "verdict: inconclusive (exit code 7)" in result.stdout
    assert "no such directory" in result.stdout


def test_every_verdict_is_shown_at_the_end_and_kept_in_every_format(
    result: subprocess.CompletedProcess[str], suite: Path
) -> None:
    summary = result.stdout.partition("edgepose gate ==")[2] or result.stdout.partition("= edgepose gate =")[2]
    assert [name for name in ("test_same", "test_bigger", "test_undecided") if f"::{name}" not in summary] == []
    kept = sorted(path.name for path in (suite / "kept").iterdir())
    assert len(kept) == 4 * 4
    assert json.loads((suite / "kept" / "test_it.py-test_bigger-1.json").read_text())["exit_code"] == 4
    assert ET.parse(suite / "kept" / "test_it.py-test_bigger-1.xml").getroot().get("failures") == "1"


def test_verdicts_are_properties_in_the_junit_file_of_pytest(
    result: subprocess.CompletedProcess[str], suite: Path
) -> None:
    assert result.stdout
    found = {
        case.get("name"): [item.get("value") for item in case.iter("property")]
        for case in ET.parse(suite / "tests.xml").getroot().iter("testcase")
    }
    assert found["test_same"] == ["pass (0)"]
    assert found["test_undecided"] == ["inconclusive (7)"]
    assert found["test_missing"] == []


def test_timing_beside_other_tests_is_refused(suite: Path, installed: Path, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("def pytest_configure(config):\n    config.workerinput = {}\n")
    good = suite / "good.bundle"
    (tmp_path / "test_timed.py").write_text(
        f"def test_timed(edgepose_gate):\n    edgepose_gate({str(good)!r}, {str(good)!r}, rules='ci-quick')\n"
        f"def test_sizes(edgepose_gate):\n"
        f"    edgepose_gate({str(good)!r}, {str(good)!r}, rules={str(suite / 'sizes.yaml')!r})\n"
    )
    outcome = run(tmp_path, installed)
    assert "1 failed, 1 passed" in outcome.stdout, outcome.stdout + outcome.stderr
    assert "pytest-xdist" in outcome.stdout


def test_loading_the_plugin_costs_nothing_but_pytest() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import edgepose.pytest_plugin\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["edgepose"]
