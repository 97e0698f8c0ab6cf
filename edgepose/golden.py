"""The golden check: does an engine, on this machine, still answer what it answered when its bundle was compiled?

Invariant: the comparison uses the tolerances of the manifest and nothing else; its error names the first quantity out
of tolerance and the tolerance that would have passed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgepose.bundle import Bundle, golden_vectors
from edgepose.errors import ParityError
from edgepose.pose.codec import decode
from edgepose.runtime.session import Session, infer_all
from edgepose.spec import Engine

KEYPOINTS = "keypoints_px"
"""The quantity that stands for decoded keypoints, among the names of the outputs."""


@dataclass(frozen=True, slots=True)
class GoldenCheck:
    """How far one engine strays from the golden vectors.

    Attributes:
        engine: Path of the engine in the bundle.
        differences: Largest absolute difference of each output, by name, and the median shift of the keypoints
            ("keypoints_px"): a keypoint that the network has no opinion on may jump anywhere.
        tolerances: What the manifest allows, for those that it bounds.
    """

    engine: str
    differences: dict[str, float]
    tolerances: dict[str, float]


def check_golden(bundle: Bundle, engine: Engine, session: Session) -> GoldenCheck | None:
    """Runs the golden inputs and compares; None where the bundle has no golden vectors.

    Args:
        bundle: Holds the vectors and tolerances.
        engine: The engine that `session` has loaded.
        session: Executes it.

    Raises:
        ParityError: An output or the keypoints are out of tolerance.
        IntegrityError: The golden files were changed.
    """
    golden = golden_vectors(bundle)
    if golden is None or bundle.manifest.golden is None:
        return None
    spec = bundle.manifest.spec
    outputs = infer_all(session, {spec.inputs[0].name: golden.inputs})
    differences = {name: _largest(outputs[name], expected) for name, expected in golden.outputs.items()}
    differences[KEYPOINTS] = _median_shift(decode(outputs, spec.decoder)[0], golden.keypoints)
    tolerances = bundle.manifest.golden.tolerances.get(engine.path, {})
    for name, allowed in tolerances.items():
        found = differences.get(name, np.inf)
        if not found <= allowed:  # a NaN is out of tolerance too
            raise ParityError(
                f"golden check of {engine.path}: {name}",
                found=f"a largest difference of {found:.4g}",
                expected=f"at most {allowed:.4g}",
                fix=f"a tolerance of {found:.4g} would have passed; compile again on this kind of machine",
            )
    return GoldenCheck(engine.path, differences, tolerances)


def _largest(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.max(np.abs(found.astype(np.float64) - expected), initial=0.0))


def _median_shift(found: np.ndarray, expected: np.ndarray) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float(np.median(np.linalg.norm(found.astype(np.float64) - expected, axis=-1)))
