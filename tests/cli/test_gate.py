"""`edgepose gate` and what it writes: every format in one run, whatever the verdict, and GitHub's files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from edgepose.bundle import write_bundle
from tests.cli.conftest import Cli
from tests.tiny_network import spot_draft

RULES = """\
name: quick
accuracy: [{{metric: pck_extent_0.1, least_persons: {least}, fail_above_points: 1, pass_below_points: 5,
  widest_pass_points: 60}}]
latency: null
limits:
  - {{metric: engine_bytes, fail_above: 0.05}}
  - {{metric: macs, fail_above: 0, optional: true}}
"""


def rules(folder: Path, least_persons: int = 20) -> Path:
    path = folder / "rules.yaml"
    path.write_text(RULES.format(least=least_persons))
    return path


def outputs(folder: Path) -> list[object]:
    flags: list[object] = []
    for flag, name in (("--json", "g.json"), ("--junit", "g.xml"), ("--sarif", "g.sarif"), ("--markdown", "g.md")):
        flags += [flag, folder / name]
    return flags


@pytest.fixture
def bigger(tmp_path: Path) -> Path:
    """The spot bundle with an engine that became twice as big."""
    draft = spot_draft(tmp_path)
    first = draft.engines[0]
    grown = replace(first, files={**first.files, "cache.bin": bytes(4096)})
    return write_bundle(tmp_path / "bigger.bundle", replace(draft, name="bigger", engines=(grown,))).root


def test_undecided_exits_7_and_every_file_says_so(cli: Cli, bundle: Path, people: Path, tmp_path: Path) -> None:
    wanted = rules(tmp_path, least_persons=30)  # the data set has 24
    outcome = cli("gate", bundle, bundle, "--data", people, "--rules", wanted, *outputs(tmp_path))
    assert outcome.code == 7
    assert outcome.out.splitlines()[-1] == "verdict: inconclusive (exit code 7)"
    assert "macs was not checked: the baseline does not tell it" in outcome.out
    assert json.loads((tmp_path / "g.json").read_text())["exit_code"] == 7
    assert ET.parse(tmp_path / "g.xml").getroot().get("errors") == "1"
    assert json.loads((tmp_path / "g.sarif").read_text())["runs"][0]["invocations"][0]["exitCode"] == 7
    assert (tmp_path / "g.md").read_text().startswith("### edgepose gate: inconclusive")


def test_growth_alone_exits_4_and_is_the_first_row_of_the_table(
    cli: Cli, bundle: Path, bigger: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = cli("gate", bundle, bigger, "--data", people, "--rules", rules(tmp_path), *outputs(tmp_path))
    assert outcome.code == 4
    table = [line.split() for line in outcome.out.splitlines()]
    assert table[1][:3] == ["check", "baseline", "candidate"]
    assert table[2][:3] == ["fail", "limit", "engine_bytes"]
    results = json.loads((tmp_path / "g.sarif").read_text())["runs"][0]["results"]
    places = {r["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] for r in results}
    assert places == {"bigger.bundle/manifest.json"}


def test_github_gets_summary_outputs_and_annotations(
    cli: Cli, bundle: Path, bigger: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary, output = tmp_path / "summary.md", tmp_path / "output"
    summary.write_text("what another step wrote\n")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    monkeypatch.setenv("GITHUB_OUTPUT", str(output))
    outcome = cli("gate", bundle, bigger, "--data", people, "--rules", rules(tmp_path), "--github")
    assert outcome.code == 4
    assert summary.read_text().startswith("what another step wrote\n### edgepose gate: fail")
    assert output.read_text() == "verdict=fail\nexit-code=4\n"
    assert "::error title=edgepose gate%3A fail::engine_bytes" in outcome.err


def test_github_outside_of_github_is_refused_before_any_work(
    cli: Cli, bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    outcome = cli("gate", bundle, tmp_path / "missing", "--github")
    assert outcome.code == 2
    assert "--markdown" in outcome.line


def test_no_file_is_written_over_another_or_into_a_bundle(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    same = tmp_path / "same"
    assert cli("gate", bundle, bundle, "--sarif", same, "--markdown", same).code == 2
    assert cli("gate", bundle, bundle, "--sarif", bundle / "gate.sarif").code == 2
