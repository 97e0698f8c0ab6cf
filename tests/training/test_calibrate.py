"""Calibration: probabilities and expected errors become right on unseen people, keypoints stay where they are."""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
import pytest
import torch

from edgepose.blocks.config import ORNConfig, spec_of
from edgepose.blocks.kpe import KPENet, build
from edgepose.data.augment import OcclusionConfig
from edgepose.data.coco import PoseDataset
from edgepose.training.calibrate import calibrate_visibility
from edgepose.training.config import TrainConfig
from edgepose.training.loop import RunOptions, fit
from tests.training.dots import CONFIG, KEYPOINTS, NETWORK, dots

ROBUST = msgspec.structs.replace(NETWORK, orn=ORNConfig(16, 1))
SPEC = spec_of(ROBUST, KEYPOINTS)
OCCLUDED = msgspec.structs.replace(CONFIG, augment=msgspec.structs.replace(CONFIG.augment, occlusion=OcclusionConfig()))


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> PoseDataset:
    return dots(tmp_path_factory.mktemp("dots"), "dev", 24, seed=5)


@pytest.fixture(scope="module", autouse=True)
def trained(people: PoseDataset) -> None:
    """A head that knows what is hidden, of these very people, and is far too sure of it."""
    torch.set_num_threads(1)
    made = build(ROBUST, KEYPOINTS)
    config = msgspec.structs.replace(OCCLUDED, epochs=12, learning_rate=5e-3, bf16=False, visibility_weight=5.0)
    fit(made, SPEC, (people, people), config, options=RunOptions(workers=0))
    assert made.block.orn is not None
    made.block.orn.correct(4.0, 1.0, math.log(1 / 3))
    _weights.update(made.state_dict())


_weights: dict[str, torch.Tensor] = {}


def network() -> KPENet:
    made = build(ROBUST, KEYPOINTS).eval()
    made.load_state_dict(_weights)
    return made


def calibrated(people: PoseDataset, config: TrainConfig = OCCLUDED) -> tuple[dict[str, float], KPENet, KPENet]:
    before, after = network(), network()
    report = calibrate_visibility(after, SPEC, people, config)
    return report, before, after


def test_a_second_calibration_finds_next_to_nothing_to_correct(people: PoseDataset) -> None:
    first, _, after = calibrated(people)
    again = calibrate_visibility(after, SPEC, people, OCCLUDED)
    assert first["visibility_scale"] < 0.5
    assert again["visibility_scale"] == pytest.approx(1, abs=0.02)
    assert again["visibility_shift"] == pytest.approx(0, abs=0.02)
    assert first["error_factor"] > 1.5  # one pixel was promised
    assert again["error_factor"] == pytest.approx(1, abs=0.01)
    assert 0 < first["hidden_share"] < 1
    assert first["joints"] > 100


def test_keypoints_stay_and_the_rest_follows_the_report(people: PoseDataset) -> None:
    report, before, after = calibrated(people)
    images = torch.randn(2, 3, 64, 64)
    x, y, logits, log_error = before(images)
    found = after(images)
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], y)
    assert torch.allclose(found[2], report["visibility_scale"] * logits + report["visibility_shift"], atol=1e-4)
    assert torch.allclose(found[3].exp(), report["error_factor"] * log_error.exp(), rtol=1e-4)


def test_it_is_the_same_twice(people: PoseDataset) -> None:
    assert calibrated(people)[0] == calibrated(people)[0]


def test_nothing_is_touched_where_nothing_is_hidden_or_said(people: PoseDataset) -> None:
    report, before, after = calibrated(people, CONFIG)
    assert report == {}
    assert all(
        torch.equal(a, b) for a, b in zip(before.state_dict().values(), after.state_dict().values(), strict=True)
    )
    plain = build(NETWORK, KEYPOINTS)
    assert calibrate_visibility(plain, spec_of(NETWORK, KEYPOINTS), people, OCCLUDED) == {}
    assert plain.training


def test_rendered_people_count_as_much_as_all_photographs(people: PoseDataset, tmp_path: Path) -> None:
    """They hide nothing here, so half of what is judged can be seen, however few they are."""
    alone, _, _ = calibrated(people)
    after = network()
    few = dots(tmp_path, "val", 3, seed=7)
    both = calibrate_visibility(after, SPEC, people, OCCLUDED, few)
    assert both["joints"] == 2 * alone["joints"]
    assert both["hidden_share"] == pytest.approx(alone["hidden_share"] / 2)
    again = calibrate_visibility(after, SPEC, people, OCCLUDED, few)
    assert again["visibility_scale"] == pytest.approx(1, abs=0.02)


def test_people_are_judged_behind_what_training_does_without(people: PoseDataset) -> None:
    """Whatever the run's own occluders are: even with none of their weights left."""
    nothing = dict.fromkeys((
        "pasted", "shapes", "objects", "scene", "body_parts", "cutout", "joints", "single", "clutter", "tangles",
        "walls",
    ), 0.0)  # fmt: skip
    weak = msgspec.structs.replace(CONFIG.augment, occlusion=OcclusionConfig(**nothing))
    report, _, _ = calibrated(people, msgspec.structs.replace(CONFIG, augment=weak))
    assert report == calibrated(people)[0]
    assert report["hidden_share"] > 0.1


def test_a_head_that_is_worse_than_chance_is_left_alone(people: PoseDataset) -> None:
    report, _, upright = calibrated(people)
    assert report
    assert upright.block.orn is not None
    upright.block.orn.correct(-1.0, 0.0, 0.0)
    bias = upright.block.orn.visibility.bias.clone()
    assert calibrate_visibility(upright, SPEC, people, OCCLUDED) == {}
    assert torch.equal(upright.block.orn.visibility.bias, bias)
