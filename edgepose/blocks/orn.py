"""ORN, the occlusion-robust block: keypoints read off the picture, off each other, and how far each is to be believed.

Invariant: a new block changes nothing: its last layers start at zero, so a trained KPE network goes on as it is. Every
parameter whose size follows the input's is in `ORN.places` or in a layer of `ORN.sized_layers`.

A keypoint that is covered leaves no peak in its map, but its neighbours say where it must be. So every keypoint becomes
a token: its whole map, the features under its peak, and which keypoint it is. Gated attention (Hua et al., "Transformer
Quality in Linear Time", ICML 2022; with softmax in several heads) lets tokens look at each other and at the backbone's
coarsest map, and linear layers turn what comes out into corrections of the head's outputs. Whether something is in
front is a question to every place of the picture first, which training can answer for all of them, and to a keypoint
where it was found. All products with weights are linear layers or convolutions, which every backend computes in
integers; what stands between them is in modules of its own (`Sum`, `Normalise`, `Mix`, `Pool`, `Look`), which stay
float for the reasons in `compress.protected`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edgepose.blocks.config import ORNConfig

_SHARPNESS = 20.0  # makes a distribution of a heat map whose peak is 1 over hundreds of cells near 0
_CLEAR_WIDTH = 64
_HEADS = 4  # of attention, where the width can be divided by eight
_EXPECTED_PX = 12.0  # of a network that has learnt nothing yet; only where the logarithm starts


class Sizes(NamedTuple):
    """What surrounds a block.

    Attributes:
        keypoints: Keypoints to predict.
        channels: Of the map that the head reads, and of the backbone's coarsest map.
        map_hw: Height and width of the head's keypoint maps.
        coarse_hw: Height and width of the coarsest map.
        outputs: Shapes of the head's outputs behind batch and keypoint.
    """

    keypoints: int
    channels: tuple[int, int]
    map_hw: tuple[int, int]
    coarse_hw: tuple[int, int]
    outputs: tuple[tuple[int, ...], ...]


class Sum(nn.Module):
    """Addition as a module, so that it can be protected by name."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first + second


class Normalise(nn.Module):
    """Vectors (…, C) to a root mean square of 1 (Zhang & Sennrich, NeurIPS 2019); the next layer's weights are gain."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class Mix(nn.Module):
    """Gated attention, head by head: gate · softmax(query keyᵀ / √c) value (Vaswani et al., NeurIPS 2017).

    Softmax, not the squared ReLU of gated attention units: there, a pair of tokens whose scores are negative in all
    pictures never hears of each other again, as it has no gradient.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
        """(N, K, c), (N, n, c), (N, n, d) and (N, K, d) to (N, K, d)."""
        query, key, value = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        scores = query @ key.transpose(2, 3) * query.shape[3] ** -0.5
        mixed = scores.float().softmax(-1).to(value.dtype) @ value
        gated: Tensor = gate * mixed.transpose(1, 2).flatten(2)
        return gated


class Pool(nn.Module):
    """The features under each keypoint's peak: the map's softmax weighs them.

    No gradient flows into the weights: maps are to say where the keypoint is, not where it is worth looking.
    """

    def forward(self, flat: Tensor, features: Tensor) -> Tensor:
        """(N, K, h·w) map values and (N, C, h, w) features to (N, K, C)."""
        weights = flat.detach().float().softmax(-1).to(features.dtype)
        return weights @ features.flatten(2).transpose(1, 2)


class Look(nn.Module):
    """What a map (N, 1, h, w) says where each keypoint is believed to be: the mean over all places it may be at.

    No gradient flows into the places, as in `Pool`.
    """

    def forward(self, clear: Tensor, outputs: Sequence[Tensor]) -> Tensor:
        """SimCC's two outputs (N, K, bins), or heat maps (N, K, h, w), to (N, K)."""
        field, places = clear[:, 0].float(), [output.detach().float() for output in outputs]
        if len(places) == 1:
            cell: Tensor = (places[0] * _SHARPNESS).flatten(2).softmax(-1)
            return cell @ field.flatten(1)[..., None]
        cells = field.shape[2], field.shape[1]
        x, y = (p.softmax(-1).unflatten(2, (n, -1)).sum(-1) for p, n in zip(places, cells, strict=True))
        seen: Tensor = ((y @ field) * x).sum(-1, keepdim=True)
        return seen


