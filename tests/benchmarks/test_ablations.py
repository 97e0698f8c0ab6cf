"""The table of short runs: what it makes of records."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.ablations import ABLATIONS, main, table


def record(name: str, *figures: float, best: int = -1) -> dict[str, Any]:
    curve = [{"pck_torso_0.2": f, "pck_torso_0.1": f / 2, "auc": f} for f in figures]
    ablation = ABLATIONS[name]
    return {
        "name": name,
        "against": ablation.against,
        "what": ablation.what,
        "macs": 70e6,
        "curve": curve,
        "best_epoch": best % len(curve),
    }


def test_a_run_is_compared_with_the_one_it_differs_from_at_its_best_epoch() -> None:
    found = table({"adamw": record("adamw", 0.1, 0.2), "muon": record("muon", 0.3, 0.25, best=0)})
    rows = found.splitlines()
    assert rows[2].startswith("| adamw ")
    assert rows[2].endswith("| – |")
    assert "| 70 | 30.0 | 15.0 | 30.0 | +10.0 (adamw) |" in rows[3]


def test_without_its_base_a_run_stands_alone() -> None:
    assert table({"muon": record("muon", 0.3)}).splitlines()[2].endswith("| – |")
    assert len(table({}).splitlines()) == 2


@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_every_run_changes_something_against_one_that_there_is(name: str) -> None:
    ablation = ABLATIONS[name]
    if not ablation.against:
        return
    base = ABLATIONS[ablation.against]
    assert (ablation.network, ablation.config) != (base.network, base.config)
    assert ablation.config.epochs == base.config.epochs
    assert ablation.network.input_hw == base.network.input_hw


def test_names_beside_table_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["ablations.py", "muon", "--table"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "leave the names off" in capsys.readouterr().err
