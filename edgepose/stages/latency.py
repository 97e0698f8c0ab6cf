"""Aiming at a latency: what a recipe's goal means, how shapes are timed for it, and what came of it in the end.

Invariant: every figure is a ratio of two engines that took turns in one run, each timed once and found again by their
digests, this host's and the target's settings; milliseconds are only ever read beside such a ratio. No torch.

A goal is about the finished form of the network: where the recipe quantises, the pruned network in INT8 against the
unpruned one in INT8, in the runtime that the target prefers. What pruning and quantisation give together, against the
FP32 original in the same runtime, is stated beside it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from edgepose import stats
from edgepose.compress.staircase import Effort, Timing
from edgepose.errors import BackendUnavailable
from edgepose.host import Fingerprint, fingerprint, physical_cores
from edgepose.runtime import installed_backends
from edgepose.spec import Backend, Execution, Precision
from edgepose.stages.assemble import EngineOrder
from edgepose.stages.cache import StageKey, StageResult, run_stage
from edgepose.stages.precisions import Timer
from edgepose.stages.settings import Plan
from edgepose.timing.record import LatencyProtocol, ModelArm, call_times_ms
from edgepose.timing.turns import Turns

EFFORT = Effort(looks=(1, 3, 6), most_shapes=12)
PLAN = "plan.json"
"""The plan of the chosen shape, in the folder of the search."""

Told = Callable[[str, int, int], None]
"""Called with what is timed, the pairs of processes it was seen in, and the pairs that were asked for."""

STAIR_COLUMNS = ("removed", "MMAC", "channels", "ms", "unpruned ms", "speed-up", "95 % bounds", "pairs", "")

_PROTOCOL = LatencyProtocol(pairs=1, blocks=16, dropped_blocks=4, warm_up_ms=300.0)


class Form(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides how fast a shape is, besides the shape: the runtime, and what the network is there.

    Attributes:
        target: Name of the target that is aimed at.
        backend: The runtime it prefers.
        threads: Threads of one inference.
        opset: Of the ONNX file.
        precision: "int8" where the recipe quantises.
        weight_bits: Bits of quantised weights.
        symmetric: Whether activations are quantised symmetrically.
        protected: Modules that stay float.
        batch: People at once, where the target fixes that; 0 leaves it free, and shapes are timed with one.
        execution: How engines of the target are executed.
    """

    target: str
    backend: Backend
    threads: int
    opset: int
    precision: Literal["fp32", "int8"]
    weight_bits: Literal[7, 8] = 8
    symmetric: bool = False
    protected: tuple[str, ...] = ()
    batch: int = 0
    execution: Execution = Execution()

    @property
    def in_float(self) -> Form:
        """The same without quantisation."""
        return msgspec.structs.replace(self, precision="fp32", weight_bits=8, symmetric=False, protected=())


class Stair(msgspec.Struct, frozen=True):
    """A shape that was timed.

    Attributes:
        ratio: Fraction of the multiply-accumulates to remove that led to it.
        macs: Multiply-accumulates that it has.
        macs_left: The same as a share of the unpruned network's.
        channels: Channels of all its prunable groups together.
        kept: Channels of each of them, by name.
        timing: How fast it is.
        chosen: Whether it is the one that was taken.
    """

    ratio: float
    macs: int
    macs_left: float
    channels: int
    kept: dict[str, int]
    timing: Timing
    chosen: bool = False


class Staircase(msgspec.Struct, frozen=True):
    """What a search for a latency saw and decided.

    Attributes:
        asked_speedup: Speed-up over the unpruned network in the same form that was looked for.
        target_latency_ms: The milliseconds that it follows from; None where the recipe gives the speed-up.
        form: What was timed, where.
        cpu: On which processor.
        macs_before: Multiply-accumulates of the unpruned network.
        channels_before: Channels of its prunable groups.
        shapes: Different shapes that pruning could have led to.
        stairs: Those that were timed, from wide to narrow.
        ratio: Fraction of the multiply-accumulates that the chosen one was planned to lose.
        predicted: How fast the chosen one is.
        total: The same against the FP32 original, in the same runtime.
        unpruned: The unpruned network's engine in the same form: a file in the search's folder.
        original: The engine of the FP32 original there; the same file where the form is FP32.
    """

    asked_speedup: float
    target_latency_ms: float | None
    form: Form
    cpu: str
    macs_before: int
    channels_before: int
    shapes: int
    stairs: tuple[Stair, ...]
    ratio: float
    predicted: Timing
    total: Timing
    unpruned: str
    original: str

    @property
    def goal(self) -> str:
        """What was asked for, in words."""
        asked = f"{self.asked_speedup:.2f} x as fast as unpruned"
        return asked if self.target_latency_ms is None else f"{self.target_latency_ms:g} ms, which is {asked}"


