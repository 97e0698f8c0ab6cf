"""Settings of training and fine-tuning runs, as data.

Invariant: importing this loads no training library, so that a stage can be recognised as done without one.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from edgepose.blocks.config import LossConfig
from edgepose.data.augment import AugmentConfig

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Weight = Annotated[float, msgspec.Meta(ge=0)]


class TrainConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Settings of a training or fine-tuning run.

    Attributes:
        epochs: Passes over the training people.
        batch_size: People per step.
        learning_rate: Peak of the one-cycle schedule.
        weight_decay: On convolution and linear weights only.
        warmup: Share of the steps spent rising to the peak.
        final_rate: Learning rate at the end as a share of the peak; far above 0 where another run goes on from this.
        sigma_px: Standard deviation of the label Gaussians, input pixels; for heat maps at least 0.75 cells.
        averaging: Decay of the exponential moving average of the weights, per step.
        distill_weight: Share of the loss that comes from the teacher, 0..1.
        uncovered_teacher: The teacher sees people without what is pasted in front of them (learning with privileged
            information, Lopez-Paz et al., 2016), so that it tells where hidden joints are and how sure one could be.
        mirrored_teacher: What the teacher says is the mean over each picture and its mirror image, the flip test: twice
            its cost for a better teacher.
        seed: Of batches and augmentation.
        bf16: Run convolutions in bfloat16.
        augment: Random views.
        loss: How keypoint errors are weighed.
        optimizer: AdamW, or Muon for the weights of convolutions and linear layers and AdamW for the rest.
        stage_weight: Weight of each earlier stage's keypoint loss, where a network has several, against 1 of the last.
        visibility_weight: Weight of the visibility head's loss, where a network has one.
        uncertainty_weight: Weight of the expected errors' loss, where a network says them.
        masking: Expected share of the keypoints whose evidence an occlusion-robust block does not get to see.
        rendered: Share of each batch that comes from a second set of people, where one is given.
        freeze_epochs: First epochs, during which the network's part named "backbone" stays as it is, the statistics of
            its normalisations included.
        feature_weight: Weight of the distance between feature maps of network and teacher, against 1 of the rest of the
            loss; the distance is the share of the teacher's variance that the network's maps do not explain.
        sparsity: Weight of the group lasso on the channels that pruning could take, added up over all of them; 1e-4 is
            a good start. With it the last epoch is kept, which is the sparsest, not the best one on dev.
        dense: Layers that `sparsity` leaves alone, as shell patterns of module names.
    """

    epochs: Annotated[int, msgspec.Meta(ge=1)]
    batch_size: Annotated[int, msgspec.Meta(ge=2)] = 32
    learning_rate: Annotated[float, msgspec.Meta(gt=0)] = 1.5e-3
    weight_decay: Weight = 0.05
    warmup: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.05
    sigma_px: Annotated[float, msgspec.Meta(gt=0)] = 3.0
    averaging: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.998
    distill_weight: Share = 0.0
    seed: Annotated[int, msgspec.Meta(ge=0)] = 0
    bf16: bool = True
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optimizer: Literal["adamw", "muon"] = "adamw"
    stage_weight: Weight = 1.0
    visibility_weight: Weight = 0.5
    uncertainty_weight: Weight = 0.1
    masking: Annotated[float, msgspec.Meta(ge=0, le=0.5)] = 0.0
    rendered: Share = 0.0
    final_rate: Share = 0.002
    freeze_epochs: Annotated[int, msgspec.Meta(ge=0)] = 0
    feature_weight: Weight = 0.0
    sparsity: Weight = 0.0
    dense: tuple[str, ...] = ()
    uncovered_teacher: bool = False
    mirrored_teacher: bool = False
