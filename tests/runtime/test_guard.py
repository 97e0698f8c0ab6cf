"""Engines that fail, hang and lie: no wrong answer is handed out, no frame is lost, and engines come back."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from edgepose.errors import SpecError
from edgepose.runtime.guard import Answer, EngineFault, Guard, Standby
from edgepose.runtime.session import Array, ClosedSession
from tests.fakes import HEIGHT, WIDTH, FakeSession, spot_outputs, spot_spec

FEEDS = {"images": np.random.default_rng(0).random((2, 3, HEIGHT, WIDTH), np.float32)}
RIGHT = spot_outputs(FEEDS["images"])


def nan(images: Array) -> dict[str, Array]:
    said = spot_outputs(images)
    said["simcc_x"] = said["simcc_x"].copy()
    said["simcc_x"][0, 0, 3] = np.nan
    return said


def raising(_: Array) -> dict[str, Array]:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


FAULTS: dict[str, tuple[Callable[[Array], dict[str, Array]], str]] = {
    "raises": (raising, "RuntimeError: CUDA error"),
    "NaN": (nan, "no numbers"),
    "infinity": (lambda images: {n: np.full_like(v, np.inf) for n, v in spot_outputs(images).items()}, "no numbers"),
    "constant": (lambda images: {n: v * 0 for n, v in spot_outputs(images).items()}, "0 throughout"),
    "missing": (lambda images: {"simcc_x": spot_outputs(images)["simcc_x"]}, "no output 'simcc_y'"),
    "short": (lambda images: {n: v[:1] for n, v in spot_outputs(images).items()}, "for 2 crops"),
    "narrow": (lambda images: {n: v[..., :5] for n, v in spot_outputs(images).items()}, "shape"),
    "flat": (lambda images: {n: v.ravel() for n, v in spot_outputs(images).items()}, "shape"),
}


@dataclass
class Engine:
    """An engine whose network can be exchanged while it runs; counts how often it was loaded."""

    name: str
    network: Callable[[Array], dict[str, Array]] = spot_outputs
    sessions: list[FakeSession] = field(default_factory=list)

    def open(self) -> FakeSession:
        self.sessions.append(FakeSession(spot_spec(), self._answer))
        return self.sessions[-1]

    def _answer(self, images: Array) -> dict[str, Array]:
        return self.network(images)

    @property
    def standby(self) -> Standby:
        return Standby(self.name, self.open, patience_s=0.2)


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def guard(*engines: Engine, clock: Callable[[], float] = time.monotonic) -> Guard:
    return Guard(engines[0].open(), [engine.standby for engine in engines], clock=clock)


def right(guarded: Guard) -> Answer:
    """The answer to FEEDS, after a look at its numbers."""
    answer = guarded.answer(FEEDS)
    assert same(answer.outputs)
    return answer


def same(found: Mapping[str, Array]) -> bool:
    return all(np.array_equal(found[name], RIGHT[name]) for name in RIGHT)


def test_an_engine_that_works_is_used_alone() -> None:
    first, second = Engine("first"), Engine("second")
    guarded = guard(first, second)
    assert [tensor.name for tensor in guarded.inputs] == ["images"]
    answer = right(guarded)
    assert (answer.engine, answer.degraded) == ("first", False)
    assert second.sessions == []
    guarded.close()
    guarded.close()
    assert first.sessions[0].closed
    with pytest.raises(ClosedSession):
        guarded.infer(FEEDS)


@pytest.mark.parametrize(("network", "said"), FAULTS.values(), ids=FAULTS)
def test_what_is_no_answer_is_answered_by_the_next_engine(
    network: Callable[[Array], dict[str, Array]], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Engine("first", network), Engine("second")
    guarded = guard(first, second)
    with caplog.at_level(logging.WARNING, "edgepose"):
        answer = right(guarded)
    assert (answer.engine, answer.degraded) == ("second", True)
    assert said in caplog.text
    assert "engine first" in caplog.text
    assert first.sessions[0].closed
    guarded.close()


def test_a_picture_without_anything_may_have_an_answer_without_anything() -> None:
    guarded = guard(Engine("first"), Engine("second"))
    assert guarded.answer({"images": np.zeros((1, 3, HEIGHT, WIDTH), np.float32)}).engine == "first"
    guarded.close()


def test_an_engine_that_hangs_is_given_up_and_closes_when_it_comes_back() -> None:
    free = threading.Event()

    def hanging(images: Array) -> dict[str, Array]:
        assert free.wait(20)
        return spot_outputs(images)

    first, second = Engine("first", hanging), Engine("second")
    guarded = guard(first, second)
    start = time.monotonic()
    answer = right(guarded)
    assert time.monotonic() - start < 10
    assert answer.engine == "second"
    assert not first.sessions[0].closed
    free.set()
    for _ in range(1000):
        if first.sessions[0].closed:
            break
        time.sleep(0.01)
    assert first.sessions[0].closed
    guarded.close()


def test_a_failed_engine_is_left_alone_longer_each_time_and_then_comes_back() -> None:
    clock, first, second = Clock(), Engine("first", raising), Engine("second")
    guarded = guard(first, second, clock=clock)
    loaded = []
    for now in (0.0, 0.5, 1.5, 3.0, 4.0, 6.0):  # left alone until 1, then until 3.5, then until 8
        clock.now = now
        assert same(guarded.infer(FEEDS))
        loaded.append(len(first.sessions))
    assert loaded == [1, 1, 2, 2, 3, 3]
    first.network = spot_outputs
    clock.now = 8.5
    answer = right(guarded)
    assert (answer.engine, answer.degraded) == ("first", False)
    first.network = raising
    assert same(guarded.infer(FEEDS))
    clock.now = 9.6  # it had recovered: a second of rest is enough again
    first.network = spot_outputs
    answer = right(guarded)
    assert answer.engine == "first"
    guarded.close()


def test_an_engine_that_hung_is_left_alone_for_longer_and_the_next_answers_at_once() -> None:
    free, clock = threading.Event(), Clock()

    def hanging(images: Array) -> dict[str, Array]:
        assert free.wait(20)
        return spot_outputs(images)

    first = Engine("first", hanging)
    guarded = guard(first, Engine("second"), clock=clock)
    start = time.monotonic()
    assert right(guarded).engine == "second"
    assert time.monotonic() - start < 5
    clock.now = 59.0
    assert right(guarded).engine == "second"
    assert len(first.sessions) == 1
    first.network = spot_outputs
    clock.now = 61.0
    assert right(guarded).engine == "first"
    free.set()
    guarded.close()


def test_a_single_engine_is_tried_again_with_the_next_frame() -> None:
    only = Engine("only", raising)
    guarded = guard(only)
    with pytest.raises(EngineFault, match="engine only: found RuntimeError: CUDA error") as caught:
        guarded.infer(FEEDS)
    assert caught.value.exit_code == 6
    assert isinstance(caught.value.__cause__, RuntimeError)
    only.network = spot_outputs
    assert same(guarded.infer(FEEDS))
    assert len(only.sessions) == 2
    guarded.close()


def test_where_none_can_answer_the_error_is_that_of_the_preferred_one() -> None:
    guarded = guard(Engine("first", nan), Engine("second", raising))
    with pytest.raises(EngineFault, match="engine first"):
        guarded.infer(FEEDS)
    guarded.close()


def test_an_engine_that_cannot_be_loaded_is_passed_over() -> None:
    def broken() -> FakeSession:
        raise MemoryError("out of memory")

    first, third = Engine("first", raising), Engine("third")
    guarded = Guard(first.open(), [first.standby, Standby("second", broken), third.standby])
    answer = right(guarded)
    assert answer.engine == "third"
    guarded.close()


def test_what_the_caller_did_wrong_costs_no_engine_its_place() -> None:
    first, second = Engine("first"), Engine("second")
    guarded = guard(first, second)
    with pytest.raises(SpecError, match="feeds"):
        guarded.infer({"images": np.zeros((1, 3, 5, 5), np.float32)})
    answer = right(guarded)
    assert answer.engine == "first"
    guarded.close()


def test_hundreds_of_faults_lose_no_frame_and_deliver_no_wrong_answer() -> None:
    rng = np.random.default_rng(0)
    clock, second = Clock(), Engine("second")
    networks = [network for network, _ in FAULTS.values()]

    def moody(images: Array) -> dict[str, Array]:
        return networks[rng.integers(len(networks))](images) if rng.random() < 0.7 else spot_outputs(images)

    first, degraded = Engine("first", moody), 0
    guarded = guard(first, second, clock=clock)
    for _ in range(300):
        clock.now += 400.0
        degraded += right(guarded).degraded
    assert 150 < degraded < 270
    assert threading.active_count() < 20
    guarded.close()


def test_threads_share_a_guard_and_each_gets_its_own_answer() -> None:
    rng = np.random.default_rng(1)
    inputs = [rng.random((1, 3, HEIGHT, WIDTH), np.float32) for _ in range(64)]
    guarded, wrong = guard(Engine("first"), Engine("second")), []

    def ask(images: Array) -> None:
        found, expected = guarded.infer({"images": images}), spot_outputs(images)
        if not all(np.array_equal(found[name], expected[name]) for name in expected):
            wrong.append(images)

    threads = [threading.Thread(target=ask, args=(images,)) for images in inputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    guarded.close()