class Achieved(msgspec.Struct, frozen=True):
    """What the finished engine does.

    Attributes:
        asked_speedup: As in `Staircase`.
        target_latency_ms: As in `Staircase`.
        predicted: What the search said.
        achieved: The finished engine against the unpruned network in the same form.
        total: The finished engine against the FP32 original, in the same runtime.
        error: By how much the achieved speed-up differs from the one that was asked for, or where milliseconds were
            asked for the achieved milliseconds from those; a share, positive for more.
        precision: Precision of the finished engine.
        text: All of it in one line.
    """

    asked_speedup: float
    target_latency_ms: float | None
    predicted: Timing
    achieved: Timing
    total: Timing
    error: float
    precision: Precision
    text: str


# ------------------------------------------------------------------------------------------------- what is aimed at


def form_of(plan: Plan, orders: Sequence[EngineOrder], opset: int, here: Fingerprint | None = None) -> Form:
    """What the shapes of a recipe are timed as: the finished form, for the first target that can be timed here.

    A target without a GPU is taken for this machine, which nothing in its description contradicts: name targets of
    other machines, a Raspberry Pi say, in a recipe of their own that gives a ratio.

    Args:
        plan: What the recipe asks for.
        orders: Engines of its targets, in order of preference.
        opset: Of the ONNX file.
        here: This machine; None reads it.

    Raises:
        BackendUnavailable: All targets are other machines, or their runtimes are not installed.
    """
    here = here or fingerprint()
    for order in orders:
        if not _elsewhere(order, here):
            quantise = plan.quantise
            threads = order.target.threads or physical_cores()
            batch, execution = order.target.batch, order.target.execution
            form = Form(order.target.name, order.backend, threads, opset, "fp32", batch=batch, execution=execution)
            if quantise is None:
                return form
            symmetric, protected = quantise.symmetric, quantise.protected
            return msgspec.structs.replace(
                form, precision="int8", weight_bits=order.weight_bits, symmetric=symmetric, protected=protected
            )
    raise BackendUnavailable(
        "prune: the latency that is aimed at",
        found="; ".join(f"{order.target.name} in {order.backend}: {_elsewhere(order, here)}" for order in orders),
        expected="a target whose engines can be timed on this machine",
        fix="compile on the device itself, add --target this-cpu, or give a ratio instead",
    )


def _elsewhere(order: EngineOrder, here: Fingerprint) -> str:
    """Why an engine cannot be timed here; empty if it can."""
    if order.target.compute_capability and not here.gpus:
        return f"for a GPU of compute capability {order.target.compute_capability}, and there is none here"
    return "" if order.backend in installed_backends() else "not installed here"


def of_order(form: Form, order: EngineOrder) -> bool:
    """Whether an engine is the one that was aimed at."""
    return (order.target.name, order.backend) == (form.target, form.backend)


# -------------------------------------------------------------------------------------------------------- the stopwatch


class _Rounds(msgspec.Struct, frozen=True):
    """One pair of fresh processes: log(shape / base) of its rounds, and the median call of each side."""

    log_ratios: tuple[float, ...]
    base_ms: float
    shape_ms: float


@dataclass(frozen=True, slots=True)
class Contender:
    """An engine to be timed.

    Attributes:
        label: What it is called.
        key: Digest of what it was built from.
        file: The file to load.
        precision: Arithmetic of what it does not quantise.
    """

    label: str
    key: str
    file: Path
    precision: Precision

    @classmethod
    def of(cls, label: str, built: StageResult) -> Contender:
        """What a stage that builds engines left."""
        return cls(label, built.key, built.path / built.report["main"], built.report["precision"])


@dataclass(frozen=True, slots=True)
class Stopwatch:
    """Times engines against a base, in pairs of fresh processes that take turns; what was timed before is found.

    Attributes:
        form: Runtime and threads.
        timer: Times arms in turns.
        told: Told before and after every look.
    """

    form: Form
    timer: Timer
    told: Told

    def time(self, base: Contender, shape: Contender, pairs: int) -> Timing:
        """How fast `shape` is beside `base`, from at least so many pairs."""
        rounds: list[_Rounds] = []
        while len(rounds) < pairs:
            more = next((look for look in EFFORT.looks if look > len(rounds)), pairs) - len(rounds)
            self.told(shape.label, len(rounds), max(pairs, len(rounds) + more))
            rounds += self._look(base, shape, len(rounds), more)
            self.told(shape.label, len(rounds), max(pairs, len(rounds)))
        return _timing(rounds)

    def _look(self, base: Contender, shape: Contender, first: int, pairs: int) -> list[_Rounds]:
        form = self.form
        protocol = msgspec.structs.replace(_PROTOCOL, pairs=pairs, threads=form.threads, batch=form.batch or 1)
        inputs = {"base": base.key, "shape": shape.key, "host": fingerprint().digest}
        settings = {
            "target": form.target, "backend": form.backend, "protocol": protocol, "first": first,
            "execution": form.execution,
        }  # fmt: skip
        key = StageKey("timing", inputs, settings, (form.backend,))

        def work(_folder: Path) -> dict[str, Any]:
            arms = [
                ModelArm(arm.label, str(arm.file), form.backend, arm.precision, form.execution) for arm in (base, shape)
            ]
            return {"rounds": msgspec.to_builtins(_rounds(self.timer(arms, protocol, first_group=first)))}

        return msgspec.convert(run_stage(key, work).report["rounds"], list[_Rounds])


