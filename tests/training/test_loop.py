"""Training: it learns, it can be stopped at any moment and resumed exactly, and it refuses what belongs elsewhere."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

from edgepose.blocks.config import ORNConfig, spec_of
from edgepose.blocks.orn import Hide
from edgepose.data.augment import AugmentConfig, OcclusionConfig
from edgepose.data.coco import PoseDataset
from edgepose.errors import AnnotationError, CheckpointError, EdgeposeError, SpecError, StorageError, UsageError
from edgepose.spec import Keypoints
from edgepose.training.batches import AugmentedPeople, to_input
from edgepose.training.config import TrainConfig
from edgepose.training.loop import (
    FitResult,
    Interrupted,
    RunOptions,
    _one_cycle,
    _settings,
    dev_metrics,
    fit,
    selection,
)
from edgepose.training.predict import cut_crops, predict
from tests.conftest import REPOSITORY
from tests.training.dots import CONFIG, NETWORK, SPEC, Recorder, dots, network

TRAIN, DEV = 32, 8
STEPS_PER_EPOCH = TRAIN // CONFIG.batch_size


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[PoseDataset, PoseDataset]:
    folder = tmp_path_factory.mktemp("dots")
    return dots(folder, "train", TRAIN, seed=1), dots(folder, "dev", DEV, seed=2)


class Sends(Recorder):
    """Sends a signal to this very process after some step, once or twice."""

    def __init__(self, number: int, after: int, times: int = 1) -> None:
        super().__init__()
        self.number, self.after, self.times = number, after, times

    def at_step(self, done: int) -> None:
        if done == self.after:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


def run(
    data: tuple[PoseDataset, PoseDataset],
    config: TrainConfig = CONFIG,
    *,
    state: Path | None = None,
    observer: Recorder | None = None,
    workers: int = 0,
) -> tuple[nn.Module, FitResult]:
    model = network()
    options = RunOptions(state, observer or Recorder(), workers)
    return model, fit(model, SPEC, data, config, options=options)


@pytest.fixture(scope="module")
def uninterrupted(data: tuple[PoseDataset, PoseDataset]) -> tuple[nn.Module, FitResult]:
    torch.set_num_threads(1)
    return run(data)


def assert_equal_runs(first: tuple[nn.Module, FitResult], second: tuple[nn.Module, FitResult]) -> None:
    """To the bit, but for the time they took."""
    curves = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.curve] for _, r in (first, second)]
    assert curves[0] == curves[1]
    assert first[1].best_epoch == second[1].best_epoch
    states = [model.state_dict() for model, _ in (first, second)]
    assert [n for n in states[0] if not torch.equal(states[0][n], states[1][n])] == []


@pytest.mark.parametrize("head", ["simcc", "heatmap"])
def test_the_network_learns(head: str, data: tuple[PoseDataset, PoseDataset]) -> None:
    config = msgspec.structs.replace(NETWORK, head=head, stride=4 if head == "heatmap" else 8)
    model, spec = network(config), spec_of(config, SPEC.keypoints)
    longer = msgspec.structs.replace(CONFIG, epochs=6, learning_rate=0.01)
    observer = Recorder()
    result = fit(model, spec, data, longer, options=RunOptions(observer=observer, workers=0))
    losses = [row["loss"] for row in result.curve]
    assert losses[-1] < 0.9 * losses[0]
    assert losses[0] == pytest.approx(np.mean([loss for *_, loss in observer.steps[:STEPS_PER_EPOCH]]))
    assert result.curve[result.best_epoch]["auc"] > max(0.6, result.curve[0]["auc"] + 0.1)
    assert not model.training


def test_the_observer_hears_of_every_patch_step_and_epoch(data: tuple[PoseDataset, PoseDataset]) -> None:
    observer = Recorder()
    _, result = run(data, observer=observer)
    total = CONFIG.epochs * STEPS_PER_EPOCH
    assert observer.cut == [(i, TRAIN) for i in range(1, TRAIN + 1)]
    assert [(done, of) for done, of, _ in observer.steps] == [(i, total) for i in range(1, total + 1)]
    assert tuple(observer.rows) == result.curve
    assert [row["epoch"] for row in result.curve] == list(range(CONFIG.epochs))


def test_the_best_epoch_on_dev_is_kept(
    uninterrupted: tuple[nn.Module, FitResult], data: tuple[PoseDataset, PoseDataset]
) -> None:
    model, result = uninterrupted
    areas = [row["auc"] for row in result.curve]
    assert areas[result.best_epoch] == max(areas)
    crops = cut_crops(data[1], SPEC)
    found = dev_metrics(predict(model, SPEC, crops), crops)
    assert found == {name: result.curve[result.best_epoch][name] for name in found}


def test_a_run_that_gets_worse_keeps_its_better_weights(data: tuple[PoseDataset, PoseDataset]) -> None:
    """Steps as long as these destroy whatever was there: the last epoch must not win by being last."""
    model, result = run(data, msgspec.structs.replace(CONFIG, epochs=4, learning_rate=1.0, warmup=1.0, averaging=0.0))
    areas = [row["auc"] for row in result.curve]
    assert areas[result.best_epoch] == max(areas) > min(areas)
    crops = cut_crops(data[1], SPEC)
    assert dev_metrics(predict(model, SPEC, crops), crops)["auc"] == max(areas)


def test_selection_needs_no_torso() -> None:
    assert selection({"auc": 0.3, "limb12_extent_0.1": 0.9, "mpjpe_px": 4}) == 0.3
    assert selection({"auc": float("nan"), "limb12_extent_0.1": 0.9, "mpjpe_px": 4}) == 0.9
    assert selection({"pck_extent_0.1": 0.7, "mpjpe_px": 4}) == 0.7
    assert selection({"auc": float("nan"), "mpjpe_px": 4.0}) == -4


def test_runs_repeat_to_the_bit(
    uninterrupted: tuple[nn.Module, FitResult], data: tuple[PoseDataset, PoseDataset]
) -> None:
    torch.manual_seed(99)  # nothing may come from torch's own generator
    assert_equal_runs(run(data), uninterrupted)


def test_another_seed_is_another_run(
    uninterrupted: tuple[nn.Module, FitResult], data: tuple[PoseDataset, PoseDataset]
) -> None:
    _, other = run(data, msgspec.structs.replace(CONFIG, seed=4, epochs=1))
    assert other.curve[0]["loss"] != uninterrupted[1].curve[0]["loss"]


@pytest.mark.parametrize(
    ("number", "after"),
    [(signal.SIGINT, 1), (signal.SIGINT, STEPS_PER_EPOCH + 2), (signal.SIGTERM, 2 * STEPS_PER_EPOCH)],
    ids=["first step", "inside an epoch", "end of an epoch"],
)
def test_an_interrupted_run_resumes_exactly(
    number: int,
    after: int,
    uninterrupted: tuple[nn.Module, FitResult],
    data: tuple[PoseDataset, PoseDataset],
    tmp_path: Path,
) -> None:
    state = tmp_path / "runs" / "x.state"
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stopped = Sends(number, after)
    with pytest.raises(Interrupted):
        run(data, state=state, observer=stopped)
    assert len(stopped.steps) == after
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert [path.name for path in state.parent.iterdir()] == ["x.state"]
    rest = Recorder()
    resumed = run(data, state=state, observer=rest)
    assert rest.steps[0][0] == after + 1
    assert_equal_runs(resumed, uninterrupted)
    # Once more: it is done, nothing is left to do, and the result is the same.
    again = Recorder()
    assert_equal_runs(run(data, state=state, observer=again), uninterrupted)
    assert again.steps == []


def test_a_run_with_workers_is_the_same_run_and_stops_as_well(
    uninterrupted: tuple[nn.Module, FitResult], data: tuple[PoseDataset, PoseDataset], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        run(data, state=tmp_path / "state", observer=Sends(signal.SIGINT, 3), workers=1)
    assert_equal_runs(run(data, state=tmp_path / "state", workers=1), uninterrupted)


def test_a_second_signal_stops_at_once(data: tuple[PoseDataset, PoseDataset], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        run(data, state=tmp_path / "state", observer=Sends(signal.SIGINT, 1, times=2))
    assert caught.type is KeyboardInterrupt


def test_fit_works_outside_the_main_thread(
    uninterrupted: tuple[nn.Module, FitResult], data: tuple[PoseDataset, PoseDataset]
) -> None:
    found: list[tuple[nn.Module, FitResult]] = []
    thread = threading.Thread(target=lambda: found.append(run(data)))
    thread.start()
    thread.join()
    assert_equal_runs(found[0], uninterrupted)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from edgepose.data.coco import dataset
from edgepose.training.loop import RunOptions, fit
from tests.training.dots import CONFIG, SPEC, Recorder, network

pytestmark = pytest.mark.usefixtures("one_thread")

class Dies(Recorder):
    def at_step(self, done):
        if done == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

torch.set_num_threads(1)
data = tuple(dataset(sys.argv[1], split) for split in ("train", "dev"))
fit(network(), SPEC, data, CONFIG, options=RunOptions(Path(sys.argv[2]), Dies(), 0))
"""


