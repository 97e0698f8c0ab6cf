"""What the verbs print: results on stdout, notes and progress on stderr, tables, bars, annotations.

Invariant: stdout carries results only, so that it can be piped; a progress bar is drawn on a terminal only, and
elsewhere each step leaves one line; NO_COLOR, CI and GITHUB_ACTIONS are respected.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from edgepose.storage import atomic_write, json_bytes

STDOUT = Path("-")
"""The file name that stands for standard output."""

Told = Callable[[int, int], None]
"""Called with how much is done and how much there is."""

_WIDE = 160  # columns where the output is no terminal: nothing is folded that a program may read
_LINE_EVERY_S = 30.0


def console(*, err: bool = False) -> Console:
    """A rich console for stdout or stderr as they are now; plain text unless it is a terminal that wants colour."""
    stream = sys.stderr if err else sys.stdout
    live = is_interactive(stream)
    return Console(
        file=stream,
        no_color=bool(os.environ.get("NO_COLOR")) or not live,
        force_terminal=live,
        width=None if live else _WIDE,
        highlight=False,
        emoji=False,
        markup=False,
    )


def is_interactive(stream: Any = None) -> bool:
    """Whether a person watches `stream` (stderr by default): a terminal that is not CI's."""
    stream = sys.stderr if stream is None else stream
    in_ci = os.environ.get("CI", "").lower() not in ("", "0", "false") or "GITHUB_ACTIONS" in os.environ
    return bool(stream.isatty()) and not in_ci and os.environ.get("TERM") != "dumb"


def say(text: str = "") -> None:
    """One line of result on stdout."""
    print(text)


def note(text: str) -> None:
    """One line on stderr: what is worth knowing and is not the result."""
    print(text, file=sys.stderr, flush=True)


def annotation(level: str, title: str, text: str) -> str:
    """A workflow command that GitHub shows beside a pull request; `level` is "notice", "warning" or "error"."""

    def escaped(value: str) -> str:
        return value.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

    label = escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={label}::{escaped(text)}"


def annotate(level: str, title: str, text: str) -> None:
    """Annotates the pull request when running in GitHub Actions; says nothing elsewhere."""
    if os.environ.get("GITHUB_ACTIONS") == "true":
        note(annotation(level, title, text))


def show_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", err: bool = False) -> None:
    """A table of text; columns whose cells are all numbers are right-aligned.

    Args:
        head: Names of the columns; empty strings for a table without a head.
        rows: Cells.
        title: A line above it.
        err: On stderr instead of stdout.
    """
    out = console(err=err)
    if title:
        out.print(Text(title, style="bold"))
    table = Table(box=None, pad_edge=False, show_header=any(head), header_style="dim", padding=(0, 2, 0, 0))
    for position, name in enumerate(head):
        numeric = bool(rows) and all(_is_number(row[position]) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out.print(table)


def show_facts(facts: Mapping[str, str], *, title: str = "", err: bool = False) -> None:
    """Names and values, one pair per line."""
    show_table(("", ""), list(facts.items()), title=title, err=err)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically to `path`, or to stdout where that is "-".

    Raises:
        StorageError: Disk full, read-only or no permission.
        UsageError: `path` cannot be a file.
    """
    if path == STDOUT:
        sys.stdout.write(json_bytes(value).decode())
        return
    atomic_write(path, json_bytes(value))


@dataclass(slots=True)
class Steps:
    """Progress of a verb: a bar with the time left on a terminal, a line per finished step elsewhere.

    Attributes:
        bar: rich's bars, None where nobody watches.
    """

    bar: Progress | None
    _task: TaskID | None = None
    _what: str = ""
    _start_s: float = 0.0
    _line_s: float = 0.0
    _done: set[str] = field(default_factory=set)

    def told(self, what: str, done: float, whole: float, detail: str = "") -> None:
        """Shows that `done` of `whole` is done of the step called `what`; a new name begins a new step.

        Args:
            what: Name of the step.
            done: How much of it is done.
            whole: How much there is; infinite where nobody knows.
            detail: Shown behind, a loss for instance.
        """
        if what != self._what:
            self._begin(what, whole)
        if self.bar is not None and self._task is not None:
            self.bar.update(self._task, completed=done, total=_total(whole), detail=detail)
            return
        now = time.monotonic()
        finished = done >= whole
        if finished and what in self._done:
            return
        if finished or now - self._line_s >= _LINE_EVERY_S:
            self._line_s = now
            note(self._line(done, whole, detail, now - self._start_s))
            if finished:
                self._done.add(what)

    def step(self, what: str) -> Told:
        """`told` for one step, in the form that libraries call."""
        return lambda done, whole: self.told(what, done, whole)

    def _begin(self, what: str, whole: float) -> None:
        self._what, self._start_s = what, time.monotonic()
        self._line_s = self._start_s
        if self.bar is not None:
            if self._task is not None:
                self.bar.remove_task(self._task)
            self._task = self.bar.add_task(what, total=_total(whole), detail="")

    def _line(self, done: float, whole: float, detail: str, spent_s: float) -> str:
        behind = f", {detail}" if detail else ""
        if done >= whole:
            return f"{self._what}: done in {duration(spent_s)}{behind}"
        if not math.isfinite(whole):
            return f"{self._what}: {done:.0f} in {duration(spent_s)}{behind}"
        left_s = spent_s * (whole - done) / max(done, 1e-9)
        return f"{self._what}: {done:.0f} of {whole:.0f}, about {duration(left_s)} left{behind}"


@contextmanager
def steps() -> Iterator[Steps]:
    """Shows the progress of long work while the block runs."""
    if not is_interactive():
        yield Steps(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        TextColumn("{task.fields[detail]}"),
    )
    with Progress(*columns, console=console(err=True), transient=True) as bar:
        yield Steps(bar)


def _total(whole: float) -> float | None:
    return whole if math.isfinite(whole) else None


def duration(seconds: float) -> str:
    """A span of time for people: "0.4 s", "12 s", "3 min", "2 h 05 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f} min"


def _is_number(text: str) -> bool:
    first = text.strip().split(" ")[0].lstrip("+-")
    return first[:1].isdigit() or first in ("–", "")
