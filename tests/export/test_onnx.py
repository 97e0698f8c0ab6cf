from __future__ import annotations

from pathlib import Path

import msgspec
import onnx
import pytest
import torch
from torch import Tensor, nn

from edgepose.compress.ranges import Range, Ranges
from edgepose.errors import OnnxError, ParityError
from edgepose.export.onnx import onnx_from_torch
from edgepose.spec import TensorSpec
from tests.export.networks import SIDE, Exported, network, spec_of


class Maps(nn.Module):
    """One convolution that gives what `spec_of("heatmap")` says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 4, 4)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.conv(images)
        return maps


class Clipped(Maps):
    """Clipping between constants is what the exporter cannot say in old opsets; it keeps silent about that."""

    def forward(self, images: Tensor) -> Tensor:
        return nn.functional.relu6(super().forward(images))


def test_the_graph_has_the_names_opset_and_free_batch_it_was_asked_for(simcc: Exported) -> None:
    model = onnx.load(simcc.float_onnx)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    shape = [size.dim_param or size.dim_value for size in model.graph.input[0].type.tensor_type.shape.dim]
    assert (model.graph.input[0].name, shape) == ("image", ["batch", 3, SIDE, SIDE])
    assert [value.name for value in model.graph.output] == ["simcc_x", "simcc_y"]


def test_neither_normalisation_nor_marks_nor_paths_of_the_builder_are_left(mixed: Exported) -> None:
    operators = {(node.domain, node.op_type) for node in onnx.load(mixed.float_onnx).graph.node}
    assert not any(domain or name == "BatchNormalization" for domain, name in operators)
    assert b"/networks.py" not in mixed.float_onnx.read_bytes()


def test_marking_does_not_change_the_graph(simcc: Exported, tmp_path: Path) -> None:
    onnx_from_torch(simcc.float_module, simcc.spec, tmp_path / "plain.onnx")
    with_marks, plain = onnx.load(simcc.float_onnx), onnx.load(tmp_path / "plain.onnx")
    folded = [node.op_type for node in with_marks.graph.node if node.op_type != "Transpose"]
    assert folded == [node.op_type for node in plain.graph.node if node.op_type != "Transpose"]


def test_parity_is_reported_for_two_batch_sizes(mixed: Exported) -> None:
    assert mixed.report.passed
    assert [output.name for output in mixed.report.outputs] == ["heatmap (batch 1)", "heatmap (batch 3)"]


def test_an_opset_that_todays_exporter_keeps_silent_about_comes_from_the_old_one(tmp_path: Path) -> None:
    onnx_from_torch(Clipped().eval(), spec_of("heatmap"), tmp_path / "m.onnx", opset=14)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 14


def test_an_opset_without_what_quantisation_needs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match="opset: found 11, expected 13 or newer"):
        onnx_from_torch(Clipped().eval(), spec_of("heatmap"), tmp_path / "m.onnx", opset=11)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_does_not_fit_its_spec_leaves_no_file(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(spec_of("heatmap"), outputs=(TensorSpec("heatmap", ("batch", 17, 8, 8)),))
    with pytest.raises(OnnxError, match=r"outputs: found heatmap float32\['batch', 3, 8, 8\]"):
        onnx_from_torch(Maps().eval(), spec, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


class Noisy(Maps):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + 0.1 * torch.rand(1)


def test_a_graph_that_computes_something_else_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ParityError, match=r"torch → ONNX: heatmap"):
        onnx_from_torch(Noisy().eval(), spec_of("heatmap"), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_ranges_of_another_network_are_refused(tmp_path: Path) -> None:
    ranges = Ranges((Range("post_hooks.blocks/9/relu/0__0", "activation", (0.1,), (0,), 0, 255),))
    with pytest.raises(OnnxError, match=r"1 quantisers whose place does not exist, the first post_hooks\.blocks/9"):
        onnx_from_torch(network(()), spec_of(), tmp_path / "m.onnx", ranges=ranges)
