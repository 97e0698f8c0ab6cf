"""What compressing costs and gains: losses against the best that the float network can do, ratios beside its peers.

Invariant: a loss is taken against the better of the float checkpoint and its control arm, on the same people, and the
worse of the two engines counts; a ratio is timed in this very run. Where bounds are promised beside a figure, the value
is the worse of both: it exceeds the bar where the figure does or where its bound exceeds what is promised of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from benchmarks import side_by_side
from benchmarks.claim import Claim, Measured
from benchmarks.context import Context
from benchmarks.losses import control_name, lost
from benchmarks.subjects import (
    METRIC,
    bundle_record,
    committed,
    compiled,
    run_record,
    run_record_lines,
    val_people,
)
from benchmarks.timing import engine_arm, ort_arms, speedup, torch_arms
from edgepose import stats
from edgepose.blocks.card import read_card
from edgepose.blocks.zoo import find_checkpoint, zoo_names
from edgepose.bundle import Bundle
from edgepose.errors import CheckpointError
from edgepose.profiler.accuracy import AccuracyRecord, person_sums, summary
from edgepose.profiler.gate.judge import judge_accuracy
from edgepose.profiler.gate.rules import AccuracyRule
from edgepose.spec import Backend
from edgepose.timing.turns import time_in_turns

SMALL, TRAINED, CALIBRATED = "prune-qat-int8", "qat-int8", "ptq-int8"
KPE, ORN, DEPTHWISE = "kpe-s", "orn-s", "kpe-t-inverted"
LINE = ("kpe-t", "kpe-s", "kpe-m")
"""The zoo's sizes, whose unpruned INT8 networks a compressed one has to beat."""

EQUAL = ("kpe-t", "kpe-t-equal")
"""Networks that may have as many multiply-accumulates as the compressed `KPE`; the first that has is taken."""

FINER = "pck_torso_0.1"
_NAMES: dict[Backend, str] = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_EQUAL_SHARE = 0.1  # by which equal numbers of multiply-accumulates may differ


# ------------------------------------------------------------------------------------------------------------- losses


def _loss_claim(network: str, metric: str, bar: float, upper_bar: float) -> Callable[[Context], Measured]:
    """Points lost by pruning and quantising, and the bound beside them."""

    def measure(context: Context) -> Measured:
        small = _compressed(context, network)
        found = lost(context, network, SMALL, metric)
        cards = [read_card(find_checkpoint(network)), read_card(committed(network, SMALL, small))]
        text = f"{metric} lost: {found.text}; the value is the loss or, if it is more, the bound - {upper_bar - bar:g}"
        detail = {**found.detail, "run_records": [run_record(card) for card in cards]}
        lines = run_record_lines(cards[1], first=len(cards[0].lineage))
        return Measured(found.value(bar, upper_bar), text, detail, lines)

    return measure


def qat_loss(context: Context) -> Measured:
    """The largest loss by quantisation-aware training of three networks, with post-training quantisation beside it."""
    networks = (KPE, ORN, DEPTHWISE)
    _require(name for network in networks for name in (network, f"{network}-{TRAINED}", control_name(network, TRAINED)))
    values, lines, detail = [], [], {}
    for network in networks:
        trained = lost(context, network, TRAINED, METRIC)
        calibrated = lost(context, network, CALIBRATED, METRIC, control=TRAINED)
        values.append(trained.value(*_QAT_BARS))
        lines.append(f"{network}: QAT {trained.text}; PTQ {calibrated.text}")
        detail[network] = {"qat": trained.detail, "ptq": calibrated.detail}
    text = f"{METRIC} lost by QAT, the worst of {len(networks)} networks; the value is the loss or, if it is more, "
    return Measured(max(values), f"{text}the bound - {_QAT_BARS[1] - _QAT_BARS[0]:g}", detail, tuple(lines))


_QAT_BARS = (0.3, 1.0)


