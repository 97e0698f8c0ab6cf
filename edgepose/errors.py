"""Every error that edgepose raises on purpose, with the exit code each one ends the program with.

    EdgeposeError                   1   base class; raised itself only for what has no better name
    ├── BadInput                    2   something the user handed over cannot be used
    │   ├── UsageError                  a wrong flag or combination of flags
    │   ├── RecipeError                 recipe, target or rules file
    │   ├── ImageError                  a still image or a raw frame
    │   ├── VideoError                  a video or an image folder
    │   ├── AnnotationError             labels: COCO keypoint JSON, boxes
    │   ├── CheckpointError             weights, plans and their JSON
    │   ├── OnnxError                   an ONNX file
    │   └── SpecError                   a model specification, or arrays that do not fit it
    ├── AccuracyRegression          3   the candidate is less accurate than the rules allow
    ├── LatencyRegression           4   the candidate is slower or bigger than the rules allow
    ├── ParityError                 5   two forms of one network disagree
    ├── EnvironmentFault            6   this machine cannot do it now
    │   ├── MissingDependency           a package is not installed; the text names the extra
    │   ├── BackendUnavailable          the package is here, the device or driver is not
    │   ├── DataUnavailable             a data set is not where it was looked for
    │   ├── StorageError                disk full, read-only, no permission
    │   └── NoisyMachine                timing spreads too far to decide anything
    ├── Inconclusive                7   more samples are needed for a verdict
    └── IntegrityError              8   hash or signature mismatch, engine of another host

Invariant: `str(error)` is one line that says what was found, what was expected and what to do.
"""

from __future__ import annotations

from typing import ClassVar


class EdgeposeError(Exception):
    """Base of all deliberate errors.

    Args:
        where: The file, field or argument at fault, most general part first ("train.json: annotation 17: bbox").
        found: What is there.
        expected: What should have been there.
        fix: What the user can do about it, as an imperative.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, where: str, *, found: str, expected: str = "", fix: str = "") -> None:
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        text = f"{where}: found {found}"
        if expected:
            text += f", expected {expected}"
        if fix:
            text += f"; {fix}"
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[object, ...]:
        """Keyword-only arguments do not survive the default pickling, and errors cross worker processes."""
        return (_rebuild, (type(self), self.where, self.found, self.expected, self.fix))


def _rebuild(kind: type[EdgeposeError], where: str, found: str, expected: str, fix: str) -> EdgeposeError:
    return kind(where, found=found, expected=expected, fix=fix)


class BadInput(EdgeposeError):
    exit_code = 2


class UsageError(BadInput):
    pass


class RecipeError(BadInput):
    pass


class ImageError(BadInput):
    pass


class VideoError(BadInput):
    pass


class AnnotationError(BadInput):
    pass


class CheckpointError(BadInput):
    pass


class OnnxError(BadInput):
    pass


class SpecError(BadInput):
    pass


class AccuracyRegression(EdgeposeError):
    exit_code = 3


class LatencyRegression(EdgeposeError):
    exit_code = 4


class ParityError(EdgeposeError):
    exit_code = 5


class EnvironmentFault(EdgeposeError):
    exit_code = 6


class MissingDependency(EnvironmentFault):
    """A package is not installed.

    Args:
        package: The distribution's name ("onnxruntime").
        extra: The edgepose extra that brings it ("ort").
        needed_for: What was being attempted ("running engines of backend onnxruntime").
    """

    def __init__(self, package: str, *, extra: str, needed_for: str) -> None:
        self.package, self.extra, self.needed_for = package, extra, needed_for
        super().__init__(
            needed_for,
            found=f"the package {package} is not installed",
            fix=f"run: pip install 'edgepose[{extra}]'",
        )

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild_missing, (self.package, self.extra, self.needed_for))


def _rebuild_missing(package: str, extra: str, needed_for: str) -> MissingDependency:
    return MissingDependency(package, extra=extra, needed_for=needed_for)


class BackendUnavailable(EnvironmentFault):
    pass


class DataUnavailable(EnvironmentFault):
    pass


class StorageError(EnvironmentFault):
    pass


class NoisyMachine(EnvironmentFault):
    pass


class Inconclusive(EdgeposeError):
    exit_code = 7


class IntegrityError(EdgeposeError):
    exit_code = 8
