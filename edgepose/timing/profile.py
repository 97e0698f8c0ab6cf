"""Profiling one engine of a bundle: latency with bounds, time per stage, throughput, memory, in a fresh process.

Invariant: a record says how and where it was measured and holds every sample; percentiles that the sample is too small
for are absent from it, not estimated.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np

from edgepose import host
from edgepose.bundle import read_bundle
from edgepose.engines import choose_engine
from edgepose.spec import Backend, Precision
from edgepose.timing.messages import Load
from edgepose.timing.pairs import load_average, running_worker
from edgepose.timing.record import BundleArm, ProfileProtocol, ProfileRecord, pack, percentiles

_SLICE_S = 0.25  # between two progress reports

Progress = Callable[[float, float], None]
"""Called with the seconds sampled and all seconds to sample."""


def profile(
    bundle_path: str | os.PathLike[str],
    protocol: ProfileProtocol | None = None,
    *,
    backend: Backend | None = None,
    precision: Precision | None = None,
    progress: Progress | None = None,
) -> ProfileRecord:
    """Profiles the engine of a bundle that `PoseEstimator.from_bundle` would choose, on synthetic frames.

    Args:
        bundle_path: The bundle's directory.
        protocol: How; None takes the defaults.
        backend: Take only engines of this runtime.
        precision: Take only engines of this precision.
        progress: Told a few times a second.

    Raises:
        BadInput: No bundle, or no such engine in it.
        EnvironmentFault: The runtime is not installed, or the measuring process died.
        IntegrityError: The engine was changed since the bundle was written.
    """
    protocol = protocol or ProfileProtocol()
    bundle = read_bundle(bundle_path)
    engine = choose_engine(bundle, backend, precision)
    arm = BundleArm(bundle.manifest.name, str(bundle.root), engine.backend, engine.precision, "frame", bundle.digest)
    threads = protocol.threads or engine.threads or host.physical_cores()
    load_before = load_average()
    with running_worker(arm.label, threads=threads, timeout_s=protocol.timeout_s) as worker:
        request = Load(arm, threads, protocol.persons, protocol.frame_hw, protocol.seed, protocol.warm_up_ms)
        ready = worker.load(request)
        parts, done_s = [], 0.0
        while done_s < protocol.duration_s:
            slice_s = min(_SLICE_S, protocol.duration_s - done_s)
            parts.append(worker.sample(slice_s))
            done_s += slice_s
            if progress is not None:
                progress(done_s, protocol.duration_s)
        facts = worker.finish()
    samples = np.concatenate(parts)
    whole = samples.sum(axis=1)
    return ProfileRecord(
        label=bundle.manifest.name,
        bundle_digest=bundle.digest,
        backend=engine.backend,
        precision=engine.precision,
        protocol=protocol,
        people=ready.people,
        host=host.fingerprint(),
        load_average=(load_before, load_average()),
        stages=ready.stages,
        samples_ns=pack(samples),
        latency=percentiles(whole),
        stage_ms=tuple(float(value) for value in np.median(samples, axis=0) / 1e6),
        persons_per_s=float(1e9 * ready.people * len(whole) / whole.sum()),
        facts=facts,
        cpu_share=facts.cpu_ns / max(facts.wall_ns, 1),
    )
