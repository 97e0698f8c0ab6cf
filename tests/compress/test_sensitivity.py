"""Sensitivity scans: measured once each, stored at once, gone on with; parts that are what they say they are."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from edgepose.compress.plan import PruneConfig
from edgepose.compress.prune import Ranking, rank_channels
from edgepose.compress.sensitivity import (
    Candidate,
    FigureFile,
    Figures,
    pruned_alone,
    pruning_candidates,
    quantisation_candidates,
    quantised_alone,
    scan,
)
from edgepose.errors import RecipeError, UsageError
from tests.training.dots import network

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLE = torch.zeros(1, 3, 64, 64)
PARTS = tuple(Candidate("prune", f"layer{n}", share) for n in range(2) for share in (0.25, 0.5))


class Measures:
    """A measurement that remembers, and is interrupted where it is told to."""

    def __init__(self, stop_at: int = -1) -> None:
        self.asked: list[str] = []
        self.stop_at = stop_at

    def __call__(self, candidate: Candidate) -> Figures:
        if len(self.asked) == self.stop_at:
            raise KeyboardInterrupt
        self.asked.append(candidate.key)
        return {"pck": 1 - candidate.share, "nobody": float("nan")}


def test_a_scan_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    first, second, third = Measures(stop_at=2), Measures(), Measures()
    with pytest.raises(KeyboardInterrupt):
        scan(PARTS, first, FigureFile(path, "a"))
    told: list[tuple[int, int]] = []
    found = scan(PARTS, second, FigureFile(path, "a"), lambda done, whole: told.append((done, whole)))
    assert first.asked == [part.key for part in PARTS[:2]]
    assert second.asked == [part.key for part in PARTS[2:]]
    assert told == [(n, 4) for n in range(5)]
    again = scan(PARTS, third, FigureFile(path, "a"))
    assert third.asked == []
    assert list(again) == list(found) == list(PARTS)
    for part in PARTS:
        assert again[part]["pck"] == found[part]["pck"] == 1 - part.share
        assert again[part]["nobody"] != again[part]["nobody"]  # NaN survives JSON


def test_equal_parts_are_measured_once(tmp_path: Path) -> None:
    measure = Measures()
    assert len(scan((*PARTS, *PARTS), measure, FigureFile(tmp_path / "f.json", "a"))) == len(measure.asked) == 4


@pytest.mark.parametrize("spoil", ["other", "cut", "foreign"])
def test_figures_of_something_else_are_measured_again(spoil: str, tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    scan(PARTS[:1], Measures(), FigureFile(path, "other" if spoil == "other" else "a"))
    if spoil != "other":
        path.write_bytes(b"[1]" if spoil == "foreign" else path.read_bytes()[:-9])
    measure = Measures()
    scan(PARTS[:1], measure, FigureFile(path, "a"))
    assert len(measure.asked) == 1
    assert FigureFile(path, "a").get(PARTS[0].key) is not None


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "figures.json").mkdir()
    with pytest.raises(UsageError, match="a directory"):
        scan(PARTS[:1], Measures(), FigureFile(tmp_path / "figures.json", "a"))


@cache
def ranking() -> Ranking:
    return rank_channels(network(), EXAMPLE, PruneConfig(ratio=0, importance="l2", round_to=1, min_channels=1))


def test_every_group_is_tried_by_every_share_that_makes_a_difference() -> None:
    found = pruning_candidates(ranking(), (0.5, 0.25, 0.26))  # of 8 channels 0.25 and 0.26 are the same two
    groups = {group.name: group.size for group in ranking().groups}
    assert {part.layer for part in found} == set(groups)
    assert len(set(found)) == len(found)
    narrow = [part.share for part in found if groups[part.layer] == 8]
    assert narrow == [0.5, 0.25] * (len(narrow) // 2)


def test_layers_are_chosen_by_pattern() -> None:
    name = ranking().groups[1].name
    assert {part.layer for part in pruning_candidates(ranking(), (0.5,), (name,))} == {name}
    with pytest.raises(RecipeError, match=r"'nothing\.\*', which matches no layer that can be narrowed"):
        pruning_candidates(ranking(), (0.5,), (name, "nothing.*"))


def test_shares_that_remove_nothing_are_refused() -> None:
    with pytest.raises(RecipeError, match="raise the shares"):
        pruning_candidates(ranking(), (0.01,))


def test_one_group_is_pruned_and_all_others_stay() -> None:
    part = pruning_candidates(ranking(), (0.5,))[2]
    smaller, plan = pruned_alone(ranking(), part)
    group = next(group for group in ranking().groups if group.name == part.layer)
    touched = {layer.name: len(layer.kept) / layer.out_channels for layer in plan.layers if layer.kept != layer.kept_in}
    assert {name for name, share in touched.items() if share < 1} <= {m.layer for m in group.members}
    assert len(smaller.get_submodule(part.layer).weight) == group.size // 2  # type: ignore[arg-type]
    assert plan.macs_after < plan.macs_before
    assert ranking().fixed == {}  # nothing of it stays in the ranking


def test_limits_of_the_ranking_hold() -> None:
    config = msgspec.structs.replace(ranking().config, min_channels=6)
    found = pruning_candidates(replace(ranking(), config=config), (0.75,))
    groups = {group.name: group.size for group in ranking().groups}
    assert all(round(groups[part.layer] * (1 - part.share)) >= 6 for part in found)


def test_a_layer_is_quantised_alone_or_left_alone() -> None:
    from edgepose.compress.fold import fold_batch_norms
    from edgepose.compress.quantise import prepare
    from edgepose.compress.restore import quantised_layers

    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    folded = fold_batch_norms(network())
    wrapped = prepare(folded, [images])
    layers = quantised_layers(wrapped, EXAMPLE)
    candidates = quantisation_candidates(layers, layers[1:2])
    assert len(quantisation_candidates(layers)) == 2 * len(layers)
    with pytest.raises(RecipeError, match=r"nothing\.\*, with no quantised layer"):
        quantisation_candidates(layers, ["nothing.*"])
    assert [part.kind for part in candidates] == ["int8", "float"]
    alone, spared = (quantised_alone(wrapped, layers, part, EXAMPLE) for part in candidates)
    assert quantised_layers(alone, EXAMPLE) == layers[1:2]
    assert quantised_layers(spared, EXAMPLE) == (layers[0], *layers[2:])
    gaps = [gap(model, folded, images) for model in (alone, spared, wrapped)]
    assert 0 < gaps[0] < gaps[1] <= 1.5 * gaps[2]


def gap(model: nn.Module, other: nn.Module, images: torch.Tensor) -> float:
    with torch.no_grad():
        return float(sum((a - b).abs().mean() for a, b in zip(model(images), other(images), strict=True)))
