"""How far a TensorRT builder is: its nested phases as one share of the whole.

Invariant: the share never falls, and no exception leaves a callback: TensorRT calls from C++, where Python's end the
process. What is raised, Ctrl-C above all, is kept, the builder is told to stop, and it is raised after that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

Told = Callable[[str, int, int], None]
"""Called with the name of the phase, how much is done and how much there is."""

_WHOLE = 100


@dataclass(slots=True)
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """The phases that are under way.

    Args:
        told: Called whenever a share of the whole is done.

    Attributes:
        fault: What was raised in a callback, Ctrl-C included; the builder is asked to stop, and it is raised then.
    """

    def __init__(self, told: Told) -> None:
        self.fault: BaseException | None = None
        self._told = told
        self._phases: dict[str, _Phase] = {}
        self._share = 0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside another or by itself."""
        with self._kept():
            self._phases[name] = _Phase(parent, max(steps, 1))

    def step(self, name: str, step: int) -> bool:
        """Step number `step` of a phase ended; False asks the builder to stop."""
        with self._kept():
            phase = self._phases.get(name)
            if phase is not None:
                phase.done = min(step + 1, phase.steps)
                self._tell(name)
        return self.fault is None

    def finish(self, name: str) -> None:
        """A phase ended."""
        with self._kept():
            phase = self._phases.pop(name, None)
            if phase is not None and phase.parent is None:
                self._share = _WHOLE
                self._tell(name)

    def raise_fault(self) -> None:
        """Raises what was raised in a callback."""
        if self.fault is not None:
            raise self.fault

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except BaseException as err:  # noqa: BLE001 - whatever it is, it must not reach C++
            self.fault = self.fault or err

    def _tell(self, name: str) -> None:
        roots = [root for root, phase in self._phases.items() if phase.parent is None]
        if roots:
            self._share = max(self._share, int(_WHOLE * self._done(roots[0])))
        self._told(name, self._share, _WHOLE)

    def _done(self, name: str) -> float:
        """Share of a phase that is done, 0..1: its steps, and of the one under way what is done inside."""
        phase = self._phases[name]
        inside = max((self._done(child) for child, other in self._phases.items() if other.parent == name), default=0.0)
        return min((phase.done + inside) / phase.steps, 1.0)
