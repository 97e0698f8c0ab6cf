"""`python benchmarks/readme.py CLAIMS.json`: writes README's table of figures from what claims.py measured.

Invariant: the table holds nothing that is not in the file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- claims -->\n", "<!-- /claims -->\n"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of claims.py's JSON as a Markdown table."""
    lines = ["| claim | value | bar | holds |", "|---|---|---|---|"]
    for row in rows:
        value = "not measured" if row["value"] is None else f"{row['value']:.4g} {row['unit']}".strip()
        lines.append(f"| `{row['name']}` | {value} | {row['bar']} | {'yes' if row['holds'] else '**no**'} |")
    return "\n".join(lines) + "\n"


def with_table(text: str, rows: list[dict[str, Any]]) -> str:
    """README's text with the part between the markers replaced."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table(rows) + END + after


if __name__ == "__main__":
    measured = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    README.write_text(with_table(README.read_text(encoding="utf-8"), measured), encoding="utf-8")
