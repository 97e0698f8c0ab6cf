"""How long a finished engine takes on this machine: a line in the report of its stage, not a comparison.

Invariant: it is timed in a process of its own, as its target has it run; an engine that cannot run here is not timed,
and the report says so by having no figure.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgepose.host import physical_cores
from edgepose.stages.assemble import EngineOrder
from edgepose.timing.pairs import measure_groups
from edgepose.timing.record import LatencyProtocol, ModelArm, call_times_ms

EngineTimer = Callable[[ModelArm, LatencyProtocol], "Latency"]

_PROTOCOL = LatencyProtocol(pairs=1, blocks=12, dropped_blocks=3, warm_up_ms=300.0)


class Latency(msgspec.Struct, frozen=True):
    """One inference, in milliseconds; absolute times are of this machine in this hour.

    Attributes:
        median_ms: Half of the calls are faster.
        p10_ms: A tenth is.
        p90_ms: Nine tenths are.
        calls: How many were timed.
        threads: Of one inference.
        batch: Inferred at once.
    """

    median_ms: float
    p10_ms: float
    p90_ms: float
    calls: int
    threads: int
    batch: int


def time_engine(arm: ModelArm, protocol: LatencyProtocol) -> Latency:
    """Times an engine.

    Args:
        arm: The engine.
        protocol: How.

    Raises:
        EnvironmentFault: The process died or hung.
        EdgeposeError: Whatever loading the engine raised.
    """
    (group,) = measure_groups((arm,), protocol, None, first=0)
    times = call_times_ms(group.traces[0], protocol)
    low, middle, high = np.quantile(times, [0.1, 0.5, 0.9]).tolist()
    return Latency(middle, low, high, len(times), protocol.threads, protocol.batch)


def timed(order: EngineOrder, folder: Path, report: dict[str, Any], timer: EngineTimer = time_engine) -> dict[str, Any]:
    """The report of an engine that was just built, with its latency where it runs here.

    Args:
        order: What was to be built.
        folder: Where it lies.
        report: Of building it.
        timer: Times it.

    Raises:
        EdgeposeError: As `time_engine`.
    """
    if order.is_tensorrt and not str(report.get("checked", "")).startswith("the engine"):
        return report
    target, precision = order.target, report["precision"]
    arm = ModelArm(order.stage, str(folder / report["main"]), order.backend, precision, target.execution)
    threads = target.threads or physical_cores()
    protocol = msgspec.structs.replace(_PROTOCOL, threads=threads, batch=target.batch or 1)
    return {**report, "latency": msgspec.to_builtins(timer(arm, protocol))}
