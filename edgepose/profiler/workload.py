"""What a worker runs: an arm turned into stages, callables without arguments over synthetic input.

Invariant: both arms of a comparison are fed the same bytes, which depend on shapes and the seed alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.bundle import check_engine, read_bundle
from edgepose.errors import UsageError
from edgepose.estimator import choose_engine
from edgepose.pose.codec import decode
from edgepose.pose.preprocess import crop_transforms, normalise, to_source, warp
from edgepose.profiler.harness import Stage
from edgepose.profiler.messages import Load
from edgepose.profiler.record import BundleArm, CallableArm, ModelArm
from edgepose.runtime import Session, open_session
from edgepose.spec import ModelSpec, TensorSpec

_FREE_SIDE = 256  # of a free dimension that is not the batch; only networks without a fixed input size have one


@dataclass(frozen=True, slots=True)
class Workload:
    """What is timed.

    Attributes:
        stages: (name, callable) in order; one run of all is a call.
        backend: Backend that runs, "" for a callable.
        close: Frees it.
        people: Items per call; an engine of fixed batch is fed as many as it takes.
    """

    stages: tuple[tuple[str, Stage], ...]
    backend: str
    close: Callable[[], None]
    people: int = 1


def open_workload(request: Load) -> Workload:
    """Loads the arm of a request.

    Raises:
        EdgeposeError: The bundle, the model or the factory cannot be used here.
    """
    match request.arm:
        case BundleArm():
            return _bundle_workload(request.arm, request)
        case ModelArm() as arm:
            session = open_session(
                arm.path, arm.backend, threads=request.threads, precision=arm.precision, spinning=arm.spinning
            )
            return _session_workload(session, arm.backend, request)
        case CallableArm() as arm:
            return Workload((("call", _made_by(arm)),), "", lambda: None)


def synthetic_feeds(inputs: tuple[TensorSpec, ...], *, batch: int, seed: int) -> dict[str, NDArray[Any]]:
    """Random inputs of the right shapes and dtypes: what a normalised image looks like for floats, 0..255 for integers.

    Args:
        inputs: The network's inputs.
        batch: Size of a free first dimension.
        seed: Of the values.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, NDArray[Any]] = {}
    for spec in inputs:
        shape = [
            size if isinstance(size, int) else _FREE_SIDE if axis else batch for axis, size in enumerate(spec.shape)
        ]
        dtype = np.dtype(spec.dtype)
        values = (
            rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2 if dtype.kind == "b" else 127, shape)
        )
        feeds[spec.name] = values.astype(dtype)
    return feeds


def _bundle_workload(arm: BundleArm, request: Load) -> Workload:
    bundle = read_bundle(arm.path)
    engine = choose_engine(bundle, arm.backend, arm.precision)
    file = check_engine(bundle, engine)
    session = open_session(file, engine.backend, threads=request.threads, precision=engine.precision)
    if arm.timed == "infer":
        return _session_workload(session, engine.backend, request)
    people = _batch_of(session, request)
    stages = frame_stages(session, bundle.manifest.spec, request)
    return Workload(stages, engine.backend, session.close, people)


def _session_workload(session: Session, backend: str, request: Load) -> Workload:
    feeds = synthetic_feeds(session.inputs, batch=request.batch, seed=request.seed)

    def infer() -> object:
        return session.infer(feeds)

    return Workload((("infer", infer),), backend, session.close, _batch_of(session, request))


def _batch_of(session: Session, request: Load) -> int:
    first = session.inputs[0].shape[0]
    return first if isinstance(first, int) else request.batch


@dataclass(slots=True)
class FrameCall:
    """One call of `PoseEstimator` cut into its stages, each of which leaves its result for the next.

    Attributes:
        session: The loaded network.
        spec: What it eats and says.
        frame: (H, W, 3) uint8 BGR.
        boxes: (N, 4) float64 xyxy, pixels of the frame.
        transforms: (N, 2, 3) float64, frame → input.
        images: (N, 3, h, w) float32.
        outputs: The network's answers by name.
        keypoints: (N, K, 2) float32, pixels of the frame.
        scores: (N, K) float32.
    """

    session: Session
    spec: ModelSpec
    frame: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    transforms: NDArray[np.float64] | None = None
    images: NDArray[np.float32] | None = None
    outputs: Mapping[str, NDArray[Any]] | None = None
    keypoints: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None

    def crop(self) -> None:
        preprocess = self.spec.preprocess
        self.transforms = crop_transforms(self.boxes, preprocess)
        self.images = normalise(warp(self.frame, self.transforms, preprocess.input_hw), preprocess)

    def infer(self) -> None:
        assert self.images is not None
        self.outputs = self.session.infer({self.spec.inputs[0].name: self.images})

    def decode(self) -> None:
        assert self.outputs is not None
        assert self.transforms is not None
        keypoints, self.scores = decode(self.outputs, self.spec.decoder)
        self.keypoints = to_source(keypoints, self.transforms)


def frame_stages(session: Session, spec: ModelSpec, request: Load) -> tuple[tuple[str, Stage], ...]:
    """The stages of finding the poses of a synthetic frame: crop, infer, decode."""
    frame, boxes = synthetic_frame(request.frame_hw, _batch_of(session, request), request.seed)
    call = FrameCall(session, spec, frame, boxes)
    return (("crop", call.crop), ("infer", call.infer), ("decode", call.decode))


def synthetic_frame(frame_hw: tuple[int, int], people: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A frame of noise, (H, W, 3) uint8 BGR, and (people, 4) float64 xyxy boxes inside it, in its pixels."""
    rng = np.random.default_rng(seed)
    height, width = frame_hw
    frame = rng.integers(0, 256, (height, width, 3), np.uint8)
    corners = rng.uniform(0, 0.4, (people, 2)) * (width, height)
    sizes = rng.uniform(0.3, 0.6, (people, 2)) * (width, height)
    return frame, np.concatenate([corners, corners + sizes], axis=1)


def _made_by(arm: CallableArm) -> Stage:
    """Calls the factory of an arm.

    Raises:
        UsageError: It cannot be found, or does not return a callable.
    """
    where, (place, _, name) = f"arm {arm.label}: factory", arm.factory.rpartition(":")
    expected = "'package.module:function' or 'path/to/file.py:function'"
    if not place or not name:
        raise UsageError(where, found=repr(arm.factory), expected=expected)
    try:
        factory = getattr(_module(place), name)
    except (ImportError, AttributeError, FileNotFoundError) as err:
        raise UsageError(where, found=f"{arm.factory!r}, which cannot be loaded ({err})", expected=expected) from err
    made = factory(**arm.arguments)
    if not callable(made):
        raise UsageError(where, found=f"{type(made).__name__} from {arm.factory}", expected="a callable")
    call: Stage = made
    return call


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{place} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
