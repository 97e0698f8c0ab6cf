"""The kit for other languages: each step follows from the one before, by other code than that which wrote it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgepose.bundle import BundleDraft, verify_bundle, write_bundle
from edgepose.errors import UsageError
from edgepose.estimator import PoseEstimator
from edgepose.golden_kit import write_kit
from tests.fakes import spot_outputs
from tests.tiny_network import spot_bundle, spot_draft


def test_each_step_can_be_repeated_by_other_code(tmp_path: Path) -> None:
    bundle = spot_bundle(tmp_path)
    assert write_kit(bundle, tmp_path / "kit") == 3
    kit = json.loads((tmp_path / "kit" / "kit.json").read_text())
    preprocess = kit["spec"]["preprocess"]
    height, width = preprocess["input_hw"]
    with PoseEstimator.from_bundle(bundle.root, aim="none") as estimator:
        for person in kit["people"]:
            held = {name: np.load(tmp_path / "kit" / file) for name, file in person.items()}
            assert held["frame"].shape == (480, 640, 3)
            crop = cv2.warpAffine(held["frame"], held["transform"], (width, height), flags=cv2.INTER_LINEAR)
            tensor = (crop.astype(np.float64) - preprocess["mean"]) / preprocess["std"]
            assert np.abs(tensor.transpose(2, 0, 1)[None] - held["tensor"]).max() < kit["tolerances"]["tensor"]
            for name, expected in spot_outputs(held["tensor"]).items():
                assert np.abs(held[f"output-{name}"] - expected).max() < 1e-3
            poses = estimator(held["frame"], held["box"][None])
            assert np.allclose(poses.keypoints[0], held["keypoints"], atol=1e-4)
            assert np.allclose(poses.scores[0], held["scores"], atol=1e-5)


def test_a_taken_name_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    bundle = spot_bundle(tmp_path)
    (tmp_path / "kit").mkdir()
    (tmp_path / "kit" / "precious").write_text("x")
    with pytest.raises(UsageError):
        write_kit(bundle, tmp_path / "kit")
    assert [path.name for path in (tmp_path / "kit").iterdir()] == ["precious"]
    verify_bundle(bundle.root)


def test_a_bundle_without_golden_vectors_has_no_kit(tmp_path: Path) -> None:
    draft = spot_draft(tmp_path)
    bare = BundleDraft(draft.name, draft.spec, draft.onnx, draft.engines, draft.chain, draft.reports, None)
    with pytest.raises(UsageError, match="--kit: found a bundle without golden vectors"):
        write_kit(write_bundle(tmp_path / "bare.bundle", bare), tmp_path / "kit")
