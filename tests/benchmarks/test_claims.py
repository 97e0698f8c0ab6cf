"""The machinery of the claims, with claims that are faked; the figures themselves are measured by hand, not here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import claims
from benchmarks.areas import all_claims
from benchmarks.claim import Claim, Measured, parse_bar, row_of
from benchmarks.context import Context
from edgepose.errors import AnnotationError, EdgeposeError, UsageError

REPOSITORY = Path(__file__).resolve().parents[2]


def claim(name: str, value: float | Exception | Callable[[Context], Measured], bar: str = ">= 4.0") -> Claim:
    def measure(context: Context) -> Measured:
        if isinstance(value, Exception):
            raise value
        return value(context) if callable(value) else Measured(value, f"{value} was faked", {"parts": [1, 2]})

    return Claim(name, "x", bar, "a fake", measure, needs=())


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(tmp_path, tmp_path)


# Bars


@pytest.mark.parametrize(
    ("bar", "met", "missed"),
    [
        (">= 4.0", (4.0, 4.01, 1e9), (3.999, -4.0)),
        ("<= 1.5", (1.5, -3.0), (1.51,)),
        ("== 3", (3, 3.0), (2, 4, 3.001)),
        ("in 0,7", (0, 7), (3, 4, 5, 6, 0.7)),
        ("in 0, 7", (7,), (1,)),
        ("> 0", (0.1,), (0,)),
        ("<0.5", (0.4,), (0.5,)),
    ],
)
def test_bar_is_read_from_text_and_compared(bar: str, met: tuple[float, ...], missed: tuple[float, ...]) -> None:
    assert all(parse_bar(bar).met_by(value) for value in met)
    assert not any(parse_bar(bar).met_by(value) for value in missed)


@pytest.mark.parametrize("bar", [">= 4.0", "<= 1.5", "< 9", "in 0,7"])
@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), float("-inf")])
def test_what_was_not_measured_meets_no_bar(bar: str, value: float | None) -> None:
    assert not parse_bar(bar).met_by(value)


@pytest.mark.parametrize("bar", ["", "4.0", "=> 4", ">= four", ">= 1,2", "in", ">=", "in 0;7", ">= nan", "in 0,,7"])
def test_malformed_bar_is_refused(bar: str) -> None:
    with pytest.raises(UsageError, match="no bar"):
        parse_bar(bar)


def test_claim_with_a_malformed_bar_cannot_be_made() -> None:
    with pytest.raises(UsageError):
        claim("fake.x", 1.0, bar="about 4")


# Rows


def test_row_carries_value_bar_and_detail(context: Context) -> None:
    row, _ = row_of(claim("fake.fast", 4.5), context)
    assert (row.name, row.value, row.unit, row.bar, row.holds) == ("fake.fast", 4.5, "x", ">= 4.0", True)
    assert row.detail["parts"] == [1, 2]
    assert row.detail["text"] == "4.5 was faked"


def test_raising_claim_is_a_row_that_does_not_hold(context: Context) -> None:
    row, _ = row_of(claim("fake.broken", ZeroDivisionError("by nothing"), bar="<= 1.5"), context)
    assert (row.value, row.holds) == (None, False)
    assert row.detail["error"] == "ZeroDivisionError: by nothing"


def test_deliberate_error_is_told_in_its_own_words(context: Context) -> None:
    error = AnnotationError("train.json", found="nobody", expected="somebody")
    row, _ = row_of(claim("fake.broken", error), context)
    assert row.detail["error"] == str(error)


def test_value_that_is_no_number_is_missing_from_the_row(context: Context) -> None:
    row, _ = row_of(claim("fake.nan", float("nan"), bar="<= 1.5"), context)
    assert (row.value, row.holds) == (None, False)


def test_ctrl_c_in_a_claim_is_not_swallowed(context: Context) -> None:
    def interrupted(_: Context) -> Measured:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        row_of(claim("fake.slow", interrupted), context)


# What claims share


def test_shared_work_is_done_once(context: Context) -> None:
    calls: list[int] = []
    assert [context.once("key", lambda: calls.append(1) or 5) for _ in range(3)] == [5, 5, 5]
    assert calls == [1]
    assert context.once("other key", lambda: 6) == 6


def test_shared_work_that_failed_fails_again_without_being_repeated(context: Context) -> None:
    calls: list[int] = []

    def fail() -> int:
        calls.append(1)
        raise EdgeposeError("compile", found="a fault")

    for _ in range(2):
        with pytest.raises(EdgeposeError, match="a fault"):
            context.once("key", fail)
    assert calls == [1]


# The command


TABLE = (
    claim("fast.ort", 5.0),
    claim("fast.torch", 3.0),
    claim("safe.same", 7, bar="in 0,7"),
    claim("safe.worse", 3, bar="== 3"),
    claim("safe.broken", RuntimeError("it broke")),
)


def test_exit_code_is_0_only_if_all_that_was_asked_for_holds() -> None:
    assert claims.main(["fast.ort", "safe.same", "safe.worse"], table=TABLE) == 0
    assert claims.main(["fast"], table=TABLE) == 1
    assert claims.main(["safe.broken"], table=TABLE) == 1
    assert claims.main([], table=TABLE) == 1


def test_json_holds_the_rows_of_this_call_only(tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "rows.json"
    claims.main(["fast", "--json", str(out)], table=TABLE)
    claims.main(["safe.broken", "safe.same", "--json", str(out)], table=TABLE)
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows] == ["safe.same", "safe.broken"]
    assert [row["holds"] for row in rows] == [True, False]
    assert list(rows[0]) == ["name", "value", "unit", "bar", "holds", "detail"]
    assert rows[1]["value"] is None
    assert rows[1]["detail"]["error"] == "RuntimeError: it broke"
    assert [path.name for path in out.parent.iterdir()] == ["rows.json"]


def test_interrupted_run_leaves_the_old_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: Context) -> Measured:
        raise KeyboardInterrupt

    out = tmp_path / "rows.json"
    out.write_text("old")
    table = (claim("fast.ort", 5.0), claim("fast.slow", interrupted))
    assert claims.main(["--json", str(out)], table=table) == 130
    assert out.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
    assert "interrupted" in capsys.readouterr().err


def test_table_goes_to_stdout_with_every_row(capsys: pytest.CaptureFixture[str]) -> None:
    claims.main([], table=TABLE)
    out, _ = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["claim", "value", "unit", "bar", "holds"]
    assert lines[1].split() == ["fast.ort", "5", "x", ">=", "4.0", "yes"]
    assert "    not measured: RuntimeError: it broke" in lines
    assert lines[-1] == "3 of 5 claims hold"


def test_run_record_is_printed_below_the_row(capsys: pytest.CaptureFixture[str]) -> None:
    table = (claim("fake.run", lambda _: Measured(5, "text", printed=("run record", "  seed 0"))),)
    claims.main([], table=table)
    assert "    text\n    run record\n      seed 0\n" in capsys.readouterr().out


@pytest.mark.parametrize(("word", "meant"), [("fast.torhc", "fast.torch"), ("saef", "safe")])
def test_unknown_name_is_an_error_that_says_what_was_meant(
    word: str, meant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.json"
    assert claims.main(["fast", word, "--json", str(out)], table=TABLE) == 2
    assert f"did you mean {meant!r}?" in capsys.readouterr().err
    assert not out.exists()


def test_absent_data_is_exit_code_6_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEPOSE_DATA", str(tmp_path))
    measured: list[str] = []

    def measure(_: Context) -> Measured:
        measured.append("fast.ort")
        return Measured(5, "")

    table = (
        Claim("fast.ort", "x", ">= 4.0", "a fake", measure, needs=()),
        Claim("fast.real", "x", ">= 4.0", "a fake", measure, needs=("lspet",)),
    )
    out = tmp_path / "rows.json"
    assert claims.main(["--json", str(out)], table=table) == 6
    assert not measured
    assert not out.exists()
    assert "EDGEPOSE_DATA" in capsys.readouterr().err
    assert claims.main(["fast.ort"], table=table) == 0


@pytest.mark.parametrize("place", ["", "file/rows.json"])
def test_json_that_cannot_be_written_is_noticed_before_anything_is_measured(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    measured: list[str] = []
    table = (claim("fast.ort", lambda _: Measured(len(measured) or measured.append("x") or 5, "")),)
    assert claims.main(["--json", str(tmp_path / place)], table=table) == 2
    assert not measured


def test_full_reaches_the_claims() -> None:
    seen: list[bool] = []
    table = (claim("fake.run", lambda context: Measured(float(seen.append(context.full) or 5), "")),)
    claims.main([], table=table)
    claims.main(["--full"], table=table)
    assert seen == [False, True]


def test_working_folder_is_gone_afterwards() -> None:
    folders: list[Path] = []
    table = (claim("fake.run", lambda context: Measured(float(folders.append(context.folder) or 5), "")),)
    claims.main([], table=table)
    assert not folders[0].exists()


# The real table


def test_names_of_claims_are_unique_and_begin_with_their_area() -> None:
    table = all_claims()
    names = [entry.name for entry in table]
    assert len(set(names)) == len(names)
    assert all(entry.measure.__module__ == f"benchmarks.areas.{entry.area}" for entry in table)


def test_bars_are_those_of_the_issues() -> None:
    bars = {entry.name: entry.bar for entry in all_claims()}
    expected = {
        "main.kpe_s_pck_drop_pt": "<= 1.5",
        "main.kpe_s_speedup_ort": ">= 4.0",
        "main.kpe_s_speedup_torch": ">= 10.0",
        "main.int8_ratio_ort": ">= 2.2",
        "main.int8_ratio_openvino": ">= 2.5",
        "main.fake_vs_engine_pt": "<= 0.5",
        "main.gate_self_exit": "in 0,7",
        "main.gate_worse_exit": "== 3",
        "main.gate_slow_exit": "== 4",
        "blocks.rendered_to_real": ">= 5.0",
    }
    assert {name: bars.get(name) for name in expected} == expected


def test_script_runs_from_anywhere_and_names_the_claims(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "claims.py"), "main", "--list"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "main.kpe_s_speedup_ort" in done.stdout
    assert "blocks." not in done.stdout


def test_listing_the_claims_loads_nothing_heavy() -> None:
    code = (
        "import sys; from benchmarks.areas import all_claims; all_claims();"
        "print(*({'torch', 'onnx', 'onnxruntime', 'openvino', 'nncf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