@pytest.mark.slow
def test_a_killed_run_resumes_from_its_last_epoch(
    uninterrupted: tuple[nn.Module, FitResult], data: tuple[PoseDataset, PoseDataset], tmp_path: Path
) -> None:
    arguments = [data[0].source.parent, tmp_path / "state", STEPS_PER_EPOCH + 2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    rest = Recorder()
    assert_equal_runs(run(data, state=tmp_path / "state", observer=rest), uninterrupted)
    assert rest.steps[0][0] == STEPS_PER_EPOCH + 1


# States of other runs, damaged states, full disks


@pytest.fixture
def state(data: tuple[PoseDataset, PoseDataset], tmp_path: Path) -> Path:
    with pytest.raises(Interrupted):
        run(data, state=tmp_path / "state", observer=Sends(signal.SIGINT, 2))
    return tmp_path / "state"


@pytest.mark.parametrize("field", ["learning_rate", "epochs", "seed", "weight_decay"])
def test_the_state_of_other_settings_is_refused(field: str, state: Path, data: tuple[PoseDataset, PoseDataset]) -> None:
    other = msgspec.structs.replace(CONFIG, **{field: getattr(CONFIG, field) + 1})
    before = state.read_bytes()
    with pytest.raises(CheckpointError, match=r"other settings or data.*delete it to start afresh"):
        run(data, other, state=state)
    assert state.read_bytes() == before


def test_the_state_of_other_data_or_another_network_is_refused(
    state: Path, data: tuple[PoseDataset, PoseDataset]
) -> None:
    with pytest.raises(CheckpointError, match="other settings or data"):
        run((data[0].sample(24, seed=0), data[1]), state=state)
    with pytest.raises(CheckpointError, match="other settings or data"):
        run((data[0], data[1].sample(4, seed=0)), state=state)
    wider = network(msgspec.structs.replace(NETWORK, widths=(8, 8, 16, 24)))
    with pytest.raises(CheckpointError, match="other settings or data"):
        fit(wider, SPEC, data, CONFIG, options=RunOptions(state, workers=0))


def test_the_state_of_a_run_from_other_weights_is_refused(state: Path, data: tuple[PoseDataset, PoseDataset]) -> None:
    with pytest.raises(CheckpointError, match=r"started from other weights.*delete it to start afresh"):
        fit(network(seed=1), SPEC, data, CONFIG, options=RunOptions(state, workers=0))


def test_the_state_of_a_run_with_another_teacher_is_refused(
    data: tuple[PoseDataset, PoseDataset], tmp_path: Path
) -> None:
    config = msgspec.structs.replace(CONFIG, epochs=1, distill_weight=0.5)

    def carry_out(teacher: int, observer: Recorder) -> None:
        options = RunOptions(tmp_path / "state", observer, 0)
        fit(network(), SPEC, data, config, teacher=network(seed=teacher), options=options)

    with pytest.raises(Interrupted):
        carry_out(1, Sends(signal.SIGINT, 1))
    with pytest.raises(CheckpointError, match="another teacher"):
        carry_out(2, Recorder())
    carry_out(1, Recorder())


def test_the_last_bits_of_the_starting_weights_may_differ(state: Path, data: tuple[PoseDataset, PoseDataset]) -> None:
    """Weights that were resampled or calibrated come out a little different with another number of threads."""
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 1e-6)
    fit(model, SPEC, data, CONFIG, options=RunOptions(state, workers=0))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("distill_weight", 0.5, "without a teacher"),
        ("feature_weight", 0.5, "without a teacher"),
        ("masking", 0.5, "occlusion-robust"),
        ("dense", ("backbone.*",), "without sparsity"),
        ("uncovered_teacher", True, "without a teacher"),
        ("mirrored_teacher", True, "no teacher"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(
    field: str, value: object, words: str, data: tuple[PoseDataset, PoseDataset]
) -> None:
    with pytest.raises(UsageError, match=rf"{field}.*{words}"):
        run(data, msgspec.structs.replace(CONFIG, **{field: value}))


def test_settings_younger_than_a_state_count_where_they_say_something() -> None:
    """Runs that were stopped before a setting was there go on; it means then what was before it."""
    assert {"feature_weight", "sparsity", "dense", "uncovered_teacher", "mirrored_teacher"}.isdisjoint(
        _settings(CONFIG)
    )
    assert {**_settings(CONFIG), "sparsity": 0.1} == _settings(msgspec.structs.replace(CONFIG, sparsity=0.1))
    written = msgspec.json.encode(CONFIG).replace(
        b',"feature_weight":0.0,"sparsity":0.0,"dense":[],"uncovered_teacher":false,"mirrored_teacher":false', b""
    )
    assert msgspec.json.encode(_settings(CONFIG)) == written  # to the byte, for states are known by its hash


@pytest.mark.parametrize("content", ["cut", "noise", "foreign"])
def test_a_damaged_or_foreign_state_is_refused(
    content: str, state: Path, data: tuple[PoseDataset, PoseDataset]
) -> None:
    if content == "foreign":
        torch.save([1, 2], state)
    else:
        state.write_bytes(state.read_bytes()[:-500] if content == "cut" else b"hello")
    with pytest.raises(CheckpointError, match=r"state: found .*delete it"):
        run(data, state=state)


def test_a_full_disk_is_a_storage_error_and_keeps_the_older_state(
    state: Path, data: tuple[PoseDataset, PoseDataset]
) -> None:
    before = state.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(StorageError, match="state"):
            run(data, state=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in state.parent.iterdir()] == ["state"]
    assert state.read_bytes() == before


def test_a_loss_that_is_no_number_ends_the_run(data: tuple[PoseDataset, PoseDataset]) -> None:
    model = network()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(EdgeposeError, match=r"step 0: found a loss of nan.*lower the learning rate"):
        fit(model, SPEC, data, CONFIG, options=RunOptions(workers=0))


def test_people_of_another_kind_or_nobody_at_all_are_refused(data: tuple[PoseDataset, PoseDataset]) -> None:
    nobody = data[0].subset([])
    for pair in ((nobody, data[1]), (data[0], nobody)):
        with pytest.raises(AnnotationError, match="nobody with a labelled keypoint"):
            run(pair)
    spec = msgspec.structs.replace(SPEC, keypoints=Keypoints(("a", "b", "c", "d")))
    with pytest.raises(SpecError, match="train a network for this keypoint set"):
        fit(network(), spec, data, CONFIG, options=RunOptions(workers=0))


# Teachers


def test_a_teacher_is_followed_and_left_alone(
    uninterrupted: tuple[nn.Module, FitResult], data: tuple[PoseDataset, PoseDataset]
) -> None:
    teacher = uninterrupted[0]
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    crops = cut_crops(data[1], SPEC)
    taught_by = predict(teacher, SPEC, crops)
    config = msgspec.structs.replace(CONFIG, distill_weight=1.0)
    observer = Recorder()
    student = network(seed=5)
    fit(student, SPEC, data, config, teacher=teacher, options=RunOptions(observer=observer, workers=0))
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())
    # With nothing but the teacher to go by, the loss is the distance from it, and it shrinks.
    losses = [loss for *_, loss in observer.steps]
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    assert np.isfinite(predict(student, SPEC, crops) - taught_by).all()


