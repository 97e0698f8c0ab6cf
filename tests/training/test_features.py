"""Feature matching: which maps are compared, how far apart they are, and that nothing of it stays behind."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor, nn

from edgepose.blocks.config import ORNConfig
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.plan import PruneConfig, apply_pruning
from edgepose.compress.prune import plan_pruning
from edgepose.compress.quantise import prepare
from edgepose.data.coco import PoseDataset
from edgepose.errors import UsageError
from edgepose.training.features import FeatureMatching, feature_matching, recording, stages_of
from edgepose.training.loop import Interrupted, RunOptions, fit
from tests.training.dots import CONFIG, NETWORK, SPEC, Recorder, dots, network

pytestmark = pytest.mark.usefixtures("one_thread")

PLACES = ("backbone.stem", *(f"backbone.stages.{n}" for n in range(4)), "block.neck", "block.head.maps")
TAUGHT = msgspec.structs.replace(CONFIG, epochs=2, distill_weight=0.5, feature_weight=1.0)
IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[PoseDataset, PoseDataset]:
    folder = tmp_path_factory.mktemp("dots")
    return dots(folder, "train", 16, seed=1), dots(folder, "dev", 4, seed=2)


@pytest.fixture(scope="module")
def narrow() -> nn.Module:
    """The small network without some of its channels."""
    config = PruneConfig(ratio=0.3, importance="l1", round_to=2, min_channels=2)
    return apply_pruning(network(), plan_pruning(network(), IMAGES[:1], config))


def hooks(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def maps_of(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    with recording(model.eval(), names) as maps, torch.no_grad():
        model(IMAGES)
    return maps


def test_the_outermost_maps_of_both_networks_are_compared(narrow: nn.Module) -> None:
    matching = feature_matching(narrow, network(), IMAGES[:1])
    assert matching.names == PLACES
    assert isinstance(matching.projections[-1], nn.Identity)  # outputs keep their channels
    student, teacher = maps_of(narrow, PLACES), maps_of(network(), PLACES)
    for name, projection in zip(PLACES, matching.projections, strict=True):
        assert isinstance(projection, nn.Identity) == (student[name].shape == teacher[name].shape)


@pytest.mark.parametrize(
    "changes",
    [
        {"head": "heatmap"},
        {"head": "regression"},
        {"refinements": 1},
        {"orn": ORNConfig(16, 1)},
        {"backbone": "inverted"},
    ],
    ids=str,
)
def test_networks_of_every_kind_have_maps_in_common(changes: dict[str, object]) -> None:
    """Whatever runs in stages while it trains and in one go while it teaches."""
    model = network(msgspec.structs.replace(NETWORK, **changes))
    names = feature_matching(model, network(msgspec.structs.replace(NETWORK, **changes)), IMAGES[:1]).names
    with recording(model, names) as maps:
        stages_of(model, IMAGES[:2])
    assert set(names) == set(maps) >= set(PLACES[1:6])
    outputs = {id(tensor) for tensor in model.eval()(IMAGES[:2])}
    assert not outputs & {id(tensor) for tensor in maps.values()}


def test_a_heat_map_that_is_the_output_is_left_to_the_outputs_loss() -> None:
    heat = msgspec.structs.replace(NETWORK, head="heatmap")
    assert "block.head.maps" not in feature_matching(network(heat), network(heat), IMAGES[:1]).names


def test_equal_networks_are_no_distance_apart_and_silent_ones_all_of_it() -> None:
    maps = maps_of(network(), PLACES)
    matching = FeatureMatching(maps, maps)
    assert matching(maps, maps).item() == 0
    means = {name: tensor.mean().expand_as(tensor) for name, tensor in maps.items()}
    assert matching(means, maps).item() == pytest.approx(1, rel=1e-4)


def test_projections_start_as_the_least_squares_fit() -> None:
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(4, 3, 6, 6, generator=generator)
    student[:, 2] = 0  # a dead channel leaves many fits that are equally good
    mix, shift = torch.randn(5, 3, generator=generator), torch.randn(5, generator=generator)
    teacher = torch.einsum("tc,nchw->nthw", mix, student) + shift[None, :, None, None]
    matching = FeatureMatching({"a": student}, {"a": teacher})
    assert matching({"a": student}, {"a": teacher}).item() < 1e-4
    before = [parameter.clone() for parameter in matching.parameters()]
    matching({"a": 2 * student}, {"a": teacher})  # only the first batch decides
    assert all(torch.equal(one, other) for one, other in zip(before, matching.parameters(), strict=True))


def test_of_neighbours_of_one_size_the_last_is_compared() -> None:
    def plain() -> nn.Sequential:
        convolution = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        return nn.Sequential(*convolution, nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))

    assert feature_matching(plain(), plain(), IMAGES[:1]).names == ("2", "4")


def test_networks_without_a_map_in_common_are_refused() -> None:
    other = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 4))
    with pytest.raises(UsageError, match=r"feature_weight.*Sequential and its teacher KPENet have alike"):
        feature_matching(other, network(), IMAGES[:1])


def test_a_pruned_student_nears_its_teacher_and_no_hook_stays(
    narrow: nn.Module, data: tuple[PoseDataset, PoseDataset]
) -> None:
    student, teacher, observer = copy.deepcopy(narrow), network(), Recorder()
    config = msgspec.structs.replace(TAUGHT, epochs=4, distill_weight=1.0)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    fit(student, SPEC, data, config, teacher=teacher, options=RunOptions(observer=observer, workers=0))
    assert observer.steps[-1][2] < 0.8 * observer.steps[0][2]
    assert hooks(student) == hooks(teacher) == 0
    assert student.state_dict().keys() == narrow.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_a_fake_quantised_student_is_compared_too(data: tuple[PoseDataset, PoseDataset]) -> None:
    teacher = network()
    student = prepare(fold_batch_norms(teacher), [IMAGES])
    assert feature_matching(student, teacher, IMAGES[:1]).names == PLACES
    observer = Recorder()
    options = RunOptions(observer=observer, workers=0)
    apart = msgspec.structs.replace(TAUGHT, epochs=1, feature_weight=0.0, learning_rate=1e-12)
    fit(prepare(fold_batch_norms(teacher), [IMAGES]), SPEC, data, apart, teacher=teacher, options=options)
    fit(student, SPEC, data, msgspec.structs.replace(apart, feature_weight=1.0), teacher=teacher, options=options)
    without, with_features = observer.steps[0][2], observer.steps[len(observer.steps) // 2][2]
    assert 0 < with_features - without < 0.5  # 8 bits are near, not equal
    assert hooks(student) == 0


@pytest.mark.parametrize("after", [1, 3])
def test_resuming_changes_nothing(
    after: int, narrow: nn.Module, data: tuple[PoseDataset, PoseDataset], tmp_path: Path
) -> None:
    class Stops(Recorder):
        def at_step(self, done: int) -> None:
            if done == after:
                os.kill(os.getpid(), signal.SIGINT)

    def carry_out(observer: Recorder, state: Path | None) -> dict[str, Tensor]:
        student = copy.deepcopy(narrow)
        fit(student, SPEC, data, TAUGHT, teacher=network(), options=RunOptions(state, observer, 0))
        return student.state_dict()

    whole = carry_out(Recorder(), None)
    with pytest.raises(Interrupted):
        carry_out(Stops(), tmp_path / "state")
    resumed = carry_out(Recorder(), tmp_path / "state")
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())
