"""The stage that finds out how much to prune: shapes are built as they will be in the end, and timed, until one is as
fast as the recipe asks.

Invariant: channels are ranked once and only their numbers vary; shapes with equal numbers are one shape, built once and
timed once on a host, whatever the weights. What was built or timed before an interruption is found again.

Latency does not depend on weights, so nothing is trained here: a shape is quantised with the ranges of a few people.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.plan import PruningPlan, apply_pruning, plan_to_json
from edgepose.compress.prune import Ranking, kept_at, plan_at
from edgepose.compress.staircase import Found, Timing, find_shape
from edgepose.errors import RecipeError
from edgepose.export.engine import engine_file
from edgepose.export.onnx import onnx_from_torch
from edgepose.host import fingerprint
from edgepose.spec import ModelSpec
from edgepose.stages.cache import StageKey, StageResult, run_stage
from edgepose.stages.compress import ranked_channels
from edgepose.stages.latency import EFFORT, PLAN, Contender, Form, Stair, Staircase, Stopwatch, Told, keep_engine
from edgepose.stages.networks import load_network, structure_of
from edgepose.stages.people import StageData
from edgepose.stages.precisions import Timer
from edgepose.stages.settings import PruneStage
from edgepose.stages.source import Source
from edgepose.storage import atomic_write
from edgepose.training.batches import to_input
from edgepose.training.predict import cut_crops

_FINEST = 0.97  # each shape that is considered keeps so much of the multiply-accumulates of the one before it
_NARROWEST = 0.01
_CALIBRATION_PEOPLE = 8
_LEAST_SPEEDUP = 1.02  # below it there is nothing to prune for
_TOOLS = ("torch", "onnx", "onnxscript", "nncf", "onnxruntime", "openvino")


@dataclass(frozen=True, slots=True)
class Run:
    """How a search is carried out.

    Attributes:
        folder: Where the chosen plan and the engines that it is compared with go.
        timer: Times arms in turns.
        told: Told about progress.
    """

    folder: Path
    timer: Timer
    told: Told


@dataclass(frozen=True, slots=True, eq=False)
class _Workshop:
    """Builds shapes of one network.

    Attributes:
        network: The unpruned network.
        spec: What it eats and says.
        form: What shapes are built as.
        images: (N, 3, h, w) float32, normalised, for ranges; empty for float forms.
        ranking: Its channels.
        plans: Plans made so far, by ratio.
    """

    network: nn.Module
    spec: ModelSpec
    form: Form
    images: Tensor
    ranking: Ranking
    plans: dict[float, PruningPlan] = field(default_factory=dict)

    def plan(self, ratio: float) -> PruningPlan:
        if ratio not in self.plans:
            self.plans[ratio] = plan_at(self.ranking, ratio)
        return self.plans[ratio]

    def shape(self, ratio: float) -> Contender:
        plan = self.plan(ratio)
        label = f"{plan.macs_after / 1e6:.1f} of {plan.macs_before / 1e6:.1f} MMAC"
        return Contender.of(label, self.built(apply_pruning(self.network, plan), self.form))

    def built(self, network: nn.Module, form: Form) -> StageResult:
        """A network as an engine, its accuracy unchecked; equal structures are built once."""
        folded = fold_batch_norms(network)
        key = shape_key(folded, self.spec, form)
        return run_stage(key, lambda folder: _engine(folded, self.spec, form, self.images, folder))


def shape_key(folded: nn.Module, spec: ModelSpec, form: Form) -> StageKey:
    """What a shape's engine, and with it the time that it takes, depends on: all but the weights.

    Args:
        folded: The network, its normalisations folded.
        spec: Its size above all, which a network without linear layers does not show.
        form: What it is built as; the same for every target and number of threads.
    """
    settings = {
        "form": msgspec.structs.replace(form, target="", threads=0),
        "spec": msgspec.structs.replace(spec, name=""),
    }
    return StageKey("shape", {"structure": structure_of(folded)}, settings, _TOOLS)


def aim(source: Source | Path, data: StageData, settings: PruneStage, form: Form, run: Run) -> dict[str, Any]:
    """Find the shape that is as fast as `settings` asks.

    Args:
        source: The unpruned network.
        data: People; the training people rank channels and set ranges.
        settings: With a speed-up or a latency instead of a ratio.
        form: What shapes are timed as, and where.
        run: Folder, stopwatch, progress.

    Returns:
        A `Staircase`.

    Raises:
        RecipeError: No shape is so fast, or the unpruned network is already.
        EnvironmentFault: Timing fails.
    """
    network, checkpoint = load_network(source)
    spec = checkpoint.card.spec
    images = torch.zeros(0)
    if form.precision == "int8":
        crops = cut_crops(data.train.sample(_CALIBRATION_PEOPLE, settings.seed), spec)
        images = to_input(torch.from_numpy(crops.pixels), spec).contiguous()
    workshop = _Workshop(network, spec, form, images, ranked_channels(network, spec, data, settings))
    shapes = _shapes(workshop.ranking)
    watch = Stopwatch(form, run.timer, run.told)
    bases = (workshop.built(network, form), workshop.built(network, form.in_float))
    unpruned, original = Contender.of("unpruned", bases[0]), Contender.of("FP32 original", bases[1])
    asked = _asked_speedup(settings, watch, unpruned, original)

    def measure(shape: int, pairs: int) -> Timing:
        return watch.time(unpruned, workshop.shape(shapes[shape][0]), pairs)

    found = find_shape([1 - ratio for ratio, _ in shapes], asked, measure, EFFORT)
    stairs = _stairs(workshop, shapes, found)
    ratio, timing = shapes[found.shape][0], found.timings[found.shape]
    if not found.reached:
        raise _out_of_reach(settings, asked, stairs[list(found.timings).index(found.shape)])
    total = timing if original.key == unpruned.key else watch.time(original, workshop.shape(ratio), EFFORT.looks[-1])
    atomic_write(run.folder / PLAN, plan_to_json(workshop.plan(ratio)))
    kept = keep_engine(bases[0], "unpruned", run.folder)
    report = Staircase(
        asked_speedup=asked,
        target_latency_ms=settings.target_latency_ms,
        form=form,
        cpu=fingerprint().cpu,
        macs_before=workshop.plan(ratio).macs_before,
        channels_before=sum(group.size for group in workshop.ranking.groups),
        shapes=len(shapes),
        stairs=stairs,
        ratio=ratio,
        predicted=timing,
        total=total,
        unpruned=kept,
        original=kept if original.key == unpruned.key else keep_engine(bases[1], "original", run.folder),
    )
    plain: dict[str, Any] = msgspec.to_builtins(report)
    return plain


def _shapes(ranking: Ranking) -> list[tuple[float, tuple[int, ...]]]:
    """The different shapes from wide to narrow, each with the largest ratio that leads to it.

    Raises:
        RecipeError: Nothing can be removed.
    """
    shapes: dict[tuple[int, ...], float] = {}
    for step in range(1, math.ceil(math.log(_NARROWEST, _FINEST))):
        ratio = round(1 - _FINEST**step, 6)
        try:
            shapes[kept_at(ranking, ratio)] = ratio
        except RecipeError:  # so much cannot be removed, nor any more
            if not shapes:
                raise
            break
    return [(ratio, kept) for kept, ratio in shapes.items()]


def _engine(folded: nn.Module, spec: ModelSpec, form: Form, images: Tensor, folder: Path) -> dict[str, Any]:
    model = folder / "model.onnx"
    if form.precision == "fp32":
        onnx_from_torch(folded, spec, model, opset=form.opset)
    else:
        from edgepose.compress.quantise import QuantiseConfig, convert, prepare
        from edgepose.export.qdq import dialect_for, quantised_onnx

        config = QuantiseConfig(symmetric=form.symmetric, protected=form.protected, subset_size=len(images))
        plain, ranges = convert(prepare(folded, [images], config))
        whole = folder / "float.onnx"
        onnx_from_torch(plain, spec, whole, opset=form.opset, ranges=ranges)
        quantised_onnx(whole, ranges, model, dialect=dialect_for(form.backend), weight_bits=form.weight_bits)
        whole.unlink()
    main = engine_file(model, form.backend, folder)
    return {"main": main.name, "precision": form.precision}


def _asked_speedup(settings: PruneStage, watch: Stopwatch, unpruned: Contender, original: Contender) -> float:
    """The speed-up over the unpruned network that a goal comes to."""
    if settings.speedup is not None:
        return settings.speedup
    assert settings.target_latency_ms is not None
    now_ms = watch.time(original, unpruned, EFFORT.looks[1]).ms
    asked = now_ms / settings.target_latency_ms
    if asked < _LEAST_SPEEDUP:
        raise RecipeError(
            "prune.target_latency_ms",
            found=f"{settings.target_latency_ms:g}",
            expected=f"less than the {now_ms:.3f} ms that the unpruned network takes here in {watch.form.precision}",
            fix="leave the prune section out, or ask for less time",
        )
    return asked


def _stairs(workshop: _Workshop, shapes: list[tuple[float, tuple[int, ...]]], found: Found) -> tuple[Stair, ...]:
    stairs = []
    for number, timing in found.timings.items():
        ratio, kept = shapes[number]
        plan = workshop.plan(ratio)
        stairs.append(
            Stair(
                ratio=ratio,
                macs=plan.macs_after,
                macs_left=plan.macs_after / plan.macs_before,
                channels=sum(kept),
                kept={group.name: count for group, count in zip(workshop.ranking.groups, kept, strict=True)},
                timing=timing,
                chosen=number == found.shape,
            )
        )
    return tuple(stairs)


def _out_of_reach(settings: PruneStage, asked: float, fastest: Stair) -> RecipeError:
    timing = fastest.timing
    shape = f"the fastest of the shapes that were timed, with {fastest.macs / 1e6:.1f} MMAC ({fastest.macs_left:.0%})"
    if settings.target_latency_ms is not None:
        return RecipeError(
            "prune.target_latency_ms",
            found=f"{settings.target_latency_ms:g}, which is {asked:.2f} x as fast as the unpruned network",
            expected=f"at least {timing.ms:.3f} ms ({timing.speedup:.2f} x), the time of {shape}",
            fix="allow more time, choose a smaller network, protect fewer layers, or quantise",
        )
    return RecipeError(
        "prune.speedup",
        found=f"{asked:g}",
        expected=f"at most {timing.speedup:.2f}, the speed-up of {shape}, {timing.ms:.3f} ms",
        fix="ask for less, choose a smaller network, or protect fewer layers",
    )
