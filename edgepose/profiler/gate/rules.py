"""The gate's rules, as the files of profiles/gates hold them: what counts as worse, by how much, and how surely.

Invariant: a rules object is complete: every threshold that decides a verdict is written in it, and none in the code.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgepose.errors import RecipeError
from edgepose.pose.metrics import METRICS
from edgepose.profiler.facts import FACTS, FAMILIES, known_fact
from edgepose.profiles import find_profile
from edgepose.strict_yaml import read_yaml
from edgepose.timing.record import LatencyProtocol

Points = Annotated[float, msgspec.Meta(ge=0, le=100)]
Share = Annotated[float, msgspec.Meta(ge=0)]
Alpha = Annotated[float, msgspec.Meta(gt=0, lt=0.5)]
Looks = Annotated[tuple[Annotated[int, msgspec.Meta(ge=1)], ...], msgspec.Meta(min_length=1)]


class AccuracyRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One accuracy metric, compared over the same persons; everything in points (hundredths of the metric).

    Attributes:
        metric: Any metric of the data set that is a share of joints.
        fail_above_points: FAIL when the lower bound of the loss is above this.
        pass_below_points: PASS when the upper bound of the loss is below this, or below the detectable loss if larger.
        widest_pass_points: The PASS margin never grows beyond this; data that would need more is inconclusive.
        alpha: Each bound is wrong with at most this probability.
        power: With which probability a loss of the detectable size ends in FAIL.
        least_persons: Fewer persons are inconclusive.
        draws: Bootstrap replicates.
    """

    metric: str = "pck_torso_0.2"
    fail_above_points: Points = 0.1
    pass_below_points: Points = 0.5
    widest_pass_points: Points = 5.0
    alpha: Alpha = 0.005
    power: Annotated[float, msgspec.Meta(ge=0.5, lt=1)] = 0.9
    least_persons: Annotated[int, msgspec.Meta(ge=2)] = 20
    draws: Annotated[int, msgspec.Meta(ge=1000)] = 10_000


class LatencyRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The time of the candidate over that of the baseline, in pairs of fresh processes.

    Attributes:
        fail_above: FAIL when the lower bound of the slow-down is above this share (0.02 is 2 %).
        pass_below: PASS when the upper bound is below this share; WARN when both hold.
        alpha: Each bound is wrong with at most this probability, over all looks together.
        looks: Pairs of processes at each look; the sample grows from one to the next while it decides nothing.
        confirm: Whether a FAIL has to repeat on as many fresh pairs.
        noisy_above: Where nothing is decided and rounds spread more than this share, the machine is called too noisy.
        timed: The engine alone, or a whole frame.
        blocks: Rounds that count in each pair.
        dropped_blocks: Rounds before them that do not.
        block_ms: Least duration of a block.
        warm_up_ms: Warm-up of each fresh process.
    """

    fail_above: Share = 0.02
    pass_below: Share = 0.05
    alpha: Alpha = 0.005
    looks: Looks = (6, 12, 24)
    confirm: bool = True
    noisy_above: Share = 0.2
    timed: Literal["infer", "frame"] = "infer"
    blocks: Annotated[int, msgspec.Meta(ge=5)] = 40
    dropped_blocks: Annotated[int, msgspec.Meta(ge=0)] = 10
    block_ms: Annotated[float, msgspec.Meta(gt=0)] = 20.0
    warm_up_ms: Annotated[float, msgspec.Meta(ge=0)] = 500.0


class LimitRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A fact without noise worth speaking of. FAIL when it became worse by more than both limits.

    Attributes:
        metric: One of `edgepose.profiler.facts.FACTS`, or the name of an operator or type behind "nodes.", "macs." or
            "parameters."; which way is worse, and the unit, are the fact's.
        fail_above: Relative limit: share of the baseline's value.
        fail_above_absolute: Absolute limit, in the fact's unit; a share's is between 0 and 1.
        optional: Whether bundles that do not tell the fact are judged without it, which the verdict then says.
    """

    metric: str
    fail_above: Share
    fail_above_absolute: Share = 0.0
    optional: bool = False


