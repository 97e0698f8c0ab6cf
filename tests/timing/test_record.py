"""Records: raw samples survive storage, percentiles say when they may not be stated."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edgepose.errors import BadInput
from edgepose.timing.record import (
    Arm,
    BundleArm,
    CallableArm,
    ModelArm,
    Samples,
    change_percent,
    merged,
    pack,
    percentiles,
)
from tests.profiler.simulated import Machine


@given(arrays.arrays(np.int64, arrays.array_shapes(max_dims=2, max_side=20), elements=st.integers(-(2**62), 2**62)))
@settings(deadline=None)  # the machine may be busy
def test_raw_samples_survive_json(samples: np.ndarray) -> None:
    stored = msgspec.json.encode(pack(samples))
    np.testing.assert_array_equal(msgspec.json.decode(stored, type=Samples).array(), samples)


@pytest.mark.parametrize("damaged", [Samples((2,), b"nonsense"), Samples((3,), pack(np.arange(2)).zlib_int64)])
def test_damaged_samples_are_an_error(damaged: Samples) -> None:
    with pytest.raises(BadInput, match="raw samples"):
        damaged.array()


@pytest.mark.parametrize(
    "arm", [BundleArm("a", "x.bundle"), ModelArm("b", "x.onnx", "openvino"), CallableArm("c", "m:f", {"n": [1, 2]})]
)
def test_every_kind_of_arm_keeps_its_kind_in_json(arm: Arm) -> None:
    assert msgspec.json.decode(msgspec.json.encode(arm), type=Arm) == arm


def test_percentiles_that_the_sample_is_too_small_for_are_left_open() -> None:
    p50, p90, p99 = percentiles(np.arange(1, 101) * 1_000_000)
    assert p50.value_ms == pytest.approx(50.5)
    assert p90.low_ms is not None
    assert p90.low_ms < 90.1 < (p90.high_ms or 0)
    assert (p99.value_ms, p99.low_ms, p99.high_ms, p99.needed) == (None, None, None, 662)


def test_a_merged_sample_is_the_sample_measured_at_once() -> None:
    machine = Machine(0.04, 3)
    assert merged(machine(0, 6), machine(6, 6)) == machine(0, 12)


HOST, PROTOCOL = Machine(0.0, 3)(0, 2).host, Machine(0.0, 3)(0, 2).protocol
OTHER: dict[str, dict[str, Any]] = {
    "processor": {"host": msgspec.structs.replace(HOST, cpu="another")},
    "runtime": {"host": msgspec.structs.replace(HOST, libraries={"onnxruntime": "0.1"})},
    "number of cores": {"host": msgspec.structs.replace(HOST, physical_cores=HOST.physical_cores + 1)},
    "governor": {"host": msgspec.structs.replace(HOST, governor="another")},
    "threads": {"protocol": msgspec.structs.replace(PROTOCOL, threads=7)},
    "batch": {"protocol": msgspec.structs.replace(PROTOCOL, batch=7)},
    "blocks": {"protocol": msgspec.structs.replace(PROTOCOL, block_ms=7.0)},
    "warm-up": {"protocol": msgspec.structs.replace(PROTOCOL, warm_up_ms=7.0)},
    "arm": {"a": BundleArm("before", "x.bundle", digest="1")},
}


@pytest.mark.parametrize("what", OTHER)
def test_samples_that_differ_in_anything_that_sets_the_speed_are_never_mixed(what: str) -> None:
    machine = Machine(0.0, 3)
    first, second = machine(0, 2), msgspec.structs.replace(machine(2, 2), **OTHER[what])
    with pytest.raises(BadInput, match="different arms, protocols or hosts"):
        merged(first, second)


def test_two_bundles_of_one_path_are_two_arms() -> None:
    assert BundleArm("a", "x.bundle", digest="1") != BundleArm("a", "x.bundle", digest="2")


@pytest.mark.parametrize(("ratio", "text"), [(1.05, "+5.0 %"), (0.5, "-50.0 %"), (float("nan"), "unknown")])
def test_ratios_are_shown_as_changes(ratio: float, text: str) -> None:
    assert change_percent(ratio) == text
