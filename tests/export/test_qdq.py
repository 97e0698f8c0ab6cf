"""Q/DQ graphs against the fake-quantised torch network, with ONNX Runtime's optimisations off."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from edgepose.compress.hooks import hooks_of
from edgepose.compress.ranges import Ranges
from edgepose.errors import OnnxError, UsageError
from edgepose.export.marks import marks_of
from edgepose.export.qdq import QuantisedDialect, dialect_for, quantised_onnx
from tests.export.networks import Exported, images

Arrays = dict[str, NDArray[np.float32]]


def run_as_written(path: Path, feeds: NDArray[np.float32]) -> Arrays:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, {"image": feeds}), strict=True))


def fake_quantised(exported: Exported, feeds: NDArray[np.float32]) -> Arrays:
    with torch.no_grad():
        outputs = exported.fake_quantised(torch.from_numpy(feeds))
    return {spec.name: value.numpy() for spec, value in zip(exported.spec.outputs, outputs, strict=True)}


@pytest.mark.parametrize("name", ["simcc", "mixed", "signed"])
def test_the_graph_computes_what_the_fake_quantised_network_does(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    exported: Exported = request.getfixturevalue(name)
    quantised_onnx(exported.float_onnx, exported.ranges, tmp_path / "q.onnx", dialect="u8s8")
    feeds = images(6, 9)
    expected, found = fake_quantised(exported, feeds), run_as_written(tmp_path / "q.onnx", feeds)
    with torch.no_grad():
        exact = exported.float_module(torch.from_numpy(feeds))
    for (output, reference), unquantised in zip(expected.items(), exact, strict=True):
        magnitude = np.abs(reference).max()
        gap = np.abs(found[output] - reference) / magnitude
        # A sum on the edge between two codes may fall either way, and then flips what follows: few, and by few codes.
        assert gap.mean() < 0.35 * np.abs(unquantised.numpy() - reference).mean() / magnitude
        assert gap.max() < 0.02


def test_each_activation_is_quantised_where_torch_quantises_it(simcc: Exported, tmp_path: Path) -> None:
    quantised_onnx(simcc.float_onnx, simcc.ranges, tmp_path / "q.onnx", dialect="u8s8")
    marks = marks_of(ir.load(simcc.float_onnx), where="test")
    model = onnx.load(tmp_path / "q.onnx")
    places = {mark.key: f"{mark.source}_dequantised" for mark in marks if mark.kind == "activation"}
    present = {value for node in model.graph.node for value in node.output}
    for value in places.values():
        assert value in present
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
    onnx.save(model, tmp_path / "all.onnx")
    seen: Arrays = {}
    handles = [
        hook.register_forward_hook(lambda _m, _i, value, key=key: seen.update({key: value.numpy()}))
        for key, hook in hooks_of(simcc.fake_quantised).items()
        if key in places
    ]
    feeds = images(4, 9)
    fake_quantised(simcc, feeds)
    for handle in handles:
        handle.remove()
    found = run_as_written(tmp_path / "all.onnx", feeds)
    for key, value in places.items():
        codes = np.abs(found[value] - seen[key]) / simcc.ranges.by_key[key].scale[0]
        assert codes.max() < 3.01, key
        assert np.mean(codes > 0.5) < 0.05, key


def test_nothing_is_left_float_but_the_last_linear_layers_output(simcc: Exported, tmp_path: Path) -> None:
    report = quantised_onnx(simcc.float_onnx, simcc.ranges, tmp_path / "q.onnx", dialect="u8s8")
    assert report.float_nodes == ()
    assert report.weights == 2 + 2 + 3 + 1 + 2
    model = onnx.load(tmp_path / "q.onnx")
    stored = {value.name: value.data_type for value in model.graph.initializer}
    assert {kind for name, kind in stored.items() if name.endswith("weight_codes")} == {onnx.TensorProto.INT8}
    assert {kind for name, kind in stored.items() if name.endswith("bias_codes")} == {onnx.TensorProto.INT32}
    assert not any(name.endswith(".weight") for name in stored), "no float copy of a weight is left"
    producers = {value: node.op_type for node in model.graph.node for value in node.output}
    for node in model.graph.node:
        if node.op_type in {"Conv", "MatMul", "Resize"}:
            assert producers[node.input[0]] == "DequantizeLinear", node.name


def test_both_sides_of_upsampling_have_the_same_codes(simcc: Exported, tmp_path: Path) -> None:
    quantised_onnx(simcc.float_onnx, simcc.ranges, tmp_path / "q.onnx", dialect="u8s8")
    model = onnx.load(tmp_path / "q.onnx")
    constants = {value.name: onnx.numpy_helper.to_array(value) for value in model.graph.initializer}
    (resize,) = [node for node in model.graph.node if node.op_type == "Resize"]
    (before,) = [node for node in model.graph.node if resize.input[0] in node.output]
    (after,) = [node for node in model.graph.node if resize.output[0] in node.input]
    assert (before.op_type, after.op_type) == ("DequantizeLinear", "QuantizeLinear")
    assert [constants[name] for name in before.input[1:]] == [constants[name] for name in after.input[1:]]


def test_dialects_are_the_same_numbers(signed: Exported, tmp_path: Path) -> None:
    feeds = images(6, 9)
    found: list[Arrays] = []
    dialects: tuple[QuantisedDialect, ...] = ("u8s8", "s8s8")
    for dialect in dialects:
        path = tmp_path / f"{dialect}.onnx"
        quantised_onnx(signed.float_onnx, signed.ranges, path, dialect=dialect)
        found.append(run_as_written(path, feeds))
        kinds = Counter(value.data_type for value in onnx.load(path).graph.initializer if "zero_point" in value.name)
        assert (onnx.TensorProto.UINT8 in kinds) == (dialect == "u8s8")
    for name in found[0]:
        gap = np.abs(found[0][name] - found[1][name])
        # Biases are float in one and 32-bit in the other: equal but for sums on the edge between two codes.
        assert np.mean(gap > 1e-5 * np.abs(found[0][name]).max()) < 0.7
        assert gap.mean() < 5e-4 * np.abs(found[0][name]).max()


def test_unsigned_ranges_are_refused_for_tensorrt(simcc: Exported, tmp_path: Path) -> None:
    assert dialect_for("tensorrt") == "s8s8"
    with pytest.raises(OnnxError, match=r"codes 0\.\.255.*symmetric=True"):
        quantised_onnx(simcc.float_onnx, simcc.ranges, tmp_path / "q.onnx", dialect="s8s8")
    assert list(tmp_path.iterdir()) == []


def test_a_protected_layer_stays_float(signed: Exported, tmp_path: Path) -> None:
    report = quantised_onnx(signed.float_onnx, signed.ranges, tmp_path / "q.onnx", dialect="u8s8")
    model = onnx.load(tmp_path / "q.onnx")
    (y,) = [node for node in model.graph.node if node.output[0] == "simcc_y"]
    assert len(report.float_nodes) == 1
    (product,) = [node for node in model.graph.node if node.name == report.float_nodes[0]]
    assert product.output[0] in y.input


def test_seven_bit_weights_stay_within_63_and_near_the_eight_bit_network(simcc: Exported, tmp_path: Path) -> None:
    quantised_onnx(simcc.float_onnx, simcc.ranges, tmp_path / "8.onnx", dialect="u8s8")
    report = quantised_onnx(simcc.float_onnx, simcc.ranges, tmp_path / "7.onnx", dialect="u8s8", weight_bits=7)
    assert report.weight_bits == 7
    peaks = [
        int(np.abs(onnx.numpy_helper.to_array(value).astype(int)).max())
        for value in onnx.load(tmp_path / "7.onnx").graph.initializer
        if value.name.endswith("weight_codes")
    ]
    assert max(peaks) == 63
    feeds = images(4, 9)
    eight, seven = run_as_written(tmp_path / "8.onnx", feeds), run_as_written(tmp_path / "7.onnx", feeds)
    for name, reference in eight.items():
        assert 0 < np.abs(seven[name] - reference).max() < 0.05 * np.abs(reference).max()
    with pytest.raises(UsageError, match="7 with dialect s8s8"):
        quantised_onnx(simcc.float_onnx, simcc.ranges, tmp_path / "x.onnx", dialect="s8s8", weight_bits=7)


def test_a_channel_without_weights_keeps_its_bias(simcc: Exported, tmp_path: Path) -> None:
    """Pruning and training leave such channels; their tiny scale would overflow the 32-bit bias."""
    dead = 1
    key = "pre_hooks.stem/0/0/conv2d/0__1"
    entry = simcc.ranges.by_key[key]
    shrunk = msgspec.structs.replace(
        entry, scale=tuple(1e-16 if channel == dead else scale for channel, scale in enumerate(entry.scale))
    )
    ranges = Ranges(tuple(shrunk if one.key == key else one for one in simcc.ranges.ranges))
    model = onnx.load(simcc.float_onnx)
    arrays = {value.name: value for value in model.graph.initializer}
    weight = onnx.numpy_helper.to_array(arrays["stem.0.0.weight"]).copy()
    weight[dead] = 0
    arrays["stem.0.0.weight"].CopyFrom(onnx.numpy_helper.from_array(weight, "stem.0.0.weight"))
    onnx.save(model, tmp_path / "float.onnx")
    report = quantised_onnx(tmp_path / "float.onnx", ranges, tmp_path / "q.onnx", dialect="u8s8")
    assert report.widened == 1
    stored = {v.name: onnx.numpy_helper.to_array(v) for v in onnx.load(tmp_path / "q.onnx").graph.initializer}
    bias = onnx.numpy_helper.to_array(arrays["stem.0.0.bias"])
    (name,) = [name for name in stored if name.endswith("node_conv2d_bias_codes")]
    step = stored[name.replace("codes", "scale")].astype(np.float64)
    assert np.all(np.abs(stored[name] * step - bias) <= 0.51 * step + 1e-9)
    assert abs(bias[dead]) > 0.01


def test_a_file_without_marks_is_refused(simcc: Exported, tmp_path: Path) -> None:
    model = onnx.load(simcc.float_onnx)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "plain.onnx")
    with pytest.raises(OnnxError, match=r"without marks.*ranges=ranges"):
        quantised_onnx(tmp_path / "plain.onnx", simcc.ranges, tmp_path / "q.onnx", dialect="u8s8")


def test_a_truncated_file_is_refused(simcc: Exported, tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(simcc.float_onnx.read_bytes()[:-1000])
    with pytest.raises(OnnxError, match=r"cut\.onnx"):
        quantised_onnx(tmp_path / "cut.onnx", simcc.ranges, tmp_path / "q.onnx", dialect="u8s8")
    with pytest.raises(OnnxError, match=r"absent\.onnx"):
        quantised_onnx(tmp_path / "absent.onnx", simcc.ranges, tmp_path / "q.onnx", dialect="u8s8")