def _rounds(turns: Turns) -> list[_Rounds]:
    found = turns.between(0, 1)
    return [
        _Rounds(pair.log_ratios, *(float(np.median(call_times_ms(t, found.protocol))) for t in (pair.a, pair.b)))
        for pair in found.pairs
    ]


def _timing(rounds: Sequence[_Rounds]) -> Timing:
    ratios = [np.array(pair.log_ratios) for pair in rounds]
    middle = stats.median_of_medians(ratios)
    interval = stats.ratio_interval(stats.ratio_draws(ratios, seed=_PROTOCOL.seed), middle, alpha=0.025)
    return Timing(
        speedup=1 / interval.estimate,
        low=1 / interval.high,
        high=1 / interval.low,
        pairs=len(rounds),
        ms=float(np.median([pair.shape_ms for pair in rounds])),
        unpruned_ms=float(np.median([pair.base_ms for pair in rounds])),
    )


# ------------------------------------------------------------------------------------------------------------- the end


def keep_engine(built: StageResult, name: str, folder: Path) -> str:
    """Copy an engine beside what a search found, as `name`; returns its main file, relative to `folder`."""
    shutil.copytree(built.path, folder / name)
    return f"{name}/{built.report['main']}"


def measure_achieved(search: StageResult, finished: StageResult, timer: Timer, told: Told) -> Achieved:
    """Time the finished engine against the unpruned network in the same form, and against the FP32 original.

    Args:
        search: The search that it follows from.
        finished: The engine's stage.
        timer: Times arms in turns.
        told: As for `Stopwatch`.
    """
    staircase = staircase_of(search.report)
    form, pairs = staircase.form, EFFORT.looks[-1]
    watch, engine = Stopwatch(form, timer, told), Contender.of("the finished engine", finished)
    unpruned = Contender("unpruned", f"{search.key} unpruned", search.path / staircase.unpruned, form.precision)
    achieved = total = watch.time(unpruned, engine, pairs)
    if staircase.original != staircase.unpruned:
        original = Contender("FP32 original", f"{search.key} original", search.path / staircase.original, "fp32")
        total = watch.time(original, engine, pairs)
    asked, target_ms = staircase.asked_speedup, staircase.target_latency_ms
    error = achieved.speedup / asked - 1 if target_ms is None else achieved.ms / target_ms - 1
    goal = f"{asked:.2f} x" if target_ms is None else f"{target_ms:g} ms"
    text = (
        f"asked for {goal}: predicted {_said(staircase.predicted, target_ms)}, achieved {_said(achieved, target_ms)}, "
        f"{100 * error:+.1f} %; {total.speedup:.2f} x the FP32 original, in {form.backend}"
    )
    if engine.precision != form.precision:
        text += f"; the engine that was kept is {engine.precision}, shapes were timed in {form.precision}"
    return Achieved(asked, target_ms, staircase.predicted, achieved, total, error, engine.precision, text)


def _said(timing: Timing, target_ms: float | None) -> str:
    bounds = f"{timing.speedup:.2f} x ({timing.low:.2f} to {timing.high:.2f})"
    return bounds if target_ms is None else f"{timing.ms:.3f} ms, {bounds}"


def staircase_of(report: dict[str, Any]) -> Staircase:
    """A search's report as it was."""
    return msgspec.convert(report, Staircase)


def stair_rows(staircase: Staircase) -> list[tuple[str, ...]]:
    """The staircase for printing under `STAIR_COLUMNS`, the unpruned network first."""
    first = (
        "0.0 %",
        f"{staircase.macs_before / 1e6:.1f}",
        str(staircase.channels_before),
        "",
        "",
        "1.00 x",
        "",
        "",
        "",
    )
    return [first, *(_stair_row(stair) for stair in staircase.stairs)]


def _stair_row(stair: Stair) -> tuple[str, ...]:
    timing = stair.timing
    return (
        f"{1 - stair.macs_left:.1%}".replace("%", " %"),
        f"{stair.macs / 1e6:.1f}",
        str(stair.channels),
        f"{timing.ms:.3f}",
        f"{timing.unpruned_ms:.3f}",
        f"{timing.speedup:.2f} x",
        f"{timing.low:.2f} to {timing.high:.2f}",
        str(timing.pairs),
        "taken" if stair.chosen else "",
    )
