"""The memory estimate, and what is given up where there is not enough."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepose.errors import OnnxError
from edgepose.export.trt_memory import MIB, Needs, attempts, needs_of
from edgepose.spec import TensorrtBuild
from tests.export.qdq_graphs import Net

BUILD = TensorrtBuild()
SMALL = Needs(weights_bytes=4 * MIB, peak_bytes=2 * MIB)


def test_weights_and_peak_are_read_off_the_graph(tmp_path: Path) -> None:
    net = Net()
    kernel = net.constant("w", np.ones((4, 4, 3, 3), np.float32))
    first = net.node("Conv", ["images", kernel], "conv", pads=[1, 1, 1, 1])
    second = net.node("Relu", [first], "relu")
    last = net.node("Concat", [first, second], "both", axis=1)
    needs = needs_of(net.save(tmp_path / "net.onnx", last))
    one = 4 * 8 * 8 * 4
    assert needs == Needs(weights_bytes=4 * 4 * 9 * 4, peak_bytes=4 * one)  # convolution, rectifier, and both


def test_what_is_read_once_is_not_kept_alive(tmp_path: Path) -> None:
    net, value = Net(), "images"
    for index in range(5):
        value = net.node("Relu", [value], f"relu{index}")
    assert needs_of(net.save(tmp_path / "net.onnx", value)).peak_bytes == 2 * 4 * 8 * 8 * 4


def test_estimate_grows_with_the_batch() -> None:
    assert SMALL.build_bytes(64) - SMALL.build_bytes(1) == 63 * 2 * SMALL.peak_bytes
    assert SMALL.build_bytes(1) > 3 * SMALL.weights_bytes


def test_first_attempt_is_what_was_asked_for_where_there_is_memory() -> None:
    first, *later = attempts(BUILD, 64, SMALL, 64 * 1024 * MIB)
    assert (first.profiles, first.level, first.without) == (((1, 8, 64),), 3, ())
    assert first.workspace_bytes == 32 * 1024 * MIB  # half of what is free, never all of it
    assert [max(p[2] for p in step.profiles) for step in later] == [16, 4]
    assert [step.level for step in later] == [2, 0]


def test_small_boards_get_smaller_batches_at_once_and_it_is_said() -> None:
    needs = Needs(weights_bytes=40 * MIB, peak_bytes=20 * MIB)
    first = attempts(BUILD, 64, needs, 2500 * MIB)[0]
    assert first.profiles == ((1, 8, 16),)
    assert first.without == ("batch 16 instead of 64: 2500 MiB are free",)


def test_where_nothing_fits_one_image_is_tried() -> None:
    steps = attempts(BUILD, 64, Needs(2000 * MIB, 500 * MIB), 1000 * MIB)
    assert steps[0].profiles == ((1, 1, 1),)
    assert steps[-1].level == 0
    assert steps[-1].without[-1] == "level 0 instead of 2"


def test_ahead_of_time_there_is_one_attempt() -> None:
    (only,) = attempts(TensorrtBuild(workspace_mib=5), 64, SMALL, 0)
    assert (only.workspace_bytes, only.level, only.without) == (5 * MIB, 3, ())


def test_targets_largest_batch_cuts_profiles_and_equal_ones_are_one() -> None:
    build = TensorrtBuild(profiles=((1, 1, 1), (1, 8, 64), (1, 4, 32)))
    assert attempts(build, 4, SMALL, 0)[0].profiles == ((1, 1, 1), (1, 4, 4))


def test_levels_are_never_raised() -> None:
    assert [step.level for step in attempts(TensorrtBuild(level=1), 1, SMALL, 8000 * MIB)] == [1, 1, 0]


@pytest.mark.parametrize("content", [None, b"no network"])
def test_files_that_are_no_network(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OnnxError, match=r"net\.onnx"):
        needs_of(path)
