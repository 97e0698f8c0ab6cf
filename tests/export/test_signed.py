"""Networks quantised for CPUs, respelt for TensorRT: on what the project itself writes, and pattern by pattern."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from edgepose.errors import OnnxError
from edgepose.export.qdq import quantised_onnx
from edgepose.export.signed import signed_onnx
from edgepose.export.trt_lint import check_for_tensorrt
from edgepose.export.weight_bits import quantisation_of
from tests.export.networks import Exported
from tests.export.qdq_graphs import Net

IMAGES = np.random.default_rng(2).normal(size=(3, 4, 8, 8)).astype(np.float32)


def answers(path: Path, images: np.ndarray = IMAGES) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # what the file says
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, {session.get_inputs()[0].name: images})
    return found


def pair(net: Net, value: str, name: str, zero: int = 128, scale: float = 0.05) -> str:
    return net.pair(value, name, zero=np.asarray(zero, np.uint8), scale=np.float32(scale))


def kinds(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def test_symmetric_networks_of_the_project_lose_nothing(signed: Exported, tmp_path: Path) -> None:
    """Written for CPUs and respelt is what is written for TensorRT."""
    cpu, gpu, respelt = (tmp_path / f"{name}.onnx" for name in ("cpu", "gpu", "respelt"))
    quantised_onnx(signed.float_onnx, signed.ranges, cpu, dialect="u8s8")
    quantised_onnx(signed.float_onnx, signed.ranges, gpu, dialect="s8s8")
    report = signed_onnx(cpu, respelt)
    assert (report.widened, report.activations > 5, report.biases > 3) == (0, True, True)
    assert quantisation_of(respelt).dialect == "s8s8"
    assert all(finding.severity == "warning" for finding in check_for_tensorrt(respelt))
    images = np.random.default_rng(3).normal(size=(2, 3, *signed.spec.preprocess.input_hw)).astype(np.float32)
    for found, expected in zip(answers(respelt, images), answers(gpu, images), strict=True):
        assert np.abs(found - expected).mean() <= 1e-3 * np.abs(expected).max()


def test_asymmetric_networks_of_the_project_get_coarser_steps(simcc: Exported, tmp_path: Path) -> None:
    cpu, respelt = tmp_path / "cpu.onnx", tmp_path / "respelt.onnx"
    quantised_onnx(simcc.float_onnx, simcc.ranges, cpu, dialect="u8s8")
    report = signed_onnx(cpu, respelt)
    assert 0 < report.widened <= report.activations
    check_for_tensorrt(respelt)
    images = np.random.default_rng(3).normal(size=(2, 3, *simcc.spec.preprocess.input_hw)).astype(np.float32)
    for found, expected in zip(answers(respelt, images), answers(cpu, images), strict=True):
        assert np.abs(found - expected).mean() <= 0.05 * np.abs(expected).max()


def test_zero_point_128_keeps_its_numbers(tmp_path: Path) -> None:
    net = Net()
    path = net.save(tmp_path / "net.onnx", net.conv(pair(net, "images", "image"), "conv"))
    assert signed_onnx(path, tmp_path / "out.onnx").widened == 0
    assert np.array_equal(answers(path)[0], answers(tmp_path / "out.onnx")[0])


@pytest.mark.parametrize(("zero", "factor"), [(0, 255 / 127), (255, 255 / 127), (100, 155 / 127)])
def test_other_zero_points_get_the_narrowest_symmetric_range(tmp_path: Path, zero: int, factor: float) -> None:
    net = Net()
    path = net.save(tmp_path / "net.onnx", pair(net, "images", "image", zero, 0.02))
    assert signed_onnx(path, tmp_path / "out.onnx").widened == 1
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    scale = next(value for name, value in held.items() if name.endswith("scale"))
    assert scale == pytest.approx(0.02 * factor)
    inside = np.clip(IMAGES, (0 - zero) * 0.02, (255 - zero) * 0.02)
    found = np.clip(answers(tmp_path / "out.onnx")[0], (0 - zero) * 0.02, (255 - zero) * 0.02)
    assert np.abs(found - inside).max() <= scale / 2 + 1e-6


@pytest.mark.parametrize(("low", "high", "kind"), [(128, 255, "Relu"), (100, 200, "Clip"), (0, 130, "Clip")])
def test_rectifiers_on_codes_stand_before_them_again(tmp_path: Path, low: int, high: int, kind: str) -> None:
    net = Net()
    numbers = [net.constant("s", np.float32(0.02)), net.constant("z", np.asarray(128, np.uint8))]
    codes = net.node("QuantizeLinear", ["images", *numbers], "image_q")
    bounds = [net.constant(name, np.asarray(code, np.uint8)) for name, code in (("low", low), ("high", high))]
    clipped = net.node("Clip", [codes, *bounds], "clip")
    path = net.save(tmp_path / "net.onnx", net.node("DequantizeLinear", [clipped, *numbers], "image_dq"))
    signed_onnx(path, tmp_path / "out.onnx")
    assert kinds(tmp_path / "out.onnx") == [kind, "QuantizeLinear", "DequantizeLinear"]
    assert np.array_equal(answers(path)[0], answers(tmp_path / "out.onnx")[0])


def test_padding_of_codes_is_the_pools_again(tmp_path: Path) -> None:
    net = Net()
    numbers = [net.constant("s", np.float32(0.02)), net.constant("z", np.asarray(128, np.uint8))]
    codes = net.node("QuantizeLinear", ["images", *numbers], "image_q")
    pads = net.constant("pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    padded = net.node("Pad", [codes, pads, "z"], "pad")
    floats = net.node("DequantizeLinear", [padded, *numbers], "image_dq")
    output = net.node("AveragePool", [floats], "pool", kernel_shape=[3, 3], pads=[0, 0, 0, 0], count_include_pad=1)
    path = net.save(tmp_path / "net.onnx", output)
    signed_onnx(path, tmp_path / "out.onnx")
    assert "Pad" not in kinds(tmp_path / "out.onnx")
    assert np.allclose(answers(path)[0], answers(tmp_path / "out.onnx")[0], atol=1e-6)


def test_scales_for_each_channel_that_are_all_equal_are_one(tmp_path: Path) -> None:
    """How the project keeps ONNX Runtime from quantising a protected layer."""
    net = Net()
    quantise = [net.constant("s", np.float32(0.02)), net.constant("z", np.asarray(128, np.uint8))]
    codes = net.node("QuantizeLinear", ["images", *quantise], "image_q")
    vectors = [net.constant("sv", np.full(4, 0.02, np.float32)), net.constant("zv", np.full(4, 128, np.uint8))]
    path = net.save(tmp_path / "net.onnx", net.node("DequantizeLinear", [codes, *vectors], "image_dq", axis=1))
    signed_onnx(path, tmp_path / "out.onnx")
    assert check_for_tensorrt(tmp_path / "out.onnx")[0].rule == "placement"  # it is the output here, and nothing else
    assert np.array_equal(answers(path)[0], answers(tmp_path / "out.onnx")[0])


def test_integer_biases_are_floats_again(tmp_path: Path) -> None:
    net = Net()
    bias = [
        net.constant("b_codes", np.array([100, -200, 300, 0], np.int32)),
        net.constant("b_s", np.full(4, 0.0005, np.float32)),
        net.constant("b_z", np.zeros(4, np.int32)),
    ]
    floats = net.node("DequantizeLinear", bias, "b_dq", axis=0)
    inputs = [pair(net, "images", "image"), net.weight((4, 4, 3, 3), "w"), floats]
    path = net.save(tmp_path / "net.onnx", net.node("Conv", inputs, "conv"))
    assert signed_onnx(path, tmp_path / "out.onnx").biases == 1
    assert check_for_tensorrt(tmp_path / "out.onnx") == ()
    assert np.allclose(answers(path)[0], answers(tmp_path / "out.onnx")[0], atol=1e-5)


def test_other_operators_on_codes_are_refused(tmp_path: Path) -> None:
    net = Net()
    numbers = [net.constant("s", np.float32(0.02)), net.constant("z", np.asarray(128, np.uint8))]
    codes = net.node("QuantizeLinear", ["images", *numbers], "image_q")
    pool = net.node("MaxPool", [codes], "pool", kernel_shape=[2, 2])
    path = net.save(tmp_path / "net.onnx", net.node("DequantizeLinear", [pool, *numbers], "image_dq"))
    with pytest.raises(OnnxError, match=r"pool: found MaxPool on codes.*symmetric"):
        signed_onnx(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("content", [None, b"no network"])
def test_files_that_are_no_network(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "net.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OnnxError, match=r"net\.onnx"):
        signed_onnx(path, tmp_path / "out.onnx")
