"""Which engine and how many threads serve an aim best on this machine: measured once, remembered, never guessed.

Every setting is loaded in a process of its own, checked on the golden vectors and timed; the fastest are timed once
more in turns, so that a machine that slows down meanwhile slows down all of them. To be chosen a setting has to be
clearly better: what is within the noise stays with the one that the bundle lists first.

Invariant: an engine that strays from the golden vectors is never chosen, and is remembered with the reason; a second
start with the same bundle, machine, runtimes and wishes measures nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from edgepose import host
from edgepose.bundle import Bundle
from edgepose.errors import BackendUnavailable, EdgeposeError, StorageError, UsageError
from edgepose.runtime import EXECUTABLE
from edgepose.spec import AIMS, Aim, Backend, Engine, Execution, Precision
from edgepose.storage import atomic_json
from edgepose.timing import harness
from edgepose.timing.messages import Load
from edgepose.timing.pairs import MEASURING, Worker, running_worker
from edgepose.timing.record import BundleArm

Told = Callable[[str, int, int], None]
"""Called with what is measured next, how many settings are done, and how many there are."""

Workers = Callable[..., contextlib.AbstractContextManager[Worker]]
"""Starts a process, as `timing.pairs.running_worker` does."""

_FORMAT = 1
_BATCH = {"latency": 1, "throughput": 8, "memory": 1, "energy": 1}
_ROUNDS = 10
_BLOCK_NS = 30_000_000
_WARM_UP_MS = 300.0
_BETTER = math.log(1.03)  # by which a setting has to be faster than those before it
_TIMEOUT_S = 120.0

_log = logging.getLogger("edgepose")

_Cost = Callable[["Trial"], float]


@dataclass(frozen=True, slots=True)
class Wishes:
    """What engines are to be chosen for.

    Attributes:
        aim: Least time for one person; most people per second in batches of 8; least memory; least energy per person.
        threads: The only number of threads to consider, 0 for all physical cores; None tries one, half and all cores.
        execution: Providers, devices and the rest; None takes what each engine was made for.
    """

    aim: Aim = "latency"
    threads: int | None = None
    execution: Execution | None = None


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine with one number of threads, and what came of it.

    Attributes:
        engine: Its path in the bundle.
        backend: Its runtime.
        precision: Its precision.
        threads: Threads it was given; 0 where only the runtime knows.
        ms: Median milliseconds per call, for throughput and energy per person; None where nothing was timed. Who wants
            one person from an engine of fixed batch waits for the whole batch.
        peak_rss_bytes: Largest resident memory of its process; None where unknown.
        energy_mj: Millijoules per person of the whole processor package; None where not asked for.
        fault: Why it is out; "" for an engine that could serve.
    """

    engine: str
    backend: Backend
    precision: Precision
    threads: int
    ms: float | None = None
    peak_rss_bytes: int | None = None
    energy_mj: float | None = None
    fault: str = ""

    @property
    def text(self) -> str:
        """One line for people: "onnxruntime int8, 2 threads"."""
        threads = {0: "", 1: ", 1 thread"}.get(self.threads, f", {self.threads} threads")
        return f"{self.backend} {self.precision}{threads}"


