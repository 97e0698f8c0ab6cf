"""edgepose takes a trained pose network to devices; these are the public names of the half that runs it.

    import edgepose

    with edgepose.PoseEstimator.from_bundle("kpe-s.bundle") as estimator:
        poses = estimator(frame, boxes)

Invariant: importing this package costs what NumPy costs; each name loads its module when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgepose.bundle import Bundle as Bundle
    from edgepose.bundle import read_bundle as read_bundle
    from edgepose.bundle import verify_bundle as verify_bundle
    from edgepose.errors import EdgeposeError as EdgeposeError
    from edgepose.estimator import PoseEstimator as PoseEstimator
    from edgepose.runtime import open_session as open_session
    from edgepose.runtime.session import Session as Session
    from edgepose.spec import Keypoints as Keypoints
    from edgepose.spec import ModelSpec as ModelSpec
    from edgepose.spec import Poses as Poses
    from edgepose.spec import Preprocess as Preprocess
    from edgepose.spec import TensorSpec as TensorSpec
    from edgepose.tracker import PoseTracker as PoseTracker

__version__ = "0.1.0"

_HOME = {
    "Bundle": "bundle",
    "EdgeposeError": "errors",
    "Keypoints": "spec",
    "ModelSpec": "spec",
    "PoseEstimator": "estimator",
    "PoseTracker": "tracker",
    "Poses": "spec",
    "Preprocess": "spec",
    "Session": "runtime.session",
    "TensorSpec": "spec",
    "open_session": "runtime",
    "read_bundle": "bundle",
    "verify_bundle": "bundle",
}

__all__ = ["__version__", *_HOME]  # noqa: PLE0604 (the names are strings, which ruff does not see through the dict)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgepose' has no attribute {name!r}")
    value = getattr(import_module(f"edgepose.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
