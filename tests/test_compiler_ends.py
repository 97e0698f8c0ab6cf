"""A bundle that takes images and says keypoints finds the same poses as one with NumPy before and behind it."""

from __future__ import annotations

from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edgepose.bundle import Bundle, read_bundle
from edgepose.compiler import CompileRequest, compile_bundle
from edgepose.data.coco import dataset, read_image
from edgepose.estimator import EstimatorOptions, PoseEstimator
from edgepose.golden import check_golden
from edgepose.pose.flip import mirror_order
from edgepose.rebuild import BuildRequest, build_bundle
from edgepose.recipe import Export
from edgepose.runtime import EXECUTABLE, open_session
from edgepose.spec import Execution, Regression
from edgepose.timing.profile import profile
from edgepose.timing.record import ProfileProtocol
from tests.tiny_checkpoint import Tiny, Watch, environment, quick

_TARGET = """
name: board
description: A board whose engines take four people at a time.
backends: [onnxruntime, openvino]
precisions: [fp32, int8]
threads: 1
batch: 4
execution:
  streams: 1
  onnxruntime: {optimisation: extended, io_binding: true}
  openvino: {hint: throughput}
"""


@pytest.fixture(scope="module")
def bundles(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Bundle]:
    """Without ends in the graph, and with both of them and a fixed batch."""
    folder = tmp_path_factory.mktemp("ends")
    (folder / "board.yaml").write_text(_TARGET)
    recipe = quick("fp32")
    ended = msgspec.structs.replace(
        recipe,
        name="ended",
        export=Export(image_input=True, decoding=True),
        targets=(str(folder / "board.yaml"),),
    )
    with environment(EDGEPOSE_CACHE=str(tiny.cache)):
        made = [
            compile_bundle(
                CompileRequest(wanted, str(tiny.checkpoint), tiny.data, folder / f"{wanted.name}.bundle"), Watch()
            ).bundle
            for wanted in (recipe, ended)
        ]
    return made[0], made[1]


def test_specification_says_what_the_network_takes_and_says(bundles: tuple[Bundle, Bundle]) -> None:
    spec = bundles[1].manifest.spec
    assert spec.takes_images
    assert (spec.inputs[0].shape, spec.decoder) == (
        ("batch", 64, 64, 3),
        Regression((64, 64), "keypoints", "", "scores"),
    )
    golden = np.load(bundles[1].root / "golden" / "inputs.npy")
    assert (golden.dtype, golden.shape[1:]) == (np.uint8, (64, 64, 3))


@pytest.mark.parametrize("backend", EXECUTABLE)
def test_poses_are_the_same(bundles: tuple[Bundle, Bundle], tiny: Tiny, backend: str) -> None:
    people = dataset(tiny.data, "val").persons
    frames = [(read_image(person.image), person.box_xyxy) for person in people]
    with (
        PoseEstimator.from_bundle(bundles[0].root, backend) as plain,  # type: ignore[arg-type]
        PoseEstimator.from_bundle(bundles[1].root, backend) as ended,  # type: ignore[arg-type]
    ):
        for frame, box in frames:
            boxes = [box] * 5  # more than the fixed batch
            first, second = plain(frame, boxes), ended(frame, boxes)
            scale = max(box[2] - box[0], box[3] - box[1]) * 1.25 / 64  # source pixels per pixel of the input
            assert np.linalg.norm(first.keypoints - second.keypoints, axis=-1).max() <= 0.05 * scale
            np.testing.assert_allclose(first.scores, second.scores, atol=1e-3)


def test_flip_test_turns_images_round(bundles: tuple[Bundle, Bundle]) -> None:
    """With coordinates said outright, it is the mean of the poses and of the mirrored frame's, mirrored back."""
    coarse = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    frame = cv2.resize(coarse, (64, 64), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    box = [[0, 0, 63, 63]]  # its centre is that of the frame, so that mirroring one mirrors the other
    with (
        PoseEstimator.from_bundle(bundles[1].root, options=EstimatorOptions(flip_test=True)) as flipping,
        PoseEstimator.from_bundle(bundles[1].root) as plain,
    ):
        found = flipping(frame, box).keypoints
        one, other = (plain(shown, box).keypoints for shown in (frame, frame[:, ::-1]))
        back = other[:, mirror_order(plain.spec.keypoints)] * (-1, 1) + (63, 0)
    np.testing.assert_allclose(found, (one + back) / 2, atol=0.2)


def test_engines_have_the_targets_batch_and_execution_and_answer_as_recorded(bundles: tuple[Bundle, Bundle]) -> None:
    for engine in bundles[1].manifest.engines:
        assert engine.execution.onnxruntime.io_binding
        assert engine.execution.openvino.hint == "throughput"
        session = open_session(bundles[1].root / engine.path, engine.backend, threads=1, execution=engine.execution)
        assert session.inputs[0].shape == (4, 64, 64, 3)
        check = check_golden(bundles[1], engine, session)
        session.close()
        assert check is not None
        assert check.differences["keypoints_px"] <= 0.05
    assert bundles[0].manifest.engines[0].execution == Execution()


def test_bundle_with_ends_is_built_for_other_targets(
    bundles: tuple[Bundle, Bundle], tiny: Tiny, tmp_path: Path
) -> None:
    with environment(EDGEPOSE_CACHE=str(tiny.cache)):
        built = build_bundle(BuildRequest(bundles[1].root, ["x86-cpu"], tmp_path / "x86.bundle"), Watch()).bundle
    assert read_bundle(built.root).manifest.spec == bundles[1].manifest.spec
    engine = built.manifest.engines[0]
    session = open_session(built.root / engine.path, engine.backend, threads=1)
    assert session.inputs[0].shape[0] == "batch"
    session.close()


def test_bundle_with_ends_is_profiled(bundles: tuple[Bundle, Bundle]) -> None:
    protocol = ProfileProtocol(duration_s=0.2, warm_up_ms=10, persons=2, threads=1)
    record = profile(bundles[1].root, protocol, backend="onnxruntime")
    assert record.latency
