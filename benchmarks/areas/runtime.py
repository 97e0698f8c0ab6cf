"""The runtime: what it adds to the raw backend, how it starts, whether it leaks, what it survives, how still it is.

Invariant: a ratio's arms run the same file with the same threads in the same minutes, taking turns; nothing is compared
with a figure of another run.
"""

from __future__ import annotations

import itertools
import os
import re
import statistics
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.claim import Claim, Measured
from benchmarks.context import THREADS, Context
from benchmarks.soak import soak
from benchmarks.subjects import compiled, val_people
from edgepose.bundle import Bundle
from edgepose.errors import EnvironmentFault, MissingDependency
from edgepose.spec import Backend, Execution, OpenvinoOptions
from edgepose.timing.record import CallableArm

NETWORK = "kpe-t"  # whatever the runtime adds shows most on the smallest network
_ARMS = "benchmarks.runtime_arms"
_SOAK, _FULL_SOAK = 60_000, 1_000_000
_FAULTS = 500
_ROUNDS = {"importing": 20, "first poses": 15}
_REPOSITORY = Path(__file__).resolve().parents[2]


def small(context: Context) -> Bundle:
    """The bundle that the runtime is measured with."""
    return compiled(context, NETWORK, "ptq-int8")


# ----------------------------------------------------------------------------------------------- what a call adds


def session_overhead(context: Context) -> Measured:
    """Microseconds that `Session.infer` adds to the raw call of the same session, the worse of both backends.

    20 µs are allowed, or 2 % of the call where that is more; then the value is scaled so that 20 is the bar.
    """
    rows: dict[str, dict[str, float]] = {}
    for backend in ("onnxruntime", "openvino"):
        context.told(f"session overhead in {backend}", 0, 1)
        whole, raw = _calls(small(context), backend)
        whole_us, raw_us = _in_turns(whole, raw)
        allowed = max(20.0, 0.02 * raw_us)
        rows[backend] = {"raw_us": raw_us, "added_us": whole_us - raw_us, "allowed_us": allowed}
    value = max(20.0 * row["added_us"] / row["allowed_us"] for row in rows.values())
    text = "; ".join(f"{b}: {r['added_us']:+.1f} µs on {r['raw_us']:.0f} µs" for b, r in rows.items())
    return Measured(value, text, {"backends": rows})


def session_allocations(context: Context) -> Measured:
    """Bytes that `Session.infer` allocates at once beyond what the raw call of the same session does."""
    rows: dict[str, float] = {}
    for backend in ("onnxruntime", "openvino"):
        whole, raw = _calls(small(context), backend)
        rows[backend] = float(_allocated(whole) - _allocated(raw))
    text = "; ".join(f"{backend}: {value:+.0f} bytes" for backend, value in rows.items())
    return Measured(max(rows.values()), f"{text}; the network's smallest tensor has thousands", {"bytes": rows})


def _calls(bundle: Bundle, backend: Backend) -> tuple[Callable[[], object], Callable[[], object]]:
    """`Session.infer` and the library's own call, over one session and the same crop."""
    from benchmarks.runtime_arms import crops
    from edgepose.engines import choose_engine, open_engine

    session: Any = open_engine(bundle, choose_engine(bundle, backend), THREADS, None)
    images = crops(bundle, 1)
    name = session.inputs[0].name
    feeds = {name: images}
    if backend == "onnxruntime":
        # The library's own object inside the session: the point is to time the very same one.
        library, names = vars(session)["_session"], [tensor.name for tensor in session.outputs]
        return lambda: session.infer(feeds), lambda: library.run(names, feeds)
    request = vars(session)["_requests"][0]

    def raw() -> object:
        found = request.infer(feeds, share_inputs=True, share_outputs=False)
        return [found[index] for index in range(len(session.outputs))]

    return lambda: session.infer(feeds), raw


