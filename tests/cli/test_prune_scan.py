"""`edgepose prune scan`: a file that `report` reads, a page with the plot, and every wrong request is one line."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from edgepose.blocks.card import Card
from edgepose.blocks.config import KPEConfig
from edgepose.profiler.pages.stage_page import Scan
from edgepose.spec import Keypoints
from tests.cli.conftest import Cli

pytestmark = pytest.mark.usefixtures("one_thread")


CONFIG = KPEConfig("narrow", (32, 32), 16, (16, 32, 32, 32), (1, 1, 1, 1), 32)
QUICK = ("--importance", "l2", "--layer", "backbone.stages.1.*", "--share", "0.5", "--people", 2, "--threads", 1)


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh network for spots, and a cache of its own."""
    from edgepose.blocks.checkpoint import save_checkpoint
    from edgepose.blocks.kpe import build

    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    keypoints = Keypoints(("blue", "red"))
    save_checkpoint(tmp_path / "narrow", Card("narrow", CONFIG, keypoints, ""), build(CONFIG, keypoints).state_dict())
    return tmp_path / "narrow"


def test_a_scan_is_a_file_and_a_page(cli: Cli, network: Path, people: Path, tmp_path: Path) -> None:
    outcome = cli("prune", "scan", network, "--data", people, "--out", tmp_path / "scan.json", *QUICK)
    assert outcome.code == 0, outcome.err
    assert "layers pruned alone, 0 quantised alone" in outcome.out
    content = json.loads((tmp_path / "scan.json").read_bytes())
    scan = msgspec.convert(content, Scan)
    assert scan.rows
    assert {row.ratio for row in scan.rows} == {0.5}
    assert content["metric"] == scan.metric == "pck_extent_0.1"
    page = (tmp_path / "scan.html").read_text()
    assert "<svg" in page
    assert "Sensitivity of layers" in page
    assert scan.rows[0].layer in page
    assert "http" not in page.replace("http://www.w3.org", "")


def test_json_on_stdout_stands_alone(cli: Cli, network: Path, people: Path) -> None:
    outcome = cli("prune", "scan", network, "--data", people, "--out", "-", *QUICK)
    assert outcome.code == 0
    assert json.loads(outcome.out)["network"] == "narrow"
    assert "pruned alone" in outcome.err


def test_8_bits_are_scanned_layer_by_layer(cli: Cli, network: Path, people: Path, tmp_path: Path) -> None:
    outcome = cli("prune", "scan", network, "--data", people, "--out", tmp_path / "scan.json", "--int8", *QUICK)
    assert outcome.code == 0, outcome.err
    rows = json.loads((tmp_path / "scan.json").read_bytes())["quantised"]
    assert {"layer", "only_int8", "only_float"} == set(rows[0])
    page = (tmp_path / "scan.html").read_text()
    assert "Sensitivity to 8 bits" in page
    assert all(row["layer"] in page for row in rows)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--share", "0.5", "--share", "1.5"), "--share: found 0.5, 1.5, expected `float` < 1.0"),
        (("--importance", "tailor"), "importance"),
        (("--layer", "nothing.*"), "'nothing.*', which matches no layer"),
        (("--metric", "pck"), "--metric: found 'pck'"),
    ],
)
def test_wrong_requests(
    cli: Cli, network: Path, people: Path, tmp_path: Path, flags: tuple[str, str], words: str
) -> None:
    base = ("--data", people, "--out", tmp_path / "scan.json", "--importance", "l2", "--threads", 1)
    outcome = cli("prune", "scan", network, *base, *flags)
    assert outcome.code == 2
    assert words in outcome.line
    assert not (tmp_path / "scan.json").exists()


def test_people_with_other_keypoints(cli: Cli, people: Path, tmp_path: Path) -> None:
    outcome = cli("prune", "scan", "kpe-t", "--data", people, "--out", tmp_path / "scan.json")
    assert outcome.code == 2
    assert "expected the 2 of" in outcome.line
