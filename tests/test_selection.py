"""Choosing an engine by measuring: the clearly fastest that answers right, once, and again when something changed."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from edgepose import host
from edgepose.bundle import Bundle, write_bundle
from edgepose.engines import runnable_engines
from edgepose.errors import BackendUnavailable, EnvironmentFault, ParityError, UsageError
from edgepose.estimator import EstimatorOptions, PoseEstimator
from edgepose.selection import Selection, Wishes, preferred, select, thread_counts
from edgepose.spec import Aim
from edgepose.timing.messages import Load, Ready
from edgepose.timing.pairs import MEASURING
from edgepose.timing.record import BundleArm, WorkerFacts
from tests.fakes import spot_frame
from tests.tiny_network import spot_bundle, spot_draft, spot_onnx

ORT, VINO = "onnxruntime", "openvino"
FACTS = WorkerFacts(1.0, 1.0, 1, 0, 0, 1, 1, 0, 0, "fake")


@dataclass
class Farm:
    """Starts workers that know their times: milliseconds of a call by backend and threads.

    Attributes:
        times_ms: Of one call; what is missing takes a second.
        faults: What loading raises, by backend.
        memory: Peak memory in bytes, by backend.
        energy_uj: What a block uses, by backend.
        mortal: Backends whose worker dies when it is started for the second time.
        loads: What was asked for.
    """

    times_ms: dict[tuple[str, int], float]
    faults: dict[str, Exception] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    energy_uj: dict[str, int] = field(default_factory=dict)
    mortal: tuple[str, ...] = ()
    loads: list[Load] = field(default_factory=list)
    used_uj: int = 0

    @contextmanager
    def __call__(self, label: str, *, threads: int, timeout_s: float) -> Iterator[_Worker]:
        assert label
        assert timeout_s > 0
        yield _Worker(self, threads)


@dataclass
class _Worker:
    farm: Farm
    threads: int
    arm: BundleArm | None = None

    def load(self, request: Load) -> Ready:
        assert isinstance(request.arm, BundleArm)
        assert request.arm.golden
        assert request.threads == self.threads
        self.arm = request.arm
        backend = str(request.arm.backend)
        if backend in self.farm.faults:
            raise self.farm.faults[backend]
        before = sum(load.arm == request.arm and load.threads == self.threads for load in self.farm.loads)
        self.farm.loads.append(request)
        if before and backend in self.farm.mortal:
            raise EnvironmentFault("measuring", found="a worker process that died", expected="one that answers")
        return Ready(self._ms * 1e6, ("infer",), request.batch)

    def block(self, calls: int) -> NDArray[np.int64]:
        assert self.arm is not None
        self.farm.used_uj += self.farm.energy_uj.get(str(self.arm.backend), 0)
        return np.full(calls, self._ms * 1e6, np.int64)

    def finish(self) -> WorkerFacts:
        assert self.arm is not None
        return msgspec.structs.replace(FACTS, peak_rss_bytes=self.farm.memory.get(str(self.arm.backend), 0))

    @property
    def _ms(self) -> float:
        assert self.arm is not None
        return self.farm.times_ms.get((str(self.arm.backend), self.threads), 1000.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return spot_bundle(tmp_path_factory.mktemp("spots"))


@pytest.fixture(autouse=True)
def two_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(host, "physical_cores", lambda *_: 2)


def measured(
    bundle: Bundle, farm: Farm, aim: Aim = "latency", *, threads: int | None = None, again: bool = False
) -> Selection:
    wishes = Wishes(aim, threads)
    return select(bundle, runnable_engines(bundle, None, None), wishes, again=again, workers=farm)


def test_the_fastest_is_chosen_and_the_others_follow_by_their_time(bundle: Bundle) -> None:
    found = measured(bundle, Farm({(ORT, 2): 3, (ORT, 1): 4, (VINO, 2): 2, (VINO, 1): 5}))
    assert [(t.backend, t.threads, t.ms) for t in found.trials] == [
        (VINO, 2, 2),
        (ORT, 2, 3),
        (ORT, 1, 4),
        (VINO, 1, 5),
    ]
    assert found.best == found.trials[0]
    assert found.why == "best of 4 settings measured for latency (onnxruntime fp32, 2 threads takes 1.50 x the time)"
    assert found.passed_over == ()


def test_what_is_not_clearly_faster_leaves_the_bundles_order(bundle: Bundle) -> None:
    best = measured(bundle, Farm({(ORT, 2): 2.04, (ORT, 1): 9, (VINO, 2): 2, (VINO, 1): 9})).best
    assert best is not None
    assert best.backend == ORT


def test_the_fastest_are_timed_once_more_in_turns(bundle: Bundle) -> None:
    farm = Farm({(ORT, 2): 2.2, (ORT, 1): 9, (VINO, 2): 2, (VINO, 1): 9})
    best = measured(bundle, farm).best
    assert best is not None
    assert best.backend == VINO
    assert [(load.arm.backend, load.threads) for load in farm.loads[4:]] == [(ORT, 2), (VINO, 2)]  # type: ignore[union-attr]


def test_whoever_dies_in_the_second_round_leaves_the_choice_to_the_first(bundle: Bundle) -> None:
    best = measured(bundle, Farm({(ORT, 2): 2.2, (VINO, 2): 2}, mortal=(VINO,))).best
    assert best is not None
    assert best.backend == ORT


def test_a_second_start_measures_nothing(bundle: Bundle) -> None:
    farm = Farm({(ORT, 2): 3, (VINO, 2): 2})
    first = measured(bundle, farm)
    started = len(farm.loads)
    assert measured(bundle, farm) == first
    assert len(farm.loads) == started
    assert measured(bundle, farm, again=True) == first
    assert len(farm.loads) > started


def test_another_wish_or_machine_is_measured_anew(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    farm = Farm({(ORT, 2): 3, (VINO, 2): 2})
    counts = []
    aims: tuple[tuple[Aim, int | None], ...] = (("latency", None), ("throughput", None), ("latency", 1))
    for aim, threads in aims:
        measured(bundle, farm, aim, threads=threads)
        counts.append(len(farm.loads))
    monkeypatch.setattr(host, "physical_cores", lambda *_: 1)
    measured(bundle, farm)
    counts.append(len(farm.loads))
    assert counts == sorted(set(counts))
    assert farm.loads[counts[0]].batch == 8  # throughput


@pytest.mark.parametrize("content", [b"", b"{}", b'{"aim": "latency", "trials": []}', b"\x00\xff"])
def test_a_damaged_memory_is_measured_anew(bundle: Bundle, content: bytes) -> None:
    farm = Farm({(ORT, 2): 3, (VINO, 2): 2})
    first = measured(bundle, farm)
    (place,) = (host.cache_directory() / "selections").iterdir()
    place.write_bytes(content)
    assert measured(bundle, farm) == first
    assert len(farm.loads) > 4


def test_a_cache_that_cannot_be_written_costs_a_warning(
    bundle: Bundle, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, "edgepose"):
        assert measured(bundle, Farm({(VINO, 2): 2})).best is not None
    assert "measured at every start" in caplog.text


def test_an_engine_that_strays_is_out_with_the_reason(bundle: Bundle) -> None:
    fault = ParityError("golden check of engines/x", found="a largest difference of 3", expected="at most 0.1")
    found = measured(bundle, Farm({(ORT, 2): 3, (ORT, 1): 3.5}, faults={VINO: fault}))
    assert [(trial.backend, bool(trial.fault)) for trial in found.trials] == [
        (ORT, False), (ORT, False), (VINO, True), (VINO, True),
    ]  # fmt: skip
    assert found.passed_over == (str(fault),)
    assert found.why.endswith("; 2 out")


def test_where_none_can_serve_nothing_is_remembered_and_the_bundles_order_stays(bundle: Bundle) -> None:
    fault = EnvironmentFault("measuring", found="a worker that does not start", expected="a new process")
    farm = Farm({}, faults={VINO: fault, ORT: fault})
    found = measured(bundle, farm)
    assert found.best is None
    assert "none of 4" in found.why
    assert not (host.cache_directory() / "selections").exists()


def test_least_memory(bundle: Bundle) -> None:
    farm = Farm({(ORT, 2): 3, (ORT, 1): 2, (VINO, 2): 1, (VINO, 1): 1}, memory={ORT: 100, VINO: 150})
    best = measured(bundle, farm, "memory").best
    assert best is not None
    assert (best.backend, best.threads, best.peak_rss_bytes) == (ORT, 1, 100)  # as little, and faster


def test_least_energy(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    farm = Farm({(ORT, 2): 10, (ORT, 1): 10, (VINO, 2): 10, (VINO, 1): 10}, energy_uj={ORT: 900, VINO: 500})
    monkeypatch.setattr(host, "energy", lambda: ((farm.used_uj, 10**9),))
    best = measured(bundle, farm, "energy").best
    assert best is not None
    assert best.backend == VINO
    calls = 3 + 1  # a block of 30 ms, and one call that brings the caches back
    assert best.energy_mj == pytest.approx(0.5 / calls)


def test_energy_needs_a_counter(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "energy", lambda: None)
    with pytest.raises(BackendUnavailable, match="powercap"):
        measured(bundle, Farm({}), "energy")


def test_one_half_and_all_cores_are_tried(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bundle.manifest.engines[0]
    monkeypatch.setattr(host, "physical_cores", lambda *_: 8)
    assert thread_counts(engine, None) == (8, 1, 4)
    assert thread_counts(msgspec.structs.replace(engine, threads=16), None) == (8, 4, 1)
    assert thread_counts(engine, 3) == (3,)
    assert thread_counts(msgspec.structs.replace(engine, backend="tensorrt", threads=0), None) == (0,)


def test_one_setting_needs_no_measurement(bundle: Bundle) -> None:
    engines = runnable_engines(bundle, ORT, None)
    assert preferred(bundle, engines, Wishes("latency", 1)) == (None, [(engines[0], 1)])
    with pytest.raises(UsageError, match="latency, throughput, memory, energy or none"):
        preferred(bundle, engines, Wishes("speed", 1))  # type: ignore[arg-type]


def test_nothing_is_measured_from_a_frozen_program_or_within_a_measurement(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a program would start itself, to measure in its turn."""
    engines = runnable_engines(bundle, None, None)
    monkeypatch.setenv(MEASURING, "1")
    assert preferred(bundle, engines, Wishes()) == (None, [(engine, None) for engine in engines])
    monkeypatch.delenv(MEASURING)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert preferred(bundle, engines, Wishes()) == (None, [(engine, None) for engine in engines])


