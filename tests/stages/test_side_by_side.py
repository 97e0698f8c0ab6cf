"""One network in all its forms, measured on the same people; a form that is another network is found out."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest

from edgepose.blocks.card import Card, Lineage
from edgepose.blocks.checkpoint import save_checkpoint
from edgepose.data.coco import PoseDataset
from edgepose.errors import ParityError
from edgepose.export.ends import spec_with_ends
from edgepose.export.openvino import openvino_from_onnx
from edgepose.pose import metrics
from edgepose.pose.codec import decode
from edgepose.pose.preprocess import network_input
from edgepose.recipe import Export
from edgepose.runtime import open_session
from edgepose.stages.cache import StageResult
from edgepose.stages.compress import NETWORK, quantise
from edgepose.stages.export import ENDED, FLOAT_ONNX, MODEL, ends_of, export
from edgepose.stages.people import StageData
from edgepose.stages.settings import QuantiseStage
from edgepose.stages.side_by_side import GAP_POINTS, Form, _bounds, form_of, side_by_side
from edgepose.stages.source import Source
from edgepose.training.loop import RunOptions, fit
from edgepose.training.predict import cut_crops
from tests.training.dots import CONFIG, KEYPOINTS, SPEC, dots, network
from tests.training.dots import NETWORK as SMALL

pytestmark = pytest.mark.usefixtures("one_thread")


class Made:
    """A trained network, float and quantised, exported; as a checkpoint, its export and its people."""

    def __init__(self, folder: Path) -> None:
        data = StageData(dots(folder, "train", 32, seed=1), dots(folder, "dev", 16, seed=2))
        model = network()
        config = msgspec.structs.replace(CONFIG, epochs=8, learning_rate=0.01)
        fit(model, SPEC, (data.train, data.dev), config, options=RunOptions(workers=0))
        card = Card("dots", SMALL, KEYPOINTS, "", lineage=(Lineage("train", {}, data.digests, {}),))
        save_checkpoint(folder / "net", card, model.state_dict())
        quantise(folder / "net", data, QuantiseStage(20, False, (), 0), (folder, RunOptions(workers=0)))
        self.float, self.quantised = Source(folder / "net"), Source(folder / NETWORK)
        self.float_export, self.export = folder / "float", folder / "export"
        for source, target in ((self.float, self.float_export), (self.quantised, self.export)):
            target.mkdir()
            export(source, 18, target)
        self.dev: PoseDataset = data.dev


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    import torch

    torch.set_num_threads(1)
    return Made(tmp_path_factory.mktemp("made"))


def engines(onnx_file: Path, folder: Path) -> list[Form]:
    xml, _ = openvino_from_onnx(onnx_file, folder)
    precision = "int8" if "QuantizeLinear" in {n.op_type for n in onnx.load(onnx_file).graph.node} else "fp32"
    return [
        Form("engines/cpu/onnxruntime", onnx_file, "onnxruntime", precision, same=True),  # type: ignore[arg-type]
        Form("engines/cpu/openvino", xml, "openvino", precision, same=True),  # type: ignore[arg-type]
    ]


def spoilt(onnx_file: Path, layer: str, out: Path) -> Path:
    """A copy in which one layer's weights have the wrong sign."""
    model = onnx.load(onnx_file)
    names = (f"{layer}.weight", f"{layer}.weight_codes")
    (weight,) = [value for value in model.graph.initializer if value.name in names]
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), weight.name))
    onnx.save(model, out)
    return out


@pytest.mark.parametrize("kind", ["float", "quantised"])
def test_all_forms_of_a_network_are_as_accurate(kind: str, made: Made, tmp_path: Path) -> None:
    source, exported = (made.float, made.float_export) if kind == "float" else (made.quantised, made.export)
    file = exported / (FLOAT_ONNX if kind == "float" else MODEL)
    report = side_by_side(source, made.dev, exported, engines(file, tmp_path))
    names = ["torch", "exported", "engines/cpu/onnxruntime", "engines/cpu/openvino"]
    assert list(report["figures"]) == names
    assert report["people"] == 16
    assert report["figures"]["torch"]["pck_torso_0.2"] > 0.4
    for name in names[1:]:
        low, high = report["judged"]["ci95"][name]
        assert low <= report["gaps"][name]["pck_torso_0.2"] <= high
        assert abs(report["gaps"][name]["pck_torso_0.2"]) <= 15
        if kind == "float":
            assert report["figures"][name] == pytest.approx(report["figures"]["torch"], abs=1e-4)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("layer", ["backbone.stem.2.0", "block.head.maps"])
def test_an_engine_that_is_another_network_is_refused_with_the_layer_at_fault(
    layer: str, backend: str, made: Made, tmp_path: Path
) -> None:
    wrong = engines(spoilt(made.export / MODEL, layer, tmp_path / MODEL), tmp_path)
    (form,) = [form for form in wrong if form.backend == backend]
    with pytest.raises(ParityError) as caught:
        side_by_side(made.quantised, made.dev, made.export, [form])
    text = str(caught.value)
    assert caught.value.exit_code == 5
    assert f"accuracy on dev: engines/cpu/{backend}: found pck_torso_0.2" in text
    assert f"the first layer that differs is {layer} (" in text


def changed(onnx_file: Path, layer: str, change: Callable[[np.ndarray], np.ndarray], out: Path) -> Form:
    """A float engine in which one layer's weights are others."""
    model = onnx.load(onnx_file)
    (weight,) = [value for value in model.graph.initializer if value.name == f"{layer}.weight"]
    weight.CopyFrom(onnx.numpy_helper.from_array(change(onnx.numpy_helper.to_array(weight)), weight.name))
    onnx.save(model, out)
    return Form("engine", out, "onnxruntime", "fp32", same=True)


