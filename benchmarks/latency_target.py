"""`python benchmarks/latency_target.py [NETWORK …] [--speedup S …] [--precision fp32|int8]`: aimed at, and hit?

Each network is asked for each speed-up over itself, unpruned and in the same form, in ONNX Runtime: a search times
shapes, the network is pruned and quantised as a recipe would, and the finished engine is timed against the unpruned
one in fresh processes. Printed is what was achieved over what was asked for. Latency depends on neither weights nor
people, so few people are looked at and nothing is fine-tuned.

Invariant: what is timed is timed now: the cache is empty at the start.

Exit codes: 0 all within a tenth · 1 not all · 2 usage, or a speed-up out of reach · 6 data absent · 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # instead of this folder, whose files are the package `benchmarks`

import msgspec  # noqa: E402

from benchmarks.claim import Measured  # noqa: E402
from benchmarks.claims import data_root  # noqa: E402
from benchmarks.command import command  # noqa: E402
from benchmarks.context import THREADS, Context  # noqa: E402
from benchmarks.subjects import empty_cache, lspet  # noqa: E402
from edgepose.blocks.card import read_card  # noqa: E402
from edgepose.blocks.zoo import find_checkpoint  # noqa: E402
from edgepose.cli.console import show_table, steps  # noqa: E402
from edgepose.compress.staircase import TOLERANCE  # noqa: E402
from edgepose.data.coco import dataset  # noqa: E402
from edgepose.data.splits import split_train  # noqa: E402
from edgepose.profiles import load_target  # noqa: E402
from edgepose.recipe import Prune, QuantiseAfterTraining, Recipe  # noqa: E402
from edgepose.stages.assemble import engine_orders  # noqa: E402
from edgepose.stages.cache import StageKey, StageResult, run_stage  # noqa: E402
from edgepose.stages.latency import (  # noqa: E402
    STAIR_COLUMNS,
    Achieved,
    Staircase,
    form_of,
    measure_achieved,
    stair_rows,
    staircase_of,
)
from edgepose.stages.precisions import Timer  # noqa: E402
from edgepose.stages.settings import plan_of  # noqa: E402
from edgepose.storage import atomic_json  # noqa: E402
from edgepose.timing.turns import time_in_turns  # noqa: E402

NETWORKS, SPEEDUPS = ("kpe-s", "kpe-t"), (1.5, 2.0)
COLUMNS = ("network", "precision", "asked", "predicted", "achieved", "achieved/asked", "against FP32", "shapes timed")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked for.

    Attributes:
        network: Name of a zoo network, or path of a checkpoint.
        speedup: Over the unpruned network in the same form.
        precision: The form.
        people: Training people that are looked at.
    """

    network: str
    speedup: float
    precision: Literal["fp32", "int8"] = "int8"
    people: int = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a question."""

    question: Question
    staircase: Staircase
    achieved: Achieved

    @property
    def row(self) -> tuple[str, ...]:
        """Cells under `COLUMNS`."""
        asked, achieved = self.question.speedup, self.achieved.achieved
        return (
            self.question.network,
            self.question.precision,
            f"{asked:g} x",
            f"{self.achieved.predicted.speedup:.2f} x",
            f"{achieved.speedup:.2f} x ({achieved.low:.2f} to {achieved.high:.2f})",
            f"{achieved.speedup / asked:.3f}",
            f"{self.achieved.total.speedup:.2f} x",
            f"{len(self.staircase.stairs)} of {self.staircase.shapes}",
        )


def answer(context: Context, question: Question, timer: Timer = time_in_turns) -> Answer:
    """Aim, prune, quantise, export, build, and time what came of it; the stages are those of a compile.

    Raises:
        RecipeError: No shape is so fast.
    """
    import torch

    from edgepose.stages import aim, compress, export
    from edgepose.stages.people import StageData
    from edgepose.training.loop import RunOptions

    torch.set_num_threads(THREADS)
    what = f"{question.network}, {question.speedup:g} x in {question.precision}"
    quantise = QuantiseAfterTraining(calibration_images=question.people) if question.precision == "int8" else None
    recipe = Recipe("aimed", "a benchmark", prune=Prune(speedup=question.speedup, epochs=0), quantise=quantise)
    target = msgspec.structs.replace(load_target("this-cpu"), backends=("onnxruntime",), threads=THREADS)
    orders = engine_orders([target])
    plan = plan_of(recipe, (target,))
    form = form_of(plan, orders, recipe.export.opset)
    train, dev = split_train(dataset(lspet(context), "train"))
    people = StageData(train.sample(question.people, 0), dev.sample(16, 0))
    source, prune = find_checkpoint(question.network), plan.prune
    assert prune is not None

    def stage(name: str, work: Any) -> StageResult:
        context.told(f"{what}: {name}", 0, 1)
        return run_stage(StageKey(name, {}, msgspec.to_builtins(form) | {"what": what}), work)

    def told(shape: str, done: int, total: int) -> None:
        context.told(f"{what}: timing {shape}", done, total)

    found = stage("aim", lambda folder: aim.aim(source, people, prune, form, aim.Run(folder, timer, told)))
    settings = msgspec.structs.replace(prune, ratio=found.report["ratio"])
    last = stage("prune", lambda folder: compress.prune(source, people, settings, folder, search=found))
    if plan.quantise is not None:
        ptq, pruned = plan.quantise, last.path / compress.NETWORK
        last = stage("ptq", lambda folder: compress.quantise(pruned, people, ptq, (folder, RunOptions())))
    network = last.path / compress.NETWORK
    exported = stage("export", lambda folder: export.export(network, form.opset, folder))
    spec = read_card(network).spec
    bits = orders[0].weight_bits
    engine = stage("engine", lambda folder: export.build_engine(exported.path, spec, form.backend, bits, folder))
    return Answer(question, staircase_of(found.report), measure_achieved(found, engine, timer, told))


def latency_target_error(context: Context) -> Measured:
    """The largest deviation of the achieved from the asked-for speed-up, as a share: the claim about aiming."""
    with empty_cache(context.folder / "aimed"):
        answers = [answer(context, Question(name, speedup)) for name in NETWORKS for speedup in SPEEDUPS]
    worst = max(abs(one.achieved.error) for one in answers)
    text = "; ".join(f"{one.question.network}: {one.achieved.text}" for one in answers)
    return Measured(worst, text, {"answers": [msgspec.to_builtins(one.achieved) for one in answers]})


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Answers what the command line asks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="latency_target.py", description="Speed-ups asked for, and achieved.")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=f"(default: {' '.join(NETWORKS)})")
    parser.add_argument("--speedup", type=float, action="append", metavar="S", help="(default: 1.5 and 2)")
    parser.add_argument("--precision", choices=("int8", "fp32"), default="int8", help="form that is timed")
    parser.add_argument("--people", type=int, default=64, metavar="N", help="training people that are looked at")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write staircases and figures to this file")
    options = parser.parse_args(arguments)
    answers: list[Answer] = []
    questions = [
        Question(name, speedup, options.precision, options.people)
        for name in options.networks or NETWORKS
        for speedup in options.speedup or SPEEDUPS
    ]
    with tempfile.TemporaryDirectory(prefix="edgepose-aim-") as folder, empty_cache(Path(folder, "cache")):
        for question in questions:
            with steps() as shown:
                answers.append(answer(Context(data_root(), Path(folder), told=shown.told), question))
            _show(answers[-1])
    show_table(COLUMNS, [one.row for one in answers])
    if options.json is not None:
        atomic_json(options.json, [{"staircase": one.staircase, "achieved": one.achieved} for one in answers])
    return 0 if all(abs(one.achieved.error) <= TOLERANCE for one in answers) else 1


def _show(found: Answer) -> None:
    show_table(STAIR_COLUMNS, stair_rows(found.staircase), title=f"{found.question.network}, {found.staircase.goal}")
    print(found.achieved.text, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
