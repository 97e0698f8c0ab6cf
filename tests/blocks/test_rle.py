"""Residual log-likelihood: densities, values by hand, and a flow that learns what errors are like."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from edgepose.blocks.config import KPEConfig, spec_of
from edgepose.blocks.losses import make_loss
from edgepose.blocks.rle import RealNVP, laplace_divergence, residual_likelihood
from edgepose.spec import Keypoints


def bent_flow(seed: int = 0) -> RealNVP:
    flow = RealNVP(layers=4, width=16)
    generator = torch.Generator().manual_seed(seed)
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return flow


def grid(reach: float, step: float) -> Tensor:
    axis = torch.arange(-reach, reach, step)
    return torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)


@torch.no_grad()
def test_a_bent_flow_is_still_a_density() -> None:
    points = grid(10.0, 0.1)
    flow = bent_flow()
    assert not torch.allclose(flow.log_density(points), RealNVP().log_density(points), atol=0.1)
    assert flow.log_density(points).exp().sum().item() * 0.1**2 == pytest.approx(1, abs=5e-3)


@torch.no_grad()
def test_a_new_flow_is_the_normal_density() -> None:
    points = torch.tensor([[0.0, 0], [1, -2]])
    expected = [-math.log(2 * math.pi), -math.log(2 * math.pi) - 2.5]
    assert RealNVP().log_density(points).tolist() == pytest.approx(expected)


def test_likelihood_by_hand() -> None:
    shares, scales = torch.tensor([[[0.5, 0.5]]]), torch.tensor([[[0.1, 0.2]]])
    target = torch.tensor([[[0.6, 0.3]]])  # one scale off on both axes
    laplacian = math.log(2 * 0.1) + 1 + math.log(2 * 0.2) + 1
    assert residual_likelihood(shares, scales, target, None).item() == pytest.approx(laplacian, rel=1e-5)
    normal = math.log(2 * math.pi) + 1 + math.log(0.1) + math.log(0.2)
    found = residual_likelihood(shares, scales, target, RealNVP()).item()
    assert found == pytest.approx(laplacian + normal, rel=1e-5)


def test_the_best_scale_is_the_mean_absolute_error() -> None:
    errors = torch.tensor([0.02, -0.04, 0.12]).reshape(3, 1, 1).expand(3, 1, 2)
    logits = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        scales = torch.sigmoid(logits).expand(3, 1, 2)
        residual_likelihood(torch.zeros(3, 1, 2), scales, errors, None).sum().backward()
        optimizer.step()
    assert torch.sigmoid(logits).item() == pytest.approx(0.06, rel=1e-2)


def test_impossibly_small_scales_stay_finite() -> None:
    shares = torch.zeros(1, 1, 2, requires_grad=True)
    loss = residual_likelihood(shares, torch.zeros(1, 1, 2), torch.full((1, 1, 2), 0.5), RealNVP()).sum()
    loss.backward()
    assert loss.isfinite()
    assert shares.grad is not None
    assert shares.grad.isfinite().all()


def test_the_flow_learns_what_errors_are_like() -> None:
    # Errors that lie on one side: no Laplacian and no normal density says so.
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(512, 2, generator=generator).square() * 2 - 0.3
    flow = RealNVP(layers=4, width=16)
    optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
    before = -flow.log_density(errors).mean().item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = -flow.log_density(errors).mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < before - 0.8
    with torch.no_grad():
        assert flow.log_density(torch.tensor([0.0, 0.0])) > flow.log_density(torch.tensor([-1.0, -1.0])) + 3


def test_flows_are_made_by_their_seed_and_leave_torchs_generator_alone() -> None:
    config = KPEConfig("tiny", (32, 32), 4, (8, 8, 8, 8), (1, 1, 1, 1), 8, head="regression")
    spec = spec_of(config, Keypoints(("a",)))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first, second, third = (make_loss(spec, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_divergence_of_laplacians_by_hand() -> None:
    here, there = torch.tensor([[[0.2, 0.2]]]), torch.tensor([[[0.3, 0.2]]])
    narrow, wide = torch.full((1, 1, 2), 0.1), torch.full((1, 1, 2), 0.2)
    assert laplace_divergence((here, narrow), (here, narrow)).item() == pytest.approx(0, abs=1e-6)
    # x: centres 0.1 apart; y: as wide again. Numerically: the integral of p·ln(p / q).
    axis = torch.arange(-4, 4, 1e-4, dtype=torch.float64)

    def log_density(centre: float, scale: float) -> Tensor:
        return -(axis - centre).abs() / scale - math.log(2 * scale)

    expected = 0.0
    for centre in (0.3, 0.2):
        taught, own = log_density(0.2, 0.1), log_density(centre, 0.2)
        expected += (taught.exp() * (taught - own)).sum().item() * 1e-4
    assert laplace_divergence((there, wide), (here, narrow)).item() == pytest.approx(expected, rel=1e-3)