@pytest.mark.parametrize(
    ("layer", "change", "found"),
    [
        ("backbone.stem.2.0", lambda w: w * np.float32(np.nan), "values of output 'simcc_x' that are NaN or infinite"),
        ("block.head.maps", lambda w: w * np.float32(0), "output 'simcc_x', which is the same for all 16 people"),
        ("backbone.stem.2.0", lambda w: w + np.float32(0.02), "keypoints 0.* px from torch's (99th percentile)"),
    ],
)
def test_a_float_engine_that_answers_nonsense_or_elsewhere_is_refused(
    layer: str, change: Callable[[np.ndarray], np.ndarray], found: str, made: Made, tmp_path: Path
) -> None:
    form = changed(made.float_export / FLOAT_ONNX, layer, change, tmp_path / "f.onnx")
    with pytest.raises(ParityError) as caught:
        side_by_side(made.float, made.dev, made.float_export, [form])
    text = str(caught.value)
    assert text.startswith("parity on dev, 16 crops: engine: found ")
    assert re.search(re.escape(found).replace(r"0\.\*", r"[\d.]+"), text)
    assert f"the first layer that differs is {layer} (" in text


@pytest.mark.parametrize("kind", ["float", "quantised"])
def test_ends_in_the_graph_change_no_keypoint(kind: str, made: Made, tmp_path: Path) -> None:
    """Engine by engine: the network with its ends in the graph against the same with NumPy before and behind it."""
    source = made.float if kind == "float" else made.quantised
    export(source, 18, tmp_path, Export(image_input=True, decoding=True))
    plain = tmp_path / (FLOAT_ONNX if kind == "float" else MODEL)
    ended, crops = spec_with_ends(SPEC, ends_of(tmp_path)), cut_crops(made.dev, SPEC)
    for backend in ("onnxruntime", "openvino"):
        keypoints = []
        for file, spec in ((plain, SPEC), (tmp_path / ENDED, ended)):
            session = open_session(file, backend, threads=1)
            outputs = session.infer({spec.inputs[0].name: network_input(crops.pixels, spec)})
            keypoints.append(decode(outputs, spec.decoder)[0])
            session.close()
        assert np.linalg.norm(keypoints[0] - keypoints[1], axis=-1).max() <= 0.05
    if kind == "float":
        report = side_by_side(source, made.dev, tmp_path, engines(tmp_path / ENDED, tmp_path))
        assert report["shifts"]["engines/cpu/openvino"]["p99_px"] <= 0.05


def test_a_float_engine_at_fault_is_named_too(made: Made, tmp_path: Path) -> None:
    wrong = spoilt(made.float_export / FLOAT_ONNX, "block.neck.smooth.0", tmp_path / "f.onnx")
    form = Form("engine", wrong, "onnxruntime", "fp32", same=True)
    with pytest.raises(ParityError, match=r"first layer that differs is block\.neck\.smooth\.0 "):
        side_by_side(made.float, made.dev, made.float_export, [form])


def test_an_export_that_is_another_network_is_refused_with_the_layer_at_fault(made: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.export, tmp_path / "export"))
    spoilt(made.export / MODEL, "block.neck.smooth.0", folder / MODEL)
    with pytest.raises(ParityError, match=r"accuracy on dev: exported.*is block\.neck\.smooth\.0 "):
        side_by_side(made.quantised, made.dev, folder, [])


def test_an_engine_that_is_meant_to_be_another_network_is_only_reported(made: Made, tmp_path: Path) -> None:
    file = spoilt(made.export / MODEL, "block.head.maps", tmp_path / "narrow.onnx")
    form = Form("narrow", file, "onnxruntime", "int8", same=False)
    report = side_by_side(made.quantised, made.dev, made.export, [form])
    assert report["gaps"]["narrow"]["pck_torso_0.2"] < -15
    with pytest.raises(ParityError):
        side_by_side(made.quantised, made.dev, made.export, [replace(form, same=True)])


def test_which_engines_are_meant_to_be_the_same() -> None:
    def form(**report: object) -> Form:
        known = {"main": "model.onnx", "backend": "onnxruntime", "precision": "int8"}
        return form_of("engine", StageResult("engine", "", "/cache/x", {**known, **report}, 0.0))

    assert form(weight_bits=8).same
    assert form().path == Path("/cache/x/model.onnx")
    assert not form(weight_bits=7).same
    assert not form(precision="fp32", from_floats={}).same


def test_joints_that_fell_the_other_way_by_chance_are_no_fault(made: Made) -> None:
    """Two of 64 joints are 3 points, but as many might have come right."""
    truth = np.stack([person.keypoints for person in made.dev.persons])
    predicted = np.repeat(truth[None, ..., :2], 2, axis=0)
    predicted[0, 0, 0] += 1000
    predicted[1, 1:3, 1] += 1000
    torch_joints, others = (metrics.measure(places, truth, made.dev.keypoints) for places in predicted)
    low, high = _bounds("pck_torso_0.2", torch_joints, others, made.dev)
    assert low < -100 * 1 / truth[..., 2].astype(bool).sum() < high
    assert high > -GAP_POINTS
    worse = predicted[0].copy()
    worse[:, 2] += 1000
    low, high = _bounds("pck_torso_0.2", torch_joints, metrics.measure(worse, truth, made.dev.keypoints), made.dev)
    assert high < -GAP_POINTS
