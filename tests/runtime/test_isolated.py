"""Sessions in processes of their own: the same answers, and nothing of a crash or a hang on this side."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from edgepose.bundle import read_bundle
from edgepose.engines import choose_engine, open_engine, open_isolated
from edgepose.errors import EnvironmentFault, IntegrityError, OnnxError, SpecError, UsageError
from edgepose.estimator import EstimatorOptions, PoseEstimator
from edgepose.runtime.guard import Guard, Standby
from edgepose.runtime.isolated import IsolatedSession
from edgepose.runtime.session import Array, ClosedSession, facts_of
from tests.fakes import FakeSession, spot_frame, spot_outputs, spot_spec
from tests.tiny_network import flip_a_byte, spot_bundle

IMAGES = np.random.default_rng(0).random((3, *map(int, spot_spec().inputs[0].shape[1:])), np.float32)


class Odd(FakeSession):
    """Does what the first number of its images says: 2 hang, 3 raise, 4 end the process, 5 print, others answer."""

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        what = round(float(feeds["images"].flat[0]))
        if what == 2:
            time.sleep(60)
        if what == 3:
            raise RuntimeError("an illegal memory access")
        if what == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        if what == 5:
            print("a library that talks", flush=True)
        return super().infer(feeds)


def odd() -> Odd:
    return Odd(spot_spec(), spot_outputs)


def broken() -> Odd:
    raise OnnxError("net.onnx", found="a cycle")


def asking(what: float) -> dict[str, Array]:
    images = IMAGES.copy()
    images.flat[0] = what
    return {"images": images}


@pytest.fixture
def session() -> Iterator[IsolatedSession]:
    opened = IsolatedSession(f"{__name__}:odd", {})
    yield opened
    opened.close()


def process_of(session: IsolatedSession) -> int:
    return session._process.pid


def ended(process: int) -> bool:
    return not Path(f"/proc/{process}").exists()


def test_answers_are_those_of_the_session(session: IsolatedSession) -> None:
    assert [tensor.name for tensor in session.inputs] == ["images"]
    found, expected = session.infer(asking(0)), spot_outputs(asking(0)["images"])
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    session.close()
    session.close()
    assert ended(process_of(session))
    with pytest.raises(ClosedSession):
        session.infer(asking(0))


def test_what_the_engine_raises_is_raised_here_and_it_goes_on(session: IsolatedSession) -> None:
    with pytest.raises(EnvironmentFault, match="RuntimeError: an illegal memory access"):
        session.infer(asking(3))
    with pytest.raises(SpecError):
        session.infer({"images": IMAGES[0]})
    assert session.infer(asking(0)).keys() == {"simcc_x", "simcc_y"}


def test_what_a_library_prints_is_no_answer(session: IsolatedSession) -> None:
    assert session.infer(asking(5)).keys() == {"simcc_x", "simcc_y"}


def test_a_process_that_is_killed_is_an_error(session: IsolatedSession) -> None:
    with pytest.raises(EnvironmentFault, match="a process ended by signal 9"):
        session.infer(asking(4))


def test_a_hanging_process_is_ended_and_whoever_waits_is_told(session: IsolatedSession) -> None:
    faults: list[Exception] = []

    def ask() -> None:
        try:
            session.infer(asking(2))
        except EnvironmentFault as err:
            faults.append(err)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.3)
    session.abandon()
    thread.join(10)
    assert len(faults) == 1
    assert ended(process_of(session))


def test_what_opening_raises_is_raised_here_and_no_process_is_left() -> None:
    with pytest.raises(OnnxError, match=r"net\.onnx: found a cycle"):
        IsolatedSession(f"{__name__}:broken", {})
    with pytest.raises(EnvironmentFault, match="ModuleNotFoundError"):
        IsolatedSession("no.such.module:open", {})


def test_a_frozen_program_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(UsageError, match="frozen into one file"):
        IsolatedSession(f"{__name__}:odd", {})


@pytest.mark.parametrize("what", [0, 2])
def test_the_process_ends_with_its_parent_even_while_it_hangs(what: int) -> None:
    code = (
        "import os, threading, time; from tests.runtime.test_isolated import *\n"
        f"s = IsolatedSession({__name__ + ':odd'!r}, {{}}); print(s._process.pid, flush=True)\n"
        f"threading.Thread(target=s.infer, args=(asking({what}),), daemon=True).start(); time.sleep(0.5); os._exit(0)"
    )
    import subprocess

    path = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    until = time.monotonic() + 10
    while not ended(int(ran.stdout)) and time.monotonic() < until:
        time.sleep(0.05)
    assert ended(int(ran.stdout))


@pytest.mark.parametrize("what", [2, 4])
def test_a_guard_replaces_a_process_that_hangs_or_dies(what: float) -> None:
    opened: list[IsolatedSession] = []

    def first() -> IsolatedSession:
        opened.append(IsolatedSession(f"{__name__}:odd", {}))
        return opened[-1]

    clock = iter(range(0, 10**6, 1000))
    spare = Standby("spare", lambda: FakeSession(spot_spec(), spot_outputs))
    standbys = [Standby("isolated", first, patience_s=0.5), spare]
    guard = Guard(first(), standbys, clock=lambda: float(next(clock)))
    answer = guard.answer(asking(what))
    assert (answer.engine, answer.degraded) == ("spare", True)
    assert ended(process_of(opened[0]))
    answer = guard.answer(asking(0))
    assert (answer.engine, answer.degraded) == ("isolated", False)
    assert len(opened) == 2
    guard.close()
    assert all(ended(process_of(session)) for session in opened)


def test_an_engine_of_a_bundle_answers_alike_and_a_changed_one_does_not_open(tmp_path: Path) -> None:
    bundle = spot_bundle(tmp_path)
    engine = choose_engine(bundle, "onnxruntime")
    here, there = open_engine(bundle, engine, 1, None), open_isolated(bundle, engine, 1, None)
    found, expected = there.infer({"images": IMAGES}), here.infer({"images": IMAGES})
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert facts_of(there) is not None
    here.close()
    there.close()
    flip_a_byte(bundle.root / engine.path)
    with pytest.raises(IntegrityError, match=r"fp32\.onnx"):
        open_isolated(bundle, engine, 1, None)
    with pytest.raises(IntegrityError, match="which was opened before"):
        from edgepose.engines import open_at

        where = {"root": str(bundle.root), "path": engine.path, "backend": engine.backend}
        open_at(**where, digest="0" * 64, threads=1, execution=None)  # type: ignore[arg-type]


def test_an_estimator_survives_the_death_of_its_engines_process(tmp_path: Path) -> None:
    frame = spot_frame((80, 60), (200, 150), (400, 320))
    bundle = read_bundle(spot_bundle(tmp_path).root)
    options = EstimatorOptions(isolated=True)
    with PoseEstimator.from_bundle(bundle.root, threads=1, aim="none", options=options) as estimator:
        right = estimator(frame)
        guard = estimator._service.network.session
        assert isinstance(guard, Guard)
        thread = guard._places[0].thread
        assert thread is not None
        assert isinstance(thread.session, IsolatedSession)
        os.kill(process_of(thread.session), signal.SIGKILL)
        poses = estimator(frame)
        assert np.allclose(poses.keypoints, right.keypoints, atol=1e-3)
        assert poses.degraded
        assert not right.degraded
