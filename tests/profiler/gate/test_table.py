"""Tables, Markdown and annotations of a verdict: complete, and safe with names from outside."""

from __future__ import annotations

import re

import pytest

from edgepose.cli.console import annotation
from edgepose.profiler.gate.files import junit_from_verdict, lines_from_verdict
from edgepose.profiler.gate.table import HEAD, annotations_from_verdict, markdown_from_verdict, rows_from_verdict
from edgepose.profiler.gate.verdict import Verdict
from tests.conftest import Golden
from tests.profiler.verdicts import BAD, GOOD, HOSTILE, REFUSED, UNDECIDED

UNHAPPY = pytest.mark.parametrize(
    ("name", "verdict"), [("inconclusive", UNDECIDED), ("refused", REFUSED), ("fail", BAD)]
)


def table_cells(markdown: str) -> list[list[str]]:
    """Cells of all table rows, as GitHub would split them: at pipes without a backslash."""
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


@pytest.mark.parametrize("verdict", [GOOD, BAD, UNDECIDED, REFUSED, HOSTILE])
def test_every_check_has_a_row_with_all_cells(verdict: Verdict) -> None:
    rows = rows_from_verdict(verdict)
    assert [row.check.split()[0] for row in rows] == ["limit", "accuracy", "latency"]
    assert all(len(row) == len(HEAD) and all(row) for row in rows)
    first = table_cells(markdown_from_verdict(verdict))[: 2 + len(rows)]
    assert {len(cells) for cells in first} == {len(HEAD)}


def test_a_noisy_machine_is_called_refused_not_inconclusive() -> None:
    assert [row.outcome for row in rows_from_verdict(REFUSED)] == ["pass", "pass", "refused"]
    assert "refused" in markdown_from_verdict(REFUSED)
    assert 'type="refused"' in junit_from_verdict(REFUSED).decode()


def test_names_from_outside_stay_in_their_cell() -> None:
    text = markdown_from_verdict(HOSTILE)
    assert not re.search(r"^::", text, re.MULTILINE)
    outside = re.sub(r"`[^`]*`", "", text)
    assert "<img" not in outside
    assert "@all" not in outside
    assert "\x1b" not in text


def test_undecided_and_failed_checks_annotate_errors_and_rules_left_out_a_notice() -> None:
    assert [(found.level, found.title.split(": ")[1]) for found in annotations_from_verdict(UNDECIDED)] == [
        ("error", "inconclusive"),
        ("warning", "warn"),
        ("notice", "not checked"),
    ]
    assert [found.level for found in annotations_from_verdict(BAD)] == ["error"] * 3
    assert annotations_from_verdict(GOOD) == []


@UNHAPPY
def test_markdown_to_the_letter(golden: Golden, name: str, verdict: Verdict) -> None:
    golden(f"gate/{name}.md", markdown_from_verdict(verdict))


@UNHAPPY
def test_junit_to_the_letter(golden: Golden, name: str, verdict: Verdict) -> None:
    golden(f"gate/{name}.xml", junit_from_verdict(verdict).decode())


@UNHAPPY
def test_lines_and_annotations_to_the_letter(golden: Golden, name: str, verdict: Verdict) -> None:
    lines = [*lines_from_verdict(verdict), *(annotation(*found) for found in annotations_from_verdict(verdict))]
    golden(f"gate/{name}.txt", "\n".join(lines) + "\n")
