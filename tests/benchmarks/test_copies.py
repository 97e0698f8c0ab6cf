"""Copies that are worse on purpose, made of a bundle with known answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from benchmarks.copies import answers, burden, check_burdened, disturb, rebuilt
from edgepose.bundle import Bundle, verify_bundle
from edgepose.errors import EdgeposeError
from edgepose.estimator import PoseEstimator
from tests.tiny_network import spot_bundle


@pytest.fixture
def base(tmp_path: Path) -> Bundle:
    return spot_bundle(tmp_path)


def images() -> np.ndarray:
    from tests.fakes import HEIGHT, WIDTH

    return np.random.default_rng(1).random((2, 3, HEIGHT, WIDTH), np.float32)


def test_burdened_network_answers_the_same_bits_and_runs_its_convolutions(base: Bundle, tmp_path: Path) -> None:
    original, copy = base.root / base.manifest.model, tmp_path / "burdened.onnx"
    burden(original, 3, copy)
    assert check_burdened(base, original, copy, 3) == 4
    expected = answers(base, original, images())
    found = answers(base, copy, images())
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_convolutions_that_were_optimised_away_are_noticed(base: Bundle, tmp_path: Path) -> None:
    original = base.root / base.manifest.model
    with pytest.raises(EdgeposeError, match="0 more kernels"):
        check_burdened(base, original, original, 3)


def test_other_answers_are_noticed(base: Bundle, tmp_path: Path) -> None:
    original, copy = base.root / base.manifest.model, tmp_path / "disturbed.onnx"
    disturb(original, 0.5, copy)
    with pytest.raises(EdgeposeError, match="other answers"):
        check_burdened(base, original, copy, 0)


def test_noise_grows_with_sigma_and_leaves_vectors_alone(base: Bundle, tmp_path: Path) -> None:
    original = base.root / base.manifest.model

    def distance(sigma: float) -> float:
        assert disturb(original, sigma, tmp_path / "disturbed.onnx") == 1  # the convolution; "rows" is int64
        weights = [
            numpy_helper.to_array(onnx.load(path).graph.initializer[0])
            for path in (original, tmp_path / "disturbed.onnx")
        ]
        return float(np.abs(weights[0] - weights[1]).max())

    assert distance(0.0) == 0.0
    assert distance(0.2) == pytest.approx(2 * distance(0.1), rel=1e-4)


def test_integer_codes_stay_in_their_range(tmp_path: Path) -> None:
    codes = np.random.default_rng(0).integers(-63, 64, (8, 8), np.int8)
    graph = onnx.helper.make_graph([], "codes", [], [], [numpy_helper.from_array(codes, "codes")])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "codes.onnx")
    disturb(tmp_path / "codes.onnx", 5.0, tmp_path / "disturbed.onnx")
    found = numpy_helper.to_array(onnx.load(tmp_path / "disturbed.onnx").graph.initializer[0])
    assert found.dtype == np.int8
    assert np.abs(found.astype(int)).max() == np.abs(codes).max()
    assert not np.array_equal(found, codes)


def test_rebuilt_copy_is_a_whole_bundle_of_the_other_network(base: Bundle, tmp_path: Path) -> None:
    burden(base.root / base.manifest.model, 1, tmp_path / "burdened.onnx")
    copy = rebuilt(base, tmp_path / "burdened.onnx", tmp_path / "slow.bundle", reason="a test")
    assert verify_bundle(copy.root).digest != base.digest
    assert [e.backend for e in copy.manifest.engines] == [e.backend for e in base.manifest.engines]
    assert copy.manifest.reports["copy"] == {"of": base.digest, "reason": "a test"}
    frame = np.random.default_rng(2).integers(0, 256, (60, 60, 3), np.uint8)
    for backend in ("onnxruntime", "openvino"):
        with PoseEstimator.from_bundle(base.root, backend) as one, PoseEstimator.from_bundle(copy.root, backend) as two:
            np.testing.assert_array_equal(one(frame).keypoints, two(frame).keypoints)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
