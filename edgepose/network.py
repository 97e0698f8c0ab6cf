"""A loaded network and its specification: from a frame to the poses of its people.

Check, crop, infer once for all of them, decode, map back.

Invariant: whatever is wrong with a frame or a box is said before anything is computed, and the caller's arrays are
neither kept nor changed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgepose.errors import AnnotationError, ImageError, SpecError
from edgepose.pose.codec import decode, named_output, output_names, people_candidates
from edgepose.pose.flip import merge_flipped, mirror_images, mirror_order
from edgepose.pose.one_stage import owners, people_of
from edgepose.pose.preprocess import crop_transforms, network_input, to_source, warp
from edgepose.runtime import Session
from edgepose.runtime.guard import Answer, Guard
from edgepose.spec import ModelSpec, OneStage, Poses, Regression

MAX_BATCH = 64
"""People inferred at once; more are taken in turns, so that a crowd cannot exhaust the memory."""

_LARGEST = float(np.finfo(np.float32).max)  # poses carry their boxes as float32
_MAX_SIDE_PX = 32766  # OpenCV's warp counts source pixels in 16 bits


class Network:
    """A session that is asked about people. Threads may share it.

    Args:
        session: The loaded network.
        spec: What it eats and says.
        backend: Passed on in the poses, where the session does not tell itself.
        flip_test: Show each crop mirrored as well and average the two answers.

    Raises:
        SpecError: The session does not fit the specification, or the flip test lacks the keypoints' flip pairs.
    """

    def __init__(self, session: Session, spec: ModelSpec, *, backend: str, flip_test: bool) -> None:
        self._batch = _check_session(session, spec)
        if flip_test:
            if isinstance(spec.decoder, OneStage):
                fix = "leave the flip test off"
                raise SpecError("flip test", found="a one-stage network", expected="one that is shown persons", fix=fix)
            mirror_order(spec.keypoints)
        self.session, self.spec = session, spec
        self._backend, self._flip_test = backend, flip_test
        self._lock = threading.Lock()

    def find(self, frame: NDArray[np.uint8], boxes: ArrayLike | None) -> Poses:
        """Finds one pose per box: see `PoseEstimator.__call__`."""
        _check_frame(frame)
        frame = np.ascontiguousarray(frame)  # else OpenCV would copy a view once per box
        height, width = frame.shape[:2]
        if isinstance(self.spec.decoder, OneStage):
            wanted = None if boxes is None else _check_boxes(boxes, height, width)
            return self._whole_frame(frame, wanted, self.spec.decoder)
        checked = np.array([[0.0, 0.0, width, height]]) if boxes is None else _check_boxes(boxes, height, width)
        shape = len(checked), self.spec.keypoints.count
        found = _Found(
            keypoints=np.empty((*shape, 2), np.float32),
            scores=np.empty(shape, np.float32),
            visibility=np.empty(shape, np.float32) if self.spec.visibility else None,
            errors_px=np.empty(shape, np.float32) if self.spec.uncertainty else None,
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
        backend = served[-1].engine if served else self._backend
        degraded = any(answer.degraded for answer in served)
        return Poses(found.keypoints, found.scores, taken, backend, found.visibility, found.errors_px, degraded)

    def _whole_frame(self, frame: NDArray[np.uint8], wanted: NDArray[np.float64] | None, decoder: OneStage) -> Poses:
        """The people that a one-stage network finds, or those of them that are in the boxes asked for."""
        height, width = frame.shape[:2]
        transforms = crop_transforms(np.array([[0.0, 0.0, width, height]]), self.spec.preprocess)
        served: list[Answer] = []
        said = people_candidates(self._outputs(frame, transforms, served), decoder)
        if said.keypoints.shape[2] != self.spec.keypoints.count:
            found = f"{said.keypoints.shape[2]} keypoints"
            raise SpecError("network", found=found, expected=f"{self.spec.keypoints.count}")
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
        spec, preprocess = self.spec, self.spec.preprocess
        images = network_input(warp(frame, transforms, preprocess.input_hw, preprocess.border), spec)
        if self._batch > len(images):  # an engine of fixed batch gets blank people to fill it up
            blank = np.zeros((self._batch - len(images), *images.shape[1:]), images.dtype)
            images = np.concatenate([images, blank])
        outputs = self._ask(images, served)
        if self._flip_test:
            mirrored = self._ask(mirror_images(images), served)
            outputs = merge_flipped(outputs, mirrored, spec)
        return {name: value[: len(transforms)] for name, value in outputs.items()}

    def _ask(self, images: NDArray[Any], served: list[Answer]) -> Mapping[str, NDArray[Any]]:
        feeds = {self.spec.inputs[0].name: images}
        if isinstance(self.session, Guard):
            served.append(self.session.answer(feeds))
            return served[-1].outputs
        with self._lock:  # of a session only one thread at a time may ask
            return self.session.infer(feeds)

    def _infer(self, frame: NDArray[np.uint8], boxes: NDArray[np.float64], served: list[Answer]) -> _Found:
        """What the network says of at most one batch of boxes."""
        spec, count = self.spec, len(boxes)
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
