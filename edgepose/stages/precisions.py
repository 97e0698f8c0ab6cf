"""Which precision of an engine is kept: those that may be had are built, timed in turns, and the fastest wins.

Invariant: a less accurate precision is kept only where it was shown to be faster; where the timing does not tell, the
more accurate one stays. Ratios of one run decide, never milliseconds of two.

The rule. Candidates are ordered FP32, BF16, INT8. The first one is kept until a later one takes, with its upper bound,
less than 98 % of the time of whatever is kept by then. While a bound leaves that open, the sample doubles (3, 6, 12
groups of processes, each look with a third of the error); what is still open then counts as not faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import msgspec
import numpy as np

from edgepose import stats
from edgepose.errors import BackendUnavailable, UsageError
from edgepose.host import Fingerprint, fingerprint, physical_cores
from edgepose.spec import Backend, Precision, Target
from edgepose.stages.assemble import EngineOrder, Work
from edgepose.stages.cache import StageKey, StageResult
from edgepose.timing.record import Arm, LatencyComparison, LatencyProtocol, ModelArm
from edgepose.timing.turns import Turns, time_in_turns

Wanted = tuple[Precision, ...] | Literal["auto"] | None
"""A recipe's `precisions`."""

BY_ACCURACY: tuple[Precision, ...] = ("fp32", "bf16", "fp16", "int8")
LEAST_GAIN = 0.02
"""Share of the time that a less accurate precision has to save, as `fail_above` of the default gate."""

_LOOKS = (3, 6, 12)
_ALPHA = 0.025 / len(_LOOKS)
_PROTOCOL = LatencyProtocol(pairs=_LOOKS[0], blocks=20, dropped_blocks=5, warm_up_ms=300.0)
_BF16_FLAGS = ("avx512_bf16", "amx_bf16")


class Timer(Protocol):
    """Times arms in turns, as `edgepose.timing.turns.time_in_turns`."""

    def __call__(self, arms: Sequence[Arm], protocol: LatencyProtocol, *, first_group: int) -> Turns:
        """Times `protocol.pairs` groups."""
        ...


@dataclass(frozen=True, slots=True)
class Contest:
    """One place in a bundle and the engines that compete for it.

    Attributes:
        order: The place: target, backend, weight bits.
        compared: Whether the recipe asks for anything but the network's own precision.
        candidates: What is to be built, the most accurate first.
        absent: Precisions that were asked for and cannot be had, and why.
    """

    order: EngineOrder
    compared: bool
    candidates: tuple[EngineOrder, ...]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> tuple[str, ...]:
        """Names of the stages that settle it."""
        built = tuple(candidate.stage for candidate in self.candidates)
        return (*built, self.timing_stage) if len(built) > 1 else built

    @property
    def timing_stage(self) -> str:
        """Name of the stage that times the candidates."""
        return f"precision-{self.order.backend}"


def contests(orders: Sequence[EngineOrder], wanted: Wanted, own: Precision) -> tuple[Contest, ...]:
    """What is to be built for each place.

    Args:
        orders: The places.
        wanted: The recipe's precisions; None takes the network's own.
        own: What the network was made for: "int8" where it is quantised, else "fp32".

    Raises:
        UsageError: A precision that the target does not run or the network does not have.
        BackendUnavailable: Nothing of what is wanted can be had for a place.
    """
    return tuple(_contest(order, wanted, own, fingerprint()) for order in orders)


