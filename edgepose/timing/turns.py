"""Comparing several arms in one run: groups of fresh processes, one per arm, that take turns.

Invariant: within a round every arm runs one block, in random order, while the processes of all others are blocked on
their pipes; so any two arms can be compared as if the others had not been there, and by the same statistics as a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from edgepose import host
from edgepose.errors import BadInput
from edgepose.timing.pairs import Group, Progress, measure_groups
from edgepose.timing.record import Arm, LatencyComparison, LatencyProtocol, comparison_of


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
        pairs = [group.pair(base, candidate, self.protocol) for group in self.groups]
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
    groups = measure_groups(arms, protocol, progress, first=first_group)
    return Turns(tuple(arms), protocol, groups, host.fingerprint())
