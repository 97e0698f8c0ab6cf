"""Finding a bundle's checkpoints again: only by the right hash, and with a reason where one is gone.

Weights are any bytes here: nothing but their digest counts.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgepose.blocks.card import Card, Lineage
from edgepose.bundle import Bundle, write_bundle
from edgepose.stages.chain import Link, chain_of
from edgepose.storage import json_bytes
from tests.fakes import spot_spec
from tests.tiny_network import spot_draft

FIGURES = {"train": 0.55, "prune": 0.40, "recover": 0.53, "ptq": 0.52}
STAGES = ("prune", "recover", "ptq")


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(path: Path, name: str, lineage: tuple[Lineage, ...]) -> str:
    """Writes a checkpoint whose weights are its name; returns their digest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = f"weights of {name}".encode()
    digest = hashlib.sha256(weights).hexdigest()
    path.with_name(path.name + ".safetensors").write_bytes(weights)
    card = Card(name, None, spot_spec().keypoints, digest, lineage)
    path.with_name(path.name + ".json").write_bytes(json_bytes(card))
    return digest


def place(cache: Path, stage: str) -> Path:
    return cache / "stages" / f"{stage}-0123" / "network"


@pytest.fixture
def bundle(cache: Path, tmp_path: Path) -> Bundle:
    """A bundle whose network was trained, pruned, recovered and quantised, all of it in the cache."""
    curve = [{"pck_torso_0.2": 0.1}, {"pck_torso_0.2": FIGURES["train"], "loss": 3.0}]
    lineage: tuple[Lineage, ...] = (
        Lineage("train", {}, {"train": "t", "dev": "d"}, {"curve": curve, "best_epoch": 1}),
    )
    start = before = put(tmp_path / "mine", "fp32", lineage)
    put(cache / "modules" / "abc" / "network", "fp32", lineage)
    reports: dict[str, Any] = {"compile": {"stages": ["reference", *STAGES, "export", "engine-openvino"]}}
    for stage in STAGES:
        report: dict[str, Any] = {"dev": {"pck_torso_0.2": FIGURES[stage]}}
        if stage == "prune":
            report |= {"macs_before": 200, "macs_after": 80}
        lineage = (*lineage, Lineage(stage, {}, {"checkpoint": before, "dev": "d"}, report))
        before = put(place(cache, stage), stage, lineage)
        reports[stage] = {**report, "seconds": 1.5}
    draft = replace(
        spot_draft(tmp_path), chain={"dataset": "t", "checkpoint": start, "compressed": before}, reports=reports
    )
    return write_bundle(tmp_path / "spots.bundle", draft)


def names(links: tuple[Link, ...]) -> list[str]:
    return [link.name for link in links]


def drop(path: Path) -> None:
    for suffix in (".json", ".safetensors"):
        path.with_name(path.name + suffix).unlink()


def test_every_checkpoint_is_found_by_its_hash(bundle: Bundle, cache: Path) -> None:
    links = chain_of(bundle)
    assert names(links) == ["fp32", *STAGES]
    assert links[0].path == cache / "modules" / "abc" / "network"
    assert [link.path for link in links[1:]] == [place(cache, stage) for stage in STAGES]
    assert [link.recorded["pck_torso_0.2"] for link in links] == list(FIGURES.values())
    assert [link.macs for link in links] == [200, 80, 80, 80]
    assert not any(link.why for link in links)


def test_the_float_figures_are_metrics_only(bundle: Bundle) -> None:
    assert set(chain_of(bundle)[0].recorded) == {"pck_torso_0.2"}


def test_a_checkpoint_that_is_gone_leaves_a_reason_and_its_figures(bundle: Bundle, cache: Path) -> None:
    drop(place(cache, "recover"))
    links = chain_of(bundle)
    assert [link.path is None for link in links] == [False, False, True, False]
    assert "neither in the zoo nor in the cache" in links[2].why
    assert links[2].recorded == {"pck_torso_0.2": FIGURES["recover"]}
    assert links[2].digest


def test_a_checkpoint_may_be_handed_over(bundle: Bundle, cache: Path, tmp_path: Path) -> None:
    drop(cache / "modules" / "abc" / "network")
    assert chain_of(bundle)[0].path is None
    assert chain_of(bundle, given=[tmp_path / "mine"])[0].path == tmp_path / "mine"


@pytest.mark.parametrize("content", [b"", b"weights of pru", b"weights of other"])
def test_damaged_weights_are_not_taken_for_the_checkpoint(bundle: Bundle, cache: Path, content: bytes) -> None:
    place(cache, "prune").with_name("network.safetensors").write_bytes(content)
    link = chain_of(bundle)[1]
    assert link.path is None
    assert "damaged" in link.why


def test_half_a_card_is_no_checkpoint(bundle: Bundle, cache: Path) -> None:
    card = place(cache, "prune").with_name("network.json")
    card.write_bytes(card.read_bytes()[:100])
    assert [link.path is None for link in chain_of(bundle)] == [False, True, False, False]


def test_without_the_last_checkpoint_the_others_are_found_forwards(bundle: Bundle, cache: Path) -> None:
    drop(place(cache, "ptq"))
    links = chain_of(bundle)
    assert names(links) == ["fp32", *STAGES]
    assert [link.path is None for link in links] == [False, False, False, True]
    assert links[3].digest == bundle.manifest.chain["compressed"]


def test_another_checkpoint_of_the_same_stage_is_not_taken(bundle: Bundle, cache: Path) -> None:
    drop(place(cache, "ptq"))
    drop(place(cache, "prune"))
    start = bundle.manifest.chain["checkpoint"]
    other = Lineage("prune", {}, {"checkpoint": start}, {"dev": {"pck_torso_0.2": 0.1}})
    put(cache / "stages" / "prune-9999" / "network", "other", (other,))
    links = chain_of(bundle)
    assert [link.path is None for link in links] == [False, True, True, True]
    assert "nothing says which checkpoint it was" in links[1].why


def test_an_empty_cache_leaves_what_the_manifest_says(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", "/nonexistent")
    links = chain_of(bundle)
    assert names(links) == ["fp32", *STAGES]
    assert all(link.path is None and link.why for link in links)
    assert [dict(link.recorded) for link in links[1:]] == [{"pck_torso_0.2": FIGURES[stage]} for stage in STAGES]


def test_a_bundle_without_reports_has_its_float_checkpoint_only(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "bare.bundle", replace(spot_draft(tmp_path), chain={}, reports={}))
    (link,) = chain_of(bundle)
    assert (link.name, link.digest, link.path, dict(link.recorded)) == ("fp32", "", None, {})
    assert link.why


def test_stages_that_ran_twice_are_numbered(cache: Path, tmp_path: Path) -> None:
    lineage: tuple[Lineage, ...] = ()
    start = before = put(cache / "modules" / "abc" / "network", "fp32", ())
    for number, stage in enumerate(("prune", "recover", "prune", "recover")):
        lineage = (*lineage, Lineage(stage, {}, {"checkpoint": before}, {"dev": {"auc": number / 10}}))
        before = put(cache / "stages" / f"{stage}-{number}" / "network", f"{number}", lineage)
    draft = replace(spot_draft(tmp_path), chain={"checkpoint": start, "compressed": before}, reports={})
    links = chain_of(write_bundle(tmp_path / "twice.bundle", draft))
    assert names(links) == ["fp32", "prune", "recover", "prune 2", "recover 2"]
    assert all(link.path for link in links)