class Hide(nn.Module):
    """Keypoint masking: during training, what the head says of some keypoints is withheld.

    Attributes:
        share: Expected share of the keypoints that are hidden, 0..0.5; a picture's own lies between none and twice it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.share = 0.0

    def forward(self, flat: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        if not self.training or self.share <= 0:
            return flat, tuple(outputs)
        count, keypoints = flat.shape[:2]
        shares = 2 * self.share * torch.rand(count, 1, device=flat.device)
        kept = (torch.rand(count, keypoints, device=flat.device) >= shares).to(flat.dtype)
        return flat * kept[..., None], tuple(o * kept.reshape(*kept.shape, *[1] * (o.ndim - 2)) for o in outputs)


class GatedAttentionUnit(nn.Module):
    """One layer: keypoint tokens (N, K, C) look at each other and at context (N, n, C), which stays as it is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden, key = 2 * width, max(1, width // 2)
        self.norm, self.mix, self.sum = Normalise(), Mix(_HEADS if width % (2 * _HEADS) == 0 else 1), Sum()
        self.query, self.key = nn.Linear(width, key), nn.Linear(width, key)
        self.value, self.gate = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.value_relu, self.gate_relu = nn.ReLU(), nn.ReLU()
        self.out = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        own = self.norm(tokens)
        # Normalised behind the concatenation, where a single quantiser stands: OpenVINO 2026.4 fails to compile a
        # product whose input is joined from parts of different scales.
        seen = self.norm(torch.cat([tokens, context], 1))
        value, gate = self.value_relu(self.value(seen)), self.gate_relu(self.gate(own))
        mixed: Tensor = self.sum(tokens, self.out(self.mix(self.query(own), self.key(seen), value, gate)))
        return mixed


class ORN(nn.Module):
    """Corrects a head's outputs, and says what can be seen and how far each keypoint is off.

    Args:
        config: Width and layers.
        sizes: What surrounds the block.
    """

    sized_layers = ("evidence", "corrections")
    """Layers that take or give whole maps or coordinate bins; only they and `places` change with the input's size."""

    def __init__(self, config: ORNConfig, sizes: Sizes) -> None:
        super().__init__()
        width, (fine, coarse) = config.width, sizes.channels
        self.hide, self.pool, self.norm = Hide(), Pool(), Normalise()
        self.evidence = nn.Linear(sizes.map_hw[0] * sizes.map_hw[1], width)
        self.local = nn.Linear(fine, width)
        self.identity = nn.Parameter(torch.randn(sizes.keypoints, width))
        self.context = nn.Conv2d(coarse, width, 1)
        self.places = nn.Parameter(torch.randn(sizes.coarse_hw[0] * sizes.coarse_hw[1], width))
        self.token_sum, self.identity_sum, self.place_sum = Sum(), Sum(), Sum()
        self.layers = nn.ModuleList(GatedAttentionUnit(width) for _ in range(config.layers))
        self.output_shapes = tuple(sizes.outputs)
        self.corrections = nn.ModuleList(nn.Linear(width, _product(shape)) for shape in sizes.outputs)
        self.correction_sums = nn.ModuleList(Sum() for _ in sizes.outputs)
        self.visibility, self.log_error = nn.Linear(width, 1), nn.Linear(width, 1)
        inner = min(_CLEAR_WIDTH, width)
        self.clear = nn.Sequential(nn.Conv2d(fine, inner, 1), nn.ReLU(), nn.Conv2d(inner, 1, 1))
        self.look_up, self.look_sum = Look(), Sum()
        self.start_silent()

    @torch.no_grad()
    def start_silent(self) -> None:
        """Begin as the network without the block: no corrections, an even chance, one expected error for all."""
        for layer in (*self.corrections, self.visibility, self.log_error, self.clear[2]):
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            assert layer.bias is not None
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.log_error.bias, math.log(_EXPECTED_PX))

    @torch.no_grad()
    def correct(self, scale: float, shift: float, log_factor: float) -> None:
        """Replace visibility logits z by scale·z + shift, and multiply expected errors by exp(log_factor)."""
        for layer in (self.visibility, self.clear[2]):
            assert isinstance(layer, (nn.Linear, nn.Conv2d))
            assert layer.bias is not None
            layer.weight.mul_(scale)
            layer.bias.mul_(scale)
        self.visibility.bias.add_(shift)
        self.log_error.bias.add_(log_factor)

    def forward(self, features: tuple[Tensor, Tensor], maps: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Run the block.

        Args:
            features: The map (N, C, h, w) that the head reads, and the backbone's coarsest.
            maps: (N, K, h, w), the head's map of every keypoint.
            outputs: The head's outputs, (N, K, …) each.

        Returns:
            The outputs, corrected; logits (N, K) of the keypoint being seen; ln of the expected error (N, K) in pixels.
        """
        return self.look(features, maps, outputs)[0]

    def look(
        self, features: tuple[Tensor, Tensor], maps: Tensor, outputs: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """As `forward`, and (N, 1, h, w) logits of nothing being in front, cell by cell, for training."""
        flat, outputs = self.hide(maps.flatten(2), outputs)
        tokens = self.token_sum(self.evidence(flat), self.local(self.pool(flat, features[0])))
        tokens = self.identity_sum(tokens, self.identity)
        context = self.place_sum(self.context(features[1]).flatten(2).transpose(1, 2), self.places)
        for layer in self.layers:
            tokens = layer(tokens, context)
        tokens = self.norm(tokens)
        corrected = [
            total(output, layer(tokens).unflatten(2, shape))
            for total, layer, output, shape in zip(
                self.correction_sums, self.corrections, outputs, self.output_shapes, strict=True
            )
        ]
        clear = self.clear(features[0])
        seen = self.look_sum(self.visibility(tokens), self.look_up(clear, corrected))
        return (*corrected, seen.flatten(1), self.log_error(tokens).flatten(1)), clear


def _product(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size
