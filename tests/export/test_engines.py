"""What ONNX Runtime and OpenVINO make of the Q/DQ graphs, with all their optimisations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from edgepose.errors import OnnxError, ParityError
from edgepose.export.engine import int8_share
from edgepose.export.int8_reasons import achieved, read_asked
from edgepose.export.int8_share import require
from edgepose.export.openvino import openvino_from_onnx
from edgepose.export.ort import ort_from_onnx
from edgepose.export.parity import Tolerance, check_step
from edgepose.export.qdq import quantised_onnx
from edgepose.runtime import open_session
from edgepose.spec import Backend
from tests.export.networks import Exported, images
from tests.export.test_qdq import fake_quantised

BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")


def quantised(exported: Exported, folder: Path) -> Path:
    quantised_onnx(exported.float_onnx, exported.ranges, folder / "q.onnx", dialect="u8s8")
    return folder / "q.onnx"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["simcc", "mixed", "signed"])
def test_optimised_engines_stay_within_a_few_codes(
    name: str, backend: Backend, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    exported: Exported = request.getfixturevalue(name)
    feeds = images(6, 9)
    session = open_session(quantised(exported, tmp_path), backend, threads=1, precision="int8")
    found = session.infer({"image": feeds})
    for output, reference in fake_quantised(exported, feeds).items():
        gap = np.abs(found[output] - reference) / np.abs(reference).max()
        assert gap.max() < 4 / 127
        assert gap.mean() < 1 / 127


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_multiplications_of_a_quantised_network_are_integer(
    simcc: Exported, backend: Backend, tmp_path: Path
) -> None:
    assert backend in ("onnxruntime", "openvino")
    share = int8_share(quantised(simcc, tmp_path), backend)
    assert share.share == 1.0
    assert share.float_kernels == ()
    assert len(share.kernels) == 2 + 2 + 3 + 1 + 2
    require(achieved(share, read_asked(quantised(simcc, tmp_path))), 1.0, "engine")


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_multiplication_of_a_float_network_is_integer(simcc: Exported, backend: Backend) -> None:
    assert backend in ("onnxruntime", "openvino")
    share = int8_share(simcc.float_onnx, backend)
    assert share.share == 0.0
    with pytest.raises(ParityError, match=r"engine: min_int8_macs: found 0\.0%.*stem\.2\.0 \(.*at least 90\.0%"):
        require(achieved(share, read_asked(simcc.float_onnx)), 0.9, "engine")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_protected_layer_is_the_only_float_kernel(signed: Exported, backend: Backend, tmp_path: Path) -> None:
    assert backend in ("onnxruntime", "openvino")
    share = int8_share(quantised(signed, tmp_path), backend)
    assert len(share.float_kernels) == 1
    assert share.float_kernels[0].macs == 3 * 64 * 64
    found = achieved(share, read_asked(quantised(signed, tmp_path)))
    assert [(layer.layer, layer.protected) for layer in found.float_layers] == [("y", True)]
    assert found.asked_share == 1.0


def test_both_backends_count_the_same_multiplications(simcc: Exported, tmp_path: Path) -> None:
    path = quantised(simcc, tmp_path)
    assert int8_share(path, "onnxruntime").macs == int8_share(path, "openvino").macs


def test_the_ir_computes_what_the_onnx_file_does_and_stays_small(simcc: Exported, tmp_path: Path) -> None:
    path = quantised(simcc, tmp_path)
    xml, weights = openvino_from_onnx(path, tmp_path / "engine")
    assert sorted(entry.name for entry in (tmp_path / "engine").iterdir()) == ["model.bin", "model.xml"]
    assert str(tmp_path) not in xml.read_text()
    float_weights = openvino_from_onnx(simcc.float_onnx, tmp_path / "float")[1]
    assert weights.stat().st_size < 0.4 * float_weights.stat().st_size
    ir, direct = open_session(xml, "openvino", threads=1), open_session(path, "openvino", threads=1)
    assert check_step("ONNX → IR", direct, ir, {"image": images(2, 9)}, Tolerance()).passed
    assert int8_share(xml, "openvino").share == 1.0


def test_float_weights_are_not_compressed_to_16_bits(simcc: Exported, tmp_path: Path) -> None:
    xml, _ = openvino_from_onnx(simcc.float_onnx, tmp_path)
    reference = open_session(simcc.float_onnx, "onnxruntime", threads=1)
    check_step("ONNX → IR", reference, open_session(xml, "openvino", threads=1), {"image": images(2, 9)},
               Tolerance(relative=1e-5))  # fmt: skip


def test_the_onnx_runtime_engine_is_the_file_itself(simcc: Exported, tmp_path: Path) -> None:
    path = quantised(simcc, tmp_path)
    assert ort_from_onnx(path, tmp_path / "engine" / "model.onnx").read_bytes() == path.read_bytes()


def test_what_a_backend_cannot_read_becomes_no_engine(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    node = onnx.helper.make_node("NoSuchOperator", ["x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "xy"]
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", value[:1], value[1:])), broken)
    with pytest.raises(OnnxError, match=r"broken\.onnx"):
        ort_from_onnx(broken, tmp_path / "engine.onnx")
    with pytest.raises(OnnxError, match=r"absent\.onnx.*no such file"):
        openvino_from_onnx(tmp_path / "absent.onnx", tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["broken.onnx"]
