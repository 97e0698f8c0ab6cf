"""Do two forms of one network say the same? Checked after every step, with a report that says how far off they are.

Invariant: a report is data; it names the first output out of tolerance, the worst element, and the tolerance that would
have passed. Nothing here knows torch, ONNX or a backend: it compares named arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgepose.errors import EdgeposeError, ParityError
from edgepose.pose.codec import decode
from edgepose.runtime.session import Session
from edgepose.spec import Decoder

Arrays = Mapping[str, NDArray[Any]]


class Tolerance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far apart two outputs may be.

    Attributes:
        absolute: Allowed difference of an element, in the output's unit.
        relative: The same as a share of the reference output's largest magnitude; both are added. Elements near zero
            are judged by the whole output's scale, not by their own.
        outliers: Share of elements that may be further apart. Integer engines need it: a value on the edge between two
            codes may fall either way, and what follows amplifies that.
    """

    absolute: float = 0.0
    relative: float = 0.0
    outliers: float = 0.0


class OutputParity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One output of two forms of a network.

    Attributes:
        name: Name of the output.
        passed: Whether it is within tolerance.
        max_abs: Largest difference; infinite where one is NaN or the shapes differ.
        mean_abs: Mean difference.
        magnitude: Largest magnitude of the reference.
        allowed: Difference that was allowed.
        would_pass: The smallest allowed difference that would have passed, with the same share of outliers.
        worst_index: Where the largest difference is.
        reference: The reference's value there.
        candidate: The candidate's value there.
        problem: What makes comparing impossible, else empty.
    """

    name: str
    passed: bool
    max_abs: float
    mean_abs: float
    magnitude: float
    allowed: float
    would_pass: float
    worst_index: tuple[int, ...] = ()
    reference: float = 0.0
    candidate: float = 0.0
    problem: str = ""


class ParityReport(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All outputs of two forms of a network.

    Attributes:
        step: What was compared ("torch → ONNX").
        tolerance: What was allowed.
        outputs: One entry per output of the reference, in its order.
    """

    step: str
    tolerance: Tolerance
    outputs: tuple[OutputParity, ...]

    @property
    def passed(self) -> bool:
        return all(output.passed for output in self.outputs)

    @property
    def first_failure(self) -> OutputParity | None:
        return next((output for output in self.outputs if not output.passed), None)

    def raise_if_failed(self, error: type[EdgeposeError] = ParityError) -> None:
        """Raises `error` naming the first output out of tolerance."""
        failure = self.first_failure
        if failure is None:
            return
        if failure.problem:
            raise error(f"parity of {self.step}: {failure.name}", found=failure.problem, expected="comparable outputs")
        raise error(
            f"parity of {self.step}: {failure.name}",
            found=f"a difference of {failure.max_abs:.3g} at {list(failure.worst_index)} "
            f"({failure.reference:.6g} became {failure.candidate:.6g})",
            expected=f"at most {failure.allowed:.3g}",
            fix=f"look into the step, or allow an absolute {failure.would_pass:.3g}",
        )


class KeypointShift(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far keypoints move between two forms of a network, in pixels of the network's input.

    Attributes:
        mean_px: Mean distance.
        median_px: Median distance: where a network has no opinion a keypoint may jump anywhere, and means follow it.
        p95_px: 95th percentile.
        p99_px: 99th percentile.
        max_px: Largest distance.
        moved_share: Share of keypoints that moved by more than one pixel.
        logit_gap: Mean difference of raw outputs as a share of the reference's largest magnitude.
    """

    mean_px: float
    median_px: float
    p95_px: float
    max_px: float
    moved_share: float
    logit_gap: float
    p99_px: float = 0.0


def compare(step: str, reference: Arrays, candidate: Arrays, tolerance: Tolerance) -> ParityReport:
    """Compares outputs by name.

    Args:
        step: What is compared, for the report.
        reference: Arrays of any shape by output name.
        candidate: The same names and shapes; further names are ignored.
        tolerance: Allowed differences.
    """
    outputs = []
    for name, expected in reference.items():
        found = candidate.get(name)
        if found is None:
            outputs.append(_incomparable(name, "no such output"))
        elif np.shape(found) != np.shape(expected):
            outputs.append(_incomparable(name, f"shape {np.shape(found)} instead of {np.shape(expected)}"))
        else:
            outputs.append(_compare_one(name, expected, found, tolerance))
    return ParityReport(step=step, tolerance=tolerance, outputs=tuple(outputs))


def check_step(name: str, reference: Session, candidate: Session, feeds: Arrays, tolerance: Tolerance) -> ParityReport:
    """Runs two sessions on the same inputs and compares their outputs.

    Raises:
        ParityError: An output is out of tolerance.
    """
    report = compare(name, reference.infer(feeds), candidate.infer(feeds), tolerance)
    report.raise_if_failed()
    return report


def keypoint_shift(reference: Arrays, candidate: Arrays, decoder: Decoder) -> KeypointShift:
    """Decodes both outputs and measures how far apart the keypoints are.

    Args:
        reference: Outputs by name, batch first, as `decoder` expects them.
        candidate: The same.
        decoder: How outputs become keypoints.
    """
    (before, _), (after, _) = decode(reference, decoder), decode(candidate, decoder)
    distance = np.linalg.norm(np.asarray(before, np.float64) - np.asarray(after, np.float64), axis=-1)
    gaps = [
        float(np.mean(np.abs(np.asarray(candidate[name], np.float64) - value)) / max(np.max(np.abs(value)), 1e-12))
        for name, value in reference.items()
    ]
    return KeypointShift(
        mean_px=float(distance.mean()),
        median_px=float(np.median(distance)),
        p95_px=float(np.percentile(distance, 95)),
        max_px=float(distance.max()),
        moved_share=float(np.mean(distance > 1.0)),
        logit_gap=float(np.mean(gaps)),
        p99_px=float(np.percentile(distance, 99)),
    )


def _compare_one(name: str, reference: ArrayLike, candidate: ArrayLike, tolerance: Tolerance) -> OutputParity:
    expected, found = np.asarray(reference, np.float64), np.asarray(candidate, np.float64)
    if expected.size == 0:
        return OutputParity(name, passed=True, max_abs=0, mean_abs=0, magnitude=0, allowed=0, would_pass=0)
    for side, values in (("reference", expected), ("candidate", found)):
        broken = int(np.count_nonzero(~np.isfinite(values)))
        if broken:
            return _incomparable(name, f"{broken} values of the {side} that are NaN or infinite")
    difference = np.abs(expected - found)
    magnitude = float(np.max(np.abs(expected)))
    allowed = tolerance.absolute + tolerance.relative * magnitude
    worst = np.unravel_index(int(np.argmax(difference)), difference.shape)
    spared = int(tolerance.outliers * difference.size)
    would_pass = float(np.sort(difference, axis=None)[difference.size - 1 - spared])
    return OutputParity(
        name=name,
        passed=would_pass <= allowed,
        max_abs=float(difference[worst]),
        mean_abs=float(difference.mean()),
        magnitude=magnitude,
        allowed=allowed,
        would_pass=would_pass,
        worst_index=tuple(int(i) for i in worst),
        reference=float(expected[worst]),
        candidate=float(found[worst]),
    )


def _incomparable(name: str, problem: str) -> OutputParity:
    return OutputParity(
        name, passed=False, max_abs=float("inf"), mean_abs=float("inf"), magnitude=0.0, allowed=0.0,
        would_pass=float("inf"), problem=problem,
    )  # fmt: skip
