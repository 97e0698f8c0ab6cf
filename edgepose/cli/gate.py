"""`edgepose gate`: may the candidate replace the baseline? Accuracy over the same people, latency in paired processes.

Invariant: the exit code is the verdict's, and JSON and JUnit are written before it is returned, whatever it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepose.cli.console import STDOUT, annotate, note, say, steps, write_json
from edgepose.cli.options import (
    AnnotationsFlag,
    BackendFlag,
    DataFlag,
    ImagesFlag,
    JsonFlag,
    PrecisionFlag,
    SeedFlag,
    SplitFlag,
    check_outputs,
    checked_backend,
    checked_precision,
    labelled_people,
)
from edgepose.profiler.report import Report, render_report
from edgepose.profiler.rules import load_rules
from edgepose.profiler.run_gate import GateOptions, GateRun, run_gate
from edgepose.profiler.verdict import Verdict
from edgepose.profiler.verdict_files import junit_from_verdict, lines_from_verdict
from edgepose.storage import atomic_write

EXAMPLES = (
    "edgepose gate base.bundle candidate.bundle --data lspet --json gate.json",
    "edgepose gate base.bundle candidate.bundle --data lspet --rules ci-quick --junit gate.xml --html gate.html",
    "edgepose gate base.bundle candidate.bundle --annotations val.json --images images --rules my-rules.yaml",
)


def gate(
    baseline: Annotated[Path, typer.Argument(metavar="BASE", help="Folder of the bundle that is good enough.")],
    candidate: Annotated[Path, typer.Argument(metavar="CAND", help="Folder of the bundle that wants to replace it.")],
    data: DataFlag = None,
    split: SplitFlag = "val",
    annotations: AnnotationsFlag = None,
    images: ImagesFlag = None,
    rules: Annotated[
        str, typer.Option("--rules", help="What counts as worse: default, ci-quick, or a YAML file.")
    ] = "default",
    backend: BackendFlag = None,
    precision: PrecisionFlag = None,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Threads of either arm, 0 for all cores.")] = 0,
    seed: SeedFlag = 0,
    json: JsonFlag = None,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML to this file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report with charts to this file.")] = None,
) -> int:
    """Compare two bundles on the same people and in paired processes, and say pass, warn, fail or inconclusive.

    Exit code 0 for pass and warn, 3 for a loss of accuracy, 4 for a loss of speed, memory or size, 7 where nothing
    could be decided, 6 where the machine is too noisy to decide.
    """
    sources = [baseline, candidate, *filter(None, (annotations, data / f"{split}.json" if data else None))]
    check_outputs([json, junit, html], sources)
    loaded = load_rules(rules)
    wants_data = bool(loaded.accuracy) or any((data, annotations, images))
    people = labelled_people(data, split, annotations, images) if wants_data else None
    options = GateOptions(
        backend=checked_backend(backend), precision=checked_precision(precision), threads=threads, seed=seed
    )
    with steps() as progress:
        run = run_gate(baseline, candidate, people, loaded, options=options, progress=progress.told)
    _write(run, json, junit, html)
    for line in lines_from_verdict(run.verdict):
        (note if json == STDOUT else say)(line)
    _annotate(run.verdict)
    for path in (json, junit, html):
        if path not in (None, STDOUT):
            note(f"wrote {path}")
    return run.verdict.exit_code


def _write(run: GateRun, json: Path | None, junit: Path | None, html: Path | None) -> None:
    if json is not None:
        write_json(json, run.verdict)
    if junit is not None:
        atomic_write(junit, junit_from_verdict(run.verdict))
    if html is not None:
        title = f"{run.verdict.candidate} against {run.verdict.baseline}"
        page = render_report(Report(title=title, verdict=run.verdict, latency=run.timings))
        atomic_write(html, page.encode())


def _annotate(verdict: Verdict) -> None:
    """One annotation beside the pull request per check that is not a plain pass."""
    levels = {"warn": "warning", "inconclusive": "warning", "fail": "error"}
    for check in verdict.checks:
        if check.outcome in levels:
            annotate(levels[check.outcome], f"edgepose gate: {check.outcome}", check.text)
