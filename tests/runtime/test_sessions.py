"""Every backend answers like NumPy, checks what it is fed and says what is wrong with a file."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from edgepose.errors import BackendUnavailable, BadInput, MissingDependency, OnnxError, SpecError, UsageError
from edgepose.runtime import BACKENDS, EXECUTABLE, Session, extra_of, installed_backends, open_session
from edgepose.spec import Backend
from tests.fakes import HEIGHT, WIDTH, FakeSession, spot_outputs, spot_spec
from tests.tiny_network import spot_ir, spot_onnx

KINDS = ("onnxruntime", "openvino ir", "openvino onnx", "fake")


def images(count: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((count, 3, HEIGHT, WIDTH), np.float32)


def engine(folder: Path, kind: str) -> tuple[Path, Backend]:
    if kind == "openvino ir":
        return spot_ir(folder), "openvino"
    path = folder / "spots.onnx"
    path.write_bytes(spot_onnx())
    return path, "onnxruntime" if kind == "onnxruntime" else "openvino"


@pytest.fixture(params=KINDS)
def session(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Session]:
    opened: Session = (
        FakeSession(spot_spec())
        if request.param == "fake"
        else open_session(*engine(tmp_path, request.param), threads=1)
    )
    yield opened
    opened.close()


# Answers


@pytest.mark.parametrize("count", [1, 2, 65])
def test_answers_are_those_of_numpy(session: Session, count: int) -> None:
    outputs = session.infer({"images": images(count)})
    expected = spot_outputs(images(count))
    assert list(outputs) == [spec.name for spec in session.outputs] == ["simcc_x", "simcc_y"]
    for name, value in outputs.items():
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, expected[name], rtol=1e-5)


def test_specification_is_read_from_the_network(session: Session) -> None:
    (images_in,) = session.inputs
    assert (images_in.name, images_in.shape, images_in.dtype) == ("images", ("batch", 3, HEIGHT, WIDTH), "float32")
    assert [spec.shape[1:] for spec in session.outputs] == [(2, WIDTH), (2, HEIGHT)]


def test_answers_belong_to_the_caller(session: Session) -> None:
    first = session.infer({"images": images(2, seed=1)})
    kept = {name: value.copy() for name, value in first.items()}
    session.infer({"images": images(2, seed=2)})
    for name, value in first.items():
        np.testing.assert_array_equal(value, kept[name])
        value[:] = 0  # writable


def test_feeds_are_not_changed_and_need_not_be_contiguous(session: Session) -> None:
    fed = images(2)[:, ::-1]
    kept = fed.copy()
    outputs = session.infer({"images": fed})
    np.testing.assert_array_equal(fed, kept)
    np.testing.assert_allclose(outputs["simcc_x"], spot_outputs(kept)["simcc_x"], rtol=1e-5)


def test_threads_do_not_change_the_answer(tmp_path: Path) -> None:
    for kind in ("onnxruntime", "openvino ir"):
        for threads in (0, 2):
            opened = open_session(*engine(tmp_path, kind), threads=threads)
            np.testing.assert_allclose(
                opened.infer({"images": images()})["simcc_y"], spot_outputs(images())["simcc_y"], rtol=1e-5
            )
            opened.close()


# Wrong feeds


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, r"found arrays named \[\], expected \['images'\]"),
        ({"image": images()}, r"arrays named \['image'\]"),
        ({"images": images(), "more": images()}, r"arrays named"),
        ({"images": images().astype(np.float64)}, r"images: found dtype float64, expected float32; convert it"),
        ({"images": images()[:, :2]}, rf"shape \(2, 2, {HEIGHT}, {WIDTH}\), expected \(batch, 3, {HEIGHT}, {WIDTH}\)"),
        ({"images": images()[0]}, r"shape \(3, "),
        ({"images": images()[:0]}, r"shape \(0, 3, "),
        ({"images": [[1.0]]}, "list, expected a NumPy array"),
    ],
)
def test_wrong_feeds_are_told_from_right_ones(session: Session, feeds: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        session.infer(feeds)
    assert session.infer({"images": images()})["simcc_x"].shape == (2, 2, WIDTH)


def test_closed_session_says_so(session: Session) -> None:
    session.close()
    session.close()
    with pytest.raises(SpecError, match="a closed session"):
        session.infer({"images": images()})


# Wrong files


@pytest.mark.parametrize("backend", EXECUTABLE)
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("absent.onnx", None),
        ("empty.onnx", b""),
        ("text.onnx", b"not a model"),
        ("half.onnx", spot_onnx()[:200]),
    ],
)
def test_unreadable_onnx_file_is_named(tmp_path: Path, backend: Backend, name: str, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OnnxError, match=name) as caught:
        open_session(tmp_path / name, backend, threads=1)
    assert "\n" not in str(caught.value)


def test_ir_without_its_weights_is_named(tmp_path: Path) -> None:
    xml = spot_ir(tmp_path)
    xml.with_suffix(".bin").unlink()
    with pytest.raises(BadInput, match=r"spots\.xml"):
        open_session(xml, "openvino", threads=1)
    with pytest.raises(BadInput, match="no such file"):
        open_session(tmp_path / "absent.xml", "openvino", threads=1)


# Precision


def test_openvino_computes_in_fp32_unless_asked_otherwise(tmp_path: Path) -> None:
    path, backend = engine(tmp_path, "openvino ir")
    from edgepose.runtime.openvino import shared_core

    fed, expected = {"images": images(8)}, spot_outputs(images(8))["simcc_x"]
    errors = {}
    for precision in ("fp32", "int8", "bf16"):
        if precision == "bf16" and "BF16" not in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            with pytest.raises(BackendUnavailable, match="expected BF16"):
                open_session(path, backend, threads=1, precision="bf16")
            continue
        opened = open_session(path, backend, threads=1, precision=precision)
        errors[precision] = np.abs(opened.infer(fed)["simcc_x"] - expected).max()
        opened.close()
    assert errors["fp32"] < 1e-4
    assert errors["int8"] < 1e-4
    assert errors.get("bf16", 1) > 1e-3


def test_onnxruntime_has_no_bf16(tmp_path: Path) -> None:
    path, backend = engine(tmp_path, "onnxruntime")
    with pytest.raises(UsageError, match="bf16 with onnxruntime"):
        open_session(path, backend, precision="bf16")


# The dispatcher


def test_unknown_backend_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="'ncnn', expected one of onnxruntime, openvino, tensorrt, tensorrt-rtx"):
        open_session(tmp_path / "x", "ncnn")


def test_negative_threads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="threads: found -1"):
        open_session(tmp_path / "x", "onnxruntime", threads=-1)


@pytest.mark.parametrize(("backend", "leaf"), [("onnxruntime", "ort"), ("openvino", "openvino")])
def test_missing_package_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: Backend, leaf: str
) -> None:
    path, _ = engine(tmp_path, "onnxruntime")
    monkeypatch.delitem(sys.modules, f"edgepose.runtime.{leaf}", raising=False)
    monkeypatch.setitem(sys.modules, backend, None)  # what an absent package looks like to the import system
    assert backend not in installed_backends()
    with pytest.raises(MissingDependency, match=rf"pip install 'edgepose\[{extra_of(backend)}\]'") as caught:
        open_session(path, backend)
    assert caught.value.exit_code == 6


def test_broken_package_is_not_called_missing(tmp_path: Path) -> None:
    """A package that is found but does not import, in a process of its own."""
    import subprocess

    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libwhatever.so.1: no such file')\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from edgepose.runtime import open_session; from edgepose.errors import BackendUnavailable\n"
        "try: open_session('x.onnx', 'onnxruntime')\n"
        "except BackendUnavailable as err: print(err)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "does not import (libwhatever.so.1" in result.stdout
    assert "reinstall" in result.stdout


def test_every_backend_has_an_extra() -> None:
    assert [extra_of(backend) for backend in BACKENDS] == ["ort", "openvino", "tensorrt", "tensorrt-rtx"]


def test_a_signal_after_openvino_sessions_were_freed_does_not_end_the_process(tmp_path: Path) -> None:
    path, _ = engine(tmp_path, "openvino ir")
    script = (
        "import gc, os, signal, sys, threading\n"
        "from pathlib import Path\n"
        "from edgepose.runtime import open_session\n"
        "def use():\n"
        "    open_session(Path(sys.argv[1]), 'openvino', threads=1).close()\n"
        "    gc.collect()\n"
        "use()\n"
        "thread = threading.Thread(target=use); thread.start(); thread.join()\n"
        "signal.signal(signal.SIGINT, lambda *_: print('handled'))\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, "handled\n"), ended.stderr
