"""A sensitivity scan of a checkpoint on dev: each group of channels pruned alone, each layer quantised alone.

Invariant: figures are found by all that they depend on, so a scan that was stopped goes on and another of the same
checkpoint and people measures only what is new; nothing is fine-tuned, and the checkpoint is not changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
import torch
from torch import Tensor, nn

from edgepose.blocks.checkpoint import Checkpoint
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.plan import PruneConfig
from edgepose.compress.prune import Ranking, rank_channels, reestimate_batch_norm
from edgepose.compress.sensitivity import (
    Candidate,
    FigureFile,
    Figures,
    pruned_alone,
    pruning_candidates,
    quantisation_candidates,
    quantised_alone,
    scan,
)
from edgepose.errors import UsageError
from edgepose.host import cache_directory
from edgepose.pose.metrics import available
from edgepose.recipe import Importance
from edgepose.spec import ModelSpec
from edgepose.stages.cache import StageKey
from edgepose.stages.compress import batches_of, ranked_channels
from edgepose.stages.networks import load_network
from edgepose.stages.people import StageData
from edgepose.stages.settings import PruneStage
from edgepose.stages.source import Source
from edgepose.training.loop import dev_metrics
from edgepose.training.predict import Crops, cut_crops, predict

Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
Told = Callable[[str, int, int], None]

_REPAIR_PEOPLE = 128  # whose activations repair normalisation statistics after each pruning
_CALIBRATION_PEOPLE = 300
_TOOLS = ("torch", "numpy", "opencv-python-headless", "torch-pruning", "nncf")


class ScanSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to scan.

    Attributes:
        shares: Fractions of a group's channels to remove.
        importance: Which of its channels go first.
        layers: Shell patterns of layers to scan; none means all.
        int8: Scan quantisation as well.
        people: Measure on so many people of dev; 0 takes all.
        metric: What the rows show; "" takes the first that the keypoints have.
        seed: Of the choice of people, and of importance "random".
    """

    shares: Annotated[tuple[Share, ...], msgspec.Meta(min_length=1)] = (0.25, 0.5, 0.75)
    importance: Importance = "taylor"
    layers: tuple[str, ...] = ()
    int8: bool = False
    people: Annotated[int, msgspec.Meta(ge=0)] = 0
    metric: str = ""
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0


class PrunedRow(msgspec.Struct, frozen=True):
    """One group of channels, pruned alone.

    Attributes:
        layer: The layer that the group was found from.
        ratio: Fraction of its channels that went.
        pck: The metric then; None where nobody can be measured.
        macs_removed: Fraction of the network's multiply-accumulates that went with them.
        figures: All metrics.
    """

    layer: str
    ratio: float
    pck: float | None
    macs_removed: float
    figures: dict[str, float | None]


class QuantisedRow(msgspec.Struct, frozen=True):
    """One layer, quantised alone and left in floating point alone.

    Attributes:
        layer: Its name.
        only_int8: The metric with this layer in 8 bits and all others float.
        only_float: The metric with this layer float and all others in 8 bits.
    """

    layer: str
    only_int8: float | None
    only_float: float | None


