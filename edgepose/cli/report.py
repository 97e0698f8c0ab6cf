"""`edgepose report`: one HTML page with all that is known of a bundle.

Invariant: the page is made from files that other verbs wrote; nothing is measured here, and the page needs no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from edgepose.bundle import Bundle, read_bundle
from edgepose.cli.console import note
from edgepose.cli.options import check_outputs
from edgepose.errors import BadInput
from edgepose.profiler.record import ProfileRecord
from edgepose.profiler.report import Report, render_report
from edgepose.profiler.verdict import Verdict
from edgepose.storage import atomic_write

EXAMPLES = (
    "edgepose report kpe-s.bundle",
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
    gate: Annotated[Path | None, typer.Option("--gate", help="What `gate --json` wrote.")] = None,
    profile: Annotated[list[Path] | None, typer.Option("--profile", help="What `profile --json` wrote.")] = None,
    evaluation: Annotated[list[Path] | None, typer.Option("--eval", help="What `eval --json` wrote.")] = None,
) -> int:
    """Write one HTML page: the bundle's facts and stages and, with their files, accuracy, latency and verdict."""
    target = out or bundle.resolve().with_suffix(".html")
    profiles, evaluations = profile or [], evaluation or []
    check_outputs([target], [bundle, *profiles, *evaluations, *([gate] if gate else [])])
    opened = read_bundle(bundle)
    page = Report(
        title=opened.manifest.name,
        subtitle=f"bundle {opened.digest[:16]}, written by edgepose {opened.manifest.edgepose_version}",
        facts=_facts(opened),
        verdict=_read(gate, Verdict, "gate --json") if gate else None,
        profiles=[_read(path, ProfileRecord, "profile --json") for path in profiles],
        metrics=dict(_figures(_read(path, _Evaluation, "eval --json")) for path in evaluations),
        stages=opened.manifest.reports,
    )
    atomic_write(target, render_report(page).encode())
    note(f"wrote {target}")
    return 0


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
