"""`edgepose prune`: a plan is made, shown and replayed, and every wrong request is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from edgepose.blocks.card import Card, read_card
from edgepose.blocks.config import KPEConfig
from edgepose.bundle import read_bundle
from edgepose.cli import app_of
from edgepose.cli import prune as verb
from edgepose.recipe import Prune
from edgepose.spec import Keypoints
from edgepose.stages.settings import PruneStage
from tests.cli.conftest import Cli
from tests.tiny_network import forge

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = KPEConfig("narrow", (32, 32), 16, (16, 32, 32, 32), (1, 2, 1, 1), 32)
PLAIN = ("--ratio", "0.4", "--importance", "l2")
COMMANDS: dict[str, Any] = typer.main.get_command(app_of("prune")).commands  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network for spots, fresh."""
    from edgepose.blocks.checkpoint import save_checkpoint
    from edgepose.blocks.kpe import build

    path = tmp_path_factory.mktemp("narrow") / "narrow"
    keypoints = Keypoints(("blue", "red"))
    save_checkpoint(path, Card("narrow", CONFIG, keypoints, ""), build(CONFIG, keypoints).state_dict())
    return path


@pytest.fixture
def plan(cli: Cli, network: Path, tmp_path: Path) -> Path:
    assert cli("prune", "plan", network, *PLAIN, "--out", tmp_path / "plan.json").code == 0
    return tmp_path / "plan.json"


def planned(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_bytes())
    return content


# Help


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_its_flags_and_has_examples_that_parse(cli: Cli, name: str) -> None:
    outcome = cli("prune", name, "--help")
    assert outcome.code == 0
    assert f"  edgepose prune {name} " in outcome.out
    for parameter in COMMANDS[name].params:
        assert parameter.help, f"{parameter.name} has no help"
    examples = [line.split()[3:] for line in verb.EXAMPLES if line.startswith(f"edgepose prune {name} ")]
    for words in examples:
        COMMANDS[name].make_context(name, words).close()
    assert examples


def test_the_verb_lists_its_commands_and_wants_one(cli: Cli) -> None:
    outcome = cli("prune", "--help")
    assert outcome.code == 0
    assert all(re.search(rf"^  {name} ", outcome.out, re.MULTILINE) for name in COMMANDS)
    assert cli("prune").line == "edgepose prune: Missing command; see edgepose prune --help"
    assert "No such command 'plam'" in cli("prune", "plam").line


# plan, show, apply


