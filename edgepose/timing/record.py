"""What is measured and what came of it: arms, protocols, traces of process pairs, latency comparisons, profiles.

Invariant: records are immutable, serialise to JSON, and keep every raw sample, so that each figure in them can be
computed again; nothing in a record depends on a later look at the machine.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose import stats
from edgepose.errors import BadInput
from edgepose.host import Fingerprint
from edgepose.spec import Backend, Execution, Precision

PositiveInt = Annotated[int, msgspec.Meta(ge=1)]
NaturalInt = Annotated[int, msgspec.Meta(ge=0)]


# ----------------------------------------------------------------------------------------------------------- arms


class BundleArm(msgspec.Struct, frozen=True, tag="bundle", forbid_unknown_fields=True):
    """An engine of a bundle.

    Attributes:
        label: What the arm is called in reports.
        path: The bundle's directory.
        backend: Backend whose engine is taken; None takes the first that can be executed here.
        precision: Precision of the engine; None takes the first.
        timed: The engine alone ("infer"), or a whole frame: crop, infer, decode ("frame").
        digest: The bundle's digest, which the worker checks, so that samples of one path are of one bundle; "" for any.
        engine: Path of the engine in the bundle, which goes before backend and precision; "" for none in particular.
        execution: How it is executed; None takes what the engine was made for.
        golden: Whether the worker first checks the engine on the bundle's golden vectors.
    """

    label: str
    path: str
    backend: Backend | None = None
    precision: Precision | None = None
    timed: Literal["infer", "frame"] = "infer"
    digest: str = ""
    engine: str = ""
    execution: Execution | None = None
    golden: bool = False


class ModelArm(msgspec.Struct, frozen=True, tag="model", forbid_unknown_fields=True):
    """A network file in a backend, without a bundle around it.

    Attributes:
        label: What the arm is called in reports.
        path: The file: ONNX, OpenVINO IR, engine.
        backend: The runtime.
        precision: Arithmetic of what the file does not quantise.
        execution: How it is executed.
    """

    label: str
    path: str
    backend: Backend
    precision: Precision = "fp32"
    execution: Execution = Execution()


class CallableArm(msgspec.Struct, frozen=True, tag="callable", forbid_unknown_fields=True):
    """Anything at all: `factory` is called in the worker and returns a callable without arguments, which is timed.

    Attributes:
        label: What the arm is called in reports.
        factory: "package.module:function" or "path/to/file.py:function".
        arguments: Keyword arguments of the factory; plain JSON values.
    """

    label: str
    factory: str
    arguments: dict[str, Any] = {}


Arm = BundleArm | ModelArm | CallableArm


# ------------------------------------------------------------------------------------------------------- protocols


class LatencyProtocol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How two arms are compared.

    Attributes:
        pairs: Pairs of fresh processes.
        blocks: Rounds that count in each pair; a round is one block of either arm.
        dropped_blocks: Rounds at the start of a pair that do not count.
        block_ms: Least duration of a block; the number of calls in it follows.
        warm_up_ms: Warm-up of each fresh process.
        threads: Threads of either arm; 0 takes all physical cores.
        batch: Size of every free batch dimension.
        seed: Of the order of arms within rounds, and of the bootstrap.
        timeout_s: A worker that is silent for longer is given up.
    """

    pairs: PositiveInt = 6
    blocks: PositiveInt = 40
    dropped_blocks: NaturalInt = 10
    block_ms: Annotated[float, msgspec.Meta(gt=0)] = 20.0
    warm_up_ms: Annotated[float, msgspec.Meta(ge=0)] = 500.0
    threads: NaturalInt = 0
    batch: PositiveInt = 1
    seed: NaturalInt = 0
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0


