"""What a runtime looks like to the rest of edgepose, and the check of what is fed to it.

Invariant: a session knows nothing about pose; anyone may pass in their own, four members suffice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError
from edgepose.spec import TensorSpec

Array = NDArray[Any]


class Session(Protocol):
    """A loaded network. One thread at a time may call `infer`."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What `infer` has to be fed."""
        ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What `infer` returns."""
        ...

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the network once.

        Args:
            feeds: One array per input, by name, of the shape and dtype in `inputs`.

        Returns:
            One array per output, by name; they belong to the caller and no later call changes them.

        Raises:
            SpecError: The feeds do not fit `inputs`.
        """
        ...

    def close(self) -> None:
        """Frees the network; calling it twice is harmless, calling `infer` afterwards is an error."""
        ...


@dataclass(frozen=True, slots=True)
class SessionFacts:
    """What a runtime itself says of a network that it has loaded, read back after loading.

    Attributes:
        placement: Provider or device → the nodes that it executes.
        settings: What it was told and holds to, by name: "threads", "precision", …
    """

    placement: dict[str, tuple[str, ...]]
    settings: dict[str, str]

    @property
    def text(self) -> str:
        """One line for people: "all 57 nodes on cpu"."""
        total = sum(map(len, self.placement.values()))
        if len(self.placement) == 1:
            return f"all {total} nodes on {next(iter(self.placement))}"
        return ", ".join(f"{len(nodes)} of {total} nodes on {name}" for name, nodes in self.placement.items())


def facts_of(session: Session) -> SessionFacts | None:
    """What the runtime says of a session, where it tells: ONNX Runtime and OpenVINO do."""
    tell = getattr(session, "facts", None)
    facts = tell() if callable(tell) else None
    return facts if isinstance(facts, SessionFacts) else None


def infer_all(session: Session, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Runs any number of samples through a network, in turns where its batch is fixed; the last turn is filled up.

    Args:
        session: The network.
        feeds: One array per input, by name, all with the samples along the first axis.
    """
    shape, count = session.inputs[0].shape, len(next(iter(feeds.values())))
    batch = shape[0] if shape else count
    if isinstance(batch, str) or batch == count:
        return session.infer(feeds)
    found: list[dict[str, Array]] = []
    for start in range(0, count, batch):
        parts = {name: value[start : start + batch] for name, value in feeds.items()}
        lacking = batch - min(len(part) for part in parts.values())
        if lacking:
            parts = {n: np.concatenate([p, np.zeros((lacking, *p.shape[1:]), p.dtype)]) for n, p in parts.items()}
        found.append(session.infer(parts))
    return {name: np.concatenate([answers[name] for answers in found])[:count] for name in found[0]}


def check_feeds(feeds: Mapping[str, Array], inputs: tuple[TensorSpec, ...]) -> dict[str, Array]:
    """Checks names, dtypes and shapes, and gives the arrays C-contiguous (copied only where they are not).

    Free dimensions of the same name must agree, and none may be empty.

    Raises:
        SpecError: Names the input at fault.
    """
    names = [spec.name for spec in inputs]
    if set(feeds) != set(names):
        raise SpecError("feeds", found=f"arrays named {sorted(feeds)}", expected=f"{sorted(names)}")
    sizes: dict[str, int] = {}
    checked = {}
    for spec in inputs:
        value = feeds[spec.name]
        if not isinstance(value, np.ndarray):
            raise SpecError(f"feeds: {spec.name}", found=type(value).__name__, expected="a NumPy array")
        if value.dtype != np.dtype(spec.dtype):
            raise SpecError(
                f"feeds: {spec.name}",
                found=f"dtype {value.dtype}",
                expected=spec.dtype,
                fix=f"convert it with .astype({spec.dtype!r})",
            )
        if not _fits(value.shape, spec.shape, sizes):
            bound = {name: size for name, size in sizes.items() if name in spec.shape}
            expected = f"{_shape_text(spec.shape)}" + (f" with {bound}" if bound and value.size else "")
            raise SpecError(f"feeds: {spec.name}", found=f"shape {_shape_text(value.shape)}", expected=expected)
        checked[spec.name] = np.ascontiguousarray(value)
    return checked


def _fits(shape: tuple[int, ...], expected: tuple[int | str, ...], sizes: dict[str, int]) -> bool:
    """Whether `shape` fits; free dimensions met for the first time are entered into `sizes`."""
    if len(shape) != len(expected) or 0 in shape:
        return False
    return all(
        size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
        for size, want in zip(shape, expected, strict=True)
    )


def _shape_text(shape: tuple[int | str, ...]) -> str:
    return "(" + ", ".join(str(size) for size in shape) + ")"


class ClosedSession(SpecError):
    """`infer` after `close`."""

    def __init__(self) -> None:
        super().__init__("session", found="a closed session", expected="an open one", fix="open it again")

    def __reduce__(self) -> tuple[object, ...]:
        return (ClosedSession, ())
