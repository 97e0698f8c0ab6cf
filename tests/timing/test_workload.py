"""What a worker runs: factories that are found or refused, inputs that repeat, and stages that equal the estimator."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepose.errors import IntegrityError, UsageError
from edgepose.estimator import PoseEstimator
from edgepose.spec import TensorSpec
from edgepose.timing.engine_stages import FrameCall, open_engine, synthetic_feeds, synthetic_frame
from edgepose.timing.messages import Load
from edgepose.timing.record import BundleArm, CallableArm
from edgepose.timing.workload import open_workload
from tests.fakes import FakeSession, spot_spec
from tests.tiny_network import spot_bundle

ARMS = Path(__file__).with_name("arms.py")


def load(arm: CallableArm | BundleArm, batch: int = 2) -> Load:
    return Load(arm, 1, batch, (240, 320), 0, 1.0)


def test_a_factory_is_found_in_a_module_or_a_file_and_given_its_arguments() -> None:
    for place in ("tests.timing.arms", str(ARMS)):
        workload = open_workload(load(CallableArm("x", f"{place}:sleeper", {"milliseconds": 0})))
        ((name, call),) = workload.stages
        assert name == "call"
        call()
        workload.close()


@pytest.mark.parametrize(
    "factory",
    ["nothing", ":f", "no.such.module:f", f"{ARMS}:no_such_function", "no/such/file.py:f", f"{ARMS}:not_a_callable"],
)
def test_a_factory_that_cannot_be_used_is_a_usage_error(factory: str) -> None:
    with pytest.raises(UsageError, match="factory"):
        open_workload(load(CallableArm("x", factory)))


def test_synthetic_inputs_fill_free_dimensions_and_repeat_with_the_seed() -> None:
    inputs = (TensorSpec("images", ("batch", 3, 8, 6)), TensorSpec("ids", ("batch", "length"), "int64"))
    feeds = synthetic_feeds(inputs, batch=4, seed=1)
    assert feeds["images"].shape == (4, 3, 8, 6)
    assert feeds["images"].dtype == np.float32
    assert feeds["ids"].shape == (4, 256)
    np.testing.assert_array_equal(feeds["images"], synthetic_feeds(inputs, batch=4, seed=1)["images"])
    assert not np.array_equal(feeds["images"], synthetic_feeds(inputs, batch=4, seed=2)["images"])


def test_the_stages_together_are_what_the_estimator_does() -> None:
    frame, boxes = synthetic_frame((240, 320), 3, seed=5)
    call = FrameCall(FakeSession(spot_spec()), spot_spec(), frame, boxes)
    for stage in (call.crop, call.infer, call.decode):
        stage()
    expected = PoseEstimator(FakeSession(spot_spec()), spot_spec())(frame, boxes)
    np.testing.assert_array_equal(call.keypoints, expected.keypoints)
    np.testing.assert_array_equal(call.scores, expected.scores)


def test_a_bundle_that_was_replaced_meanwhile_is_not_measured(tmp_path: Path) -> None:
    bundle = spot_bundle(tmp_path)
    same = BundleArm("x", str(bundle.root), "onnxruntime", digest=bundle.digest)
    open_engine(same, load(same)).session.close()
    arm = BundleArm("x", str(bundle.root), "onnxruntime", digest="0" * 64)
    with pytest.raises(IntegrityError, match="when the measurement began"):
        open_engine(arm, load(arm))


@pytest.mark.parametrize(("timed", "stages"), [("infer", ["infer"]), ("frame", ["crop", "infer", "decode"])])
def test_an_engine_of_a_bundle_becomes_stages(tmp_path: Path, timed: str, stages: list[str]) -> None:
    bundle = spot_bundle(tmp_path)
    arm = BundleArm("x", str(bundle.root), "openvino", timed=timed)  # type: ignore[arg-type]
    engine = open_engine(arm, load(arm, batch=3))
    try:
        assert [name for name, _ in engine.stages] == stages
        assert (engine.backend, engine.people) == ("openvino", 3)
        for _, call in engine.stages:
            call()
    finally:
        engine.session.close()