class TrendRule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far accepted changes may add up, against a frozen reference; decides `edgepose baseline trend`.

    Attributes:
        creep_above: CREEP when it is surely worse than the reference by more than this share,
        creep_above_memory: or this share, for memory, which varies with the allocator,
        creep_above_points: or points, for accuracy and shares.
        alpha: The bound behind "surely" is wrong with at most this probability.
        least_step: Steps of the level smaller than this share are not looked for,
        least_step_points: or points.
        penalty: What a further change point costs, in units of noise times the logarithm of the number of points.
        window: Points looked at, the latest.
        least_points: With fewer points, the last one stands for the level and no changes are looked for.
    """

    creep_above: Share = 0.02
    creep_above_memory: Share = 0.15
    creep_above_points: Points = 0.5
    alpha: Alpha = 0.005
    least_step: Annotated[float, msgspec.Meta(gt=0)] = 0.002
    least_step_points: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    penalty: Annotated[float, msgspec.Meta(gt=0)] = 3.0
    window: Annotated[int, msgspec.Meta(ge=6)] = 50
    least_points: Annotated[int, msgspec.Meta(ge=6)] = 6


class GateRules(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that decides a verdict.

    Attributes:
        name: Name used on the command line.
        description: One line for people.
        accuracy: Metrics to compare; the first is the headline. Empty: accuracy is not looked at.
        latency: None: latency is not looked at.
        limits: Facts that may not grow.
        per_joint_alpha: A joint is reported as lost when its p-value, adjusted by Holm over all joints, is below.
        trend: How far accepted changes may add up.
    """

    name: str
    description: str = ""
    accuracy: tuple[AccuracyRule, ...] = (AccuracyRule(),)
    latency: LatencyRule | None = LatencyRule()
    limits: tuple[LimitRule, ...] = ()
    per_joint_alpha: Alpha = 0.005
    trend: TrendRule = TrendRule()


def load_rules(name_or_path: str) -> GateRules:
    """Rules that come with edgepose by name, or the user's own by path.

    Raises:
        RecipeError: There are no such rules, or they do not fit the schema or contradict themselves.
    """
    rules = read_yaml(find_profile("gates", name_or_path), GateRules)
    check_rules(rules)
    return rules


def check_rules(rules: GateRules) -> None:
    """Refuses rules that contradict themselves.

    Raises:
        RecipeError: Names the field.
    """
    for index, rule in enumerate(rules.accuracy):
        where = f"gate rules {rules.name}: accuracy[{index}]"
        shares = [metric for metric in (*METRICS, "pck_extent_0.1") if metric != "mpjpe_px"]
        if rule.metric not in shares:
            raise RecipeError(f"{where}.metric", found=repr(rule.metric), expected=f"one of {', '.join(shares)}")
        if not rule.fail_above_points <= rule.pass_below_points <= rule.widest_pass_points:
            raise RecipeError(
                where,
                found=f"{rule.fail_above_points}, {rule.pass_below_points} and {rule.widest_pass_points}",
                expected="fail_above_points <= pass_below_points <= widest_pass_points",
            )
    for index, limit in enumerate(rules.limits):
        if known_fact(limit.metric) is None:
            where = f"gate rules {rules.name}: limits[{index}].metric"
            expected = f"one of {', '.join(FACTS)}, or a name behind {', '.join(FAMILIES)}"
            raise RecipeError(where, found=repr(limit.metric), expected=expected)
    latency = rules.latency
    if latency is None:
        return
    where = f"gate rules {rules.name}: latency"
    if latency.fail_above > latency.pass_below:
        raise RecipeError(
            where, found=f"{latency.fail_above} and {latency.pass_below}", expected="fail_above <= pass_below"
        )
    if list(latency.looks) != sorted(set(latency.looks)):
        raise RecipeError(f"{where}.looks", found=f"{list(latency.looks)}", expected="numbers of pairs that grow")


def protocol_of(rule: LatencyRule, *, threads: int, batch: int, seed: int) -> LatencyProtocol:
    """The measuring protocol of a rule's first look."""
    return LatencyProtocol(
        pairs=rule.looks[0],
        blocks=rule.blocks,
        dropped_blocks=rule.dropped_blocks,
        block_ms=rule.block_ms,
        warm_up_ms=rule.warm_up_ms,
        threads=threads,
        batch=batch,
        seed=seed,
    )
