"""What stands between a machine and a TensorRT engine is found out and said plainly."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from edgepose.errors import EnvironmentFault
from edgepose.runtime import open_session
from edgepose.runtime.tensorrt import Flavour, diagnose

FLAVOURS: tuple[Flavour, ...] = ("tensorrt", "tensorrt-rtx")


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


def test_working_gpu_leaves_package_and_execution_only(tmp_path: Path) -> None:
    missing = diagnose("tensorrt", root=machine_with_gpu(tmp_path), load=lambda _: FakeDriver())
    assert {item.what for item in missing} <= {"package", "library", "edgepose"}


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
    import re

    missing = diagnose("tensorrt", root=machine_with_gpu(tmp_path), load=lambda _: driver)
    assert [item for item in missing if item.what == what and re.search(text, item.found)]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_last_of_the_list_says_that_execution_is_not_there_yet(flavour: Flavour) -> None:
    last = diagnose(flavour)[-1]
    assert last.what == "edgepose"
    assert "executes no TensorRT engines" in last.fix


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_opening_an_engine_says_what_is_missing_and_what_to_use_instead(tmp_path: Path, flavour: Flavour) -> None:
    with pytest.raises(
        EnvironmentFault, match="executes no TensorRT engines; use an onnxruntime or openvino"
    ) as caught:
        open_session(tmp_path / "engine.plan", flavour)
    assert caught.value.exit_code == 6
    if find_spec(flavour.replace("-", "_")) is None:
        assert f"edgepose[{flavour}]" in str(caught.value)
