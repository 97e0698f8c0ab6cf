"""`edgepose baseline`: accept candidates, list what was accepted, find what many small changes add up to.

Invariant: nothing is accepted that was not compared with the frozen reference of its series under that series'
conditions; where `trend` exits with 0, nothing is surely further from its reference than the rules allow.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from edgepose.cli.console import STDOUT, note, say, show_table, write_json
from edgepose.cli.options import StdoutJsonFlag
from edgepose.errors import BadInput, UsageError
from edgepose.profiler.facts import FACTS, spelt
from edgepose.profiler.gate.files import verdict_from_json
from edgepose.profiler.gate.rules import load_rules
from edgepose.profiler.gate.verdict import Verdict
from edgepose.profiler.history.baselines import Acceptance, Key, Point, current, find_series, read_series
from edgepose.profiler.history.baselines import accept as accept_verdict
from edgepose.profiler.history.trend import Trend, spelt_worse, trend_of

EXAMPLES = (
    "edgepose baseline accept gate.json --branch main --commit 1f0c9a7",
    "edgepose baseline accept gate.json --branch main --note agreed-in-review",
    "edgepose baseline accept gate.json --branch main --new-series --store /srv/baselines --device orin-1",
    "edgepose baseline list --branch main",
    "edgepose baseline trend --branch main",
    "edgepose baseline trend --metric latency --rules my-rules.yaml --json",
)

StoreFlag = Annotated[Path, typer.Option("--store", help="Folder of the baselines; in git, or anywhere else.")]
BranchFlag = Annotated[str, typer.Option("--branch", help="Only this branch.")]
DeviceFlag = Annotated[str, typer.Option("--device", help="Only this device.")]
MetricFlag = Annotated[str, typer.Option("--metric", help="Only this metric.")]
STORE = Path("profiles/baselines")
_BARS = "▁▂▃▄▅▆▇█"


def baseline() -> None:
    """Keep accepted figures per branch, device and metric, and find slow creep in them."""


def accept(
    verdict: Annotated[Path, typer.Argument(metavar="VERDICT", help="What `edgepose gate --json` wrote.")],
    branch: Annotated[str, typer.Option("--branch", help="Branch whose baseline it becomes.")],
    commit: Annotated[
        str | None,
        typer.Option("--commit", help="What it was made from. Default: the head of this checkout."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Name of the device. Default: its processor and the host's digest.")
    ] = "",
    why: Annotated[str, typer.Option("--note", help="Why; needed where the gate did not pass.")] = "",
    new_series: Annotated[
        bool, typer.Option("--new-series", help="Begin anew where reference or conditions are other ones than before.")
    ] = False,
    store: StoreFlag = STORE,
) -> int:
    """Make the candidate of a verdict the baseline of a branch on a device: one more point in each metric's series."""
    found = _read(verdict)
    told = Acceptance(
        branch=branch,
        commit=_head() if commit is None else commit,
        accepted=datetime.now(UTC).isoformat(timespec="seconds"),
        device=device,
        note=why,
        new_series=new_series,
    )
    points = accept_verdict(store, found, told)
    show_table(("metric", "value", "against the reference"), [_row(point) for point in points.values()])
    begun = sum(point.begins for point in points.values())
    series = f"{len(points)} metrics" + (f", {begun} of them in new series" if begun else "")
    say(f"accepted {found.candidate} as the baseline of {branch} on {next(iter(points)).device}: {series}")
    return 0


def list_(
    branch: BranchFlag = "",
    device: DeviceFlag = "",
    metric: MetricFlag = "",
    store: StoreFlag = STORE,
    json: StdoutJsonFlag = False,
) -> int:
    """Show the latest accepted figure of each series."""
    found = _series(store, branch, device, metric)
    if json:
        write_json(STDOUT, [{**key._asdict(), "points": len(points), "last": points[-1]} for key, points in found])
        return 0
    head = ("branch", "device", "metric", "value", "against the reference", "points", "commit", "accepted", "note")
    rows = [
        (
            key.branch,
            key.device,
            *_row(points[-1]),
            f"{len(current(points))}",
            points[-1].commit[:12],
            points[-1].accepted[:10],
            points[-1].note,
        )
        for key, points in found
    ]
    show_table(head, rows)
    return 0


def trend(
    branch: BranchFlag = "",
    device: DeviceFlag = "",
    metric: MetricFlag = "",
    rules: Annotated[str, typer.Option("--rules", help="The gate's rules say how far it may creep.")] = "default",
    store: StoreFlag = STORE,
    json: StdoutJsonFlag = False,
) -> int:
    """Say how far each series has moved from its frozen reference, and at which commits.

    Exit code 3 where accuracy creeps, 4 where anything else does, 0 otherwise.
    """
    rule = load_rules(rules).trend
    found = [trend_of(key, current(points), rule) for key, points in _series(store, branch, device, metric)]
    code = min((one.exit_code for one in found if one.exit_code), default=0)
    if json:
        write_json(STDOUT, found)
        return code
    head = ("", "branch", "device", "metric", "now", "surely", "allowed", "points", "course")
    show_table(head, [_trend_row(one) for one in found])
    for one in found:
        if one.tendency != "steady":
            say(f"{one.branch} on {one.device}: {one.tendency}: {one.text}")
    say(f"trend: {'creep' if code else 'no creep'} in {len(found)} series (exit code {code})")
    return code


list_.__name__ = "list"
ACTIONS = (accept, list_, trend)


def _series(store: Path, branch: str, device: str, metric: str) -> list[tuple[Key, list[Point]]]:
    found = [(key, read_series(store, key)) for key in find_series(store, branch=branch, device=device, metric=metric)]
    if not any(points for _, points in found):
        wanted = " ".join(filter(None, (branch, device, metric))) or "anything"
        raise UsageError(f"baselines {store}", found=f"nothing of {wanted}", expected="series that were accepted")
    return [(key, points) for key, points in found if points]


def _read(path: Path) -> Verdict:
    try:
        return verdict_from_json(path.read_bytes())
    except OSError as err:
        raise BadInput(str(path), found=err.strerror or str(err), expected="what edgepose gate --json wrote") from err
    except msgspec.DecodeError as err:
        raise BadInput(str(path), found=str(err), expected="what edgepose gate --json wrote") from err


def _head() -> str:
    """The commit that is checked out here; "" outside of a checkout."""
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        note("git cannot be asked for the commit; name it with --commit")
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def _row(point: Point) -> tuple[str, str, str]:
    if point.metric == "latency":
        value = f"{point.value:.3f} ms"
    elif point.metric in FACTS:
        value = spelt(point.value, FACTS[point.metric].unit)
    else:
        value = f"{100 * point.value:.2f} %"
    return point.metric, value, spelt_worse(point.worse, point.scale)


def _trend_row(one: Trend) -> Sequence[str]:
    return (
        one.tendency,
        one.branch,
        one.device,
        one.metric,
        spelt_worse(one.level, one.scale),
        spelt_worse(one.surely, one.scale),
        spelt_worse(one.allowed, one.scale),
        f"{one.points}",
        _course(one.values),
    )


def _course(values: Sequence[float]) -> str:
    """The latest twenty points as bars, the worst the highest."""
    shown = values[-20:]
    low, high = min(shown), max(shown)
    steps = len(_BARS) - 1
    return "".join(_BARS[round(steps * (value - low) / (high - low)) if high > low else 0] for value in shown)
