"""What stands between a machine and a TensorRT engine is found out and said plainly."""

from __future__ import annotations

import re
import sys
import types
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgepose.errors import BadInput, EnvironmentFault
from edgepose.runtime import open_session
from edgepose.runtime.trt_diagnosis import diagnose, missing_fault
from edgepose.runtime.trt_versions import FLAVOURS, Flavour


class FakeDriver:
    """libcuda.so.1 with a given answer to cuInit and a given number of GPUs."""

    def __init__(self, status: int = 0, gpus: int = 1) -> None:
        self._status, self._gpus = status, gpus

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._gpus
        return 0


def absent_driver(name: str) -> Any:
    raise OSError(f"{name}: cannot open shared object file: No such file or directory")


def machine_with_gpu(root: Path) -> Path:
    (root / "dev").mkdir()
    (root / "dev" / "nvidiactl").touch()
    return root


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_machine_without_anything_lacks_device_and_driver(tmp_path: Path, flavour: Flavour) -> None:
    missing = {item.what: item for item in diagnose(flavour, root=tmp_path, load=absent_driver)}
    assert "no NVIDIA device node" in missing["device"].found
    assert "libcuda.so.1 does not load" in missing["driver"].found
    assert "install the NVIDIA driver" in missing["driver"].fix
    if find_spec(flavour.replace("-", "_")) is None:
        assert f"the package {flavour} is not installed" in str([*diagnose(flavour, root=tmp_path, load=absent_driver)])


def test_working_gpu_leaves_packages_only(tmp_path: Path) -> None:
    missing = diagnose("tensorrt", root=machine_with_gpu(tmp_path), load=lambda _: FakeDriver())
    assert {item.what for item in missing} <= {"package", "library"}


@pytest.mark.parametrize(
    ("driver", "what", "text"),
    [
        (FakeDriver(status=100), "device", r"CUDA_ERROR_NO_DEVICE \(100\)"),
        (FakeDriver(status=35), "driver", r"CUDA_ERROR_INSUFFICIENT_DRIVER \(35\)"),
        (FakeDriver(status=12345), "driver", r"CUDA error \(12345\)"),
        (FakeDriver(gpus=0), "device", "0 GPUs"),
    ],
)
def test_answer_of_the_driver_is_passed_on(tmp_path: Path, driver: FakeDriver, what: str, text: str) -> None:
    missing = diagnose("tensorrt", root=machine_with_gpu(tmp_path), load=lambda _: driver)
    assert [item for item in missing if item.what == what and re.search(text, item.found)]


def fake_package(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("tensorrt")
    module.__spec__ = ModuleSpec("tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt", module)


def test_machine_that_has_everything_misses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(monkeypatch)
    monkeypatch.setattr("edgepose.runtime.trt_diagnosis.installed_ways", lambda: ("ctypes",))
    assert diagnose("tensorrt", root=machine_with_gpu(tmp_path), load=lambda _: FakeDriver()) == []


def test_machine_without_a_way_to_call_cuda_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_package(monkeypatch)
    monkeypatch.setattr("edgepose.runtime.trt_diagnosis.installed_ways", tuple)
    (missing,) = diagnose("tensorrt", root=machine_with_gpu(tmp_path), load=lambda _: FakeDriver())
    assert (missing.what, missing.fix) == ("package", "pip install cuda-python")


def test_where_nothing_is_missing_the_fault_itself_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_package(monkeypatch)
    monkeypatch.setattr("edgepose.runtime.trt_diagnosis.diagnose", lambda _: [])
    fault = missing_fault("tensorrt", "running engine.plan", RuntimeError("libnvinfer is upset"))
    assert "running engine.plan with tensorrt: found libnvinfer is upset" in str(fault)


@pytest.mark.parametrize(("missing", "found"), [(ImportError("libnvinfer.so.10"), "does not import")])
def test_package_without_its_libraries_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: ImportError, found: str
) -> None:
    (tmp_path / "tensorrt.py").write_text(f"raise ImportError({str(missing)!r})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EnvironmentFault, match=rf"is installed and {found} \(libnvinfer.so.10\)") as caught:
        open_session(tmp_path / "engine.plan", "tensorrt")
    assert "install the libraries" in str(caught.value)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_opening_an_engine_says_what_is_missing_and_what_to_use_instead(tmp_path: Path, flavour: Flavour) -> None:
    """The real machine: without the package, that; with it, and without a GPU, why CUDA does not work."""
    installed = find_spec(flavour.replace("-", "_")) is not None
    with pytest.raises((EnvironmentFault, BadInput)) as caught:  # with a GPU, that there is no such file
        open_session(tmp_path / "engine.plan", flavour)
    if not installed:
        assert caught.value.exit_code == 6
        assert f"edgepose[{flavour}]" in str(caught.value)
        assert "or use an onnxruntime or openvino engine" in str(caught.value)