def test_a_teachers_equal_starts_without_distance(
    uninterrupted: tuple[nn.Module, FitResult], data: tuple[PoseDataset, PoseDataset]
) -> None:
    student = network()
    for part in student.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = 0.0
    student.load_state_dict(uninterrupted[0].state_dict())
    teacher = network()
    teacher.load_state_dict(uninterrupted[0].state_dict())
    observer = Recorder()
    config = msgspec.structs.replace(CONFIG, epochs=1, distill_weight=1.0, learning_rate=0.0)
    fit(student, SPEC, data, config, teacher=teacher, options=RunOptions(observer=observer, workers=0))
    # Batch statistics differ from running ones, so not quite zero; far below what labels cost.
    assert observer.steps[0][2] < 0.5


def test_a_teacher_may_see_what_is_hidden_from_the_network(data: tuple[PoseDataset, PoseDataset]) -> None:
    covered = OcclusionConfig(pasted=1.0, largest=0.9, start=1.0)
    config = msgspec.structs.replace(
        CONFIG, epochs=1, distill_weight=0.5, uncovered_teacher=True, augment=AugmentConfig(occlusion=covered)
    )
    teacher, seen = network(seed=1), []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fit(network(), SPEC, data, config, teacher=teacher, options=RunOptions(workers=0))
    batch = AugmentedPeople(data[0], SPEC, config)[0]
    assert batch.uncovered is not None
    torch.testing.assert_close(seen[0], to_input(batch.uncovered, SPEC))
    assert (batch.uncovered != batch.crops).any()
    config = msgspec.structs.replace(config, augment=AugmentConfig())
    with pytest.raises(UsageError, match=r"without occlusion.*augment: {occlusion: {}}"):
        fit(network(), SPEC, data, config, teacher=teacher, options=RunOptions(workers=0))


