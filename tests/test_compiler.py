"""From a checkpoint to a bundle: every recipe for real, found again when nothing changed, refused before any work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgepose.blocks import zoo
from edgepose.blocks.card import Card, Lineage, read_card
from edgepose.blocks.checkpoint import load_checkpoint
from edgepose.bundle import check_engine, read_bundle, verify_bundle, write_bundle
from edgepose.compiler import CompileRequest, compile_bundle, planned_stages
from edgepose.data.coco import dataset
from edgepose.data.splits import split_train
from edgepose.errors import (
    AccuracyRegression,
    AnnotationError,
    BackendUnavailable,
    CheckpointError,
    EdgeposeError,
    MissingDependency,
    UsageError,
)
from edgepose.golden import check_golden
from edgepose.host import fingerprint
from edgepose.profiles import load_target, profile_names
from edgepose.recipe import QuantisationAware, Recipe
from edgepose.runtime import open_session
from edgepose.stages import assemble
from edgepose.stages.budget import check_budget, check_metric
from edgepose.stages.cache import StageResult
from tests.cli.conftest import write_people
from tests.tiny_checkpoint import Compiled, Tiny, Watch, quick, subprocess_environment
from tests.tiny_network import spot_draft

REPOSITORY = Path(__file__).resolve().parents[1]
ENGINES = ["engine-onnxruntime", "engine-openvino"]
STAGES = {
    "fp32": ["export", *ENGINES, "accuracy"],
    "ptq-int8": ["reference", "ptq", "export", *ENGINES, "accuracy"],
    "qat-int8": ["reference", "qat", "export", *ENGINES, "accuracy"],
    "prune-qat-int8": ["reference", "prune", "recover", "qat", "export", *ENGINES, "accuracy"],
}


@pytest.fixture(autouse=True)
def cache(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache in which the shared compiles left their stages."""
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tiny.cache))
    return tiny.cache


