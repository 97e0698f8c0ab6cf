from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.hooks import hooks_of
from edgepose.compress.quantise import (
    QuantiseConfig,
    convert,
    load,
    placement_of,
    prepare,
    restore,
    save,
    tensors_of,
)
from edgepose.errors import CheckpointError, RecipeError, SpecError
from edgepose.recipe import RangeEstimator
from tests.export.networks import images, network

BLOCKS = ("residual", "pyramid")


@pytest.fixture(scope="module")
def folded() -> nn.Module:
    return fold_batch_norms(network(BLOCKS))


@pytest.fixture(scope="module")
def fake_quantised(folded: nn.Module) -> nn.Module:
    return prepare(folded, [images(8, 1), images(8, 2)])


def outputs(module: nn.Module, seed: int = 3) -> list[torch.Tensor]:
    with torch.no_grad():
        return list(module(torch.from_numpy(images(4, seed))))


def test_fake_quantisation_is_near_the_float_network_but_not_equal(
    folded: nn.Module, fake_quantised: nn.Module
) -> None:
    for exact, rounded in zip(outputs(folded), outputs(fake_quantised), strict=True):
        gap = float((exact - rounded).abs().max() / exact.abs().max())
        assert 1e-4 < gap < 0.05


def test_preparing_prints_nothing_and_leaves_the_network_alone(
    folded: nn.Module, capfd: pytest.CaptureFixture[str]
) -> None:
    before = {name: tensor.clone() for name, tensor in folded.state_dict().items()}
    prepare(folded, [torch.from_numpy(images(4, 1))])
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    assert all(torch.equal(tensor, before[name]) for name, tensor in folded.state_dict().items())


def test_every_operator_gets_ranges_on_both_sides(fake_quantised: nn.Module) -> None:
    _, ranges = convert(fake_quantised)
    activations = {entry.key for entry in ranges.ranges if entry.kind == "activation"}
    # image, two stem convolutions, residual branch (inner, outer) and sum, pyramid (down, coarse, fine, sum), maps
    assert len(activations) == 11
    assert not any("interpolate" in key for key in activations), "upsampling moves codes, it needs no range of its own"
    assert not any("linear" in key for key in activations), "the last layers' outputs stay float"


def test_what_follows_a_relu_is_unsigned_from_zero(fake_quantised: nn.Module) -> None:
    _, ranges = convert(fake_quantised)
    rectified = [entry for entry in ranges.ranges if "relu" in entry.key]
    assert len(rectified) == 5
    assert all((entry.low, entry.high, entry.zero_point) == (0, 255, (0,)) for entry in rectified)


def test_symmetric_ranges_are_signed_around_zero(folded: nn.Module) -> None:
    _, ranges = convert(prepare(folded, [images(8, 1)], QuantiseConfig(symmetric=True)))
    assert all(entry.symmetric for entry in ranges.ranges)


def test_weights_are_quantised_per_channel_without_the_code_minus_128(fake_quantised: nn.Module) -> None:
    float_module, ranges = convert(fake_quantised)
    weight = float_module.get_parameter("maps.weight").detach().numpy()
    entry = ranges.by_key["pre_hooks.maps/conv2d/0__1"]
    assert (entry.low, entry.high, entry.axis) == (-127, 127, 0)
    np.testing.assert_allclose(entry.scales * 127, np.abs(weight).max(axis=(1, 2, 3)), rtol=1e-5)


def test_converting_gives_the_plain_network_back(folded: nn.Module, fake_quantised: nn.Module) -> None:
    float_module, _ = convert(fake_quantised)
    assert type(float_module) is type(folded)
    assert list(float_module.state_dict()) == list(folded.state_dict())
    assert all(
        torch.equal(parameter, folded.get_parameter(name))
        for name, parameter in float_module.named_parameters()
        if name.endswith("weight")
    )


def test_a_saved_network_comes_back_to_the_bit(folded: nn.Module, fake_quantised: nn.Module, tmp_path: Path) -> None:
    written = save(fake_quantised, tmp_path / "net")
    assert [path.name for path in written] == ["net.quant.json", "net.quant.safetensors"]
    again = load(fold_batch_norms(network(BLOCKS, seed=5)), tmp_path / "net")
    for ours, theirs in zip(outputs(fake_quantised), outputs(again), strict=True):
        assert torch.equal(ours, theirs)
    assert convert(again)[1] == convert(fake_quantised)[1]


