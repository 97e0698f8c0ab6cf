"""The program of a worker process: loads one arm, then times blocks of calls when told to, and nothing in between.

Invariant: a worker that waits uses no processor time of its own making: it is blocked in a read of its pipe. It ends
when that pipe closes, so it never outlives the process that started it.

Started as `python -m edgepose.timing.worker` by `edgepose.timing.pairs`. Requests arrive on the
standard input and replies leave on what was the standard output; whatever libraries print goes to the standard error.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from edgepose.errors import EdgeposeError, UsageError
from edgepose.telemetry import block_telemetry
from edgepose.timing import harness
from edgepose.timing.messages import (
    Failed,
    Finish,
    Finished,
    Load,
    Ready,
    Reply,
    RunBlock,
    Sample,
    Timed,
    receive_request,
    send,
)
from edgepose.timing.record import WorkerFacts
from edgepose.timing.workload import Workload, open_workload

_WARM_UP_CALLS = 3
_CLOCK = time.perf_counter_ns


@dataclass(slots=True)
class _Worker:
    """The state between requests: the loaded arm, and what has been used up so far."""

    started_ns: int
    workload: Workload | None = None
    load_ms: float = 0.0
    first_call_ms: float = 0.0
    threads: int = 0
    cpu_ns: int = 0
    wall_ns: int = 0
    page_faults: int = 0
    preemptions: int = 0
    calls: list[harness.Stage] = field(default_factory=list)

    def load(self, request: Load) -> Ready:
        self.workload = open_workload(request)
        self.threads = request.threads
        self.calls = [call for _, call in self.workload.stages]
        self.load_ms = (_CLOCK() - self.started_ns) / 1e6
        budget = harness.Budget(int(request.warm_up_ms * 1e6), _WARM_UP_CALLS)
        warm = harness.warm_up(self.calls, budget, clock=_CLOCK).sum(axis=1)
        self.first_call_ms = float(warm[0]) / 1e6
        gc.collect()
        gc.freeze()  # what was imported and loaded stays; collections between blocks need not look at it again
        gc.disable()
        settled = warm[len(warm) // 2 :]
        names = tuple(name for name, _ in self.workload.stages)
        return Ready(float(np.median(settled)), names, self.workload.people)

    def block(self, request: RunBlock) -> Timed:
        self._require_loaded()
        gc.collect()
        for call in self.calls:
            call()
        return self._timed(harness.Budget(0, request.calls, request.calls))

    def sample(self, request: Sample) -> Timed:
        self._require_loaded()
        return self._timed(harness.Budget(int(request.duration_ms * 1e6)))

    def finish(self) -> Finished:
        workload = self._require_loaded()
        peak, steady = memory_bytes()
        return Finished(
            WorkerFacts(
                load_ms=self.load_ms,
                first_call_ms=self.first_call_ms,
                threads=self.threads,
                peak_rss_bytes=peak,
                steady_rss_bytes=steady,
                cpu_ns=self.cpu_ns,
                wall_ns=self.wall_ns,
                page_faults=self.page_faults,
                preemptions=self.preemptions,
                backend=workload.backend,
            )
        )

    def _timed(self, budget: harness.Budget) -> Timed:
        cpu, wall, (faults, preemptions) = time.process_time_ns(), _CLOCK(), _disturbances()
        durations = harness.sample(self.calls, budget, clock=_CLOCK)
        self.wall_ns += _CLOCK() - wall
        self.cpu_ns += time.process_time_ns() - cpu
        now = _disturbances()
        self.page_faults += now[0] - faults
        self.preemptions += now[1] - preemptions
        return Timed(durations.astype("<i8").tobytes(), durations.shape[1])

    def _require_loaded(self) -> Workload:
        if self.workload is None:
            raise UsageError("worker", found="a request before an arm was loaded", expected="a load request first")
        return self.workload


def serve(requests: Connection, replies: Connection, *, started_ns: int) -> None:
    """Answers requests until `Finish`, a failure, or the end of the pipe."""
    worker = _Worker(started_ns)
    try:
        while True:
            request = receive_request(requests)
            reply = _answer(worker, request)
            send(replies, reply)
            if isinstance(reply, Failed | Finished):
                break
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # whoever asked has gone, and nobody is left to tell
    finally:
        if worker.workload is not None:
            worker.workload.close()


def _answer(worker: _Worker, request: Load | RunBlock | Sample | Finish) -> Reply:
    try:
        match request:
            case Load():
                return worker.load(request)
            case RunBlock():
                return worker.block(request)
            case Sample():
                return worker.sample(request)
            case Finish():
                return worker.finish()
    except EdgeposeError as err:
        return Failed(pickle.dumps(err), str(err))
    except Exception as err:  # noqa: BLE001 - the arm may be anyone's code, and its error belongs in the parent
        return Failed(b"", f"{type(err).__name__}: {err}")


def memory_bytes() -> tuple[int, int]:
    """Peak and present resident memory of this process in bytes; zeros where the system does not tell.

    Linux's `ru_maxrss` would start from the peak of the parent process, which /proc does not.
    """
    found = {"VmHWM:": 0, "VmRSS:": 0}
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, rest = line.partition("\t")
            if key in found:
                found[key] = int(rest.split()[0]) * 1024
    return found["VmHWM:"], found["VmRSS:"]


def _disturbances() -> tuple[int, int]:
    """Page faults that read from the disk, and involuntary context switches, of this process so far."""
    import resource  # POSIX only

    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_majflt, usage.ru_nivcsw


def main(arguments: Sequence[str]) -> int:
    """Runs the worker; the only argument is the parent's clock when it started this process, in nanoseconds."""
    block_telemetry()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle: it closes the pipe
    replies = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)
    requests = Connection(os.dup(0), writable=False)
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a descriptor is wanted, not a path
        os.dup2(nothing.fileno(), 0)
    serve(requests, replies, started_ns=int(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