def settle(
    contest: Contest,
    build: Callable[[EngineOrder], StageResult],
    run: Callable[[StageKey, Work], StageResult],
    timer: Timer = time_in_turns,
) -> tuple[EngineOrder, StageResult]:
    """Build the candidates of a place, time them, and keep one.

    Args:
        contest: The place.
        build: Builds an engine, or finds it.
        run: Runs the timing as a stage, or finds its result.
        timer: Times engines.

    Returns:
        The engine that is kept. Where precisions were compared, its report has "precisions": which one was kept and
        why, the figures of the others, and what could not be had.
    """
    built = [(order, build(order)) for order in contest.candidates]
    if not contest.compared:
        return built[0]
    able = [(order, result) for order, result in built if "refused" not in result.report]
    if not able:
        raise BackendUnavailable(
            f"target {contest.order.target.name}: {contest.order.backend}",
            found="; ".join(result.report["refused"] for _, result in built),
            expected="an engine that answers as the network does",
            fix="add fp32 to the recipe's precisions",
        )
    report: dict[str, Any] = {"kept": _precision(able[0][1]), "text": f"{_precision(able[0][1])}, the only one"}
    place = 0
    if len(able) > 1:
        engines = [result for _, result in able]
        report = run(_timing_key(contest, engines), lambda _: _timed(contest, engines, timer)).report
        place = [_precision(result) for result in engines].index(report["kept"])
    refused: dict[str, str] = {_precision(r): r.report["refused"] for _, r in built if "refused" in r.report}
    order, kept = able[place]
    report = {**report, "absent": {**contest.absent, **refused}}
    return order, msgspec.structs.replace(kept, report={**kept.report, "precisions": report})


# ------------------------------------------------------------------------------------------------------ who takes part


def _contest(order: EngineOrder, wanted: Wanted, own: Precision, here: Fingerprint) -> Contest:
    if wanted is None:
        return Contest(order, compared=False, candidates=(order,))
    named = order.target.precisions if wanted == "auto" else wanted
    if wanted != "auto":
        _check_named(order.target, named, own)
    reasons = {precision: _absence(precision, order.backend, own, here) for precision in named}
    able = sorted((p for p in named if not reasons[p]), key=BY_ACCURACY.index)
    absent: dict[str, str] = {precision: reason for precision, reason in reasons.items() if reason}
    if not able:
        raise BackendUnavailable(
            f"target {order.target.name}: {order.backend}",
            found="; ".join(f"no {precision}: {reason}" for precision, reason in absent.items()) or "no precisions",
            expected="at least one of the recipe's precisions",
            fix=f"add {own} to the recipe's precisions",
        )
    candidates = tuple(replace(order, precision=None if precision == own else precision) for precision in able)
    return Contest(order, compared=True, candidates=candidates, absent=absent)


def _check_named(target: Target, named: Sequence[Precision], own: Precision) -> None:
    for precision in named:
        if precision not in target.precisions:
            raise UsageError(
                f"recipe: precisions: {precision}",
                found=f"target {target.name}, which runs {', '.join(target.precisions)}",
                expected="precisions that every target runs",
                fix="leave it out, or write precisions: auto",
            )
    if "int8" in named and own != "int8":
        raise UsageError(
            "recipe: precisions: int8", found="a network that is not quantised", expected="a quantise stage",
            fix="add quantise to the recipe, or leave int8 out",
        )  # fmt: skip


def _absence(precision: Precision, backend: Backend, own: Precision, here: Fingerprint) -> str:
    """Why an engine of this precision cannot be had; empty if it can."""
    match precision:
        case "fp32":
            return ""
        case "int8":
            return "" if own == "int8" else "the network is not quantised"
        case "bf16" if backend == "onnxruntime":
            return "ONNX Runtime has no BF16 kernels on CPUs"
        case "bf16":
            offered = any(flag in here.flags for flag in _BF16_FLAGS)
            return "" if offered else f"this processor has neither {' nor '.join(_BF16_FLAGS)}"
        case "fp16":
            return "FP16 engines are built for GPUs only"


# ---------------------------------------------------------------------------------------------------------- the timing


def _precision(result: StageResult) -> Precision:
    found: Precision = result.report["precision"]
    return found


def _timing_key(contest: Contest, engines: Sequence[StageResult]) -> StageKey:
    inputs: dict[str, str] = {_precision(engine): engine.key for engine in engines}
    rule: dict[str, Any] = {
        "protocol": _protocol(contest),
        "execution": contest.order.target.execution,
        "looks": _LOOKS,
        "least_gain": LEAST_GAIN,
    }
    return StageKey(contest.timing_stage, {**inputs, "host": fingerprint().digest}, rule, (contest.order.backend,))


def _protocol(contest: Contest) -> LatencyProtocol:
    target = contest.order.target
    return msgspec.structs.replace(_PROTOCOL, threads=target.threads or physical_cores(), batch=target.batch or 1)


