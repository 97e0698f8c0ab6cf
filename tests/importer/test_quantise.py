"""Imported networks to INT8 after training: where quantisers go, what they do to the answers, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import msgspec
import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from benchmarks import foreign
from edgepose.bundle import verify_bundle
from edgepose.compress.ranges import Range
from edgepose.errors import BadInput, DataUnavailable, EdgeposeError, OnnxError, ParityError, UsageError
from edgepose.importer.bundle import ImportRequest, import_model
from edgepose.importer.calibrate import Estimator, calibrated
from edgepose.importer.placement import placed
from edgepose.importer.quantise import QuantiseRequest, quantise_bundle
from edgepose.importer.spec import parse_spec
from edgepose.recipe import Recipe, load_recipe
from edgepose.runtime.ort import OrtSession
from edgepose.stages.assemble import CompileResult
from tests.importer.conftest import STYLES
from tests.importer.test_import import check_golden_vectors, check_poses
from tests.tiny_checkpoint import Watch

Imported = Callable[..., CompileResult]
PTQ = load_recipe("ptq-int8")


class Everything(nn.Module):
    """What backbones are made of, weights at random: residual sums, depthwise, SiLU, gates, concatenation, BN apart."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.bn = nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.point = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 16, 1)
        self.down, self.down_bn = nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32)
        self.gate, self.up = nn.Conv2d(32, 32, 1), nn.ConvTranspose2d(32, 16, 2, 2)
        self.mix, self.head = nn.Conv2d(32, 32, 3, 1, 1), nn.Conv2d(32, 3, 1)
        for norm in (self.bn, self.down_bn):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.bn(self.stem(images)))
        inner = nn.functional.silu(self.depth(first))
        first = torch.relu(first + self.point(inner))
        low = torch.relu(self.down_bn(self.down(nn.functional.max_pool2d(first, 3, 1, 1))))
        low = low * torch.sigmoid(self.gate(low.mean((2, 3), keepdim=True)))
        whole: Tensor = self.head(torch.relu(self.mix(torch.cat([first, self.up(low)], 1))))
        return torch.sigmoid(whole)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dozen photographs of discs, unlabelled."""
    folder, generator = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(12):
        frame = foreign.disc_frame((64, 48), *generator.uniform(8, 40, (3, 2)))
        cv2.imwrite(str(folder / f"{number}.png"), frame)
    return folder


@pytest.fixture(scope="session")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("everything") / "net.onnx"
    return foreign.export(Everything(), path, opset=17, folded=False)


def images(count: int = 6) -> list[np.ndarray]:
    return list(np.random.default_rng(0).standard_normal((count, 1, 3, *foreign.HW), np.float32))


# Where quantisers go


def test_the_simplified_graph_says_the_same(everything: Path, tmp_path: Path) -> None:
    placement = placed(everything, ())
    assert not [node for node in placement.model.graph if node.op_type == "BatchNormalization"]
    ir.save(placement.model, tmp_path / "simple.onnx")
    answers = []
    for path in (everything, tmp_path / "simple.onnx"):
        session = OrtSession(path, threads=1)
        answers.append(session.infer({"input": images()[0]})["output"])
    np.testing.assert_allclose(answers[0], answers[1], atol=1e-5)


def test_last_layers_and_protected_ones_stay_float(everything: Path) -> None:
    placement = placed(everything, ())
    assert placement.protected == ("head.Conv",)
    quantised = {entry.key for entry in placement.weights}
    assert len(quantised) == 7
    assert placed(everything, ("mix.Conv",)).protected == ("head.Conv", "mix.Conv")
    assert placed(everything, ("/mix/Conv",)).protected == ("head.Conv", "mix.Conv")
    with pytest.raises(UsageError, match=r"did you mean 'mix\.Conv'"):
        placed(everything, ("mix.Conf",))


def test_weights_have_a_scale_per_output_channel(everything: Path) -> None:
    by_size = {(len(entry.scale), entry.axis) for entry in placed(everything, ()).weights}
    assert by_size == {(16, 0), (32, 0), (16, 1)}  # the transposed convolution's outputs are its second axis


def test_sums_and_concatenations_between_layers_are_quantised(everything: Path) -> None:
    placement = placed(everything, ())
    producers = {value.name: node for node in placement.model.graph for value in node.outputs}
    kinds = [producers[name].op_type for name in placement.activations if name in producers]
    assert "Concat" in kinds
    assert "input" in placement.activations
    assert not {name for name in placement.activations if name == "output"}


@pytest.mark.parametrize("estimator", ["minmax", "mean-minmax", "median-minmax", "quantile"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_hold_what_was_seen(estimator: Estimator, symmetric: bool, everything: Path) -> None:
    placement, shown = placed(everything, ()), images()
    (entry,) = [r for r in calibrated(placement, shown, estimator=estimator, symmetric=symmetric) if "input" in r.key]
    low, high = _span(entry)
    everything_seen = np.concatenate(shown)
    if estimator == "minmax":
        assert low <= everything_seen.min() + entry.scale[0]
        assert high >= everything_seen.max() - entry.scale[0]
    else:
        assert 2.5 < high < everything_seen.max() + 2 * entry.scale[0]
    assert entry.symmetric == symmetric


def _span(entry: Range) -> tuple[float, float]:
    (scale,), (zero,) = entry.scale, entry.zero_point
    return (entry.low - zero) * scale, (entry.high - zero) * scale


def test_an_asymmetric_range_always_holds_0(everything: Path) -> None:
    found = calibrated(
        placed(everything, ()), [np.full((1, 3, 64, 48), 2.0, np.float32)], estimator="minmax", symmetric=False
    )
    (entry,) = [r for r in found if r.key == "post_hooks.input"]
    assert (entry.zero_point, _span(entry)[1]) == ((0,), pytest.approx(2.0))


def test_calibration_without_images_or_with_nan(everything: Path) -> None:
    placement = placed(everything, ())
    with pytest.raises(OnnxError, match="no images"):
        calibrated(placement, [], estimator="minmax", symmetric=False)
    with pytest.raises(OnnxError, match="NaN"):
        calibrated(placement, [np.full((1, 3, 64, 48), np.nan, np.float32)], estimator="minmax", symmetric=False)


# What comes of it


@pytest.mark.parametrize("style", STYLES)
def test_networks_of_others_run_in_integers(style: str, imported: Imported, photos: Path, tmp_path: Path) -> None:
    source = imported(style, 11)
    result = quantise_bundle(QuantiseRequest(source.bundle.root, PTQ, photos, tmp_path / "q.bundle"), Watch())
    manifest = verify_bundle(result.bundle.root).manifest
    assert {engine.precision for engine in manifest.engines} == {"int8"}
    assert manifest.chain["source"] == source.bundle.manifest.chain["source"]
    assert manifest.chain["bundle"] == source.bundle.digest
    assert manifest.reports["ptq"]["calibration_people"] == 12
    assert manifest.reports["import"] == source.bundle.manifest.reports["import"]
    check_golden_vectors(result)
    check_poses(style, result.bundle.root)
    again = quantise_bundle(QuantiseRequest(source.bundle.root, PTQ, photos, tmp_path / "q.bundle"), Watch())
    assert again.reused


def test_a_whole_backbone_runs_in_integers_in_both_runtimes(everything: Path, photos: Path, tmp_path: Path) -> None:
    spec = parse_spec(foreign.HEATMAP_SPEC)
    source = import_model(ImportRequest(everything, spec, ("this-cpu",), tmp_path / "f.bundle"), Watch())
    request = QuantiseRequest(source.bundle.root, PTQ, photos, tmp_path / "q.bundle")
    reports = quantise_bundle(request, Watch()).bundle.manifest.reports
    for backend in ("onnxruntime", "openvino"):
        found = reports[f"engines/this-cpu/{backend}"]
        assert found["int8"]["asked_share"] > 0.95
        assert found["shift"]["logit_gap"] < 0.01
    assert reports["ptq"]["from_float"]["logit_gap"] < 0.02


def test_labelled_people_are_measured_before_and_after(imported: Imported, tmp_path: Path) -> None:
    people = tmp_path / "people"
    _write_people(people, 20)
    source = imported("heatmap", 17).bundle.root
    result = quantise_bundle(QuantiseRequest(source, PTQ, people, tmp_path / "q.bundle"), Watch())
    report = result.bundle.manifest.reports["ptq"]
    assert report["dev_float"]["mpjpe_px"] == pytest.approx(report["dev"]["mpjpe_px"], abs=1)
    demand = msgspec.structs.replace(PTQ, max_drop_points=1.0)
    request = QuantiseRequest(source, demand, people, tmp_path / "r.bundle")
    refused(request, UsageError, "no pck_torso_0.2 on dev")


def _write_people(folder: Path, count: int) -> None:
    import json

    (folder / "images").mkdir(parents=True)
    generator, photographs, annotations = np.random.default_rng(0), [], []
    for number in range(count):
        places = generator.uniform(10, 38, (3, 2))
        cv2.imwrite(str(folder / "images" / f"{number}.png"), foreign.disc_frame((64, 48), *places))
        photographs.append({"id": number, "file_name": f"{number}.png", "width": 48, "height": 64})
        labels = [float(v) for place in places for v in (*place, 2)]
        person = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [0, 0, 48, 64], "keypoints": labels}
        annotations.append({**person, "num_keypoints": 3, "area": 1000, "iscrowd": 0})
    category = {"id": 1, "name": "discs", "keypoints": ["red", "green", "blue"], "skeleton": []}
    (folder / "train.json").write_text(
        json.dumps({"images": photographs, "annotations": annotations, "categories": [category]})
    )


# Refused, and nothing left behind


def refused(request: QuantiseRequest, error: type[EdgeposeError], match: str) -> None:
    with pytest.raises(error, match=match):
        quantise_bundle(request, Watch())
    assert not request.out.exists()


def recipe(**changes: object) -> Recipe:
    return msgspec.convert({**msgspec.to_builtins(PTQ), **changes}, Recipe)


def test_what_cannot_be_done_to_an_onnx_file(imported: Imported, photos: Path, tmp_path: Path) -> None:
    source = imported("simcc").bundle.root
    quantise = {"mode": "ptq"}
    for asked, match in (
        (recipe(quantise=None), "found no quantisation"),
        (recipe(prune={"ratio": 0.5}), "found prune, for a bundle"),
        (recipe(quantise={"mode": "qat"}), "found mode: qat"),
        (recipe(quantise={**quantise, "max_drop": {"points": 1}}), "max_drop, for a bundle"),
        (recipe(quantise={**quantise, "range_estimator": "histogram"}), "histogram"),
        (recipe(precisions="auto"), "precisions"),
        (recipe(quantise={**quantise, "protected": ["x.MatMuls"]}), "did you mean"),
        (recipe(max_drop_points=1), "photographs without labels"),
    ):
        refused(QuantiseRequest(source, asked, photos, tmp_path / "q.bundle"), BadInput, match)


def test_without_images(imported: Imported, tmp_path: Path) -> None:
    source = imported("simcc").bundle.root
    refused(QuantiseRequest(source, PTQ, None, tmp_path / "q.bundle"), DataUnavailable, "add --data DIR")
    (tmp_path / "empty").mkdir()
    refused(QuantiseRequest(source, PTQ, tmp_path / "empty", tmp_path / "q.bundle"), DataUnavailable, "no photographs")


def test_a_bundle_that_is_quantised_already(imported: Imported, photos: Path, tmp_path: Path) -> None:
    source = imported("simcc").bundle.root
    done = quantise_bundle(QuantiseRequest(source, PTQ, photos, tmp_path / "q.bundle"), Watch()).bundle.root
    refused(QuantiseRequest(done, PTQ, photos, tmp_path / "r.bundle"), UsageError, "quantised already")


def test_too_little_in_integers(
    imported: Imported, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were nothing but the first layer quantised, the runtime's own count would say so."""
    from edgepose.importer import placement

    monkeypatch.setattr(placement, "_last", lambda graph, heavy: set())
    monkeypatch.setattr(placement, "_can_be_quantised", lambda graph, value: value.name == "input")
    source = imported("simcc").bundle.root
    refused(QuantiseRequest(source, PTQ, photos, tmp_path / "q.bundle"), ParityError, "min_int8_macs|stray|difference")
