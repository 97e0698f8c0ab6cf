"""Comparing several arms in one run: groups of fresh processes, one per arm, that take turns.

Invariant: within a round every arm runs one block, in random order, while the processes of all others are blocked on
their pipes; so any two arms can be compared as if the others had not been there, and by the same statistics as a pair.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose import host
from edgepose.errors import BadInput
from edgepose.profiler import harness
from edgepose.profiler.messages import Load
from edgepose.profiler.pairs import Progress, Worker, load_average, running_worker
from edgepose.profiler.record import (
    Arm,
    ArmTrace,
    LatencyComparison,
    LatencyProtocol,
    PairTrace,
    comparison_of,
    pack,
)

_FRAME_HW = (480, 640)  # of the synthetic frame, where a bundle's arm is timed by whole frames; as in pairs


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


@dataclass(frozen=True, slots=True)
class Turns:
    """Several arms, timed in the same rounds.

    Attributes:
        arms: What was timed.
        protocol: How; `pairs` is the number of groups.
        groups: The raw samples.
        host: Where.
    """

    arms: tuple[Arm, ...]
    protocol: LatencyProtocol
    groups: tuple[Group, ...]
    host: host.Fingerprint

    def between(self, base: int, candidate: int) -> LatencyComparison:
        """Arm `candidate` against arm `base`, by number, from the rounds that they shared."""
        pairs = [self._pair(group, base, candidate) for group in self.groups]
        return comparison_of((self.arms[base], self.arms[candidate]), self.protocol, pairs, self.host)

    def followed_by(self, later: Turns) -> Turns:
        """Both measurements' groups as one sample.

        Raises:
            BadInput: They differ in arms, protocol (the number of groups aside) or host, and must not be mixed.
        """
        protocol = msgspec.structs.replace(later.protocol, pairs=self.protocol.pairs)
        if (self.arms, self.protocol, self.host.digest) != (later.arms, protocol, later.host.digest):
            raise BadInput(
                "latency of several arms", found="samples of different arms, protocols or hosts",
                expected="the same for all", fix="measure again on one host",
            )  # fmt: skip
        groups = self.groups + later.groups
        return Turns(self.arms, msgspec.structs.replace(self.protocol, pairs=len(groups)), groups, self.host)

    def _pair(self, group: Group, base: int, candidate: int) -> PairTrace:
        a, b = group.traces[base], group.traces[candidate]
        slow, quick = (np.median(trace.calls_ns.array(), axis=1) for trace in (a, b))
        ratios = np.log(quick / slow)[self.protocol.dropped_blocks :]
        order = "".join("A" if order.index(base) < order.index(candidate) else "B" for order in group.orders)
        return PairTrace(order, tuple(ratios.tolist()), a, b, group.load_average)


def time_in_turns(
    arms: Sequence[Arm],
    protocol: LatencyProtocol | None = None,
    progress: Progress | None = None,
    *,
    first_group: int = 0,
) -> Turns:
    """Times several arms in the same rounds.

    Args:
        arms: What to time, two at least.
        protocol: How, `pairs` being the number of groups of processes; None takes the defaults.
        progress: Told after every round.
        first_group: Number of the first group, so that groups measured later get random orders of their own.

    Raises:
        BadInput: Fewer than two arms.
        EnvironmentFault: A worker died, hung or could not be started.
        EdgeposeError: Whatever loading or running an arm raised.
    """
    if len(arms) < 2:
        raise BadInput("latency of several arms", found=f"{len(arms)} arms", expected="two or more to compare")
    protocol = protocol or LatencyProtocol()
    rounds = protocol.dropped_blocks + protocol.blocks
    groups = []
    for number in range(protocol.pairs):

        def report(done: int, before: int = number * rounds) -> None:
            if progress is not None:
                progress(before + done, protocol.pairs * rounds)

        groups.append(_measure_group(tuple(arms), protocol, first_group + number, report))
    return Turns(tuple(arms), protocol, tuple(groups), host.fingerprint())


def _measure_group(
    arms: tuple[Arm, ...], protocol: LatencyProtocol, number: int, report: Callable[[int], None]
) -> Group:
    rng = np.random.default_rng([protocol.seed, number])
    threads = protocol.threads or host.physical_cores()
    with contextlib.ExitStack() as stack:
        workers: dict[int, Worker] = {}
        calls: dict[int, int] = {}
        for arm in rng.permutation(len(arms)).tolist():
            worker = running_worker(arms[arm].label, threads=threads, timeout_s=protocol.timeout_s)
            workers[arm] = stack.enter_context(worker)
            ready = workers[arm].load(
                Load(arms[arm], threads, protocol.batch, _FRAME_HW, protocol.seed, protocol.warm_up_ms)
            )
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