class Selection(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was measured for a bundle on a machine.

    Attributes:
        aim: What it was measured for.
        trials: The best first, then the others that could serve by their time, then those that are out.
    """

    aim: Aim
    trials: tuple[Trial, ...]

    @property
    def best(self) -> Trial | None:
        """The trial to run; None where none could serve."""
        return self.trials[0] if self.trials and not self.trials[0].fault else None

    @property
    def passed_over(self) -> tuple[str, ...]:
        """Why engines are out altogether, one line each."""
        served = {(trial.engine, trial.backend) for trial in self.trials if not trial.fault}
        out = {(t.engine, t.backend): t.fault for t in self.trials if (t.engine, t.backend) not in served}
        return tuple(out.values())

    @property
    def why(self) -> str:
        """Why it is run, in one line."""
        served = [trial for trial in self.trials if not trial.fault]
        if not served:
            return f"none of {len(self.trials)} settings could serve"
        said = (
            f"best of {len(served)} settings measured for {self.aim}" if len(served) > 1 else "the only one that serves"
        )
        out = f"; {len(self.trials) - len(served)} out" if len(served) < len(self.trials) else ""
        cost, _, name = _COSTS[self.aim]
        if len(served) > 1 and all(math.isfinite(cost(trial)) for trial in served[:2]):
            out = f" ({served[1].text} takes {cost(served[1]) / cost(served[0]):.2f} x the {name})" + out
        return said + out


def preferred(
    bundle: Bundle,
    engines: Sequence[Engine],
    wishes: Wishes,
    told: Told | None = None,
) -> tuple[Selection | None, list[tuple[Engine, int | None]]]:
    """Engines and their threads in the order in which they are to be tried, and what that order was measured by.

    One setting alone needs no measurement. Where none of several could serve, they stay as they are: opening them says
    what is the matter.

    Args:
        bundle: Where the engines lie.
        engines: Those to choose from, in order of preference.
        wishes: What for, and what is settled already.
        told: Told before each setting.

    Raises:
        UsageError: No such aim.
        BackendUnavailable: An aim that this machine cannot measure.
    """
    if wishes.aim not in AIMS:
        raise UsageError("aim", found=repr(wishes.aim), expected=f"{', '.join(AIMS)} or none")
    as_listed: list[tuple[Engine, int | None]] = [(engine, wishes.threads) for engine in engines]
    if sum(len(thread_counts(engine, wishes.threads)) for engine in engines) < 2 or not can_measure():
        return None, as_listed
    selection = select(bundle, engines, wishes, told=told)
    served = [trial for trial in selection.trials if not trial.fault]
    if not served:
        return selection, as_listed
    by_place = {(engine.path, engine.backend): engine for engine in engines}
    best_of = {(trial.engine, trial.backend): trial for trial in reversed(served)}  # each engine's best threads
    order = dict.fromkeys((trial.engine, trial.backend) for trial in served)
    return selection, [(by_place[place], best_of[place].threads) for place in order]


def select(
    bundle: Bundle,
    engines: Sequence[Engine],
    wishes: Wishes,
    *,
    again: bool = False,
    told: Told | None = None,
    workers: Workers = running_worker,
) -> Selection:
    """Measures the settings that engines can be run with, or remembers what was measured.

    Args:
        bundle: Where the engines lie.
        engines: Those to choose from, in order of preference, their runtimes installed.
        wishes: What for, and what is settled already.
        again: Measure whatever is remembered.
        told: Told before each setting.
        workers: Starts the processes.

    Raises:
        BackendUnavailable: The aim is energy, and this machine does not tell how much it uses.
    """
    settings = [Trial(e.path, e.backend, e.precision, n) for e in engines for n in thread_counts(e, wishes.threads)]
    place = _place(bundle, settings, wishes)
    remembered = None if again else _read(place, wishes.aim, settings)
    if remembered is not None:
        return remembered
    if wishes.aim == "energy" and host.energy() is None:
        raise BackendUnavailable(
            "aim energy", found="no readable energy counter (/sys/class/powercap)",
            fix="aim for latency, or give this user the right to read it",
        )  # fmt: skip
    _log.info("measuring %d settings of %s for %s, once on this machine", len(settings), bundle.root, wishes.aim)
    conditions = _Conditions(bundle, wishes, workers)
    selection = Selection(wishes.aim, _contest(settings, conditions, told or _silent))
    if selection.best is not None:
        try:
            atomic_json(place, selection)
        except (StorageError, UsageError) as err:
            _log.warning("%s: what was measured is not remembered, and is measured at every start", err)
    return selection


def can_measure() -> bool:
    """Whether workers can be started: not from a program without an interpreter, nor from within a measurement.

    A frozen program is its own `sys.executable`, and would be started once per setting, to measure in its turn.
    """
    return bool(sys.executable) and not getattr(sys, "frozen", False) and MEASURING not in os.environ


def _time(trial: Trial) -> float:
    return trial.ms or math.inf


def _memory(trial: Trial) -> float:
    return trial.peak_rss_bytes or math.inf


def _energy(trial: Trial) -> float:
    return trial.energy_mj or math.inf


_COSTS: dict[Aim, tuple[_Cost, float, str]] = {
    "latency": (_time, 1.25, "time"), "throughput": (_time, 1.25, "time"),
    "memory": (_memory, 1.03, "memory"), "energy": (_energy, 1.03, "energy"),
}  # fmt: skip
"""What each aim wants little of, how many times the least of it may be as good, and what it is called."""


def thread_counts(engine: Engine, threads: int | None) -> tuple[int, ...]:
    """The numbers of threads that an engine is tried with: all cores first, as a tie goes to the first."""
    if threads is not None:
        return (threads,)
    if engine.backend not in EXECUTABLE:
        return (engine.threads,)
    cores = host.physical_cores()
    wished = (cores, engine.threads or cores, (cores + 1) // 2, 1)
    return tuple(dict.fromkeys(count for count in wished if count <= cores))


def _place(bundle: Bundle, settings: Sequence[Trial], wishes: Wishes) -> Path:
    """Where a selection is remembered: another bundle, machine, runtime or wish has another place."""
    here = host.fingerprint()
    content = [_FORMAT, bundle.digest, here.digest, here.physical_cores, here.governor, settings, wishes]
    key = hashlib.sha256(msgspec.json.encode(content)).hexdigest()
    return host.cache_directory() / "selections" / f"{bundle.digest[:16]}-{key[:24]}.json"


def _read(place: Path, aim: Aim, settings: Sequence[Trial]) -> Selection | None:
    """What is remembered; None for nothing, or for a file that somebody else wrote."""
    try:
        found = msgspec.json.decode(place.read_bytes(), type=Selection)
    except (OSError, msgspec.DecodeError):
        return None
    asked = {(trial.engine, trial.backend, trial.threads) for trial in settings}
    there = {(trial.engine, trial.backend, trial.threads) for trial in found.trials}
    return found if found.aim == aim and there == asked and found.best is not None else None


@dataclass(frozen=True, slots=True)
class _Conditions:
    """What all settings are measured under."""

    bundle: Bundle
    wishes: Wishes
    workers: Workers

    def load(self, trial: Trial, threads: int) -> Load:
        """What a worker is asked to load."""
        arm = BundleArm(
            trial.text, str(self.bundle.root), trial.backend, trial.precision, digest=self.bundle.digest,
            engine=trial.engine, execution=self.wishes.execution, golden=True,
        )  # fmt: skip
        return Load(arm, threads, _BATCH[self.wishes.aim], (480, 640), 0, _WARM_UP_MS)


def _contest(settings: Sequence[Trial], conditions: _Conditions, told: Told) -> tuple[Trial, ...]:
    """All settings with what came of them, the best first."""
    tried = []
    for done, setting in enumerate(settings):
        told(setting.text, done, len(settings) + 1)
        tried.append(_alone(setting, conditions))
    served = [trial for trial in tried if not trial.fault]
    out = [trial for trial in tried if trial.fault]
    if not served:
        return tuple(out)
    cost, clear, name = _COSTS[conditions.wishes.aim]
    least = min(cost(trial) for trial in served)
    close = [trial for trial in served if cost(trial) <= least * clear]  # in the bundle's order
    best = close[0] if name == "time" else min(close, key=_time)
    if name == "time" and len(close) > 1:
        told("the fastest once more, in turns", len(settings), len(settings) + 1)
        try:
            best = close[_quickest(close, conditions)]
        except EdgeposeError as err:  # whatever died has served before, and may again
            _log.warning("%s: %s is chosen without a comparison in turns", err, best.text)
    others = sorted((trial for trial in served if trial is not best), key=cost)
    return (best, *others, *out)


def _alone(setting: Trial, conditions: _Conditions) -> Trial:
    """A setting measured by itself."""
    try:
        with _running(setting, conditions) as runner:
            energy_uj = 0.0
            times_ns = []
            for _ in range(_ROUNDS):
                before = host.energy()
                times_ns.append(runner.block())
                after = host.energy()
                if before is not None and after is not None:
                    energy_uj += host.energy_between_uj(before, after)
            calls = _ROUNDS * (runner.calls + 1)  # one more in each block brings the caches back
            return msgspec.structs.replace(
                setting,
                ms=float(np.median(times_ns)) / 1e6,
                peak_rss_bytes=runner.worker.finish().peak_rss_bytes or None,
                energy_mj=energy_uj / 1e3 / (calls * runner.people) if conditions.wishes.aim == "energy" else None,
            )
    except EdgeposeError as err:
        return msgspec.structs.replace(setting, fault=str(err))


def _quickest(close: Sequence[Trial], conditions: _Conditions) -> int:
    """Which of some settings is fastest when they take turns; the first, unless another one is clearly faster."""
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(_running(trial, conditions)) for trial in close]
        logs = np.zeros((_ROUNDS, len(runners)))
        for row in logs:
            for number in rng.permutation(len(runners)).tolist():
                row[number] = math.log(runners[number].block())
    ratios = np.median(logs - logs[:, :1], axis=0)
    fastest = int(np.argmin(ratios))
    return fastest if ratios[fastest] < -_BETTER else 0


@dataclass(frozen=True, slots=True)
class _Runner:
    """A setting, loaded and warm in its process.

    Attributes:
        worker: The process.
        calls: Calls of a block.
        people: People of a call who count: one where a single one is waited for.
    """

    worker: Worker
    calls: int
    people: int

    def block(self) -> float:
        """Runs a block: median nanoseconds of a call, per person that counts."""
        return float(np.median(self.worker.block(self.calls))) / self.people


@contextlib.contextmanager
def _running(setting: Trial, conditions: _Conditions) -> Iterator[_Runner]:
    threads = setting.threads or host.physical_cores()
    with conditions.workers(setting.text, threads=threads, timeout_s=_TIMEOUT_S) as worker:
        ready = worker.load(conditions.load(setting, threads))
        people = ready.people if conditions.wishes.aim in ("throughput", "energy") else 1
        yield _Runner(worker, harness.calls_per_block(ready.call_ns, _BLOCK_NS), people)


def _silent(_what: str, _done: int, _whole: int) -> None:
    pass
