"""`edgepose gate`: may the candidate replace the baseline? Accuracy over the same people, latency in paired processes.

Invariant: the exit code is the verdict's, and every file that was asked for is written before it is returned, whatever
it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NamedTuple
from urllib.parse import quote

import typer

from edgepose.bundle import MANIFEST
from edgepose.cli.console import STDOUT, note, say, show_table, steps, write_json
from edgepose.cli.github import annotate_verdict, publish_verdict, require_github
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
from edgepose.profiler.gate.files import junit_from_verdict, lines_from_verdict
from edgepose.profiler.gate.rules import load_rules
from edgepose.profiler.gate.run import GateOptions, GateRun, run_gate
from edgepose.profiler.gate.sarif import sarif_from_verdict
from edgepose.profiler.gate.table import HEAD, markdown_from_verdict, rows_from_verdict
from edgepose.profiler.gate.verdict import Verdict
from edgepose.profiler.pages.report import Report, render_report
from edgepose.storage import atomic_write

EXAMPLES = (
    "edgepose gate base.bundle candidate.bundle --data lspet --json gate.json",
    "edgepose gate base.bundle candidate.bundle --data lspet --rules ci-quick --junit gate.xml --html gate.html",
    "edgepose gate base.bundle candidate.bundle --annotations val.json --images images --rules my-rules.yaml",
    "edgepose gate base.bundle candidate.bundle --data lspet --github --sarif gate.sarif --markdown gate.md",
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
    sarif: Annotated[Path | None, typer.Option("--sarif", help="Write SARIF 2.1.0 to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option("--markdown", help="Write Markdown tables to this file.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a report with charts to this file.")] = None,
    github: Annotated[
        bool, typer.Option("--github", help="Add the verdict to the summary and outputs of this GitHub Actions step.")
    ] = False,
) -> int:
    """Compare two bundles on the same people and in paired processes, and say pass, warn, fail or inconclusive.

    Exit code 0 for pass and warn, 3 for a loss of accuracy, 4 for a loss of speed, memory or size, 7 where nothing
    could be decided, 6 where the machine is too noisy to decide.
    """
    sources = [baseline, candidate, *filter(None, (annotations, data / f"{split}.json" if data else None))]
    outputs = Outputs(json, junit, sarif, markdown, html)
    check_outputs(outputs, sources)
    if github:
        require_github()
    loaded = load_rules(rules)
    wants_data = bool(loaded.accuracy) or any((data, annotations, images))
    people = labelled_people(data, split, annotations, images) if wants_data else None
    options = GateOptions(
        backend=checked_backend(backend), precision=checked_precision(precision), threads=threads, seed=seed
    )
    with steps() as progress:
        run = run_gate(baseline, candidate, people, loaded, options=options, progress=progress.told)
    _write(run, outputs, candidate)
    _show(run.verdict, err=json == STDOUT)
    (publish_verdict if github else annotate_verdict)(run.verdict)
    for path in outputs:
        if path not in (None, STDOUT):
            note(f"wrote {path}")
    return run.verdict.exit_code


class Outputs(NamedTuple):
    """Files that were asked for."""

    json: Path | None
    junit: Path | None
    sarif: Path | None
    markdown: Path | None
    html: Path | None


def _write(run: GateRun, outputs: Outputs, candidate: Path) -> None:
    verdict = run.verdict
    if outputs.json is not None:
        write_json(outputs.json, verdict)
    if outputs.junit is not None:
        atomic_write(outputs.junit, junit_from_verdict(verdict))
    if outputs.sarif is not None:
        atomic_write(outputs.sarif, sarif_from_verdict(verdict, _location(candidate)))
    if outputs.markdown is not None:
        atomic_write(outputs.markdown, markdown_from_verdict(verdict).encode())
    if outputs.html is not None:
        title = f"{verdict.candidate} against {verdict.baseline}"
        page = render_report(Report(title=title, verdict=verdict, latency=run.timings))
        atomic_write(outputs.html, page.encode())


def _location(candidate: Path) -> str:
    """Where the candidate's manifest lies: relative to the working directory if below it, as SARIF wants it."""
    manifest = candidate.resolve() / MANIFEST
    here = Path.cwd()
    place = manifest.relative_to(here) if manifest.is_relative_to(here) else Path(manifest.parent.name, MANIFEST)
    return quote(place.as_posix())


def _show(verdict: Verdict, *, err: bool) -> None:
    first, *_, last = lines_from_verdict(verdict)
    show_table(HEAD, rows_from_verdict(verdict), title=first, err=err)
    lost = [f"{joint.joint} {joint.diff_points:+.1f}" for joint in verdict.joints if joint.lost]
    joints = [f"joints lost beyond doubt, in points: {', '.join(lost)}"] if lost else []
    for line in (*verdict.reasons, *joints, *verdict.skipped, last):
        (note if err else say)(line)
