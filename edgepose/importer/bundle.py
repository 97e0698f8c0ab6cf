"""IMPORT: a third-party ONNX file and its user's specification to a bundle. `import_model` is the order of steps.

Invariant: the file is checked before anything runs it, and nothing is half-written: the bundle appears whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgepose.bundle import BundleDraft, GoldenDraft
from edgepose.export.ends import fix_batch
from edgepose.export.engine import Reference, engine_from_onnx
from edgepose.host import fingerprint
from edgepose.importer.convert import MODEL, read_converted, write_converted
from edgepose.importer.onnx_file import read_onnx
from edgepose.importer.spec import ImportSpec
from edgepose.pose.codec import decode
from edgepose.profiles import load_target
from edgepose.spec import ModelSpec
from edgepose.stages.assemble import (
    CompileResult,
    EngineOrder,
    StageObserver,
    check_out,
    engine_drafts,
    engine_orders,
    engine_reports,
    finished_bundle,
    key_of,
    observed,
    stage_report,
)
from edgepose.stages.cache import StageKey
from edgepose.stages.engine_latency import timed


@dataclass(frozen=True, slots=True)
class ImportRequest:
    """What to import.

    Attributes:
        model: The ONNX file.
        spec: What its user says of it.
        targets: Names of targets, or paths of target files, to build engines for.
        out: Directory of the bundle.
        replace: Whether another bundle at `out` may be replaced.
    """

    model: Path
    spec: ImportSpec
    targets: tuple[str, ...]
    out: Path
    replace: bool = False


def import_model(request: ImportRequest, observer: StageObserver) -> CompileResult:
    """Import a network.

    Args:
        request: What to import.
        observer: Told which stages ran.

    Raises:
        BadInput: File, specification, target or free name are not what they should be.
        ParityError: A converted network or an engine answers differently from the file.
        BackendUnavailable: A target runs nothing that this release builds.
    """
    targets = tuple(load_target(name) for name in dict.fromkeys(request.targets))
    orders = engine_orders(targets)
    file = read_onnx(request.model)
    origin = {"import": file.digest, "spec": msgspec.to_builtins(request.spec), "targets": [t.name for t in targets]}
    check_out(request.out, origin, replace=request.replace)

    def convert(folder: Path) -> dict[str, Any]:
        return write_converted(file, request.spec, folder)

    converted = observed(
        StageKey("import", {"onnx": file.digest}, request.spec, ("onnx", "onnxruntime")), convert, observer
    )
    spec, images, answers = read_converted(converted.path)
    reference = Reference(spec, images, answers)
    engines = []
    for order in orders:

        def work(folder: Path, order: EngineOrder = order) -> dict[str, Any]:
            model = _with_batch(converted.path / MODEL, spec, order, folder)
            return timed(order, folder, engine_from_onnx(model, "float", order.backend, reference, folder))

        engines.append((order, observed(order.key({"import": converted.key}), work, observer)))
    built = [(order.target.name, order.target.threads, result.key) for order, result in engines]
    key = key_of("import", converted.key, built)

    def draft() -> BundleDraft:
        return BundleDraft(
            name=spec.name,
            spec=spec,
            onnx=converted.path / MODEL,
            engines=engine_drafts(tuple(engines)),
            chain={"source": file.digest},
            reports={
                "import": stage_report(converted),
                **engine_reports(tuple(engines)),
                "build": {**origin, "key": key, "host": fingerprint().digest},
            },
            golden=GoldenDraft(images, answers, decode(answers, spec.decoder)[0]),
        )

    stages = (converted, *(result for _, result in engines))
    return finished_bundle(request.out, key, stages, draft, replace=request.replace)


def _with_batch(model: Path, spec: ModelSpec, order: EngineOrder, folder: Path) -> Path:
    """The network with the batch that a target fixes; as it is where the target or the network leaves none to fix.

    Args:
        model: The ONNX file.
        spec: Of the network.
        order: The engine to build.
        folder: Where a changed file goes.
    """
    if not order.target.batch or isinstance(spec.inputs[0].shape[0], int):
        return model
    fix_batch(model, order.target.batch, folder / MODEL)
    return folder / MODEL
