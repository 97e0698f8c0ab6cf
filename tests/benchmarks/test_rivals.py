"""Other tools' networks: made from the file and images they are given, kept, and their refusals told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from benchmarks import rivals
from benchmarks.rivals import RIVALS, Rival, _Reader, made
from tests.tiny_checkpoint import Compiled

STATIC = next(rival for rival in RIVALS if rival.label == "quantize_static, defaults")
BEST = next(rival for rival in RIVALS if "entropy" in rival.name)


@pytest.fixture
def network(compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A float network; what is made of it goes to a cache of its own."""
    bundle = compiled("fp32").bundle
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    return bundle.root / bundle.manifest.model


def some_images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 3, 64, 64)).astype(np.float32)


@pytest.mark.parametrize("rival", [STATIC, BEST], ids=lambda rival: str(rival.label))
def test_quantize_static_writes_integers_that_both_runtimes_read(rival: Rival, network: Path) -> None:
    found = made(rival, network, some_images(6, 9))
    assert set(found.files) == {"onnxruntime", "openvino"}
    assert not found.refused
    graph = onnx.load(found.files["onnxruntime"]).graph
    assert {"QuantizeLinear", "DequantizeLinear"} <= {node.op_type for node in graph.node}
    assert not [path for path in found.files["openvino"].parent.iterdir() if path.name == "preprocessed.onnx"]
    zero_points = {
        tensor.data_type for tensor in graph.initializer if tensor.name.endswith("zero_point") and not tensor.dims
    }
    assert (onnx.TensorProto.UINT8 in zero_points) == (rival is BEST)


def test_what_was_made_is_found_and_other_images_make_another(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = made(STATIC, network, some_images(4, 1))
    other = made(STATIC, network, some_images(4, 2))
    assert first.files["openvino"] != other.files["openvino"]
    monkeypatch.setattr(rivals, "_attempt", None)  # nothing is made again
    assert made(STATIC, network, some_images(4, 1)).files == first.files


def test_a_tool_that_fails_is_a_row_with_its_reason(network: Path) -> None:
    broken = Rival("quantize_static", "nonsense", "onnx", {"no_such_setting": 1})
    found = made(broken, network, some_images(2, 1))
    assert found.files == {}
    assert set(found.refused) == {"onnxruntime", "openvino"}
    assert "no_such_setting" in found.refused["openvino"]


def test_a_file_that_a_runtime_refuses_takes_no_part_there(network: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def writes_nonsense(_source: Path, _images: object, _settings: object, out: Path) -> None:
        out.write_bytes(b"no network")

    monkeypatch.setattr(rivals, "_maker", lambda _: writes_nonsense)
    found = made(STATIC, network, some_images(2, 1))
    assert found.files == {}
    assert "onnxruntime" in found.refused


def test_a_reader_hands_out_every_image_once_and_ranges_of_them(network: Path) -> None:
    images = some_images(5, 3)
    reader = _Reader(network, images)
    fed = []
    while (feed := reader.get_next()) is not None:
        fed.append(feed["image"])
    np.testing.assert_array_equal(np.concatenate(fed), images)
    assert len(reader) == 5
    reader.set_range(2, 4)
    first = reader.get_next()
    assert first is not None
    np.testing.assert_array_equal(first["image"], images[2:3])
    assert reader.get_next() is not None
    assert reader.get_next() is None


def test_labels_are_unique() -> None:
    assert len({rival.label for rival in RIVALS}) == len(RIVALS)