def _in_turns(first: Callable[[], object], second: Callable[[], object], rounds: int = 3000) -> tuple[float, float]:
    """Median microseconds of two calls that alternate."""
    times: tuple[list[int], list[int]] = ([], [])
    for number in range(rounds):
        for place in (0, 1) if number % 2 else (1, 0):
            call = (first, second)[place]
            started = time.perf_counter_ns()
            call()
            times[place].append(time.perf_counter_ns() - started)
    warm = rounds // 10
    return statistics.median(times[0][warm:]) / 1e3, statistics.median(times[1][warm:]) / 1e3


def _allocated(call: Callable[[], object]) -> int:
    """Most bytes that Python and NumPy hold at once during a call, above what they held before."""
    for _ in range(20):
        call()
    found = []
    tracemalloc.start()
    try:
        for _ in range(20):
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            call()
            found.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()
    return int(statistics.median(found))


# ---------------------------------------------------------------------------------------------------- frame to poses


def frame_ratio(people: int) -> Callable[[Context], Measured]:
    """Frame to poses over the raw backend call on the same crops; rtmlib beside it where it is installed."""

    def measure(context: Context) -> Measured:
        from edgepose.timing.turns import time_in_turns

        arms = [_arm("raw", context, people), _arm("frame", context, people)]
        if find_spec("rtmlib") is not None:
            arms.append(_arm("rtmlib", context, people))
        turns = time_in_turns(arms, context.effort.ratio, context.step(f"frames of {people}: turns"))
        found = turns.between(0, 1)
        text = f"{found.ratio:.3f} [{found.ci95[0]:.3f}, {found.ci95[1]:.3f}] x the raw call for {people}"
        detail: dict[str, Any] = {"ratio": found.ratio, "ci95": list(found.ci95), "people": people}
        if len(arms) > 2:
            other = turns.between(0, 2)
            text += f"; rtmlib {other.ratio:.3f} [{other.ci95[0]:.3f}, {other.ci95[1]:.3f}]"
            detail["rtmlib"] = {"ratio": other.ratio, "ci95": list(other.ci95)}
        else:
            text += "; rtmlib is not installed"
        return Measured(found.ratio, text, detail)

    return measure


def _arm(function: str, context: Context, people: int) -> CallableArm:
    settings = {"bundle": str(small(context).root), "people": people, "threads": THREADS}
    return CallableArm(function, f"{_ARMS}:{function}", settings)


def rtmlib_difference(context: Context) -> Measured:
    """Pixels of the crop between keypoints and rtmlib's own of the same file, 95th percentile of sure joints.

    rtmlib takes the highest bin of each axis, this project the place where most probability lies: where a network
    leaves two peaks the two differ by design, so that only joints that it is sure of are compared.
    """
    if find_spec("rtmlib") is None:
        fix = "run: pip install --no-deps rtmlib tqdm (what it depends on would replace this project's OpenCV)"
        raise EnvironmentFault("rtmlib", found="the package is not installed", fix=fix)
    from benchmarks.runtime_arms import rtmlib_model
    from edgepose.data.coco import read_image
    from edgepose.estimator import PoseEstimator

    bundle = small(context)
    model, shifts = rtmlib_model(bundle, THREADS), []
    people = val_people(context).sample(256, 0).persons
    with PoseEstimator.from_bundle(bundle.root, "onnxruntime", THREADS, aim="none") as estimator:
        for number, person in enumerate(people):
            context.told("keypoints of rtmlib and of edgepose", number, len(people))
            picture, box = read_image(person.image), person.box_xyxy
            ours, (theirs, _) = estimator(picture, box[None]), model(picture, [box])
            crop_px = 1.25 * max(box[2] - box[0], box[3] - box[1]) / max(bundle.manifest.spec.preprocess.input_hw)
            sure = ours.scores[0] >= _SURE
            shifts += (np.hypot(*(ours.keypoints[0] - theirs[0]).T)[sure] / crop_px).tolist()
    value = float(np.quantile(shifts, 0.95))
    text = f"px of the crop: median {np.median(shifts):.3f}, 95th percentile {value:.3f} over {len(shifts)} joints"
    return Measured(value, text, {"joints": len(shifts), "median_px": float(np.median(shifts))})


