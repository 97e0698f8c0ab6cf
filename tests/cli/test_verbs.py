"""`verify`, `inspect`, `doctor`, `eval`, `profile`, `gate` and `report` on the spot bundle and on tiny checkpoints."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import cv2
import msgspec
import numpy as np
import pytest

from edgepose.blocks.card import Card
from edgepose.bundle import read_bundle, write_bundle
from edgepose.spec import Heatmap, Keypoints, Regression
from edgepose.timing.record import ProfileRecord
from tests.cli.conftest import TINY, Cli, disk_of
from tests.fakes import spot_spec
from tests.tiny_network import flip_a_byte, forge, spot_draft

# compile


def test_recipe_with_an_unknown_key(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: mine\nquantize: {mode: ptq}\n")
    outcome = cli("compile", tmp_path / "recipe.yaml", "--out", tmp_path / "net.bundle")
    assert outcome.code == 2
    assert "quantize" in outcome.line
    assert "quantise" in outcome.line
    assert not (tmp_path / "net.bundle").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "opset 18"),
        (("--image-input",), "opset 18, images in"),
        (("--image-input", "--decoding"), "opset 18, images in, keypoints out"),
    ],
)
def test_ends_of_the_graph_are_asked_for_by_flags(cli: Cli, tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    outcome = cli("compile", "fp32", "--model", "kpe-t", "--out", tmp_path / "net.bundle", "--dry-run", *flags)
    (line,) = [line for line in outcome.out.splitlines() if line.strip().startswith("export")]
    assert line.rstrip().endswith(said)


def test_network_of_a_bundle_gets_no_ends(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    outcome = cli("compile", "ptq-int8", "--model", bundle, "--out", tmp_path / "net.bundle", "--decoding")
    assert outcome.code == 2
    assert "leave --image-input and --decoding off" in outcome.line


# verify


def test_verify_checks_files_then_engines(cli: Cli, bundle: Path) -> None:
    outcome = cli("verify", bundle)
    assert outcome.code == 0
    assert "all 7 files are what the manifest says" in outcome.out
    assert outcome.out.count("answers as recorded") == 2
    assert "answers" not in cli("verify", bundle, "--hashes-only").out


def test_verify_json(cli: Cli, bundle: Path) -> None:
    result = json.loads(cli("verify", bundle, "--json").out)
    assert result["digest"] == read_bundle(bundle).digest
    assert [row["outcome"] for row in result["engines"]] == ["same", "same"]


@pytest.mark.parametrize("name", ["model.onnx", "manifest.json", "engines/cpu/openvino/fp32.bin", "golden/inputs.npy"])
def test_verify_notices_one_byte(cli: Cli, bundle: Path, name: str) -> None:
    flip_a_byte(bundle / name)
    outcome = cli("verify", bundle)
    assert outcome.code == 8
    assert name in outcome.line


def test_verify_says_where_nodes_run_and_what_the_runtime_was_told(cli: Cli, bundle: Path) -> None:
    outcome = cli("verify", bundle)
    assert "all 3 nodes on cpu" in outcome.out
    assert "nodes on CPU" in outcome.out
    rows = {row["backend"]: row for row in json.loads(cli("verify", bundle, "--json").out)["engines"]}
    assert rows["onnxruntime"]["facts"]["placement"] == {"cpu": ["Conv", "ReduceSum", "ReduceSum"]}
    assert rows["openvino"]["facts"]["settings"]["precision"] == "f32"


def test_verify_runs_the_engines_of_the_provider_or_device_alone(cli: Cli, bundle: Path) -> None:
    assert cli("verify", bundle, "--provider", "CPU", "--strict").out.count("answers as recorded") == 1
    rows = json.loads(cli("verify", bundle, "--device", "AUTO", "--json").out)["engines"]
    assert [(row["backend"], row["outcome"]) for row in rows] == [("openvino", "same")]


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--provider", "cuda"), 6, "provider|cuda|cpu"),
        (("--provider", "rocm"), 2, "--provider: found rocm, expected cpu, cuda, tensorrt"),
        (("--device", "TPU"), 2, "--device: found TPU, expected CPU, GPU"),
        (("--device", "GPU.9"), 6, "the devices CPU"),
        (("--strict",), 2, "--strict: found no --provider"),
        (("--provider", "cpu", "--device", "CPU"), 2, "--device: found --provider as well"),
        (("--provider", "cpu", "--backend", "openvino"), 2, "--provider: found --backend openvino"),
        (("--device", "CPU", "--backend", "onnxruntime"), 2, "--device: found --backend onnxruntime"),
    ],
)
def test_provider_or_device_that_cannot_be_is_said(
    cli: Cli, bundle: Path, tmp_path: Path, flags: tuple[str, ...], code: int, said: str
) -> None:
    from edgepose.runtime.ort import available_providers

    if "cuda" in flags and "cuda" in available_providers():
        pytest.skip("there is CUDA here")
    picture = tmp_path / "grey.png"
    assert cv2.imwrite(str(picture), np.zeros((64, 64, 3), np.uint8))
    for verb in (("verify", bundle), ("run", bundle, picture)):
        outcome = cli(*verb, *flags)
        assert outcome.code == code
        assert all(word in outcome.line for word in said.split("|"))


def test_run_takes_provider_and_device(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    picture = tmp_path / "grey.png"
    assert cv2.imwrite(str(picture), np.zeros((64, 64, 3), np.uint8))
    assert "on onnxruntime fp32" in cli("run", bundle, picture, "--provider", "cpu", "--strict").err
    assert "on openvino fp32" in cli("run", bundle, picture, "--device", "CPU").err


def test_verify_notices_a_file_too_many(cli: Cli, bundle: Path) -> None:
    (bundle / "extra.txt").write_text("hello")
    assert cli("verify", bundle, "--json").code == 8


def test_verify_notices_an_engine_that_answers_differently(cli: Cli, tmp_path: Path) -> None:
    draft = spot_draft(tmp_path)
    assert draft.golden is not None
    draft.golden.keypoints[..., 0] += 3
    root = write_bundle(tmp_path / "lying.bundle", draft).root
    outcome = cli("verify", root)
    assert outcome.code == 5
    assert "keypoints_px: found a largest difference of 3" in outcome.line
    assert outcome.out.count("ANSWERS DIFFERENTLY") == 2


def test_verify_names_engines_it_could_not_run(cli: Cli, bundle: Path) -> None:
    engines = json.loads((bundle / "manifest.json").read_text())["engines"]
    engines[1]["backend"] = "tensorrt"
    forge(read_bundle(bundle), engines=engines)
    outcome = cli("verify", bundle)
    assert outcome.code == 0
    assert "engines/cpu/openvino/fp32.xml was not run" in outcome.err
    assert "not run here" in outcome.out
    assert "pip install 'edgepose[tensorrt]'" in outcome.out


def test_verify_exits_6_where_no_engine_runs(cli: Cli, bundle: Path) -> None:
    engines = json.loads((bundle / "manifest.json").read_text())["engines"]
    forge(read_bundle(bundle), engines=[{**engine, "backend": "tensorrt"} for engine in engines])
    assert cli("verify", bundle).code == 6
    assert cli("verify", bundle, "--hashes-only").code == 0


def test_verify_of_no_bundle(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("verify", tmp_path / "nothing")
    assert outcome.code == 2
    assert "no such directory" in outcome.line


# inspect


def test_inspect_shows_all_parts_of_a_bundle(cli: Cli, bundle: Path) -> None:
    outcome = cli("inspect", bundle)
    assert outcome.code == 0
    for word in (
        "spots",
        "onnxruntime",
        "openvino",
        "dataset",
        "checkpoint",
        "engine:",
        "export",
        "blue, red",
        "SimCC",
    ):
        assert word in outcome.out


def test_inspect_says_how_outputs_are_decoded(cli: Cli, bundle: Path) -> None:
    spec = json.loads(cli("inspect", bundle, "--json").out)["manifest"]["spec"]
    assert spec["decoder"]["type"] == "simcc"
    for decoder, words in ((Heatmap(stride=8.0), "heat maps, stride 8"), (Regression((48, 32)), "coordinates")):
        forge(read_bundle(bundle), spec={**spec, "decoder": msgspec.to_builtins(decoder)})
        assert f"decoded as {words}" in " ".join(cli("inspect", bundle).out.split())


def test_inspect_json_is_the_manifest(cli: Cli, bundle: Path) -> None:
    result = json.loads(cli("inspect", bundle, "--json").out)
    assert result["digest"] == read_bundle(bundle).digest
    assert result["manifest"]["engines"][0]["backend"] == "onnxruntime"


def test_inspect_shows_a_checkpoint(cli: Cli, checkpoint: Path) -> None:
    for named in (checkpoint, checkpoint.with_suffix(".safetensors"), checkpoint.with_suffix(".json")):
        outcome = cli("inspect", named)
        assert outcome.code == 0
        assert "tiny" in outcome.out
        assert "blue, red" in outcome.out
    assert json.loads(cli("inspect", checkpoint, "--json").out)["name"] == "tiny"


def test_inspect_of_an_unknown_network(cli: Cli) -> None:
    outcome = cli("inspect", "kpe-xl")
    assert outcome.code == 2
    assert "no network of that name in the zoo" in outcome.line


# doctor


def test_doctor_says_what_is_here_and_what_is_missing(cli: Cli) -> None:
    outcome = cli("doctor")
    assert outcome.code == 0
    for word in ("processor", "quantised weights", "bits:", "onnxruntime", "openvino", "tensorrt-rtx", "cache"):
        assert word in outcome.out
    assert "tensorrt: " in outcome.out  # and what it lacks


def test_doctor_json(cli: Cli, tmp_path: Path) -> None:
    result = json.loads(cli("doctor", "--json").out)
    backends = {row["backend"]: row for row in result["backends"]}
    assert backends["onnxruntime"]["usable"]
    assert backends["onnxruntime"]["missing"] == []
    assert not backends["tensorrt"]["usable"]
    assert result["weight_bits"] in (7, 8)
    assert result["cache"]["directory"] == str(tmp_path / "cache")
    assert result["host"]["physical_cores"] >= 1


def test_doctor_exits_6_without_any_backend(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("edgepose.runtime.ort", "edgepose.runtime.openvino"):
        monkeypatch.setitem(sys.modules, module, None)  # Python's own way of saying that it cannot be imported
    outcome = cli("doctor")
    assert outcome.code == 6
    assert outcome.line.startswith("edgepose doctor: this machine: found no usable backend")
    assert "not usable" in outcome.out


# eval


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """An untrained tiny network as a checkpoint."""
    import torch

    from edgepose.blocks.checkpoint import save_checkpoint
    from edgepose.blocks.kpe import build

    torch.manual_seed(0)
    keypoints = Keypoints(("blue", "red"), skeleton=((0, 1),), sigmas=(0.1, 0.1))
    network = build(TINY, keypoints)
    save_checkpoint(tmp_path / "ckpt" / "tiny", Card("tiny", TINY, keypoints, ""), network.state_dict())
    return tmp_path / "ckpt" / "tiny"


def test_eval_of_a_bundle(cli: Cli, bundle: Path, people: Path, tmp_path: Path) -> None:
    files = ["--json", tmp_path / "eval.json", "--predictions", tmp_path / "results.json"]
    outcome = cli("eval", bundle, "--data", people, *files)
    assert outcome.code == 0
    result = json.loads((tmp_path / "eval.json").read_text())
    assert result["persons"] == 24
    assert result["backend"] == "onnxruntime"
    assert result["metrics"]["mpjpe_px"] < 12  # a bin of the tiny network is that many pixels
    assert result["metrics"]["pck_extent_0.1"] > 0.9
    assert 0 < result["oks"]["oks_ap"] <= 1
    assert "24 people of val.json" in outcome.out
    assert "mpjpe_px" in outcome.out
    rows = json.loads((tmp_path / "results.json").read_text())
    assert len(rows) == 24
    assert set(rows[0]) == {"image_id", "category_id", "keypoints", "score", "bbox"}
    truth = json.loads((people / "val.json").read_text())["annotations"]
    assert np.allclose(rows[3]["keypoints"][:2], truth[3]["keypoints"][:2], atol=12)


def test_eval_by_annotations_and_images_gives_the_same(cli: Cli, bundle: Path, people: Path) -> None:
    first = json.loads(cli("eval", bundle, "--data", people, "--json", "-").out)
    flags = ["--annotations", people / "val.json", "--images", people / "images", "--backend", "openvino"]
    second = json.loads(cli("eval", bundle, *flags, "--json", "-").out)
    assert second["backend"] == "openvino"
    assert second["metrics"]["mpjpe_px"] == pytest.approx(first["metrics"]["mpjpe_px"], abs=0.05)


def test_eval_with_the_flip_test_says_so(cli: Cli, bundle: Path, checkpoint: Path, people: Path) -> None:
    def evaluated(*words: object) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(cli("eval", *words, "--data", people, "--json", "-").out)
        return result

    plain, flipped = evaluated(bundle), evaluated(bundle, "--flip-test")
    assert (plain["flip_test"], flipped["flip_test"]) == (False, True)
    # The spot network has no sides; an untrained one has, so that the mean of its two answers is another.
    assert flipped["metrics"]["mpjpe_px"] == pytest.approx(plain["metrics"]["mpjpe_px"], abs=0.01)
    assert evaluated(checkpoint, "--flip-test")["metrics"]["mpjpe_px"] != evaluated(checkpoint)["metrics"]["mpjpe_px"]


def test_eval_of_a_checkpoint_runs_in_torch(cli: Cli, checkpoint: Path, people: Path) -> None:
    outcome = cli("eval", checkpoint.with_suffix(".safetensors"), "--data", people, "--json", "-", "--threads", "1")
    assert outcome.code == 0
    result = json.loads(outcome.out)
    assert (result["backend"], result["persons"], result["network"]) == ("torch", 24, "tiny")
    assert np.isfinite(result["metrics"]["mpjpe_px"])


def test_eval_of_a_checkpoint_of_another_architecture(cli: Cli, checkpoint: Path, people: Path) -> None:
    card = checkpoint.with_suffix(".json")
    text = json.loads(card.read_text())
    text["architecture"]["stem"] = 8
    card.write_text(json.dumps(text))
    outcome = cli("eval", checkpoint, "--data", people)
    assert outcome.code == 2
    assert "another architecture" in outcome.line


def test_eval_of_changed_weights_exits_8(cli: Cli, checkpoint: Path, people: Path) -> None:
    flip_a_byte(checkpoint.with_suffix(".safetensors"))
    assert cli("eval", checkpoint, "--data", people).code == 8


@pytest.mark.parametrize(
    ("keypoints", "words"),
    [
        ([1, 2, 2], "annotation 4: keypoints: found 3 numbers, expected 6 numbers"),
        ([1, 2, 2, float("nan"), 4, 2], "annotation 4: keypoints: found nan, expected finite numbers"),
        ([1, 2, 2, 3, 4, 5], "annotation 4: keypoints: found visibility 5"),
    ],
)
def test_eval_of_bad_annotations(
    cli: Cli, bundle: Path, people: Path, tmp_path: Path, keypoints: list[float], words: str
) -> None:
    document = json.loads((people / "val.json").read_text())
    document["annotations"][3]["keypoints"] = keypoints
    (people / "val.json").write_text(json.dumps(document))
    outcome = cli("eval", bundle, "--data", people, "--json", tmp_path / "eval.json")
    assert outcome.code == 2
    assert words in outcome.line
    assert not (tmp_path / "eval.json").exists()


def test_eval_of_a_missing_photograph(cli: Cli, bundle: Path, people: Path) -> None:
    (people / "images" / "val5.jpg").unlink()
    outcome = cli("eval", bundle, "--data", people)
    assert outcome.code == 2
    assert "val5.jpg" in outcome.line


@pytest.mark.parametrize("flags", [[], ["--data", "x", "--images", "y"], ["--annotations", "x"]])
def test_eval_needs_one_data_set(cli: Cli, bundle: Path, flags: list[str]) -> None:
    outcome = cli("eval", bundle, *flags)
    assert outcome.code == 2
    assert "expected --data DIR, or --annotations FILE and --images DIR" in outcome.line


def test_eval_without_the_data_exits_6(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    assert cli("eval", bundle, "--data", tmp_path / "nowhere").code == 6


def test_eval_does_not_overwrite_its_annotations(cli: Cli, bundle: Path, people: Path) -> None:
    before = (people / "val.json").read_bytes()
    assert cli("eval", bundle, "--data", people, "--json", people / "val.json").code == 2
    assert (people / "val.json").read_bytes() == before


def test_backend_of_a_checkpoint_is_a_usage_error(cli: Cli, checkpoint: Path, people: Path) -> None:
    assert cli("eval", checkpoint, "--data", people, "--backend", "openvino").code == 2


def test_eval_on_a_full_disk_leaves_nothing(cli: Cli, bundle: Path, people: Path, tmp_path: Path) -> None:
    with disk_of(100):
        outcome = cli("eval", bundle, "--data", people, "--json", tmp_path / "eval.json")
    assert outcome.code == 6
    assert not [path for path in tmp_path.iterdir() if "eval" in path.name]


# profile, gate, report

QUICK = """\
name: quick
accuracy:
  - {metric: pck_extent_0.1, least_persons: 20, fail_above_points: 1, pass_below_points: 5, widest_pass_points: 60}
