"""Stage artefacts on disk, found by key.

Invariant: a folder under a key is complete: it was renamed into place after the stage had ended well.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from edgepose import __version__
from edgepose.host import cache_directory
from edgepose.storage import atomic_directory, json_bytes

_REPORT = "stage.json"
_FORMAT = 2
"""Raised whenever a stage reports or writes something else for the same inputs."""


@dataclass(frozen=True, slots=True)
class StageKey:
    """What a stage's result depends on.

    Attributes:
        stage: Name of the stage.
        inputs: Digest of everything that goes in, by role.
        config: Settings, anything that msgspec can write.
        tools: Distributions whose version matters.
    """

    stage: str
    inputs: Mapping[str, str]
    config: Any
    tools: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 over all of it, edgepose's own version included."""
        versions = {tool: _version(tool) for tool in self.tools}
        content = [_FORMAT, __version__, self.stage, sorted(self.inputs.items()), self.config, sorted(versions.items())]
        return hashlib.sha256(msgspec.json.encode(content)).hexdigest()


def _version(tool: str) -> str:
    try:
        return metadata.version(tool)
    except metadata.PackageNotFoundError:
        return "absent"  # nothing is found under such a key, and the stage itself says what to install


class StageResult(msgspec.Struct, frozen=True):
    """What a stage left behind.

    Attributes:
        stage: Name of the stage.
        key: Its key.
        folder: Where its files are.
        report: What it said, JSON-able.
        seconds: How long it took when it ran.
        reused: Whether it was found instead of run.
    """

    stage: str
    key: str
    folder: str
    report: dict[str, Any]
    seconds: float
    reused: bool = False

    @property
    def path(self) -> Path:
        return Path(self.folder)

    @property
    def files(self) -> dict[str, Path]:
        """What the stage wrote, by name."""
        return {path.name: path for path in sorted(self.path.iterdir()) if path.name != _REPORT}


class _Record(msgspec.Struct, frozen=True):
    key: str
    report: dict[str, Any]
    seconds: float


def run_stage(key: StageKey, work: Callable[[Path], dict[str, Any]], *, within: Path | None = None) -> StageResult:
    """Find the artefact of a stage or make it.

    Args:
        key: What it depends on.
        work: Fills an empty folder and returns the report.
        within: Folder that artefacts are looked for in; None is the one that all stages share.

    Raises:
        StorageError: The cache cannot be written.
    """
    digest = key.digest
    folder = (within or cache_directory() / "stages") / f"{key.stage}-{digest[:24]}"
    found = _read(folder, digest)
    if found is not None:
        return StageResult(key.stage, digest, str(folder), found.report, found.seconds, reused=True)
    start_s = time.monotonic()
    with atomic_directory(folder, replaceable=lambda _: True) as temporary:
        report = work(temporary)
        seconds = round(time.monotonic() - start_s, 2)
        written = json_bytes(_Record(digest, report, seconds))
        (temporary / _REPORT).write_bytes(written)
    # As a later run will read it: tuples are lists, NaN is null.
    report = msgspec.json.decode(written, type=_Record).report
    return StageResult(key.stage, digest, str(folder), report, seconds)


def run_state(key: StageKey) -> Path:
    """Where a stage that trains keeps its state until it is done."""
    return cache_directory() / "runs" / f"{key.stage}-{key.digest[:24]}.state"


def _read(folder: Path, digest: str) -> _Record | None:
    try:
        record = msgspec.json.decode((folder / _REPORT).read_bytes(), type=_Record)
    except (OSError, msgspec.DecodeError):
        return None
    return record if record.key == digest else None
