"""Why an engine's kernels are not integer, by what it was asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgepose.compress.quantise import QuantiseConfig
from edgepose.errors import OnnxError
from edgepose.export.engine import int8_share
from edgepose.export.int8_reasons import achieved, origin, read_asked
from edgepose.export.int8_share import Int8Share, Kernel
from edgepose.export.notes import modules_of
from edgepose.export.ort import kernel_times_ms
from edgepose.export.qdq import quantised_onnx
from edgepose.runtime import open_session
from edgepose.spec import Backend
from tests.export.networks import Exported, export, images
from tests.export.test_qdq import fake_quantised, run_as_written

BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")
PROTECTED = "blocks.0.a"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A protected convolution between quantised ones, and a gate that NNCF leaves float."""
    config = QuantiseConfig(protected=(PROTECTED,))
    return export(tmp_path_factory.mktemp("protected"), ("residual", "gate"), "simcc", config)


@pytest.fixture(scope="module")
def quantised(exported: Exported) -> Path:
    path = exported.float_onnx.with_name("q.onnx")
    quantised_onnx(exported.float_onnx, exported.ranges, path, dialect="u8s8")
    return path


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_float_kernel_has_its_module_and_its_reason(quantised: Path, backend: Backend) -> None:
    assert backend in ("onnxruntime", "openvino")
    share = int8_share(quantised, backend)
    found = achieved(share, read_asked(quantised))
    reasons = {layer.layer: (layer.reason, layer.protected) for layer in found.float_layers}
    unquantised = ("its input or weight has no quantiser", False)
    assert reasons == {
        "blocks.0.a.0": ("protected", True),
        "blocks.1.squeeze": unquantised,
        "blocks.1.excite": unquantised,
    }
    macs = {layer.layer: layer.macs for layer in found.float_layers}
    assert next(iter(macs)) == "blocks.0.a.0"  # the largest first
    assert macs["blocks.0.a.0"] == 16 * 16 * 9 * 8 * 8
    assert found.share == pytest.approx(1 - sum(macs.values()) / share.macs)
    gate = macs["blocks.1.squeeze"] + macs["blocks.1.excite"]
    assert found.asked_share == pytest.approx(1 - gate / (share.macs - macs["blocks.0.a.0"]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_protected_convolution_between_codes_is_executed_with_its_float_weights(
    exported: Exported, quantised: Path, backend: Backend
) -> None:
    """ONNX Runtime quantises float weights by itself, per tensor, wherever it finds them between codes."""
    feeds = images(4, 9)
    session = open_session(quantised, backend, threads=1, precision="int8")
    found = session.infer({"image": feeds})
    session.close()
    for name, expected in fake_quantised(exported, feeds).items():
        assert np.abs(found[name] - expected).mean() < 1 / 127 * np.abs(expected).max()
    as_written = run_as_written(quantised, feeds)
    assert all(np.isfinite(value).all() for value in as_written.values())


def test_a_quantised_layer_that_the_runtime_executes_in_float_is_its_fault(quantised: Path) -> None:
    kernels = (Kernel("node_conv2d_token_7", "FusedConv", integer=False, macs=10),)
    found = achieved(Int8Share("onnxruntime", kernels), read_asked(quantised))
    (layer,) = found.float_layers
    assert (layer.layer, layer.protected) == ("stem.0.0", False)
    assert layer.reason == "quantised, but onnxruntime runs it as FusedConv"


def test_a_kernel_of_unknown_origin_keeps_the_runtimes_name(quantised: Path) -> None:
    kernels = (Kernel("something else", "Gemm", integer=False, macs=10),)
    (layer,) = achieved(Int8Share("openvino", kernels), read_asked(quantised)).float_layers
    assert layer.layer == "something else"


def test_a_network_without_multiplications_outside_protected_parts_asks_for_nothing(quantised: Path) -> None:
    node = next(name for name, module in read_asked(quantised).modules.items() if module == "blocks.0.a.0")
    kernels = (Kernel(node, "Conv", integer=False, macs=10),)
    found = achieved(Int8Share("onnxruntime", kernels), read_asked(quantised))
    assert (found.share, found.asked_share) == (0.0, 1.0)


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(b"\x08")
    for name in ("cut.onnx", "absent.onnx"):
        with pytest.raises(OnnxError, match=name):
            read_asked(tmp_path / name)


def test_notes_that_edgepose_did_not_write_are_refused(quantised: Path, tmp_path: Path) -> None:
    model = onnx.load(quantised)
    for entry in model.metadata_props:
        if entry.key == "edgepose.float":
            entry.value = '{"a": 1}'
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(OnnxError, match=r"metadata edgepose\.float"):
        read_asked(tmp_path / "other.onnx")


def test_the_exported_files_say_which_module_a_node_came_from(exported: Exported, quantised: Path) -> None:
    before, after = (modules_of(ir.load(path).metadata_props) for path in (exported.float_onnx, quantised))
    assert before == after
    assert set(before.values()) == {
        "stem.0.0", "stem.2.0", "blocks.0.a.0", "blocks.0.b.0", "blocks.1.squeeze", "blocks.1.excite", "maps", "x", "y",
    }  # fmt: skip


def summed() -> tuple[ir.Node, ...]:
    """Conv → Add → Relu beside another branch, as ONNX Runtime fuses it."""
    weight = numpy_helper.from_array(np.zeros((2, 2, 1, 1), np.float32), "w")
    graph = helper.make_graph(
        [
            helper.make_node("Relu", ["x"], ["rectified"], name="first"),
            helper.make_node("Conv", ["rectified", "w"], ["made"], name="conv"),
            helper.make_node("Add", ["rectified", "made"], ["sum"], name="add"),
            helper.make_node("Relu", ["sum"], ["out"], name="last"),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2, 4, 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 2, 4, 4])],
        [weight],
    )
    return tuple(ir.serde.deserialize_model(helper.make_model(graph)).graph)


@pytest.mark.parametrize(
    ("kernel", "node"),
    [
        ("conv", "conv"),
        ("conv_token_12", "conv"),
        ("conv/WithoutBiases", "conv"),
        ("out_nchwc", "conv"),
        ("last", "conv"),
        ("made", "conv"),
        ("rectified", ""),
        ("first_token_1", ""),
        ("no such thing", ""),
    ],
)
def test_kernels_are_traced_to_the_product_that_they_execute(kernel: str, node: str) -> None:
    assert origin(kernel, summed()) == node


def test_every_layer_is_timed_in_float_and_in_integers(exported: Exported, quantised: Path) -> None:
    float_ms, int8_ms = kernel_times_ms(exported.float_onnx, runs=3), kernel_times_ms(quantised, runs=3)
    nodes = set(modules_of(ir.load(exported.float_onnx).metadata_props))
    assert set(float_ms) == set(int8_ms) == nodes
    assert all(0 <= value < 1000 for value in (*float_ms.values(), *int8_ms.values()))
