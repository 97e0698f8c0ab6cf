"""Float engines of quantised networks: the network's own floats, and how far those are from its codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgepose.blocks.card import read_card
from edgepose.errors import ParityError, UsageError
from edgepose.export.engine import Reference, engine_from_onnx
from edgepose.host import cpu_flags
from edgepose.runtime import open_session
from edgepose.stages import float_engine
from edgepose.stages.export import FLOAT_ONNX, MODEL, golden_vectors
from edgepose.stages.float_engine import build_float_engine
from tests.tiny_checkpoint import Compiled, Tiny


@pytest.fixture
def exported(compiled: Compiled) -> Path:
    (stage,) = [stage for stage in compiled("ptq-int8").stages if stage.stage == "export"]
    return stage.path


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_float_engine_of_a_quantised_network_says_what_its_floats_say(
    backend: str, exported: Path, tiny: Tiny, tmp_path: Path
) -> None:
    spec = read_card(tiny.checkpoint).spec
    report = build_float_engine(exported, spec, backend, "fp32", tmp_path)  # type: ignore[arg-type]
    assert (report["precision"], report["dialect"]) == ("fp32", "float")
    assert report["from_floats"]["shift"]["logit_gap"] < 1e-5
    assert report["shift"]["logit_gap"] > 1e-4  # the codes that it has not
    images, _ = golden_vectors(exported)
    arms = [open_session(exported / FLOAT_ONNX, "onnxruntime", threads=1)]
    arms.append(open_session(tmp_path / report["main"], backend, threads=1))  # type: ignore[arg-type]
    one, other = (arm.infer({"image": images})["simcc_x"] for arm in arms)
    np.testing.assert_allclose(one, other, atol=1e-3 * np.abs(one).max())


def test_an_engine_in_bf16_that_strays_is_refused_and_one_in_fp32_is_a_fault(
    exported: Path, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = read_card(tiny.checkpoint).spec

    def strays(*_: object, **__: object) -> None:
        raise ParityError("engine", found="too far")

    monkeypatch.setattr(float_engine, "engine_from_onnx", strays)
    assert "too far" in build_float_engine(exported, spec, "openvino", "bf16", tmp_path)["refused"]
    with pytest.raises(ParityError):
        build_float_engine(exported, spec, "openvino", "fp32", tmp_path)


@pytest.mark.skipif(not {"avx512_bf16", "amx_bf16"} & set(cpu_flags()), reason="this processor has no BF16")
def test_bf16_is_an_engine_of_its_own(exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    report = build_float_engine(exported, read_card(tiny.checkpoint).spec, "openvino", "bf16", tmp_path)
    assert report["precision"] == "bf16"
    assert 0 < report["from_floats"]["shift"]["logit_gap"] < 0.02


def test_codes_are_int8_and_floats_are_not(exported: Path, tiny: Tiny, tmp_path: Path) -> None:
    spec = read_card(tiny.checkpoint).spec
    reference = Reference(spec, *golden_vectors(exported))
    with pytest.raises(UsageError, match="fp32, of a network written as u8s8"):
        engine_from_onnx(exported / MODEL, "u8s8", "openvino", reference, tmp_path, precision="fp32")
    with pytest.raises(UsageError, match="int8, of a network written as float"):
        engine_from_onnx(exported / FLOAT_ONNX, "float", "openvino", reference, tmp_path, precision="int8")
    with pytest.raises(UsageError, match="bf16 with onnxruntime"):
        engine_from_onnx(exported / FLOAT_ONNX, "float", "onnxruntime", reference, tmp_path, precision="bf16")
