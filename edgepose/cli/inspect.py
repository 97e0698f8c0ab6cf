"""`edgepose inspect`: what a bundle or checkpoint holds and where it came from, or what an ONNX file seems to be.

Invariant: of bundles and checkpoints nothing is loaded but a manifest or a card; no weights, no runtime, no torch. What
is proposed for an ONNX file is valid YAML on stdout, each line with how sure it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from edgepose.bundle import Bundle, read_bundle
from edgepose.cli.console import STDOUT, note, say, show_facts, show_table, write_json
from edgepose.cli.options import StdoutJsonFlag, check_outputs
from edgepose.cli.subject import find_subject
from edgepose.errors import MissingDependency, UsageError
from edgepose.spec import Decoder, Heatmap, ModelSpec, OneStage, Regression, SimCC, TensorSpec
from edgepose.storage import atomic_write

EXAMPLES = (
    "edgepose inspect kpe-s.bundle",
    "edgepose inspect kpe-s",
    "edgepose inspect runs/mine.safetensors --json",
    "edgepose inspect other.onnx --out spec.yaml",
)

_LONG = 64  # characters of a value in the table of stages


def inspect(
    subject: Annotated[
        str, typer.Argument(metavar="NETWORK", help="A bundle, a checkpoint, a name of the zoo, or an ONNX file.")
    ],
    json: StdoutJsonFlag = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the specification proposed for an ONNX file here.")
    ] = None,
) -> int:
    """Show the network, the engines, the chain from data to engine, and what each stage reported.

    Of an ONNX file, propose the specification that `edgepose import` needs, and say of each line how sure it is.
    """
    if subject.lower().endswith(".onnx"):
        return _propose(Path(subject), out, json=json)
    if out is not None:
        raise UsageError("--out", found=subject, expected="an ONNX file", fix="leave it off, or use --json")
    found = find_subject(subject)
    if found.is_bundle:
        bundle = read_bundle(found.path)
        if json:
            write_json(STDOUT, {"digest": bundle.digest, "manifest": msgspec.to_builtins(bundle.manifest)})
        else:
            _show_bundle(bundle)
        return 0
    from edgepose.blocks.card import read_card

    card = read_card(found.path)
    if json:
        write_json(STDOUT, msgspec.to_builtins(card))
        return 0
    _show_spec(card.spec, {"weights": card.weights_sha256, "notes": card.notes})
    for dataset, figures in card.metrics.items():
        show_table(("metric", "value"), [(k, f"{v:.4g}") for k, v in figures.items()], title=f"\nmetrics on {dataset}")
    if card.lineage:
        rows = [(e.stage, _brief(e.config), _brief(e.inputs), _brief(e.report)) for e in card.lineage]
        show_table(("stage", "settings", "inputs", "report"), rows, title="\nstages")
    if card.plan is not None:
        _show_plan(card.plan)
    if card.quantisation is not None:
        show_facts({"quantised": _brief(card.quantisation)}, title="\nquantisation")
    return 0


def _propose(path: Path, out: Path | None, *, json: bool) -> int:
    check_outputs([out], [path])
    try:
        from edgepose.importer.onnx_file import read_onnx
        from edgepose.importer.propose import as_yaml, propose
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or str(err), extra="compile", needed_for=f"inspecting {path}") from err
    file = read_onnx(path)
    proposal = propose(file, name=path.stem)
    if json:
        facts = {"file": str(path), "sha256": file.digest, "opset": file.opset, "notes": file.notes}
        proposed = {"confidence": proposal.confidence, "lines": proposal.lines, "problems": proposal.problems}
        write_json(STDOUT, {**facts, **proposed})
        return 0
    if out is None:
        say(as_yaml(proposal).rstrip())
    else:
        atomic_write(out, as_yaml(proposal).encode())
    for line in file.notes:
        note(line)
    counts = {level: sum(line.confidence == level for line in proposal.lines) for level in ("sure", "likely", "guess")}
    told = ", ".join(f"{count} {level}" for level, count in counts.items() if count)
    then = f"edgepose import {path} --spec {out or 'FILE'}"
    note(f"{path.name}, opset {file.opset}: {told}; check what is not sure, then {then}")
    return 0


def _show_bundle(bundle: Bundle) -> None:
    manifest = bundle.manifest
    size = sum((bundle.root / name).stat().st_size for name in manifest.files if (bundle.root / name).is_file())
    facts = {
        "bundle": manifest.name,
        "digest": bundle.digest,
        "written by": f"edgepose {manifest.edgepose_version}",
        "files": f"{len(manifest.files)}, {size / 1e6:.1f} MB",
    }
    _show_spec(manifest.spec, facts)
    engines = [
        (e.target, e.backend, e.precision, e.dialect, str(e.threads or "all"), e.builder, e.path)
        for e in manifest.engines
    ]
    show_table(("target", "backend", "precision", "dialect", "threads", "builder", "file"), engines, title="\nengines")
    show_table(("link", "sha256"), list(manifest.chain.items()), title="\nchain, from data to engine")
    if manifest.reports:
        rows = [(stage, _brief(report)) for stage, report in manifest.reports.items()]
        show_table(("stage", "report"), rows, title="\nstages")
    golden = "none" if manifest.golden is None else _brief(manifest.golden.tolerances)
    show_facts({"golden vectors": golden})


def _show_spec(spec: ModelSpec, facts: Mapping[str, str]) -> None:
    height, width = spec.preprocess.input_hw
    rows = {
        "network": spec.name,
        **facts,
        "input": f"{_tensors(spec.inputs)}, {width} x {height} {spec.preprocess.color}",
        "outputs": f"{_tensors(spec.outputs)}, decoded as {_decoding(spec.decoder)}",
        "keypoints": f"{spec.keypoints.count}: {', '.join(spec.keypoints.names)}",
    }
    show_facts({name: value for name, value in rows.items() if value})


def _decoding(decoder: Decoder) -> str:
    match decoder:
        case SimCC():
            return "SimCC"
        case Heatmap():
            return f"heat maps, stride {decoder.stride:g}"
        case Regression():
            return "coordinates"
        case OneStage():
            return "people of the whole frame" if decoder.keypoints else "boxes"


def _show_plan(plan: Mapping[str, Any]) -> None:
    scalars = {name: _brief(value) for name, value in plan.items() if not isinstance(value, (list, tuple))}
    counts = {name: f"{len(value)} entries" for name, value in plan.items() if isinstance(value, (list, tuple))}
    show_facts({**scalars, **counts}, title="\npruning plan")


def _tensors(tensors: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{tensor.name} ({', '.join(map(str, tensor.shape))})" for tensor in tensors)


def _brief(value: Any) -> str:
    """A JSON value in a few words: leaves by name, lists by length, digests shortened."""
    if isinstance(value, Mapping):
        parts = [f"{name} {_brief(inner)}" for name, inner in value.items()]
        text = ", ".join(parts)
        return text if len(text) <= 4 * _LONG else f"{text[: 4 * _LONG]}…"
    if isinstance(value, (list, tuple)):
        return str(list(value)) if len(str(list(value))) <= _LONG else f"[{len(value)} entries]"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef"):
        return f"{value[:12]}…"
    return str(value)