_SURE = 0.5


# -------------------------------------------------------------------------------------------------- many frames, start


def throughput(context: Context) -> Measured:
    """People per second over those of OpenVINO's own benchmark_app, both asked for throughput, in turns."""
    from benchmarks.runtime_arms import crops
    from edgepose.engines import choose_engine, open_engine

    bundle = small(context)
    engine = choose_engine(bundle, "openvino")
    session = open_engine(bundle, engine, THREADS, Execution(openvino=OpenvinoOptions(hint="throughput")))
    images = np.repeat(crops(bundle, 1), 64, axis=0)
    feeds = {session.inputs[0].name: images}
    shape = f"[1,{','.join(map(str, images.shape[1:]))}]"
    model, rows = bundle.root / engine.path, []
    for number in range(5):
        context.told("throughput in turns with benchmark_app", number, 5)
        theirs = _benchmark_app(model, shape)
        rows.append((_people_per_s(lambda: session.infer(feeds), len(images)), theirs))
    session.close()
    ratios = [ours / theirs for ours, theirs in rows]
    text = f"{statistics.median(ratios):.3f} x, of five turns {', '.join(f'{ratio:.3f}' for ratio in ratios)}"
    return Measured(statistics.median(ratios), text, {"people_per_s": rows})


def _people_per_s(call: Callable[[], object], people: int, seconds: float = 5.0) -> float:
    call()
    done, started_s = 0, time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        call()
        done += people
    return done / (time.perf_counter() - started_s)


def _benchmark_app(model: Path, shape: str) -> float:
    program = Path(sys.executable).with_name("benchmark_app")
    command = [str(program), "-m", str(model), "-d", "CPU", "-hint", "throughput", "-t", "5", "-data_shape", shape]
    if not program.exists():
        raise MissingDependency("openvino", extra="openvino", needed_for="OpenVINO's benchmark_app")
    ran = subprocess.run([*command, "-nthreads", str(THREADS)], capture_output=True, text=True, check=False)
    said = re.search(r"Throughput:\s*([\d.]+)\s*FPS", ran.stdout)
    if said is None:
        raise EnvironmentFault("benchmark_app", found=(ran.stderr or ran.stdout)[-300:], expected="a throughput")
    return float(said[1])


def import_time(context: Context) -> Measured:
    """Milliseconds that `import edgepose` takes above `import numpy`, fresh processes in turns."""
    lines = ("import numpy", "import edgepose", "from edgepose import PoseEstimator", "import cv2")
    numpy_ms, edgepose_ms, estimator_ms, cv2_ms = _processes(
        context, "importing", [[sys.executable, "-c", line] for line in lines]
    )
    value = edgepose_ms - numpy_ms
    text = (
        f"{value:+.1f} ms on {numpy_ms:.0f} ms, interpreter included; {estimator_ms - numpy_ms:+.1f} ms with "
        f"PoseEstimator, of which OpenCV takes {cv2_ms - numpy_ms:.1f} ms"
    )
    times = {"numpy_ms": numpy_ms, "edgepose_ms": edgepose_ms, "estimator_ms": estimator_ms, "cv2_ms": cv2_ms}
    return Measured(value, text, times)


def cold_start(context: Context) -> Measured:
    """Process start to first pose over the same with the raw backend; what engine to run is known."""
    root = small(context).root
    from edgepose.estimator import PoseEstimator

    PoseEstimator.from_bundle(root, "onnxruntime").close()  # measured once, remembered from now on
    programs = [
        [sys.executable, str(_REPOSITORY / "benchmarks" / "first_pose.py"), kind, str(root), str(THREADS)]
        for kind in ("raw", "edgepose")
    ]
    raw_ms, whole_ms = _processes(context, "first poses", programs)
    text = f"{whole_ms / raw_ms:.3f} x {raw_ms:.0f} ms: interpreter, imports, loading, first answer"
    return Measured(whole_ms / raw_ms, text, {"raw_ms": raw_ms, "edgepose_ms": whole_ms})


