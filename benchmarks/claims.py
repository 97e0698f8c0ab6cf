"""`python benchmarks/claims.py [AREA|NAME …] [--json FILE] [--full]`: measures what edgepose claims.

Invariant: the exit code is 0 only if every claim that was asked for holds; the JSON is written whole, at the end, and
holds the claims of this run and no others. The table goes to stdout as it grows, progress to stderr.

Exit codes: 0 all hold · 1 some do not · 2 usage · 6 data absent, or the JSON cannot be written · 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # instead of this folder, whose files are the package `benchmarks`

from benchmarks.claim import Claim, Row, row_of  # noqa: E402
from benchmarks.command import command  # noqa: E402
from benchmarks.context import Context  # noqa: E402
from edgepose.cli.console import steps  # noqa: E402
from edgepose.errors import DataUnavailable, StorageError, UsageError  # noqa: E402
from edgepose.storage import atomic_json  # noqa: E402
from edgepose.strict_yaml import did_you_mean  # noqa: E402
from edgepose.telemetry import block_telemetry  # noqa: E402

_LINE = "{:<30} {:>9}  {:<9}  {:<8}  {}"


@command
def main(arguments: Sequence[str] | None = None, *, table: tuple[Claim, ...] | None = None) -> int:
    """Measures the claims that the command line names.

    Args:
        arguments: What follows the script's name; None takes it from the process.
        table: The claims there are; None takes those of `benchmarks.areas`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="claims.py", description="Measure what edgepose claims.")
    parser.add_argument("names", nargs="*", metavar="AREA|NAME", help="what to measure (default: everything)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument("--full", action="store_true", help="also repeat the training runs behind the claims: hours")
    parser.add_argument("--list", action="store_true", help="say which claims there are, and stop")
    options = parser.parse_args(arguments)
    if table is None:
        from benchmarks.areas import all_claims

        table = all_claims()
    wanted = chosen(table, options.names)
    if options.list:
        for claim in wanted:
            print(_LINE.format(claim.name, "", claim.unit, claim.bar, claim.question))
        return 0
    data = data_root()
    check_data(wanted, data)
    if options.json is not None:
        check_writable(options.json)
    rows = measure(wanted, data, full=options.full)
    if options.json is not None:
        atomic_json(options.json, rows)
    return 0 if all(row.holds for row in rows) else 1


def chosen(table: Sequence[Claim], names: Sequence[str]) -> tuple[Claim, ...]:
    """The claims that areas and names stand for, in the table's order; no names stand for all.

    Raises:
        UsageError: A word that is neither.
    """
    known = {claim.area for claim in table} | {claim.name for claim in table}
    for name in names:
        if name not in known:
            areas = ", ".join(sorted({claim.area for claim in table}))
            fix = did_you_mean(name, sorted(known)) or "see --list"
            raise UsageError(name, found="no such area or claim", expected=f"one of the areas {areas}", fix=fix)
    return tuple(claim for claim in table if not names or claim.area in names or claim.name in names)


def data_root() -> Path:
    """The folder of the data sets: $EDGEPOSE_DATA, else shared/data beside the checkout."""
    return Path(os.environ.get("EDGEPOSE_DATA") or REPOSITORY.parent / "shared" / "data")


def check_data(claims: Sequence[Claim], root: Path) -> None:
    """Looks for the data of all claims before any is measured.

    Raises:
        DataUnavailable: Some is not there.
    """
    for name in sorted({name for claim in claims for name in claim.needs}):
        absent = [split for split in ("train.json", "val.json") if not (root / name / split).is_file()]
        if absent:
            raise DataUnavailable(
                f"{root / name / absent[0]}",
                found="no such file",
                expected=f"the data set {name}, which the claims are measured on",
                fix="set EDGEPOSE_DATA to the folder that holds it",
            )


def check_writable(path: Path) -> None:
    """Finds out before half an hour of measuring, not after it, that the result cannot be written.

    Raises:
        UsageError: `path` is a folder, or lies below a file.
        StorageError: No permission.
    """
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not folder.is_dir():
        raise UsageError(f"--json {path}", found="a folder, or a path below a file", expected="the name of a file")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"--json {path}", found="no permission to write", expected="a place that can be written")


def measure(claims: Sequence[Claim], data: Path, *, full: bool) -> list[Row]:
    """Measures claims one after the other and prints a row for each."""
    block_telemetry()
    print(_LINE.format("claim", "value", "unit", "bar", "holds"), flush=True)
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgepose-claims-") as folder:
        context = Context(data, Path(folder), full)
        for claim in claims:
            with steps() as shown:  # closed before the row is printed, as a bar redraws its line
                context.told = shown.told
                row, lines = row_of(claim, context)
            rows.append(row)
            show(row, lines)
    print(f"{sum(row.holds for row in rows)} of {len(rows)} claims hold", flush=True)
    return rows


def show(row: Row, lines: Sequence[str]) -> None:
    """Prints a row of the table and what stands behind it."""
    value = "–" if row.value is None else f"{row.value:.6g}" if row.value == round(row.value) else f"{row.value:.3f}"
    print(_LINE.format(row.name, value, row.unit, row.bar, "yes" if row.holds else "NO"))
    for line in (row.detail["text"], *lines):
        print(f"    {line}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the working folder is removed
    sys.exit(main())