def _require(names: Any) -> None:
    """Says all that is absent at once.

    Raises:
        CheckpointError: Some network is not in the zoo.
    """
    absent = [name for name in names if name not in zoo_names()]
    if absent:
        raise CheckpointError(
            "zoo", found=f"no {', no '.join(absent)}", expected="all of them", fix="train, compress and commit them"
        )


# ------------------------------------------------------------------------------------------------------------- speed


def _compressed(context: Context, network: str) -> Bundle:
    """The compressed bundle, after making sure that it was made from committed weights."""
    bundle = compiled(context, network, SMALL)
    committed(network, SMALL, bundle)
    return bundle


def _speedup_ort(network: str) -> Callable[[Context], Measured]:
    """The compressed engine against the FP32 original, both in ONNX Runtime."""

    def measure(context: Context) -> Measured:
        base = ort_arms(f"{network} FP32 in ONNX Runtime", compiled(context, network, "fp32"))
        small = ort_arms(f"{network} {SMALL} in ONNX Runtime", _compressed(context, network))
        return speedup(context, base, small)

    return measure


def speedup_torch(context: Context) -> Measured:
    """The compressed engine against torch eager in the faster of both memory layouts."""
    return speedup(context, torch_arms(KPE), ort_arms(f"{KPE} {SMALL} in ONNX Runtime", _compressed(context, KPE)))


def _int8_ratio(network: str, backend: Backend) -> Callable[[Context], Measured]:
    """INT8 against FP32 without pruning, in the same runtime."""

    def measure(context: Context) -> Measured:
        forms = [
            (form, compiled(context, network, recipe)) for form, recipe in (("FP32", "fp32"), ("INT8", CALIBRATED))
        ]
        labelled = [(f"{network} {form} in {_NAMES[backend]}", bundle) for form, bundle in forms]
        if backend == "onnxruntime":
            base, quick = (ort_arms(label, bundle) for label, bundle in labelled)
            return speedup(context, base, quick)
        arms = [engine_arm(label, bundle, backend) for label, bundle in labelled]
        return speedup(context, arms[:1], arms[1:])

    return measure


def latency_target_error(context: Context) -> Measured:
    """By how much the speed-up that pruning reaches differs from the one it was asked for, the worst of several."""
    from benchmarks.latency_target import latency_target_error as measured

    return measured(context)


# ----------------------------------------------------------------------------------------------------------- the line


@dataclass(frozen=True, slots=True, eq=False)
class Point:
    """A network on the plane of latency and accuracy.

    Attributes:
        name: What it is called.
        time: Its time over that of a common base.
        record: What it predicts.
    """

    name: str
    time: float
    record: AccuracyRecord


def above_line(points: Sequence[Point], small: Point, context: Context) -> tuple[stats.Interval, dict[str, float]]:
    """How far a network lies above the line through others, in points of `METRIC` with paired 95 % bounds.

    Between two points the line is straight in latency; beyond the ends it goes on as its last piece.

    Args:
        points: Two or more, of different times.
        small: Who is to lie above.
        context: Knows the people.

    Returns:
        The distance, and what each point weighs in the line's value there.
    """
    ordered = sorted(points, key=lambda point: point.time)
    times = [point.time for point in ordered]
    right = int(np.clip(np.searchsorted(times, small.time), 1, len(times) - 1))
    share = (small.time - times[right - 1]) / (times[right] - times[right - 1])
    weights = {ordered[right - 1].name: 1 - share, ordered[right].name: share}
    keypoints = val_people(context).keypoints
    sums, counts = person_sums(small.record, keypoints, METRIC)
    line = np.zeros_like(sums)
    for point in ordered[right - 1 : right + 1]:
        line += weights[point.name] * person_sums(point.record, keypoints, METRIC)[0]
    columns = [values[:, None] for values in (line, sums, counts)]
    pairs = stats.paired_bootstrap(*columns, seed=0, clusters=small.record.image_id)
    low, high = (100 * float(bound[0]) for bound in pairs.bounds(0.025))
    return stats.Interval(100 * float(pairs.difference[0]), low, high), weights


