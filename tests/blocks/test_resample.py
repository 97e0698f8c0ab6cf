"""Resampling matrices: the same picture, no half-pixel shift, magnitudes kept."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgepose.blocks.resample import bins_matrix, cells_matrix, readers_matrix, resampled

sides = st.integers(2, 9)


@given(sides, sides, sides, sides)
def test_a_uniform_map_stays_uniform(a: int, b: int, c: int, d: int) -> None:
    assert torch.allclose(cells_matrix((a, b), (c, d)).sum(1), torch.ones(c * d), atol=1e-5)


@given(sides, sides, sides, sides)
def test_readers_of_a_uniform_map_keep_their_sum(a: int, b: int, c: int, d: int) -> None:
    weight = torch.arange(float(a * b))
    assert (readers_matrix((a, b), (c, d)) @ weight).sum().item() == pytest.approx(weight.sum().item(), rel=1e-4)


@given(sides, sides)
def test_the_same_size_changes_nothing(a: int, b: int) -> None:
    assert torch.equal(cells_matrix((a, b), (a, b)), torch.eye(a * b))
    assert torch.equal(bins_matrix((a, a), (2.0, 2.0)), torch.eye(a))


@pytest.mark.parametrize(("before", "after"), [(96, 192), (192, 96), (160, 192), (128, 160)])
@pytest.mark.parametrize("ratios", [(2.0, 2.0), (2.0, 3.0), (1.0, 2.0)])
def test_a_peak_among_bins_stays_at_its_place(before: int, after: int, ratios: tuple[float, float]) -> None:
    # A ramp that says where each bin is must say so afterwards, in the old picture's pixels.
    places = torch.arange(before * ratios[0]) / ratios[0]
    matrix = bins_matrix((round(before * ratios[0]), round(after * ratios[1])), ratios)
    wanted = (torch.arange(after * ratios[1]) / ratios[1] + 0.5) * before / after - 0.5
    inside = (wanted >= 0) & (wanted <= places[-1])
    assert torch.allclose((matrix @ places)[inside], wanted[inside], atol=1e-3)


def test_a_reader_of_a_larger_map_sees_the_old_picture() -> None:
    def blob(cells: int) -> torch.Tensor:
        """A bump at the same place of a picture that is `cells` cells wide and high."""
        places = (torch.arange(cells) + 0.5) / cells
        return torch.exp(-(((places - 0.6) / 0.15) ** 2)[:, None] - (((places - 0.3) / 0.15) ** 2)[None]).flatten()

    weight = torch.randn(7, 400, generator=torch.Generator().manual_seed(0))
    before, after = weight @ blob(20), resampled(weight, 1, readers_matrix((20, 20), (24, 24))) @ blob(24)
    assert (after - before).abs().max() < 0.05 * before.abs().max()