def test_plan_show_and_apply_tell_the_same_story(cli: Cli, network: Path, plan: Path, tmp_path: Path) -> None:
    content = planned(plan)
    assert content["config"]["importance"] == "l2"
    assert content["config"]["round_to"] == 16  # of this-cpu
    shown = cli("prune", "show", plan)
    assert shown.code == 0
    for layer in content["layers"]:
        if layer["kind"] != "batch_norm":
            assert re.search(
                rf"^{re.escape(layer['name'])} .* {len(layer['kept'])} +{layer['out_channels']} ", shown.out, re.M
            )
    assert re.search(r"^whole network .* 100.0 %$", shown.out, re.MULTILINE)
    assert "block.head.x" in shown.out  # left alone, with the reason
    assert f"{content['macs_before'] / 1e6:.1f} → {content['macs_after'] / 1e6:.1f} MMAC" in shown.out

    told = json.loads(cli("prune", "show", plan, "--json").out)
    assert told["plan"] == content
    assert (
        sum(row["macs_after"] for row in told["rows"][:-1]) == content["macs_after"] == told["rows"][-1]["macs_after"]
    )
    assert sum(row["share"] for row in told["rows"][:-1]) == pytest.approx(1)

    out = tmp_path / "pruned"
    outcome = cli("prune", "apply", network, plan, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "--data DIR repairs them" in outcome.err
    card = read_card(out)
    assert card.plan == content
    assert [entry.stage for entry in card.lineage] == ["prune"]
    assert card.lineage[0].inputs.keys() == {"checkpoint", "plan"}
    assert card.lineage[0].inputs["checkpoint"] == read_card(network).weights_sha256
    assert card.lineage[0].report["macs_after"] == content["macs_after"]
    assert cli("prune", "show", out).out.splitlines()[1:] == shown.out.splitlines()[1:]


def test_a_plan_may_have_any_name_and_go_to_stdout(cli: Cli, network: Path, plan: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "half of it"
    renamed.write_bytes(plan.read_bytes())
    assert cli("prune", "show", renamed).out.splitlines()[1:] == cli("prune", "show", plan).out.splitlines()[1:]
    outcome = cli("prune", "plan", network, *PLAIN, "--out", "-")
    assert json.loads(outcome.out) == planned(plan)
    assert "whole network" in outcome.err


def test_people_repair_the_statistics_and_measure(cli: Cli, network: Path, people: Path, tmp_path: Path) -> None:
    outcome = cli(
        "prune", "plan", network, "--ratio", "0.3", "--depth", "1", "--data", people, "--out", tmp_path / "plan.json"
    )
    assert outcome.code == 0, outcome.err
    assert "1 blocks removed" in outcome.out
    content = planned(tmp_path / "plan.json")
    assert content["config"]["importance"] == "taylor"
    (block,) = content["blocks"]
    assert block["name"] in ("backbone.stages.0.0", "backbone.stages.1.1")
    assert f"{block['name']} (block removed)" in outcome.out
    for out, data in (("bare", ()), ("repaired", ("--data", people))):
        assert cli("prune", "apply", network, tmp_path / "plan.json", *data, "--out", tmp_path / out).code == 0
    bare, repaired = read_card(tmp_path / "bare"), read_card(tmp_path / "repaired")
    assert bare.weights_sha256 != repaired.weights_sha256
    assert repaired.lineage[0].inputs.keys() == {"checkpoint", "plan", "train", "dev"}
    assert "dev" in repaired.lineage[0].report
    assert repaired.lineage[0].report["blocks_removed"] == [block["name"]]


def test_flags_reach_the_plan(cli: Cli, network: Path, tmp_path: Path) -> None:
    layer = "backbone.stages.3.0.conv1.0"
    words = ("--layer", f"{layer}=0.5", "--protect", "backbone.stem.*", "--scope", "uniform", "--pattern", "2:4")
    more = ("--target", "jetson-orin-nano", "--target", "this-cpu", "--importance", "random", "--seed", "7")
    outcome = cli("prune", "plan", network, *words, *more[2:], "--out", tmp_path / "plan.json")
    assert outcome.code == 0, outcome.err
    assert "50% of backbone.stages.3.0.conv1.0, 2:4 sparse" in outcome.out
    content = planned(tmp_path / "plan.json")
    asked = {"ratio": 0, "ratios": {layer: 0.5}, "protected": ["backbone.stem.*"], "scope": "uniform"}
    assert content["config"].items() >= {**asked, "importance": "random", "seed": 7, "pattern": "2:4"}.items()
    assert {entry["name"]: len(entry["kept"]) for entry in content["layers"]}[layer] == 16
    assert "backbone.stem.2.0" not in content["sparse"]
    assert "layers 2:4 sparse" in outcome.out
    refused = cli("prune", "plan", network, *words, *more, "--out", tmp_path / "other.json")
    assert "steps of 32" in refused.line  # half of 32 channels is nothing to a target that wants 32


def test_a_recipe_gives_the_settings_and_flags_win(cli: Cli, network: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ndescription: Mine.\nseed: 3\nprune:\n  speedup: 2\n  importance: fpgm\n  steps: 2\n"
        "  epochs: 2\n  ratios:\n    backbone.stages.3.0.conv1.0: 0.5\n"
    )
    aimed = cli("prune", "plan", network, "--recipe", tmp_path / "mine.yaml", "--out", tmp_path / "plan.json")
    assert aimed.code == 2
    assert "to be 2 x as fast" in aimed.line
    words = ("--recipe", tmp_path / "mine.yaml", "--ratio", "0.4", "--out", tmp_path / "plan.json")
    outcome = cli("prune", "plan", network, *words)
    assert outcome.code == 0, outcome.err
    assert "prunes in 2 steps; this plan does it in one" in outcome.err
    wanted = {"importance": "fpgm", "seed": 3, "ratio": 0.4, "ratios": {"backbone.stages.3.0.conv1.0": 0.5}}
    assert planned(tmp_path / "plan.json")["config"].items() >= wanted.items()
    fp32 = ("--recipe", "fp32", "--out", tmp_path / "other.json")
    assert "no prune section" in cli("prune", "plan", network, *fp32).line


def test_a_pruned_network_can_be_pruned_again(cli: Cli, network: Path, tmp_path: Path) -> None:
    plans = []
    for number, (source, stage) in enumerate(((network, 3), (tmp_path / "0", 2))):
        plans.append(tmp_path / f"{number}-plan.json")
        words = ("--layer", f"backbone.stages.{stage}.0.conv1.0=0.5", "--importance", "l1", "--out", plans[-1])
        assert cli("prune", "plan", source, *words).code == 0
        assert cli("prune", "apply", source, plans[-1], "--out", tmp_path / f"{number}").code == 0
    first, second = (planned(path) for path in plans)
    card = read_card(tmp_path / "1")
    assert [entry.stage for entry in card.lineage] == ["prune", "prune"]
    assert card.plan is not None
    assert first["macs_after"] == second["macs_before"]
    assert (card.plan["macs_before"], card.plan["macs_after"]) == (first["macs_before"], second["macs_after"])
    assert "stages.3.0.conv1.0" in cli("prune", "show", tmp_path / "1").out


def test_a_bundle_shows_the_plan_it_was_compiled_by(cli: Cli, bundle: Path, plan: Path) -> None:
    assert "was not pruned" in cli("prune", "show", bundle).line
    manifest = read_bundle(bundle).manifest
    forge(read_bundle(bundle), reports={**manifest.reports, "compile": {"plan": planned(plan)}})
    assert cli("prune", "show", bundle).out.splitlines()[1:] == cli("prune", "show", plan).out.splitlines()[1:]


# Refused


def test_wrong_requests_are_one_line_each_and_leave_nothing(
    cli: Cli, network: Path, plan: Path, people: Path, tmp_path: Path
) -> None:
    out = ("--out", tmp_path / "out.json")
    for words, expected in (
        ((), "none of ratio"),
        (("--ratio", "1.5"), "--ratio: found 1.5, expected `float` < 1.0"),
        (
            ("--scope", "wide", *PLAIN),
            "--scope: found wide, expected one of its choices; see edgepose prune plan --help",
        ),
        (("--ratio", "0.5"), "importance taylor without data, expected training people"),
        (("--depth", "1", "--importance", "l2"), "depth without data"),
        ((*PLAIN, "--data", people), "does not look at"),
        ((*PLAIN, "--layer", "stem"), "expected PATTERN=FRACTION"),
        ((*PLAIN, "--layer", "a=0.1", "--layer", "a=0.2"), "the same pattern again"),
        ((*PLAIN, "--protect", "backbone.stam.*"), "did you mean"),
        ((*PLAIN, "--importance", "tailor"), "tailor"),
        ((*PLAIN, "--target", "toaster"), "toaster"),
    ):
        outcome = cli("prune", "plan", network, *words, *out)
        assert outcome.code == 2, words
        assert expected in outcome.line
        assert not (tmp_path / "out.json").exists()
    assert "a file that is there" in cli("prune", "plan", network, *PLAIN, "--out", plan).line
    assert "the input itself" in cli("prune", "apply", network, plan, "--out", network).line
    assert "a file that is there" in cli("prune", "plan", network, *PLAIN, "--out", plan).line


def test_plans_that_are_none_or_for_another_network_are_refused(
    cli: Cli, network: Path, plan: Path, tmp_path: Path
) -> None:
    (tmp_path / "no.json").write_text("{}")
    for words in (("show", tmp_path / "no.json"), ("apply", network, tmp_path / "no.json", "--out", tmp_path / "x")):
        assert "found no pruning plan" in cli("prune", *words).line
    other = planned(plan)
    layer = next(entry for entry in other["layers"] if entry["kind"] == "conv" and len(entry["kept"]) > 1)
    gone = next(number for number in range(layer["out_channels"]) if number not in layer["kept"])
    layer["kept"] = sorted([*layer["kept"][1:], gone])
    (tmp_path / "changed.json").write_text(json.dumps(other))
    assert (
        "outputs that differ" in cli("prune", "apply", network, tmp_path / "changed.json", "--out", tmp_path / "x").line
    )
    assert "No such file" in cli("prune", "apply", network, tmp_path / "nix.json", "--out", tmp_path / "x").line
    assert "kpe-t" in cli("prune", "show", "kpe-t").line
    outcome = cli("prune", "apply", "kpe-t", plan, "--out", tmp_path / "x")
    assert outcome.code == 2
    assert "pruning plan" in outcome.line
    assert not (tmp_path / "x.json").exists()


def test_what_a_plan_can_be_asked_for_is_what_a_recipe_can_ask_for() -> None:
    flags = {parameter.name for parameter in COMMANDS["plan"].params}
    criteria = set(PruneStage.__struct_fields__) - {"speedup", "target_latency_ms"}
    assert criteria - {"round_to", "ratios", "protected"} <= flags  # --target, --layer, --protect
    assert criteria - {"round_to", "seed"} <= set(Prune.__struct_fields__)
    assert msgspec.structs.asdict(Prune(0.5))["pattern"] is None