@pytest.fixture
def own_cache(tiny: Tiny, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, with all that ptq-int8 needs, that a test may spoil."""
    compiled("ptq-int8")
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    return Path(shutil.copytree(tiny.cache, tmp_path / "cache"))


def request_of(tiny: Tiny, recipe: Recipe, out: Path, **changes: object) -> CompileRequest:
    fields = {"model": f"{tiny.checkpoint}", "data": tiny.data, **changes}
    return CompileRequest(recipe, out=out, **fields)  # type: ignore[arg-type]


def hidden_files(folder: Path) -> list[Path]:
    """What atomic writes would leave if they left anything."""
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def refused(request: CompileRequest, error: type[EdgeposeError], match: str) -> EdgeposeError:
    """The error that a compile ends with before any stage was looked at, with nothing at `out` that was not there."""
    watch, before = Watch(), request.out.exists()
    with pytest.raises(error, match=match) as caught:
        compile_bundle(request, watch)
    assert watch.begun == []
    assert request.out.exists() == before
    return caught.value


# Every recipe, for real


@pytest.mark.parametrize("name", profile_names("recipes"))
def test_a_recipe_makes_a_bundle_whose_engines_answer_as_recorded(name: str, compiled: Compiled) -> None:
    result = compiled(name)
    assert [stage.stage for stage in result.stages] == STAGES[name]
    bundle = verify_bundle(result.bundle.root)
    assert bundle.manifest.name == bundle.manifest.spec.name == f"tiny-{name}"
    assert [engine.backend for engine in bundle.manifest.engines] == ["onnxruntime", "openvino"]
    for engine in bundle.manifest.engines:
        assert engine.target == "this-cpu"
        assert engine.precision == ("fp32" if name == "fp32" else "int8")
        assert fingerprint().libraries[engine.backend] in engine.builder
        session = open_session(check_engine(bundle, engine), engine.backend, threads=1, precision=engine.precision)
        check = check_golden(bundle, engine, session)
        session.close()
        assert check is not None
        assert check.differences.keys() == {"simcc_x", "simcc_y", "keypoints_px"}


@pytest.mark.parametrize("name", profile_names("recipes"))
def test_the_chain_leads_from_the_people_to_the_engines(name: str, tiny: Tiny, compiled: Compiled) -> None:
    chain = compiled(name).bundle.manifest.chain
    assert chain["dataset"] == split_train(dataset(tiny.data, "train"))[0].digest
    assert chain["checkpoint"] == read_card(tiny.checkpoint).weights_sha256
    assert ("compressed" in chain) == (name != "fp32")
    assert ("plan" in chain) == name.startswith("prune")
    assert {"onnx", "engine:engines/this-cpu/onnxruntime/model.onnx"} <= chain.keys()


def test_reports_say_what_each_stage_did(compiled: Compiled) -> None:
    reports = compiled("prune-qat-int8").bundle.manifest.reports
    assert reports["prune"]["macs_after"] < 0.75 * reports["prune"]["macs_before"]
    assert len(reports["recover"]["curve"]) == len(reports["qat"]["curve"]) == 1
    assert reports["qat"]["calibration_people"] == 32
    assert reports["engines/this-cpu/onnxruntime"]["int8_share"] == 1.0
    assert reports["engines/this-cpu/openvino"]["int8_share"] == 1.0
    assert reports["compile"]["stages"] == STAGES["prune-qat-int8"]
    assert reports["compile"]["recipe"]["name"] == "prune-qat-int8"


def test_every_form_of_the_network_is_measured_on_the_same_people(compiled: Compiled) -> None:
    for name in ("fp32", "ptq-int8"):
        reports = compiled(name).bundle.manifest.reports
        figures = reports["accuracy"]["figures"]
        assert list(figures) == ["torch", "exported", "engines/this-cpu/onnxruntime", "engines/this-cpu/openvino"]
        assert reports["accuracy"]["people"] == 4
        if name != "fp32":
            assert figures["torch"] == reports["ptq"]["dev"]
        gaps = reports["accuracy"]["gaps"]
        assert set(gaps) == set(figures) - {"torch"}
        for form, row in gaps.items():
            points = 100 * (figures[form]["pck_torso_0.2"] - figures["torch"]["pck_torso_0.2"])
            assert row["pck_torso_0.2"] == pytest.approx(points)


def test_both_kinds_of_activations_are_calibrated_and_compared(compiled: Compiled) -> None:
    report = compiled("ptq-int8").bundle.manifest.reports["ptq"]
    sides = report["activations"]
    assert sides["chosen"] == "asymmetric"
    assert sides["asymmetric"] == report["dev"]
    points = 100 * (sides["asymmetric"]["pck_torso_0.2"] - sides["symmetric"]["pck_torso_0.2"])
    assert sides["symmetric_costs_points"]["pck_torso_0.2"] == pytest.approx(points)


def test_protected_layers_do_not_count_against_the_least_share_of_integers(
    tiny: Tiny, compiled: Compiled, tmp_path: Path
) -> None:
    compiled("ptq-int8")
    recipe = quick("ptq-int8")
    assert recipe.quantise is not None
    protected = msgspec.structs.replace(recipe.quantise, protected=("backbone.stem",), min_int8_macs=1.0)
    request = request_of(tiny, msgspec.structs.replace(recipe, quantise=protected), tmp_path / "fine.bundle")
    report = compile_bundle(request, Watch()).bundle.manifest.reports["engines/this-cpu/onnxruntime"]
    assert report["int8_share"] < 1.0 == report["int8"]["asked_share"]
    assert {layer["layer"].split(".")[0] for layer in report["int8"]["float_layers"]} == {"backbone"}


# Reuse


def test_a_rerun_reuses_everything(tiny: Tiny, compiled: Compiled) -> None:
    first, watch = compiled("ptq-int8"), Watch()
    again = compile_bundle(request_of(tiny, quick("ptq-int8"), first.bundle.root), watch)
    assert again.reused
    assert again.bundle.digest == first.bundle.digest
    assert watch.reused == STAGES["ptq-int8"]
    assert watch.ran == []


_RERUN = """
import sys
from pathlib import Path
from edgepose.compiler import CompileRequest, compile_bundle
from tests.tiny_checkpoint import Watch, quick
model, data, out = sys.argv[1:]
result = compile_bundle(CompileRequest(quick("ptq-int8"), model, Path(data), Path(out)), Watch())
heavy = {"torch", "onnx", "onnxruntime", "openvino", "nncf", "scipy"} & set(sys.modules)
sys.exit(f"reused {result.reused}, loaded {heavy}" if heavy or not result.reused else 0)
"""


def test_a_rerun_loads_no_builder(tiny: Tiny, compiled: Compiled) -> None:
    words = [str(tiny.checkpoint), str(tiny.data), str(compiled("ptq-int8").bundle.root)]
    ended = subprocess.run(
        [sys.executable, "-c", _RERUN, *words],
        cwd=REPOSITORY, env=subprocess_environment(tiny.cache), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


def test_another_target_repeats_the_engines_only(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    first, watch = compiled("ptq-int8"), Watch()
    recipe = msgspec.structs.replace(quick("ptq-int8"), targets=("x86-cpu", "this-cpu"))
    result = compile_bundle(request_of(tiny, recipe, tmp_path / "both.bundle"), watch)
    assert watch.reused[:3] == ["reference", "ptq", "export"]
    assert watch.ran == [stage for stage in watch.ran if stage.startswith("engine-")] + ["accuracy"]
    reports = result.bundle.manifest.reports
    assert reports["engines/x86-cpu/onnxruntime"]["weight_bits"] == 7
    assert reports["engines/this-cpu/onnxruntime"] == first.bundle.manifest.reports["engines/this-cpu/onnxruntime"]
    # The network itself keeps its eight bits, whichever target comes first.
    assert result.bundle.manifest.chain["onnx"] == first.bundle.manifest.chain["onnx"]


def test_the_network_of_a_bundle_is_quantised_without_onnx_runtime_too(
    tiny: Tiny, compiled: Compiled, tmp_path: Path
) -> None:
    first = compiled("ptq-int8")
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ndescription: OpenVINO alone.\nbackends: [openvino]\nprecisions: [fp32, int8]\n"
    )
    recipe = msgspec.structs.replace(quick("ptq-int8"), targets=(str(tmp_path / "mine.yaml"),))
    result = compile_bundle(request_of(tiny, recipe, tmp_path / "mine.bundle"), Watch())
    assert result.bundle.manifest.chain["onnx"] == first.bundle.manifest.chain["onnx"]
    assert [stage.stage for stage in result.stages if not stage.reused] == ["accuracy"]


def test_another_setting_repeats_what_comes_after_it(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    compiled("ptq-int8")
    recipe, watch = quick("ptq-int8"), Watch()
    assert recipe.quantise is not None
    fewer = msgspec.structs.replace(recipe.quantise, calibration_images=8)
    request = request_of(tiny, msgspec.structs.replace(recipe, quantise=fewer), tmp_path / "fewer.bundle")
    result = compile_bundle(request, watch)
    assert watch.reused == ["reference"]
    assert watch.ran == ["ptq", "export", *ENGINES, "accuracy"]
    assert result.bundle.manifest.reports["ptq"]["calibration_people"] == 8


def test_engines_of_another_host_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    (order, _) = assemble.engine_orders([load_target("this-cpu")])
    here = order.key({"export": "e"}).digest
    assert here == order.key({"export": "e"}).digest
    other = msgspec.structs.replace(fingerprint(), cpu="another processor")
    monkeypatch.setattr(assemble, "fingerprint", lambda: other)
    assert order.key({"export": "e"}).digest != here


# Checkpoints that went through the stages already


def compressed(compiled: Compiled, name: str = "ptq-int8") -> Path:
    """The checkpoint that a recipe's last compression stage left."""
    (stage,) = [stage for stage in compiled(name).stages if stage.stage in ("ptq", "qat")]
    return stage.path / "network"


def copy_checkpoint(source: Path, target: Path, card: Card | None = None) -> Path:
    """Copies a checkpoint, with another card if there is one."""
    shutil.copyfile(source.with_name(source.name + ".safetensors"), target.with_name(target.name + ".safetensors"))
    text = msgspec.json.encode(read_card(source) if card is None else card)
    target.with_name(target.name + ".json").write_bytes(text)
    return target


@pytest.mark.parametrize("with_data", [True, False])
def test_a_checkpoint_that_went_through_the_recipe_is_taken_as_it_is(
    with_data: bool, tiny: Tiny, compiled: Compiled, tmp_path: Path
) -> None:
    first, watch = compiled("prune-qat-int8"), Watch()
    model = copy_checkpoint(compressed(compiled, "prune-qat-int8"), tmp_path / "mine")
    changes = {"model": str(model), "data": tiny.data if with_data else None}
    result = compile_bundle(request_of(tiny, quick("prune-qat-int8"), tmp_path / "out.bundle", **changes), watch)
    measured = ["accuracy"] if with_data else []
    assert watch.reused == ["prune", "recover", "qat", "export", *ENGINES, *measured]
    assert result.bundle.manifest.chain == first.bundle.manifest.chain
    assert result.bundle.manifest.files == first.bundle.manifest.files


def test_the_zoo_is_asked_for_a_compressed_sibling(
    tiny: Tiny, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, watch = compiled("ptq-int8"), Watch()
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    copy_checkpoint(tiny.checkpoint, tmp_path / "tiny")
    copy_checkpoint(compressed(compiled), tmp_path / "tiny-ptq-int8")
    request = request_of(tiny, quick("ptq-int8"), tmp_path / "out.bundle", model="tiny", data=None)
    assert planned_stages(request)[0] == ("ptq", "reused from a checkpoint that went through it")
    result = compile_bundle(request, watch)
    assert watch.reused == ["ptq", "export", *ENGINES]
    assert result.bundle.manifest.chain == first.bundle.manifest.chain


def test_a_sibling_made_from_other_people_or_another_checkpoint_is_passed_over(
    tiny: Tiny, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled("ptq-int8")
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    copy_checkpoint(tiny.checkpoint, tmp_path / "tiny")
    card = read_card(compressed(compiled))
    last = card.lineage[-1]
    for role in ("train", "checkpoint"):
        entry = msgspec.structs.replace(last, inputs={**last.inputs, role: "0" * 64})
        other = msgspec.structs.replace(card, lineage=(*card.lineage[:-1], entry))
        copy_checkpoint(compressed(compiled), tmp_path / "tiny-ptq-int8", other)
        request = request_of(tiny, quick("ptq-int8"), tmp_path / "out.bundle", model="tiny")
        assert planned_stages(request)[0] == ("reference", "measured on dev")


def test_a_compressed_checkpoint_with_other_settings_is_refused(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    recipe = quick("ptq-int8")
    assert recipe.quantise is not None
    other = msgspec.structs.replace(recipe, quantise=msgspec.structs.replace(recipe.quantise, calibration_images=7))
    request = request_of(tiny, other, tmp_path / "out.bundle", model=str(compressed(compiled)))
    refused(request, CheckpointError, "compressed already, with other settings.*ptq-int8 as it is now")


def test_a_compressed_checkpoint_is_exported_as_it_is_by_fp32(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    first, watch = compiled("ptq-int8"), Watch()
    changes = {"model": str(compressed(compiled)), "data": None}
    result = compile_bundle(request_of(tiny, quick("fp32"), tmp_path / "out.bundle", **changes), watch)
    assert watch.reused == ["export", *ENGINES]
    assert result.bundle.manifest.engines == first.bundle.manifest.engines
    assert result.bundle.manifest.chain == first.bundle.manifest.chain


# Refused before any work


def test_a_name_that_is_taken(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    there = compiled("fp32").bundle
    error = refused(request_of(tiny, quick("ptq-int8"), there.root), UsageError, "a bundle made from other inputs")
    assert "--replace" in error.fix
    assert verify_bundle(there.root).digest == there.digest
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    refused(request_of(tiny, quick("fp32"), tmp_path / "notes"), UsageError, "something else there")
    request = request_of(tiny, quick("fp32"), tmp_path / "notes", replace=True)
    refused(request, UsageError, "something that is no bundle")
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_another_bundle_is_replaced_when_asked(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    compiled("fp32")
    out = write_bundle(tmp_path / "out.bundle", spot_draft(tmp_path)).root
    result = compile_bundle(request_of(tiny, quick("fp32"), out, replace=True), Watch())
    assert not result.reused
    assert read_bundle(out).manifest.name == "tiny-fp32"


def test_the_same_name_for_other_people_is_refused_at_the_end(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    """What is computed decides: the recipe and the network's name are the same, the checkpoint is not."""
    compiled("fp32")
    out = shutil.copytree(compiled("fp32").bundle.root, tmp_path / "out.bundle")
    request = request_of(tiny, quick("fp32"), out, model=str(compressed(compiled)))
    with pytest.raises(UsageError, match="a bundle made from other inputs"):
        compile_bundle(request, Watch())
    assert verify_bundle(out).digest == compiled("fp32").bundle.digest


def test_calibration_photographs_that_are_also_in_val(tiny: Tiny, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny.data, tmp_path / "people"))
    victim = split_train(dataset(data, "train"))[0].persons[3].image
    shutil.copyfile(dataset(data, "val").persons[0].image, victim)
    for name in ("ptq-int8", "prune-qat-int8"):
        request = request_of(tiny, quick(name), tmp_path / "out.bundle", data=data)
        error = refused(request, AnnotationError, f"1 training photographs that are also in val, {victim.name}")
        assert error.exit_code == 2


@pytest.mark.parametrize("name", ["ptq-int8", "prune-qat-int8"])
def test_missing_data(name: str, tiny: Tiny, tmp_path: Path) -> None:
    request = request_of(tiny, quick(name), tmp_path / "out.bundle", data=None)
    refused(request, UsageError, "no data.*add --data DIR")


def test_rendered_people_fill_the_share_that_the_recipe_says(tiny: Tiny, tmp_path: Path) -> None:
    recipe = quick("prune-qat-int8")
    assert recipe.prune is not None
    share = {"batch_size": 8, "rendered": 0.25}
    prune, quantise = (msgspec.structs.replace(part, training=share) for part in (recipe.prune, recipe.quantise))
    recipe = msgspec.structs.replace(recipe, prune=prune, quantise=quantise)
    refused(request_of(tiny, recipe, tmp_path / "out.bundle"), UsageError, "--rendered: found no folder, and a recipe")
    request = request_of(tiny, recipe, tmp_path / "out.bundle", rendered=tiny.data)
    compile_bundle(request, watch := Watch())
    lossy = [stage for stage in watch.stages if stage.stage in ("prune", "recover", "qat")]
    made = {stage.stage: read_card(stage.path / "network").lineage[-1] for stage in lossy}
    rendered = dataset(tiny.data, "train").digest
    assert made["recover"].inputs["rendered"] == made["qat"].inputs["rendered"] == rendered
    assert "rendered" not in made["prune"].inputs
    plain = request_of(tiny, quick("ptq-int8"), tmp_path / "other.bundle", rendered=tiny.data)
    refused(plain, UsageError, "--rendered: found a recipe that fills no batch with them")


def test_data_with_other_keypoints(tiny: Tiny, tmp_path: Path) -> None:
    write_people(tmp_path / "spots", "train", 20)
    request = request_of(tiny, quick("ptq-int8"), tmp_path / "out.bundle", data=tmp_path / "spots")
    refused(request, CheckpointError, "a network for 14 keypoints, expected the 2 of")


def test_a_target_that_runs_tensorrt_only(tiny: Tiny, tmp_path: Path) -> None:
    recipe = msgspec.structs.replace(quick("fp32"), targets=("jetson-orin-nano",))
    error = refused(request_of(tiny, recipe, tmp_path / "out.bundle"), BackendUnavailable, "target jetson-orin-nano")
    assert error.exit_code == 6


def test_a_target_whose_engines_are_built_on_the_device_decides_with_the_others(tiny: Tiny, tmp_path: Path) -> None:
    """Its engines are not built here, but the network is quantised as it needs it."""
    recipe = msgspec.structs.replace(quick("ptq-int8"), targets=("this-cpu", "jetson-orin-nano"))
    result = compile_bundle(request_of(tiny, recipe, tmp_path / "out.bundle"), Watch())
    assert result.later == ("jetson-orin-nano",)
    assert {engine.target for engine in result.bundle.manifest.engines} == {"this-cpu"}
    assert result.bundle.manifest.reports["ptq"]["activations"]["chosen"] == "symmetric"


def test_a_network_that_is_not_there(tiny: Tiny, tmp_path: Path) -> None:
    request = request_of(tiny, quick("fp32"), tmp_path / "out.bundle", model=str(tmp_path / "absent"))
    refused(request, CheckpointError, r"absent\.json: found no such file")


def test_a_library_that_is_not_installed(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "edgepose.stages.export", None)
    monkeypatch.setattr("edgepose.stages.export", None, raising=False)
    monkeypatch.delattr("edgepose.stages.export")
    with pytest.raises(MissingDependency, match=r"stage export: .*edgepose\[compile\]"):
        compile_bundle(request_of(tiny, quick("fp32"), tmp_path / "out.bundle"), Watch())
    assert not (tmp_path / "out.bundle").exists()
    assert not (tmp_path / "cache").exists()


# Lost accuracy


def with_limit(recipe: Recipe, points: float) -> Recipe:
    return msgspec.structs.replace(recipe, max_drop_points=points)


def test_more_accuracy_lost_than_the_recipe_allows(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    """A checkpoint whose float network was far better, as its lineage says, with the real figure after ptq."""
    card = read_card(compressed(compiled))
    trained, last = card.lineage[0], card.lineage[-1]
    after = last.report["dev"]["pck_torso_0.2"]
    row = {**trained.report["curve"][0], "pck_torso_0.2": after + 0.02}
    better = msgspec.structs.replace(trained, report={**trained.report, "curve": [row]})
    lineage = (better, *card.lineage[1:])
    model = copy_checkpoint(compressed(compiled), tmp_path / "m", msgspec.structs.replace(card, lineage=lineage))
    changes = {"model": str(model), "data": None}
    request = request_of(tiny, with_limit(quick("ptq-int8"), 1.9), tmp_path / "out.bundle", **changes)
    error = refused(request, AccuracyRegression, r"2\.00 points of pck_torso_0\.2 lost on dev after ptq")
    assert error.exit_code == 3
    request = request_of(tiny, with_limit(quick("ptq-int8"), 2.1), tmp_path / "out.bundle", **changes)
    assert compile_bundle(request, Watch()).bundle.manifest.reports["compile"]["recipe"]["max_drop_points"] == 2.1


def stage(name: str, figure: float | None) -> StageResult:
    return StageResult(name, "", "", {"dev": {"pck_torso_0.2": figure}}, 0.0)


def card_of(tiny: Tiny, *stages: Lineage) -> Card:
    card = read_card(tiny.checkpoint)
    return msgspec.structs.replace(card, lineage=stages)


def test_the_reference_is_what_this_compile_measured(tiny: Tiny) -> None:
    recipe = with_limit(quick("prune-qat-int8"), 1.5)
    card = read_card(tiny.checkpoint)
    check_budget(recipe, [stage("reference", 0.5), stage("prune", 0.1), stage("qat", 0.486)], card)
    with pytest.raises(AccuracyRegression, match=r"1\.60 points.*after qat \(50\.00 → 48\.40\)"):
        check_budget(recipe, [stage("reference", 0.5), stage("prune", 0.1), stage("qat", 0.484)], card)
    with pytest.raises(AccuracyRegression, match="after prune"):
        check_budget(recipe, [stage("reference", 0.5), stage("prune", 0.1)], card)
    check_budget(recipe, [], card)
    check_budget(quick("prune-qat-int8"), [stage("reference", 0.5), stage("qat", 0.0)], card)


def test_a_limit_without_a_figure_to_judge_it_by_is_an_error(tiny: Tiny) -> None:
    recipe = with_limit(quick("ptq-int8"), 5)
    unknown = card_of(tiny, Lineage("ptq", {}, {"dev": "d"}, {}))
    with pytest.raises(CheckpointError, match="no figure of the float network"):
        check_budget(recipe, [stage("ptq", 0.5)], unknown)
    trained = Lineage("train", {}, {"dev": "another dev"}, {"curve": [{"pck_torso_0.2": 0.5}], "best_epoch": 0})
    with pytest.raises(CheckpointError, match="no figure of the float network"):
        check_budget(recipe, [stage("ptq", 0.5)], card_of(tiny, trained, *unknown.lineage))
    with pytest.raises(AnnotationError, match="nobody with a complete torso"):
        check_budget(recipe, [stage("reference", 0.5), stage("ptq", None)], unknown)


def test_of_several_trainings_the_last_one_counts(tiny: Tiny) -> None:
    recipe = with_limit(quick("ptq-int8"), 5)
    small, large = (
        Lineage("train", {}, {"dev": "d", "train": share}, {"curve": [{"pck_torso_0.2": figure}], "best_epoch": 0})
        for share, figure in (("first", 0.4), ("second", 0.6))
    )
    transferred = Lineage("transfer", {}, {"checkpoint": "c"}, {})
    card = card_of(tiny, small, transferred, large, Lineage("ptq", {}, {"dev": "d"}, {}))
    with pytest.raises(AccuracyRegression, match=r"60\.00 → 50\.00"):
        check_budget(recipe, [stage("ptq", 0.5)], card)


def test_the_chain_begins_with_the_last_training(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(tiny.checkpoint)
    first = Lineage("train", {}, {"train": "other people"}, {})
    transferred = Lineage("transfer", {}, {"checkpoint": "c" * 64}, {})
    calibrated = Lineage("calibrate", {}, {"dev": "d" * 64}, {})
    lineage = (first, transferred, *checkpoint.card.lineage, calibrated)
    card = msgspec.structs.replace(checkpoint.card, lineage=lineage)
    copy_checkpoint(tiny.checkpoint, tmp_path / "moved", card)
    request = request_of(tiny, quick("fp32"), tmp_path / "moved.bundle", model=str(tmp_path / "moved"))
    chain = compile_bundle(request).bundle.manifest.chain
    assert chain["dataset"] == checkpoint.card.lineage[0].inputs["train"]
    assert chain["checkpoint"] == checkpoint.digest
    assert "compressed" not in chain


def test_a_limit_for_keypoints_without_a_torso(tiny: Tiny) -> None:
    card = read_card(tiny.checkpoint)
    check_metric(with_limit(quick("fp32"), 1), card)
    heads = msgspec.structs.replace(card, keypoints=msgspec.structs.replace(card.keypoints, names=("a", "b")))
    check_metric(quick("fp32"), heads)
    with pytest.raises(UsageError, match="keypoints without a torso"):
        check_metric(with_limit(quick("fp32"), 1), heads)


# Ctrl-C, and looking ahead


@pytest.mark.parametrize("at", ["export", "engine-openvino"])
def test_an_interrupted_compile_leaves_nothing_half_written_and_goes_on(
    at: str, tiny: Tiny, own_cache: Path, tmp_path: Path
) -> None:
    for folder in own_cache.glob("stages/engine-*"):
        shutil.rmtree(folder)
    out = tmp_path / "new" / "out.bundle"
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(request_of(tiny, quick("ptq-int8"), out), Watch(stop_at=at))
    assert not out.parent.exists()
    assert hidden_files(tmp_path) == []
    watch = Watch()
    assert not compile_bundle(request_of(tiny, quick("ptq-int8"), out), watch).reused
    assert watch.ran == (ENGINES if at == "export" else ENGINES[1:])
    verify_bundle(out)


class PressesCtrlC(Watch):
    """Stops fine-tuning as a user would, at its first step."""

    steps: tuple[int, ...] = ()

    def step(self, done: int, total: int, loss: float) -> None:
        self.steps = (*self.steps, done)
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_fine_tuning_goes_on_where_ctrl_c_stopped_it(tiny: Tiny, own_cache: Path, tmp_path: Path) -> None:
    recipe = quick("qat-int8")
    assert isinstance(recipe.quantise, QuantisationAware)
    longer = msgspec.structs.replace(recipe, quantise=msgspec.structs.replace(recipe.quantise, epochs=2))
    request = request_of(tiny, longer, tmp_path / "out.bundle")
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(request, PressesCtrlC())
    (state,) = (own_cache / "runs").iterdir()
    rest = PressesCtrlC(stop_at="export")
    with pytest.raises(KeyboardInterrupt):
        compile_bundle(request, rest)
    assert rest.steps == (2,)
    assert rest.ran == ["qat"]
    assert not state.exists()
    assert not request.out.exists()
    assert hidden_files(own_cache) == []


def test_a_stage_that_was_cut_off_is_repeated(tiny: Tiny, own_cache: Path, tmp_path: Path) -> None:
    for record in own_cache.glob("stages/engine-openvino-*/stage.json"):
        record.unlink()
    watch = Watch()
    compile_bundle(request_of(tiny, quick("ptq-int8"), tmp_path / "out.bundle"), watch)
    assert watch.ran == ["engine-openvino"]


@pytest.mark.parametrize("name", profile_names("recipes"))
def test_the_plan_names_the_stages_that_then_run(
    name: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    planned = planned_stages(request_of(tiny, quick(name), tmp_path / "out.bundle"))
    assert [stage for stage, _ in planned] == [*STAGES[name], "bundle"]
    without = planned_stages(request_of(tiny, quick(name), tmp_path / "out.bundle", data=None))
    assert (("data", "missing: add --data DIR") in without) == (name != "fp32")
    assert list(tmp_path.iterdir()) == []


def test_golden_vectors_are_the_checkpoints_answers(tiny: Tiny, compiled: Compiled) -> None:
    from edgepose.bundle import golden_vectors
    from edgepose.stages.networks import load_network
    from edgepose.training.session import TorchSession

    bundle = compiled("ptq-int8").bundle
    golden = golden_vectors(bundle)
    assert golden is not None
    network, checkpoint = load_network(compressed(compiled))
    answers = TorchSession(network, checkpoint.card.spec).infer({"image": golden.inputs})
    for name, value in golden.outputs.items():
        np.testing.assert_allclose(value, answers[name], atol=1e-4)
