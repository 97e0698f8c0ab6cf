"""From the file of a network in the style of others to a bundle that runs, is verified, profiled and evaluated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks import foreign
from edgepose.bundle import check_engine, golden_vectors, verify_bundle
from edgepose.errors import EdgeposeError, OnnxError, ParityError, SpecError, UsageError
from edgepose.estimator import PoseEstimator
from edgepose.golden import check_golden
from edgepose.importer.bundle import ImportRequest, import_model
from edgepose.importer.spec import parse_spec
from edgepose.rebuild import BuildRequest, build_bundle
from edgepose.runtime import open_session
from edgepose.spec import Backend, ModelSpec
from edgepose.stages.assemble import CompileResult
from edgepose.timing.engine_stages import frame_stages
from edgepose.timing.messages import Load
from edgepose.timing.record import BundleArm
from tests.importer.conftest import STYLES, Exported
from tests.tiny_checkpoint import Watch

Imported = Callable[..., CompileResult]
PLACES = ((12.0, 20.0), (30.0, 40.0), (20.0, 50.0))  # red, green, blue
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")


def check_poses(style: str, path: Path) -> None:
    """Both engines find the discs."""
    for backend in BACKENDS:
        with PoseEstimator.from_bundle(path, backend) as estimator:
            if style == "yolo-pose":
                poses = estimator(foreign.disc_frame(foreign.FRAME_HW, (50, 20), (50, 32), (400, 400)))
                assert len(poses) == 1
                np.testing.assert_allclose(poses.keypoints[0], [[50, 20], [50, 32]], atol=2.1)  # cells of four pixels
                np.testing.assert_allclose(poses.boxes[0], [38, 8, 62, 32], atol=2.1)
            else:
                frame = foreign.disc_frame(foreign.HW, *PLACES)
                poses = estimator(frame, [[0, 0, 48, 64]] * 3)  # several people: a fixed batch takes turns
                np.testing.assert_allclose(poses.keypoints, [PLACES] * 3, atol=1.3)
            assert (poses.scores > 0.5).all()


def check_golden_vectors(result: CompileResult) -> None:
    for engine in result.bundle.manifest.engines:
        file = check_engine(result.bundle, engine)
        session = open_session(file, engine.backend, threads=1, precision=engine.precision)
        assert check_golden(result.bundle, engine, session) is not None
        session.close()


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("opset", [9, 11, 17])
def test_networks_of_others_run(style: str, opset: int, imported: Imported) -> None:
    result = imported(style, opset, listed=opset == 9, batch=1 if opset == 11 else 0)
    manifest = verify_bundle(result.bundle.root).manifest
    check_poses(style, result.bundle.root)
    check_golden_vectors(result)
    report = manifest.reports["import"]
    assert report["opset"] == [opset, 17]
    assert manifest.chain["source"] == report["sha256"]
    assert any("listed as inputs" in note for note in report["notes"]) == (opset == 9)
    assert any("one person at a time" in note for note in report["notes"]) == (opset == 11)
    assert manifest.spec.inputs[0].shape[0] == (1 if opset == 11 else "batch")
    (version,) = onnx.load(result.bundle.root / "model.onnx", load_external_data=False).opset_import
    assert version.version == 17
    if opset < 17:
        assert report["parity"]["outputs"][0]["max_abs"] < 1e-4


def test_a_fixed_batch_of_several(imported: Imported) -> None:
    result = imported("simcc", 17, batch=2)
    check_poses("simcc", result.bundle.root)
    check_golden_vectors(result)
    golden = golden_vectors(result.bundle)
    assert golden is not None
    assert golden.inputs.shape[0] == 2


def test_a_target_that_fixes_the_batch_gets_engines_of_that_batch(tmp_path: Path, imported: Imported) -> None:
    (tmp_path / "npu.yaml").write_text(
        "name: npu\ndescription: Fixed.\nbackends: [openvino]\nprecisions: [fp32]\nbatch: 2\n"
    )
    result = imported("simcc", 17, targets=(str(tmp_path / "npu.yaml"),))
    (engine,) = result.bundle.manifest.engines
    session = open_session(check_engine(result.bundle, engine), engine.backend, threads=1)
    assert session.inputs[0].shape[0] == 2
    session.close()
    check_golden_vectors(result)


def test_what_follows_works_on_it(imported: Imported, tmp_path: Path) -> None:
    result = imported("yolo-pose", 17)
    rebuilt = build_bundle(BuildRequest(result.bundle.root, ("x86-cpu",), tmp_path / "built.bundle"), Watch()).bundle
    assert {engine.target for engine in rebuilt.manifest.engines} == {"x86-cpu"}
    engine = rebuilt.manifest.engines[0]
    session = open_session(check_engine(rebuilt, engine), engine.backend, threads=1)
    arm = BundleArm("yolo", str(rebuilt.root), engine.backend, engine.precision, "frame")
    stages = frame_stages(session, rebuilt.manifest.spec, Load(arm, 1, 2, (120, 160), 0, 0.0))
    for _, stage in stages:
        stage()
    session.close()


def test_nothing_is_done_twice(imported: Imported, exported: Exported) -> None:
    first = imported("simcc")
    again = imported("simcc")
    assert again.reused
    assert again.bundle.digest == first.bundle.digest
    assert all(stage.reused for stage in again.stages)


def test_older_specifications_still_load() -> None:
    old = {
        "name": "n", "keypoints": {"names": ["a"]}, "preprocess": {"input_hw": [8, 8]},
        "decoder": {"type": "regression", "input_hw": [8, 8]}, "inputs": [], "outputs": [],
    }  # fmt: skip
    spec = msgspec.convert(old, ModelSpec)
    assert (spec.preprocess.border, getattr(spec.decoder, "scores", None)) == (0, "")


# Refused, and nothing left behind


def refused(request: ImportRequest, error: type[EdgeposeError], match: str) -> EdgeposeError:
    with pytest.raises(error, match=match) as caught:
        import_model(request, Watch())
    assert not request.out.exists()
    assert not list(request.out.parent.glob("cache/**/*.onnx"))
    return caught.value


@pytest.fixture
def request_for(exported: Exported, tmp_path: Path) -> Callable[..., ImportRequest]:
    def make(style: str = "heatmap", *, old: str = "", new: str = "", model: Path | None = None) -> ImportRequest:
        spec = parse_spec(STYLES[style][1].replace(old, new) if old else STYLES[style][1])
        return ImportRequest(model or exported(style), spec, ("this-cpu",), tmp_path / "out.bundle")

    return make


def test_a_specification_of_another_network(request_for: Callable[..., ImportRequest]) -> None:
    fewer = foreign.HEATMAP_SPEC.replace("[red, green, blue]", "[red, green]").replace("0.05, 0.05, 0.05", "0.05, 0.05")
    refused(replace(request_for(), spec=parse_spec(fewer)), SpecError, "3 maps in .*expected 2")
    refused(request_for(old="kind: heatmap", new="name: maps, kind: heatmap"), SpecError, "expected one of output")


def test_a_taken_name_and_an_unknown_target(request_for: Callable[..., ImportRequest], tmp_path: Path) -> None:
    request = request_for()
    refused(replace(request, targets=("this-cpo",)), EdgeposeError, "this-cpu")
    (tmp_path / "out.bundle").mkdir()
    with pytest.raises(UsageError, match="something else there"):
        import_model(request, Watch())


def _changed(path: Path, folder: Path, **weights: np.ndarray | float) -> Path:
    """A copy of a file, the first convolution's weights multiplied and its image cut off, as asked."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if list(tensor.dims) == [6, 3, 4, 4]:
            array = numpy_helper.to_array(tensor) * weights.get("times", 1)
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    onnx.save(model, folder / "changed.onnx")
    return folder / "changed.onnx"


