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
    FlipTestFlag,
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
from edgepose.cli.slices import (
    SHEET,
    AgainstFlag,
    DrawsFlag,
    PeopleFlag,
    PicturesFlag,
    RecordsFlag,
    RenderedFlag,
    SliceOptions,
    SlicesFlag,
    check_slice_options,
    show_slices,
    slice_report,
)
from edgepose.cli.subject import find_subject, opened
from edgepose.data.coco import PoseDataset
from edgepose.errors import MissingDependency, SpecError
from edgepose.profiler.accuracy import AccuracyRecord, coco_results, coco_truth, evaluate, oks_map, per_joint, summary

EXAMPLES = (
    "edgepose eval kpe-s --data lspet --split val",
    "edgepose eval runs/mine.safetensors --data lspet --json mine.json",
    "edgepose eval orn-s --data lspet --slices --records orn-s.npz --against kpe-s.npz --json orn-s.json",
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
    flip_test: FlipTestFlag = False,
    json: JsonFlag = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="Write the poses as COCO keypoint results to this file.")
    ] = None,
    slices: SlicesFlag = False,
    rendered: RenderedFlag = None,
    people: PeopleFlag = None,
    draws: DrawsFlag = None,
    pictures: PicturesFlag = None,
    records: RecordsFlag = None,
    against: AgainstFlag = None,
) -> int:
    """Measure accuracy on labelled photographs: PCK, AUC, MPJPE and, with faster-coco-eval, OKS-mAP.

    With --slices, PCK and AUC of the same people occluded, cut off, in bad light and through bad cameras instead.
    Checkpoints run in torch, bundles in the first of their engines that this machine can run.
    """
    found = find_subject(subject)
    asked = SliceOptions(rendered, people, draws, pictures, records, against)
    check_slice_options(asked, slices=slices, predictions=predictions)
    sources = [path for path in (annotations, data / f"{split}.json" if data else None, against) if path is not None]
    sheet = pictures / SHEET if pictures else None
    check_outputs([json, predictions, records, sheet], [*sources, found.path])
    chosen, exact = checked_backend(backend), checked_precision(precision)
    labelled = labelled_people(data, split, annotations, images)
    running = opened(found, backend=chosen, precision=exact, threads=threads, flip_test=flip_test)
    with running as estimator, steps() as progress:
        info = estimator.info()
        result: dict[str, Any] = {
            "network": info.name,
            "subject": subject,
            "backend": info.backend,
            "precision": info.engine.precision if info.engine else "fp32",
            "bundle_digest": info.bundle_digest,
            "flip_test": info.flip_test,
            "dataset": {"file": labelled.source.name, "sha256": labelled.digest},
        }
        if slices:
            result |= slice_report(estimator, labelled, asked, progress)
        else:
            record = evaluate(estimator, labelled, progress=progress.step(f"evaluating {subject}"))
            result |= _figures(record, labelled)
    if predictions is not None:
        write_json(predictions, coco_results(record, category_id=_category_id(labelled)))
    if json is not None:
        write_json(json, result)
    (show_slices if slices else _show)(result, err=STDOUT in (json, predictions))
    for path in (json, predictions, records, sheet):
        if path not in (None, STDOUT):
            note(f"wrote {path}")
    return 0


def _figures(record: AccuracyRecord, people: PoseDataset) -> dict[str, Any]:
    return {
        "persons": len(record),
        "torso_persons": sum(math.isfinite(size) for size in record.torso_px.tolist()),
        "metrics": summary(record, people.keypoints),
        "oks": _oks(record, people),
        "per_joint": per_joint(record, people.keypoints),
    }


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