def above_zoo_line(context: Context) -> Measured:
    """Points of the compressed network above the line through the zoo's unpruned INT8 networks."""
    _require((*LINE, f"{KPE}-{SMALL}"))
    bundles = [_best_int8(context, network) for network in LINE] + [_compressed(context, KPE)]
    arms = [engine_arm(bundle.manifest.name, bundle, "onnxruntime") for bundle in bundles]
    turns = context.once(f"line {[arm.path for arm in arms]}", lambda: time_in_turns(arms, context.effort.ratio))
    base = LINE.index(KPE)
    compared = [turns.between(base, number) for number in range(len(arms))]
    points = [
        Point(bundle.manifest.name, timed.ratio, bundle_record(context, bundle, "onnxruntime"))
        for bundle, timed in zip(bundles, compared, strict=True)
    ]
    found, weights = above_line(points[:-1], points[-1], context)
    keypoints = val_people(context).keypoints
    rows = [
        {
            "name": point.name,
            "time_over_kpe_s_int8": timed.ratio,
            "ci95": list(timed.ci95),
            "points": 100 * summary(point.record, keypoints)[METRIC],
        }
        for point, timed in zip(points, compared, strict=True)
    ]
    text = f"{found.estimate:+.2f} [{found.low:+.2f}, {found.high:+.2f}] points above the line; " + ", ".join(
        f"{row['name']} {row['points']:.2f} at {row['time_over_kpe_s_int8']:.2f}" for row in rows
    )
    detail = {"rows": rows, "weights": weights, "ci95": [found.low, found.high]}
    return Measured(found.estimate, f"{text} x the time of {KPE} INT8 in ONNX Runtime", detail)


def above_equal_macs(context: Context) -> Measured:
    """Points of the compressed network above one that was trained by itself with as many multiply-accumulates."""
    small = _compressed(context, KPE)
    macs = _macs(small)
    offered = {network: _macs(_best_int8(context, network)) for network in EQUAL if network in zoo_names()}
    equal = [network for network, other in offered.items() if abs(other / macs - 1) <= _EQUAL_SHARE]
    if not equal:
        raise CheckpointError(
            "zoo",
            found=", ".join(f"{name} with {count / 1e6:.0f} MMAC" for name, count in offered.items()) or "none of them",
            expected=f"one of {' or '.join(EQUAL)} with about {macs / 1e6:.0f} MMAC, as the compressed {KPE} has",
            fix=f"train a narrower or wider {EQUAL[0]} as {EQUAL[-1]}, or prune to as many",
        )
    rival = _best_int8(context, equal[0])
    base, candidate = (bundle_record(context, bundle, "onnxruntime") for bundle in (rival, small))
    judged = judge_accuracy(base, candidate, val_people(context).keypoints, AccuracyRule(metric=METRIC))
    text = (
        f"{judged.diff_points:+.2f} [{judged.ci95[0]:+.2f}, {judged.ci95[1]:+.2f}] points of {METRIC} above "
        f"{rival.manifest.name}: {macs / 1e6:.0f} and {offered[equal[0]] / 1e6:.0f} MMAC"
    )
    return Measured(judged.diff_points, text, {"ci95": list(judged.ci95), "macs": [macs, offered[equal[0]]]})


def _best_int8(context: Context, network: str) -> Bundle:
    """The most accurate of a network's unpruned INT8 bundles: calibrated, or trained where that is committed."""
    bundles = [compiled(context, network, CALIBRATED)]
    if f"{network}-{TRAINED}" in zoo_names():
        bundles.append(compiled(context, network, TRAINED))
    keypoints = val_people(context).keypoints
    return max(bundles, key=lambda b: summary(bundle_record(context, b, "onnxruntime"), keypoints)[METRIC])


def _macs(bundle: Bundle) -> int:
    """Multiply-accumulates that ONNX Runtime executes for one person."""
    from edgepose.export.engine import int8_share

    return int8_share(bundle.root / bundle.manifest.model, "onnxruntime").macs


