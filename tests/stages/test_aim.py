"""Aiming at a latency on a small network: engines are built for real, and a clock that knows the answer times them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import onnx
import pytest
import torch

from edgepose.blocks.card import Card, Lineage, read_card
from edgepose.blocks.checkpoint import load_checkpoint, save_checkpoint
from edgepose.blocks.config import spec_of
from edgepose.cli.compile import show_latency
from edgepose.compiler import CompileRequest, compile_bundle, planned_stages
from edgepose.compress.fold import fold_batch_norms
from edgepose.compress.plan import plan_from_json
from edgepose.errors import BackendUnavailable, RecipeError
from edgepose.host import fingerprint
from edgepose.profiles import load_target
from edgepose.recipe import Prune, Recipe
from edgepose.spec import Target
from edgepose.stages import aim as aiming
from edgepose.stages.aim import Run, aim
from edgepose.stages.assemble import EngineOrder, engine_orders
from edgepose.stages.cache import StageResult
from edgepose.stages.compress import NETWORK, prune
from edgepose.stages.latency import (
    PLAN,
    STAIR_COLUMNS,
    Contender,
    Form,
    Staircase,
    Stopwatch,
    form_of,
    measure_achieved,
    stair_rows,
    staircase_of,
)
from edgepose.stages.people import StageData
from edgepose.stages.settings import Plan, PruneStage, QuantiseStage
from edgepose.timing.turns import time_in_turns
from tests.stages.size_clock import SizeClock
from tests.tiny_checkpoint import Tiny, Watch, environment
from tests.training.dots import KEYPOINTS, dots, network
from tests.training.dots import NETWORK as SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = msgspec.structs.replace(SMALL, widths=(16, 16, 32, 32))
FORM = Form("this-cpu", "onnxruntime", 1, 18, "fp32")
TWICE = PruneStage(None, "l1", "global", 4, (), 0, speedup=2.0)


def silent(_what: str, _done: int, _total: int) -> None:
    pass


@dataclass(frozen=True)
class Ready:
    """A checkpoint, people, and the weights of its ONNX file."""

    source: Path
    data: StageData
    clock: Callable[[], SizeClock]

    @property
    def cache(self) -> Path:
        """One for all tests: shapes are built once."""
        return self.source.parent / "cache"

    def stages(self, name: str) -> set[str]:
        return {path.name for path in (self.cache / "stages").glob(f"{name}-*")}


@dataclass(frozen=True)
class First:
    """The first search of all, which was interrupted and went on; what the tests find in the cache it has built.

    Attributes:
        ready: What was searched.
        looks: How often anything was timed, before and after.
        begun: Shapes in the cache when it was interrupted.
        built: Shapes in the end.
        timed: Timings in the end.
        found: What it came to.
    """

    ready: Ready
    looks: tuple[int, int]
    begun: set[str]
    built: set[str]
    timed: set[str]
    found: Staircase


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> First:
    folder = tmp_path_factory.mktemp("aim")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = StageData(dots(folder, "train", 12, seed=1), dots(folder, "dev", 4, seed=2))
    model = network(WIDE)
    card = Card("dots", WIDE, KEYPOINTS, "", lineage=(Lineage("train", {}, data.digests, {}),))
    save_checkpoint(folder / "net", card, model.state_dict())
    whole = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    ready = Ready(folder / "net", data, lambda: SizeClock(whole))
    with environment(EDGEPOSE_CACHE=str(ready.cache)):
        stopped, rest = ready.clock(), ready.clock()
        stopped.fails_after = 1
        with pytest.raises(KeyboardInterrupt):
            search(ready, stopped, folder / "a")
        begun = ready.stages("shape")
        found = search(ready, rest, folder / "b")
    looks = len(stopped.seen), len(rest.seen)
    return First(ready, looks, begun, ready.stages("shape"), ready.stages("timing"), found)


@pytest.fixture
def ready(first: First, monkeypatch: pytest.MonkeyPatch) -> Ready:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(first.ready.cache))
    return first.ready


def search(ready: Ready, clock: SizeClock, folder: Path, settings: PruneStage = TWICE, form: Form = FORM) -> Staircase:
    folder.mkdir(exist_ok=True)
    return staircase_of(aim(ready.source, ready.data, settings, form, Run(folder, clock, silent)))


def test_what_was_built_and_timed_is_found_again(first: First, ready: Ready, tmp_path: Path) -> None:
    clock = ready.clock()
    assert search(ready, clock, tmp_path) == first.found
    assert clock.seen == []
    assert first.looks[0] == 1
    assert sum(first.looks) == len(first.timed)
    assert first.begun
    assert first.begun < first.built
    assert len(first.built) == len(first.found.stairs) + 1  # and the unpruned network


def test_the_shape_that_is_found_is_as_fast_as_asked(ready: Ready, tmp_path: Path) -> None:
    clock = ready.clock()
    found = search(ready, clock, tmp_path)
    (chosen,) = [stair for stair in found.stairs if stair.chosen]
    assert abs(found.predicted.speedup / 2 - 1) < 0.1
    assert chosen.timing == found.predicted == found.total
    assert chosen.timing.pairs == 6
    assert len(found.stairs) < min(found.shapes, 12)
    assert 0 < chosen.macs_left < 1
    assert found.ratio == chosen.ratio
    plan = plan_from_json((tmp_path / PLAN).read_bytes())
    assert plan.macs_after == chosen.macs
    assert (tmp_path / found.unpruned).is_file()
    assert [stair.macs for stair in found.stairs] == sorted((s.macs for s in found.stairs), reverse=True)
    assert all(sum(stair.kept.values()) == stair.channels for stair in found.stairs)
    rows = stair_rows(found)
    assert all(len(row) == len(STAIR_COLUMNS) for row in rows)
    assert [row[-1] for row in rows].count("taken") == 1


def test_equal_shapes_are_one_shape_whatever_the_weights(ready: Ready, tmp_path: Path) -> None:
    search(ready, ready.clock(), tmp_path / "a")
    other = network(WIDE, seed=0)
    for tensor in other.parameters():
        tensor.data.mul_(1.01)
    card = read_card(ready.source)
    save_checkpoint(tmp_path / "other", card, other.state_dict())
    clock = ready.clock()
    (tmp_path / "b").mkdir()
    report = aim(tmp_path / "other", ready.data, TWICE, FORM, Run(tmp_path / "b", clock, silent))
    assert clock.seen == []
    assert report["predicted"]["speedup"] > 1


def test_a_network_without_linear_layers_is_another_shape_at_another_size() -> None:
    keys = []
    for hw in ((64, 64), (96, 96)):
        config = msgspec.structs.replace(WIDE, input_hw=hw, head="heatmap")
        keys.append(aiming.shape_key(fold_batch_norms(network(config)), spec_of(config, KEYPOINTS), FORM))
    assert keys[0].inputs == keys[1].inputs  # layer by layer they are the same
    assert keys[0].digest != keys[1].digest
    renamed = msgspec.structs.replace(spec_of(config, KEYPOINTS), name="another")
    on_four = msgspec.structs.replace(FORM, target="elsewhere", threads=4)
    assert aiming.shape_key(fold_batch_norms(network(config)), renamed, on_four).digest == keys[1].digest


def test_pruning_takes_the_very_shape_that_was_timed(ready: Ready, tmp_path: Path) -> None:
    found = search(ready, ready.clock(), tmp_path / "aim")
    result = StageResult("aim", "key", str(tmp_path / "aim"), msgspec.to_builtins(found), 0.0)
    settings = msgspec.structs.replace(TWICE, ratio=found.ratio)
    report = prune(ready.source, ready.data, settings, tmp_path, search=result)
    (chosen,) = [stair for stair in found.stairs if stair.chosen]
    assert report["macs_after"] == chosen.macs
    assert staircase_of(report["latency"]) == found
    entry = read_card(tmp_path / NETWORK).lineage[-1]
    assert entry.config["ratio"] == found.ratio
    assert msgspec.convert(entry.config, PruneStage).asked == TWICE
    assert load_checkpoint(tmp_path / NETWORK).card.plan is not None


def test_a_quantised_recipe_is_timed_in_its_quantised_form(ready: Ready, tmp_path: Path) -> None:
    clock = ready.clock()
    form = msgspec.structs.replace(FORM, precision="int8")
    found = search(ready, clock, tmp_path, form=form)
    assert found.original != found.unpruned
    assert abs(found.predicted.speedup / 2 - 1) < 0.1
    assert found.total.speedup == pytest.approx(3 * found.predicted.speedup, rel=0.1)
    operators = {node.op_type for node in onnx.load(tmp_path / found.unpruned).graph.node}
    assert "QuantizeLinear" in operators
    assert "QuantizeLinear" not in {node.op_type for node in onnx.load(tmp_path / found.original).graph.node}


def test_milliseconds_become_a_speed_up_over_what_is_there(ready: Ready, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(TWICE, speedup=None, target_latency_ms=0.5)
    found = search(ready, ready.clock(), tmp_path, settings)
    assert found.target_latency_ms == 0.5
    assert found.asked_speedup == pytest.approx(2.0, rel=0.05)
    assert abs(found.predicted.ms / 0.5 - 1) < 0.12
    assert "0.5 ms" in found.goal


def test_a_goal_out_of_reach_names_the_fastest_shape(ready: Ready, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(TWICE, speedup=9.0)
    with pytest.raises(RecipeError, match=r"prune.speedup: found 9, expected at most [1-8]\.\d+, .*MMAC.*ms"):
        search(ready, ready.clock(), tmp_path, settings)
    settings = msgspec.structs.replace(TWICE, speedup=None, target_latency_ms=0.1)
    with pytest.raises(RecipeError, match=r"prune.target_latency_ms: found 0.1, .*at least 0\.\d+ ms"):
        search(ready, ready.clock(), tmp_path, settings)
    assert not (tmp_path / PLAN).exists()


def test_a_goal_that_is_reached_already_is_refused(ready: Ready, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(TWICE, speedup=None, target_latency_ms=5.0)
    with pytest.raises(RecipeError, match=r"less than the .* ms that the unpruned network takes"):
        search(ready, ready.clock(), tmp_path, settings)


def test_a_network_that_nothing_can_be_removed_from_is_refused(ready: Ready, tmp_path: Path) -> None:
    settings = msgspec.structs.replace(TWICE, protected=("*",))
    with pytest.raises(RecipeError, match="all that can be removed"):
        search(ready, ready.clock(), tmp_path, settings)


# The end


def test_the_finished_engine_is_held_against_what_was_asked(ready: Ready, tmp_path: Path) -> None:
    clock = ready.clock()
    form = msgspec.structs.replace(FORM, precision="int8")
    found = search(ready, clock, tmp_path, form=form)
    result = StageResult("aim", "key", str(tmp_path), msgspec.to_builtins(found), 0.0)
    # The finished engine turns out to be the unpruned one: twice as slow as predicted.
    engine = {"main": found.unpruned, "precision": "int8"}
    finished = StageResult("engine-onnxruntime", "engine", str(tmp_path), engine, 0.0)
    achieved = measure_achieved(result, finished, clock, silent)
    assert achieved.achieved.speedup == pytest.approx(1.0, abs=0.05)
    assert achieved.error == pytest.approx(-0.5, abs=0.03)
    assert achieved.total.speedup == pytest.approx(3.0, abs=0.2)
    assert "asked for 2.00 x: predicted" in achieved.text
    assert "achieved 1.0" in achieved.text or "achieved 0.9" in achieved.text


def test_real_engines_are_timed_in_real_processes(ready: Ready, tmp_path: Path) -> None:
    """The stopwatch of every day, once: a pair of processes in ONNX Runtime, and never again for the same engines."""
    found = search(ready, ready.clock(), tmp_path)
    unpruned = Contender("unpruned", "real unpruned", tmp_path / found.unpruned, "fp32")
    same = Contender("the same again", "real again", tmp_path / found.original, "fp32")
    told: list[tuple[str, int, int]] = []
    watch = Stopwatch(FORM, time_in_turns, lambda *words: told.append(words))
    timing = watch.time(unpruned, same, 1)
    assert timing.pairs == 1
    assert 0 < timing.low <= timing.speedup <= timing.high
    assert told == [("the same again", 0, 1), ("the same again", 1, 1)]
    explodes = ready.clock()
    explodes.fails_after = 0
    assert Stopwatch(FORM, explodes, silent).time(unpruned, same, 1) == timing


# What is aimed at


def order(name: str = "here", **changes: object) -> EngineOrder:
    fields = {"description": "", "backends": ("onnxruntime",), "precisions": ("fp32", "int8"), **changes}
    return EngineOrder(Target(name, **fields), "onnxruntime", 7)  # type: ignore[arg-type]


def test_the_form_is_that_of_the_finished_engine() -> None:
    floats = Plan(TWICE, None, None)
    quantised = Plan(TWICE, None, QuantiseStage(10, True, ("head",), 0))
    assert form_of(floats, [order(threads=3)], 18) == Form("here", "onnxruntime", 3, 18, "fp32")
    found = form_of(quantised, [order(threads=3)], 19)
    assert found == Form("here", "onnxruntime", 3, 19, "int8", 7, True, ("head",))
    assert found.in_float == Form("here", "onnxruntime", 3, 19, "fp32")


def test_the_first_target_that_can_be_timed_here_is_aimed_at() -> None:
    here = msgspec.structs.replace(fingerprint(), gpus=())
    jetson = order("jetson", compute_capability="8.7")
    assert form_of(Plan(TWICE, None, None), [jetson, order()], 18, here).target == "here"
    with pytest.raises(BackendUnavailable, match=r"jetson in onnxruntime: for a GPU of .*8\.7.*give a ratio instead"):
        form_of(Plan(TWICE, None, None), [jetson], 18, here)


def test_the_targets_that_come_along_are_told_apart() -> None:
    form = form_of(Plan(TWICE, None, None), engine_orders([load_target("this-cpu")]), 18)
    assert (form.target, form.backend) == ("this-cpu", "onnxruntime")
    with pytest.raises(BackendUnavailable):
        form_of(Plan(TWICE, None, None), engine_orders([load_target("jetson-orin-nano")]), 18)


def test_settings_of_old_checkpoints_mean_what_they_meant() -> None:
    old = {"ratio": 0.5, "importance": "taylor", "scope": "global", "round_to": 16, "protected": [], "seed": 0}
    settings = msgspec.convert(old, PruneStage)
    assert settings == PruneStage(0.5, "taylor", "global", 16, (), 0)
    assert settings.asked == settings
    assert not settings.aimed
    assert aiming.PLAN == PLAN


def test_pruning_in_steps_ends_at_the_ratio_that_was_found() -> None:
    asked = Plan(TWICE, None, None, steps=3)
    found = asked.at_ratio(0.6)
    assert [step.prune.ratio for step in asked.pruning] == [None] * 3
    assert [step.prune.ratio for step in found.pruning] == pytest.approx([1 - 0.4 ** (1 / 3), 1 - 0.4 ** (2 / 3), 0.6])
    assert [step.prune.asked for step in found.pruning] == [step.prune for step in asked.pruning]


# From recipe to bundle


def test_a_recipe_with_a_speed_up_becomes_a_bundle_that_says_what_came_of_it(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    target = tmp_path / "ort.yaml"
    target.write_text(
        "name: ort\ndescription: d\nbackends: [onnxruntime]\nprecisions: [fp32]\nround_to: 8\nthreads: 1\n"
    )
    recipe = Recipe("aimed", "d", prune=Prune(speedup=1.4, importance="l1", epochs=0), targets=(str(target),))
    whole = sum(t.numel() for t in load_checkpoint(tiny.checkpoint).tensors.values() if t.dim() > 1)
    request = CompileRequest(recipe, str(tiny.checkpoint), tiny.data, tmp_path / "aimed.bundle")
    planned = dict(planned_stages(request))
    assert "timed in fp32 in onnxruntime" in planned["aim"]
    assert planned["prune"] == "to be 1.4 x as fast, by l1"
    watch = Watch()
    result = compile_bundle(request, watch, timer=SizeClock(whole))
    assert [name for name in watch.ran if name in ("reference", "aim", "prune", "latency")] == [
        "reference", "aim", "prune", "latency"
    ]  # fmt: skip
    reports = result.bundle.manifest.reports
    staircase = staircase_of(reports["prune"]["latency"])
    assert "aim" not in reports
    assert abs(reports["latency"]["achieved"]["speedup"] / staircase.predicted.speedup - 1) < 0.05
    assert abs(reports["latency"]["error"]) < 0.1
    show_latency(reports)
    shown = capsys.readouterr().out
    assert "1.40 x as fast as unpruned: shapes timed in onnxruntime fp32 on 1 threads" in shown
    assert "taken" in shown
    assert "asked for 1.40 x: predicted" in shown
    # Again: everything is found, and nothing is timed.
    broken = SizeClock(whole, fails_after=0)
    again = compile_bundle(request, Watch(), timer=broken)
    assert again.reused
    # The checkpoint carries the goal, not only the ratio that was found here: another machine takes it as it is.
    (pruned,) = [stage for stage in result.stages if stage.stage == "prune"]
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "other"))
    elsewhere = replace(request, model=str(pruned.path / NETWORK))
    assert planned_stages(elsewhere)[0] == ("prune", "reused from a checkpoint that went through it")
