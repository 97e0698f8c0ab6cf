"""Sensitivity of a network's parts: what each costs when it alone is pruned, quantised, or left in floating point.

Invariant: every candidate is measured once, by the same function, and stored as soon as it is measured: a scan that was
stopped goes on, and one that was done costs nothing. Nothing here looks at people; what is measured is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, Protocol

import msgspec
from torch import Tensor, nn

from edgepose.compress.channel_search import Budget
from edgepose.compress.plan import PruningPlan, apply_pruning
from edgepose.compress.prune import Ranking, plan_at
from edgepose.errors import RecipeError
from edgepose.storage import atomic_json

Figures = dict[str, float]
"""Metrics by name."""


class Candidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a network and what happens to it.

    Attributes:
        kind: "prune": it loses channels. "int8": it alone is quantised. "float": it alone is not.
        layer: Its name; of coupled channels, that of the layer they were found from.
        share: Fraction of its channels that goes; 1 where that is not the question.
    """

    kind: Literal["prune", "int8", "float"]
    layer: str
    share: float = 1.0

    @property
    def key(self) -> str:
        """What it is stored under."""
        return f"{self.kind} {self.layer} {self.share:.6f}"


class Store(Protocol):
    """Where figures are kept between runs."""

    def get(self, key: str) -> Figures | None:
        """The figures of a candidate; None where it was not measured yet."""

    def put(self, key: str, figures: Figures) -> None:
        """Keep the figures of a candidate."""


class _Content(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    identity: str
    figures: dict[str, dict[str, float | None]]


class FigureFile:
    """A store in a JSON file, written whole at every measurement.

    Args:
        path: The file; one that cannot be read, or that holds figures of something else, is begun anew.
        identity: Digest of all that the figures depend on besides the candidates.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path, self._identity = path, identity
        self._figures: dict[str, dict[str, float | None]] = {}
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_Content)
        except (OSError, msgspec.DecodeError):
            return
        if found.identity == identity:
            self._figures = dict(found.figures)

    def get(self, key: str) -> Figures | None:
        """The figures of a candidate; None where it was not measured yet."""
        found = self._figures.get(key)
        return None if found is None else {k: float("nan") if v is None else v for k, v in found.items()}

    def put(self, key: str, figures: Figures) -> None:
        """Keep the figures of a candidate.

        Raises:
            StorageError: The file cannot be written.
        """
        self._figures[key] = dict(figures)
        atomic_json(self._path, _Content(self._identity, self._figures))


def scan(
    candidates: Sequence[Candidate],
    measure: Callable[[Candidate], Figures],
    store: Store,
    told: Callable[[int, int], None] | None = None,
) -> dict[Candidate, Figures]:
    """Measure candidates that are not measured yet, in order.

    Args:
        candidates: What to measure; one that comes twice is measured once.
        measure: The figures of one; the same candidate always has the same ones.
        store: Asked before, told after each measurement.
        told: Called with how many are done and how many there are.

    Returns:
        The figures of all of them, in order.
    """
    figures: dict[Candidate, Figures] = {}
    for done, candidate in enumerate(candidates):
        if told:
            told(done, len(candidates))
        found = store.get(candidate.key)
        if found is None:
            found = measure(candidate)
            store.put(candidate.key, found)
        figures[candidate] = found
    if told:
        told(len(candidates), len(candidates))
    return figures


def pruning_candidates(ranking: Ranking, shares: Sequence[float], layers: Sequence[str] = ()) -> tuple[Candidate, ...]:
    """Each group of coupled channels with each share of it that can go.

    Args:
        ranking: The network's channels; its limits (`round_to`, `min_channels`) hold.
        shares: Fractions to try; of those that come to the same number of channels the first.
        layers: Shell patterns of layers: only groups with one of these in them; none means all groups.

    Raises:
        RecipeError: A pattern matches nothing that can be pruned, or nothing at all can be.
    """
    budget = Budget(0, ranking.config.scope, ranking.config.round_to, ranking.config.min_channels, 1)
    written = {group.name: [m.layer for m in group.members if m.side == "out"] for group in ranking.groups}
    chosen = set(written) if not layers else _matching(written, layers)
    found: dict[tuple[str, int], Candidate] = {}
    for group in ranking.groups:
        for share in shares:
            kept = budget.permitted(group.size, group.size * (1 - share))
            if group.name in chosen and kept < group.size:
                found.setdefault((group.name, kept), Candidate("prune", group.name, 1 - kept / group.size))
    if not found:
        raise RecipeError(
            "sensitivity of channels",
            found=f"nothing to remove in {len(chosen)} groups of channels",
            expected="shares that come to at least one channel",
            fix="raise the shares, or choose other layers",
        )
    return tuple(found.values())


def _matching(written: Mapping[str, Sequence[str]], patterns: Sequence[str]) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        matched = {group for group, layers in written.items() if any(fnmatchcase(name, pattern) for name in layers)}
        if not matched:
            raise RecipeError(
                "sensitivity: layers",
                found=f"{pattern!r}, which matches no layer that can be narrowed",
                expected=f"shell patterns of layers ({', '.join(sorted(written)[:3])}, …)",
            )
        chosen |= matched
    return chosen


def pruned_alone(ranking: Ranking, candidate: Candidate) -> tuple[nn.Module, PruningPlan]:
    """The network without the least important channels of one group, all others as they are; and the plan of it.

    Args:
        ranking: The network's channels.
        candidate: Of `pruning_candidates`.
    """
    counts = {group.name: group.size for group in ranking.groups}
    counts[candidate.layer] = round(counts[candidate.layer] * (1 - candidate.share))
    plan = plan_at(replace(ranking, fixed=counts), 0)
    return apply_pruning(ranking.full, plan), plan


def quantisation_candidates(layers: Sequence[str], patterns: Sequence[str] = ()) -> tuple[Candidate, ...]:
    """Each layer quantised alone, and each alone not quantised.

    Args:
        layers: Names of the layers with quantised weights (`restore.quantised_layers`).
        patterns: Shell patterns of layers: only these; none means all.

    Raises:
        RecipeError: The patterns match none of them.
    """
    chosen = [name for name in layers if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]
    if not chosen:
        raise RecipeError(
            "sensitivity to 8 bits",
            found=f"{', '.join(patterns) or 'a network'}, with no quantised layer among {len(layers)}",
            expected="layers with quantised weights",
            fix="choose other layers",
        )
    return tuple(Candidate(kind, layer) for layer in chosen for kind in ("int8", "float"))


def quantised_alone(wrapped: nn.Module, layers: Sequence[str], candidate: Candidate, example: Tensor) -> nn.Module:
    """A copy of a fake-quantised network with one layer quantised and the others float, or the other way round.

    Args:
        wrapped: The network with all layers quantised.
        layers: Names of these.
        candidate: Of `quantisation_candidates`.
        example: (1, 3, h, w) float32.
    """
    from edgepose.compress.restore import with_float  # with NNCF, which channels do not need

    alone = (candidate.layer,)
    floats = alone if candidate.kind == "float" else tuple(name for name in layers if name not in alone)
    return with_float(wrapped, floats, example)
