"""Preprocessing and decoding in the graph equal the NumPy path, in every runtime, for every decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from edgepose.errors import OnnxError, SpecError
from edgepose.export.ends import answers_with_ends, fix_batch, onnx_with_ends, spec_with_ends
from edgepose.pose.codec import decode, output_names
from edgepose.pose.preprocess import normalise
from edgepose.recipe import Export
from edgepose.runtime import open_session
from edgepose.spec import (
    Backend,
    Decoder,
    Heatmap,
    Keypoints,
    ModelSpec,
    OneStage,
    Preprocess,
    Regression,
    SimCC,
    TensorSpec,
)
from tests.fakes import HEIGHT, WIDTH, spot_spec
from tests.tiny_network import spot_onnx

BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")
JOINTS, HW = 3, (40, 32)
MAX_PX = 0.05

DECODERS: dict[str, Decoder] = {
    "simcc": SimCC(split_ratio=2.0),
    "simcc one": SimCC(split_ratio=1.0),
    "quarter": Heatmap(stride=4.0, refine="quarter"),
    "dark": Heatmap(stride=4.0, refine="dark"),
    "dark corners": Heatmap(stride=4.0, refine="dark", alignment="corners"),
    "softargmax scaled": Heatmap(stride=4.0, refine="softargmax", alignment="scaled"),
    "none": Heatmap(stride=4.0, refine="none"),
    "dark, too small": Heatmap(stride=10.0, refine="dark"),
    "scales": Regression(HW, "keypoints", "scales"),
    "scores": Regression(HW, "keypoints", "", "scores"),
    "neither": Regression(HW, "xy", ""),
}


def shapes_of(decoder: Decoder) -> dict[str, tuple[int, ...]]:
    match decoder:
        case SimCC():
            return {
                "simcc_x": (JOINTS, int(HW[1] * decoder.split_ratio)),
                "simcc_y": (JOINTS, int(HW[0] * decoder.split_ratio)),
            }
        case Heatmap():
            return {"heatmap": (JOINTS, int(HW[0] / decoder.stride), int(HW[1] / decoder.stride))}
        case _:
            names = output_names(decoder)
            return {name: (JOINTS,) if name == "scores" else (JOINTS, 2) for name in names}


def spec_of(decoder: Decoder) -> ModelSpec:
    """A network that says the decoder's raw outputs, which it is fed, and who can be seen."""
    outputs = tuple(TensorSpec(name, ("batch", *shape)) for name, shape in shapes_of(decoder).items())
    return ModelSpec(
        name="echo",
        keypoints=Keypoints(names=("a", "b", "c")),
        preprocess=Preprocess(input_hw=HW),
        decoder=decoder,
        inputs=(TensorSpec("in", ("batch", 1)),),
        outputs=(*outputs, TensorSpec("seen", ("batch", JOINTS))),
        visibility="seen",
    )


def echo_onnx(spec: ModelSpec, path: Path, opset: int) -> Path:
    """Every output is an input of its own."""
    values = {output.name: ["batch", *output.shape[1:]] for output in spec.outputs}
    graph = helper.make_graph(
        [helper.make_node("Identity", [f"{name}_in"], [name], name=name) for name in values],
        "echo",
        [helper.make_tensor_value_info(f"{name}_in", TensorProto.FLOAT, shape) for name, shape in values.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), path)
    return path


