"""Prediction over a labelled set: the figures of the loop are those of the run half."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from edgepose.blocks.config import spec_of
from edgepose.data.coco import PoseDataset, read_image
from edgepose.errors import AnnotationError
from edgepose.estimator import PoseEstimator
from edgepose.training.predict import Crops, cut_crops, predict
from edgepose.training.session import TorchSession
from tests.training.dots import KEYPOINTS, NETWORK, SPEC, dots, network

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> PoseDataset:
    return dots(tmp_path_factory.mktemp("dots"), "dev", 7, seed=1)


@pytest.fixture(scope="module")
def crops(people: PoseDataset) -> Crops:
    return cut_crops(people, SPEC)


def test_the_estimator_finds_the_same_keypoints(people: PoseDataset, crops: Crops) -> None:
    for config in (NETWORK, msgspec.structs.replace(NETWORK, head="heatmap", stride=4)):
        model, spec = network(config), spec_of(config, KEYPOINTS)
        found = predict(model, spec, crops)
        assert (found.shape, found.dtype) == ((7, 4, 2), np.float32)
        estimator = PoseEstimator(TorchSession(model, spec), spec)
        for person, keypoints in zip(people.persons, found, strict=True):
            poses = estimator(read_image(person.image), person.box_xyxy[None])
            assert np.abs(poses.keypoints[0] - keypoints).max() < 0.02


def test_batch_size_and_memory_layout_change_nothing(crops: Crops) -> None:
    config = msgspec.structs.replace(NETWORK, head="heatmap", stride=4)
    spec, model = spec_of(config, KEYPOINTS), network(config).eval()
    expected = predict(model, spec, crops)
    assert np.abs(predict(model, spec, crops, batch_size=2) - expected).max() < 0.01
    last = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert np.abs(predict(last, spec, crops) - expected).max() < 0.01


def test_bfloat16_stays_near(crops: Crops) -> None:
    model = network().eval()
    difference = np.abs(predict(model, SPEC, crops, bf16=True) - predict(model, SPEC, crops))
    assert np.median(difference) < 1


def test_the_model_is_as_it_was(crops: Crops) -> None:
    model = network().train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    predict(model, SPEC, crops)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    predict(model.eval(), SPEC, crops)
    assert not model.training


def test_nobody_cannot_be_measured(people: PoseDataset) -> None:
    with pytest.raises(AnnotationError, match="at least one person"):
        cut_crops(people.subset([]), SPEC)


def test_the_torch_session_names_its_tensors() -> None:
    model = network().train()
    session = TorchSession(model, SPEC)
    assert (session.inputs, session.outputs) == (SPEC.inputs, SPEC.outputs)
    images = np.random.default_rng(0).normal(size=(3, 3, 64, 64)).astype(np.float32)
    found = session.infer({"image": images})
    assert {name: (a.shape, a.dtype.name) for name, a in found.items()} == {
        "simcc_x": ((3, 4, 128), "float32"),
        "simcc_y": ((3, 4, 128), "float32"),
    }
    # In evaluation mode each image is on its own, and nothing is learnt.
    alone = session.infer({"image": images[1:2]})
    assert np.abs(alone["simcc_x"][0] - found["simcc_x"][1]).max() < 1e-4
    assert not any(part.training for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    session.close()
