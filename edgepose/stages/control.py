"""The control arm of a recipe: the uncompressed network, trained as long as the recipe fine-tunes the compressed one.

Invariant: every epoch that the compressed network is fine-tuned for, the control is trained for, with the same people,
views, loss, schedule and teacher; only what compresses is left out. So what more training alone is worth is not taken
for what compression does not cost.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from edgepose.blocks.card import read_card
from edgepose.errors import CheckpointError, UsageError
from edgepose.stages.assemble import StageObserver, observed
from edgepose.stages.cache import StageKey, StageResult, run_state
from edgepose.stages.people import StageData, require_rendered, require_share
from edgepose.stages.settings import Plan
from edgepose.stages.source import Source
from edgepose.training.config import TrainConfig

if TYPE_CHECKING:
    from edgepose.training.loop import Observer as TrainingObserver

    class Observer(StageObserver, TrainingObserver, Protocol):
        """Told about phases, and about the training inside them; that of `compile_bundle` will do."""


class Phase(msgspec.Struct, frozen=True):
    """One training of the control.

    Attributes:
        name: The recipe's stage that it stands for.
        config: Its settings, without what compresses.
        follows_source: Whether the teacher is the network that all starts from, as in recovery, or the one before this
            phase, as in quantisation-aware training.
    """

    name: str
    config: TrainConfig
    follows_source: bool


def control_phases(plan: Plan) -> tuple[Phase, ...]:
    """The trainings of a recipe in order, without what compresses.

    Raises:
        UsageError: The recipe trains nothing.
    """
    phases = []
    if plan.sparse is not None:
        phases.append(Phase("sparse", msgspec.structs.replace(plan.sparse, sparsity=0.0, dense=()), True))
    phases += [Phase(f"recover{step.suffix}", step.recover, True) for step in plan.pruning if step.recover is not None]
    if plan.quantise is not None and plan.quantise.training is not None:
        phases.append(Phase("qat", plan.quantise.training, False))
    if not phases:
        raise UsageError(
            "control",
            found="a recipe without fine-tuning",
            expected="epochs of recovery or of quantisation-aware training",
            fix="compare with the checkpoint itself: nothing was trained for longer",
        )
    return tuple(phases)


def train_control(
    source: Source, data: StageData, plan: Plan, out: Path, run: tuple[Observer, int]
) -> tuple[StageResult, ...]:
    """Train the control of a recipe and write it; phases that were done before are found, and a stopped one goes on.

    Args:
        source: The uncompressed checkpoint.
        data: People.
        plan: What the recipe asks for.
        out: The checkpoint to write.
        run: Who is told about progress, and how many processes prepare batches.

    Returns:
        The phases, the last one's figures on dev in its report.

    Raises:
        UsageError: The recipe trains nothing.
        CheckpointError: The source is compressed already.
        StorageError: Disk full, read-only or no permission.
    """
    from edgepose.blocks.checkpoint import load_checkpoint, save_checkpoint

    card = read_card(source.path)
    if card.plan is not None or card.quantisation is not None:
        raise CheckpointError(
            card.name, found="a compressed checkpoint", expected="the float checkpoint that a recipe starts from"
        )
    require_rendered(plan, data)
    require_share(plan, data)
    phases, current, results = control_phases(plan), source, []
    for phase in phases:
        result = _phase(phase, current, source if phase.follows_source else current, data, run)
        results.append(result)
        current = Source(result.path / "network", source.module)
    trained = load_checkpoint(current.path)
    figures = {name: value for name, value in results[-1].report["dev"].items() if value is not None}
    save_checkpoint(out, msgspec.structs.replace(trained.card, metrics={"dev": figures}), trained.tensors)
    return tuple(results)


def _phase(phase: Phase, source: Source, teacher: Source, data: StageData, run: tuple[Observer, int]) -> StageResult:
    observer, workers = run
    card = read_card(source.path)
    inputs = {
        **({} if card.own is None else {"module": card.own.structure}),  # its weights do not say what it computes
        "checkpoint": card.weights_sha256,
        "teacher": read_card(teacher.path).weights_sha256,
        **data.digests_for(phase.config),
    }
    key = StageKey(f"control-{phase.name}", inputs, phase.config, ("torch", "numpy", "opencv-python-headless"))
    state = run_state(key)

    def work(folder: Path) -> dict[str, Any]:
        from edgepose.stages import compress
        from edgepose.training.loop import RunOptions

        options = (folder, RunOptions(state, observer, workers))
        return compress.recover(source, teacher, data, phase.config, options, stage="train")

    result = observed(key, work, observer)
    state.unlink(missing_ok=True)
    return result
