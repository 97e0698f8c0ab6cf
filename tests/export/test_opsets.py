"""Operator sets 13 to 21: read back from the file, the same answers in both runtimes, float and quantised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from edgepose.errors import OnnxError
from edgepose.export.notes import modules_of
from edgepose.export.onnx import onnx_from_torch
from edgepose.export.onnx_legacy import export_legacy
from edgepose.export.qdq import quantised_onnx
from edgepose.profiles import load_target, profile_names
from edgepose.runtime import open_session
from edgepose.spec import Backend
from tests.export.networks import SIDE, Exported, images, network, spec_of

BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")
BATCHES = sorted(
    {
        min(batch, target.max_batch)
        for target in map(load_target, profile_names("targets"))
        for profile in target.tensorrt.profiles
        for batch in profile
    }
)
"""Smallest, best and largest batch of every profile of the shipped targets."""

pytestmark = pytest.mark.usefixtures("one_thread")


def opset_of(path: Path) -> list[tuple[str, int]]:
    return [(entry.domain, entry.version) for entry in onnx.load(path).opset_import]


def outputs(path: Path, backend: Backend, fed: np.ndarray) -> dict[str, np.ndarray]:
    session = open_session(path, backend, threads=1, precision="fp32")
    try:
        return session.infer({"image": fed})
    finally:
        session.close()


@pytest.fixture(scope="module")
def reference(simcc: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network of `simcc`, quantised, as it was exported at first."""
    path = tmp_path_factory.mktemp("reference") / "int8.onnx"
    quantised_onnx(simcc.float_onnx, simcc.ranges, path, dialect="u8s8")
    return path


@pytest.fixture(scope="module", params=range(13, 22))
def written(request: pytest.FixtureRequest, simcc: Exported, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The network of `simcc`, float and quantised, in an operator set."""
    folder = tmp_path_factory.mktemp(f"opset{request.param}")
    onnx_from_torch(simcc.float_module, simcc.spec, folder / "float.onnx", opset=request.param, ranges=simcc.ranges)
    quantised_onnx(folder / "float.onnx", simcc.ranges, folder / "int8.onnx", dialect="u8s8")
    return request.param, folder


def test_every_operator_set_is_what_was_asked_for_and_says_the_same(
    written: Any, simcc: Exported, reference: Path
) -> None:
    opset, folder = written
    assert opset_of(folder / "float.onnx") == opset_of(folder / "int8.onnx") == [("", opset)]
    fed = images(8, 3)
    for name, source, allowed in (("float.onnx", simcc.float_onnx, 1e-5), ("int8.onnx", reference, 0.01)):
        expected = outputs(source, "onnxruntime", fed)
        for backend in BACKENDS:
            found = outputs(folder / name, backend, fed)
            for output, value in expected.items():
                assert np.abs(found[output] - value).mean() / np.abs(value).max() <= allowed


def test_modules_are_known_in_every_operator_set(written: Any, simcc: Exported) -> None:
    _, folder = written
    known = set(modules_of(ir.load(simcc.float_onnx).metadata_props).values())
    assert set(modules_of(ir.load(folder / "float.onnx").metadata_props).values()) == known


def test_quantised_parts_are_the_same_in_every_operator_set(written: Any, reference: Path) -> None:
    def codes(path: Path) -> list[tuple[int, ...]]:
        held = onnx.load(path).graph.initializer
        return sorted(tuple(value.dims) for value in held if value.data_type == onnx.TensorProto.INT8 and value.dims)

    assert codes(written[1] / "int8.onnx") == codes(reference)


@pytest.mark.parametrize("backend", BACKENDS)
def test_smallest_best_and_largest_batch_run_and_agree(backend: Backend, reference: Path) -> None:
    fed = images(max(BATCHES), 4)
    session = open_session(reference, backend, threads=1)
    single = [session.infer({"image": one[None]}) for one in fed[:8]]
    for count in BATCHES:
        found = session.infer({"image": fed[:count]})
        for name, value in found.items():
            assert len(value) == count
            expected = np.concatenate([one[name] for one in single])[:count]
            np.testing.assert_allclose(value[:8], expected, atol=1e-3 * np.abs(expected).max())
    session.close()


def test_network_that_neither_exporter_can_say_is_an_error(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            values: Tensor = torch.linalg.svd(image)[1]
            return values

    with pytest.raises(OnnxError, match="by TorchScript"):
        export_legacy(Odd().eval(), spec_of("heatmap"), 13, torch.zeros(2, 3, SIDE, SIDE))


def test_modules_behind_the_same_name_are_told_apart() -> None:
    net = network(("residual", "residual"))
    _, modules = export_legacy(net, spec_of(), 15, torch.zeros(2, 3, SIDE, SIDE))
    assert {"blocks.0.a.0", "blocks.1.a.0", "stem.0.0", "stem.2.0", "maps", "x", "y"} <= set(modules.values())
    assert all(dict(net.named_modules())[name] is not None for name in modules.values())
