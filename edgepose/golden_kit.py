"""The golden-vector kit: what a program in another language has to reproduce, step by step, to use a bundle.

A frame and a box, the crop's transform, the network's input, its raw outputs, keypoints in pixels of the frame, as .npy
files, and a kit.json that says what they are and how near is near enough.

Invariant: everything in a kit was computed by the functions that `PoseEstimator` calls, from the frames that lie in it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.bundle import Bundle, golden_vectors
from edgepose.engines import choose_engine, open_engine
from edgepose.errors import UsageError
from edgepose.pose.codec import decode
from edgepose.pose.preprocess import crop_transforms, network_input, to_source, warp
from edgepose.spec import ModelSpec, OneStage
from edgepose.storage import atomic_directory, json_bytes

_PEOPLE = 3
_FRAME_HW = (480, 640)
_TOLERANCES = {"tensor": 0.05, "keypoints_px": 0.5}
"""Other warps round pixels differently, by one step of 255; and joints of other roundings move a little."""


def write_kit(bundle: Bundle, out: Path) -> int:
    """Writes the kit of a bundle.

    Args:
        bundle: The bundle; its golden crops become the people of the frames.
        out: Folder of the kit; it must not exist.

    Returns:
        How many people there are in it.

    Raises:
        UsageError: A one-stage network, a bundle without golden vectors, or `out` is taken.
        EnvironmentFault: No engine of the bundle runs here.
    """
    spec, golden = bundle.manifest.spec, golden_vectors(bundle)
    if golden is None or isinstance(spec.decoder, OneStage):
        found = "a bundle without golden vectors" if golden is None else "a one-stage network"
        raise UsageError("--kit", found=found, expected="a network that is shown one person, and golden vectors")
    engine = choose_engine(bundle)
    session = open_engine(bundle, engine, None, None)
    try:
        with atomic_directory(out) as folder:
            people = [
                _person(spec, session.infer, crop, folder, number)
                for number, crop in enumerate(_pictures(golden.inputs[:_PEOPLE], spec))
            ]
            tolerances = bundle.manifest.golden.tolerances.get(engine.path, {}) if bundle.manifest.golden else {}
            document = {
                "network": spec.name,
                "bundle": bundle.digest,
                "onnx": bundle.manifest.model,
                "engine": engine.path,
                "spec": msgspec.to_builtins(spec),
                "frames": "(H, W, 3) uint8 BGR; x right, y down, integer coordinates are pixel centres",
                "tolerances": {**{k: v for k, v in tolerances.items() if k != "keypoints_px"}, **_TOLERANCES},
                "people": people,
            }
            (folder / "kit.json").write_bytes(json_bytes(document))
    finally:
        session.close()
    return len(people)


def _person(spec: ModelSpec, infer: Any, crop: NDArray[np.uint8], folder: Path, number: int) -> dict[str, Any]:
    frame, box = _frame(crop, number)
    transforms = crop_transforms(box[None], spec.preprocess)
    crops = warp(frame, transforms, spec.preprocess.input_hw, spec.preprocess.border)
    tensor = network_input(crops, spec)
    outputs = infer({spec.inputs[0].name: tensor})
    keypoints, scores = decode(outputs, spec.decoder)
    arrays = {
        "frame": frame, "box": box, "transform": transforms[0], "tensor": tensor,
        "keypoints": to_source(keypoints, transforms)[0], "scores": scores[0],
        **{f"output-{name}": np.asarray(value) for name, value in outputs.items()},
    }  # fmt: skip
    files = {}
    for name, array in arrays.items():
        files[name] = f"{number}-{name}.npy"
        np.save(folder / files[name], array, allow_pickle=False)
    return files


def _pictures(inputs: NDArray[Any], spec: ModelSpec) -> list[NDArray[np.uint8]]:
    """What the golden inputs look like: (h, w, 3) uint8 BGR each."""
    if spec.takes_images:
        return [np.asarray(image, np.uint8) for image in inputs]
    mean, std = (np.array(v, np.float64).reshape(3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std))
    planes = np.clip(np.round(inputs.astype(np.float64) * std + mean), 0, 255).astype(np.uint8)
    if spec.preprocess.color == "rgb":
        planes = planes[:, ::-1]
    return list(planes.transpose(0, 2, 3, 1))


def _frame(crop: NDArray[np.uint8], number: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A frame with the crop in it, larger and off the centre, and the (4,) box around it, pixels."""
    height, width = _FRAME_HW
    scale = min((height - 40) / crop.shape[0], (width - 40) / crop.shape[1]) * (0.7 + 0.1 * number)
    size = int(crop.shape[1] * scale), int(crop.shape[0] * scale)
    frame = np.full((height, width, 3), 114, np.uint8)
    x, y = 15 + 9 * number, height - size[1] - 7 - 3 * number
    frame[y : y + size[1], x : x + size[0]] = cv2.resize(crop, size, interpolation=cv2.INTER_CUBIC)
    inset = 0.1
    corners = [x + inset * size[0], y + inset * size[1], x + (1 - inset) * size[0], y + (1 - inset) * size[1]]
    return frame, np.array(corners)