def test_latency_is_that_of_a_call_and_throughput_that_of_a_person(bundle: Bundle) -> None:
    farm = Farm({(ORT, 2): 8.0, (VINO, 2): 16.0})
    for aim, ms in (("latency", 8.0), ("throughput", 1.0)):
        best = measured(bundle, farm, aim).best  # type: ignore[arg-type]
        assert best is not None
        assert best.ms == pytest.approx(ms)


def test_a_real_first_start_measures_and_a_second_remembers(bundle: Bundle) -> None:
    told: list[str] = []
    for _ in range(2):
        with PoseEstimator.from_bundle(
            bundle.root, ORT, aim="latency", options=EstimatorOptions(told=lambda what, _, __: told.append(what))
        ) as estimator:
            info = estimator.info()
            assert len(estimator(spot_frame((80, 60), (200, 150)))) == 1
        assert info.selection is not None
        assert info.selection.best is not None
        assert info.threads == info.selection.best.threads
        assert info.facts is not None
    assert told[:2] == ["onnxruntime fp32, 2 threads", "onnxruntime fp32, 1 thread"]
    assert len(told) in (2, 3)


def test_a_real_engine_that_strays_is_never_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It would be preferred by the bundle's order, and it is as fast as the other one."""
    draft = spot_draft(tmp_path)
    wrong = onnx.load_from_string(spot_onnx())
    wrong.graph.node[1].op_type = "ReduceMean"
    first = replace(draft.engines[0], files={"fp32.onnx": wrong.SerializeToString()})
    bundle = write_bundle(tmp_path / "strays.bundle", replace(draft, engines=(first, draft.engines[1])))
    with (
        caplog.at_level(logging.WARNING, "edgepose"),
        PoseEstimator.from_bundle(bundle.root, threads=1, aim="latency") as estimator,
    ):
        assert estimator.info().backend == VINO
        assert "golden check" in estimator.info().passed_over[0]
    assert "running openvino fp32 meanwhile" in caplog.text
