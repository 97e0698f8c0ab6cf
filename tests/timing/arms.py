"""Factories of things to time, loaded by worker processes: they must import nothing but the standard library."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path


def sleeper(milliseconds: float = 1.0) -> Callable[[], None]:
    return lambda: time.sleep(milliseconds / 1e3)


def dies_after(calls: int) -> Callable[[], None]:
    """Kills its own process, as the system does with one that takes too much memory."""
    left = [calls]

    def call() -> None:
        left[0] -= 1
        if left[0] < 0:
            print("last words", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.001)

    return call


def raises() -> Callable[[], None]:
    def call() -> None:
        raise ValueError("this engine is broken")

    return call


def raises_edgepose() -> Callable[[], None]:
    from edgepose.errors import MissingDependency

    raise MissingDependency("onnxruntime", extra="ort", needed_for="testing")


def hangs() -> Callable[[], None]:
    return lambda: time.sleep(60)


def chatters() -> Callable[[], None]:
    def call() -> None:
        print("a library that prints to the standard output")
        os.write(1, b"and one that writes to its descriptor\n")
        time.sleep(0.001)

    return call


def tells_environment(path: str) -> Callable[[], None]:
    """Writes process id and thread variables to a file that is named after the process."""
    variables = " ".join(os.environ.get(name, "") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    Path(path, str(os.getpid())).write_text(variables, encoding="utf-8")
    return lambda: time.sleep(0.001)


def not_a_callable() -> int:
    return threading.active_count()
