"""Timed ratios: each arm at its best settings, in its own fresh processes, taking turns.

Invariant: settings are chosen in comparisons of their own; the samples behind a claimed ratio are fresh.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from benchmarks.claim import Measured
from benchmarks.context import THREADS, Context
from edgepose.blocks.zoo import find_checkpoint
from edgepose.bundle import Bundle, check_engine
from edgepose.engines import choose_engine
from edgepose.spec import Backend, Execution, OrtOptions
from edgepose.timing.pairs import compare_latency
from edgepose.timing.record import Arm, CallableArm, LatencyComparison, LatencyProtocol, ModelArm


def ort_arms(label: str, bundle: Bundle) -> tuple[ModelArm, ...]:
    """The ONNX Runtime engine of a bundle at the settings that may be its best: idle threads that sleep, or spin."""
    engine = choose_engine(bundle, "onnxruntime")
    path = str(check_engine(bundle, engine))
    return tuple(
        ModelArm(f"{label}, {'spinning' if spinning else 'sleeping'} threads", path, "onnxruntime", engine.precision,
                 Execution(onnxruntime=OrtOptions(spinning=spinning)))
        for spinning in (False, True)
    )  # fmt: skip


def engine_arm(label: str, bundle: Bundle, backend: Backend) -> ModelArm:
    """One engine of a bundle; OpenVINO's runs with its precision pinned to what the engine was built for."""
    engine = choose_engine(bundle, backend)
    return ModelArm(label, str(check_engine(bundle, engine)), backend, engine.precision)


def torch_arms(network: str) -> tuple[CallableArm, ...]:
    """A zoo network in torch eager in both memory layouts: which one is its best depends on the processor."""
    checkpoint = str(find_checkpoint(network))
    return tuple(
        CallableArm(
            f"{network} FP32 in torch eager, {'channels last' if channels_last else 'contiguous'}",
            "edgepose.stages.checkpoint_session:torch_call",
            {"path": checkpoint, "channels_last": channels_last, "threads": THREADS},
        )
        for channels_last in (False, True)
    )


def compare(context: Context, base: Arm, candidate: Arm, protocol: LatencyProtocol) -> LatencyComparison:
    """Times two arms; the same two by the same protocol only once."""
    key = msgspec.json.encode([base, candidate, protocol]).decode()
    what = f"timing {candidate.label} against {base.label}"
    return context.once(key, lambda: compare_latency(base, candidate, protocol, context.step(what)))


def fastest(context: Context, arms: Sequence[Arm]) -> Arm:
    """The arm that takes the least time."""
    best = arms[0]
    for arm in arms[1:]:
        if compare(context, best, arm, context.effort.choice).ratio < 1:
            best = arm
    return best


def speedup(context: Context, base: Sequence[Arm], candidate: Sequence[Arm]) -> Measured:
    """How many times faster the candidate is than the baseline, each at the best of its settings."""
    slow, quick = fastest(context, base), fastest(context, candidate)
    found = compare(context, slow, quick, context.effort.ratio)
    low, high = 1 / found.ci95[1], 1 / found.ci95[0]
    text = (
        f"{slow.label} {found.a_ms:.3f} ms, {quick.label} {found.b_ms:.3f} ms: {1 / found.ratio:.2f} x "
        f"(95 % bounds {low:.2f} to {high:.2f}, {len(found.pairs)} pairs of processes)"
    )
    return Measured(1 / found.ratio, text, {"ci95": [low, high], **facts_of(found)})


def facts_of(found: LatencyComparison) -> dict[str, object]:
    """A comparison without its raw samples; times of arm B over arm A become speed-ups."""
    return {
        "baseline": found.a.label,
        "candidate": found.b.label,
        "baseline_ms": found.a_ms,
        "candidate_ms": found.b_ms,
        "speedup_by_pair": [float(np.exp(-np.median(pair.log_ratios))) for pair in found.pairs],
        "pair_spread": found.pair_spread,
        "load_average": [pair.load_average for pair in found.pairs],
        "protocol": msgspec.to_builtins(found.protocol),
        "host": {"cpu": found.host.cpu, "flags": list(found.host.flags), "libraries": found.host.libraries},
    }
