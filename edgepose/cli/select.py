"""`edgepose select`: measure which engine of a bundle, with how many threads, serves best on this machine.

Invariant: what is shown is what the next start of `edgepose run` or of an app that asks for the same goes by.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepose.bundle import read_bundle
from edgepose.cli.console import STDOUT, note, show_table, steps, write_json
from edgepose.cli.options import (
    AimFlag,
    BackendFlag,
    DeviceFlag,
    PrecisionFlag,
    ProviderFlag,
    StdoutJsonFlag,
    StrictFlag,
    ThreadsFlag,
    checked_aim,
    checked_backend,
    checked_execution,
    checked_precision,
)
from edgepose.engines import runnable_engines
from edgepose.errors import UsageError
from edgepose.selection import Trial, Wishes
from edgepose.selection import select as measured
from edgepose.spec import AIMS

EXAMPLES = (
    "edgepose select kpe-s.bundle",
    "edgepose select kpe-s.bundle --aim throughput --again",
    "edgepose select kpe-s.bundle --aim memory --json",
)


def select(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    aim: AimFlag = None,
    again: Annotated[bool, typer.Option("--again", help="Measure although it was measured before.")] = False,
    backend: BackendFlag = None,
    precision: PrecisionFlag = None,
    provider: ProviderFlag = None,
    device: DeviceFlag = None,
    strict: StrictFlag = False,
    threads: ThreadsFlag = None,
    json: StdoutJsonFlag = False,
) -> int:
    """Measure every engine with one, half and all cores, and remember the best for this machine.

    Each runs in a process of its own and has to answer the bundle's golden inputs first; the fastest are timed once
    more in turns. `edgepose run` and `PoseEstimator.from_bundle` do this by themselves at their first start.

    Exit code 6 where none can serve.
    """
    wanted, execution = checked_execution(checked_backend(backend), provider, device, strict=strict)
    chosen = checked_aim(aim) or "latency"
    if aim is None and chosen == "none":
        chosen = "latency"  # who asks for this command wants to know, whatever apps are told to do
    if chosen == "none":
        raise UsageError("--aim", found="none", expected=", ".join(AIMS), fix="leave this command out instead")
    opened = read_bundle(bundle)
    engines = runnable_engines(opened, wanted, checked_precision(precision))
    with steps() as shown:
        found = measured(opened, engines, Wishes(chosen, threads, execution), again=again, told=shown.told)
    if json:
        write_json(STDOUT, found)
    else:
        head = ("engine", "ms", "memory, MiB", "energy, mJ", "")
        show_table(head, [_row(trial, found.best) for trial in found.trials])
    note(found.why)
    if found.best is not None:
        note("edgepose run and apps that ask for the same start with it, without measuring")
    return 0 if found.best is not None else 6


def _row(trial: Trial, best: Trial | None) -> tuple[str, ...]:
    said = trial.fault or ("chosen" if trial == best else "")
    ms = "" if trial.ms is None else f"{trial.ms:.2f}"
    memory = "" if trial.peak_rss_bytes is None else f"{trial.peak_rss_bytes / 2**20:.0f}"
    energy = "" if trial.energy_mj is None else f"{trial.energy_mj:.2f}"
    return (trial.text, ms, memory, energy, said)