def test_answers_that_are_no_numbers(
    request_for: Callable[..., ImportRequest], exported: Exported, tmp_path: Path
) -> None:
    model = onnx.load(exported("heatmap"))
    node = model.graph.node[-1]
    inner = node.output[0]
    node.output[0] = "before"
    held = [numpy_helper.from_array(np.float32(-1), "minus_one")]
    model.graph.initializer.extend(held)
    steps = (("Sub", ["before", "minus_one"], "more"), ("Mul", ["more", "minus_one"], "less"), ("Log", ["less"], inner))
    model.graph.node.extend(helper.make_node(kind, inputs, [name]) for kind, inputs, name in steps)
    onnx.save(model, tmp_path / "nan.onnx")
    refused(request_for(model=tmp_path / "nan.onnx"), OnnxError, "NaN or infinite")


def test_the_same_answer_to_everything(
    request_for: Callable[..., ImportRequest], exported: Exported, tmp_path: Path
) -> None:
    blind = _changed(exported("heatmap"), tmp_path, times=0)
    refused(request_for(model=blind), OnnxError, "the same answer to every image")


def test_a_network_that_is_quantised_already(
    request_for: Callable[..., ImportRequest], exported: Exported, tmp_path: Path
) -> None:
    model = onnx.load(exported("heatmap"))
    last = model.graph.node[-1]
    name, last.output[0] = last.output[0], "before"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.01), "step"))
    model.graph.node.extend(
        [helper.make_node("QuantizeLinear", ["before", "step"], ["codes"]),
         helper.make_node("DequantizeLinear", ["codes", "step"], [name])]
    )  # fmt: skip
    onnx.save(model, tmp_path / "q.onnx")
    refused(request_for(model=tmp_path / "q.onnx"), OnnxError, "quantised already")


def test_two_inputs(request_for: Callable[..., ImportRequest], exported: Exported, tmp_path: Path) -> None:
    model = onnx.load(exported("heatmap"))
    model.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, [1]))
    onnx.save(model, tmp_path / "two.onnx")
    refused(request_for(model=tmp_path / "two.onnx"), OnnxError, "found input, scale, expected one image")


def test_a_batch_that_is_open_in_name_only_is_fixed_at_one(
    request_for: Callable[..., ImportRequest], exported: Exported, tmp_path: Path
) -> None:
    """Someone renamed the batch axis of a network whose reshapes know it."""
    model = onnx.load(exported("heatmap", batch=1))
    last = model.graph.node[-1]
    name, last.output[0] = last.output[0], "before"
    shape = np.array([1, 3, 32, 24], np.int64)
    model.graph.initializer.append(numpy_helper.from_array(shape, "shape"))
    model.graph.node.append(helper.make_node("Reshape", ["before", "shape"], [name]))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "n"
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.save(model, tmp_path / "renamed.onnx")
    result = import_model(request_for(model=tmp_path / "renamed.onnx"), Watch())
    assert result.bundle.manifest.spec.inputs[0].shape[0] == 1
    assert any("leaves the batch open, but" in note for note in result.bundle.manifest.reports["import"]["notes"])
    check_poses("heatmap", result.bundle.root)


def test_a_conversion_that_changes_the_answers_is_refused(
    request_for: Callable[..., ImportRequest], exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without our correction, the converter moves what opset 9 enlarges."""
    from edgepose.importer import convert

    monkeypatch.setattr(convert, "_RESIZE", 0)
    error = refused(request_for(model=exported("heatmap", 9)), ParityError, "opset 9 → 17: output")
    assert error.exit_code == 5
