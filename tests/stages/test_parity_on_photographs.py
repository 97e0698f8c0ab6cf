"""A network of the zoo on 256 photographed people: every form stays as near to torch as its precision allows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepose.blocks.zoo import find_checkpoint
from edgepose.data.coco import dataset
from edgepose.errors import ParityError
from edgepose.export.half import half_onnx
from edgepose.export.notes import modules_of
from edgepose.export.openvino import openvino_from_onnx
from edgepose.recipe import Export
from edgepose.stages.export import ENDED, FLOAT_ONNX, export
from edgepose.stages.side_by_side import MAX_SHIFT_PX, Form, side_by_side
from edgepose.stages.source import Source

PEOPLE = 256

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_float_form_stays_near_torch(real_data: Path, tmp_path: Path) -> None:
    source, people = Source(find_checkpoint("kpe-t")), dataset(real_data / "lspet", "val").sample(PEOPLE, 0)
    plain, ended = tmp_path / "plain", tmp_path / "ended"
    for folder, ends in ((plain, Export()), (ended, Export(image_input=True, decoding=True))):
        folder.mkdir()
        export(source, 18, folder, ends)
    half_onnx(plain / FLOAT_ONNX, tmp_path / "half.onnx")
    forms = [
        Form("onnxruntime", plain / FLOAT_ONNX, "onnxruntime", "fp32", same=True),
        Form("openvino", openvino_from_onnx(plain / FLOAT_ONNX, tmp_path / "ir")[0], "openvino", "fp32", same=True),
        Form("half", tmp_path / "half.onnx", "onnxruntime", "fp16", same=True),
    ]
    report = side_by_side(source, people, plain, forms)
    assert report["people"] == PEOPLE
    for name, precision in (("exported", "fp32"), ("onnxruntime", "fp32"), ("openvino", "fp32"), ("half", "fp16")):
        assert report["shifts"][name]["p99_px"] <= MAX_SHIFT_PX[precision]  # type: ignore[index]
    assert report["shifts"]["half"]["p99_px"] > 0  # it did compute in 16 bits
    # With both ends in the graph, decoding included.
    forms = [
        Form("onnxruntime", ended / ENDED, "onnxruntime", "fp32", same=True),
        Form("openvino", openvino_from_onnx(ended / ENDED, tmp_path / "ended-ir")[0], "openvino", "fp32", same=True),
    ]
    report = side_by_side(source, people, ended, forms)
    for form in forms:
        assert report["shifts"][form.name]["p99_px"] <= 0.05


def test_a_layer_that_is_slightly_off_is_named(real_data: Path, tmp_path: Path) -> None:
    import onnx

    source, people = Source(find_checkpoint("kpe-t")), dataset(real_data / "lspet", "val").sample(64, 0)
    export(source, 18, tmp_path)
    model = onnx.load(tmp_path / FLOAT_ONNX)
    heavy = [node for node in model.graph.node if node.op_type == "Conv"]
    node = heavy[len(heavy) // 2]
    (weight,) = [value for value in model.graph.initializer if value.name == node.input[1]]
    noise = np.random.default_rng(0).normal(1, 0.2, onnx.numpy_helper.to_array(weight).shape).astype(np.float32)
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * noise, weight.name))
    onnx.save(model, tmp_path / "off.onnx")
    form = Form("off", tmp_path / "off.onnx", "onnxruntime", "fp32", same=True)
    with pytest.raises(ParityError, match="parity on dev, 64 crops: off: found keypoints") as caught:
        side_by_side(source, people, tmp_path, [form])
    layer = modules_of({entry.key: entry.value for entry in model.metadata_props})[node.name]
    assert f"the first layer that differs is {layer}" in str(caught.value)
