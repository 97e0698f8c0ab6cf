"""`edgepose profile`: latency with bounds, time per stage, throughput and memory of one engine, in a fresh process.

Invariant: a percentile that the sample is too small for is shown as missing, with the number of calls it needs.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from edgepose.cli.console import STDOUT, note, show_facts, show_table, steps, write_json
from edgepose.cli.options import (
    BackendFlag,
    JsonFlag,
    PrecisionFlag,
    SeedFlag,
    check_outputs,
    checked_backend,
    checked_precision,
)
from edgepose.errors import UsageError
from edgepose.timing.profile import profile as profile_bundle
from edgepose.timing.record import ProfileProtocol, ProfileRecord

EXAMPLES = (
    "edgepose profile kpe-s.bundle",
    "edgepose profile kpe-s.bundle --backend openvino --persons 8 --duration 20 --json profile.json",
)


def profile(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    backend: BackendFlag = None,
    precision: PrecisionFlag = None,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Threads, 0 for the engine's own.")] = 0,
    duration: Annotated[float, typer.Option("--duration", min=0.1, help="Seconds to sample.")] = 5.0,
    persons: Annotated[int, typer.Option("--persons", min=1, help="People per frame, inferred as one batch.")] = 1,
    frame: Annotated[str, typer.Option("--frame", help="Size of the synthetic frame, WIDTHxHEIGHT.")] = "640x480",
    seed: SeedFlag = 0,
    json: JsonFlag = None,
) -> int:
    """Measure one engine of a bundle from frame to poses, alone in a fresh process.

    Absolute times describe this machine at this moment; to compare two bundles, use `edgepose gate`.
    """
    check_outputs([json], [bundle])
    protocol = ProfileProtocol(
        duration_s=duration, threads=threads, persons=persons, frame_hw=_frame_hw(frame), seed=seed
    )
    with steps() as progress:
        record = profile_bundle(
            bundle,
            protocol,
            backend=checked_backend(backend),
            precision=checked_precision(precision),
            progress=lambda done, whole: progress.told(f"profiling {bundle.name}, seconds", done, whole),
        )
    if json is not None:
        write_json(json, record)
    _show(record, err=json == STDOUT)
    if json not in (None, STDOUT):
        note(f"wrote {json}")
    return 0


def _frame_hw(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,4})[x×]([1-9]\d{0,4})", text)
    if match is None:
        raise UsageError("--frame", found=repr(text), expected="WIDTHxHEIGHT in pixels, such as 1280x720")
    return int(match[2]), int(match[1])


def _show(record: ProfileRecord, *, err: bool) -> None:
    height, width = record.protocol.frame_hw
    title = (
        f"{record.label} on {record.backend} {record.precision}, frames of {width} x {height}, {record.people} people"
    )
    rows = [
        (p.name, "–", f"needs {p.needed} calls")
        if p.value_ms is None
        else (p.name, f"{p.value_ms:.3f} ms", f"{p.low_ms:.3f} to {p.high_ms:.3f}")
        for p in record.latency
    ]
    show_table(("frame to poses", "time", "95 % bounds"), rows, title=title, err=err)
    stages = [(name, f"{value:.3f} ms") for name, value in zip(record.stages, record.stage_ms, strict=True)]
    show_table(("stage", "median"), stages, title="\nstages", err=err)
    facts = record.facts
    show_facts(
        {
            "calls": f"{record.samples_ns.shape[0]} in {record.protocol.duration_s:g} s, threads: {facts.threads}",
            "throughput": f"{record.persons_per_s:.1f} people per second",
            "start": f"{facts.load_ms:.0f} ms to load, first frame {facts.first_call_ms:.2f} ms",
            "memory": f"peak {facts.peak_rss_bytes / 1e6:.0f} MB, steady {facts.steady_rss_bytes / 1e6:.0f} MB",
            "processor": f"{record.cpu_share:.2f} cores busy, load average {record.load_average[0]:.1f} to "
            f"{record.load_average[1]:.1f}",
            "disturbances": f"{facts.preemptions} preemptions, {facts.page_faults} page faults from disk",
        },
        title="\nprocess",
        err=err,
    )
