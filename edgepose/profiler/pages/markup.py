"""Pieces of HTML that the pages are put together from: sections, tables, badges, pictures.

Invariant: headings, column names and captions are escaped here; the cells of a table are HTML already.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from edgepose.errors import ImageError

_MAGIC = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}


def section(heading: str, *parts: str) -> str:
    """A section under a heading of the second level; its parts are HTML."""
    return f"<section><h2>{escape(heading)}</h2>{''.join(parts)}</section>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str = "", *, caption: str = "") -> str:
    """A table whose first column names its rows; the other columns are numbers.

    Args:
        head: Names of the columns, text.
        rows: Cells, HTML.
        name: Class of the table: "text" where its columns are words.
        caption: Read out before the table and shown above it.
    """
    above = f"<caption>{escape(caption)}</caption>" if caption else ""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    whole = f"{above}<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{name}">{whole}</table></div>'


def badge(outcome: str) -> str:
    """An outcome as a coloured word: "pass", "warn", "fail", "inconclusive"."""
    return f'<span class="badge {outcome}">{escape(outcome)}</span>'


def data_uri(content: bytes) -> str:
    """A picture as text that an `img` takes.

    Raises:
        ImageError: It is neither PNG nor JPEG.
    """
    for magic, kind in _MAGIC.items():
        if content.startswith(magic):
            return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"
    raise ImageError("report: picture", found=f"bytes that start with {content[:8]!r}", expected="a PNG or JPEG file")
