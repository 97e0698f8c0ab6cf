"""Profiling and gating real bundles in real processes: functions, not timings, are checked here."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import msgspec
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from edgepose.bundle import Bundle, write_bundle
from edgepose.data.coco import PoseDataset, read_coco
from edgepose.errors import RecipeError, SpecError, UsageError
from edgepose.profiler.gate.rules import AccuracyRule, GateRules, LatencyRule, LimitRule
from edgepose.profiler.gate.run import GateOptions, run_gate
from edgepose.timing.profile import profile
from edgepose.timing.record import ProfileProtocol, ProfileRecord
from tests.fakes import spot_frame
from tests.tiny_network import spot_bundle, spot_draft, spot_onnx

# Thresholds so wide that no scheduling accident on a busy test machine crosses them.
WIDE = LatencyRule(
    fail_above=20.0,
    pass_below=50.0,
    looks=(1,),
    confirm=False,
    blocks=5,
    dropped_blocks=0,
    block_ms=1.0,
    warm_up_ms=1.0,
)
ACCURACY = AccuracyRule("pck_extent_0.1", widest_pass_points=60.0)
RULES = GateRules("test", accuracy=(ACCURACY,), latency=WIDE, limits=(LimitRule("engine_bytes", 0.05),))
OPTIONS = GateOptions(backend="onnxruntime", threads=1, seed=5)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return spot_bundle(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose network confuses the two spots."""
    model = onnx.load_from_string(spot_onnx())
    (pick,) = (tensor for tensor in model.graph.initializer if tensor.name == "pick")
    pick.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(pick)[::-1].copy(), "pick"))
    folder = tmp_path_factory.mktemp("bad")
    draft = spot_draft(folder)
    content = model.SerializeToString()
    changed = replace(draft.engines[0], files={"fp32.onnx": content})
    return write_bundle(folder / "blind.bundle", replace(draft, name="blind", onnx=content, engines=(changed,)))


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> PoseDataset:
    folder = tmp_path_factory.mktemp("people")
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for number in range(1, 31):
        blue, red = rng.uniform(60, 120, 2), rng.uniform(140, 200, 2)
        cv2.imwrite(str(folder / "images" / f"{number}.png"), spot_frame(tuple(blue), tuple(red)))
        images.append({"id": number, "file_name": f"{number}.png", "width": 320, "height": 240})
        annotations.append(
            {
                "id": number,
                "image_id": number,
                "category_id": 1,
                "bbox": [40.0, 40.0, 180.0, 180.0],
                "keypoints": [*blue.tolist(), 2, *red.tolist(), 2],
                "num_keypoints": 2,
                "area": 1.0,
                "iscrowd": 0,
            }
        )
    category = {"id": 1, "name": "spots", "keypoints": ["blue", "red"], "skeleton": [[1, 2]]}
    document = {"images": images, "annotations": annotations, "categories": [category]}
    (folder / "val.json").write_text(json.dumps(document), encoding="utf-8")
    return read_coco(folder / "val.json", folder / "images")


def test_a_bundle_against_itself_passes(bundle: Bundle, people: PoseDataset) -> None:
    seen: list[tuple[str, int, int]] = []
    run = run_gate(bundle.root, bundle.root, people, RULES, options=OPTIONS, progress=lambda *told: seen.append(told))
    verdict = run.verdict
    assert (verdict.verdict, verdict.exit_code) == ("pass", 0)
    assert verdict.accuracy is not None
    assert verdict.accuracy.diff_points == 0
    assert verdict.accuracy.persons == 30
    assert verdict.latency is not None
    assert verdict.latency.pairs == 1
    assert verdict.seed == 5
    assert {what.split()[0] for what, _, _ in seen} == {"predicting", "timing"}
    assert run.timings is run.together.latency


def test_a_worse_bundle_fails_with_the_exit_code_of_accuracy(
    bundle: Bundle, blind: Bundle, people: PoseDataset
) -> None:
    verdict = run_gate(bundle.root, blind.root, people, RULES, options=OPTIONS).verdict
    assert (verdict.verdict, verdict.exit_code) == ("fail", 3)
    assert verdict.accuracy is not None
    assert verdict.accuracy.diff_points < -50
    assert verdict.baseline == "spots"
    assert verdict.candidate == "blind"


def test_accuracy_without_people_is_refused_before_anything_is_measured(bundle: Bundle) -> None:
    with pytest.raises(RecipeError, match="labelled people"):
        run_gate(bundle.root, bundle.root, None, RULES)


def test_people_with_other_keypoints_are_refused(bundle: Bundle, people: PoseDataset) -> None:
    other = replace(people, keypoints=msgspec.structs.replace(people.keypoints, names=("blue", "green")))
    with pytest.raises(SpecError, match="green"):
        run_gate(bundle.root, bundle.root, other, RULES)


def test_limits_alone_need_neither_people_nor_time(bundle: Bundle) -> None:
    rules = msgspec.structs.replace(RULES, accuracy=(), latency=None)
    run = run_gate(bundle.root, bundle.root, None, rules)
    assert run.verdict.verdict == "pass"
    assert run.timings is None
    found = {fact.name: fact.candidate for fact in run.verdict.facts}
    assert found["nodes.Conv"] == 1
    assert found["parameters"] == 6
    conditions = run.verdict.conditions
    assert conditions is not None
    assert conditions.baseline_digest == conditions.candidate_digest == bundle.digest
    assert conditions.protocol is None


def test_a_fact_that_the_files_do_not_tell_is_refused_before_anything_is_measured(
    bundle: Bundle, people: PoseDataset
) -> None:
    rules = msgspec.structs.replace(RULES, limits=(LimitRule("macs", 0.0),))  # no shape of the planes is told
    told: list[object] = []
    with pytest.raises(RecipeError, match="macs of both arms"):
        run_gate(bundle.root, bundle.root, people, rules, options=OPTIONS, progress=lambda *what: told.append(what))
    assert not told


def test_a_profile_says_how_long_each_stage_takes(bundle: Bundle) -> None:
    protocol = ProfileProtocol(duration_s=0.3, warm_up_ms=5.0, threads=1, persons=2, frame_hw=(120, 160))
    told: list[tuple[float, float]] = []
    record = profile(bundle.root, protocol, backend="onnxruntime", progress=lambda *t: told.append(t))
    samples = record.samples_ns.array()
    assert record.stages == ("crop", "infer", "decode")
    assert samples.shape == (len(samples), 3)
    assert samples.sum() / 1e9 + 0.2 >= 0.3
    assert (samples > 0).all()
    assert record.people == 2
    assert record.persons_per_s == pytest.approx(2e9 * len(samples) / samples.sum())
    assert record.facts.peak_rss_bytes >= record.facts.steady_rss_bytes > 10_000_000
    assert record.bundle_digest == bundle.digest
    assert told[-1] == (0.3, 0.3)
    assert msgspec.json.decode(msgspec.json.encode(record), type=ProfileRecord) == record


def test_a_profile_of_an_engine_that_is_not_there_is_a_usage_error(bundle: Bundle) -> None:
    with pytest.raises(UsageError):
        profile(bundle.root, backend="onnxruntime", precision="int8")
