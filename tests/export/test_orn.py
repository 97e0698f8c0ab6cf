"""Occlusion-robust networks on their way to devices: exact in float, close in 8 bits, integer but for the table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgepose.blocks.config import KPEConfig, ORNConfig, spec_of
from edgepose.blocks.kpe import KPENet, build
from edgepose.blocks.orn import Look, Mix, Normalise, Pool, Sum
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.plan import PruneConfig, apply_pruning
from edgepose.compress.protected import PROTECTED, protected_parts
from edgepose.compress.prune import plan_pruning
from edgepose.compress.quantise import QuantiseConfig, convert, placement_of, prepare, restore, tensors_of
from edgepose.compress.ranges import Ranges
from edgepose.export.engine import int8_share
from edgepose.export.onnx import onnx_from_torch
from edgepose.export.qdq import QuantisedDialect, quantised_onnx
from edgepose.runtime import open_session
from edgepose.spec import Backend, Keypoints
from tests.export.networks import images as smooth

KEYPOINTS = Keypoints(tuple("abcde"))
CONFIG = KPEConfig("robust", (32, 32), 8, (8, 16, 16, 32), (1, 1, 1, 1), 16, orn=ORNConfig(16, 2))
SPEC = spec_of(CONFIG, KEYPOINTS)


def network() -> KPENet:
    """As after training: statistics that are neither zero nor one, layers that say something."""
    torch.manual_seed(0)
    made = build(CONFIG, KEYPOINTS)
    assert made.block.orn is not None
    for layer in (*made.block.orn.corrections, made.block.orn.visibility, made.block.orn.log_error):
        nn.init.normal_(layer.weight, std=0.3)
    for part in made.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(0.0, 0.1)
            part.running_var.uniform_(0.5, 1.0)
    return made.eval()


@dataclass(frozen=True)
class Robust:
    fake_quantised: nn.Module
    ranges: Ranges
    float_onnx: Path


def robust(folder: Path, *, symmetric: bool) -> Robust:
    batches = [smooth(8, 1), smooth(8, 2)]
    wrapped = prepare(fold_batch_norms(network()), batches, QuantiseConfig(symmetric=symmetric))
    module, ranges = convert(wrapped)
    onnx_from_torch(module, SPEC, folder / "float.onnx", ranges=ranges)  # compares with torch at two batch sizes
    return Robust(wrapped, ranges, folder / "float.onnx")


@pytest.fixture(scope="module")
def unsigned(tmp_path_factory: pytest.TempPathFactory) -> Robust:
    return robust(tmp_path_factory.mktemp("unsigned"), symmetric=False)


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Robust:
    return robust(tmp_path_factory.mktemp("signed"), symmetric=True)


def answers(model: nn.Module, feeds: np.ndarray) -> list[np.ndarray]:
    with torch.no_grad():
        return [output.numpy() for output in model(torch.from_numpy(feeds))]


def assert_close(found: list[np.ndarray], expected: list[np.ndarray], share: float) -> None:
    """Mean difference as a share of each output's range."""
    for output, one, other in zip(SPEC.outputs, found, expected, strict=True):
        assert np.abs(one - other).mean() < share * np.abs(other).max(), output.name


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("kind", "dialect"), [("unsigned", "u8s8"), ("signed", "u8s8"), ("signed", "s8s8")])
def test_engines_answer_what_fake_quantisation_does(
    kind: str, dialect: QuantisedDialect, backend: Backend, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    made: Robust = request.getfixturevalue(kind)
    quantised_onnx(made.float_onnx, made.ranges, tmp_path / "q.onnx", dialect=dialect)
    feeds = smooth(5, 3)
    session = open_session(tmp_path / "q.onnx", backend, threads=1, precision="int8")
    found = session.infer({"image": feeds})
    session.close()
    expected = answers(made.fake_quantised, feeds)
    assert_close([np.asarray(found[o.name], np.float32) for o in SPEC.outputs], expected, 0.025)
    assert_close(expected, answers(network(), feeds), 0.05)


def test_all_products_with_weights_are_integer_in_onnx_runtime(unsigned: Robust, tmp_path: Path) -> None:
    report = quantised_onnx(unsigned.float_onnx, unsigned.ranges, tmp_path / "q.onnx", dialect="u8s8")
    share = int8_share(tmp_path / "q.onnx", "onnxruntime")
    products = 2 + 2 * CONFIG.orn.layers if CONFIG.orn else 0  # pooling, looking up; scores and values of each layer
    assert len(report.float_nodes) == products
    assert len(share.float_kernels) == products
    assert all("MatMul" in kernel.operator for kernel in share.float_kernels)


def test_every_value_has_one_quantiser_whoever_reads_it(unsigned: Robust) -> None:
    """The neck's map is read by the head, in integers, and by pooling, in float: one rounding, one integer kernel."""
    before = [r.key for r in unsigned.ranges.ranges if r.key.startswith("pre_hooks") and r.kind == "activation"]
    assert before == []


def test_the_table_names_kinds_that_are_there_with_reasons(unsigned: Robust) -> None:
    model = network()
    found = {type(model.get_submodule(name)) for name in protected_parts(model)}
    assert found == {Sum, Normalise, Mix, Pool, Look} <= {entry.module for entry in PROTECTED}
    assert all(len(entry.reason) > 40 and entry.operators for entry in PROTECTED)
    assert set(unsigned.ranges.protected) == set(protected_parts(model))
    weights = [name for name in protected_parts(model) if list(model.get_submodule(name).parameters())]
    assert weights == []


def test_a_restored_network_answers_the_same_and_masks_when_trained(unsigned: Robust) -> None:
    wrapped = unsigned.fake_quantised
    again = restore(fold_batch_norms(network()), placement_of(wrapped), tensors_of(wrapped))
    feeds = smooth(2, 4)
    for one, other in zip(answers(again, feeds), answers(wrapped, feeds), strict=True):
        assert np.array_equal(one, other)
    again.get_submodule("block.orn.hide").share = 0.5  # type: ignore[assignment]  # not a parameter
    again.train()
    torch.manual_seed(0)
    assert not np.array_equal(answers(again, feeds)[0], answers(wrapped, feeds)[0])


def test_fake_quantised_networks_train(unsigned: Robust) -> None:
    again = restore(
        fold_batch_norms(network()), placement_of(unsigned.fake_quantised), tensors_of(unsigned.fake_quantised)
    ).train()
    sum(output.square().mean() for output in again(torch.from_numpy(smooth(2, 5)))).backward()
    silent = [n for n, p in again.named_parameters() if p.requires_grad and p.grad is None and "nncf" not in n]
    assert silent == []


def test_pruning_goes_through_the_block_and_leaves_tokens_whole() -> None:
    model = network()
    plan = plan_pruning(model, torch.zeros(1, 3, 32, 32), PruneConfig(ratio=0.15, round_to=4))
    pruned = apply_pruning(model, plan)
    names = {layer.name for layer in plan.layers}
    assert "block.neck.smooth.0" in names | {frozen.name for frozen in plan.frozen}
    assert {"block.orn.context", "block.orn.local"} & names  # they read what was removed
    tokens = [n for n in names if n.startswith("block.orn.layers") or n.endswith(("evidence", "visibility"))]
    assert tokens == []
    feeds: Tensor = torch.randn(3, 3, 32, 32)
    assert [o.shape for o in pruned(feeds)] == [o.shape for o in model(feeds)]