class ProfileProtocol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one engine is profiled.

    Attributes:
        duration_s: Time spent sampling after the warm-up.
        warm_up_ms: Warm-up of the fresh process.
        threads: Threads; 0 takes all physical cores.
        persons: People per frame, cropped and inferred as one batch.
        frame_hw: Height and width of the synthetic frame in pixels.
        seed: Of the frame's pixels.
        timeout_s: A worker that is silent for longer, sampling aside, is given up.
    """

    duration_s: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    warm_up_ms: Annotated[float, msgspec.Meta(ge=0)] = 500.0
    threads: NaturalInt = 0
    persons: PositiveInt = 1
    frame_hw: tuple[PositiveInt, PositiveInt] = (480, 640)
    seed: NaturalInt = 0
    timeout_s: Annotated[float, msgspec.Meta(gt=0)] = 300.0


# ----------------------------------------------------------------------------------------------------- raw samples


class Samples(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An integer array in a few bytes: zlib over little-endian int64, which JSON carries as base64."""

    shape: tuple[int, ...]
    zlib_int64: bytes

    def array(self) -> NDArray[np.int64]:
        """The samples, read-only, in their shape.

        Raises:
            BadInput: The bytes do not hold an array of that shape.
        """
        try:
            flat = np.frombuffer(zlib.decompress(self.zlib_int64), "<i8")
            return flat.reshape(self.shape)
        except (zlib.error, ValueError) as err:
            raise BadInput("raw samples", found=f"bytes that do not unpack ({err})", expected=f"{self.shape}") from err


def pack(samples: NDArray[np.integer]) -> Samples:
    """Packs an integer array of any shape."""
    return Samples(samples.shape, zlib.compress(np.ascontiguousarray(samples, "<i8").tobytes(), 6))


class WorkerFacts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a fresh worker process found out about itself.

    Attributes:
        load_ms: From its start to the end of loading the workload, imports included.
        first_call_ms: The very first call.
        threads: Threads that the workload was given.
        peak_rss_bytes: Largest resident memory of the process, interpreter and libraries included.
        steady_rss_bytes: Resident memory at the end.
        cpu_ns: CPU time of all its threads over the timed calls.
        wall_ns: Wall time of the timed calls.
        page_faults: Page faults that had to read from the disk.
        preemptions: Involuntary context switches.
        backend: Backend that ran ("" for a callable).
    """

    load_ms: float
    first_call_ms: float
    threads: int
    peak_rss_bytes: int
    steady_rss_bytes: int
    cpu_ns: int
    wall_ns: int
    page_faults: int
    preemptions: int
    backend: str = ""


class ArmTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One arm of one process pair.

    Attributes:
        calls_ns: (rounds, calls) duration of every call, dropped rounds included.
        facts: What the worker said at its end.
    """

    calls_ns: Samples
    facts: WorkerFacts


class PairTrace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One pair of fresh processes.

    Attributes:
        order: One letter per round, dropped ones included: which arm went first, "A" or "B".
        log_ratios: log(B / A) of the block medians, for the rounds that count.
        a: Trace of arm A.
        b: Trace of arm B.
        load_average: One-minute load average when the pair ended; negative where unknown.
    """

    order: str
    log_ratios: tuple[float, ...]
    a: ArmTrace
    b: ArmTrace
    load_average: float = -1.0


class LatencyComparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Arm B (the candidate) against arm A (the baseline), with every raw sample.

    Attributes:
        a: Arm A.
        b: Arm B.
        protocol: How it was measured; `pairs` is the number of pairs below.
        pairs: Traces of the process pairs.
        ratio: Time of B over time of A: median over pairs of the median over rounds.
        ci95: Two-sided 95 % bounds of the ratio.
        pair_spread: Robust standard deviation of the rounds' log-ratios about their pair's median.
        a_ms: Median over pairs of arm A's median call.
        b_ms: The same of arm B.
        host: Where it was measured.
    """

    a: Arm
    b: Arm
    protocol: LatencyProtocol
    pairs: tuple[PairTrace, ...]
    ratio: float
    ci95: tuple[float, float]
    pair_spread: float
    a_ms: float
    b_ms: float
    host: Fingerprint

    def log_ratios(self) -> list[NDArray[np.float64]]:
        """One (rounds,) array of log-ratios per pair."""
        return [np.array(pair.log_ratios) for pair in self.pairs]


def comparison_of(
    arms: tuple[Arm, Arm], protocol: LatencyProtocol, pairs: Sequence[PairTrace], host: Fingerprint
) -> LatencyComparison:
    """The comparison that follows from the traces of process pairs.

    Raises:
        BadInput: No pairs, or log-ratios that are not finite.
    """
    rounds = [np.array(pair.log_ratios) for pair in pairs]
    draws = stats.ratio_draws(rounds, seed=protocol.seed)
    interval = stats.ratio_interval(draws, stats.median_of_medians(rounds), alpha=0.025)
    return LatencyComparison(
        a=arms[0],
        b=arms[1],
        protocol=msgspec.structs.replace(protocol, pairs=len(pairs)),
        pairs=tuple(pairs),
        ratio=interval.estimate,
        ci95=(interval.low, interval.high),
        pair_spread=stats.robust_spread(np.concatenate([r - np.median(r) for r in rounds])),
        a_ms=_level_ms([pair.a for pair in pairs], protocol),
        b_ms=_level_ms([pair.b for pair in pairs], protocol),
        host=host,
    )


