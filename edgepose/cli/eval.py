"""`edgepose eval`: the accuracy of a network, checkpoint or bundle on labelled photographs.

Invariant: every figure comes from one `AccuracyRecord`, whatever runs the network.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from edgepose.cli.console import STDOUT, note, show_table, steps, write_json
from edgepose.cli.options import (
    AnnotationsFlag,
    BackendFlag,
    DataFlag,
    ImagesFlag,
    JsonFlag,
    PrecisionFlag,
    SplitFlag,
    ThreadsFlag,
    check_outputs,
    checked_backend,
    checked_precision,
    labelled_people,
)
from edgepose.cli.subject import find_subject, opened
from edgepose.data.coco import PoseDataset
from edgepose.errors import MissingDependency, SpecError
from edgepose.profiler.accuracy import AccuracyRecord, coco_results, coco_truth, evaluate, oks_map, per_joint, summary

EXAMPLES = (
    "edgepose eval kpe-s --data lspet --split val",
    "edgepose eval runs/mine.safetensors --data lspet --json mine.json",
    "edgepose eval kpe-s.bundle --backend openvino --annotations val.json --images images --predictions results.json",
)


def eval_(
    subject: Annotated[str, typer.Argument(metavar="NETWORK", help="A bundle, a checkpoint, or a name of the zoo.")],
    data: DataFlag = None,
    split: SplitFlag = "val",
    annotations: AnnotationsFlag = None,
    images: ImagesFlag = None,
    backend: BackendFlag = None,
    precision: PrecisionFlag = None,
    threads: ThreadsFlag = None,
    json: JsonFlag = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Write the poses as COCO keypoint results to this file.")
    ] = None,
) -> int:
    """Measure accuracy on labelled photographs: PCK, AUC, MPJPE and, with faster-coco-eval, OKS-mAP.

    Checkpoints run in torch, bundles in the first of their engines that this machine can run.
    """
    found = find_subject(subject)
    sources = [path for path in (annotations, data / f"{split}.json" if data else None) if path is not None]
    check_outputs([json, predictions], [*sources, found.path])
    chosen, exact = checked_backend(backend), checked_precision(precision)
    people = labelled_people(data, split, annotations, images)
    with opened(found, backend=chosen, precision=exact, threads=threads) as estimator, steps() as progress:
        record = evaluate(estimator, people, progress=progress.step(f"evaluating {subject}"))
        info = estimator.info()
    result: dict[str, Any] = {
        "network": info.name,
        "subject": subject,
        "backend": record.backend,
        "precision": info.engine.precision if info.engine else "fp32",
        "bundle_digest": info.bundle_digest,
        "dataset": {"file": people.source.name, "sha256": record.dataset},
        "persons": len(record),
        "torso_persons": sum(math.isfinite(size) for size in record.torso_px.tolist()),
        "metrics": summary(record, people.keypoints),
        "oks": _oks(record, people),
        "per_joint": per_joint(record, people.keypoints),
    }
    if predictions is not None:
        write_json(predictions, coco_results(record, category_id=_category_id(people)))
    if json is not None:
        write_json(json, result)
    _show(result, err=STDOUT in (json, predictions))
    for path in (json, predictions):
        if path not in (None, STDOUT):
            note(f"wrote {path}")
    return 0


def percent(name: str, value: float) -> str:
    """A metric for people: lengths in pixels, shares in per cent."""
    if not math.isfinite(value):
        return "–"
    return f"{value:.2f} px" if name.endswith("_px") else f"{100 * value:.2f} %"


def _show(result: dict[str, Any], *, err: bool) -> None:
    title = (
        f"{result['subject']} on {result['backend']} ({result['precision']}): {result['persons']} people of "
        f"{result['dataset']['file']}, {result['torso_persons']} with a torso"
    )
    oks = {name: value for name, value in result["oks"].items() if name in ("oks_ap", "oks_ap_0.5", "oks_ap_0.75")}
    rows = [(name, percent(name, value)) for name, value in {**result["metrics"], **oks}.items()]
    show_table(("metric", "value"), rows, title=title, err=err)


def _oks(record: AccuracyRecord, people: PoseDataset) -> dict[str, float]:
    """COCO's figures, where they can be computed; says why not where they cannot."""
    try:
        return oks_map(record, people)
    except (MissingDependency, SpecError) as err:
        note(f"no OKS-mAP: {err}")
        return {}


def _category_id(people: PoseDataset) -> int:
    return int(next(category["id"] for category in coco_truth(people)["categories"] if category.get("keypoints")))