def answers_of(decoder: Decoder, count: int) -> dict[str, np.ndarray]:
    """Peaks everywhere, beside every border and in the very corners; noise; INT8 steps; nothing at all."""
    generator = np.random.default_rng(0)
    found = {}
    for name, shape in shapes_of(decoder).items():
        if isinstance(decoder, Regression):
            found[name] = generator.random((count, *shape)).astype(np.float32)
            continue
        axes = np.meshgrid(*(np.arange(size) for size in shape[1:]), indexing="ij")
        logits = np.zeros((count, *shape), np.float32)
        for person in range(count):
            for joint in range(JOINTS):
                share = generator.choice([0.0, 0.02, 0.06, 0.11, generator.random(), 0.95, 1.0], len(axes))
                centre = [s * (size - 1) for s, size in zip(share, shape[1:], strict=True)]
                spread = 1.0 if isinstance(decoder, Heatmap) else 3.0
                square = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True))
                peak = np.exp(-square / (2 * spread**2))
                logits[person, joint] = peak if isinstance(decoder, Heatmap) else 8 * peak
        noise = generator.normal(size=logits.shape).astype(np.float32)
        logits += noise * (0.01 if isinstance(decoder, Heatmap) else 0.2)
        step = logits.max() / 127
        logits[: count // 3] = np.round(logits[: count // 3] / step) * step
        logits[-1] = 0
        found[name] = logits
    found["seen"] = generator.normal(size=(count, JOINTS)).astype(np.float32)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", DECODERS)
def test_decoding_in_the_graph_equals_numpy(tmp_path: Path, kind: str, backend: Backend) -> None:
    spec, export = spec_of(DECODERS[kind]), Export(decoding=True)
    path = echo_onnx(spec, tmp_path / "echo.onnx", 13)
    onnx_with_ends(path, spec, export, path)
    ended, outputs = spec_with_ends(spec, export), answers_of(spec.decoder, 60)
    session = open_session(path, backend, threads=1)
    assert [output.name for output in session.outputs] == ["keypoints", "scores", "seen"]
    for count in (60, 1):
        found = session.infer({f"{name}_in": value[:count] for name, value in outputs.items()})
        keypoints, scores = decode(found, ended.decoder)
        expected = decode({name: value[:count] for name, value in outputs.items()}, spec.decoder)
        assert np.linalg.norm(keypoints - expected[0], axis=-1).max() <= MAX_PX
        np.testing.assert_allclose(scores, expected[1], atol=1e-4)
        np.testing.assert_array_equal(found["seen"], outputs["seen"][:count])
    session.close()


@pytest.mark.parametrize("opset", range(13, 22))
def test_decoding_is_the_same_in_every_opset(tmp_path: Path, opset: int) -> None:
    for kind in ("simcc", "dark", "softargmax scaled", "scales"):
        spec, export = spec_of(DECODERS[kind]), Export(decoding=True)
        path = echo_onnx(spec, tmp_path / "echo.onnx", opset)
        onnx_with_ends(path, spec, export, path)
        assert onnx.load(path).opset_import[0].version == opset
        outputs = answers_of(spec.decoder, 12)
        session = open_session(path, "onnxruntime", threads=1)
        found = session.infer({f"{name}_in": value for name, value in outputs.items()})
        session.close()
        expected = answers_with_ends(outputs, spec, export)
        assert np.abs(found["keypoints"] - expected["keypoints"]).max() * max(HW) <= MAX_PX


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("color", ["bgr", "rgb"])
def test_images_in_the_graph_equal_numpy(tmp_path: Path, color: Any, backend: Backend) -> None:
    preprocess = Preprocess(input_hw=(HEIGHT, WIDTH), color=color)
    spec = msgspec.structs.replace(spot_spec(), preprocess=preprocess)
    path = tmp_path / "spots.onnx"
    path.write_bytes(spot_onnx())
    plain = open_session(path, backend, threads=1)
    crops = np.random.default_rng(0).integers(0, 256, (5, HEIGHT, WIDTH, 3), np.uint8)
    expected = plain.infer({"images": normalise(crops, preprocess)})
    plain.close()
    onnx_with_ends(path, spec, Export(image_input=True), path)
    session = open_session(path, backend, threads=1)
    assert session.inputs == spec_with_ends(spec, Export(image_input=True)).inputs
    for count in (5, 1):
        found = session.infer({"pixels": crops[:count]})
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value[:count], rtol=1e-4, atol=1e-4)
    with pytest.raises(SpecError, match="found dtype float32, expected uint8"):
        session.infer({"pixels": crops.astype(np.float32)})
    session.close()


def test_both_ends_at_once(tmp_path: Path) -> None:
    spec, export = spot_spec(), Export(image_input=True, decoding=True)
    path = tmp_path / "spots.onnx"
    path.write_bytes(spot_onnx())
    onnx_with_ends(path, spec, export, path)
    ended = spec_with_ends(spec, export)
    session = open_session(path, "onnxruntime", threads=1)
    assert (session.inputs, session.outputs) == (ended.inputs, ended.outputs)
    session.close()


def test_values_inside_keep_their_names(tmp_path: Path) -> None:
    path = tmp_path / "spots.onnx"
    path.write_bytes(spot_onnx())
    onnx_with_ends(path, spot_spec(), Export(image_input=True, decoding=True), path)
    produced = {name for node in onnx.load(path).graph.node for name in node.output}
    assert {"images", "planes", "simcc_x", "simcc_y"} <= produced


@pytest.mark.parametrize("backend", BACKENDS)
def test_fixed_batch_is_a_number_and_answers_the_same(tmp_path: Path, backend: Backend) -> None:
    path = tmp_path / "spots.onnx"
    path.write_bytes(spot_onnx())
    images = np.random.default_rng(0).random((4, 3, HEIGHT, WIDTH), np.float32)
    free = open_session(path, backend, threads=1)
    expected = free.infer({"images": images})
    free.close()
    fix_batch(path, 4, path)
    session = open_session(path, backend, threads=1)
    assert session.inputs[0].shape == (4, 3, HEIGHT, WIDTH)
    assert {spec.shape[0] for spec in session.outputs} == {4}
    for name, value in session.infer({"images": images}).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)
    with pytest.raises(SpecError):
        session.infer({"images": images[:3]})
    session.close()


def test_one_stage_network_cannot_be_decoded_in_the_graph() -> None:
    spec = msgspec.structs.replace(spot_spec(), decoder=OneStage())
    with pytest.raises(SpecError, match="one-stage network"):
        spec_with_ends(spec, Export(decoding=True))


def test_old_opset_is_refused(tmp_path: Path) -> None:
    spec = spec_of(DECODERS["simcc"])
    path = echo_onnx(spec, tmp_path / "echo.onnx", 12)
    with pytest.raises(OnnxError, match="opset: found 12, expected 13 or newer"):
        onnx_with_ends(path, spec, Export(decoding=True), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_file_without_the_decoders_outputs_is_refused(tmp_path: Path) -> None:
    path = echo_onnx(spec_of(DECODERS["dark"]), tmp_path / "echo.onnx", 18)
    with pytest.raises(OnnxError, match="expected 'simcc_x' among them"):
        onnx_with_ends(path, spec_of(DECODERS["simcc"]), Export(decoding=True), tmp_path / "out.onnx")
