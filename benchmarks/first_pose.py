"""`python benchmarks/first_pose.py raw|edgepose BUNDLE THREADS`: one pose, then the end; what is timed is the process.

Invariant: both kinds read the same engine and answer the same crop; neither imports what it does not need.
"""

from __future__ import annotations

import sys
from pathlib import Path


def raw(bundle: str, threads: int) -> None:
    """What somebody writes who has the engine's file and ONNX Runtime: read, crop, infer, take the highest bins."""
    import cv2
    import numpy as np
    import onnxruntime

    (path,) = Path(bundle).glob("engines/*/onnxruntime/*.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    frame = np.zeros((480, 640, 3), np.uint8)
    height, width = session.get_inputs()[0].shape[2:]
    crop = cv2.warpAffine(frame, np.array([[0.25, 0, 0], [0, 0.25, 0]]), (width, height))
    images = (crop.astype(np.float32) / 255).transpose(2, 0, 1)[None]
    x, y = session.run(None, {session.get_inputs()[0].name: np.ascontiguousarray(images)})[:2]
    print(x.argmax(-1), y.argmax(-1))


def edgepose(bundle: str, threads: int) -> None:
    """The same by an estimator."""
    import numpy as np

    from edgepose import PoseEstimator

    with PoseEstimator.from_bundle(bundle, "onnxruntime", threads) as estimator:
        print(estimator(np.zeros((480, 640, 3), np.uint8)).keypoints)


if __name__ == "__main__":
    sys.path[0] = ""  # instead of this folder, whose name must not hide the package
    {"raw": raw, "edgepose": edgepose}[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
