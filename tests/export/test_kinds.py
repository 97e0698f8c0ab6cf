"""Every kind of backbone, from a network that left training to the engines."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from edgepose.blocks.backbones import RepBlock
from edgepose.blocks.config import KPEConfig, spec_of
from edgepose.blocks.kpe import build
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.macs import count_macs
from edgepose.compress.prune import reestimate_batch_norm
from edgepose.compress.quantise import QuantiseConfig, convert, prepare
from edgepose.export.engine import int8_share
from edgepose.export.onnx import onnx_from_torch
from edgepose.export.qdq import QdqReport, quantised_onnx
from edgepose.runtime import open_session
from edgepose.spec import Backend, ModelSpec
from tests.export.networks import KEYPOINTS, SIDE, images

KINDS = ("residual", "inverted", "reparameterised")
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Compressed:
    spec: ModelSpec
    network: nn.Module
    fake_quantised: nn.Module
    float_onnx: Path
    quantised: Path
    report: QdqReport


def lively(network: nn.Module) -> nn.Module:
    """As after training: biases that are not zero (OpenVINO drops those), and statistics that go with all weights."""
    generator = torch.Generator().manual_seed(0)
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d) and part.affine:
            part.weight.data.mul_(torch.empty_like(part.weight).uniform_(0.5, 1.5, generator=generator))
        bias = getattr(part, "bias", None)
        if isinstance(bias, nn.Parameter):
            bias.data.normal_(0, 0.2, generator=generator)
    reestimate_batch_norm(network, [torch.from_numpy(images(8, seed)) for seed in range(4)])
    return network.eval()


@pytest.fixture(scope="module", params=KINDS)
def compressed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compressed:
    """A network of each kind, quantised after training."""
    folder = tmp_path_factory.mktemp(request.param)
    config = KPEConfig("tiny", (SIDE, SIDE), 8, (8, 8, 8, 8), (2, 1, 2, 1), 8, backbone=request.param)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # networks this small lose time to threads that wait for each other
    network, spec = lively(build(config, KEYPOINTS)), spec_of(config, KEYPOINTS)
    fake_quantised = prepare(fold_batch_norms(network), [images(8, 1), images(8, 2)], QuantiseConfig())
    plain, ranges = convert(fake_quantised)
    onnx_from_torch(plain, spec, folder / "float.onnx", ranges=ranges)
    report = quantised_onnx(folder / "float.onnx", ranges, folder / "q.onnx", dialect="u8s8")
    torch.set_num_threads(threads)
    return Compressed(spec, network, fake_quantised, folder / "float.onnx", folder / "q.onnx", report)


def answers(network: nn.Module, feeds: NDArray[np.float32]) -> tuple[NDArray[np.float32], ...]:
    with torch.no_grad():
        return tuple(output.numpy() for output in network(torch.from_numpy(feeds)))


def test_the_folded_and_exported_float_network_computes_what_the_trained_one_does(compressed: Compressed) -> None:
    feeds = images(6, 9)
    found = open_session(compressed.float_onnx, "onnxruntime", threads=1).infer({"image": feeds})
    for output, expected in zip(compressed.spec.outputs, answers(compressed.network, feeds), strict=True):
        np.testing.assert_allclose(found[output.name], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_the_exported_backbone_is_a_chain_of_convolutions_without_branches(compressed: Compressed) -> None:
    operators = Counter(node.op_type for node in onnx.load(compressed.float_onnx).graph.node)
    assert "BatchNormalization" not in operators
    folded = fold_batch_norms(compressed.network)
    assert operators["Conv"] == sum(isinstance(part, nn.Conv2d) for part in folded.modules())
    if any(isinstance(part, RepBlock) for part in compressed.network.modules()):
        assert operators["Conv"] == 1 + (2 + 1 + 2 + 1) + 3 + 1 + 1  # stem, stages, laterals, smoothing, maps
        assert operators["Add"] == 2 + 2  # the neck's, and the biases of the linear layers


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_engines_stray_no_further_than_rounding_does(compressed: Compressed, backend: Backend) -> None:
    """A sum on the edge between two codes falls either way, and random networks amplify that.

    So the measure is how far the fake-quantised network strays from itself when its biases change by what rounding
    them to 32-bit codes does; three times that, because engines that fuse operators round in fewer places.
    """
    feeds = images(6, 9)
    found = open_session(compressed.quantised, backend, threads=1, precision="int8").infer({"image": feeds})
    nudged = copy.deepcopy(compressed.fake_quantised)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in nudged.named_parameters():
        if name.endswith("bias"):
            parameter.data.add_(1e-4 * torch.randn(parameter.shape, generator=generator))
    outputs = [spec.name for spec in compressed.spec.outputs]
    trio = zip(outputs, answers(compressed.fake_quantised, feeds), answers(nudged, feeds), strict=True)
    for output, expected, strayed in trio:
        gap, rounding = np.abs(found[output] - expected).mean(), np.abs(strayed - expected).mean()
        assert gap < 3 * rounding
        assert gap < 0.01 * np.abs(expected).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_multiplication_is_integer_depthwise_ones_too(compressed: Compressed, backend: Backend) -> None:
    assert backend in ("onnxruntime", "openvino")
    share = int8_share(compressed.quantised, backend)
    assert share.float_kernels == ()
    assert share.share == 1.0
    assert share.macs == count_macs(compressed.fake_quantised, torch.zeros(1, 3, SIDE, SIDE)).total
    assert compressed.report.float_nodes == ()