def test_a_teacher_may_see_mirror_images_too(data: tuple[PoseDataset, PoseDataset]) -> None:
    config = msgspec.structs.replace(CONFIG, epochs=1, distill_weight=0.5, mirrored_teacher=True)
    teacher, seen = network(seed=1), []
    teacher.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    fit(network(), SPEC, data, config, teacher=teacher, options=RunOptions(workers=0))
    assert torch.equal(seen[0].flip(3), seen[1])
    assert not torch.equal(seen[0], seen[1])


# The schedule


def test_the_rate_rises_to_its_peak_and_falls_to_almost_nothing() -> None:
    config = TrainConfig(epochs=1, learning_rate=2.0, warmup=0.1)
    rates = [_one_cycle(p, config) for p in np.linspace(0, 1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[10] == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.004)
    assert (np.diff(rates[:11]) > 0).all()
    assert (np.diff(rates[10:]) < 0).all()
    assert _one_cycle(0.0, msgspec.structs.replace(config, warmup=0.0)) == pytest.approx(2.0)
    assert _one_cycle(1.0, msgspec.structs.replace(config, final_rate=0.5)) == pytest.approx(1.0)


# More than keypoints to learn, and more than one optimiser

ROBUST = msgspec.structs.replace(NETWORK, orn=ORNConfig(16, 1))
ROBUST_SPEC = spec_of(ROBUST, SPEC.keypoints)
ROBUST_CONFIG = msgspec.structs.replace(
    CONFIG,
    optimizer="muon",
    masking=0.2,
    augment=msgspec.structs.replace(CONFIG.augment, occlusion=OcclusionConfig()),
)


def robust_run(
    data: tuple[PoseDataset, PoseDataset],
    config: TrainConfig,
    state: Path | None = None,
    observer: Recorder | None = None,
) -> tuple[nn.Module, FitResult]:
    model = network(ROBUST)
    return model, fit(model, ROBUST_SPEC, data, config, options=RunOptions(state, observer or Recorder(), 0))


def test_a_robust_network_resumes_exactly_masking_and_muon_included(
    data: tuple[PoseDataset, PoseDataset], tmp_path: Path
) -> None:
    config = msgspec.structs.replace(ROBUST_CONFIG, epochs=2)
    whole = robust_run(data, config)
    with pytest.raises(Interrupted):
        robust_run(data, config, tmp_path / "state", Sends(signal.SIGTERM, 3))
    torch.rand(7)  # another process has another generator
    resumed = robust_run(data, config, tmp_path / "state")
    assert_equal_runs(whole, resumed)
    assert whole[1].calibration == resumed[1].calibration
    assert all(part.share == 0 for part in whole[0].modules() if isinstance(part, Hide))


def test_every_part_of_the_block_learns_and_the_run_is_calibrated(data: tuple[PoseDataset, PoseDataset]) -> None:
    fresh = {n: p.detach().clone() for n, p in network(ROBUST).named_parameters() if n.startswith("block.orn")}
    model, result = robust_run(data, msgspec.structs.replace(ROBUST_CONFIG, epochs=2))
    learned = dict(model.named_parameters())
    assert [name for name, before in fresh.items() if torch.equal(before, learned[name])] == []
    assert set(result.calibration) >= {"joints", "visibility_scale", "error_factor"} or result.calibration == {}


def test_a_second_set_of_people_is_trained_on(data: tuple[PoseDataset, PoseDataset], tmp_path: Path) -> None:
    rendered = dots(tmp_path, "train", 5, seed=8)
    observer = Recorder()
    model = network()
    config = msgspec.structs.replace(CONFIG, epochs=1, rendered=0.25)
    fit(model, SPEC, (*data, rendered), config, options=RunOptions(observer=observer, workers=0))
    assert observer.cut[-1] == (TRAIN + 5, TRAIN + 5)
    assert len(observer.steps) == TRAIN // 6
    with pytest.raises(UsageError, match="rendered"):
        fit(network(), SPEC, data, config, options=RunOptions(workers=0))


def test_the_flow_of_coordinates_is_resumed_too(data: tuple[PoseDataset, PoseDataset], tmp_path: Path) -> None:
    architecture = msgspec.structs.replace(NETWORK, head="regression")
    spec, config = spec_of(architecture, SPEC.keypoints), msgspec.structs.replace(CONFIG, epochs=2)

    def carry_out(state: Path | None, observer: Recorder) -> tuple[nn.Module, FitResult]:
        model = network(architecture)
        return model, fit(model, spec, data, config, options=RunOptions(state, observer, 0))

    whole = carry_out(None, Recorder())
    with pytest.raises(Interrupted):
        carry_out(tmp_path / "state", Sends(signal.SIGTERM, 3))
    assert_equal_runs(whole, carry_out(tmp_path / "state", Recorder()))
