"""Scanning a checkpoint on dev: found again, gone on with, and of a quantised one quantisation only."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest

from edgepose.blocks.card import Card, OwnModule
from edgepose.blocks.checkpoint import load_checkpoint, save_checkpoint
from edgepose.errors import UsageError
from edgepose.stages.compress import quantise
from edgepose.stages.people import StageData
from edgepose.stages.sensitivity import ScanSettings, _place, scan_sensitivity
from edgepose.stages.settings import QuantiseStage
from edgepose.stages.source import Source
from edgepose.training.loop import RunOptions
from tests.training.dots import KEYPOINTS, NETWORK, SPEC, dots, network

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = ScanSettings(shares=(0.5,), layers=("backbone.stages.1.*",), people=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> StageData:
    folder = tmp_path_factory.mktemp("dots")
    return StageData(dots(folder, "train", 12, seed=1), dots(folder, "dev", 6, seed=2))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "net", Card("dots", NETWORK, KEYPOINTS, ""), network().state_dict())
    return Source(tmp_path / "net")


class Told:
    """Remembers what was told, and stops at some part of the pruning."""

    def __init__(self, stop_at: int = -1) -> None:
        self.lines: list[tuple[str, int, int]] = []
        self.stop_at = stop_at

    def __call__(self, what: str, done: int, whole: int) -> None:
        self.lines.append((what, done, whole))
        if what == "pruning each layer" and done == self.stop_at:
            raise KeyboardInterrupt


def test_a_scan_measures_each_group_and_goes_on_after_an_interruption(
    source: Source, data: StageData, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        scan_sensitivity(source, data, SETTINGS, Told(stop_at=1))
    (store,) = (tmp_path / "cache" / "scans").iterdir()
    begun = store.read_bytes()
    result = scan_sensitivity(source, data, SETTINGS)
    assert len(result.rows) >= 2
    assert {row.ratio for row in result.rows} == {0.5}
    assert all(0 < row.macs_removed < 0.5 for row in result.rows)
    assert all(row.pck == row.figures["pck_torso_0.2"] for row in result.rows)
    assert (result.metric, result.people, result.base_int8, result.quantised) == ("pck_torso_0.2", 4, None, ())
    done = store.read_bytes()
    assert done.count(b"prune ") == len(result.rows) > begun.count(b"prune ") == 1
    assert scan_sensitivity(source, data, SETTINGS) == result
    more = scan_sensitivity(source, data, msgspec.structs.replace(SETTINGS, shares=(0.5, 0.25)))
    assert [row for row in more.rows if row.ratio == 0.5] == list(result.rows)
    assert store.read_bytes() != done


def test_other_people_have_figures_of_their_own(source: Source, data: StageData, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(SETTINGS, importance="l2", layers=("backbone.stages.1.0.conv1.0",))
    scan_sensitivity(source, data, settings)
    assert scan_sensitivity(source, data, msgspec.structs.replace(settings, people=0)).people == 6
    assert len(list((tmp_path / "cache" / "scans").iterdir())) == 2


def test_another_module_with_the_same_weights_has_figures_of_its_own(source: Source, data: StageData) -> None:
    checkpoint = load_checkpoint(source.path)
    places = set()
    for structure in ("relu", "gelu"):
        card = msgspec.structs.replace(checkpoint.card, own=OwnModule(SPEC, structure))
        places.add(_place(dataclasses.replace(checkpoint, card=card), data, SETTINGS))
    assert len(places) == 2


def test_of_a_quantised_checkpoint_quantisation_is_scanned(source: Source, data: StageData, tmp_path: Path) -> None:
    quantise(source, data, QuantiseStage(8, False, (), 0), (tmp_path / "int8", RunOptions(workers=0)))
    int8 = Source(tmp_path / "int8" / "network")
    with pytest.raises(UsageError, match=r"quantised checkpoint.*add --int8"):
        scan_sensitivity(int8, data, SETTINGS)
    layers = ("backbone.stem.0.0", "block.head.x")
    result = scan_sensitivity(int8, data, ScanSettings(layers=layers, int8=True, people=2))
    assert result.rows == ()
    assert result.base == result.base_int8
    assert [row.layer for row in result.quantised] == ["backbone.stem.0.0", "block.head.x"]
    assert all(row.only_int8 is not None and row.only_float is not None for row in result.quantised)


def test_a_metric_that_the_keypoints_do_not_have_is_refused(source: Source, data: StageData) -> None:
    with pytest.raises(UsageError, match="--metric: found 'pck'"):
        scan_sensitivity(source, data, msgspec.structs.replace(SETTINGS, metric="pck"))
