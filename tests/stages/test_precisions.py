"""Which precision is kept: by ratios that a fake timer gives, on engines that are really built."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgepose.bundle import check_engine, verify_bundle
from edgepose.compiler import CompileRequest, compile_bundle, planned_stages
from edgepose.errors import BackendUnavailable, RecipeError, UsageError
from edgepose.golden import check_golden
from edgepose.host import fingerprint
from edgepose.profiles import load_target
from edgepose.recipe import load_recipe
from edgepose.runtime import open_session
from edgepose.spec import Precision, Target
from edgepose.stages import precisions
from edgepose.stages.assemble import EngineOrder, engine_orders
from edgepose.stages.cache import StageKey, StageResult, run_stage
from edgepose.stages.precisions import contests, decide, settle
from edgepose.timing.record import ModelArm
from tests.timing.fake_turns import FakeTimer
from tests.tiny_checkpoint import Compiled, Watch, quick

ANY_CPU = Target("any", "d", ("onnxruntime", "openvino"), ("fp32", "bf16", "int8"), threads=1)
BF16_HOST = msgspec.structs.replace(fingerprint(), flags=("avx512_bf16",))
OLD_HOST = msgspec.structs.replace(fingerprint(), flags=("avx2",))
ARMS = tuple(ModelArm(p, "nowhere", "openvino", p) for p in ("fp32", "bf16", "int8"))


@pytest.fixture
def bf16_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "fingerprint", lambda: BF16_HOST)


def names(contest: precisions.Contest) -> list[Precision | None]:
    return [order.precision for order in contest.candidates]


# Who takes part


def test_without_precisions_nothing_is_compared_and_keys_stay_what_they_were() -> None:
    orders = engine_orders([ANY_CPU])
    for order, contest in zip(orders, contests(orders, None, "int8"), strict=True):
        assert contest.candidates == (order,)
        assert contest.stages == (f"engine-{order.backend}",)
        assert order.key({"export": "e"}).config == {"weight_bits": order.weight_bits}


@pytest.mark.usefixtures("bf16_host")
def test_auto_compares_all_that_target_backend_and_processor_have() -> None:
    ort, openvino = contests(engine_orders([ANY_CPU]), "auto", "int8")
    assert names(ort) == ["fp32", None]
    assert ort.absent == {"bf16": "ONNX Runtime has no BF16 kernels on CPUs"}
    assert names(openvino) == ["fp32", "bf16", None]
    assert not openvino.absent
    assert openvino.stages == ("engine-openvino-fp32", "engine-openvino-bf16", "engine-openvino", "precision-openvino")


def test_a_processor_without_bf16_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precisions, "fingerprint", lambda: OLD_HOST)
    _, openvino = contests(engine_orders([ANY_CPU]), "auto", "int8")
    assert names(openvino) == ["fp32", None]
    assert "neither avx512_bf16 nor amx_bf16" in openvino.absent["bf16"]


@pytest.mark.usefixtures("bf16_host")
def test_a_float_network_has_no_int8_engine() -> None:
    ort, openvino = contests(engine_orders([ANY_CPU]), "auto", "fp32")
    assert names(ort) == [None]
    assert ort.absent["int8"] == "the network is not quantised"
    assert names(openvino) == [None, "bf16"]
    with pytest.raises(UsageError, match=r"int8.*not quantised"):
        contests(engine_orders([ANY_CPU]), ("fp32", "int8"), "fp32")


def test_a_precision_that_the_target_does_not_run_is_refused() -> None:
    with pytest.raises(UsageError, match=r"precisions: bf16.*x86-cpu, which runs fp32, int8"):
        contests(engine_orders([load_target("x86-cpu")]), ("bf16",), "int8")


def test_a_place_for_which_nothing_is_left_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match=r"onnxruntime.*no BF16 kernels"):
        contests(engine_orders([ANY_CPU]), ("bf16",), "int8")


@pytest.mark.parametrize(
    ("text", "match"),
    [("[]", "precisions"), ("[int8, int8]", "twice"), ("[int4]", "int4"), ("fastest", "precisions"), ("auto", "")],
)
def test_precisions_of_a_recipe_file(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\ndescription: d\nprecisions: {text}\n")
    if not match:
        assert load_recipe(str(path)).precisions == "auto"
        return
    with pytest.raises(RecipeError, match=match):
        load_recipe(str(path))


# Who wins


@pytest.mark.parametrize(
    ("times", "kept"),
    [
        ({"fp32": 4.0, "bf16": 2.0, "int8": 1.0}, "int8"),
        ({"fp32": 4.0, "bf16": 2.0, "int8": 3.0}, "bf16"),  # faster than FP32, slower than what is kept by then
        ({"fp32": 1.0, "bf16": 2.0, "int8": 3.0}, "fp32"),
        ({"fp32": 1.0, "bf16": 1.0, "int8": 1.0}, "fp32"),  # a tie stays with the more accurate one
        ({"fp32": 1.0, "bf16": 0.99, "int8": 0.99}, "fp32"),  # surely faster, but by less than is worth it
    ],
)
def test_the_fastest_is_kept_and_a_tie_goes_to_the_more_accurate(times: dict[str, float], kept: str) -> None:
    turns = FakeTimer(times)(ARMS, precisions._PROTOCOL, first_group=0)
    number, undecided = decide(turns)
    assert ARMS[number].precision == kept
    assert not undecided


def test_what_noise_hides_is_undecided_and_the_accurate_one_stays() -> None:
    timer = FakeTimer({"fp32": 1.0, "bf16": 1.0, "int8": 0.95}, noise=0.3, between=0.3)
    number, undecided = decide(timer(ARMS, precisions._PROTOCOL, first_group=0))
    assert number == 0
    assert undecided


def test_what_the_winner_beats_in_any_case_need_not_be_decided() -> None:
    timer = FakeTimer({"fp32": 1.0, "bf16": 1.0, "int8": 0.1}, noise=0.3, between=0.3)
    turns = timer(ARMS, precisions._PROTOCOL, first_group=0)
    low, high = precisions._bounds(turns.between(0, 1))
    assert low < 1 - precisions.LEAST_GAIN <= high  # nobody can tell whether BF16 is faster than FP32
    assert decide(turns) == (2, ())


# A place is settled


def stored(folder: Path, precision: str, **report: Any) -> StageResult:
    path = folder / precision
    path.mkdir()
    (path / "model.onnx").write_bytes(b"x" * 7)
    report = {"precision": precision, "main": "model.onnx", "shift": {"median_px": 0.0}, **report}
    return StageResult(f"engine-{precision}", precision, str(path), report, 0.0)


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def run(key: StageKey, work: Any) -> StageResult:
        return run_stage(key, work, within=tmp_path / "stages")

    return run


@pytest.fixture
def place() -> precisions.Contest:
    order = EngineOrder(ANY_CPU, "openvino", 8)
    fp32, bf16 = EngineOrder(ANY_CPU, "openvino", 8, "fp32"), EngineOrder(ANY_CPU, "openvino", 8, "bf16")
    return precisions.Contest(order, True, (fp32, bf16, order), {"fp16": "no"})


def test_losers_stay_in_the_report_with_ratios_and_spread(place: precisions.Contest, run: Any, tmp_path: Path) -> None:
    timer = FakeTimer({"fp32": 4.0, "bf16": 2.0, "int8": 1.0})
    order, kept = settle(place, lambda o: stored(tmp_path, o.precision or "int8"), run, timer)
    assert order is place.order
    assert kept.key == "int8"
    report = kept.report["precisions"]
    assert report["kept"] == "int8"
    assert report["absent"] == {"fp16": "no"}
    rows = {row["precision"]: row for row in report["compared"]}
    assert rows["int8"]["ratio_to_first"] == pytest.approx(0.25, rel=0.02)
    assert rows["bf16"]["ratio_to_kept"] == pytest.approx(2.0, rel=0.02)
    low, high = rows["fp32"]["ci95_to_kept"]
    assert low <= rows["fp32"]["ratio_to_kept"] <= high
    assert len(rows["fp32"]["by_group_to_kept"]) == report["groups"] == 3
    assert rows["fp32"]["spread_to_kept"] > 0
    assert "ratio_to_kept" not in rows["int8"]
    assert "ms" not in "".join(name for row in rows.values() for name in row)  # no bare milliseconds
    assert timer.calls == [3]
    assert report["text"].startswith("int8 is kept: fp32 takes ")


def test_an_undecided_timing_grows_and_then_says_that_it_is_too_noisy(
    place: precisions.Contest, run: Any, tmp_path: Path
) -> None:
    timer = FakeTimer({"fp32": 1.0, "bf16": 0.97, "int8": 0.97}, noise=0.5, between=0.5)
    _, kept = settle(place, lambda o: stored(tmp_path, o.precision or "int8"), run, timer)
    assert kept.key == "fp32"
    assert timer.calls == [3, 3, 6]
    assert kept.report["precisions"]["groups"] == 12
    assert "too noisy" in kept.report["precisions"]["text"]


def test_a_timing_is_found_again_and_another_number_of_threads_or_host_is_another_timing(
    place: precisions.Contest, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = {p: stored(tmp_path, p) for p in ("fp32", "bf16", "int8")}
    timer = FakeTimer({"fp32": 4.0, "bf16": 2.0, "int8": 1.0})

    def once(contest: precisions.Contest) -> None:
        settle(contest, lambda o: results[o.precision or "int8"], run, timer)

    once(place)
    once(place)
    assert timer.calls == [3]
    two = msgspec.structs.replace(ANY_CPU, threads=2)
    once(precisions.Contest(EngineOrder(two, "openvino", 8), True, place.candidates))
    assert timer.calls == [3, 3]
    monkeypatch.setattr(precisions, "fingerprint", lambda: msgspec.structs.replace(fingerprint(), cpu="another"))
    once(place)
    assert timer.calls == [3, 3, 3]


def test_an_engine_that_strays_takes_no_part(place: precisions.Contest, run: Any, tmp_path: Path) -> None:
    def build(order: EngineOrder) -> StageResult:
        refused = {"refused": "it strays"} if order.precision == "bf16" else {}
        return stored(tmp_path, order.precision or "int8", **refused)

    _, kept = settle(place, build, run, FakeTimer({"fp32": 4.0, "bf16": 0.1, "int8": 1.0}))
    assert kept.key == "int8"
    assert kept.report["precisions"]["absent"]["bf16"] == "it strays"


def test_nothing_but_engines_that_stray_is_an_error(run: Any, tmp_path: Path) -> None:
    order = EngineOrder(ANY_CPU, "openvino", 8, "bf16")
    contest = precisions.Contest(order, True, (order,))
    with pytest.raises(BackendUnavailable, match=r"it strays.*add fp32"):
        settle(contest, lambda _: stored(tmp_path, "bf16", refused="it strays"), run, FakeTimer({}))


def test_a_single_candidate_is_not_timed(run: Any, tmp_path: Path) -> None:
    order = EngineOrder(ANY_CPU, "openvino", 8, "fp32")
    timer = FakeTimer({})
    _, kept = settle(precisions.Contest(order, True, (order,)), lambda _: stored(tmp_path, "fp32"), run, timer)
    assert kept.report["precisions"]["kept"] == "fp32"
    assert timer.calls == []


# For real


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_bundle_has_the_engine_that_won(
    precision: str, compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compiled("ptq-int8")
    (quantised,) = [stage for stage in first.stages if stage.stage == "ptq"]
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    for stage in first.stages:  # a cache of its own, for timings that are not real
        shutil.copytree(stage.path, tmp_path / "cache" / "stages" / stage.path.name)
    recipe = msgspec.structs.replace(quick("ptq-int8"), precisions=("int8", "fp32"))
    asked = CompileRequest(recipe, str(quantised.path / "network"), None, tmp_path / "out.bundle")
    stages = ["engine-openvino-fp32", "engine-openvino", "precision-openvino"]
    assert [stage for stage, _ in planned_stages(asked)][-4:-1] == stages
    result = compile_bundle(asked, Watch(), timer=FakeTimer({"fp32": 4.0, "int8": 4.0} | {precision: 1.0}))
    bundle = verify_bundle(result.bundle.root)
    assert [engine.precision for engine in bundle.manifest.engines] == [precision] * 2
    for engine in bundle.manifest.engines:
        session = open_session(check_engine(bundle, engine), engine.backend, threads=1, precision=engine.precision)
        assert check_golden(bundle, engine, session) is not None
        session.close()
    reports = bundle.manifest.reports
    assert reports["engines/this-cpu/openvino"]["precisions"]["kept"] == precision
    assert [row["precision"] for row in reports["engines/this-cpu/openvino"]["precisions"]["compared"]] == [
        "fp32", "int8",
    ]  # fmt: skip
    assert not [name for name in reports if name.startswith(("engine-", "precision-"))]
    assert bundle.manifest.chain["onnx"] == first.bundle.manifest.chain["onnx"]
    again = compile_bundle(asked, Watch(), timer=FakeTimer({}))  # which cannot time anything
    assert again.reused
    assert again.bundle.digest == bundle.digest
