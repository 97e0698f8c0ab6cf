"""Gate rules: those that come with edgepose load, and rules that contradict themselves do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepose.errors import RecipeError
from edgepose.profiler.gate.rules import load_rules, protocol_of
from edgepose.profiles import profile_names


@pytest.mark.parametrize("name", profile_names("gates"))
def test_rules_that_come_with_edgepose_load_under_their_own_name(name: str) -> None:
    rules = load_rules(name)
    assert rules.name == name
    assert rules.description
    assert rules.accuracy
    assert rules.latency is not None


def test_default_and_quick_rules_exist() -> None:
    assert {"default", "ci-quick"} <= set(profile_names("gates"))


def test_the_first_look_sets_the_protocol() -> None:
    latency = load_rules("default").latency
    assert latency is not None
    protocol = protocol_of(latency, threads=2, batch=3, seed=4)
    assert (protocol.pairs, protocol.blocks, protocol.threads, protocol.batch, protocol.seed) == (6, 40, 2, 3, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\naccuracy: [{metric: pck_torsoo_0.2}]", "accuracy"),
        ("name: x\naccuracy: [{metric: mpjpe_px}]", "pck_torso_0.2"),
        ("name: x\naccuracy: [{fail_above_points: 2, pass_below_points: 1}]", "fail_above_points"),
        ("name: x\naccuracy: [{pass_below_points: 6}]", "widest_pass_points"),
        ("name: x\nlatency: {fail_above: 0.1}", "fail_above"),
        ("name: x\nlatency: {looks: [6, 6]}", "looks"),
        ("name: x\nlatency: {looks: []}", "looks"),
        ("name: x\nlatency: {alpha: 0.7}", "alpha"),
        ("name: x\nlimits: [{metric: colour, fail_above: 1}]", "engine_bytes"),
        ("name: x\nlimits: [{metric: nodes., fail_above: 1}]", "nodes"),
        ("name: x\nlimits: [{metric: macs, fail_above: 1, fail_above_absolute: -1}]", "fail_above_absolute"),
        ("name: x\nlatncy: {}", "latency"),
    ],
)
def test_rules_that_make_no_sense_are_refused_by_field(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=message):
        load_rules(str(path))
