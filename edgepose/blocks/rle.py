"""Residual log-likelihood estimation: the loss of coordinate heads, with the normalizing flow that it trains beside.

Li et al., "Human Pose Regression with Residual Log-likelihood Estimation", ICCV 2021. How far a network is off is not
distributed as any textbook says. A small flow learns that distribution while the network trains, on top of a Laplacian
that carries it from the first step; the network itself learns coordinates and the scales of their errors.

Invariant: the flow is a part of the loss, never of the network: no checkpoint and no engine holds it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_SMALLEST_SCALE = 1e-3  # of the input's side, a quarter of a pixel at most: no label is more exact


class RealNVP(nn.Module):
    """A density over the plane (Dinh et al., "Density estimation using Real NVP", ICLR 2017).

    Affine coupling layers, each of which moves one coordinate by what it sees of the other, carry a point to one that
    is normally distributed. A new flow is the identity, its density the normal one.

    Args:
        layers: Coupling layers; they move x and y by turns.
        width: Features inside the networks that say how far to move and to stretch.
    """

    def __init__(self, layers: int = 6, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Coupling(width) for _ in range(layers))

    def log_density(self, points: Tensor) -> Tensor:
        """(…, 2) points to the logarithm (…) of the density there."""
        moved, log_volume = points, torch.zeros_like(points[..., 0])
        for number, layer in enumerate(self.layers):
            kept, changed = (moved[..., :1], moved[..., 1:]) if number % 2 else (moved[..., 1:], moved[..., :1])
            log_scale, shift = layer(kept)
            changed = (changed - shift) * torch.exp(-log_scale)
            moved = torch.cat([kept, changed] if number % 2 else [changed, kept], -1)
            log_volume = log_volume - log_scale[..., 0]
        return log_volume - 0.5 * moved.square().sum(-1) - math.log(2 * math.pi)


class _Coupling(nn.Module):
    """One coordinate (…, 1) to the logarithm of the stretch, within ±1, and the shift of the other, (…, 1) each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(1, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU())
        self.out = nn.Linear(width, 2)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.out(self.hidden(kept)).split(1, -1)
        return torch.tanh(log_scale), shift


def residual_likelihood(shares: Tensor, scales: Tensor, target: Tensor, flow: RealNVP | None) -> Tensor:
    """Negative log-likelihood of the labels, per joint.

    The sum of two of them, as the authors train it: that of a Laplacian, for which a scale is the expected absolute
    error, and that of the flow. Both stretch with the scales, so either keeps these honest.

    Args:
        shares: (N, K, 2) coordinates.
        scales: (N, K, 2) scales of their errors, above 0.
        target: (N, K, 2) labels, in the unit of `shares`.
        flow: Density of the errors in units of their scales; None leaves the Laplacian alone.

    Returns:
        (N, K) float32, x and y added up.
    """
    scales = scales.float().clamp(min=_SMALLEST_SCALE)
    residual = (target - shares.float()) / scales
    log_scales = scales.log().sum(-1)
    loss = residual.abs().sum(-1) + log_scales + 2 * math.log(2)
    return loss if flow is None else loss + log_scales - flow.log_density(residual)


def laplace_divergence(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """Kullback-Leibler divergence of the teacher's Laplacians from the student's, (N, K), x and y added up.

    Args:
        student: Coordinates and scales, (N, K, 2) each.
        teacher: The same.
    """
    (own, own_scales), (taught, taught_scales) = ([t.float() for t in pair] for pair in (student, teacher))
    own_scales, taught_scales = (s.clamp(min=_SMALLEST_SCALE) for s in (own_scales, taught_scales))
    gap = (own - taught).abs()
    spread = taught_scales * torch.exp(-gap / taught_scales) + gap
    return ((own_scales / taught_scales).log() + spread / own_scales - 1).sum(-1)