def merged(first: LatencyComparison, second: LatencyComparison) -> LatencyComparison:
    """Both comparisons' pairs as one sample.

    Raises:
        BadInput: They differ in arms, protocol (the number of pairs aside) or host, and must not be mixed.
    """
    reference = msgspec.structs.replace(second.protocol, pairs=first.protocol.pairs)
    alike = (first.a, first.b, first.protocol) == (second.a, second.b, reference)
    if not alike or _speed(first.host) != _speed(second.host):
        raise BadInput(
            "latency comparison",
            found="samples of different arms, protocols or hosts",
            expected="the same for all samples of a comparison",
            fix="measure again on one host",
        )
    return comparison_of((first.a, first.b), first.protocol, first.pairs + second.pairs, first.host)


def _speed(host: Fingerprint) -> tuple[str, int, str]:
    """What decides how fast a host is: unlike engines, timings do not survive other cores or another governor."""
    return host.digest, host.physical_cores, host.governor


def call_times_ms(trace: ArmTrace, protocol: LatencyProtocol) -> NDArray[np.float64]:
    """(N,) milliseconds of every call of an arm's rounds that count."""
    return trace.calls_ns.array()[protocol.dropped_blocks :].ravel() / 1e6


def _level_ms(traces: Sequence[ArmTrace], protocol: LatencyProtocol) -> float:
    return float(np.median([np.median(call_times_ms(trace, protocol)) for trace in traces]))


# --------------------------------------------------------------------------------------------------------- profile


class Percentile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A latency percentile with distribution-free 95 % bounds, in milliseconds; all None where the sample is too small.

    Attributes:
        name: "p50", "p90", "p99".
        value_ms: The percentile.
        low_ms: Lower bound.
        high_ms: Upper bound.
        needed: Samples it takes before this percentile is stated.
    """

    name: str
    value_ms: float | None
    low_ms: float | None
    high_ms: float | None
    needed: int


class ProfileRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine, profiled alone in a fresh process.

    Attributes:
        label: Name of the network.
        bundle_digest: Digest of the bundle's manifest.
        backend: Backend that ran.
        precision: Precision of the engine.
        protocol: How it was measured.
        people: People per frame; an engine of fixed batch takes as many as it was built for.
        host: Where it was measured.
        load_average: One-minute load average before and after.
        stages: Names of the stages, in order.
        samples_ns: (calls, stages) duration of every stage of every call.
        latency: Percentiles of a whole frame.
        stage_ms: Median milliseconds of each stage, in the order of `stages`.
        persons_per_s: Throughput of the sampled stretch.
        facts: Start-up, memory, CPU time and faults of the process.
        cpu_share: CPU time over wall time: how many cores were busy.
    """

    label: str
    bundle_digest: str
    backend: str
    precision: str
    protocol: ProfileProtocol
    people: int
    host: Fingerprint
    load_average: tuple[float, float]
    stages: tuple[str, ...]
    samples_ns: Samples
    latency: tuple[Percentile, ...]
    stage_ms: tuple[float, ...]
    persons_per_s: float
    facts: WorkerFacts
    cpu_share: float


def percentiles(
    samples_ns: NDArray[np.integer], quantiles: Sequence[float] = (0.5, 0.9, 0.99)
) -> tuple[Percentile, ...]:
    """Percentiles of (N,) nanoseconds; those that N is too small for are present without a value."""
    found = []
    for quantile in quantiles:
        name, needed = f"p{100 * quantile:g}", stats.minimum_samples(quantile)
        if len(samples_ns) < needed:
            found.append(Percentile(name, None, None, None, needed))
            continue
        bounds = stats.percentile_bounds(samples_ns / 1e6, quantile)
        found.append(Percentile(name, bounds.estimate, bounds.low, bounds.high, needed))
    return tuple(found)


def change_percent(ratio: float) -> str:
    """A ratio as a change for people: 1.05 is "+5.0 %"."""
    return f"{100 * (ratio - 1):+.1f} %" if math.isfinite(ratio) else "unknown"
