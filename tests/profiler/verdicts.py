"""Verdicts written down field by field, so that what is made of them can be compared to the letter."""

from __future__ import annotations

import msgspec

from edgepose.profiler.gate.verdict import (
    AccuracyOutcome,
    Check,
    Conditions,
    FactPair,
    JointOutcome,
    LatencyOutcome,
    LimitOutcome,
    Outcome,
    Verdict,
    overall,
)
from edgepose.timing.record import LatencyProtocol

CONDITIONS = Conditions(
    baseline_digest="b" * 64,
    candidate_digest="c" * 64,
    baseline_engine="onnxruntime int8",
    candidate_engine="onnxruntime int8",
    host="e" * 64,
    device="A Processor at 2 GHz",
    cores=2,
    timed="infer",
    protocol=LatencyProtocol(pairs=1, threads=1),
    dataset="d" * 64,
)


def accuracy(outcome: Outcome = "pass", diff: float = -0.2) -> AccuracyOutcome:
    return AccuracyOutcome(
        metric="pck_torso_0.2",
        outcome=outcome,
        baseline=0.6412,
        candidate=0.6412 + diff / 100,
        diff_points=diff,
        ci95=(diff - 0.3, diff + 0.3),
        loss_bounds=(-diff - 0.4, -diff + 0.4),
        fail_above_points=0.1,
        margin_points=0.62,
        detectable_points=0.62,
        persons=556,
        joints=7000,
        text=f"pck_torso_0.2 {diff:+.2f} points (556 persons)",
    )


def latency(outcome: Outcome = "pass", ratio: float = 1.004, *, noisy: bool = False) -> LatencyOutcome:
    return LatencyOutcome(
        outcome=outcome,
        ratio=ratio,
        ci95=(ratio - 0.006, ratio + 0.006),
        bounds=(ratio - 0.01, ratio + 0.01),
        fail_above=0.02,
        pass_below=0.05,
        pairs=6,
        confirmed=True if outcome == "fail" else None,
        noisy=noisy,
        pair_spread=0.31 if noisy else 0.02,
        hodges_lehmann_ratio=ratio,
        sign_test_p=0.5,
        baseline_ms=5.0,
        candidate_ms=5.0 * ratio,
        text=f"latency {100 * ratio - 100:+.1f} % (6 pairs of processes)"
        + ("; this machine is too noisy to decide: rounds spread by 31 %" if noisy else ""),
    )


def size(outcome: Outcome = "pass", after: float = 1e6) -> LimitOutcome:
    return LimitOutcome(
        "engine_bytes",
        outcome,
        1e6,
        after,
        f"engine_bytes 1.00 MB to {after / 1e6:.2f} MB",
        "bytes",
        "lower",
        0.05,
        65536,
    )


def joint(name: str = "left_wrist", diff: float = -4.5, *, lost: bool = True) -> JointOutcome:
    return JointOutcome(name, 540, 0.5, 0.5 + diff / 100, diff, (diff - 1.5, diff + 1.5), 0.0004 if lost else 1.0, lost)


def verdict(
    *checks: Check, joints: tuple[JointOutcome, ...] = (), skipped: tuple[str, ...] = (), name: str = "after"
) -> Verdict:
    """A verdict over exactly these checks."""
    outcome, code = overall(checks)
    found = [check for check in checks if isinstance(check, AccuracyOutcome)]
    return Verdict(
        verdict=outcome,
        exit_code=code,
        reasons=tuple(check.text for check in checks if check.outcome != "pass"),
        baseline="before",
        candidate=name,
        rules="default",
        accuracy=found[0] if found else None,
        latency=next((check for check in checks if isinstance(check, LatencyOutcome)), None),
        limits=tuple(check for check in checks if isinstance(check, LimitOutcome)),
        other_accuracy=tuple(found[1:]),
        joints=joints,
        seed=7,
        facts=(FactPair("macs", "MACs", 2e8, 2e8), FactPair("nodes.Resize", "count", 2.0, 3.0)),
        skipped=skipped,
        conditions=CONDITIONS,
    )


LEFT_OUT = "executed_int8_share was not checked: the baseline does not tell it"
GOOD = verdict(size(), accuracy(), latency())
BAD = verdict(
    size("fail", 2e6), accuracy("fail", -2.5), latency("fail", 1.08), joints=(joint(), joint("neck", 0.1, lost=False))
)
UNDECIDED = verdict(size(), accuracy("inconclusive", -0.6), latency("warn", 1.03), skipped=(LEFT_OUT,))
REFUSED = verdict(size(), accuracy(), latency("inconclusive", 1.02, noisy=True))
HOSTILE = msgspec.structs.replace(GOOD, candidate="a|b`\n::error::<img src=x> @all \x1b[31m [x](http://y)\x00")
