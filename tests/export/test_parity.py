from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgepose.errors import ParityError
from edgepose.export.parity import Tolerance, check_step, compare, keypoint_shift
from edgepose.pose.codec import decode
from edgepose.spec import SimCC
from tests.fakes import FakeSession, spot_spec

arrays = hnp.arrays(np.float32, (2, 3), elements=st.floats(-100, 100, width=32))


@given(arrays, arrays, st.floats(0, 0.5))
def test_the_tolerance_that_would_have_passed_passes_and_nothing_smaller_does(
    reference: np.ndarray, candidate: np.ndarray, outliers: float
) -> None:
    (output,) = compare("s", {"y": reference}, {"y": candidate}, Tolerance(outliers=outliers)).outputs
    allowed = output.would_pass
    assert compare("s", {"y": reference}, {"y": candidate}, Tolerance(absolute=allowed, outliers=outliers)).passed
    if allowed > 0:
        smaller = Tolerance(absolute=float(np.nextafter(allowed, 0)), outliers=outliers)
        assert not compare("s", {"y": reference}, {"y": candidate}, smaller).passed


def test_the_report_names_the_first_output_out_of_tolerance_and_its_worst_element() -> None:
    reference = {name: np.zeros((2, 3), np.float32) for name in ("a", "b", "c")}
    candidate = {name: value.copy() for name, value in reference.items()}
    candidate["b"][1, 2] = 0.5
    candidate["c"][0, 0] = 9.0
    report = compare("ONNX → IR", reference, candidate, Tolerance(absolute=0.1))
    failure = report.first_failure
    assert failure is not None
    assert (failure.name, failure.worst_index, failure.would_pass) == ("b", (1, 2), 0.5)
    with pytest.raises(
        ParityError, match=r"ONNX → IR: b: found a difference of 0\.5 at \[1, 2\].*allow an absolute 0\.5"
    ):
        report.raise_if_failed()


def test_relative_tolerance_is_a_share_of_the_largest_value() -> None:
    reference = {"y": np.array([100.0, 0.0], np.float32)}
    candidate = {"y": np.array([100.0, 0.9], np.float32)}
    assert compare("s", reference, candidate, Tolerance(relative=0.01)).passed
    assert not compare("s", reference, candidate, Tolerance(relative=0.005)).passed


@pytest.mark.parametrize(
    ("candidate", "problem"),
    [
        ({}, "no such output"),
        ({"y": np.zeros((3, 2), np.float32)}, r"shape \(3, 2\) instead of \(2, 3\)"),
        ({"y": np.full((2, 3), np.nan, np.float32)}, "6 values of the candidate"),
    ],
)
def test_what_cannot_be_compared_fails_whatever_the_tolerance(candidate: dict[str, np.ndarray], problem: str) -> None:
    report = compare("s", {"y": np.ones((2, 3), np.float32)}, candidate, Tolerance(absolute=1e9))
    with pytest.raises(ParityError, match=problem):
        report.raise_if_failed()


def test_two_sessions_are_compared_on_the_same_inputs() -> None:
    feeds = {spot_spec().inputs[0].name: np.zeros((1, *spot_spec().inputs[0].shape[1:]), np.float32)}
    assert check_step("same", FakeSession(spot_spec()), FakeSession(spot_spec()), feeds, Tolerance()).passed


def test_keypoints_that_move_are_measured_in_pixels() -> None:
    logits = np.zeros((1, 2, 32), np.float32)
    logits[:, :, 10] = 9
    moved = logits.copy()
    moved[0, 1] = np.roll(moved[0, 1], 6)
    decoder = SimCC(split_ratio=2.0)
    before, after = {"simcc_x": logits, "simcc_y": logits}, {"simcc_x": moved, "simcc_y": logits}
    expected = np.linalg.norm(decode(before, decoder)[0] - decode(after, decoder)[0], axis=-1)
    shift = keypoint_shift(before, after, decoder)
    assert shift.max_px == pytest.approx(3.0) == pytest.approx(expected.max())
    assert shift.mean_px == pytest.approx(1.5)
    assert shift.moved_share == 0.5
    assert keypoint_shift(before, before, decoder).max_px == 0