def _processes(context: Context, what: str, programs: Sequence[Sequence[str]]) -> list[float]:
    """Median milliseconds from start to end of some programs that take turns."""
    times: list[list[float]] = [[] for _ in programs]
    environment = {**os.environ, "PYTHONPATH": str(_REPOSITORY)}
    rounds = _ROUNDS[what]
    for number in range(rounds):
        context.told(what, number, rounds)
        for place in range(len(programs)) if number % 2 else reversed(range(len(programs))):
            started_s = time.perf_counter()
            subprocess.run(programs[place], check=True, capture_output=True, env=environment)
            times[place].append(1e3 * (time.perf_counter() - started_s))
    return [statistics.median(row[2:]) for row in times]


# ----------------------------------------------------------------------------------------------------- long runs


def soak_growth(context: Context) -> Measured:
    """Megabytes that an estimator gains over many inferences; with a leak on purpose it has to be seen."""
    count = _FULL_SOAK if context.full else _SOAK
    found = soak(small(context).root, count, progress=context.step("soaking"))
    leaky = soak(small(context).root, _SOAK // 4, leak_bytes=1024, progress=context.step("soaking with a leak"))
    grown = found.descriptors > 0 or found.threads > 0
    value = float("inf") if leaky.clean or grown else found.growth_mb
    text = (
        f"{found.growth_mb:+.2f} MB on {found.start_mb:.0f} MB over {count} inferences, {found.descriptors:+d} "
        f"descriptors, {found.threads:+d} threads; with 1 kB kept of each: {leaky.growth_mb:+.1f} MB over "
        f"{leaky.inferences}, {'not ' if leaky.clean else ''}noticed"
    )
    return Measured(value, text, {"inferences": count, "growth_mb": found.growth_mb, "start_mb": found.start_mb})


def faults_survived(context: Context) -> Measured:
    """Injected faults after which the frame had the right answer, marked as degraded, within a second."""
    from benchmarks.faults import KINDS, Faulty
    from edgepose.engines import choose_engine, open_engine, open_isolated
    from edgepose.estimator import PoseEstimator
    from edgepose.runtime.guard import Guard, Standby
    from edgepose.timing.engine_stages import synthetic_frame

    bundle = small(context)
    engine = choose_engine(bundle, "onnxruntime")
    faulty = Faulty(lambda: open_isolated(bundle, engine, THREADS, None))
    guard = Guard(
        faulty,
        [
            Standby("first", faulty.opened, patience_s=0.3),
            Standby("second", lambda: open_engine(bundle, engine, THREADS, None)),
        ],
        clock=itertools.count(0, 1000.0).__next__,  # a failed engine is given its next chance at once
    )
    frame, boxes = synthetic_frame((480, 640), 1, 0)
    survived, slowest_s, wrong = 0, 0.0, []
    with PoseEstimator(guard, bundle.manifest.spec) as estimator:
        right = estimator(frame, boxes).keypoints
        for number in range(_FAULTS):
            context.told("injecting faults", number, _FAULTS)
            faulty.next_fault = kind = KINDS[number % len(KINDS)]
            started_s = time.perf_counter()
            poses = estimator(frame, boxes)
            took_s = time.perf_counter() - started_s
            slowest_s = max(slowest_s, took_s)
            good = np.array_equal(poses.keypoints, right) and poses.degraded and took_s < 1.0
            survived += good
            if not good:
                wrong.append(kind)
    faulty.end()
    text = f"{survived} of {_FAULTS} ({', '.join(KINDS)} in turn), the slowest answer after {slowest_s:.2f} s"
    return Measured(survived, text, {"kinds": list(KINDS), "wrong": wrong, "slowest_s": slowest_s})


# -------------------------------------------------------------------------------------------------------- stillness


def jitter(context: Context) -> Measured:
    """Standard deviation of keypoints on a still clip with a camera's noise, INT8, smoothed; pixels of the crop."""
    rows = {
        f"{recipe} {clip} {'smoothed' if smooth else 'raw'}": _jitter_px(context, recipe, clip, smooth=smooth)
        for recipe in ("fp32", "ptq-int8")
        for clip in ("still", "translated")
        for smooth in (False, True)
    }
    text = ", ".join(f"{name} {value:.3f}" for name, value in rows.items())
    return Measured(rows["ptq-int8 still smoothed"], f"px of the crop: {text}", {"px": rows})


_FRAMES, _FPS, _NOISE, _STEP_PX = 60, 30.0, 4.0, 0.5


def _jitter_px(context: Context, recipe: str, clip: str, *, smooth: bool) -> float:
    from edgepose.estimator import PoseEstimator
    from edgepose.pose.smoothing import SmoothingState, smooth_people

    bundle, spread = compiled(context, NETWORK, recipe), []
    with PoseEstimator.from_bundle(bundle.root, "onnxruntime", THREADS, aim="none") as estimator:
        for person in val_people(context).sample(12, 0).persons:
            seen, state = [], SmoothingState()
            box = person.box_xyxy
            for number, (picture, moved) in enumerate(_clip(person.image, clip)):
                found = estimator(picture, box[None] + np.tile(moved, 2)).keypoints
                if smooth:
                    found, state = smooth_people(state, [1], found, number / _FPS)
                seen.append(found[0] - moved)
            crop_px = 1.25 * max(box[2] - box[0], box[3] - box[1]) / max(bundle.manifest.spec.preprocess.input_hw)
            spread.append(np.std(np.stack(seen)[10:], axis=0).mean() / crop_px)
    return float(np.median(spread))


def _clip(image: Path, clip: str) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.float64]]]:
    """Frames of a photograph as a camera with noise sees it, and by how much the picture has moved, (2,) pixels."""
    import cv2

    from edgepose.data.coco import read_image

    picture, rng = read_image(image), np.random.default_rng(0)
    for number in range(_FRAMES):
        moved = np.array([_STEP_PX * number if clip == "translated" else 0.0, 0.0])
        shift = np.array([[1, 0, moved[0]], [0, 1, moved[1]]])
        size = picture.shape[1] + int(_STEP_PX * _FRAMES) + 1, picture.shape[0]
        frame = np.asarray(cv2.warpAffine(picture, shift, size, flags=cv2.INTER_LINEAR), np.float32)
        noisy = frame + rng.normal(0, _NOISE, frame.shape)
        yield np.clip(noisy, 0, 255).astype(np.uint8), moved