latency: null
limits:
  - {metric: engine_bytes, fail_above: 0.05}
"""


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(QUICK)
    return path


def test_profile_then_report(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    flags = ["--duration", "0.2", "--frame", "320x240", "--threads", "1", "--json", tmp_path / "profile.json"]
    outcome = cli("profile", bundle, *flags)
    assert outcome.code == 0
    assert "frames of 320 x 240" in outcome.out
    assert "p50" in outcome.out
    assert "people per second" in outcome.out
    record = msgspec.json.decode((tmp_path / "profile.json").read_bytes(), type=ProfileRecord)
    assert record.protocol.frame_hw == (240, 320)
    outcome = cli("report", bundle, "--profile", tmp_path / "profile.json", "--out", tmp_path / "page.html")
    assert outcome.code == 0
    page = (tmp_path / "page.html").read_text()
    assert "Profile of spots" in page
    assert "engines/cpu/onnxruntime/fp32.onnx" in page


def test_profile_of_a_wrong_frame(cli: Cli, bundle: Path) -> None:
    assert "WIDTHxHEIGHT" in cli("profile", bundle, "--frame", "640").line


def test_gate_of_a_bundle_against_itself(cli: Cli, bundle: Path, people: Path, rules: Path, tmp_path: Path) -> None:
    files = ["--json", tmp_path / "gate.json", "--junit", tmp_path / "gate.xml", "--html", tmp_path / "gate.html"]
    outcome = cli("gate", bundle, bundle, "--data", people, "--rules", rules, *files)
    result = json.loads((tmp_path / "gate.json").read_text())
    assert outcome.code == result["exit_code"] == 0
    assert result["verdict"] == "pass"
    assert result["accuracy"]["diff_points"] == 0
    assert result["accuracy"]["ci95"] == [0, 0]
    assert result["accuracy"]["detectable_points"] is not None
    assert "verdict: pass" in outcome.out
    assert ET.parse(tmp_path / "gate.xml").getroot().attrib["failures"] == "0"
    assert "Pass" in (tmp_path / "gate.html").read_text()
    outcome = cli("report", bundle, "--gate", tmp_path / "gate.json", "--out", tmp_path / "page.html")
    assert outcome.code == 0
    assert "rules quick" in (tmp_path / "page.html").read_text()


def test_gate_exits_3_for_a_worse_candidate(
    cli: Cli, bundle: Path, people: Path, rules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = spot_draft(tmp_path)
    swapped = {"color": "rgb"}  # blue and red change places: everything is found where the other one is
    spec = msgspec.structs.replace(
        spot_spec(), preprocess=msgspec.structs.replace(spot_spec().preprocess, **swapped), name="worse"
    )
    worse = write_bundle(tmp_path / "worse.bundle", replace(draft, name="worse", spec=spec)).root
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    outcome = cli("gate", bundle, worse, "--data", people, "--rules", rules, "--json", tmp_path / "gate.json")
    assert outcome.code == 3
    assert json.loads((tmp_path / "gate.json").read_text())["verdict"] == "fail"
    assert "verdict: fail (exit code 3)" in outcome.out
    assert "::error title=edgepose gate%3A fail::" in outcome.err


def test_gate_without_data_says_so(cli: Cli, bundle: Path, rules: Path) -> None:
    assert cli("gate", bundle, bundle, "--rules", rules).code == 2


def test_gate_times_without_data_where_rules_want_no_accuracy(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    rules = tmp_path / "limits.yaml"
    rules.write_text("name: sizes\naccuracy: []\nlatency: null\nlimits: [{metric: bundle_bytes, fail_above: 0.1}]\n")
    assert cli("gate", bundle, bundle, "--rules", rules).code == 0


def test_gate_with_unknown_rules(cli: Cli, bundle: Path, people: Path) -> None:
    outcome = cli("gate", bundle, bundle, "--data", people, "--rules", "defalt")
    assert outcome.code == 2
    assert "default" in outcome.line


def test_report_lies_beside_the_bundle(cli: Cli, bundle: Path) -> None:
    assert cli("report", bundle).code == 0
    page = bundle.with_suffix(".html").read_text()
    assert "largest_difference" in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_report_of_eval_figures(cli: Cli, bundle: Path, people: Path, tmp_path: Path) -> None:
    cli("eval", bundle, "--data", people, "--json", tmp_path / "eval.json")
    assert cli("report", bundle, "--eval", tmp_path / "eval.json", "--out", tmp_path / "page.html").code == 0
    assert "24 people" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("flag", ["--gate", "--profile", "--eval"])
def test_report_of_something_else(cli: Cli, bundle: Path, tmp_path: Path, flag: str) -> None:
    (tmp_path / "other.json").write_text('{"a": 1}')
    outcome = cli("report", bundle, flag, tmp_path / "other.json", "--out", tmp_path / "page.html")
    assert outcome.code == 2
    assert "other.json" in outcome.line
    assert cli("report", bundle, flag, tmp_path / "missing.json", "--out", tmp_path / "page.html").code == 2
    assert not (tmp_path / "page.html").exists()


def test_report_into_the_bundle_is_refused(cli: Cli, bundle: Path) -> None:
    assert cli("report", bundle, "--out", bundle / "page.html").code == 2
