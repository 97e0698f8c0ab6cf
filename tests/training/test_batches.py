"""Batches: a function of seed and number alone, whoever prepares them; the tensors that networks see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from edgepose.blocks.config import spec_of
from edgepose.data.augment import AugmentConfig, OcclusionConfig
from edgepose.data.coco import PoseDataset, read_image
from edgepose.errors import UsageError
from edgepose.pose.codec import decode
from edgepose.pose.preprocess import crop_transforms, normalise, warp
from edgepose.spec import ModelSpec
from edgepose.training.batches import AugmentedPeople, Batch, layout_of, to_input
from tests.training.dots import CONFIG, KEYPOINTS, NETWORK, SPEC, dots, network

HEAT = spec_of(msgspec.structs.replace(NETWORK, head="heatmap", stride=4), KEYPOINTS)


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> PoseDataset:
    return dots(tmp_path_factory.mktemp("dots"), "train", 20, seed=1)


def equal(first: Batch, second: Batch) -> bool:
    tensors = [(b.crops, b.weights, b.keypoints, b.visible, b.known, *b.targets) for b in (first, second)]
    return all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize("spec", [SPEC, HEAT], ids=["simcc", "heatmap"])
def test_shapes_and_types(spec: ModelSpec, people: PoseDataset) -> None:
    batch = AugmentedPeople(people, spec, CONFIG)[0]
    assert (batch.crops.shape, batch.crops.dtype) == ((8, 64, 64, 3), torch.uint8)
    assert (batch.weights.shape, batch.weights.dtype) == ((8, 4), torch.float32)
    assert [tuple(t.shape[1:]) for t in batch.targets] == [o.shape[1:] for o in spec.outputs]
    assert {t.dtype for t in (*batch.targets, batch.keypoints, batch.visible, batch.known)} == {torch.float32}
    assert (batch.keypoints.shape, batch.visible.shape, batch.known.shape) == ((8, 4, 2), (8, 4), (8, 4))


@pytest.mark.parametrize("spec", [SPEC, HEAT], ids=["simcc", "heatmap"])
def test_labels_lie_on_the_dots(spec: ModelSpec, people: PoseDataset) -> None:
    """Decoding the labels finds pixels of the dots' own colours."""
    config = msgspec.structs.replace(
        CONFIG, augment=msgspec.structs.replace(CONFIG.augment, mirror=0, color=0, cutout=0)
    )
    batch = AugmentedPeople(people, spec, config)[0]
    targets = [t.log().clamp(min=-30) for t in batch.targets] if spec is SPEC else batch.targets
    points, _ = decode({o.name: t.numpy() for o, t in zip(spec.outputs, targets, strict=True)}, spec.decoder)
    for crop, joints, weights in zip(batch.crops.numpy(), points, batch.weights.numpy(), strict=True):
        for joint, (x, y) in enumerate(joints[:3]):  # blue, green, red
            if weights[joint]:
                pixel = crop[round(float(y)), round(float(x))].astype(int)
                assert pixel.argmax() == joint
                assert pixel[joint] > 150


def test_batches_are_functions_of_their_number(people: PoseDataset) -> None:
    first, second = AugmentedPeople(people, SPEC, CONFIG), AugmentedPeople(people, SPEC, CONFIG)
    assert equal(first[5], second[5])
    assert equal(first[5], first[5])
    assert not equal(first[0], first[first.batches_per_epoch])  # the same place in the next epoch
    other = AugmentedPeople(people, SPEC, msgspec.structs.replace(CONFIG, seed=CONFIG.seed + 1))
    assert not equal(first[0], other[0])


