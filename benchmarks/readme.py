"""`python benchmarks/readme.py CLAIMS.json`: writes what claims.py measured into README.md and docs/compression.md.

Invariant: a table holds what was measured and nothing else: of the areas in the file the rows of the file, of all
others the rows that it had.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- claims -->\n", "<!-- /claims -->\n"
NOTHING = "Not measured yet.\n"
_NAME = re.compile(r"\| `(?P<area>\w+)\.\w+`")


@dataclass(frozen=True, slots=True)
class Page:
    """A page with a table of figures between two markers.

    Attributes:
        path: The file.
        area: Whose claims it shows; "" for all.
        detailed: Whether it also says what each value is made of.
    """

    path: Path
    area: str = ""
    detailed: bool = False


PAGES = (
    Page(REPOSITORY / "README.md"),
    Page(REPOSITORY / "docs" / "compression.md", "compression", detailed=True),
    Page(REPOSITORY / "docs" / "engines.md", "engines", detailed=True),
)


def with_table(text: str, rows: list[dict[str, Any]], *, area: str = "", detailed: bool = False) -> str:
    """A page's text with the part between the markers brought up to date.

    Args:
        text: The page.
        rows: Those of claims.py's JSON.
        area: Whose claims the page shows; "" for all.
        detailed: Whether it also says what each value is made of.
    """
    before, _, rest = text.partition(BEGIN)
    held, _, after = rest.partition(END)
    shown = [row for row in rows if area in ("", _area(row))]
    measured = {_area(row) for row in shown}
    lines = {line: match["area"] for line in held.splitlines() if (match := _NAME.match(line)) is not None}
    found = [(owner, line) for line, owner in lines.items() if owner not in measured]
    found += [(_area(row), _line(row, detailed=detailed)) for row in shown]
    return before + BEGIN + _table([line for _, line in sorted(found, key=lambda one: one[0])], detailed) + END + after


def _area(row: dict[str, Any]) -> str:
    return str(row["name"]).partition(".")[0]


def _line(row: dict[str, Any], *, detailed: bool) -> str:
    value = "not measured" if row["value"] is None else f"{row['value']:.4g} {row['unit']}".strip()
    cells = [f"`{row['name']}`", value, row["bar"], "yes" if row["holds"] else "**no**"]
    if detailed:
        cells.append(" ".join(str(row["detail"]["text"]).split()).replace("|", "\\|"))
    return f"| {' | '.join(cells)} |"


def _table(lines: list[str], detailed: bool) -> str:
    if not lines:
        return NOTHING
    head = ("claim", "value", "bar", "holds", "made of")[: 5 if detailed else 4]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *lines]) + "\n"


if __name__ == "__main__":
    claims = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    for page in PAGES:
        content = page.path.read_text(encoding="utf-8")
        page.path.write_text(with_table(content, claims, area=page.area, detailed=page.detailed), encoding="utf-8")
