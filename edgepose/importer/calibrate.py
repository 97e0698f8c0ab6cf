"""Ranges of a foreign float graph's values, from what they are on calibration images.

Invariant: an image adds extremes and nothing else, so that hundreds of them fit into any memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, assert_never

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from edgepose.compress.ranges import Range
from edgepose.errors import OnnxError
from edgepose.importer.placement import Placement, activation_key
from edgepose.runtime.ort import OrtSession

Estimator = Literal["minmax", "mean-minmax", "median-minmax", "quantile"]

_BATCH = 32  # images whose extremes are taken together
_TAIL = 1e-4  # of values on each side that "quantile" leaves out


def calibrated(
    placement: Placement, images: Iterable[NDArray[np.float32]], *, estimator: Estimator, symmetric: bool
) -> tuple[Range, ...]:
    """Ranges of the values that a placement quantises.

    Args:
        placement: Which values.
        images: (B, 3, h, w) float32 each, as the network takes them.
        estimator: How a range follows from the values: the extremes of all; the mean or median of the extremes of
            batches of 32 images; the mean of each image's 1e-4 quantiles.
        symmetric: Signed codes around 0, as TensorRT takes them; else codes 0..255 with a zero point.

    Raises:
        OnnxError: A value is not finite, or there are no images.
    """
    graph = ir.to_proto(placement.model)
    names = [name for name in placement.activations if name != graph.graph.input[0].name]
    outputs = {value.name for value in graph.graph.output}
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in outputs)
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in placement.activations}
    with tempfile.TemporaryDirectory(prefix="edgepose-") as folder:
        onnx.save(graph, Path(folder, "open.onnx"))
        session = OrtSession(Path(folder, "open.onnx"), threads=1)
        try:
            for image in images:
                values = session.infer({session.inputs[0].name: image}) | {session.inputs[0].name: image}
                for name, found in seen.items():
                    found.append(_extremes(name, values[name], estimator))
        finally:
            session.close()
    return tuple(_range(name, found, estimator, symmetric=symmetric) for name, found in seen.items())


def _extremes(name: str, values: NDArray[np.float32], estimator: Estimator) -> tuple[float, float]:
    if not np.isfinite(values).all():
        raise OnnxError(f"calibration: {name}", found="NaN or infinite values", expected="numbers")
    if estimator == "quantile":
        low, high = np.quantile(values, [_TAIL, 1 - _TAIL])
        return float(low), float(high)
    return float(values.min()), float(values.max())


def _range(name: str, found: list[tuple[float, float]], estimator: Estimator, *, symmetric: bool) -> Range:
    if not found:
        raise OnnxError("calibration", found="no images", expected="some", fix="add --data DIR")
    pairs = np.asarray(found, np.float64)
    if estimator in ("mean-minmax", "median-minmax"):
        parts = [pairs[start : start + _BATCH] for start in range(0, len(pairs), _BATCH)]
        pairs = np.stack([np.array([part[:, 0].min(), part[:, 1].max()]) for part in parts])
    match estimator:
        case "minmax":
            low, high = pairs[:, 0].min(), pairs[:, 1].max()
        case "mean-minmax" | "quantile":
            low, high = pairs.mean(0)
        case "median-minmax":
            low, high = np.median(pairs, 0)
        case _:
            assert_never(estimator)
    key = activation_key(name)
    if symmetric:
        scale = np.float32(max(abs(low), abs(high), 1e-9) / 127)
        return Range(key, "activation", (float(scale),), (0,), -128, 127)
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32(max(high - low, 1e-9) / 255)
    zero = int(np.clip(np.round(-low / float(scale)), 0, 255))
    return Range(key, "activation", (float(scale),), (zero,), 0, 255)
