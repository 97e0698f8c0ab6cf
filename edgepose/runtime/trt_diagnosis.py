"""What stands between this machine and an engine of TensorRT or TensorRT-RTX: found out for real, said plainly.

Invariant: nothing is guessed from version strings or product names: libraries are loaded, the driver is initialised,
and what they answer is passed on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from edgepose.errors import BackendUnavailable, EnvironmentFault, MissingDependency
from edgepose.runtime.cuda import installed_ways
from edgepose.runtime.trt_versions import Flavour

_INSTEAD = "or use an onnxruntime or openvino engine of the bundle"
_CUDA_ERRORS = {
    3: "CUDA_ERROR_NOT_INITIALIZED",
    34: "CUDA_ERROR_STUB_LIBRARY",
    35: "CUDA_ERROR_INSUFFICIENT_DRIVER",
    100: "CUDA_ERROR_NO_DEVICE",
    101: "CUDA_ERROR_INVALID_DEVICE",
    803: "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH",
    804: "CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE",
    999: "CUDA_ERROR_UNKNOWN",
}
_DEVICE_NODES = ("dev/nvidiactl", "dev/nvhost-gpu", "dev/nvgpu/igpu0/ctrl", "dev/dxg")
"""A card's driver, Tegra of JetPack 5, Tegra of JetPack 6 and newer, WSL."""


@dataclass(frozen=True, slots=True)
class Missing:
    """One thing that stands between this machine and a running engine.

    Attributes:
        what: "package", "library", "driver" or "device".
        found: What was found instead.
        fix: What can be done about it.
    """

    what: Literal["package", "library", "driver", "device"]
    found: str
    fix: str


def diagnose(
    flavour: Flavour,
    *,
    root: Path = Path("/"),
    load: Callable[[str], ctypes.CDLL] = ctypes.CDLL,
) -> list[Missing]:
    """All that is missing to execute engines of `flavour` here, most basic first.

    Args:
        flavour: TensorRT proper or TensorRT-RTX; they are different products with different engines.
        root: Where the device nodes are looked for.
        load: Loads a shared library by name and raises OSError where it cannot.
    """
    found = [_package(flavour), _cuda_bindings(), _device_nodes(root), _driver(load)]
    return [item for item in found if item is not None]


def missing_fault(flavour: Flavour, needed_for: str, err: Exception) -> EnvironmentFault:
    """The error that says what is missing first.

    Args:
        flavour: What could not be loaded or started.
        needed_for: What was being attempted ("running engine.plan").
        err: What it said when that was tried; told where nothing else is found to be missing.

    Returns:
        MissingDependency where the package is not installed; BackendUnavailable where libraries, driver or GPU are
        missing.
    """
    if find_spec(flavour.replace("-", "_")) is None:
        return MissingDependency(flavour, extra=flavour, needed_for=f"{needed_for} ({_INSTEAD})")
    missing = diagnose(flavour)
    if not missing:
        return BackendUnavailable(f"{needed_for} with {flavour}", found=str(err), fix=f"see its own log, {_INSTEAD}")
    first = missing[0]
    return BackendUnavailable(f"{needed_for} with {flavour}", found=first.found, fix=f"{first.fix}, {_INSTEAD}")


def _package(flavour: Flavour) -> Missing | None:
    module = flavour.replace("-", "_")
    if find_spec(module) is None:
        return Missing("package", f"the package {flavour} is not installed", f"pip install 'edgepose[{flavour}]'")
    try:
        import_module(module)
    except (ImportError, OSError, RuntimeError) as err:  # a wheel without its libraries raises any of them
        found = f"the package {flavour} is installed and does not import ({err})"
        return Missing("library", found, f"install the libraries that belong to {flavour}")
    return None


def _cuda_bindings() -> Missing | None:
    if installed_ways():
        return None
    return Missing("package", "no cuda-python, libcudart or pycuda to call CUDA with", "pip install cuda-python")


def _device_nodes(root: Path) -> Missing | None:
    if any((root / node).exists() for node in _DEVICE_NODES):
        return None
    found = f"no NVIDIA device node ({', '.join('/' + node for node in _DEVICE_NODES)})"
    return Missing("device", found, "use a machine with an NVIDIA GPU, or pass the GPU into the container")


def _driver(load: Callable[[str], ctypes.CDLL]) -> Missing | None:
    try:
        cuda = load("libcuda.so.1")
    except OSError as err:
        return Missing("driver", f"libcuda.so.1 does not load ({err})", "install the NVIDIA driver")
    if status := int(cuda.cuInit(0)):
        name = _CUDA_ERRORS.get(status, "CUDA error")
        kind: Literal["device", "driver"] = "device" if status in (100, 101) else "driver"
        return Missing(kind, f"cuInit answers {name} ({status})", "check the NVIDIA driver and that a GPU is visible")
    count = ctypes.c_int(0)
    status = int(cuda.cuDeviceGetCount(ctypes.byref(count)))
    if status or count.value == 0:
        return Missing("device", f"the driver shows {count.value} GPUs", "make a GPU visible (CUDA_VISIBLE_DEVICES)")
    return None
