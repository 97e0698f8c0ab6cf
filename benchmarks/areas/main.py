"""The main job: what compressing kpe-s costs and gains, and whether the gate tells good copies from bad ones.

Invariant: every ratio is measured between engines of this very run, in fresh processes, both arms at their best.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.claim import Claim, Measured
from benchmarks.context import THREADS, Context
from benchmarks.gating import Gated, gate
from benchmarks.search import least_reaching
from benchmarks.subjects import (
    METRIC,
    bundle_record,
    committed,
    compiled,
    compiled_again,
    drop,
    points,
    run_record,
    run_record_lines,
    torch_record,
    val_people,
)
from benchmarks.timing import compare, engine_arm, ort_arms, speedup, torch_arms
from edgepose.blocks.card import read_card
from edgepose.blocks.zoo import find_checkpoint
from edgepose.bundle import Bundle
from edgepose.errors import EdgeposeError
from edgepose.timing.record import ModelArm

NETWORK, COMPRESSING = "kpe-s", "prune-qat-int8"
LOST_POINTS, SLOW_RATIO = 5.0, 1.10
"""How much worse the bad copies are, at least."""


def _small(context: Context) -> Bundle:
    """The compressed bundle, after making sure that it was made from committed weights."""
    bundle = compiled(context, NETWORK, COMPRESSING)
    committed(NETWORK, COMPRESSING, bundle)
    return bundle


def pck_drop(context: Context) -> Measured:
    """Points of PCK lost between the float checkpoint in torch and the compressed engine."""
    base = torch_record(context, find_checkpoint(NETWORK))
    small = _small(context)
    found = drop(context, base, bundle_record(context, small, "onnxruntime"))
    cards = [read_card(find_checkpoint(NETWORK)), read_card(committed(NETWORK, COMPRESSING, small))]
    value, detail = found["drop_points"], {**found, "run_records": [run_record(card) for card in cards]}
    text = (
        f"{METRIC} {100 * found['baseline'][METRIC]:.2f} in torch FP32, "
        f"{100 * found['candidate'][METRIC]:.2f} compiled "
        f"(95 % bounds of the drop {found['ci95'][0]:+.2f} to {found['ci95'][1]:+.2f})"
    )
    known = len(cards[0].lineage)  # the compressed network's history begins with the float one's
    lines = [*run_record_lines(cards[0]), *run_record_lines(cards[1], first=known)]
    if context.full:
        again, checkpoint = compiled_again(context, NETWORK, COMPRESSING)
        repeated = drop(context, base, bundle_record(context, again, "onnxruntime"))
        card = read_card(checkpoint)
        detail["repeated"] = {**repeated, "run_record": run_record(card)}
        text += f"; {repeated['drop_points']:+.2f} points lost by a repeated run, and the worse of both counts"
        lines += ["repeated:", *run_record_lines(card, first=known)]
        value = max(value, repeated["drop_points"])
    return Measured(value, text, detail, tuple(lines))


def speedup_ort(context: Context) -> Measured:
    """The compressed engine against the unpruned FP32 network, both in ONNX Runtime."""
    base = ort_arms(f"{NETWORK} FP32 in ONNX Runtime", compiled(context, NETWORK, "fp32"))
    return speedup(context, base, ort_arms(f"{NETWORK} {COMPRESSING} in ONNX Runtime", _small(context)))


def speedup_torch(context: Context) -> Measured:
    """The compressed engine against torch eager in the faster of both memory layouts."""
    return speedup(context, torch_arms(NETWORK), ort_arms(f"{NETWORK} {COMPRESSING} in ONNX Runtime", _small(context)))


def int8_ratio_ort(context: Context) -> Measured:
    """INT8 against FP32 without pruning, both in ONNX Runtime."""
    base = ort_arms(f"{NETWORK} FP32 in ONNX Runtime", compiled(context, NETWORK, "fp32"))
    return speedup(context, base, ort_arms(f"{NETWORK} INT8 in ONNX Runtime", compiled(context, NETWORK, "ptq-int8")))


def int8_ratio_openvino(context: Context) -> Measured:
    """INT8 against FP32 without pruning, both in OpenVINO, which may not fall to bfloat16 by itself."""
    base = engine_arm(f"{NETWORK} FP32 in OpenVINO", compiled(context, NETWORK, "fp32"), "openvino")
    quick = engine_arm(f"{NETWORK} INT8 in OpenVINO", compiled(context, NETWORK, "ptq-int8"), "openvino")
    return speedup(context, [base], [quick])


def fake_vs_engine(context: Context) -> Measured:
    """How far apart the fake-quantised network and both engines are."""
    small = _small(context)
    found = {
        "fake-quantised torch": points(context, torch_record(context, committed(NETWORK, COMPRESSING, small))),
        "onnxruntime": points(context, bundle_record(context, small, "onnxruntime")),
        "openvino": points(context, bundle_record(context, small, "openvino")),
    }
    text = f"{METRIC}: " + ", ".join(f"{name} {value:.2f}" for name, value in found.items())
    return Measured(max(found.values()) - min(found.values()), text, {"points": found})


# --------------------------------------------------------------------------------------------------------------- gate


def gate_self(context: Context) -> Measured:
    """A bundle against itself, a few times: the worst exit code."""
    small = _small(context)
    runs = [gate(context, small.root, small.root, f"self-{number}") for number in range(context.effort.self_gates)]
    codes = [run.exit_code for run in runs]
    failed = [code for code in codes if code not in (0, 7)]
    value = failed[0] if failed else max(codes)
    text = f"exit codes {', '.join(map(str, codes))}; last: {runs[-1].text}"
    return Measured(value, text, {"runs": [run.facts for run in runs]})


def gate_worse(context: Context) -> Measured:
    """Against a copy whose weights carry noise, just enough of it to lose five points."""
    from benchmarks.copies import disturb, rebuilt
    from edgepose.estimator import PoseEstimator
    from edgepose.profiler.accuracy import evaluate
    from edgepose.runtime import open_session

    small = _small(context)
    before = points(context, bundle_record(context, small, "onnxruntime"))
    network = context.folder / "disturbed.onnx"

    def lost(sigma: float) -> float:
        disturb(_network(small), sigma, network)
        session = open_session(network, "onnxruntime", threads=THREADS, precision="int8")
        with PoseEstimator(session, small.manifest.spec) as estimator:
            told = context.step(f"predicting with noise of {sigma:.3f}")
            return before - points(context, evaluate(estimator, val_people(context), progress=told))

    sigma, loss = least_reaching(lost, LOST_POINTS, slack=1.0, start=0.1)
    disturb(_network(small), sigma, network)
    worse = rebuilt(small, network, context.folder / "worse.bundle", reason=f"noise of {sigma:.4f} on the weights")
    run = gate(context, small.root, worse.root, "worse")
    accuracy = run.verdict.accuracy
    if run.exit_code == 3 and (accuracy is None or accuracy.outcome != "fail"):
        raise EdgeposeError("gate", found="exit code 3 without a failed headline metric", expected="accuracy: fail")
    text = f"noise of {sigma:.3f} of the weights' deviation loses {loss:.2f} points; {run.text}"
    return Measured(run.exit_code, text, {"sigma": sigma, "lost_points": loss, **run.facts})


def gate_slow(context: Context) -> Measured:
    """Against a copy with more convolutions, just enough of them to cost a tenth, that answers the same."""
    from benchmarks.copies import burden, check_burdened, rebuilt

    small = _small(context)
    original = _network(small)
    base = ModelArm("the original", str(original), "onnxruntime", "int8")

    def burdened(count: int) -> Path:
        path = context.folder / f"burdened-{count}.onnx"
        if not path.exists():
            burden(original, count, path)
        return path

    def ratio(count: float) -> float:
        arm = ModelArm(f"{round(count)} more convolutions", str(burdened(round(count))), "onnxruntime", "int8")
        return compare(context, base, arm, context.effort.choice).ratio

    count, cost = least_reaching(ratio, SLOW_RATIO, slack=0.05, start=2)
    path = burdened(round(count))
    kernels = check_burdened(small, original, path, round(count))
    slow = rebuilt(small, path, context.folder / "slow.bundle", reason=f"{round(count)} convolutions inserted")
    run = gate(context, small.root, slow.root, "slow")
    _require_latency(run)
    text = f"{kernels} convolutions that ONNX Runtime executes in addition cost {100 * (cost - 1):.1f} %; {run.text}"
    return Measured(run.exit_code, text, {"extra_kernels": kernels, "calibrated_ratio": cost, **run.facts})


def _require_latency(run: Gated) -> None:
    latency = run.verdict.latency
    if run.exit_code == 4 and (latency is None or latency.outcome != "fail"):
        raise EdgeposeError("gate", found="exit code 4 for another reason", expected="latency: fail")


def _network(bundle: Bundle) -> Path:
    """The ONNX file that the engines were built from."""
    return bundle.root / bundle.manifest.model


CLAIMS = (
    Claim("main.kpe_s_pck_drop_pt", "points", "<= 1.5", f"{METRIC} lost by pruning, QAT and compiling", pck_drop),
    Claim("main.kpe_s_speedup_ort", "x", ">= 4.0", "compressed against FP32, both in ONNX Runtime", speedup_ort),
    Claim("main.kpe_s_speedup_torch", "x", ">= 10.0", "compressed against torch eager FP32", speedup_torch),
    Claim("main.int8_ratio_ort", "x", ">= 2.2", "INT8 against FP32, unpruned, in ONNX Runtime", int8_ratio_ort),
    Claim("main.int8_ratio_openvino", "x", ">= 2.5", "INT8 against FP32, unpruned, in OpenVINO", int8_ratio_openvino),
    Claim("main.fake_vs_engine_pt", "points", "<= 0.5", "spread of fake quantisation and engines", fake_vs_engine),
    Claim("main.gate_self_exit", "exit code", "in 0,7", "gate of a bundle against itself", gate_self),
    Claim("main.gate_worse_exit", "exit code", "== 3", "gate against a copy that lost 5 points", gate_worse),
    Claim("main.gate_slow_exit", "exit code", "== 4", "gate against a copy that is 10 % slower", gate_slow),
)
