"""OKS average precision and recall through faster-coco-eval, for any keypoint set.

Invariant: the arguments are never changed (the library writes into what it is given, so it gets copies), and nothing is
printed. This is the one file that imports faster-coco-eval.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import AnnotationError, MissingDependency, SpecError

try:
    from faster_coco_eval import COCO, COCOeval_faster
except ImportError as err:
    raise MissingDependency("faster-coco-eval", extra="compile", needed_for="OKS-mAP") from err

_NAMES = {
    "oks_ap": "AP_all",
    "oks_ap_0.5": "AP_50",
    "oks_ap_0.75": "AP_75",
    "oks_ap_medium": "AP_medium",
    "oks_ap_large": "AP_large",
    "oks_ar": "AR_all",
    "oks_ar_0.5": "AR_50",
    "oks_ar_0.75": "AR_75",
    "oks_ar_medium": "AR_medium",
    "oks_ar_large": "AR_large",
}


def oks_map(
    annotations: Mapping[str, Any], results: Sequence[Mapping[str, Any]], sigmas: Sequence[float] | NDArray[np.float64]
) -> dict[str, float]:
    """COCO's ten keypoint figures.

    Args:
        annotations: A COCO keypoint document: images, annotations (each with area, bbox, num_keypoints, iscrowd) and
            categories.
        results: COCO keypoint results: image_id, category_id, keypoints [x, y, score] · K, score; pixels of the source.
        sigmas: K values, COCO's k/2.

    Returns:
        `oks_ap` (mean over OKS thresholds 0.5 … 0.95), `oks_ap_0.5`, `oks_ap_0.75`, `oks_ap_medium`, `oks_ap_large` and
        the same for recall (`oks_ar`, …), each 0..1; NaN where nobody is labelled of that size.

    Raises:
        AnnotationError: A row has another number of keypoints than there are sigmas, or belongs to an unknown image.
    """
    sigmas = np.asarray(sigmas, dtype=np.float64)
    _require_rows("annotations", annotations["annotations"], len(sigmas))
    _require_rows("results", results, len(sigmas))
    known = {image["id"] for image in annotations["images"]}
    for position, row in enumerate(results):
        if row["image_id"] not in known:
            raise AnnotationError(
                f"results[{position}]: image_id", found=repr(row["image_id"]), expected="the id of an annotated image"
            )
    truth = COCO(_counted_from_one(annotations))
    evaluation = COCOeval_faster(
        truth,
        truth.loadRes(copy.deepcopy([dict(row) for row in results])),
        "keypoints",
        print_function=_silent,
        kpt_oks_sigmas=sigmas.tolist(),
    )
    try:
        evaluation.run()
    except (KeyError, ValueError) as err:
        raise SpecError("OKS-mAP", found=f"{type(err).__name__}: {err}", expected="complete COCO annotations") from err
    figures = evaluation.stats_as_dict
    # The library says -1 where there is no annotated person.
    return {ours: figures[theirs] if figures[theirs] >= 0 else float("nan") for ours, theirs in _NAMES.items()}


def _counted_from_one(annotations: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose annotations have ids from 1: the library takes an id of 0 for "not matched"."""
    copied = copy.deepcopy(dict(annotations))
    if any(annotation.get("id") == 0 for annotation in copied["annotations"]):
        for number, annotation in enumerate(copied["annotations"], start=1):
            annotation["id"] = number
    return copied


def _require_rows(what: str, rows: Sequence[Mapping[str, Any]], joints: int) -> None:
    for position, row in enumerate(rows):
        length = len(row.get("keypoints", ()))
        if length != 3 * joints:
            raise AnnotationError(
                f"{what}[{position}]: keypoints", found=f"{length} numbers", expected=f"{3 * joints}, three per sigma"
            )


def _silent(*_: object) -> None:
    """The library reports through this; results are returned instead."""