# ---------------------------------------------------------------------------------------------------------- the front


def _pareto(backend: Backend) -> Callable[[Context], Measured]:
    """How many of the other tools' networks beat this project's from the same checkpoint and calibration images."""

    def measure(context: Context) -> Measured:
        subject = context.once(f"side by side {KPE}", lambda: side_by_side.subject(context, KPE))
        people = side_by_side.people_of(context, "val")
        table = context.once(
            f"side by side {KPE} {backend}", lambda: side_by_side.compare(context, subject, backend, ("val", people))
        )
        lines = tuple(side_by_side.markdown(table).splitlines()[2:])
        return Measured(len(table.dominators), side_by_side.verdict(table), msgspec.to_builtins(table), lines)

    return measure


def _claims_of_losses() -> tuple[Claim, ...]:
    rows = (
        ("kpe_s_loss02_pt", KPE, METRIC, 1.0, 2.0),
        ("kpe_s_loss01_pt", KPE, FINER, 1.5, 2.5),
        ("orn_s_loss02_pt", ORN, METRIC, 1.0, 2.0),
        ("orn_s_loss01_pt", ORN, FINER, 1.5, 2.5),
    )
    return tuple(
        Claim(
            f"compression.{name}",
            "points",
            f"<= {bar}",
            f"{metric} lost by pruning, QAT and compiling {network}; upper 95 % bound <= {upper}",
            _loss_claim(network, metric, bar, upper),
        )
        for name, network, metric, bar, upper in rows
    )


def _claims_of_int8() -> tuple[Claim, ...]:
    rows: tuple[tuple[str, str, Backend, float], ...] = (
        ("int8_ratio_openvino", KPE, "openvino", 3.0),
        ("int8_ratio_ort", KPE, "onnxruntime", 2.5),
        ("kpe_t_int8_ratio_openvino", "kpe-t", "openvino", 2.0),
        ("kpe_t_int8_ratio_ort", "kpe-t", "onnxruntime", 2.0),
    )
    return tuple(
        Claim(
            f"compression.{name}",
            "x",
            f">= {bar}",
            f"INT8 against FP32 of {network}, unpruned, in {_NAMES[backend]}",
            _int8_ratio(network, backend),
        )
        for name, network, backend, bar in rows
    )


CLAIMS = (
    Claim(
        "compression.kpe_s_speedup_ort", "x", ">= 6.0", "compressed kpe-s against FP32, ONNX Runtime", _speedup_ort(KPE)
    ),
    Claim("compression.kpe_s_speedup_torch", "x", ">= 15.0", "compressed kpe-s against torch eager", speedup_torch),
    Claim(
        "compression.orn_s_speedup_ort", "x", ">= 4.0", "compressed orn-s against FP32, ONNX Runtime", _speedup_ort(ORN)
    ),
    *_claims_of_losses(),
    *_claims_of_int8(),
    Claim("compression.qat_loss_pt", "points", "<= 0.3", "lost by QAT alone; upper 95 % bound <= 1.0", qat_loss),
    Claim(
        "compression.above_zoo_line_pt", "points", "> 0.0", "kpe-s above the line through INT8 t/s/m", above_zoo_line
    ),
    Claim(
        "compression.above_equal_macs_pt", "points", "> 0.0", "kpe-s above a network of equal MACs", above_equal_macs
    ),
    Claim(
        "compression.pareto_ort", "rivals", "== 0", "other tools that beat this project in ONNX Runtime",
        _pareto("onnxruntime"),
    ),
    Claim(
        "compression.pareto_openvino", "rivals", "== 0", "other tools that beat this project in OpenVINO",
        _pareto("openvino"),
    ),
    Claim(
        "compression.latency_target_error", "fraction", "<= 0.1", "speed-up reached against asked for, 1.5 and 2 x",
        latency_target_error,
    ),
)  # fmt: skip
