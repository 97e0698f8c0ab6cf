"""A timer that knows the answer: arms take the times it is told, with log-normal noise of a seed.

Invariant: no clock and no process; equal arguments give equal samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from edgepose.host import fingerprint
from edgepose.timing.pairs import Group
from edgepose.timing.record import Arm, ArmTrace, LatencyProtocol, ModelArm, WorkerFacts, pack
from edgepose.timing.turns import Turns

FACTS = WorkerFacts(1.0, 1.0, 1, 1, 1, 1, 1, 0, 0, "fake")


@dataclass
class FakeTimer:
    """Times arms by their label, or else by their precision.

    Attributes:
        times_ms: Of one call, by label or precision.
        noise: Standard deviation of the logarithm of a round's time, per arm.
        between: The same of a whole group's.
        calls: How many groups were asked for, call by call.
    """

    times_ms: Mapping[str, float]
    noise: float = 0.01
    between: float = 0.0
    calls: list[int] = field(default_factory=list)

    def __call__(self, arms: Sequence[Arm], protocol: LatencyProtocol, *, first_group: int = 0) -> Turns:
        self.calls.append(protocol.pairs)
        names = [self._name(arm) for arm in arms]
        groups = [self._group(names, protocol, first_group + number) for number in range(protocol.pairs)]
        return Turns(tuple(arms), protocol, tuple(groups), fingerprint())

    def _name(self, arm: Arm) -> str:
        return arm.precision if isinstance(arm, ModelArm) and arm.label not in self.times_ms else arm.label

    def _group(self, names: Sequence[str], protocol: LatencyProtocol, number: int) -> Group:
        rng = np.random.default_rng([7, number])
        rounds = protocol.dropped_blocks + protocol.blocks
        traces = []
        for name in names:
            level = self.times_ms[name] * 1e6 * np.exp(self.between * rng.standard_normal())
            calls = level * np.exp(self.noise * rng.standard_normal((rounds, 1))) * np.ones((1, 3))
            traces.append(ArmTrace(pack(calls.astype(np.int64)), FACTS))
        orders = tuple(tuple(rng.permutation(len(names)).tolist()) for _ in range(rounds))
        return Group(orders, tuple(traces))
