"""The people that compression sees, and which of them each stage does.

Invariant: a stage's key and its card name the people that the stage saw, and no others.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgepose.data.coco import PoseDataset
from edgepose.errors import UsageError
from edgepose.stages.settings import Plan
from edgepose.training.config import TrainConfig


@dataclass(frozen=True, slots=True, eq=False)
class StageData:
    """People that the compression stages may see.

    Attributes:
        train: Training people without dev.
        dev: The people that choices are made on.
        rendered: They fill the share of every batch that fine-tuning's settings say; None for none.
    """

    train: PoseDataset
    dev: PoseDataset
    rendered: PoseDataset | None = None

    @property
    def digests(self) -> dict[str, str]:
        """Of those whom every stage may see."""
        return {"train": self.train.digest, "dev": self.dev.digest}

    def digests_for(self, config: TrainConfig | None) -> dict[str, str]:
        """Of those whom fine-tuning with these settings sees."""
        rendered = self._rendered_for(config)
        return self.digests if rendered is None else {**self.digests, "rendered": rendered.digest}

    def people_for(self, config: TrainConfig) -> tuple[PoseDataset, ...]:
        """What `training.fit` is handed."""
        rendered = self._rendered_for(config)
        return (self.train, self.dev) if rendered is None else (self.train, self.dev, rendered)

    def _rendered_for(self, config: TrainConfig | None) -> PoseDataset | None:
        return self.rendered if config is not None and config.rendered > 0 else None


def require_rendered(plan: Plan, people: StageData | None) -> None:
    """Refuse, before any work, settings that ask for rendered people where there are none.

    Args:
        plan: What is to be done.
        people: Whom the stages may see; None for nobody.

    Raises:
        UsageError: There are none.
    """
    share = _share(plan)
    if share > 0 and (people is None or people.rendered is None):
        raise UsageError(
            "--rendered", found=f"no folder, and a recipe that fills {share:g} of each batch with rendered people",
            expected="the folder that `edgepose render` wrote", fix="render some, or take `rendered` out of the recipe",
        )  # fmt: skip


def require_share(plan: Plan, people: StageData | None) -> None:
    """Refuse rendered people that nothing would be done with.

    Raises:
        UsageError: No fine-tuning of the recipe takes any.
    """
    if people is not None and people.rendered is not None and not _share(plan):
        raise UsageError(
            "--rendered", found="a recipe that fills no batch with them", expected="training: {rendered: 0.125} in it",
            fix="write it into the recipe's prune or quantise, or leave --rendered off",
        )  # fmt: skip


def _share(plan: Plan) -> float:
    quantising = None if plan.quantise is None else plan.quantise.training
    trainings = (plan.sparse, *(step.recover for step in plan.pruning), quantising)
    return max((training.rendered for training in trainings if training is not None), default=0.0)