CLAIMS = (
    Claim("runtime.session_overhead_us", "µs", "<= 20", "what Session.infer adds to the raw call", session_overhead),
    Claim(
        "runtime.session_alloc_bytes",
        "bytes",
        "<= 4096",
        "what Session.infer allocates beyond the raw call",
        session_allocations,
    ),
    Claim("runtime.frame_ratio_1", "x", "<= 1.15", "frame to poses over the raw call, 1 person", frame_ratio(1)),
    Claim("runtime.frame_ratio_8", "x", "<= 1.15", "frame to poses over the raw call, 8 people", frame_ratio(8)),
    Claim("runtime.rtmlib_px", "px", "<= 0.5", "keypoints against rtmlib's on the same file", rtmlib_difference),
    Claim("runtime.throughput_ratio", "x", ">= 0.95", "people per second over benchmark_app's", throughput),
    Claim("runtime.import_ms", "ms", "<= 60", "import edgepose above import numpy", import_time, needs=()),
    Claim("runtime.cold_start_ratio", "x", "<= 1.2", "process start to first pose over the raw backend's", cold_start),
    Claim("runtime.soak_growth_mb", "MB", "<= 5", "resident memory gained over many inferences", soak_growth),
    Claim("runtime.faults_survived", "faults", ">= 500", "injected faults that cost no frame", faults_survived),
    Claim("runtime.jitter_px", "px", "<= 1.0", "keypoints on a still clip, INT8, smoothed", jitter),
)
