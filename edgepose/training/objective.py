"""What training minimises: the keypoint loss of every stage, visibility, expected errors, and distance to a teacher, in
outputs and in feature maps.

Invariant: each term is there only where the network says something about it; a network of keypoints alone is trained
on its keypoint loss alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.heads import Stage
from edgepose.blocks.losses import distillation_loss, joint_weights, make_loss
from edgepose.blocks.orn_losses import clear_loss, distance_px, error_loss, visibility_loss
from edgepose.pose.codec import output_names
from edgepose.spec import ModelSpec
from edgepose.training.batches import Batch
from edgepose.training.config import TrainConfig
from edgepose.training.features import FeatureMatching, Maps

Outputs = Sequence[Tensor]


class Objective(nn.Module):
    """The loss of one batch; its parameters, of the keypoint loss and of `features`, are trained with the network's.

    Args:
        spec: Says which outputs mean what.
        config: Weights of the terms.
        features: Compares feature maps with a teacher's; None leaves that term out.
    """

    def __init__(self, spec: ModelSpec, config: TrainConfig, features: FeatureMatching | None = None) -> None:
        super().__init__()
        self.spec, self.config, self.features = spec, config, features
        self.keypoint_loss = make_loss(spec, config.loss, seed=config.seed)
        names = [output.name for output in spec.outputs]
        self._located = [names.index(name) for name in output_names(spec.decoder)]
        self._visibility = names.index(spec.visibility) if spec.visibility else None
        self._log_error = names.index(spec.uncertainty) if spec.uncertainty else None
        spoken_for = {*self._located, self._visibility, self._log_error}
        self._others = [place for place in range(len(names)) if place not in spoken_for]

    def forward(
        self,
        stages: Sequence[Stage],
        batch: Batch,
        taught: Outputs | None = None,
        maps: tuple[Maps, Maps] | None = None,
    ) -> Tensor:
        """The loss.

        Args:
            stages: What the network says, after what its earlier stages say.
            batch: Labels.
            taught: A teacher's outputs, in the same order; it may lack the last ones, which then follow the labels, as
                does all but keypoints where the teacher sees people uncovered (`uncovered_teacher`).
            maps: Feature maps of the network and of its teacher, for `features`.
        """
        if taught is not None and self.config.uncovered_teacher:
            taught = taught[: 1 + max(self._located)]  # it sees other images: what is hidden here, it cannot know
        loss = self._said(stages, batch, taught)
        if self.features is not None and maps is not None:
            loss = loss + self.config.feature_weight * self.features(*maps)
        return loss

    def _said(self, stages: Sequence[Stage], batch: Batch, taught: Outputs | None) -> Tensor:
        """The loss of what the network says."""
        *earlier, last = stages
        outputs, located = last.outputs, [last.outputs[i] for i in self._located]
        weights = joint_weights(batch.weights, batch.visible, batch.known, self.config.loss)
        loss: Tensor = self.keypoint_loss(located, batch.targets, weights, maps=last.maps)
        for stage in earlier:
            said = self.keypoint_loss(stage.outputs, batch.targets, weights, maps=stage.maps)
            loss = loss + self.config.stage_weight * said
        share = self.config.distill_weight
        known = len(taught) if taught is not None and share > 0 else 0
        cleared: Tensor | float = 0.0
        if last.clear is not None and (self._visibility is None or self._visibility >= known):
            cleared = self.config.visibility_weight * clear_loss(last.clear, batch.covered)
        if taught is None or share <= 0:
            return loss + cleared + self._told_by_labels(outputs, located, batch, known=0)
        taught_located = [taught[i] for i in self._located]
        loss = (1 - share) * loss + share * distillation_loss(located, taught_located, self.spec.decoder)
        loss = loss + self._told_by_teacher(outputs, taught)
        return loss + cleared + self._told_by_labels(outputs, located, batch, known=known)

    def _told_by_labels(self, outputs: Outputs, located: Outputs, batch: Batch, *, known: int) -> Tensor | float:
        """What the network says of itself, against the labels; a teacher knows better about the first `known`."""
        loss: Tensor | float = 0.0
        if self._visibility is not None and self._visibility >= known:
            said = visibility_loss(outputs[self._visibility], batch.visible, batch.known)
            loss = loss + self.config.visibility_weight * said
        if self._log_error is not None and self._log_error >= known:
            error_px = distance_px(located, self.spec.decoder, batch.keypoints)
            said = error_loss(outputs[self._log_error], error_px, batch.weights)
            loss = loss + self.config.uncertainty_weight * said
        return loss

    def _told_by_teacher(self, outputs: Outputs, taught: Outputs) -> Tensor | float:
        """What the network says of itself, and what else it puts out, against the teacher.

        Not against labels: fine-tuning often runs without occlusion, where nearly all is visible, and would undo the
        calibration that the teacher has. Nobody here knows labels of outputs that the specification only lists, so
        fine-tuning holds them where they are.
        """
        loss: Tensor | float = 0.0
        if self._visibility is not None and self._visibility < len(taught):
            probabilities = taught[self._visibility].float().sigmoid()
            said = visibility_loss(outputs[self._visibility], probabilities, torch.ones_like(probabilities))
            loss = loss + self.config.visibility_weight * said
        if self._log_error is not None and self._log_error < len(taught):
            said = F.l1_loss(outputs[self._log_error].float(), taught[self._log_error].float())
            loss = loss + self.config.uncertainty_weight * said
        for place in self._others:
            if place < len(taught):
                target = taught[place].float()
                spread = target.var(correction=0).clamp(min=1e-6)
                loss = loss + F.mse_loss(outputs[place].float(), target) / spread
        return loss
