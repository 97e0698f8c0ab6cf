"""Pairs of worker processes: they take turns, say what went wrong, and leave no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgepose.errors import BadInput, EnvironmentFault, MissingDependency
from edgepose.timing.messages import Load, receive_reply, send
from edgepose.timing.pairs import compare_latency, running_worker
from edgepose.timing.record import (
    BundleArm,
    CallableArm,
    LatencyComparison,
    LatencyProtocol,
    ModelArm,
    call_times_ms,
    merged,
)
from tests.tiny_network import spot_bundle

ARMS = str(Path(__file__).with_name("arms.py"))
REPOSITORY = Path(__file__).resolve().parents[2]
SHORT = LatencyProtocol(
    pairs=1, blocks=5, dropped_blocks=1, block_ms=2.0, warm_up_ms=1.0, threads=1, seed=3, timeout_s=60.0
)


def arm(function: str, label: str = "arm", **arguments: object) -> CallableArm:
    return CallableArm(label, f"{ARMS}:{function}", arguments)


def children() -> set[str]:
    """Process ids of this process's children that still run the worker."""
    listed = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=False
    )
    return {line.split()[0] for line in listed.stdout.splitlines() if "edgepose.timing.worker" in line}


def test_slower_arm_shows_its_ratio_and_every_sample_is_kept() -> None:
    seen = []
    comparison = compare_latency(
        arm("sleeper", "fast", milliseconds=1),
        arm("sleeper", "slow", milliseconds=30),
        SHORT,
        lambda *p: seen.append(p),
    )
    assert comparison.ratio > 1.5  # 30 on an idle machine
    (pair,) = comparison.pairs
    assert len(pair.log_ratios) == 5
    assert len(pair.order) == 6
    assert set(pair.order) <= {"A", "B"}
    slow = pair.b.calls_ns.array()
    assert slow.shape[0] == 6
    assert (slow >= 30_000_000).all()
    assert len(call_times_ms(pair.b, comparison.protocol)) == 5 * slow.shape[1]
    assert seen == [(done, 6) for done in range(1, 7)]
    assert pair.a.facts.peak_rss_bytes > 5_000_000
    assert pair.a.facts.first_call_ms >= 1
    assert not children()


def test_comparison_survives_json_with_every_figure_recomputable() -> None:
    comparison = compare_latency(arm("sleeper", "a"), arm("sleeper", "b"), SHORT)
    again = msgspec.json.decode(msgspec.json.encode(comparison), type=LatencyComparison)
    assert again == comparison
    a, b = (trace.calls_ns.array()[1:] for trace in (again.pairs[0].a, again.pairs[0].b))
    ratios = np.log(np.median(b, axis=1) / np.median(a, axis=1))
    np.testing.assert_allclose(ratios, again.pairs[0].log_ratios)


def test_later_pairs_continue_the_sample_with_orders_of_their_own() -> None:
    protocol = msgspec.structs.replace(SHORT, blocks=12)
    arms = arm("sleeper", "a"), arm("sleeper", "b")
    first, second = compare_latency(*arms, protocol), compare_latency(*arms, protocol, first_pair=1)
    whole = merged(first, second)
    assert len(whole.pairs) == whole.protocol.pairs == 2
    assert whole.pairs[0].order != whole.pairs[1].order
    with pytest.raises(BadInput, match="different arms"):
        merged(first, msgspec.structs.replace(second, a=arm("hangs", "a")))


def test_each_arm_has_a_fresh_process_with_the_same_number_of_threads(tmp_path: Path) -> None:
    protocol = msgspec.structs.replace(SHORT, pairs=2, threads=3, blocks=1, dropped_blocks=0)
    arms = (arm("tells_environment", name, path=str(tmp_path)) for name in "ab")
    compare_latency(*arms, protocol)
    written = [file.read_text() for file in tmp_path.iterdir()]
    assert written == ["3 3"] * 4
    assert str(os.getpid()) not in {file.name for file in tmp_path.iterdir()}


