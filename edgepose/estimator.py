"""From a frame to the poses of its people: check, crop, infer once for all of them, decode, map back.

Invariant: whatever is wrong with a frame or a box is said before anything is computed, and the caller's arrays are
neither kept nor changed.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgepose.bundle import Bundle, read_bundle
from edgepose.engines import Opened, open_engine, open_first, runnable_engines
from edgepose.errors import AnnotationError, ImageError, SpecError
from edgepose.pose.codec import decode, named_output, output_names, people_candidates
from edgepose.pose.flip import merge_flipped, mirror_images, mirror_order
from edgepose.pose.one_stage import owners, people_of
from edgepose.pose.preprocess import crop_transforms, network_input, to_source, warp
from edgepose.runtime import Session, SessionFacts, facts_of
from edgepose.runtime.guard import PATIENCE_S, Answer, Guard, Standby
from edgepose.spec import Aim, Backend, Engine, Execution, ModelSpec, OneStage, Poses, Precision, Regression

if TYPE_CHECKING:
    from edgepose.selection import Selection

MAX_BATCH = 64
"""People inferred at once; more are taken in turns, so that a crowd cannot exhaust the memory."""

_log = logging.getLogger("edgepose")
_PATIENCE = 20.0  # times the measured duration of a full batch
_LARGEST = float(np.finfo(np.float32).max)  # poses carry their boxes as float32
_MAX_SIDE_PX = 32766  # OpenCV's warp counts source pixels in 16 bits


@dataclass(frozen=True, slots=True)
class EstimatorInfo:
    """What an estimator runs.

    Attributes:
        name: Name of the network.
        backend: Runtime that executes it ("" for a session of the caller's own).
        engine: The bundle's engine; None for a session of the caller's own.
        bundle_digest: Digest of the bundle; empty without one.
        threads: Threads it was opened with; 0 stands for all physical cores.
        input_hw: Height and width of the network's input in pixels.
        keypoints: Names, in output order.
        flip_test: Whether each crop is also shown mirrored and the two answers are averaged.
        passed_over: Why engines that the bundle prefers to this one do not run here, one line each.
        selection: What was measured to choose it; None where nothing was.
        facts: What the runtime itself says of it: which device executes which nodes; None where it does not tell.
    """

    name: str
    backend: str
    engine: Engine | None
    bundle_digest: str
    threads: int
    input_hw: tuple[int, int]
    keypoints: tuple[str, ...]
    flip_test: bool = False
    passed_over: tuple[str, ...] = ()
    selection: Selection | None = None
    facts: SessionFacts | None = None


@dataclass(frozen=True, slots=True)
class EstimatorOptions:
    """What is seldom asked for when an estimator is opened.

    Attributes:
        flip_test: Show each crop mirrored as well and average the two answers: a little better, and twice the work.
        execution: Providers, device and the rest; None takes what the engine was made for.
        strict: Raise where the chosen engine fails, instead of answering by the next one.
        told: Told while engines are measured: what is measured, how many settings are done, how many there are.
    """

    flip_test: bool = False
    execution: Execution | None = None
    strict: bool = False
    told: Callable[[str, int, int], None] | None = None


class PoseEstimator:
    """Finds the keypoints of the people in a frame; a context manager. Threads may share it.

    Args:
        session: The loaded network; the estimator closes it.
        spec: What it eats and says.
        backend: Passed on in the poses.
        flip_test: Show each crop mirrored as well and average the two answers: a little better, and twice the work.

    Raises:
        SpecError: The session does not fit the specification, or the flip test lacks the keypoints' flip pairs.
    """

    def __init__(self, session: Session, spec: ModelSpec, *, backend: str = "", flip_test: bool = False) -> None:
        self._batch = _check_session(session, spec)
        if flip_test:
            if isinstance(spec.decoder, OneStage):
                fix = "leave the flip test off"
                raise SpecError("flip test", found="a one-stage network", expected="one that is shown persons", fix=fix)
            mirror_order(spec.keypoints)
        self._session = session
        self._lock = threading.Lock()
        self._spec = spec
        hw, names = spec.preprocess.input_hw, spec.keypoints.names
        self._info = EstimatorInfo(spec.name, backend, None, "", 0, hw, names, flip_test)

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str],
        backend: Backend | None = None,
        threads: int | None = None,
        precision: Precision | None = None,
        *,
        aim: Aim | Literal["none"] | None = None,
        options: EstimatorOptions | None = None,
    ) -> Self:
        """Loads the engine of a bundle that serves an aim best on this machine.

        The first start with a bundle measures what there is to choose from, engines and numbers of threads, in
        processes of their own, after a check on the golden vectors: seconds. Later starts remember (`selection`).

        An engine of another machine is passed over for the next one: a warning of the logger "edgepose" and
        `info().passed_over` name the field that differs and the command that builds it anew.

        Args:
            path: The bundle's directory.
            backend: Take only engines of this runtime; one that does not run here is then an error.
            threads: Threads of one inference, 0 for all physical cores; None takes what the engine was made for.
            precision: Take only engines of this precision.
            aim: What to choose for: latency, throughput, memory, energy; "none" takes the first engine that runs, as
                the bundle lists them, and measures nothing. None takes $EDGEPOSE_AIM, else latency.
            options: What is seldom asked for; None takes the defaults.

        Raises:
            BadInput: `path` is no bundle, none of its engines is of that backend and precision, there is no such aim,
                or the flip test lacks the keypoints' flip pairs.
            IntegrityError: The engine was changed since the bundle was written, or all of them are for other machines.
            EnvironmentFault: No suitable runtime is installed here; the text names the extras to install.
        """
        options = options or EstimatorOptions()
        bundle = read_bundle(path)
        candidates = runnable_engines(bundle, backend, precision)
        wishes = [(engine, threads) for engine in candidates]
        selection = None
        if (wanted := aim or os.environ.get("EDGEPOSE_AIM") or "latency") != "none":
            from edgepose.selection import Wishes, preferred  # what it measures with takes time to import

            asked = Wishes(cast("Aim", wanted), threads, options.execution)  # an aim that is none is refused there
            selection, wishes = preferred(bundle, candidates, asked, options.told)
        opened = open_first(bundle, wishes, options.execution, named=backend is not None)
        engine = opened.engine
        session = _guarded(bundle, opened, options, selection)
        try:
            estimator = cls(session, bundle.manifest.spec, backend=engine.backend, flip_test=options.flip_test)
        except BaseException:
            session.close()
            raise
        spec = bundle.manifest.spec
        out = selection.passed_over if selection is not None and selection.best is not None else ()
        for fault in out:
            _log.warning("%s; running %s %s meanwhile", fault, engine.backend, engine.precision)
        estimator._info = EstimatorInfo(
            name=spec.name,
            backend=engine.backend,
            engine=engine,
            bundle_digest=bundle.digest,
            threads=opened.threads,
            input_hw=spec.preprocess.input_hw,
            keypoints=spec.keypoints.names,
            flip_test=options.flip_test,
            passed_over=(*out, *opened.passed_over),
            selection=selection,
        )
        return estimator

    @property
    def spec(self) -> ModelSpec:
        """What the network eats and says."""
        return self._spec

    def info(self) -> EstimatorInfo:
        """What runs: network, engine, backend."""
        return replace(self._info, facts=facts_of(self._session))

    def __call__(self, frame: NDArray[np.uint8], boxes: ArrayLike | None = None) -> Poses:
        """Finds one pose per box.

        Args:
            frame: (H, W, 3) uint8 BGR.
            boxes: (N, 4) xyxy, pixels of the frame, x right, y down; None takes the whole frame as one person.
                A one-stage network is shown the whole frame and finds its people itself: None takes them all, and each
                box gets the pose whose own box overlaps it most, NaN with scores of 0 where none does.

        Returns:
            Poses in pixels of the frame, in the order of `boxes`; none for no boxes. Its arrays are read-only.

        Raises:
            ImageError: The frame is not (H, W, 3) uint8.
            AnnotationError: A box is not finite, empty or outside the frame; names the row.
        """
        _check_frame(frame)
        frame = np.ascontiguousarray(frame)  # else OpenCV would copy a view once per box
        height, width = frame.shape[:2]
        if isinstance(self._spec.decoder, OneStage):
            wanted = None if boxes is None else _check_boxes(boxes, height, width)
            return self._whole_frame(frame, wanted, self._spec.decoder)
        checked = np.array([[0.0, 0.0, width, height]]) if boxes is None else _check_boxes(boxes, height, width)
        shape = len(checked), self._spec.keypoints.count
        found = _Found(
            keypoints=np.empty((*shape, 2), np.float32),
            scores=np.empty(shape, np.float32),
            visibility=np.empty(shape, np.float32) if self._spec.visibility else None,
            errors_px=np.empty(shape, np.float32) if self._spec.uncertainty else None,
        )
        served: list[Answer] = []
        for start in range(0, len(checked), self._batch or MAX_BATCH):
            part = slice(start, start + (self._batch or MAX_BATCH))
            for whole, piece in zip(found, self._infer(frame, checked[part], served), strict=True):
                if whole is not None:
                    whole[part] = piece
        return self._poses(found, checked, served)

    def _poses(self, found: _Found, boxes: NDArray[Any], served: Sequence[Answer]) -> Poses:
        taken = boxes.astype(np.float32)
        for array in (*found, taken):
            if array is not None:
                array.setflags(write=False)
        backend = served[-1].engine if served else self._info.backend
        degraded = any(answer.degraded for answer in served)
        return Poses(found.keypoints, found.scores, taken, backend, found.visibility, found.errors_px, degraded)

    def _whole_frame(self, frame: NDArray[np.uint8], wanted: NDArray[np.float64] | None, decoder: OneStage) -> Poses:
        """The people that a one-stage network finds, or those of them that are in the boxes asked for."""
        height, width = frame.shape[:2]
        transforms = crop_transforms(np.array([[0.0, 0.0, width, height]]), self._spec.preprocess)
        served: list[Answer] = []
        said = people_candidates(self._outputs(frame, transforms, served), decoder)
        if said.keypoints.shape[2] != self._spec.keypoints.count:
            found = f"{said.keypoints.shape[2]} keypoints"
            raise SpecError("network", found=found, expected=f"{self._spec.keypoints.count}")
        people = people_of(said, 0, decoder)
        keypoints = to_source(people.keypoints.reshape(1, -1, 2), transforms).reshape(people.keypoints.shape)
        corners = to_source(people.boxes.reshape(1, -1, 2), transforms).reshape(-1, 4)
        boxes = np.clip(corners, 0, np.array([width, height, width, height], np.float32))
        if wanted is None:
            return self._poses(_Found(keypoints, people.keypoint_scores, None, None), boxes, served)
        rows = owners(wanted, boxes)
        mine = np.full((len(wanted), *keypoints.shape[1:]), np.nan, np.float32)
        scores = np.zeros(mine.shape[:2], np.float32)
        mine[rows >= 0], scores[rows >= 0] = keypoints[rows[rows >= 0]], people.keypoint_scores[rows[rows >= 0]]
        return self._poses(_Found(mine, scores, None, None), wanted, served)

    def _outputs(
        self, frame: NDArray[np.uint8], transforms: NDArray[np.float64], served: list[Answer]
    ) -> Mapping[str, NDArray[Any]]:
        """What the network says of at most one batch of crops, merged with what it says of their mirror images."""
        spec, preprocess = self._spec, self._spec.preprocess
        images = network_input(warp(frame, transforms, preprocess.input_hw, preprocess.border), spec)
        if self._batch > len(images):  # an engine of fixed batch gets blank people to fill it up
            blank = np.zeros((self._batch - len(images), *images.shape[1:]), images.dtype)
            images = np.concatenate([images, blank])
        outputs = self._ask(images, served)
        if self._info.flip_test:
            mirrored = self._ask(mirror_images(images), served)
            outputs = merge_flipped(outputs, mirrored, spec)
        return {name: value[: len(transforms)] for name, value in outputs.items()}

    def _ask(self, images: NDArray[Any], served: list[Answer]) -> Mapping[str, NDArray[Any]]:
        feeds = {self._spec.inputs[0].name: images}
        if isinstance(self._session, Guard):
            served.append(self._session.answer(feeds))
            return served[-1].outputs
        with self._lock:  # of a session only one thread at a time may ask
            return self._session.infer(feeds)

    def _infer(self, frame: NDArray[np.uint8], boxes: NDArray[np.float64], served: list[Answer]) -> _Found:
        """What the network says of at most one batch of boxes."""
        spec, count = self._spec, len(boxes)
        transforms = crop_transforms(boxes, spec.preprocess)
        outputs = self._outputs(frame, transforms, served)
        keypoints, scores = decode(outputs, spec.decoder)
        expected = (count, spec.keypoints.count, 2)
        if keypoints.shape != expected:
            raise SpecError("network", found=f"keypoints of shape {keypoints.shape}", expected=f"{expected}")
        size = f"(N, {spec.keypoints.count})"
        visibility = errors_px = None
        if spec.visibility:
            visibility = np.exp(-np.logaddexp(np.float32(0), -named_output(outputs, spec.visibility, size)))
        if spec.uncertainty:
            scale = transforms[:, 0, :1]  # input pixels per source pixel
            with np.errstate(over="ignore"):  # no idea at all is an infinite error
                errors_px = np.exp(named_output(outputs, spec.uncertainty, size)) / scale
        return _Found(to_source(keypoints, transforms), scores, visibility, errors_px)

    def close(self) -> None:
        """Frees the network; calling it twice is harmless."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _guarded(bundle: Bundle, opened: Opened, options: EstimatorOptions, selection: Selection | None) -> Guard:
    """The engines that are left as one session that outlives those that fail."""
    times_ms = {(t.engine, t.backend): t.ms or 0.0 for t in reversed(selection.trials)} if selection else {}
    kept = ((opened.engine, opened.threads), *(() if options.strict else opened.rest))
    engines = [
        Standby(
            engine.backend,
            partial(open_engine, bundle, engine, threads, options.execution),
            max(PATIENCE_S, _PATIENCE * times_ms.get((engine.path, engine.backend), 0.0) * MAX_BATCH / 1e3),
        )
        for engine, threads in kept
    ]
    return Guard(opened.session, engines)


class _Found(NamedTuple):
    """What a network says of n people: `Poses` without their boxes."""

    keypoints: NDArray[np.float32]
    scores: NDArray[np.float32]
    visibility: NDArray[np.float32] | None
    errors_px: NDArray[Any] | None


def _check_session(session: Session, spec: ModelSpec) -> int:
    """Whether the session fits the specification; returns its batch size, 0 where that is free."""
    where = f"session of {spec.name}"
    if len(spec.inputs) != 1 or [tensor.name for tensor in session.inputs] != [spec.inputs[0].name]:
        found = f"inputs {[tensor.name for tensor in session.inputs]}"
        raise SpecError(where, found=found, expected=f"{[tensor.name for tensor in spec.inputs]}, exactly one")
    height, width = spec.preprocess.input_hw
    shape, dtype = session.inputs[0].shape, "uint8" if spec.takes_images else "float32"
    expected = (height, width, 3) if spec.takes_images else (3, height, width)
    fits = len(shape) == 4 and all(isinstance(a, str) or a == b for a, b in zip(shape[1:], expected, strict=True))
    if not fits or session.inputs[0].dtype != dtype:
        found = f"input of shape {shape} and dtype {session.inputs[0].dtype}"
        raise SpecError(where, found=found, expected=f"(batch, {', '.join(map(str, expected))}) and {dtype}")
    decoder = spec.decoder
    if isinstance(decoder, Regression) and decoder.input_hw != spec.preprocess.input_hw:
        found = f"a decoder for inputs of {decoder.input_hw}"
        raise SpecError(where, found=found, expected=f"the network's own, {spec.preprocess.input_hw}")
    needed = {*output_names(decoder), *filter(None, (spec.visibility, spec.uncertainty))}
    if missing := needed - {tensor.name for tensor in session.outputs}:
        found = f"outputs {[tensor.name for tensor in session.outputs]}"
        raise SpecError(where, found=found, expected=f"{sorted(missing)} among them")
    return shape[0] if isinstance(shape[0], int) else 0


def _check_frame(frame: Any) -> None:
    expected = "(H, W, 3) uint8 BGR"
    if not isinstance(frame, np.ndarray):
        raise ImageError("frame", found=type(frame).__name__, expected=f"a NumPy array, {expected}")
    shape = frame.shape
    fix = ""
    if len(shape) == 2 or (len(shape) == 3 and shape[2] == 1):
        fix = "convert grey to colour: cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR)"
    elif len(shape) == 3 and shape[2] == 4:
        fix = "drop the fourth channel: cv2.cvtColor(frame, cv2.COLOR_BGRA2BGR)"
    elif len(shape) == 3 and shape[0] == 3 and shape[2] != 3:
        fix = "put the channels last: frame.transpose(1, 2, 0)"
    elif len(shape) == 4:
        fix = "pass one frame at a time"
    if len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ImageError("frame", found=f"shape {shape}", expected=expected, fix=fix)
    if frame.dtype != np.uint8:
        fix = "scale it to 0..255 and convert it with .astype(numpy.uint8)"
        raise ImageError("frame", found=f"dtype {frame.dtype}", expected=expected, fix=fix)
    if max(shape[:2]) > _MAX_SIDE_PX:
        fix = "scale it down or cut it up"
        raise ImageError("frame", found=f"shape {shape}", expected=f"sides of at most {_MAX_SIDE_PX} pixels", fix=fix)


def _check_boxes(boxes: ArrayLike, height: int, width: int) -> NDArray[np.float64]:
    """The boxes as (N, 4) float64, each finite, not empty and at least partly inside the frame."""
    expected = "(N, 4) numbers, x1 y1 x2 y2 in pixels of the frame"
    try:
        checked = np.array(boxes, np.float64)
    except (TypeError, ValueError) as err:
        raise AnnotationError("boxes", found=f"{type(boxes).__name__} ({err})", expected=expected) from err
    if checked.size == 0 and checked.ndim in (1, 2):
        return checked.reshape(0, 4)
    if checked.ndim != 2 or checked.shape[1] != 4:
        fix = "put it into a list: [box]" if checked.shape == (4,) else ""
        raise AnnotationError("boxes", found=f"shape {checked.shape}", expected=expected, fix=fix)
    for row, (x1, y1, x2, y2) in enumerate(checked.tolist()):
        where, found = f"boxes: row {row}", f"[{x1:g}, {y1:g}, {x2:g}, {y2:g}]"
        if not (np.abs(checked[row]) <= _LARGEST).all():  # false for NaN as well
            raise AnnotationError(where, found=found, expected="finite pixel coordinates")
        if x2 == x1 or y2 == y1:
            raise AnnotationError(where, found=f"{found}, of zero size", expected="x2 > x1 and y2 > y1")
        if x2 < x1 or y2 < y1:
            fix = "swap the corners, or convert x, y, width, height to corners"
            raise AnnotationError(where, found=f"{found}, in the wrong order", expected="x1 y1 x2 y2", fix=fix)
        if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
            frame = f"a box that touches the frame, {width} pixels wide and {height} high"
            raise AnnotationError(where, found=f"{found}, outside the frame", expected=frame)
    return checked
