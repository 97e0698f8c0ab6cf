"""An estimator in an app: frames in the background, in order, and other bundles while it runs."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgepose.bundle import Bundle, write_bundle
from edgepose.errors import ImageError, ParityError, SpecError, UsageError
from edgepose.estimator import PoseEstimator
from edgepose.runtime.session import ClosedSession
from edgepose.spec import Keypoints, Poses
from tests.fakes import FakeSession, spot_frame, spot_outputs, spot_spec
from tests.tiny_network import spot_bundle, spot_draft, spot_onnx

PLACES = [((20.0 + 7 * i, 30.0 + 5 * i), (200.0 - 6 * i, 150.0 - 4 * i)) for i in range(20)]
FRAMES = [spot_frame(*place) for place in PLACES]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return spot_bundle(tmp_path_factory.mktemp("spots"))


def in_order(poses: list[Poses]) -> bool:
    """Whether these are the poses of FRAMES, one after the other."""
    found = np.stack([one.keypoints[0] for one in poses])
    return bool(np.abs(found - np.array(PLACES, np.float32)).max() < 8)


def slow(images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    time.sleep(0.01)
    return spot_outputs(images)


def test_frames_are_answered_in_the_background() -> None:
    with PoseEstimator(FakeSession(spot_spec(), slow), spot_spec()) as estimator:
        assert in_order([future.result() for future in [estimator.submit(frame) for frame in FRAMES]])


def test_a_bad_frame_fails_alone() -> None:
    with PoseEstimator(FakeSession(spot_spec()), spot_spec()) as estimator:
        good, bad = estimator.submit(FRAMES[0]), estimator.submit(np.zeros((3, 3), np.uint8))
        with pytest.raises(ImageError):
            bad.result()
        assert len(good.result()) == 1


def test_who_submits_faster_than_frames_are_answered_has_to_wait() -> None:
    free, submitted = threading.Event(), []

    def held(images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        assert free.wait(20)
        return spot_outputs(images)

    def film() -> None:
        for frame in FRAMES:
            submitted.append(estimator.submit(frame))  # noqa: PERF401 - another thread looks on

    with PoseEstimator(FakeSession(spot_spec(), held), spot_spec()) as estimator:
        thread = threading.Thread(target=film)
        thread.start()
        while len(submitted) < 8:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(submitted) == 8
        free.set()
        thread.join(20)
        assert in_order([future.result() for future in submitted])


def test_closing_waits_for_what_is_pending() -> None:
    session = FakeSession(spot_spec(), slow)
    estimator = PoseEstimator(session, spot_spec())
    futures = [estimator.submit(frame) for frame in FRAMES[:5]]
    estimator.close()
    estimator.close()
    assert all(len(future.result()) == 1 for future in futures)
    assert session.closed
    with pytest.raises(ClosedSession):
        estimator(FRAMES[0])


@pytest.mark.parametrize("kind", ["list", "async", "boxes"])
def test_a_stream_is_answered_in_its_order(kind: str) -> None:
    async def camera() -> AsyncIterator[NDArray[np.uint8]]:
        for frame in FRAMES:
            await asyncio.sleep(0.001)
            yield frame

    async def main() -> list[Poses]:
        shown = {"list": FRAMES, "async": camera(), "boxes": [(frame, [[0, 0, 320, 240]]) for frame in FRAMES]}[kind]
        with PoseEstimator(FakeSession(spot_spec(), slow), spot_spec()) as estimator:
            return [poses async for poses in estimator.stream(shown)]  # type: ignore[arg-type]

    assert in_order(asyncio.run(main()))


# Reloading


def other(folder: Path, **changes: object) -> Bundle:
    folder.mkdir()
    return write_bundle(folder / "other.bundle", replace(spot_draft(folder), name="other", **changes))  # type: ignore[arg-type]


def test_another_bundle_is_put_into_service_without_losing_a_frame(bundle: Bundle, tmp_path: Path) -> None:
    second, stop = other(tmp_path / "second"), threading.Event()
    found: list[Poses] = []

    def film() -> None:
        while not stop.is_set():
            for frame in FRAMES:
                found.append(estimator(frame))  # noqa: PERF401 - another thread looks on

    with PoseEstimator.from_bundle(bundle.root, "onnxruntime", 1) as estimator:
        thread = threading.Thread(target=film)
        thread.start()
        for root in (second.root, bundle.root, second.root):
            before = len(found)
            estimator.reload(root)
            while len(found) < before + 20 and thread.is_alive():
                time.sleep(0.01)
        stop.set()
        thread.join()
        assert estimator.info().bundle_digest == second.digest
    assert len(found) % len(FRAMES) == 0
    assert all(in_order(found[i : i + 20]) for i in range(0, len(found), 20))


def test_a_bundle_that_strays_is_not_put_into_service(bundle: Bundle, tmp_path: Path) -> None:
    wrong = onnx.load_from_string(spot_onnx())
    wrong.graph.node[1].op_type = "ReduceMean"
    first = replace(spot_draft(tmp_path).engines[0], files={"fp32.onnx": wrong.SerializeToString()})
    strays = other(tmp_path / "strays", engines=(first,))
    with PoseEstimator.from_bundle(bundle.root, "onnxruntime", 1) as estimator:
        with pytest.raises(ParityError, match="golden check"):
            estimator.reload(strays.root)
        assert estimator.info().bundle_digest == bundle.digest
        assert in_order([estimator(frame) for frame in FRAMES])


def test_other_keypoints_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    renamed = msgspec.structs.replace(spot_spec(), keypoints=Keypoints(names=("blue", "green")))
    greens = other(tmp_path / "greens", spec=renamed)
    with PoseEstimator.from_bundle(bundle.root, "onnxruntime", 1) as estimator:
        with pytest.raises(SpecError, match=r"blue, green.*blue, red"):
            estimator.reload(greens.root)
        assert len(estimator(FRAMES[0])) == 1


def test_a_session_of_ones_own_cannot_be_exchanged(bundle: Bundle) -> None:
    estimator = PoseEstimator(FakeSession(spot_spec()), spot_spec())
    with pytest.raises(UsageError, match="make a new estimator"):
        estimator.reload(bundle.root)