def _timed(contest: Contest, engines: Sequence[StageResult], timer: Timer) -> dict[str, Any]:
    """Times engines, the most accurate first, until they tell which one to keep; the report of the stage."""
    names = [_precision(engine) for engine in engines]
    protocol = _protocol(contest)
    backend, target = contest.order.backend, contest.order.target
    arms = [
        ModelArm(f"{name} in {backend}", str(engine.path / engine.report["main"]), backend, name, target.execution)
        for name, engine in zip(names, engines, strict=True)
    ]
    turns = timer(arms, protocol, first_group=0)
    kept, undecided = decide(turns)
    for groups in np.diff(_LOOKS).tolist():
        if not undecided:
            break
        more = msgspec.structs.replace(protocol, pairs=groups)
        turns = turns.followed_by(timer(arms, more, first_group=len(turns.groups)))
        kept, undecided = decide(turns)
    return {
        "kept": names[kept],
        "text": _text(turns, names, kept, undecided),
        "compared": [_row(turns, number, kept, engine) for number, engine in enumerate(engines)],
        "threads": protocol.threads,
        "groups": len(turns.groups),
        "protocol": msgspec.to_builtins(turns.protocol),
        "load_average": [group.load_average for group in turns.groups],
    }


def decide(turns: Turns) -> tuple[int, tuple[int, ...]]:
    """Which of several arms to keep, the most accurate first.

    Returns:
        The number of the arm, and those of the arms that may yet turn out to be faster than what they were held
        against, unless the arm that is kept would be kept all the same.
    """
    kept, undecided = 0, []
    for challenger in range(1, len(turns.arms)):
        low, high = _bounds(turns.between(kept, challenger))
        if high < 1 - LEAST_GAIN:
            kept = challenger
        elif low < 1 - LEAST_GAIN:
            undecided.append(challenger)
    return kept, tuple(arm for arm in undecided if arm > kept or not _beaten(turns, arm, kept))


def _beaten(turns: Turns, arm: int, later: int) -> bool:
    """Whether an arm, had it been kept, would have lost its place to a later one."""
    return _bounds(turns.between(arm, later))[1] < 1 - LEAST_GAIN


def _bounds(found: LatencyComparison) -> tuple[float, float]:
    """Bounds of a ratio, each wrong with probability 0.025 over all looks together."""
    pairs = found.log_ratios()
    draws = stats.ratio_draws(pairs, seed=found.protocol.seed)
    interval = stats.ratio_interval(draws, stats.median_of_medians(pairs), alpha=_ALPHA)
    return interval.low, interval.high


def _row(turns: Turns, number: int, kept: int, engine: StageResult) -> dict[str, Any]:
    """One engine's figures: its time over that of the most accurate engine and over that of the one that is kept."""
    row: dict[str, Any] = {
        "precision": _precision(engine),
        "bytes": sum(file.stat().st_size for file in engine.files.values()),
        "shift_px": engine.report["shift"]["median_px"],
        "int8_share": engine.report.get("int8_share", 0.0),
    }
    for name, other in (("first", 0), ("kept", kept)):
        if other != number:
            found = turns.between(other, number)
            row[f"ratio_to_{name}"] = found.ratio
            row[f"ci95_to_{name}"] = list(found.ci95)
            row[f"spread_to_{name}"] = found.pair_spread
            row[f"by_group_to_{name}"] = [float(np.exp(np.median(r))) for r in found.log_ratios()]
    return row


def _text(turns: Turns, names: Sequence[Precision], kept: int, undecided: Sequence[int]) -> str:
    """Why, in one line."""
    parts = []
    for number, name in enumerate(names):
        if number == kept:
            continue
        found = turns.between(kept, number)
        low, high = _bounds(found)
        parts.append(f"{name} takes {found.ratio:.2f} x its time ({low:.2f} to {high:.2f})")
    text = f"{names[kept]} is kept: {', '.join(parts)}"
    if undecided:
        text += f"; too noisy to tell whether {', '.join(names[number] for number in undecided)} would be faster"
        text += " (this timing is kept: to repeat it, compile with another EDGEPOSE_CACHE)"
    return text
