"""Making a trained network's word on itself reliable: probabilities of being seen, and expected errors.

Invariant: three numbers are fitted, on people that were not trained on, and folded into the last layers; keypoints stay
as they are, and the exported network needs nothing more.

A network is more certain on what it was trained on than on anything else, and of what will stand in front of people it
has seen little. So people are put behind things of a kind that training does without (`OcclusionConfig.veils`), and
rendered people of other textures, who hide joints themselves, count as much as all photographs. Platt's scaling (1999)
corrects logits by a scale and a shift; expected errors are multiplied by the factor that makes them right on average.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from edgepose.blocks.orn import ORN
from edgepose.blocks.orn_losses import distance_px
from edgepose.data.augment import AugmentConfig, OcclusionConfig
from edgepose.data.coco import PoseDataset
from edgepose.pose.calibration import auroc, expected_calibration_error, fit_platt
from edgepose.pose.codec import output_names
from edgepose.spec import ModelSpec
from edgepose.training.batches import AugmentedPeople, Batch, to_input
from edgepose.training.config import TrainConfig


def calibrate_visibility(
    model: nn.Module, spec: ModelSpec, data: PoseDataset, config: TrainConfig, rendered: PoseDataset | None = None
) -> dict[str, float]:
    """Fit and fold the corrections, in place.

    Args:
        model: A float network with an occlusion-robust block, trained.
        spec: Its specification.
        data: People that it was not trained on.
        config: The run's settings.
        rendered: Rendered people that it was not trained on, taken as they are; None for none.

    Returns:
        What was folded in and on how much: joints, scale and shift of the logits, factor of the expected errors; and
        how well probabilities then rank and fit these joints. Empty where nothing could be fitted: no such block, no
        occlusion, or joints that are all seen or all hidden.
    """
    blocks = [part for part in model.modules() if isinstance(part, ORN)]
    if len(blocks) != 1 or config.augment.occlusion is None:
        return {}
    logits, truth, ratios = _judged(model, spec, data, _behind_veils(config))
    others = _judged(model, spec, rendered, _as_they_are(config)) if rendered is not None else None
    if others is not None and len(others[0]):
        logits, truth = (
            np.concatenate([mine, np.resize(their, len(mine))])
            for mine, their in zip((logits, truth), others[:2], strict=True)
        )
    if not 0 < truth.sum() < len(truth):
        return {}
    scale, shift = fit_platt(logits, truth)
    factor = float(ratios.mean()) if len(ratios) else 1.0
    if scale <= 0 or not factor > 0:
        return {}  # a head that has learnt nothing: turning it around would not help
    blocks[0].correct(scale, shift, math.log(factor))
    probabilities = 1 / (1 + np.exp(-(scale * logits + shift)))
    return {
        "joints": float(len(truth)),
        "hidden_share": float(1 - truth.mean()),
        "visibility_scale": scale,
        "visibility_shift": shift,
        "error_factor": factor,
        "auroc": auroc(probabilities, truth),
        "ece": expected_calibration_error(probabilities, truth),
    }


_PASSES = 2  # views of each person


def _as_they_are(config: TrainConfig) -> TrainConfig:
    plain = AugmentConfig(
        rotation_deg=0.0, scale=1.0, shift=0.0, mirror=config.augment.mirror, color=0.0, cutout=0.0, blur=0.0
    )
    return msgspec.structs.replace(config, augment=plain, rendered=0.0, epochs=1, uncovered_teacher=False)


_VEILS = OcclusionConfig(
    pasted=1.0, veils=1.0, start=1.0, body_parts=0.0, cutout=0.0, single=0.0, clutter=0.0, tangles=0.0, walls=0.0,
    joints=0.0,
)  # fmt: skip
"""Everybody behind irregular patches of other photographs and of drawn things, whatever training pasted."""


def _behind_veils(config: TrainConfig) -> TrainConfig:
    plain = _as_they_are(config)
    return msgspec.structs.replace(plain, augment=msgspec.structs.replace(plain.augment, occlusion=_VEILS))


def _judged(
    model: nn.Module, spec: ModelSpec, data: PoseDataset, config: TrainConfig
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits and visibility (M,) where it is known; error over expected error (L,) of labelled joints."""
    names = [output.name for output in spec.outputs]
    located = [names.index(name) for name in output_names(spec.decoder)]
    logits, truth, ratios = [], [], []
    for batch in _views(spec, data, config):
        outputs = _outputs(model, to_input(batch.crops, spec))
        known, labelled = batch.known > 0, batch.weights > 0
        logits.append(outputs[names.index(spec.visibility)][known])
        truth.append(batch.visible[known])
        error_px = distance_px([outputs[i] for i in located], spec.decoder, batch.keypoints)
        if spec.uncertainty:
            ratios.append((error_px / outputs[names.index(spec.uncertainty)].exp())[labelled])
    found = (torch.cat(parts) if parts else torch.empty(0) for parts in (logits, truth, ratios))
    first, second, third = (values.double().numpy() for values in found)
    return first, second, third


def _views(spec: ModelSpec, data: PoseDataset, config: TrainConfig) -> Iterator[Batch]:
    people = AugmentedPeople(data, spec, msgspec.structs.replace(config, batch_size=min(config.batch_size, len(data))))
    for number in range(len(people), len(people) * (1 + _PASSES)):  # behind the run, where severity is full
        yield people[number]


def _outputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        outputs = [output.float() for output in model(images)]
    model.train(was_training)
    return outputs
