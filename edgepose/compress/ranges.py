"""Learned quantisation ranges as data: which numbers become which 8-bit codes, and where.

Invariant: `Ranges` says everything about a quantised network that its float weights do not; with both, every dialect of
every backend can be written without calibrating or training again. JSON carries it, float32 scales exactly.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import CheckpointError
from edgepose.storage import atomic_json

VERSION = 1
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One quantiser: value ≈ (code - zero_point)·scale with low <= code <= high.

    Attributes:
        key: Where it stands, in NNCF's words: "post_hooks.<module path>/<function>/<call>__<port>" quantises what that
            call returns, "pre_hooks.…" what goes into one port of it.
        kind: Activations have one scale, weights one per output channel.
        scale: Step between codes, float32 values; one, or one per channel.
        zero_point: The code of 0.0; one, or one per channel.
        low: Smallest code.
        high: Largest code.
        axis: Channel axis of `scale` in the weight as the torch module holds it; None for one scale.
    """

    key: str
    kind: Literal["activation", "weight"]
    scale: Annotated[tuple[PositiveFloat, ...], msgspec.Meta(min_length=1)]
    zero_point: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    low: int
    high: int
    axis: int | None = None

    @property
    def signed(self) -> bool:
        return self.low < 0

    @property
    def symmetric(self) -> bool:
        """Whether signed codes are centred on 0.0, the only kind of activation that TensorRT takes."""
        return self.signed and not any(self.zero_point)

    @property
    def scales(self) -> NDArray[np.float32]:
        """(1,) or (channels,) float32."""
        return np.asarray(self.scale, np.float32)

    def same_codes(self, other: Range) -> bool:
        """Whether both quantisers give every value the same code."""
        mine = (self.scale, self.zero_point, self.low, self.high)
        return mine == (other.scale, other.zero_point, other.low, other.high)


class Ranges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All quantisers of one network.

    Attributes:
        ranges: One entry per quantiser and place; a quantiser shared by several places appears once for each.
        protected: Module names that stay float.
        version: Version of this format.
    """

    ranges: tuple[Range, ...]
    protected: tuple[str, ...] = ()
    version: int = VERSION

    @property
    def by_key(self) -> dict[str, Range]:
        return {entry.key: entry for entry in self.ranges}


def read_ranges(path: str | os.PathLike[str]) -> Ranges:
    """Reads what `write_ranges` wrote.

    Raises:
        CheckpointError: No such file, not this format, or values that cannot be.
    """
    try:
        ranges = msgspec.json.decode(Path(path).read_bytes(), type=Ranges)
    except OSError as err:
        raise CheckpointError(str(path), found=err.strerror or "unreadable", expected="quantisation ranges") from err
    except msgspec.DecodeError as err:
        raise CheckpointError(str(path), found=str(err), expected="the JSON of quantisation ranges") from err
    check_ranges(ranges, where=str(path))
    return ranges


def write_ranges(path: str | os.PathLike[str], ranges: Ranges) -> None:
    """Writes JSON, atomically.

    Raises:
        StorageError: Disk full, read-only or no permission.
    """
    atomic_json(path, ranges)


def check_ranges(ranges: Ranges, *, where: str) -> None:
    """Checks what the types cannot say.

    Raises:
        CheckpointError: Unknown version, a key twice, or a quantiser that contradicts itself.
    """
    if ranges.version != VERSION:
        raise CheckpointError(f"{where}: version", found=str(ranges.version), expected=str(VERSION))
    if len(ranges.by_key) != len(ranges.ranges):
        raise CheckpointError(where, found="a key that appears twice", expected="one quantiser per place")
    for entry in ranges.ranges:
        at = f"{where}: {entry.key}"
        if len(entry.scale) != len(entry.zero_point):
            raise CheckpointError(
                at, found=f"{len(entry.scale)} scales and {len(entry.zero_point)} zero points", expected="as many"
            )
        if (entry.axis is None) != (len(entry.scale) == 1) and entry.kind == "activation":
            raise CheckpointError(at, found=f"{len(entry.scale)} scales for an activation", expected="one")
        if not -128 <= entry.low < entry.high <= 255 or entry.high - entry.low > 255:
            raise CheckpointError(at, found=f"codes {entry.low}..{entry.high}", expected="at most 8 bits")
        if not all(entry.low <= zero <= entry.high for zero in entry.zero_point):
            raise CheckpointError(at, found="a zero point outside the codes", expected="low <= zero point <= high")
        if not np.all(np.isfinite(entry.scales)):
            raise CheckpointError(at, found="a scale that is not finite", expected="a positive float32")
