"""Stages of engines over synthetic input: one inference, or a whole frame cut into crop, infer and decode.

Invariant: both arms of a comparison are fed the same bytes, which depend on shapes and the seed alone; and the three
stages together compute exactly what `PoseEstimator` computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose import engines
from edgepose.bundle import Bundle, read_bundle
from edgepose.errors import IntegrityError
from edgepose.golden import check_golden
from edgepose.pose.codec import decode, people_candidates
from edgepose.pose.one_stage import people_of
from edgepose.pose.preprocess import crop_transforms, network_input, to_source, warp
from edgepose.runtime import Session, open_session
from edgepose.spec import Engine, ModelSpec, OneStage, TensorSpec
from edgepose.timing.harness import Stage
from edgepose.timing.messages import Load
from edgepose.timing.record import BundleArm, ModelArm

_FREE_SIDE = 256  # of a free dimension that is not the batch; only networks without a fixed input size have one


@dataclass(frozen=True, slots=True)
class EngineStages:
    """A loaded engine, ready to be timed.

    Attributes:
        stages: (name, callable) in order.
        backend: Backend that runs.
        session: The loaded engine; whoever opened it closes it.
        people: Items per call; an engine of fixed batch is fed as many as it takes.
    """

    stages: tuple[tuple[str, Stage], ...]
    backend: str
    session: Session
    people: int


def open_engine(arm: BundleArm | ModelArm, request: Load) -> EngineStages:
    """Loads the engine of an arm.

    Raises:
        BadInput: The bundle or the file cannot be used.
        EnvironmentFault: The runtime cannot be used here.
        IntegrityError: The engine was changed since its bundle was written.
        ParityError: It strays from the golden vectors.
    """
    if isinstance(arm, ModelArm):
        session = open_session(
            arm.path, arm.backend, threads=request.threads, precision=arm.precision, execution=arm.execution
        )
        return EngineStages(infer_stages(session, request), arm.backend, session, _batch_of(session, request))
    bundle = read_bundle(arm.path)
    if arm.digest not in ("", bundle.digest):
        raise IntegrityError(
            f"bundle {arm.path}",
            found=f"digest {bundle.digest[:12]}…",
            expected=f"{arm.digest[:12]}…, which it had when the measurement began",
            fix="measure again, and do not replace bundles meanwhile",
        )
    engine = _engine_of(bundle, arm)
    session = engines.open_engine(bundle, engine, request.threads, arm.execution)
    if arm.golden:
        check_golden(bundle, engine, session)
    if arm.timed == "infer":
        stages = infer_stages(session, request)
    else:
        stages = frame_stages(session, bundle.manifest.spec, request)
    return EngineStages(stages, engine.backend, session, _batch_of(session, request))


def _engine_of(bundle: Bundle, arm: BundleArm) -> Engine:
    if arm.engine:
        return engines.named_engine(bundle, arm.engine, arm.backend)
    return engines.choose_engine(bundle, arm.backend, arm.precision)


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


def infer_stages(session: Session, request: Load) -> tuple[tuple[str, Stage], ...]:
    """The only stage of a bare inference."""
    feeds = synthetic_feeds(session.inputs, batch=request.batch, seed=request.seed)

    def infer() -> object:
        return session.infer(feeds)

    return (("infer", infer),)


@dataclass(slots=True)
class FrameCall:
    """One call of `PoseEstimator` cut into its stages, each of which leaves its result for the next.

    Attributes:
        session: The loaded network.
        spec: What it eats and says.
        frame: (H, W, 3) uint8 BGR.
        boxes: (N, 4) float64 xyxy, pixels of the frame.
        transforms: (N, 2, 3) float64, frame → input.
        images: (N, 3, h, w) float32, or (N, h, w, 3) uint8 where the network takes images.
        outputs: The network's answers by name.
        keypoints: (N, K, 2) float32, pixels of the frame.
        scores: (N, K) float32.
    """

    session: Session
    spec: ModelSpec
    frame: NDArray[np.uint8]
    boxes: NDArray[np.float64]
    transforms: NDArray[np.float64] | None = None
    images: NDArray[Any] | None = None
    outputs: Mapping[str, NDArray[Any]] | None = None
    keypoints: NDArray[np.float32] | None = None
    scores: NDArray[np.float32] | None = None

    def crop(self) -> None:
        preprocess = self.spec.preprocess
        self.transforms = crop_transforms(self.boxes, preprocess)
        crops = warp(self.frame, self.transforms, preprocess.input_hw, preprocess.border)
        self.images = network_input(crops, self.spec)

    def infer(self) -> None:
        assert self.images is not None
        self.outputs = self.session.infer({self.spec.inputs[0].name: self.images})

    def decode(self) -> None:
        assert self.outputs is not None
        assert self.transforms is not None
        decoder = self.spec.decoder
        if isinstance(decoder, OneStage):
            said = people_candidates(self.outputs, decoder)
            people = [people_of(said, frame, decoder) for frame in range(len(self.boxes))]
            for transform, found in zip(self.transforms, people, strict=True):
                to_source(found.keypoints.reshape(1, -1, 2), transform[None])
            return
        keypoints, self.scores = decode(self.outputs, self.spec.decoder)
        self.keypoints = to_source(keypoints, self.transforms)


def frame_stages(session: Session, spec: ModelSpec, request: Load) -> tuple[tuple[str, Stage], ...]:
    """The stages of finding the poses of a synthetic frame: crop, infer, decode."""
    frame, boxes = synthetic_frame(request.frame_hw, _batch_of(session, request), request.seed)
    if isinstance(spec.decoder, OneStage):  # it is shown the frame, as often as it takes at once
        boxes = np.tile([0.0, 0.0, request.frame_hw[1], request.frame_hw[0]], (len(boxes), 1))
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


def _batch_of(session: Session, request: Load) -> int:
    first = session.inputs[0].shape[0]
    return first if isinstance(first, int) else request.batch