def test_tensors_of_another_network_are_refused(folded: nn.Module, fake_quantised: nn.Module) -> None:
    other = fold_batch_norms(network(("residual",)))
    with pytest.raises(CheckpointError, match="fake-quantised weights"):
        restore(other, placement_of(fake_quantised), tensors_of(fake_quantised))


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_truncated_file_is_refused(fake_quantised: nn.Module, tmp_path: Path, suffix: str) -> None:
    save(fake_quantised, tmp_path / "net")
    path = tmp_path / f"net.quant.{suffix}"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="net"):
        load(fold_batch_norms(network(BLOCKS)), tmp_path / "net")


def test_fine_tuning_learns_weights_and_ranges_but_not_the_zero_behind_a_relu(folded: nn.Module) -> None:
    module = prepare(folded, [images(8, 1)])
    _, before = convert(module)
    module.train()
    optimiser = torch.optim.Adam((p for p in module.parameters() if p.requires_grad), lr=5e-3)
    target = torch.randn(8, 3, 64, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(15):
        x, y = module(torch.from_numpy(images(8, 1)))
        loss = nn.functional.mse_loss(x, target) + nn.functional.mse_loss(y, target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    float_module, after = convert(module)
    assert not torch.equal(float_module.get_parameter("maps.weight"), folded.get_parameter("maps.weight"))
    assert sum(one.scale != other.scale for one, other in zip(before.ranges, after.ranges, strict=True)) > 10
    assert all(entry.zero_point == (0,) for entry in after.ranges if "relu" in entry.key)


def test_protected_modules_stay_float_even_below_a_module_list(folded: nn.Module) -> None:
    module = prepare(folded, [images(8, 1)], QuantiseConfig(protected=("blocks.0", "x")))
    _, ranges = convert(module)
    weights = {entry.key for entry in ranges.ranges if entry.kind == "weight"}
    assert len(weights) == 2 + 3 + 1 + 1  # stem, pyramid, maps, y
    assert "pre_hooks.y/linear/0__1" in weights
    assert ranges.protected == ("blocks.0", "x")
    assert convert(restore(folded, placement_of(module), tensors_of(module)))[1] == ranges


def test_an_unknown_protected_module_is_named(folded: nn.Module) -> None:
    with pytest.raises(RecipeError, match=r"'head\.z'"):
        prepare(folded, [images(2, 1)], QuantiseConfig(protected=("head.z",)))


@pytest.mark.parametrize(
    ("batches", "found"),
    [
        ([], "no batches"),
        ([np.zeros((2, 3, 32, 32))], "float64"),
        ([np.zeros((3, 32, 32), np.float32)], r"\(3, 32, 32\)"),
    ],
)
def test_calibration_data_of_the_wrong_kind_is_refused(
    folded: nn.Module, batches: list[np.ndarray], found: str
) -> None:
    with pytest.raises(SpecError, match=found):
        prepare(folded, batches)


@pytest.mark.parametrize("symmetric", [False, True])
def test_each_range_estimator_finds_ranges_of_its_own_kind(folded: nn.Module, symmetric: bool) -> None:
    batches = [images(4, seed) for seed in (1, 2, 3)]
    batches[2][0] *= 6  # an outlier among the images
    scales = {}
    for estimator in get_args(RangeEstimator):
        module = prepare(folded, batches, QuantiseConfig(estimator=estimator, symmetric=symmetric))
        ranges = convert(module)[1]
        assert all(entry.symmetric for entry in ranges.ranges) or not symmetric
        scales[estimator] = ranges.by_key["post_hooks.images__0"].scale[0]
    assert scales["default"] == scales["mean-minmax"]
    assert scales["minmax"] > scales["mean-minmax"] > scales["median-minmax"]
    assert scales["quantile"] < scales["mean-minmax"]
    assert 0 < scales["histogram"] < 1.01 * scales["minmax"]


def test_only_as_many_images_are_used_as_asked_for(folded: nn.Module) -> None:
    wild = images(4, 1) * 100
    one = prepare(folded, [images(4, 1), wild], QuantiseConfig(subset_size=4, estimator="minmax"))
    two = prepare(folded, [images(4, 1), wild], QuantiseConfig(subset_size=8, estimator="minmax"))
    scale = [convert(module)[1].by_key["post_hooks.images__0"].scale[0] for module in (one, two)]
    assert scale[1] > 50 * scale[0]


def test_a_plain_module_cannot_be_converted(folded: nn.Module) -> None:
    with pytest.raises(CheckpointError, match="without quantisers"):
        convert(folded)


def test_hooks_stand_where_ranges_say(fake_quantised: nn.Module) -> None:
    _, ranges = convert(fake_quantised)
    assert set(hooks_of(fake_quantised)) == set(ranges.by_key)
