"""Simulated measurements: process pairs with the tails of a shared machine, and predictions with known losses."""

from __future__ import annotations

import math
from functools import cache

import msgspec
import numpy as np

from edgepose.host import Fingerprint, fingerprint
from edgepose.profiler.accuracy import AccuracyRecord
from edgepose.spec import Keypoints
from edgepose.timing.record import (
    ArmTrace,
    CallableArm,
    LatencyComparison,
    LatencyProtocol,
    PairTrace,
    Samples,
    WorkerFacts,
    comparison_of,
    pack,
)

ARMS = (CallableArm("before", "simulated:before"), CallableArm("after", "simulated:after"))
PROTOCOL = LatencyProtocol(pairs=6, blocks=40, dropped_blocks=0, threads=1)

LIMBS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
KEYPOINTS = Keypoints((*(f"{side}_{limb}" for limb in LIMBS for side in ("left", "right")), "neck", "head_top"))


@cache
def host() -> Fingerprint:
    return fingerprint()


@cache
def _empty_trace() -> ArmTrace:
    return ArmTrace(pack(np.full((40, 3), 5_000_000)), worker_facts())


def worker_facts(peak_rss_bytes: int = 80_000_000) -> WorkerFacts:
    return WorkerFacts(
        load_ms=300.0,
        first_call_ms=9.0,
        threads=1,
        peak_rss_bytes=peak_rss_bytes,
        steady_rss_bytes=70_000_000,
        cpu_ns=900,
        wall_ns=1000,
        page_faults=0,
        preemptions=3,
    )


class Machine:
    """Stands in for timing: log-ratios with Student tails inside a pair and a level of its own per pair.

    Args:
        slow_down: True ratio minus one.
        seed: Of the machine's moods.
        spread: Scale of the rounds.
        between: Standard deviation between pairs.
        shift_after: Pairs from this number on are `shift` slower, as if something had changed meanwhile.
        shift: See above.
    """

    def __init__(
        self,
        slow_down: float,
        seed: int,
        *,
        spread: float = 0.03,
        between: float = 0.002,
        shift_after: int = 10**6,
        shift: float = 0.0,
    ) -> None:
        self.level = math.log1p(slow_down)
        self.seed, self.spread, self.between = seed, spread, between
        self.shift_after, self.shift = shift_after, shift
        self.asked: list[tuple[int, int]] = []

    def __call__(self, first: int, count: int) -> LatencyComparison:
        self.asked.append((first, count))
        pairs = [self._pair(number) for number in range(first, first + count)]
        protocol = msgspec.structs.replace(PROTOCOL, pairs=count, seed=self.seed)
        return comparison_of(ARMS, protocol, pairs, host())

    def _pair(self, number: int) -> PairTrace:
        rng = np.random.default_rng([self.seed, number])
        level = self.level + rng.normal(0, self.between) + (self.shift if number >= self.shift_after else 0.0)
        rounds = level + self.spread * rng.standard_t(1.7, PROTOCOL.blocks)
        return PairTrace("AB" * 20, tuple(rounds.tolist()), _empty_trace(), _empty_trace())


def samples_of(values: np.ndarray) -> Samples:
    return pack(values)


def record(
    persons: int, *, seed: int = 0, lost: float = 0.0, gained: float = 0.0, joint: str = "", lost_seed: int = 1
) -> AccuracyRecord:
    """Predictions for people with a torso of 100 px; a right joint errs by 5 px and a wrong one by 90 px.

    Args:
        persons: People.
        seed: Decides which joints are labelled, and right before anything is lost.
        lost: Share of right joints that become wrong.
        gained: Share of wrong joints that become right.
        joint: Only this joint loses.
        lost_seed: Decides which.
    """
    rng, change = np.random.default_rng(seed), np.random.default_rng(lost_seed)
    shape = (persons, KEYPOINTS.count)
    right, labelled = rng.random(shape) < 0.55, rng.random(shape) < 0.95
    labelled[:, [0, 7]] = True  # the torso: left shoulder and right hip
    may_lose = np.array([not joint or name == joint for name in KEYPOINTS.names])
    dice = change.random(shape)
    now = np.where(right, ~((dice < lost) & may_lose), dice < gained)
    errors = np.where(labelled, np.where(now, 5.0, 90.0), np.nan)
    visibility = np.where(labelled, 2, 0)
    predicted = np.zeros((*shape, 2))
    return AccuracyRecord(
        dataset=f"simulated-{persons}-{seed}",
        backend="simulated",
        image_id=np.arange(persons),
        annotation_id=np.arange(persons) + 1000,
        boxes=np.tile([0.0, 0.0, 100.0, 200.0], (persons, 1)),
        predicted=predicted,
        scores=np.ones(shape),
        visibility=visibility,
        errors_px=errors,
        torso_px=np.full(persons, 100.0),
        extent_px=np.full(persons, 300.0),
        area_px2=np.full(persons, 1e4),
    )