class ScanResult(msgspec.Struct, frozen=True):
    """A scan, as its file holds it.

    Attributes:
        network: Name of the checkpoint.
        checkpoint: Digest of its weights.
        people: How many were measured.
        dev: Digest of these.
        settings: What was asked for.
        metric: What the rows show.
        base: The metric of the network as it is.
        rows: Pruning; empty for a quantised checkpoint.
        base_int8: The metric with all layers in 8 bits; None where that was not asked for.
        quantised: Quantisation layer by layer.
    """

    network: str
    checkpoint: str
    people: int
    dev: str
    settings: ScanSettings
    metric: str
    base: float | None
    rows: tuple[PrunedRow, ...]
    base_int8: float | None = None
    quantised: tuple[QuantisedRow, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Bench:
    """The checkpoint and the people that it is measured on."""

    network: nn.Module
    checkpoint: Checkpoint
    data: StageData
    settings: ScanSettings
    store: FigureFile
    told: Told

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.card.spec


def scan_sensitivity(source: Source, data: StageData, settings: ScanSettings, told: Told | None = None) -> ScanResult:
    """Scan a checkpoint.

    Args:
        source: The checkpoint. Of a quantised one only quantisation is scanned.
        data: Training people rank channels, repair statistics and calibrate; dev is measured.
        settings: What to scan.
        told: Called with what is scanned, how much is done and how much there is.

    Raises:
        UsageError: A metric that the keypoints do not have; a quantised checkpoint without `int8`.
        RecipeError: A pattern matches nothing that can be pruned.
        AnnotationError: There is nobody to measure.
        StorageError: Figures cannot be kept.
    """
    network, checkpoint = load_network(source)
    card = checkpoint.card
    if card.quantisation is not None and not settings.int8:
        raise UsageError(
            f"scanning {card.name}", found="a quantised checkpoint, whose channels stay", expected="--int8",
            fix="add --int8, or scan the float checkpoint",
        )  # fmt: skip
    metric = _metric(settings.metric, available(card.keypoints))
    if settings.people:
        data = StageData(data.train, data.dev.sample(settings.people, settings.seed))
    path, identity = _place(checkpoint, data, settings)
    bench = _Bench(network, checkpoint, data, settings, FigureFile(path, identity), told or (lambda *_: None))
    measure = _measurer(bench)
    base = scan([_WHOLE], lambda _: measure(network), bench.store)[_WHOLE]
    rows = () if card.quantisation is not None else _pruned_rows(bench, measure, metric)
    quantised, base_int8 = _quantised_rows(bench, measure, metric) if settings.int8 else ((), None)
    return ScanResult(
        network=card.name,
        checkpoint=checkpoint.digest,
        people=len(data.dev),
        dev=data.dev.digest,
        settings=settings,
        metric=metric,
        base=_finite(base[metric]),
        rows=rows,
        base_int8=base_int8,
        quantised=quantised,
    )


_WHOLE = Candidate("float", "*")
_INTEGER = Candidate("int8", "*")
Measure = Callable[[nn.Module], Figures]


def _place(checkpoint: Checkpoint, data: StageData, settings: ScanSettings) -> tuple[Path, str]:
    """Where figures are kept, and what they depend on besides the candidates."""
    inputs = {"checkpoint": checkpoint.digest, "train": data.train.digest, "dev": data.dev.digest}
    if checkpoint.card.own is not None:  # the weights say nothing of what a user's module computes with them
        inputs["module"] = checkpoint.card.own.structure
    config = {"importance": settings.importance, "seed": settings.seed}
    digest = StageKey("scan", inputs, config, _TOOLS).digest
    return cache_directory() / "scans" / f"{digest[:24]}.json", digest


def _metric(wanted: str, known: tuple[str, ...]) -> str:
    if wanted and wanted not in known:
        raise UsageError("--metric", found=repr(wanted), expected=f"one of {', '.join(known)}")
    return wanted or next(name for name in ("pck_torso_0.2", "limb12_extent_0.1", "pck_extent_0.1") if name in known)


def _measurer(bench: _Bench) -> Measure:
    @cache
    def crops() -> Crops:
        return cut_crops(bench.data.dev, bench.spec)

    return lambda network: dev_metrics(predict(network, bench.spec, crops()), crops())


def _pruned_rows(bench: _Bench, measure: Measure, metric: str) -> tuple[PrunedRow, ...]:
    settings, example = bench.settings, torch.zeros(1, 3, *bench.spec.preprocess.input_hw)
    # Any number of channels: the question is what they are worth, not what kernels like.
    anyhow = PruneConfig(ratio=0, importance="l2", round_to=1, min_channels=1)
    candidates = pruning_candidates(rank_channels(bench.network, example, anyhow), settings.shares, settings.layers)

    @cache
    def ranked() -> tuple[Ranking, list[Tensor]]:  # what costs time, and only where something is left to measure
        stage = PruneStage(0.0, settings.importance, "global", 1, (), settings.seed)
        repair = bench.data.train.sample(_REPAIR_PEOPLE, settings.seed)
        ranking = ranked_channels(bench.network, bench.spec, bench.data, stage)
        return ranking, list(batches_of(repair, bench.spec))

    def pruned(candidate: Candidate) -> Figures:
        ranking, repair = ranked()
        smaller, plan = pruned_alone(ranking, candidate)
        reestimate_batch_norm(smaller, repair)
        return {**measure(smaller), _MACS: 1 - plan.macs_after / plan.macs_before}

    found = scan(candidates, pruned, bench.store, lambda done, whole: bench.told("pruning each layer", done, whole))
    return tuple(
        PrunedRow(
            candidate.layer,
            candidate.share,
            _finite(figures[metric]),
            figures[_MACS],
            {name: _finite(value) for name, value in figures.items() if name != _MACS},
        )
        for candidate, figures in found.items()
    )


_MACS = "macs_removed"


def _quantised_rows(bench: _Bench, measure: Measure, metric: str) -> tuple[tuple[QuantisedRow, ...], float | None]:
    from edgepose.compress.restore import quantised_layers

    example, wrapped = torch.zeros(1, 3, *bench.spec.preprocess.input_hw), _wrapped(bench)
    layers = quantised_layers(wrapped, example)
    whole = scan([_INTEGER], lambda _: measure(wrapped), bench.store)[_INTEGER]
    found = scan(
        quantisation_candidates(layers, bench.settings.layers),
        lambda candidate: measure(quantised_alone(wrapped, layers, candidate, example)),
        bench.store,
        lambda done, total: bench.told("quantising each layer", done, total),
    )
    rows = [
        QuantisedRow(
            layer,
            _finite(found[Candidate("int8", layer)][metric]),
            _finite(found[Candidate("float", layer)][metric]),
        )
        for layer in dict.fromkeys(candidate.layer for candidate in found)
    ]
    return tuple(rows), _finite(whole[metric])


def _wrapped(bench: _Bench) -> nn.Module:
    """The network with all layers fake-quantised: as it is, or calibrated here."""
    if bench.checkpoint.card.quantisation is not None:
        return bench.network
    from edgepose.compress.quantise import prepare

    people = bench.data.train.sample(_CALIBRATION_PEOPLE, bench.settings.seed)
    return prepare(fold_batch_norms(bench.network), list(batches_of(people, bench.spec)))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
