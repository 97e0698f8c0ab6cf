"""OKS-mAP against pycocotools, and what it refuses.

Invariant: the reference is another implementation, run on the same rows.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from edgepose.errors import AnnotationError
from edgepose.pose import metrics
from edgepose.pose.coco_map import oks_map
from edgepose.spec import Keypoints

JOINTS = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
COCO17 = (
    "nose",
    *(f"{s}_{j}" for j in JOINTS for s in ("left", "right")),
)
LSP14 = (*(n for n in COCO17 if n.split("_")[-1] not in {"nose", "eye", "ear"}), "neck", "head_top")


def scene(
    names: tuple[str, ...], seed: int, *, ties: bool = False
) -> tuple[dict[str, Any], list[dict[str, Any]], np.ndarray]:
    """A few images with several people of all COCO sizes, one crowd, one person without keypoints, false alarms.

    Under `ties` scores come in three values only, and some guesses twice.
    """
    rng = np.random.default_rng(seed)
    annotations, results = [], []
    for identity in range(1, 25):
        image, side = 1 + identity % 6, rng.choice([20.0, 60.0, 200.0])
        origin = rng.uniform(0, 400, 2)
        points = origin + rng.uniform(0, side, (len(names), 2))
        visible = rng.integers(0, 3, len(names)) if identity != 7 else np.zeros(len(names), int)
        annotations.append(
            {
                "id": identity,
                "image_id": image,
                "category_id": 1,
                "iscrowd": int(identity == 9),
                "bbox": [*origin.tolist(), side, side],
                "area": 0.6 * side * side,
                "num_keypoints": int((visible > 0).sum()),
                "keypoints": np.c_[points, visible].ravel().tolist(),
            }
        )
        for copy_of in range(rng.integers(0, 3)):
            if not (ties and copy_of):
                guess = points + rng.normal(0, 0.06 * side, points.shape)
            results.append(
                {
                    "image_id": image,
                    "category_id": 1,
                    "keypoints": np.c_[guess, rng.uniform(0, 1, len(names))].ravel().tolist(),
                    "score": float(rng.choice([0.25, 0.5, 0.75]) if ties else rng.uniform()),
                }
            )
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 640, "height": 480} for i in range(1, 7)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "person", "keypoints": list(names), "skeleton": []}],
    }
    return document, results, metrics.oks_sigmas(Keypoints(names=names))


def reference(document: dict[str, Any], results: list[dict[str, Any]], sigmas: np.ndarray) -> list[float]:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(document)
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(copy.deepcopy(results)), "keypoints")
        evaluation.params.kpt_oks_sigmas = sigmas
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


@pytest.mark.parametrize("names", [LSP14, COCO17], ids=["14 keypoints", "17 keypoints"])
@pytest.mark.parametrize("with_box", [False, True], ids=["keypoints only", "with bbox"])
def test_equals_pycocotools(names: tuple[str, ...], with_box: bool) -> None:
    document, results, sigmas = scene(names, seed=len(names))
    if with_box:
        for row in results:
            row["bbox"] = [row["keypoints"][0], row["keypoints"][1], 50.0, 80.0]
    found = oks_map(document, results, sigmas)
    expected = reference(document, results, sigmas)
    np.testing.assert_allclose(list(found.values()), expected, atol=1e-6)
    assert 0.05 < found["oks_ap"] < 0.95, "the scene must be neither hopeless nor trivial"


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools_where_scores_and_poses_tie(seed: int) -> None:
    document, results, sigmas = scene(COCO17, seed, ties=True)
    assert len({row["score"] for row in results}) <= 3 < len(results)
    found = oks_map(document, results, sigmas)
    np.testing.assert_allclose(list(found.values()), reference(document, results, sigmas), atol=1e-6)


def test_equals_pycocotools_with_more_poses_than_an_image_may_have() -> None:
    # COCO looks at the best 20 of an image; which of equal scores those are has to agree too.
    document, results, sigmas = scene(LSP14, seed=8, ties=True)
    crowded = [{**row, "image_id": 1} for row in results for _ in range(2)] + results
    assert sum(row["image_id"] == 1 for row in crowded) > 40
    found = oks_map(document, crowded, sigmas)
    np.testing.assert_allclose(list(found.values()), reference(document, crowded, sigmas), atol=1e-6)
    assert found["oks_ap"] > 0


def test_equals_pycocotools_on_real_labels(real_data) -> None:
    """coco17 has crowds, people without keypoints, occluded and unlabelled joints, and up to a dozen to an image."""
    document = json.loads((real_data / "coco17" / "train.json").read_text())
    rng = np.random.default_rng(0)
    results = []
    for row in document["annotations"]:
        triples = np.array(row.get("keypoints", []), float).reshape(-1, 3)
        if not (triples[:, 2:] > 0).any():
            continue
        for spread in rng.choice([0.02, 0.08, 0.3], rng.integers(1, 3)):
            points = triples[:, :2] + rng.normal(0, spread * row["bbox"][3] + 1e-3, (len(triples), 2))
            guess = np.c_[points, np.ones(len(points))].ravel().tolist()
            about = {name: row[name] for name in ("image_id", "category_id")}
            results.append({**about, "keypoints": guess, "score": round(float(rng.uniform()), 1)})
    sigmas = metrics.oks_sigmas(Keypoints(names=COCO17))
    found = oks_map(document, results, sigmas)
    np.testing.assert_allclose(list(found.values()), reference(document, results, sigmas), atol=1e-6)
    assert 0.1 < found["oks_ap"] < 0.9
    assert len({row["image_id"] for row in results}) < len(results)


@pytest.mark.parametrize("junk", [0.0, 1e5])
def test_where_unlabelled_joints_are_said_to_be_changes_nothing(junk: float) -> None:
    document, results, sigmas = scene(COCO17, seed=2)
    moved = copy.deepcopy((document, results))
    hidden = {row["id"]: np.array(row["keypoints"]).reshape(-1, 3)[:, 2] == 0 for row in document["annotations"]}
    labelled = {
        identity: mask for identity, mask in hidden.items() if not mask.all()
    }  # others are matched by their box
    assert any(mask.any() for mask in labelled.values())
    for row in moved[0]["annotations"]:
        triples = np.array(row["keypoints"]).reshape(-1, 3)
        if row["id"] in labelled:
            triples[hidden[row["id"]], :2] = junk
        row["keypoints"] = triples.ravel().tolist()
    assert oks_map(*moved, sigmas) == oks_map(document, results, sigmas)


def test_exact_predictions_score_one_and_arguments_stay_as_they_were() -> None:
    document, _, sigmas = scene(LSP14, seed=3)
    document["annotations"] = [a for a in document["annotations"] if a["num_keypoints"] and not a["iscrowd"]]
    results = [
        {**{k: a[k] for k in ("image_id", "category_id", "keypoints")}, "score": 1.0} for a in document["annotations"]
    ]
    before = copy.deepcopy((document, results))
    assert oks_map(document, results, sigmas)["oks_ap"] == pytest.approx(1.0)
    assert (document, results) == before


def test_an_annotation_of_id_zero_counts_like_any_other() -> None:
    truth, results, sigmas = scene(LSP14, 3)
    shifted = copy.deepcopy(truth)
    for annotation in shifted["annotations"]:
        annotation["id"] -= 1
    assert min(annotation["id"] for annotation in shifted["annotations"]) == 0
    assert oks_map(shifted, results, sigmas) == oks_map(truth, results, sigmas)


def test_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    oks_map(*scene(LSP14, seed=4))
    assert capfd.readouterr() == ("", "")


def test_sizes_that_nobody_has_are_nan_and_no_detections_score_zero() -> None:
    document, _, sigmas = scene(LSP14, seed=5)
    for annotation in document["annotations"]:
        annotation["area"] = 50.0**2
    found = oks_map(document, [], sigmas)
    assert np.isnan(found["oks_ap_large"])
    assert found["oks_ap"] == found["oks_ap_medium"] == 0.0


def test_rows_that_do_not_fit_are_refused_by_position_and_field() -> None:
    document, results, sigmas = scene(LSP14, seed=6)
    with pytest.raises(AnnotationError, match=r"annotations\[0\]: keypoints: found 42 numbers, expected 51"):
        oks_map(document, results, np.full(17, 0.1))
    with pytest.raises(AnnotationError, match=r"results\[1\]: image_id: found 99"):
        oks_map(document, [results[0], {**results[1], "image_id": 99}], sigmas)


def test_absence_of_the_library_names_the_extra() -> None:
    code = (
        "import sys; sys.modules['faster_coco_eval'] = None\n"
        "from edgepose.errors import MissingDependency\n"
        "try:\n    import edgepose.pose.coco_map\n"
        "except MissingDependency as err:\n    print(err.exit_code, err)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("6 OKS-mAP: found the package faster-coco-eval is not installed")
    assert "edgepose[compile]" in done.stdout
