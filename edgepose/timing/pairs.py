"""Comparing arms in groups of fresh processes that take turns; a comparison of two is a group of two.

Invariant: no worker outlives the function that started it, whatever ends that function; and while one worker of a group
runs, the others are blocked on their pipes (idle thread pools in one process would slow all arms, see docs/gate.md).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgepose import host
from edgepose.errors import EdgeposeError, EnvironmentFault
from edgepose.timing import harness
from edgepose.timing.messages import (
    Failed,
    Finish,
    Finished,
    Load,
    Ready,
    Reply,
    Request,
    RunBlock,
    Sample,
    Timed,
    receive_reply,
    send,
)
from edgepose.timing.record import (
    Arm,
    ArmTrace,
    LatencyComparison,
    LatencyProtocol,
    PairTrace,
    WorkerFacts,
    comparison_of,
    pack,
)

Progress = Callable[[int, int], None]
"""Called with the rounds done and all rounds."""

MEASURING = "EDGEPOSE_MEASURING"
"""Variable that is set in worker processes, so that nothing in them starts to measure in its turn."""

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
)
_LAST_WORDS = 400  # characters of a dead worker's standard error that are shown
_FAREWELL_S = 5.0  # a worker that has been told to finish may take this long to close its engine

_R = TypeVar("_R", Ready, Timed, Finished)


@dataclass(frozen=True, slots=True)
class Worker:
    """A running worker process, seen from its parent.

    Attributes:
        label: What the arm is called.
        process: The process.
        requests: Pipe to it.
        replies: Pipe from it.
        stderr: File that catches what it prints.
        timeout_s: How long it may be silent.
    """

    label: str
    process: subprocess.Popen[bytes]
    requests: Connection
    replies: Connection
    stderr: IO[bytes]
    timeout_s: float

    def load(self, request: Load) -> Ready:
        """Loads and warms up an arm."""
        return self._ask(request, Ready, request.warm_up_ms / 1e3)

    def block(self, calls: int) -> NDArray[np.int64]:
        """Times a block: (calls,) int64 nanoseconds per call."""
        return np.asarray(_durations(self._ask(RunBlock(calls), Timed)).sum(axis=1), np.int64)

    def sample(self, duration_s: float) -> NDArray[np.int64]:
        """Times calls for a while: (calls, stages) int64 nanoseconds."""
        return _durations(self._ask(Sample(duration_s * 1e3), Timed, duration_s))

    def finish(self) -> WorkerFacts:
        """Ends the worker and hears what it found out about itself."""
        facts = self._ask(Finish(), Finished).facts
        self.requests.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_FAREWELL_S)
        return facts

    def _ask(self, request: Request, kind: type[_R], busy_s: float = 0.0) -> _R:
        try:
            send(self.requests, request)
            if not self.replies.poll(self.timeout_s + busy_s):
                raise EnvironmentFault(
                    f"measuring {self.label}",
                    found=f"a worker silent for {self.timeout_s:g} s",
                    expected="an answer",
                    fix="look for a hanging engine, or raise the protocol's timeout_s",
                )
            reply: Reply = receive_reply(self.replies)
        except (EOFError, BrokenPipeError, ConnectionResetError) as err:
            raise self._death() from err
        if isinstance(reply, Failed):
            raise _error_of(self.label, reply)
        if not isinstance(reply, kind):
            raise EnvironmentFault(
                f"measuring {self.label}", found=f"a worker that answers {reply!r:.80}", expected=kind.__name__
            )
        return reply

    def _death(self) -> EnvironmentFault:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_FAREWELL_S)
        code = self.process.returncode
        cause = "still closing" if code is None else f"exit status {code}" if code >= 0 else _signal_name(-code)
        self.stderr.seek(0)
        words = " ".join(self.stderr.read().decode(errors="replace").split())[-_LAST_WORDS:]
        return EnvironmentFault(
            f"measuring {self.label}",
            found=f"a worker process that died ({cause})" + (f", saying: {words}" if words else ""),
            expected="one that answers",
            fix="check the memory of this machine, and run the engine by itself",
        )


@contextlib.contextmanager
def running_worker(label: str, *, threads: int, timeout_s: float) -> Iterator[Worker]:
    """A fresh worker process, gone when the block ends.

    Args:
        label: What the arm is called.
        threads: Value of the variables that size thread pools.
        timeout_s: How long it may be silent.

    Raises:
        EnvironmentFault: The process cannot be started.
    """
    environment = dict(os.environ) | dict.fromkeys(_THREAD_VARIABLES, str(threads))
    environment[MEASURING] = "1"
    environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    command = [sys.executable, "-m", "edgepose.timing.worker", str(time.perf_counter_ns())]
    with contextlib.ExitStack() as stack:
        stderr = stack.enter_context(tempfile.TemporaryFile())
        try:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, bufsize=0
            )
        except OSError as err:
            raise EnvironmentFault(
                f"measuring {label}", found=f"a worker that does not start ({err})", expected="a new process"
            ) from err
        stack.callback(_reap, process)
        assert process.stdin is not None
        assert process.stdout is not None
        requests = stack.enter_context(Connection(os.dup(process.stdin.fileno()), readable=False))
        replies = stack.enter_context(Connection(os.dup(process.stdout.fileno()), writable=False))
        process.stdin.close()
        process.stdout.close()
        yield Worker(label, process, requests, replies, stderr, timeout_s)


@dataclass(frozen=True, slots=True)
class Group:
    """One group of fresh processes, one per arm.

    Attributes:
        orders: Per round, dropped ones included: the numbers of the arms in the order they ran.
        traces: One per arm.
        load_average: One-minute load average when the group ended; negative where unknown.
    """

    orders: tuple[tuple[int, ...], ...]
    traces: tuple[ArmTrace, ...]
    load_average: float = -1.0

    def pair(self, base: int, candidate: int, protocol: LatencyProtocol) -> PairTrace:
        """Two of the arms, by number, as if the others had not been there."""
        a, b = self.traces[base], self.traces[candidate]
        slow, quick = (np.median(trace.calls_ns.array(), axis=1) for trace in (a, b))
        ratios = np.log(quick / slow)[protocol.dropped_blocks :]
        order = "".join("A" if order.index(base) < order.index(candidate) else "B" for order in self.orders)
        return PairTrace(order, tuple(ratios.tolist()), a, b, self.load_average)


def compare_latency(
    arm_a: Arm,
    arm_b: Arm,
    protocol: LatencyProtocol | None = None,
    progress: Progress | None = None,
    *,
    first_pair: int = 0,
) -> LatencyComparison:
    """Times arm B (candidate) against arm A (baseline).

    Args:
        arm_a: The baseline.
        arm_b: The candidate.
        protocol: How; None takes the defaults.
        progress: Told after every round.
        first_pair: Number of the first pair, so that pairs measured later get random orders of their own.

    Raises:
        EnvironmentFault: A worker died, hung or could not be started.
        EdgeposeError: Whatever loading or running an arm raised.
    """
    protocol = protocol or LatencyProtocol()
    groups = measure_groups((arm_a, arm_b), protocol, progress, first=first_pair)
    pairs = [group.pair(0, 1, protocol) for group in groups]
    return comparison_of((arm_a, arm_b), protocol, pairs, host.fingerprint())


def measure_groups(
    arms: Sequence[Arm], protocol: LatencyProtocol, progress: Progress | None, *, first: int
) -> tuple[Group, ...]:
    """Times `protocol.pairs` groups of processes, one after the other.

    Args:
        arms: Who takes turns.
        protocol: How.
        progress: Told after every round.
        first: Number of the first group, which its random orders follow from.

    Raises:
        EnvironmentFault: A worker died, hung or could not be started.
        EdgeposeError: Whatever loading or running an arm raised.
    """
    rounds = protocol.dropped_blocks + protocol.blocks
    groups = []
    for number in range(protocol.pairs):

        def report(done: int, before: int = number * rounds) -> None:
            if progress is not None:
                progress(before + done, protocol.pairs * rounds)

        groups.append(_measure_group(arms, protocol, first + number, report))
    return tuple(groups)


def _measure_group(arms: Sequence[Arm], protocol: LatencyProtocol, number: int, report: Callable[[int], None]) -> Group:
    rng = np.random.default_rng([protocol.seed, number])
    threads = protocol.threads or host.physical_cores()
    with contextlib.ExitStack() as stack:
        workers: dict[int, Worker] = {}
        calls: dict[int, int] = {}
        for arm in rng.permutation(len(arms)).tolist():
            worker = running_worker(arms[arm].label, threads=threads, timeout_s=protocol.timeout_s)
            workers[arm] = stack.enter_context(worker)
            ready = workers[arm].load(_load_request(arms[arm], protocol, threads))
            calls[arm] = harness.calls_per_block(ready.call_ns, int(protocol.block_ms * 1e6))
        orders: list[tuple[int, ...]] = []
        blocks: list[list[NDArray[np.int64]]] = [[] for _ in arms]
        for done in range(1, protocol.dropped_blocks + protocol.blocks + 1):
            orders.append(tuple(rng.permutation(len(arms)).tolist()))
            for arm in orders[-1]:
                blocks[arm].append(workers[arm].block(calls[arm]))
            report(done)
        traces = tuple(ArmTrace(pack(np.stack(blocks[arm])), workers[arm].finish()) for arm in range(len(arms)))
    return Group(tuple(orders), traces, load_average())


def _load_request(arm: Arm, protocol: LatencyProtocol, threads: int) -> Load:
    return Load(
        arm=arm,
        threads=threads,
        batch=protocol.batch,
        frame_hw=(480, 640),
        seed=protocol.seed,
        warm_up_ms=protocol.warm_up_ms,
    )


def load_average() -> float:
    """The one-minute load average; -1 where the system has none."""
    try:
        return os.getloadavg()[0]
    except (OSError, AttributeError):
        return -1.0


def _durations(reply: Timed) -> NDArray[np.int64]:
    return np.asarray(np.frombuffer(reply.ns, "<i8").reshape(-1, reply.stages), np.int64)


def _error_of(label: str, failure: Failed) -> EdgeposeError:
    if failure.error:
        error = pickle.loads(failure.error)  # noqa: S301 - written by the child that this process started
        if isinstance(error, EdgeposeError):
            return error
    return EnvironmentFault(
        f"measuring {label}", found=failure.text, expected="a workload that runs", fix="run the engine by itself"
    )


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Makes sure that a worker is gone; one that has finished already is only waited for."""
    if process.poll() is None:
        process.kill()
    process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
