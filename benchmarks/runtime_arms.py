"""What the claims about the runtime time: the raw backend, this project around it, rtmlib around it.

Each function is called in a process of its own and returns what is timed there. Invariant: all of them look at the same
frame and the same boxes, run the same file with the same number of threads, and their idle threads sleep.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.bundle import Bundle, check_engine, read_bundle
from edgepose.engines import choose_engine
from edgepose.estimator import PoseEstimator
from edgepose.pose.preprocess import crop_transforms, network_input, warp
from edgepose.timing.engine_stages import synthetic_frame

FRAME_HW = (480, 640)


def raw(bundle: str, people: int, threads: int) -> Callable[[], object]:
    """ONNX Runtime's own call on crops that are there already."""
    found = read_bundle(bundle)
    session, images = raw_session(str(engine_file(found)), threads), crops(found, people)
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: images})


def frame(bundle: str, people: int, threads: int) -> Callable[[], object]:
    """A frame and its boxes to poses, as an app calls it."""
    estimator = PoseEstimator.from_bundle(bundle, "onnxruntime", threads, aim="none")
    picture, boxes = synthetic_frame(FRAME_HW, people, 0)
    return lambda: estimator(picture, boxes)


def rtmlib(bundle: str, people: int, threads: int) -> Callable[[], object]:
    """The same by rtmlib, which infers one person after the other."""
    found = read_bundle(bundle)
    model = rtmlib_model(found, threads)
    picture, boxes = synthetic_frame(FRAME_HW, people, 0)
    return lambda: model(picture, boxes)


def raw_session(path: str, threads: int) -> Any:
    """A session of ONNX Runtime as edgepose opens it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    for pool in ("intra", "inter"):
        options.add_session_config_entry(f"session.{pool}_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def rtmlib_model(bundle: Bundle, threads: int) -> Any:
    """rtmlib's top-down network over the engine of a bundle, its session replaced by one of as many threads."""
    from rtmlib import RTMPose

    preprocess = bundle.manifest.spec.preprocess
    height, width = preprocess.input_hw
    if preprocess.color != "bgr":  # rtmlib does not turn colours round
        mean, std = preprocess.mean[::-1], preprocess.std[::-1]
    else:
        mean, std = preprocess.mean, preprocess.std
    path = str(engine_file(bundle))
    model = RTMPose(path, model_input_size=(width, height), mean=mean, std=std, backend="onnxruntime", device="cpu")
    model.session = raw_session(path, threads)
    return model


def engine_file(bundle: Bundle) -> Path:
    """The bundle's engine of ONNX Runtime."""
    return check_engine(bundle, choose_engine(bundle, "onnxruntime"))


def crops(bundle: Bundle, people: int) -> NDArray[Any]:
    """The people of the frame as the network eats them."""
    picture, boxes = synthetic_frame(FRAME_HW, people, 0)
    spec = bundle.manifest.spec
    transforms = crop_transforms(boxes, spec.preprocess)
    return np.ascontiguousarray(
        network_input(warp(picture, transforms, spec.preprocess.input_hw, spec.preprocess.border), spec)
    )
