"""`edgepose report`: one HTML page with all that is known of a bundle, and the same as JSON.

Invariant: without --data and --latency nothing is measured, and the page is made from files that other verbs wrote; the
page needs no network, and page and JSON are made from the same values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from edgepose.bundle import Bundle, read_bundle
from edgepose.cli.console import STDOUT, note, show_table, steps, write_json
from edgepose.cli.options import DataFlag, JsonFlag, SeedFlag, check_outputs
from edgepose.cli.report_pictures import WorstPeople, worst_people
from edgepose.cli.report_steps import MeasuredSteps, StepOptions, measure_steps
from edgepose.errors import BadInput, UsageError
from edgepose.profiler.gate.verdict import Verdict
from edgepose.profiler.pages.report import Report, render_report
from edgepose.profiler.pages.stage_page import Scan, sensitivity_section, stage_sections
from edgepose.profiler.waterfall import Waterfall
from edgepose.storage import atomic_write
from edgepose.timing.record import ProfileRecord

EXAMPLES = (
    "edgepose report kpe-s.bundle",
    "edgepose report kpe-s.bundle --data lspet --out kpe-s.html --json kpe-s.json",
    "edgepose report kpe-s.bundle --data lspet --split dev --slices --baseline control.safetensors --scan scan.json",
    "edgepose report kpe-s.bundle --eval eval.json --profile profile.json --gate gate.json --out kpe-s.html",
)

T = TypeVar("T")


class _Evaluation(msgspec.Struct):
    """The part of `eval --json` that the page shows."""

    subject: str
    backend: str
    persons: int
    metrics: dict[str, float | None]
    oks: dict[str, float | None] = {}


def report(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page. Default: BUNDLE.html beside it.")] = None,
    json: JsonFlag = None,
    data: DataFlag = None,
    split: Annotated[
        str | None, typer.Option("--split", help="SPLIT.json of --data, or dev: held out of train. Default: val.")
    ] = None,
    people: Annotated[int | None, typer.Option("--people", min=1, help="A random sample of so many.")] = None,
    slices: Annotated[bool, typer.Option("--slices", help="The same people occluded, cut off … as well.")] = False,
    baseline: Annotated[
        str | None, typer.Option("--baseline", help="A network or bundle to compare with as well: a control arm.")
    ] = None,
    latency: Annotated[
        bool | None, typer.Option("--latency/--no-latency", help="Time the steps. Default: with --data.")
    ] = None,
    pictures: Annotated[
        int | None, typer.Option("--pictures", min=0, help="Photographs where the compressed network is worst.")
    ] = None,
    seed: SeedFlag = 0,
    scan: Annotated[list[Path] | None, typer.Option("--scan", help="What `prune scan` wrote.")] = None,
    gate: Annotated[Path | None, typer.Option("--gate", help="What `gate --json` wrote.")] = None,
    profile: Annotated[list[Path] | None, typer.Option("--profile", help="What `profile --json` wrote.")] = None,
    evaluation: Annotated[list[Path] | None, typer.Option("--eval", help="What `eval --json` wrote.")] = None,
) -> int:
    """Write one HTML page: facts, stages, and with --data what every step of the compression cost.

    The steps are the float checkpoint, what each stage made of it, the ONNX graph and every engine. Checkpoints are
    looked for in the zoo and in the cache, by the hashes in the bundle.
    """
    target = out or bundle.resolve().with_suffix(".html")
    _check_flags(data, {"--split": split, "--people": people, "--slices": slices or None, "--baseline": baseline,
                        "--pictures": pictures})  # fmt: skip
    files = [*(scan or []), *(profile or []), *(evaluation or []), *([gate] if gate else [])]
    check_outputs([target, json], [bundle, *files, *([data / f"{split or 'val'}.json"] if data else [])])
    opened = read_bundle(bundle)
    page = Report(
        title=opened.manifest.name,
        subtitle=f"bundle {opened.digest[:16]}, written by edgepose {opened.manifest.edgepose_version}",
        facts=_facts(opened),
        verdict=_read(gate, Verdict, "gate --json") if gate else None,
        profiles=[_read(path, ProfileRecord, "profile --json") for path in profile or []],
        metrics=dict(_figures(_read(path, _Evaluation, "eval --json")) for path in evaluation or []),
        stages=opened.manifest.reports,
    )
    scans = [(path.name, _read(path, Scan, "prune scan")) for path in scan or []]
    timed = data is not None if latency is None else latency
    options = StepOptions(data, split or "val", people, slices, baseline, timed, seed)
    measured, worst = _measured(opened, options, 6 if pictures is None else pictures)
    page = _with_steps(page, measured, worst, scans)
    atomic_write(target, render_report(page).encode())
    if json is not None:
        write_json(json, _json(opened, page, worst, scans))
    _show(measured.waterfall, err=json == STDOUT)
    for path in (target, json):
        if path not in (None, STDOUT):
            note(f"wrote {path}")
    return 0


def _check_flags(data: Path | None, flags: dict[str, object]) -> None:
    for flag, value in flags.items():
        if data is None and value is not None:
            raise UsageError(flag, found="no --data", expected="labelled people to measure", fix="add --data DIR")


def _measured(bundle: Bundle, options: StepOptions, pictures: int) -> tuple[MeasuredSteps, WorstPeople]:
    with steps() as progress:
        measured = measure_steps(bundle, options, progress)
    if measured.people is None or not pictures:
        return measured, WorstPeople()
    return measured, worst_people(measured.waterfall, measured.people, dict(measured.records), pictures)


def _with_steps(page: Report, measured: MeasuredSteps, worst: WorstPeople, scans: Sequence[tuple[str, Scan]]) -> Report:
    extra = [*stage_sections(page.stages), *(sensitivity_section(scan, name) for name, scan in scans)]
    heading = "Where the compressed network is worst"
    return replace(page, waterfall=measured.waterfall, extra=extra, pictures=worst.pictures, pictures_heading=heading)


def _json(bundle: Bundle, page: Report, worst: WorstPeople, scans: Sequence[tuple[str, Scan]]) -> dict[str, Any]:
    """What the page says; people as numbers instead of pictures."""
    return {
        "bundle": page.title,
        "digest": bundle.digest,
        "facts": page.facts,
        "waterfall": page.waterfall,
        "worst_people": worst.rows,
        "scans": dict(scans),
        "metrics": page.metrics,
        "profiles": page.profiles,
        "gate": page.verdict,
        "stages": page.stages,
    }


def _show(found: Waterfall, *, err: bool) -> None:
    """The headline of each step, on the terminal."""
    if found.people is None:
        return
    rows = []
    for step in found.steps:
        cells = [step.title]
        for metric in found.metrics[:2]:
            value, change = step.metrics.get(metric), step.changes.get(metric)
            cells.append("–" if value is None else f"{100 * value:.2f}")
            cells.append("" if change is None else _change(change.points, change.low, change.high))
        cells.append("–" if step.costs.latency is None else f"{step.costs.latency.median_ms:.3f}")
        rows.append(cells)
    head = ["step", *(part for metric in found.metrics[:2] for part in (metric, "change")), "ms"]
    title = f"{found.people.persons} people of {found.people.name}, % and points with 95 % bounds"
    show_table(head, rows, title=title, err=err)


def _change(points: float, low: float | None, high: float | None) -> str:
    return f"{points:+.2f}" if low is None or high is None else f"{points:+.2f} ({low:+.2f} to {high:+.2f})"


def _facts(bundle: Bundle) -> dict[str, str]:
    manifest, spec = bundle.manifest, bundle.manifest.spec
    height, width = spec.preprocess.input_hw
    return {
        "network": spec.name,
        "input": f"{width} x {height} {spec.preprocess.color}",
        "keypoints": f"{spec.keypoints.count}: {', '.join(spec.keypoints.names)}",
        **{
            f"engine {engine.path}": f"{engine.backend} {engine.precision}, {engine.builder}"
            for engine in manifest.engines
        },
        **{f"sha256 {link}": digest for link, digest in manifest.chain.items()},
        "digest": bundle.digest,
    }


def _figures(evaluation: _Evaluation) -> tuple[str, dict[str, float]]:
    known = {**evaluation.metrics, **{name: evaluation.oks[name] for name in ("oks_ap",) if name in evaluation.oks}}
    label = f"{evaluation.subject} on {evaluation.backend}, {evaluation.persons} people"
    return label, {name: float("nan") if value is None else value for name, value in known.items()}


def _read(path: Path, kind: type[T], written_by: str) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as err:
        found = err.strerror or "an unreadable file"
        raise BadInput(str(path), found=found, expected=f"what `{written_by}` wrote", fix="check the path") from err
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BadInput(str(path), found=_first_line(err), expected=f"what `edgepose {written_by}` wrote") from err


def _first_line(err: Any) -> str:
    return str(err).partition("\n")[0]
