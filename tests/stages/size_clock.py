"""A clock that goes by what is in an engine file: built for real, timed without a processor.

Invariant: equal files take equal times, but for noise of a seed; no clock and no process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx

from edgepose.host import fingerprint
from edgepose.timing.pairs import Group
from edgepose.timing.record import Arm, ArmTrace, LatencyProtocol, ModelArm, pack
from edgepose.timing.turns import Turns
from tests.timing.fake_turns import FACTS


def weights_of(file: str) -> int:
    """Numbers that an ONNX file holds: what the clock of these tests goes by."""
    graph = onnx.load(file).graph
    return sum(math.prod(tensor.dims) for tensor in graph.initializer if len(tensor.dims) > 1)


@dataclass
class SizeClock:
    """Times engines by what is in them: in 32 steps, a tenth of it whatever the size, on a noisy machine.

    Attributes:
        whole: Weights of the network that takes 1 ms in FP32, and a third of that in INT8.
        noise: Spread of the groups of processes.
        seen: Pairs that were asked for, by call.
        fails_after: Calls that succeed before one is interrupted.
    """

    whole: int
    noise: float = 0.01
    seen: list[int] = field(default_factory=list)
    fails_after: int = 1 << 30

    def ms(self, arm: Arm) -> float:
        assert isinstance(arm, ModelArm)
        steps = math.ceil(32 * weights_of(arm.path) / self.whole)
        return (0.1 + 0.9 * steps / 32) * (1 / 3 if arm.precision == "int8" else 1)

    def __call__(self, arms: Sequence[Arm], protocol: LatencyProtocol, *, first_group: int = 0) -> Turns:
        if len(self.seen) == self.fails_after:
            raise KeyboardInterrupt
        self.seen.append(protocol.pairs)
        groups = [self._group(arms, protocol, first_group + number) for number in range(protocol.pairs)]
        return Turns(tuple(arms), protocol, tuple(groups), fingerprint())

    def _group(self, arms: Sequence[Arm], protocol: LatencyProtocol, number: int) -> Group:
        rounds = protocol.dropped_blocks + protocol.blocks
        rng = np.random.default_rng([number, weights_of(arms[-1].path)])  # type: ignore[union-attr]
        levels = [self.ms(arm) * 1e6 * math.exp(self.noise * rng.standard_normal()) for arm in arms]
        traces = tuple(ArmTrace(pack(np.full((rounds, 2), int(level))), FACTS) for level in levels)
        return Group(tuple((0, 1) for _ in range(rounds)), traces)
