"""The worked example runs: its own backbone, two heads, trained together, one INT8 graph that answers as torch does."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from edgepose.bundle import read_bundle
from edgepose.compiler import CompileRequest, Network, compile_bundle
from edgepose.data.coco import PoseDataset, dataset
from edgepose.data.render import RenderConfig, write_coco
from edgepose.data.splits import split_train
from edgepose.recipe import load_recipe
from edgepose.spec import Keypoints
from examples import attach_action as example
from tests.tiny_checkpoint import Watch

SMALL = ["--steps", "3", "--input-size", "64", "--target", "this-cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("action") / "people"
    write_coco(made, "train", 30, 0, RenderConfig(size_hw=(96, 96)))
    return made


def test_the_action_is_read_off_the_labels() -> None:
    names = ("left_shoulder", "right_shoulder", "left_hip", "right_hip", "left_wrist", "right_wrist")
    upright = torch.tensor([[-10.0, 0], [10, 0], [-8, 40], [8, 40], [-15, 30], [15, 30]])
    raised = upright.clone()
    raised[5] = torch.tensor([15.0, -30])
    upside_down = torch.cat([raised[:, :1], -raised[:, 1:]], 1)
    labelled = torch.ones(4, 6)
    labelled[3, 4] = 0
    actions, known = example.arm_raised(torch.stack([upright, raised, upside_down, raised]), labelled, Keypoints(names))
    assert actions.tolist() == [0, 1, 1, 1]
    assert known.tolist() == [True, True, True, False]


def test_the_example_runs_from_photographs_to_engines(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    torch.set_num_threads(1)
    assert example.main(["--out", str(tmp_path / "action.bundle"), "--data", str(folder), *SMALL]) == 0
    told = capsys.readouterr().out
    assert "outputs simcc_x, simcc_y, action" in told
    assert "the same action for 100%" in told
    bundle = read_bundle(tmp_path / "action.bundle")
    assert [output.name for output in bundle.manifest.spec.outputs] == ["simcc_x", "simcc_y", "action"]
    for engine in bundle.manifest.engines:
        report = bundle.manifest.reports[f"engines/{engine.target}/{engine.backend}"]
        assert engine.precision == "int8"
        assert report["int8_share"] == 1.0
        assert report["differences"]["action"] < 0.05


def test_a_network_of_ones_own_is_compiled_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    people: PoseDataset = split_train(dataset(folder, "train"))[0]
    network, spec = example.build(people.keypoints, (64, 64), 0)
    recipe = msgspec.structs.replace(load_recipe("fp32"), targets=("this-cpu",))
    request = CompileRequest(recipe, Network(network, spec), None, tmp_path / "own.bundle")
    first, again = Watch(), Watch()
    compile_bundle(request, first)
    assert compile_bundle(request, again).reused
    assert "export" in first.ran
    assert not again.ran
    slower = example.build(people.keypoints, (64, 64), 0)[0]
    slower.action.set_submodule("relu", torch.nn.ReLU6())  # the same tensors, another function
    third = Watch()
    compile_bundle(CompileRequest(recipe, Network(slower, spec), None, tmp_path / "other.bundle"), third)
    assert "export" in third.ran
