"""The ablation of the protected parts: every rule of a network once, with a clock that knows the answer."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.protected import METRICS, Worth, columns, main, measure, open_bench, variants
from edgepose.blocks.config import KPEConfig, ORNConfig
from edgepose.blocks.kpe import build
from edgepose.data.coco import dataset
from edgepose.data.splits import split_train
from edgepose.spec import Keypoints
from tests.timing.fake_turns import FakeTimer
from tests.tiny_checkpoint import Tiny


def test_each_rule_whose_parts_a_network_has_is_changed_once() -> None:
    robust = KPEConfig("robust", (32, 32), 8, (8, 16, 16, 32), (1, 1, 1, 1), 16, orn=ORNConfig(16, 2))
    found = variants(build(robust, Keypoints(tuple("abc"))))
    rules = {variant.rule: variant for variant in found}
    assert len(rules) == len(found)
    assert next(iter(rules)) == ""
    assert {"Sum", "Normalise", "Mix", "Pool", "outputs", "first convolution", "output layers"} < set(rules)
    assert "Centroid" not in rules
    assert (rules["Mix"].parts, rules["Mix"].unprotected, rules["Mix"].change) == (2, ("Mix",), "quantised")
    assert rules["output layers"].protected == ("block.head.x", "block.head.y")
    plain = variants(build(KPEConfig("t", (32, 32), 8, (8, 8, 8, 8), (1, 1, 1, 1), 8), Keypoints(("a",))))
    assert [variant.rule for variant in plain] == ["", "outputs", "first convolution", "output layers"]


@pytest.mark.usefixtures("one_thread")
def test_every_variant_is_measured_and_timed_beside_the_network_that_keeps_all_rules(
    tiny: Tiny, tmp_path: Path
) -> None:
    train, dev = split_train(dataset(tiny.data, "train"))
    times = {"0: ": 1.0, "1: outputs": 1.2, "2: first convolution": 1.5, "3: output layers": 1.1}
    bench = open_bench(tiny.checkpoint, (train.sample(8, 0), dev), ("onnxruntime",), tmp_path)
    found = measure(bench, FakeTimer(times, noise=0.001))
    assert [worth.variant.rule for worth in found] == ["", "outputs", "first convolution", "output layers"]
    base = found[0]
    assert base.times == {}
    for worth, expected in zip(found[1:], (1.2, 1.5, 1.1), strict=True):
        ratio, low, high = worth.times["onnxruntime"]
        assert low <= ratio <= high
        assert ratio == pytest.approx(expected, rel=0.01)
        for name in METRICS:
            assert worth.change_points[name] == pytest.approx(100 * (worth.figures[name] - base.figures[name]))
    heads = columns(base.figures, ("onnxruntime",))
    assert all(len(worth.row(("onnxruntime",))) == len(heads) for worth in found)


def test_a_variant_that_a_backend_refuses_says_so() -> None:
    robust = KPEConfig("t", (32, 32), 8, (8, 8, 8, 8), (1, 1, 1, 1), 8)
    variant = variants(build(robust, Keypoints(("a",))))[1]
    worth = Worth(variant, {"pck_torso_0.2": 0.5}, {"pck_torso_0.2": -0.25}, refused={"openvino": "too odd"})
    assert worth.row(("onnxruntime", "openvino"))[-3:] == ("-0.25", "–", "does not run")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [(["kpe-none"], 2, "kpe-none"), (["kpe-t", "--data", "/no/such/folder"], 6, "/no/such/folder")],
)
def test_what_cannot_be_measured_is_refused(
    words: list[str], code: int, text: str, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [] if "--data" in words else ["--data", str(tiny.data)]
    assert main([*words, *data]) == code
    assert text in capsys.readouterr().err


def test_flags_that_contradict_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--no-time", "--backend", "openvino"])
    assert caught.value.code == 2
    assert "leave --backend off" in capsys.readouterr().err