def test_what_an_arm_prints_does_not_disturb_the_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    assert compare_latency(arm("chatters"), arm("sleeper"), SHORT).ratio > 0
    assert "library" not in capfd.readouterr().out


def test_a_worker_that_is_killed_is_named_with_its_signal_and_last_words() -> None:
    with pytest.raises(EnvironmentFault, match=r"candidate.*SIGKILL.*last words"):
        compare_latency(arm("sleeper"), arm("dies_after", "candidate", calls=8), SHORT)
    assert not children()


def test_an_error_of_the_arm_arrives_with_its_text() -> None:
    with pytest.raises(EnvironmentFault, match=r"broken one.*ValueError: this engine is broken"):
        compare_latency(arm("sleeper"), arm("raises", "broken one"), SHORT)
    assert not children()


def test_a_deliberate_error_arrives_as_itself() -> None:
    with pytest.raises(MissingDependency, match=r"edgepose\[ort\]"):
        compare_latency(arm("raises_edgepose"), arm("sleeper"), SHORT)


def test_a_hanging_worker_is_given_up() -> None:
    started = time.monotonic()
    with pytest.raises(EnvironmentFault, match="silent for 2 s"):
        compare_latency(arm("hangs"), arm("hangs"), msgspec.structs.replace(SHORT, timeout_s=2.0))
    assert time.monotonic() - started < 30
    assert not children()


def test_a_worker_ends_when_its_pipe_closes() -> None:
    with running_worker("x", threads=1, timeout_s=60) as worker:
        request = Load(arm("sleeper"), 1, 1, (10, 10), 0, 1.0)
        send(worker.requests, request)
        receive_reply(worker.replies)
        worker.requests.close()
        assert worker.process.wait(30) == 0


def test_a_waiting_worker_uses_no_processor_time() -> None:
    with running_worker("x", threads=1, timeout_s=60) as worker:
        worker.load(Load(arm("sleeper"), 1, 1, (10, 10), 0, 1.0))
        stat = Path(f"/proc/{worker.process.pid}/stat")
        before = stat.read_text().rpartition(")")[2].split()[11:13]
        time.sleep(0.3)
        assert stat.read_text().rpartition(")")[2].split()[11:13] == before


def test_ctrl_c_leaves_no_worker_behind(tmp_path: Path) -> None:
    program = (
        "from tests.timing.test_pairs import SHORT, arm\n"
        "from edgepose.timing.pairs import compare_latency\n"
        "import msgspec\n"
        f"arms = [arm('tells_environment', n, path={str(tmp_path)!r}) for n in 'ab']\n"
        "compare_latency(*arms, msgspec.structs.replace(SHORT, blocks=100000))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    workers = [int(file.name) for file in tmp_path.iterdir()]
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the whole group
    _, stderr = process.communicate(timeout=30)
    assert len(workers) == 2
    assert b"KeyboardInterrupt" in stderr
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


def test_engines_of_a_bundle_and_model_files_can_be_compared(tmp_path: Path) -> None:
    bundle = spot_bundle(tmp_path)
    protocol = msgspec.structs.replace(SHORT, batch=2)
    engine = BundleArm("engine", str(bundle.root), "onnxruntime")
    frame = BundleArm("frame", str(bundle.root), "onnxruntime", timed="frame")
    comparison = compare_latency(engine, frame, protocol)
    assert comparison.b_ms > 0
    assert comparison.pairs[0].a.facts.backend == "onnxruntime"
    model = ModelArm("model", str(bundle.root / "model.onnx"), "onnxruntime")
    assert compare_latency(model, model, protocol).a_ms > 0


def test_a_bundle_that_does_not_exist_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such directory"):
        compare_latency(BundleArm("x", str(tmp_path / "none.bundle")), arm("sleeper"), SHORT)
