"""From a bundle to a bundle with other engines: judged by the source's golden vectors, the source left alone."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from edgepose.bundle import Bundle, check_engine, verify_bundle, write_bundle
from edgepose.compiler import CompileRequest, compile_bundle
from edgepose.errors import (
    BackendUnavailable,
    BadInput,
    EdgeposeError,
    IntegrityError,
    ParityError,
    RecipeError,
    UsageError,
)
from edgepose.export.int8_share import Achieved
from edgepose.golden import check_golden
from edgepose.host import engine_cache, fingerprint, weight_bits
from edgepose.rebuild import BuildRequest, build_bundle
from edgepose.runtime import open_session
from edgepose.stages.engine_latency import Latency, time_engine
from edgepose.timing.record import LatencyProtocol, ModelArm
from tests.tiny_checkpoint import Compiled, Tiny, Watch, quick, subprocess_environment
from tests.tiny_network import flip_a_byte, spot_bundle, spot_draft

REPOSITORY = Path(__file__).resolve().parents[1]
ENGINES = ["engine-onnxruntime", "engine-openvino"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def spots(tmp_path: Path) -> Bundle:
    """A float bundle whose engines take milliseconds to build."""
    return spot_bundle(tmp_path)


def content_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def check_engines(bundle: Bundle) -> None:
    """Every engine answers on this machine what the golden vectors say."""
    for engine in bundle.manifest.engines:
        session = open_session(check_engine(bundle, engine), engine.backend, threads=1, precision=engine.precision)
        assert check_golden(bundle, engine, session) is not None
        session.close()


def refused(source: Path, targets: tuple[str, ...], out: Path, error: type[EdgeposeError], match: str) -> EdgeposeError:
    before = out.exists()
    with pytest.raises(error, match=match) as caught:
        build_bundle(BuildRequest(source, targets, out), Watch())
    assert out.exists() == before
    return caught.value


# What is built


def test_a_float_bundle_gets_float_engines(spots: Bundle, tmp_path: Path) -> None:
    before, watch = content_of(spots.root), Watch()
    result = build_bundle(BuildRequest(spots.root, ("this-cpu",), tmp_path / "new.bundle"), watch)
    bundle = verify_bundle(tmp_path / "new.bundle")
    assert not result.reused
    assert watch.ran == ENGINES
    assert [(e.target, e.backend, e.precision, e.dialect) for e in bundle.manifest.engines] == [
        ("this-cpu", "onnxruntime", "fp32", "float"),
        ("this-cpu", "openvino", "fp32", "float"),
    ]
    check_engines(bundle)
    assert content_of(spots.root) == before


def test_engines_are_timed_as_their_target_runs_them(spots: Bundle, tmp_path: Path) -> None:
    (tmp_path / "board.yaml").write_text(
        "name: board\ndescription: A board.\nbackends: [onnxruntime]\nprecisions: [fp32]\nthreads: 1\nbatch: 2\n"
        "execution: {onnxruntime: {optimisation: basic}}\n"
    )
    asked: list[tuple[ModelArm, LatencyProtocol]] = []

    def timer(arm: ModelArm, protocol: LatencyProtocol) -> Latency:
        asked.append((arm, protocol))
        return time_engine(arm, protocol)

    wanted = (str(tmp_path / "board.yaml"),)
    bundle = build_bundle(BuildRequest(spots.root, wanted, tmp_path / "new.bundle"), Watch(), timer=timer).bundle
    ((arm, protocol),) = asked
    assert arm.execution.onnxruntime.optimisation == "basic"
    assert (protocol.threads, protocol.batch) == (1, 2)
    latency = bundle.manifest.reports["engines/board/onnxruntime"]["latency"]
    assert 0 < latency["p10_ms"] <= latency["median_ms"] <= latency["p90_ms"]
    assert latency["calls"] >= 12


def test_an_engine_that_does_too_little_in_integers_is_refused(
    compiled: Compiled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = compiled("ptq-int8").bundle
    seen: list[float] = []

    def require(found: Achieved, minimum: float, where: str) -> None:
        seen.append(minimum)
        raise ParityError(where, found=f"{found.asked_share:.0%}", expected=f"{minimum:.0%}")

    monkeypatch.setattr("edgepose.stages.budget.require", require)
    refused(source.root, ("this-cpu",), tmp_path / "new.bundle", ParityError, "engine onnxruntime for this-cpu")
    assert seen == [0.95]  # the recipe's


def test_the_history_of_the_source_is_carried_over(spots: Bundle, tmp_path: Path) -> None:
    bundle = build_bundle(BuildRequest(spots.root, ("this-cpu",), tmp_path / "new.bundle"), Watch()).bundle
    chain, reports = bundle.manifest.chain, bundle.manifest.reports
    assert chain["dataset"] == "d" * 64
    assert chain["bundle"] == spots.digest
    assert chain["onnx"] == spots.manifest.chain["onnx"]
    assert [name for name in chain if name.startswith("engine:")] == [
        f"engine:{e.path}" for e in bundle.manifest.engines
    ]
    assert reports["export"] == spots.manifest.reports["export"]
    assert reports["build"]["source"] == {"name": "spots", "digest": spots.digest}
    assert reports["build"]["host"] == fingerprint().digest
    assert reports["engines/this-cpu/openvino"]["differences"].keys() == {"simcc_x", "simcc_y"}
    again = build_bundle(BuildRequest(bundle.root, ("x86-cpu",), tmp_path / "third.bundle"), Watch()).bundle
    assert again.manifest.reports["build"]["before"]["source"]["digest"] == spots.digest
    assert again.manifest.chain["bundle"] == bundle.digest
    assert "engines/this-cpu/openvino" not in again.manifest.reports
    assert {engine.target for engine in again.manifest.engines} == {"x86-cpu"}


def test_a_quantised_bundle_gets_seven_bit_weights_for_cpus_that_saturate(compiled: Compiled, tmp_path: Path) -> None:
    source = compiled("ptq-int8").bundle
    before = content_of(source.root)
    bundle = build_bundle(BuildRequest(source.root, ("x86-cpu", "this-cpu"), tmp_path / "new.bundle"), Watch()).bundle
    reports = bundle.manifest.reports
    for backend in ("onnxruntime", "openvino"):
        narrow = reports[f"engines/x86-cpu/{backend}"]
        assert (narrow["weight_bits"], narrow["dialect"], narrow["int8_share"]) == (7, "u8s8", 1.0)
        assert narrow["narrowed"]["weights"] > 0
        assert ("narrowed" in reports[f"engines/this-cpu/{backend}"]) == (weight_bits(fingerprint())[0] == 7)
    assert {engine.precision for engine in bundle.manifest.engines} == {"int8"}
    assert bundle.manifest.chain.items() >= {k: source.manifest.chain[k] for k in ("checkpoint", "compressed")}.items()
    assert reports["ptq"] == source.manifest.reports["ptq"]
    check_engines(verify_bundle(bundle.root))
    assert content_of(source.root) == before


# Reuse


def test_engines_are_found_again_below_the_bundle_and_this_host(spots: Bundle, tmp_path: Path) -> None:
    first, watch = build_bundle(BuildRequest(spots.root, ("this-cpu",), tmp_path / "new.bundle"), Watch()), Watch()
    again = build_bundle(BuildRequest(spots.root, ("this-cpu",), tmp_path / "new.bundle"), watch)
    assert again.reused
    assert again.bundle.digest == first.bundle.digest
    assert watch.reused == ENGINES
    place = engine_cache(spots.digest, fingerprint())
    assert all(stage.path.parent == place for stage in again.stages)
    assert len(list(place.iterdir())) == 2


_BUILD = """
import sys
from pathlib import Path
from edgepose.rebuild import BuildRequest, build_bundle
from tests.tiny_checkpoint import Watch
result = build_bundle(BuildRequest(Path(sys.argv[1]), ("this-cpu",), Path(sys.argv[2])), Watch())
heavy = {"torch", "nncf"} | ({"onnx", "onnxruntime", "openvino"} if sys.argv[3] == "reused" else set())
heavy &= set(sys.modules)
sys.exit(f"reused {result.reused}, loaded {heavy}" if heavy or result.reused != (sys.argv[3] == "reused") else 0)
"""


def test_building_loads_no_torch_and_finding_no_builder(spots: Bundle, cache: Path, tmp_path: Path) -> None:
    for kind in ("built", "reused"):
        ended = subprocess.run(
            [sys.executable, "-c", _BUILD, spots.root, tmp_path / "new.bundle", kind],
            cwd=REPOSITORY, env=subprocess_environment(cache), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr


def test_a_compile_does_not_take_a_built_bundle_for_its_own(tiny: Tiny, compiled: Compiled, tmp_path: Path) -> None:
    source = compiled("fp32").bundle
    build_bundle(BuildRequest(source.root, ("x86-cpu",), tmp_path / "new.bundle"), Watch())
    request = CompileRequest(quick("fp32"), str(tiny.checkpoint), tiny.data, tmp_path / "new.bundle")
    with pytest.raises(UsageError, match="a bundle made from other inputs"):
        compile_bundle(request, Watch())


# Refused


def test_a_target_that_runs_tensorrt_only(spots: Bundle, tmp_path: Path) -> None:
    error = refused(
        spots.root, ("jetson-orin-nano",), tmp_path / "n.bundle", BackendUnavailable, "cannot be built here"
    )
    assert error.exit_code == 6


def test_an_unknown_target(spots: Bundle, tmp_path: Path) -> None:
    refused(spots.root, ("this-cpo",), tmp_path / "n.bundle", RecipeError, "this-cpu")


def test_a_target_without_the_networks_precision(spots: Bundle, tmp_path: Path) -> None:
    (tmp_path / "int.yaml").write_text("name: int\ndescription: d\nbackends: [openvino]\nprecisions: [int8]\n")
    refused(spots.root, (str(tmp_path / "int.yaml"),), tmp_path / "n.bundle", UsageError, "expected fp32 among them")


@pytest.mark.parametrize("inside", ["", "engines/new"])
def test_the_source_is_never_written_to(inside: str, spots: Bundle, tmp_path: Path) -> None:
    before = content_of(spots.root)
    with pytest.raises(UsageError, match="the source itself, or a place in it"):
        build_bundle(BuildRequest(spots.root, ("this-cpu",), spots.root / inside, replace=True), Watch())
    assert content_of(spots.root) == before


def test_a_name_that_is_taken(spots: Bundle, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    refused(spots.root, ("this-cpu",), tmp_path / "mine", UsageError, "something else there")
    build_bundle(BuildRequest(spots.root, ("this-cpu",), tmp_path / "new.bundle"), Watch())
    refused(spots.root, ("x86-cpu",), tmp_path / "new.bundle", UsageError, "a bundle made from other inputs")
    result = build_bundle(BuildRequest(spots.root, ("x86-cpu",), tmp_path / "new.bundle", replace=True), Watch())
    assert {engine.target for engine in result.bundle.manifest.engines} == {"x86-cpu"}


@pytest.mark.parametrize("name", ["model.onnx", "golden/outputs.npz", "manifest.json"])
@pytest.mark.parametrize("known", [False, True])
def test_a_source_with_one_byte_changed(name: str, known: bool, spots: Bundle, tmp_path: Path) -> None:
    if known:  # the engines are in the cache already
        build_bundle(BuildRequest(spots.root, ("this-cpu",), tmp_path / "before.bundle"), Watch())
    flip_a_byte(spots.root / name)
    error = refused(spots.root, ("this-cpu",), tmp_path / "n.bundle", IntegrityError, name)
    assert error.exit_code == 8


def test_a_source_without_golden_vectors(tmp_path: Path) -> None:
    from dataclasses import replace

    source = write_bundle(tmp_path / "blind.bundle", replace(spot_draft(tmp_path), golden=None)).root
    refused(source, ("this-cpu",), tmp_path / "n.bundle", BadInput, "no golden vectors")


def test_an_engine_that_answers_differently_is_not_handed_on(tmp_path: Path, cache: Path) -> None:
    draft = spot_draft(tmp_path)
    assert draft.golden is not None
    draft.golden.outputs["simcc_x"][:] += 0.5
    source = write_bundle(tmp_path / "lying.bundle", draft).root
    error = refused(source, ("this-cpu",), tmp_path / "n.bundle", ParityError, "would have passed")
    assert error.exit_code == 5
    assert not list(cache.rglob("stage.json"))


def test_signed_activations_are_refused(compiled: Compiled, tmp_path: Path) -> None:
    import onnx

    from edgepose.bundle import BundleDraft, golden_vectors

    source = compiled("ptq-int8").bundle
    model = onnx.load(source.root / "model.onnx")
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            (zero,) = [value for value in model.graph.initializer if value.name == node.input[2]]
            array = onnx.numpy_helper.to_array(zero).astype("int8") * 0
            zero.CopyFrom(onnx.numpy_helper.from_array(array, zero.name))
    onnx.save(model, tmp_path / "signed.onnx")
    draft = BundleDraft("s", source.manifest.spec, tmp_path / "signed.onnx", (), {}, {}, golden_vectors(source))
    signed = write_bundle(tmp_path / "signed.bundle", draft).root
    refused(signed, ("this-cpu",), tmp_path / "n.bundle", UsageError, "signed activations, which only TensorRT")
