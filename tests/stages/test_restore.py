"""Quantisation held to a budget, on a small trained network whose quantisation is spoilt on purpose."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from edgepose.blocks.card import Card, Lineage
from edgepose.blocks.checkpoint import save_checkpoint
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.hooks import hooks_of
from edgepose.compress.quantise import convert, prepare
from edgepose.compress.restore import quantised_layers
from edgepose.errors import AccuracyRegression, AnnotationError, OnnxError, UsageError
from edgepose.recipe import MaxDrop, QuantiseAfterTraining, Recipe
from edgepose.stages import restore as stage
from edgepose.stages.budget import check_metric
from edgepose.stages.compress import NETWORK, quantise
from edgepose.stages.networks import load_network
from edgepose.stages.people import StageData
from edgepose.stages.restore import Judge, prices_of, restored
from edgepose.stages.settings import QuantiseStage
from edgepose.training.loop import RunOptions, dev_metrics, fit
from edgepose.training.predict import Crops, cut_crops, predict
from tests.training.dots import CONFIG, KEYPOINTS, SPEC, dots, network
from tests.training.dots import NETWORK as SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = torch.zeros(1, 3, 64, 64)
METRIC = "pck_torso_0.2"
SPOILT = "block.neck.smooth.0"


@dataclass(frozen=True)
class Trained:
    network: nn.Module
    fake_quantised: nn.Module
    data: StageData
    crops: Crops

    def figures(self, module: nn.Module) -> dict[str, float]:
        return dev_metrics(predict(module, SPEC, self.crops), self.crops)

    def judge(self, **changes: object) -> Judge:
        return Judge(SPEC, self.figures, self.figures(self.network), **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("trained")
    data = StageData(dots(folder, "train", 32, seed=1), dots(folder, "dev", 12, seed=2))
    model = network()
    config = msgspec.structs.replace(CONFIG, epochs=8, learning_rate=0.01)
    fit(model, SPEC, (data.train, data.dev), config, options=RunOptions(workers=0))
    crops = cut_crops(data.dev, SPEC)
    images = [torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))]
    wrapped = prepare(fold_batch_norms(model), images)
    spoilt = hooks_of(wrapped)[f"pre_hooks.{SPOILT.replace('.', '/')}/conv2d/0__1"]
    spoilt._scale_param_storage.data.mul_(300.0)  # all its weights have the code 0
    return Trained(model, wrapped, data, crops)


def test_the_fixture_learnt_and_is_spoilt(trained: Trained) -> None:
    assert trained.figures(trained.network)[METRIC] > 0.4
    assert trained.figures(trained.fake_quantised)[METRIC] < trained.figures(trained.network)[METRIC] - 0.1


def test_the_spoilt_layer_goes_back_and_the_budget_holds(trained: Trained) -> None:
    made, report = restored(trained.fake_quantised, MaxDrop(points=8.0), trained.judge())
    assert report["met"]
    assert report["metric"] == METRIC
    assert report["lost"] > 10
    assert max(report["trials"], key=lambda trial: trial["gain"])["layer"] == SPOILT
    assert SPOILT in [step["layer"] for step in report["path"]]
    assert report["path"][-1]["lost"] <= 8.0
    assert all(step["lost"] > 8.0 for step in report["path"][:-1]), "it stops as soon as the budget holds"
    lost = 100 * (trained.figures(trained.network)[METRIC] - trained.figures(made)[METRIC])
    assert lost == pytest.approx(report["path"][-1]["lost"])
    assert convert(made)[1].protected == tuple(step["layer"] for step in report["path"])


def test_a_network_within_its_budget_stays_as_it_is(trained: Trained) -> None:
    made, report = restored(trained.fake_quantised, MaxDrop(points=100.0), trained.judge())
    assert made is trained.fake_quantised
    assert report["path"] == report["trials"] == ()


def test_a_budget_that_no_network_can_meet_is_exit_code_3(trained: Trained) -> None:
    better = {**trained.figures(trained.network), METRIC: 1.5}
    judge = Judge(SPEC, trained.figures, better)
    with pytest.raises(AccuracyRegression, match=r"points of pck_torso_0\.2 lost on dev with all \d+ layers") as caught:
        restored(trained.fake_quantised, MaxDrop(points=0.5), judge)
    assert caught.value.exit_code == 3


def test_an_interrupted_search_goes_on(trained: Trained, tmp_path: Path) -> None:
    store = tmp_path / "search.json"
    left = 4

    def interrupted(module: nn.Module) -> dict[str, float]:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return trained.figures(module)

    reference = trained.figures(trained.network)
    with pytest.raises(KeyboardInterrupt):
        restored(trained.fake_quantised, MaxDrop(8.0), Judge(SPEC, interrupted, reference, store))
    assert store.exists()
    measured = 0

    def counted(module: nn.Module) -> dict[str, float]:
        nonlocal measured
        measured += 1
        return trained.figures(module)

    _, report = restored(trained.fake_quantised, MaxDrop(8.0), Judge(SPEC, counted, reference, store))
    layers, steps = len(report["trials"]), len(report["path"])
    assert measured <= 1 + (layers - 3) + steps
    assert not store.exists()


def test_nobody_with_a_torso_is_an_error(trained: Trained) -> None:
    judge = Judge(SPEC, trained.figures, {METRIC: float("nan")})
    with pytest.raises(AnnotationError, match="nobody whom it can be measured on"):
        restored(trained.fake_quantised, MaxDrop(0.5), judge)


def test_what_layers_save_is_measured_in_milliseconds(trained: Trained) -> None:
    prices = prices_of(trained.fake_quantised, SPEC)
    assert prices.unit == "ms"
    assert tuple(prices.costs) == quantised_layers(trained.fake_quantised, EXAMPLE)
    assert all(-1 < cost < 10 for cost in prices.costs.values())


def test_where_nothing_can_be_timed_multiplications_count(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> dict[str, float]:
        raise OnnxError("test", found="an operator that ONNX does not have")

    monkeypatch.setattr(stage, "_saved_ms", refuses)
    prices = prices_of(trained.fake_quantised, SPEC)
    assert prices.unit == "macs"
    assert prices.costs["backbone.stem.0.0"] == 32 * 32 * 27 * SMALL.stem


def test_the_stage_stores_a_network_within_its_budget(trained: Trained, tmp_path: Path) -> None:
    lineage = Lineage("train", {}, trained.data.digests, {})
    card = Card("dots", SMALL, KEYPOINTS, "", lineage=(lineage,))
    save_checkpoint(tmp_path / "net", card, trained.network.state_dict())
    settings = QuantiseStage(20, False, (), 0, estimator="minmax", max_drop=MaxDrop(points=0.0))
    report = quantise(tmp_path / "net", trained.data, settings, (tmp_path, RunOptions(tmp_path / "a.state", workers=0)))
    before = trained.figures(trained.network)[METRIC]
    assert report["max_drop"]["met"]
    assert report["dev"][METRIC] >= before
    module, checkpoint = load_network(tmp_path / NETWORK)
    assert trained.figures(module) == report["dev"]
    assert checkpoint.card.lineage[-1].config["max_drop"] == {"points": 0.0, "metric": METRIC}
    assert convert(module)[1].protected == tuple(step["layer"] for step in report["max_drop"]["path"])
    assert not list(tmp_path.glob("*.json.restored")) + list(tmp_path.glob("*restored.json"))


def test_a_metric_that_the_keypoints_do_not_have_is_refused_before_any_work() -> None:
    card = Card("dots", SMALL, KEYPOINTS, "")

    def recipe(metric: str) -> Recipe:
        quantise = QuantiseAfterTraining(max_drop=MaxDrop(0.5, metric))  # type: ignore[arg-type]
        return Recipe("mine", "Mine.", quantise=quantise)

    check_metric(recipe("pck_torso_0.1"), card)
    faces = msgspec.structs.replace(card, keypoints=msgspec.structs.replace(KEYPOINTS, names=tuple("abcd")))
    with pytest.raises(UsageError, match=r"max_drop: metric pck_torso_0\.1: found .*pck_extent_0\.1"):
        check_metric(recipe("pck_torso_0.1"), faces)
    check_metric(recipe("pck_extent_0.1"), faces)
