"""What claims share while they are measured: where the data is, how much effort to make, and results made once.

Invariant: expensive work is done once per run, whichever claims ask for it; work that failed fails again at once, with
the same error, instead of being tried once per claim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from edgepose.timing.record import LatencyProtocol

T = TypeVar("T")

Told = Callable[[str, float, float], None]
"""Called with what is being done, how much of it is done, and how much there is."""

THREADS = 2
"""Threads of every arm that is timed."""


_RATIO = LatencyProtocol(pairs=6, blocks=30, dropped_blocks=10, threads=THREADS)
_CHOICE = LatencyProtocol(pairs=3, blocks=20, dropped_blocks=5, threads=THREADS)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much measuring goes into a figure.

    Attributes:
        ratio: How a claimed ratio is timed.
        choice: How settings, or copies of a bundle, are compared before the claimed figure is measured.
        rules: Gate rules, a name or a path.
        self_gates: How often a bundle is gated against itself.
    """

    ratio: LatencyProtocol = _RATIO
    choice: LatencyProtocol = _CHOICE
    rules: str = "default"
    self_gates: int = 2


def _silent(_what: str, _done: float, _whole: float) -> None:
    pass


@dataclass(slots=True, eq=False)
class Context:
    """One run of the claims.

    Attributes:
        data: Folder of the data sets.
        folder: Empty folder for whatever is made on the way; removed afterwards.
        full: Whether training runs are repeated.
        effort: How much measuring goes into a figure.
        told: Told about progress.
    """

    data: Path
    folder: Path
    full: bool = False
    effort: Effort = Effort()
    told: Told = _silent
    _kept: dict[str, tuple[Any, Exception | None]] = field(default_factory=dict)

    def once(self, key: str, work: Callable[[], T]) -> T:
        """The result of `work`, which is called the first time only that `key` is asked for.

        Raises:
            Exception: Whatever `work` raised, again at each call.
        """
        if key not in self._kept:
            try:
                self._kept[key] = (work(), None)
            except Exception as err:
                self._kept[key] = (None, err)
                raise
        value, fault = self._kept[key]
        if fault is not None:
            raise fault
        result: T = value
        return result

    def step(self, what: str) -> Callable[[int, int], None]:
        """Progress of one step in the form that edgepose's functions call."""
        return lambda done, whole: self.told(what, done, whole)


class TrainingWatcher:
    """Passes the progress of a training run on; an observer of `edgepose.training`."""

    def __init__(self, context: Context, what: str) -> None:
        self._context, self._what = context, what

    def cutting(self, done: int, total: int) -> None:
        self._context.told(f"{self._what}: reading people", done, total)

    def step(self, done: int, total: int, _loss: float) -> None:
        self._context.told(f"{self._what}: training", done, total)

    def epoch(self, row: dict[str, float]) -> None:
        """The curve is in the run record."""
