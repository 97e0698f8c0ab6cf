"""From frames and boxes to poses: right places, one call for all people, and a plain word about every bad input."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import edgepose
from edgepose.bundle import Bundle
from edgepose.engines import choose_engine
from edgepose.errors import (
    AnnotationError,
    BackendUnavailable,
    BadInput,
    ImageError,
    IntegrityError,
    MissingDependency,
    SpecError,
    UsageError,
)
from edgepose.estimator import EstimatorOptions, PoseEstimator
from edgepose.network import MAX_BATCH
from edgepose.pose.preprocess import crop_transforms
from edgepose.runtime import EXECUTABLE
from edgepose.spec import Heatmap, ModelSpec, Regression, TensorSpec
from tests.fakes import HEIGHT, WIDTH, FakeSession, spot_frame, spot_outputs, spot_spec
from tests.tiny_network import flip_a_byte, forge, spot_bundle

FRAME = spot_frame((100.0, 80.0), (120.5, 130.25))
BOX = [60.0, 30.0, 160.0, 180.0]


@pytest.fixture
def session() -> FakeSession:
    return FakeSession(spot_spec())


@pytest.fixture
def estimator(session: FakeSession) -> PoseEstimator:
    return PoseEstimator(session, spot_spec(), backend="fake")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return spot_bundle(tmp_path_factory.mktemp("bundle"))


# Poses


def test_spots_are_found_where_they_are_in_the_frame(estimator: PoseEstimator) -> None:
    poses = estimator(FRAME, [BOX])
    np.testing.assert_allclose(poses.keypoints, [[[100.0, 80.0], [120.5, 130.25]]], atol=0.6)
    assert poses.scores.shape == (1, 2)
    assert poses.boxes.tolist() == [BOX]
    assert poses.backend == "fake"


@settings(max_examples=40, deadline=None)
@given(
    x=st.floats(40, 280), y=st.floats(40, 200), left=st.floats(20, 60), top=st.floats(20, 60), size=st.floats(70, 160)
)
def test_position_does_not_depend_on_the_box(x: float, y: float, left: float, top: float, size: float) -> None:
    estimator = PoseEstimator(FakeSession(spot_spec()), spot_spec())
    poses = estimator(spot_frame((x, y), (x, y)), [[x - left, y - top, x - left + size, y - top + size]])
    cell = 1.25 * size / WIDTH  # source pixels per bin of the network's output, at most
    np.testing.assert_allclose(poses.keypoints[0, 0], [x, y], atol=0.75 * cell)


@pytest.mark.parametrize("backend", EXECUTABLE)
def test_every_backend_finds_the_same(bundle: Bundle, estimator: PoseEstimator, backend: Any) -> None:
    with PoseEstimator.from_bundle(bundle.root, backend=backend) as real:
        found, expected = real(FRAME, [BOX, [0, 0, 320, 240]]), estimator(FRAME, [BOX, [0, 0, 320, 240]])
        np.testing.assert_allclose(found.keypoints, expected.keypoints, atol=0.01)
        assert found.backend == real.info().backend == backend


def test_no_boxes_given_means_the_whole_frame_is_one_person(estimator: PoseEstimator) -> None:
    whole, explicit = estimator(FRAME), estimator(FRAME, [[0, 0, 320, 240]])
    assert whole.boxes.tolist() == [[0, 0, 320, 240]]
    np.testing.assert_array_equal(whole.keypoints, explicit.keypoints)


@pytest.mark.parametrize("boxes", [[], np.zeros((0, 4)), np.zeros((0,), np.int32), ()])
def test_empty_boxes_give_empty_poses_without_inference(
    estimator: PoseEstimator, session: FakeSession, boxes: Any
) -> None:
    poses = estimator(FRAME, boxes)
    assert len(poses) == 0
    assert (poses.keypoints.shape, poses.scores.shape, poses.boxes.shape) == ((0, 2, 2), (0, 2), (0, 4))
    assert session.batches == []


def test_all_people_are_inferred_in_one_call(estimator: PoseEstimator, session: FakeSession) -> None:
    poses = estimator(FRAME, [BOX] * 8)
    assert session.batches == [8]
    assert len(poses) == 8


def test_crowd_is_taken_in_turns_and_keeps_its_order(estimator: PoseEstimator, session: FakeSession) -> None:
    boxes = np.array([[60 + i % 7, 30, 160 + i % 11, 180] for i in range(2 * MAX_BATCH + 3)], float)
    poses = estimator(FRAME, boxes)
    assert session.batches == [MAX_BATCH, MAX_BATCH, 3]
    np.testing.assert_allclose(poses.boxes, boxes)
    np.testing.assert_allclose(poses.keypoints[-1], estimator(FRAME, boxes[-1:]).keypoints[0], atol=1e-4)


def test_engine_of_fixed_batch_is_filled_up(estimator: PoseEstimator) -> None:
    fixed = FakeSession(spot_spec(), batch=4)
    poses = PoseEstimator(fixed, spot_spec())(FRAME, [BOX] * 6)
    assert fixed.batches == [4, 4]
    np.testing.assert_allclose(poses.keypoints, estimator(FRAME, [BOX] * 6).keypoints, atol=1e-4)


def test_boxes_may_stick_out_of_the_frame(estimator: PoseEstimator) -> None:
    poses = estimator(FRAME, [[-50, -40, 160, 180], [60, 30, 1000, 2000]])
    np.testing.assert_allclose(poses.keypoints[0, 0], [100, 80], atol=6)
    assert np.isfinite(poses.keypoints).all()


@pytest.mark.parametrize("view", [lambda f: f[:, ::-1], lambda f: f[::-1, ::2], np.asfortranarray])
def test_views_of_frames_are_taken_as_they_are(estimator: PoseEstimator, view: Any) -> None:
    frame = view(FRAME)
    np.testing.assert_array_equal(estimator(frame).keypoints, estimator(np.ascontiguousarray(frame)).keypoints)


def test_callers_arrays_are_neither_changed_nor_kept(estimator: PoseEstimator) -> None:
    frame, boxes = FRAME.copy(), np.array([BOX], np.float32)
    frame.setflags(write=False)
    poses = estimator(frame, boxes)
    boxes[:] = 0
    assert poses.boxes.tolist() == [BOX]
    with pytest.raises(ValueError, match="read-only"):
        poses.keypoints[:] = 0


# Flip test, visibility, expected errors


def candid_spec() -> ModelSpec:
    """The spot network, which also says visibility and expected errors."""
    said = (TensorSpec("seen", ("batch", 2)), TensorSpec("log_errors", ("batch", 2)))
    spec = spot_spec()
    return msgspec.structs.replace(spec, outputs=spec.outputs + said, visibility="seen", uncertainty="log_errors")


def candid_outputs(images: np.ndarray) -> dict[str, np.ndarray]:
    """Sees blue for sure and red less; is out by 3 and by 6 input pixels, and by twice that on the left half.

    Half: that with more blue, so that the mirrored crop gets another answer.
    """
    middle = WIDTH // 2
    left = images[:, 0, :, :middle].sum((1, 2)) > images[:, 0, :, middle:].sum((1, 2))
    errors = np.log(np.where(left[:, None], 2.0, 1.0) * [3.0, 6.0])
    seen = left[:, None] + np.array([4.0, -1.0])
    return spot_outputs(images) | {"seen": seen.astype(np.float32), "log_errors": errors.astype(np.float32)}


def test_what_a_network_does_not_say_is_none(estimator: PoseEstimator) -> None:
    for boxes in ([BOX], []):
        poses = estimator(FRAME, boxes)
        assert poses.visibility is None
        assert poses.errors_px is None


def test_visibility_is_a_probability_and_errors_are_in_pixels_of_the_source() -> None:
    spec = candid_spec()
    boxes = np.array([BOX, [0, 0, 320, 240], [50, 40, 130, 160]], float)
    poses = PoseEstimator(FakeSession(spec, candid_outputs), spec)(FRAME, boxes)
    assert poses.visibility is not None
    assert poses.errors_px is not None
    assert poses.visibility.dtype == poses.errors_px.dtype == np.float32
    scales = crop_transforms(boxes, spec.preprocess)[:, 0, 0]  # input pixels per source pixel
    blue_x = (boxes[:, 0] + boxes[:, 2]) / 2 > 100  # blue stands left of the box's centre
    factor = np.where(blue_x, 2.0, 1.0)
    np.testing.assert_allclose(poses.errors_px, factor[:, None] * [3.0, 6.0] / scales[:, None], rtol=1e-5)
    logits = blue_x[:, None] + [4.0, -1.0]
    np.testing.assert_allclose(poses.visibility, 1 / (1 + np.exp(-logits)), rtol=1e-5)
    with pytest.raises(ValueError, match="read-only"):
        poses.errors_px[:] = 0


def test_nobody_has_no_visibility_but_arrays_of_it() -> None:
    spec = candid_spec()
    poses = PoseEstimator(FakeSession(spec, candid_outputs), spec)(FRAME, [])
    assert poses.visibility is not None
    assert poses.errors_px is not None
    assert poses.visibility.shape == poses.errors_px.shape == (0, 2)


def test_extreme_logits_are_certain_and_hopeless_rather_than_overflows() -> None:
    spec = candid_spec()

    def extreme(images: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.ones((len(images), 1), np.float32)
        return spot_outputs(images) | {"seen": rows * [-1e4, 1e4], "log_errors": rows * [-1e4, 1e4]}

    poses = PoseEstimator(FakeSession(spec, extreme), spec)(FRAME)
    assert poses.visibility is not None
    assert poses.errors_px is not None
    assert poses.visibility.tolist() == [[0.0, 1.0]]
    assert poses.errors_px.tolist() == [[0.0, np.inf]]


def test_flip_test_asks_about_the_mirrored_crop_too_and_averages() -> None:
    spec = candid_spec()
    session = FakeSession(spec, candid_outputs)
    box = [50, 40, 160, 160]  # blue left of the centre, so right of it in the mirrored crop
    once = PoseEstimator(session, spec)(FRAME, [box])
    poses = PoseEstimator(session, spec, flip_test=True)(FRAME, [box])
    assert session.batches == [1, 1, 1]
    np.testing.assert_allclose(poses.keypoints, once.keypoints, atol=0.05)
    assert poses.errors_px is not None
    assert poses.visibility is not None
    scale = crop_transforms(np.array([box], float), spec.preprocess)[0, 0, 0]
    np.testing.assert_allclose(poses.errors_px, [[3 * 2**0.5 / scale, 6 * 2**0.5 / scale]], rtol=1e-5)
    np.testing.assert_allclose(poses.visibility, 1 / (1 + np.exp([[-4.5, 0.5]])), rtol=1e-5)


def test_flip_test_cancels_a_networks_lean_to_one_side() -> None:
    def leaning(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = spot_outputs(images)
        return outputs | {"simcc_x": np.roll(outputs["simcc_x"], 1, axis=-1)}  # a bin to the right, of either image

    plain = PoseEstimator(FakeSession(spot_spec(), spot_outputs), spot_spec())(FRAME, [BOX]).keypoints
    leans = PoseEstimator(FakeSession(spot_spec(), leaning), spot_spec())(FRAME, [BOX]).keypoints
    merged = PoseEstimator(FakeSession(spot_spec(), leaning), spot_spec(), flip_test=True)(FRAME, [BOX]).keypoints
    assert (leans - plain)[..., 0].min() > 3
    assert np.abs(merged - plain).max() < 1


def test_flip_test_swaps_the_sides() -> None:
    # The network calls the spot further left in the image "left": in the mirrored crop that is the other one.
    spec = spot_spec()
    names = ("left_spot", "right_spot")
    sided = msgspec.structs.replace(
        spec, keypoints=msgspec.structs.replace(spec.keypoints, names=names, flip_pairs=((0, 1),))
    )

    def by_side(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = spot_outputs(images)
        order = outputs["simcc_x"].argmax(-1).argsort(-1)[..., None]
        return {name: np.take_along_axis(values, order, 1) for name, values in outputs.items()}

    plain = PoseEstimator(FakeSession(sided, by_side), sided)(FRAME, [BOX])
    merged = PoseEstimator(FakeSession(sided, by_side), sided, flip_test=True)(FRAME, [BOX])
    np.testing.assert_allclose(merged.keypoints, plain.keypoints, atol=0.05)
    np.testing.assert_allclose(merged.scores, plain.scores, atol=0.01)


def test_flip_test_of_a_fixed_batch_and_of_a_crowd() -> None:
    fixed = FakeSession(spot_spec(), batch=4)
    poses = PoseEstimator(fixed, spot_spec(), flip_test=True)(FRAME, [BOX] * 6)
    assert fixed.batches == [4, 4, 4, 4]
    np.testing.assert_allclose(poses.keypoints, np.broadcast_to(poses.keypoints[:1], (6, 2, 2)), atol=1e-4)


def test_flip_test_without_flip_pairs_is_refused_before_anything_runs() -> None:
    spec = spot_spec()
    sided = msgspec.structs.replace(
        spec, keypoints=msgspec.structs.replace(spec.keypoints, names=("left_a", "right_a"))
    )
    with pytest.raises(SpecError, match="flip_pairs"):
        PoseEstimator(FakeSession(sided), sided, flip_test=True)
    PoseEstimator(FakeSession(sided), sided)


@pytest.mark.parametrize("backend", EXECUTABLE)
def test_flip_test_of_a_bundle(bundle: Bundle, backend: Any) -> None:
    with PoseEstimator.from_bundle(bundle.root, backend=backend, options=EstimatorOptions(flip_test=True)) as flipping:
        assert flipping.info().flip_test
        found = flipping(FRAME, [BOX])
    with PoseEstimator.from_bundle(bundle.root, backend=backend) as plain:
        assert not plain.info().flip_test
        np.testing.assert_allclose(found.keypoints, plain(FRAME, [BOX]).keypoints, atol=0.1)


# Bad frames


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (FRAME[..., 0], r"shape \(240, 320\), expected \(H, W, 3\) uint8 BGR; .*COLOR_GRAY2BGR"),
        (FRAME[..., :1], "COLOR_GRAY2BGR"),
        (np.zeros((240, 320, 4), np.uint8), r"shape \(240, 320, 4\).*COLOR_BGRA2BGR"),
        (FRAME.transpose(2, 0, 1), "put the channels last"),
        (FRAME[None], "one frame at a time"),
        (FRAME.astype(np.float32), "dtype float32.*uint8"),
        (FRAME[:0], r"shape \(0, 320, 3\)"),
        (FRAME[0, 0], r"shape \(3,\)"),
        (None, "NoneType, expected a NumPy array"),
        ("photo.jpg", "str, expected a NumPy array"),
        (np.zeros((1, 40000, 3), np.uint8), "sides of at most 32766"),
    ],
)
def test_bad_frame_says_what_to_convert(
    estimator: PoseEstimator, session: FakeSession, frame: Any, message: str
) -> None:
    with pytest.raises(ImageError, match=message) as caught:
        estimator(frame)
    assert caught.value.exit_code == 2
    assert session.batches == []


def test_largest_frame_is_taken(estimator: PoseEstimator) -> None:
    assert np.isfinite(estimator(np.zeros((2, 32766, 3), np.uint8)).keypoints).all()


# Bad boxes


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([np.nan, 0, 10, 10], r"finite"),
        ([0, 0, np.inf, 10], r"finite"),
        ([0, 0, 1e300, 10], r"finite"),
        ([10, 10, 10, 50], r"\[10, 10, 10, 50\], of zero size"),
        ([10, 10, 50, 10], r"of zero size"),
        ([50, 10, 10, 60], r"in the wrong order.*swap the corners"),
        ([10, 60, 50, 10], r"in the wrong order"),
        ([320, 0, 400, 100], r"outside the frame, expected a box that touches the frame, 320 pixels wide and 240 high"),
        ([0, 240, 10, 250], r"outside the frame"),
        ([-20, 0, 0, 10], r"outside the frame"),
        ([0, -20, 10, -1], r"outside the frame"),
    ],
)
def test_bad_box_is_named_by_its_row(
    estimator: PoseEstimator, session: FakeSession, bad: list[float], message: str
) -> None:
    with pytest.raises(AnnotationError, match=f"boxes: row 2: .*{message}") as caught:
        estimator(FRAME, [BOX, BOX, bad])
    assert caught.value.exit_code == 2
    assert session.batches == []


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (BOX, r"shape \(4,\).*\[box\]"),
        ([BOX[:3]], r"shape \(1, 3\)"),
        ([[BOX]], r"shape \(1, 1, 4\)"),
        ([BOX, BOX[:2]], "found list"),
        ("boxes.json", "found str"),
        ([[None] * 4], "row 0"),
        (7, r"shape \(\)"),
    ],
)
def test_boxes_of_the_wrong_form_are_refused(estimator: PoseEstimator, boxes: Any, message: str) -> None:
    with pytest.raises(AnnotationError, match=message):
        estimator(FRAME, boxes)


# Sessions that do not fit


def test_session_of_another_network_is_refused() -> None:
    spec = spot_spec()
    narrow = msgspec.structs.replace(spec, preprocess=msgspec.structs.replace(spec.preprocess, input_hw=(48, 48)))
    with pytest.raises(SpecError, match=rf"input of shape .*{HEIGHT}, {WIDTH}.*\(batch, 3, 48, 48\)"):
        PoseEstimator(FakeSession(spec), narrow)
    with pytest.raises(SpecError, match=r"outputs \['simcc_x', 'simcc_y'\], expected \['heatmap'\] among them"):
        PoseEstimator(FakeSession(spec), msgspec.structs.replace(spec, decoder=Heatmap()))
    with pytest.raises(SpecError, match=r"expected \['seen'\] among them"):
        PoseEstimator(FakeSession(spec), msgspec.structs.replace(spec, visibility="seen"))
    with pytest.raises(SpecError, match=r"a decoder for inputs of \(48, 48\), expected the network's own, \(48, 32\)"):
        PoseEstimator(FakeSession(spec), msgspec.structs.replace(spec, decoder=Regression((48, 48))))
    renamed = (msgspec.structs.replace(spec.inputs[0], name="frames"),)
    with pytest.raises(SpecError, match=r"inputs \['images'\], expected \['frames'\]"):
        PoseEstimator(FakeSession(spec), msgspec.structs.replace(spec, inputs=renamed))


def test_network_with_another_number_of_keypoints_is_noticed() -> None:
    def one_joint(images: np.ndarray) -> dict[str, np.ndarray]:
        return {name: value[:, :1] for name, value in spot_outputs(images).items()}

    with pytest.raises(SpecError, match=r"keypoints of shape \(1, 1, 2\), expected \(1, 2, 2\)"):
        PoseEstimator(FakeSession(spot_spec(), one_joint), spot_spec())(FRAME)


# Bundles


def test_first_executable_engine_of_the_bundle_is_taken(bundle: Bundle) -> None:
    with edgepose.PoseEstimator.from_bundle(str(bundle.root)) as estimator:
        info = estimator.info()
        assert info.engine == bundle.manifest.engines[0]
        assert (info.name, info.backend, info.bundle_digest) == ("spots", "onnxruntime", bundle.digest)
        assert (info.threads, info.input_hw, info.keypoints) == (1, (HEIGHT, WIDTH), ("blue", "red"))
    with pytest.raises(SpecError, match="closed session"):
        estimator(FRAME)


def test_next_engine_is_taken_where_the_first_ones_runtime_is_missing(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with PoseEstimator.from_bundle(bundle.root) as estimator:
        assert estimator.info().backend == "openvino"


def test_no_runtime_at_all_names_every_extra(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in EXECUTABLE:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(BackendUnavailable, match=r"edgepose\[ort\]' or pip install 'edgepose\[openvino\]'") as caught:
        PoseEstimator.from_bundle(bundle.root)
    assert caught.value.exit_code == 6
    with pytest.raises(MissingDependency, match=r"edgepose\[openvino\]"):
        PoseEstimator.from_bundle(bundle.root, backend="openvino")


def test_engine_that_the_bundle_does_not_have_is_a_usage_error(bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="found onnxruntime fp32, openvino fp32, expected int8"):
        PoseEstimator.from_bundle(bundle.root, precision="int8")
    with pytest.raises(UsageError, match="expected tensorrt"):
        PoseEstimator.from_bundle(bundle.root, backend="tensorrt")


def test_bundle_of_tensorrt_engines_only_says_what_to_install_or_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    bundle = spot_bundle(tmp_path)
    engine = {**msgspec.to_builtins(bundle.manifest.engines[0]), "backend": "tensorrt"}
    forge(bundle, engines=[engine])
    with pytest.raises(BackendUnavailable, match=r"edgepose\[tensorrt\]', or build the bundle for onnxruntime or"):
        PoseEstimator.from_bundle(bundle.root)


def test_changed_engine_never_reaches_the_runtime(tmp_path: Path) -> None:
    bundle = spot_bundle(tmp_path)
    flip_a_byte(bundle.root / choose_engine(bundle).path)
    with pytest.raises(IntegrityError, match=r"fp32\.onnx") as caught:
        PoseEstimator.from_bundle(bundle.root)
    assert caught.value.exit_code == 8
    with PoseEstimator.from_bundle(bundle.root, backend="openvino") as estimator:
        assert len(estimator(FRAME)) == 1


def test_what_is_no_bundle_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        PoseEstimator.from_bundle(tmp_path / "absent")


# The package


def test_public_names_exist_and_are_listed() -> None:
    for name in edgepose.__all__:
        assert getattr(edgepose, name) is not None
        assert name in dir(edgepose)
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        edgepose.Nonsense  # noqa: B018


def test_run_half_loads_no_runtime_and_nothing_of_the_build_half() -> None:
    code = (
        "import sys, edgepose, edgepose.estimator, edgepose.runtime, edgepose.bundle, edgepose.golden, edgepose.host\n"
        "import edgepose.pose.codec, edgepose.pose.preprocess\n"
        "heavy = ('torch', 'onnx', 'onnxruntime', 'openvino', 'nncf', 'scipy', 'typer', 'rich', 'yaml')\n"
        "print(sorted(set(heavy) & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_running_a_bundle_loads_one_runtime_only(bundle: Bundle) -> None:
    code = (
        "import sys, edgepose, numpy\n"
        "with edgepose.PoseEstimator.from_bundle(sys.argv[1], backend='openvino') as e:\n"
        "    assert len(e(numpy.zeros((64, 64, 3), numpy.uint8))) == 1\n"
        "print(sorted({'torch', 'onnx', 'onnxruntime', 'nncf'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code, str(bundle.root)], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_threads_that_share_an_estimator_get_what_one_alone_gets(bundle: Bundle) -> None:
    rng = np.random.default_rng(3)
    places = [((x, y), (y + 40, x)) for x, y in rng.uniform(30, 180, (32, 2)).tolist()]
    frames = [spot_frame(*place) for place in places]
    with PoseEstimator.from_bundle(bundle.root, threads=1) as estimator, ThreadPoolExecutor(32) as pool:
        alone = [estimator(frame).keypoints for frame in frames]
        together = list(pool.map(lambda frame: estimator(frame).keypoints, frames))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
