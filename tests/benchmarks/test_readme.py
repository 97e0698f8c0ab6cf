"""Tables of figures: what was measured goes in, what was not stays as it was."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.readme import BEGIN, END, NOTHING, PAGES, with_table

EMPTY = f"before\n\n{BEGIN}{NOTHING}{END}\nafter\n"


def row(name: str, value: float | None = 1.5, *, holds: bool = True, text: str = "said") -> dict[str, Any]:
    detail = {"text": text, "seconds": 1.0}
    return {"name": name, "value": value, "unit": "x", "bar": ">= 1.0", "holds": holds, "detail": detail}


def test_rows_are_written_between_the_markers_and_nothing_else_changes() -> None:
    found = with_table(EMPTY, [row("main.fast"), row("main.lost", None, holds=False)])
    assert found == (
        f"before\n\n{BEGIN}| claim | value | bar | holds |\n|---|---|---|---|\n"
        "| `main.fast` | 1.5 x | >= 1.0 | yes |\n"
        f"| `main.lost` | not measured | >= 1.0 | **no** |\n{END}\nafter\n"
    )
    assert with_table(found, [row("main.fast"), row("main.lost", None, holds=False)]) == found


def test_areas_that_were_not_measured_keep_their_rows() -> None:
    found = with_table(EMPTY, [row("main.fast"), row("main.small")])
    found = with_table(found, [row("blocks.deep")])
    assert [line.split("`")[1] for line in found.splitlines() if "`" in line] == [
        "blocks.deep",
        "main.fast",
        "main.small",
    ]
    found = with_table(found, [row("main.fast", 2.0)])  # an area is measured in one run
    assert "main.small" not in found
    assert "| `main.fast` | 2 x |" in found


def test_a_page_of_one_area_shows_no_other_and_says_what_values_are_made_of() -> None:
    assert with_table(EMPTY, [row("main.fast")], area="compression", detailed=True) == EMPTY
    rows = [row("main.fast"), row("compression.front", text="beaten by A | B\nand C")]
    found = with_table(EMPTY, rows, area="compression", detailed=True)
    assert "| `compression.front` | 1.5 x | >= 1.0 | yes | beaten by A \\| B and C |" in found
    assert "main.fast" not in found
    assert found.count("|---") == 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.path.name)
def test_the_pages_have_their_markers(page: Any) -> None:
    text = page.path.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1
    assert text.index(BEGIN) < text.index(END)
    assert with_table(text, [], area=page.area, detailed=page.detailed) == text