def test_nobody_comes_twice_in_an_epoch(people: PoseDataset) -> None:
    plain = msgspec.structs.replace(
        CONFIG,
        batch_size=5,
        augment=msgspec.structs.replace(
            CONFIG.augment, rotation_deg=0, scale=1, shift=0, mirror=0, color=0, cutout=0, blur=0
        ),
    )
    batches = AugmentedPeople(people, SPEC, plain)
    for epoch in (0, 1):
        crops = torch.cat([batches[epoch * 4 + i].crops for i in range(4)])
        assert len({crop.numpy().tobytes() for crop in crops}) == 20
    orders = [torch.cat([batches[e * 4 + i].crops for i in range(4)]) for e in (0, 1)]
    assert not torch.equal(*orders)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int, people: PoseDataset) -> None:
    batches = AugmentedPeople(people, SPEC, CONFIG)
    numbers = range(1, 6)
    found = list(batches.numbers(numbers, workers))
    assert len(found) == 5
    assert all(equal(batch, batches[number]) for batch, number in zip(found, numbers, strict=True))
    assert all(equal(a, b) for a, b in zip(batches.numbers(numbers, 0), found, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_no_numbers_are_no_batches(workers: int, people: PoseDataset) -> None:
    assert list(AugmentedPeople(people, SPEC, CONFIG).numbers(range(0), workers)) == []


def test_fewer_people_than_a_batch_are_one_batch(people: PoseDataset) -> None:
    batches = AugmentedPeople(people.sample(3, seed=0), SPEC, CONFIG)
    assert len(batches) == 1
    assert len(batches[0].crops) == len(batches[1].crops) == 3


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_training_and_inference_normalise_alike(color: str, people: PoseDataset) -> None:
    preprocess = msgspec.structs.replace(SPEC.preprocess, color=color)
    spec = msgspec.structs.replace(SPEC, preprocess=preprocess)
    frame = read_image(people.persons[0].image)
    crops = warp(frame, crop_transforms(people.persons[0].box_xyxy[None], preprocess), preprocess.input_hw)
    tensor = to_input(torch.from_numpy(crops), spec)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(tensor.numpy() - normalise(crops, preprocess)).max() < 1e-5


def test_thin_strided_shortcuts_are_kept_from_channels_last() -> None:
    """Their gradients end the process there: shortcuts of 8 channels on maps of 64x64, for instance."""
    assert layout_of(network()) == torch.contiguous_format
    wide = msgspec.structs.replace(NETWORK, stem=16, widths=(16, 16, 16, 16))
    assert layout_of(network(wide)) == torch.channels_last
    layer = nn.Conv2d(8, 16, 1, 2, bias=False)
    layout = layout_of(layer)
    layer(torch.randn(16, 8, 64, 64).contiguous(memory_format=layout)).square().mean().backward()
    assert layer.weight.grad is not None
    assert bool(layer.weight.grad.isfinite().all())


def test_a_photograph_that_went_missing_is_named(tmp_path: Path) -> None:
    people = dots(tmp_path, "train", 2)
    people.persons[1].image.unlink()
    with pytest.raises(Exception, match=r"train_2\.png"):
        AugmentedPeople(people, SPEC, CONFIG)


# A second set of people in every batch


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> PoseDataset:
    return dots(tmp_path_factory.mktemp("others"), "train", 7, seed=9)


STILL = msgspec.structs.replace(
    CONFIG,
    augment=AugmentConfig(rotation_deg=0, scale=1, shift=0, mirror=0, color=0, cutout=0, blur=0),
)


def test_a_share_of_every_batch_comes_from_the_second_set(people: PoseDataset, others: PoseDataset) -> None:
    mixed = AugmentedPeople(people, SPEC, msgspec.structs.replace(STILL, rendered=0.25), extra=others)
    assert len(mixed) == 20 // 6  # six of eight are of the first set, and an epoch shows each of them once
    patches = {
        name: {p.crops.numpy().tobytes() for p in _singles(data)}
        for name, data in (("first", people), ("second", others))
    }
    crops = [[crop.numpy().tobytes() for crop in mixed[number].crops] for number in range(7)]
    assert all(len(batch) == 8 for batch in crops)
    assert all(crop in patches["first"] for batch in crops for crop in batch[:6])
    assert all(crop in patches["second"] for batch in crops for crop in batch[6:])
    second = [crop for batch in crops for crop in batch[6:]]
    assert len(set(second[:7])) == len(set(second[7:14])) == 7  # everybody comes before anybody comes again


def _singles(data: PoseDataset) -> list[Batch]:
    one = msgspec.structs.replace(STILL, batch_size=1)
    batches = AugmentedPeople(data, SPEC, one)
    return [batches[number] for number in range(len(data))]


def test_the_second_set_leaves_the_views_of_the_first_alone(people: PoseDataset, others: PoseDataset) -> None:
    mixed = AugmentedPeople(people, SPEC, msgspec.structs.replace(CONFIG, rendered=0.25), extra=others)
    alone = AugmentedPeople(people, SPEC, msgspec.structs.replace(CONFIG, batch_size=6))
    assert torch.equal(mixed[4].crops[:6], alone[4].crops)
    assert torch.equal(mixed[4].visible[:6], alone[4].visible)


@pytest.mark.parametrize(("share", "given"), [(0.25, False), (0.0, True), (1.0, True), (0.01, True)])
def test_shares_that_cannot_be_had_are_refused(
    share: float, given: bool, people: PoseDataset, others: PoseDataset
) -> None:
    config = msgspec.structs.replace(CONFIG, rendered=share)
    with pytest.raises(UsageError, match="rendered"):
        AugmentedPeople(people, SPEC, config, extra=others if given else None)


# Occlusion


def test_occlusion_grows_over_the_run_and_hides_joints(people: PoseDataset) -> None:
    occlusion = OcclusionConfig(pasted=1.0, start=0.0, ramp=0.5)
    config = msgspec.structs.replace(
        STILL, epochs=40, augment=msgspec.structs.replace(STILL.augment, occlusion=occlusion)
    )
    batches = AugmentedPeople(people, SPEC, config)
    total = 40 * len(batches)
    hidden = [
        np.mean([float((1 - batches[n].visible).mean()) for n in range(start, start + 6)]) for start in (0, total - 6)
    ]
    assert hidden[0] < 0.05
    assert hidden[1] > hidden[0] + 0.1
    last = batches[total - 1]
    assert (last.weights * (1 - last.visible)).sum() > 0  # hidden joints are trained on
    assert equal(batches[total + 5], batches[total + 5])  # views behind the run's end exist: calibration uses them


def test_painted_cells_are_told_unless_something_else_may_be_in_front(people: PoseDataset) -> None:
    config = msgspec.structs.replace(CONFIG, augment=AugmentConfig(cutout=1.0))
    batch = AugmentedPeople(people, SPEC, config)[0]
    assert batch.covered.shape == (len(batch.crops), SPEC.preprocess.input_hw[0] // 8, SPEC.preprocess.input_hw[1] // 8)
    assert batch.covered.min() == 0
    assert (batch.covered.amax((1, 2)) > 0.3).all()
    hidden = [np.where([0, 0, 1], 1, person.keypoints).astype(np.float32) for person in people.persons]
    persons = tuple(replace(p, keypoints=k) for p, k in zip(people.persons, hidden, strict=True))
    assert (AugmentedPeople(replace(people, persons=persons), SPEC, config)[0].covered == -1).all()


def test_coordinates_are_their_own_labels(people: PoseDataset) -> None:
    spec = spec_of(msgspec.structs.replace(NETWORK, head="regression"), KEYPOINTS)
    batch = AugmentedPeople(people, spec, CONFIG)[0]
    (shares,) = batch.targets
    assert torch.allclose(shares * 64 - 0.5, batch.keypoints, atol=1e-4)
