"""Layers of a fake-quantised network given back to floating point: which they are, and how few of them do.

Invariant: a layer that is given back computes with its float weights, and a quantiser goes only where no integer kernel
needs it, so that all other layers stay as integer as they were; every measurement is stored as soon as it is made.

The search is the greedy one of accuracy-aware quantisation (NNCF's `quantize_with_accuracy_control` works so too), with
a price: layers are tried one by one, ranked by what giving them back gains per unit of what it costs, and given back in
that order until the budget holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from edgepose.compress.coverage import idle_quantisers
from edgepose.compress.hooks import functions_inside, hooks_of, plain_copy, remove_hook
from edgepose.compress.quantise import protect, protected_of
from edgepose.storage import atomic_json

Cost = Literal["ms", "macs"]
Measure = Callable[[tuple[str, ...]], float]


class Budget(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What has to hold.

    Attributes:
        reference: The float network's figure, a fraction 0..1.
        points: Most points that may be lost against it.
    """

    reference: float
    points: float

    def lost(self, figure: float) -> float:
        """Points lost."""
        return 100 * (self.reference - figure)

    def holds(self, figure: float) -> bool:
        """Whether a figure is within the budget; half a hundred-thousandth of a point is rounding."""
        return self.lost(figure) <= self.points + 5e-6


class Prices(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What layers save by being integer.

    Attributes:
        costs: By module name.
        unit: Milliseconds or multiply-accumulates, of all of them.
    """

    costs: dict[str, float]
    unit: Cost


class Trial(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer given back by itself.

    Attributes:
        layer: Its module name.
        gain: Points that this gained.
        cost: What its integer kernel saves, in the restoration's unit.
        rate: Points per unit: what layers are ranked by.
    """

    layer: str
    gain: float
    cost: float
    rate: float


class Step(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer more given back.

    Attributes:
        layer: Its module name.
        lost: Points that are lost from there on.
    """

    layer: str
    lost: float


class Restoration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The way to a network within its budget.

    Attributes:
        budget: What had to hold.
        lost: Points lost with all layers integer.
        unit: Of costs: milliseconds saved in ONNX Runtime on this machine, or multiply-accumulates; None where the
            budget held from the start, so that nothing was priced.
        trials: Layers tried by themselves, the best rate first; none where the budget held from the start.
        path: Layers given back, in order.
        met: Whether the budget holds in the end.
    """

    budget: Budget
    lost: float
    unit: Cost | None = None
    trials: tuple[Trial, ...] = ()
    path: tuple[Step, ...] = ()
    met: bool = True

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(step.layer for step in self.path)


def quantised_layers(wrapped: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of the modules whose weights are quantised, in order of definition.

    Args:
        wrapped: A fake-quantised network.
        example: (1, 3, h, w) float32.
    """
    plain, places = plain_copy(wrapped), set(_weight_places(wrapped))
    names = [name for name, part in plain.named_modules() if name and not list(part.children())]
    return tuple(name for name in names if _weights_of(functions_inside(plain, (name,), example)) & places)


def with_float(wrapped: nn.Module, layers: Sequence[str], example: Tensor) -> nn.Module:
    """A copy in which some layers compute in floating point.

    Args:
        wrapped: A fake-quantised network.
        layers: Names of modules.
        example: (1, 3, h, w) float32.
    """
    copied, plain = copy.deepcopy(wrapped), plain_copy(wrapped)
    for place in _weights_of(functions_inside(plain, layers, example)) & set(_weight_places(copied)):
        remove_hook(copied, place)
    protect(copied, (*protected_of(copied), *layers))
    floats = functions_inside(plain, protected_of(copied), example)
    for place in idle_quantisers(copied, example, floats):
        remove_hook(copied, place)
    return copied.eval()


def find_restoration(
    priced: Callable[[], Prices], measure: Measure, budget: Budget, *, store: Path | None = None
) -> Restoration:
    """Search the layers to give back.

    Args:
        priced: Gives the candidates and their prices; asked only where the budget does not hold from the start.
        measure: The figure, 0..1, with these layers in floating point and all others as they are.
        budget: What has to hold.
        store: File that keeps measurements between runs; one of another search is begun anew. The caller removes it.

    Raises:
        StorageError: The store cannot be written (disk full, read-only, no permission).
        UsageError: Its place is taken by something else.
    """
    before = measure(())
    if budget.holds(before):
        return Restoration(budget, budget.lost(before))
    prices = priced()
    costs = prices.costs
    measured = _Store(measure, store, _identity(costs, budget, before), {_key(()): before})
    # A layer that integers do not speed up costs nothing to give back; a thousandth of the dearest keeps ranks finite.
    least = max(max(costs.values(), default=0.0) / 1000, 1e-9)
    trials = []
    for layer, cost in costs.items():
        gain = 100 * (measured((layer,)) - before)
        trials.append(Trial(layer, gain, cost, gain / max(cost, least)))
    # Where giving back harms, the dearest would come first by rate: there the least harm does.
    trials.sort(key=lambda trial: (trial.gain > 0, trial.rate if trial.gain > 0 else trial.gain), reverse=True)
    path: list[Step] = []
    met = False
    for trial in trials:
        figure = measured((*(step.layer for step in path), trial.layer))
        path.append(Step(trial.layer, budget.lost(figure)))
        met = budget.holds(figure)
        if met:
            break
    return Restoration(budget, budget.lost(before), prices.unit, tuple(trials), tuple(path), met)


class _Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    identity: str
    figures: dict[str, float]


def _identity(layers: Iterable[str], budget: Budget, before: float) -> str:
    """What tells one search from another: the figure of the untouched network tells networks and people apart."""
    return f"{' '.join(layers)} {budget.reference!r} {before!r}"


class _Store:
    """Measures each set of layers once, also over several runs."""

    def __init__(self, measure: Measure, path: Path | None, identity: str, figures: dict[str, float]) -> None:
        self._measure, self._path, self._identity, self._figures = measure, path, identity, figures
        if path is None:
            return
        try:
            found = msgspec.json.decode(path.read_bytes(), type=_Stored)
        except (OSError, msgspec.DecodeError):
            return
        if found.identity == identity:
            self._figures = found.figures

    def __call__(self, layers: tuple[str, ...]) -> float:
        key = _key(layers)
        if key not in self._figures:
            self._figures[key] = self._measure(layers)
            if self._path is not None:
                atomic_json(self._path, _Stored(self._identity, self._figures))
        return self._figures[key]


def _key(layers: Sequence[str]) -> str:
    return " ".join(sorted(layers))


def _weight_places(wrapped: nn.Module) -> list[str]:
    hooks = hooks_of(wrapped).items()
    return [place for place, hook in hooks if isinstance(hook, BaseQuantizer) and hook.narrow_range]


def _weights_of(functions: Sequence[str]) -> set[str]:
    """Where the quantisers of what goes into these functions' weight port would stand."""
    return {f"pre_hooks.{function}__1" for function in functions}
