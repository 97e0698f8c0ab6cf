"""The place of TensorRT and TensorRT-RTX: finds out, for real, what this machine lacks to execute their engines.

Invariant: nothing is guessed from version strings or product names: libraries are loaded, the driver is initialised,
and what they answer is passed on. Executing engines itself is not part of this release, and every path says so.
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

Flavour = Literal["tensorrt", "tensorrt-rtx"]

_NOT_YET = "this release of edgepose executes no TensorRT engines; use an onnxruntime or openvino engine of the bundle"
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
        what: "package", "library", "driver", "device" or "edgepose" (what this release does not do yet).
        found: What was found instead.
        fix: What can be done about it.
    """

    what: Literal["package", "library", "driver", "device", "edgepose"]
    found: str
    fix: str


def diagnose(
    flavour: Flavour,
    *,
    root: Path = Path("/"),
    load: Callable[[str], ctypes.CDLL] = ctypes.CDLL,
) -> list[Missing]:
    """All that is missing to execute engines of `flavour` here, most basic first; never empty in this release.

    Args:
        flavour: TensorRT proper or TensorRT-RTX; they are different products with different engines.
        root: Where the device nodes are looked for.
        load: Loads a shared library by name and raises OSError where it cannot.
    """
    found = [_package(flavour), _cuda_bindings(), _device_nodes(root), _driver(load)]
    last = Missing("edgepose", f"no execution of {flavour} engines", _NOT_YET)
    return [*(item for item in found if item is not None), last]


def session_fault(path: Path, flavour: Flavour) -> EnvironmentFault:
    """The error that says what is missing first to execute the engine at `path`.

    Returns:
        MissingDependency where the package is not installed; BackendUnavailable where libraries, driver or GPU are
        missing, or where nothing is and this release cannot execute the engine.
    """
    first = diagnose(flavour)[0]
    if first.what == "package":
        return MissingDependency(flavour, extra=flavour, needed_for=f"running {path} ({_NOT_YET})")
    fix = _NOT_YET if first.what == "edgepose" else f"{first.fix}; {_NOT_YET}"
    return BackendUnavailable(f"running {path} with {flavour}", found=first.found, fix=fix)


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
    for module in ("cuda.bindings", "cuda.cudart", "pycuda"):
        try:
            if find_spec(module) is not None:
                return None
        except ModuleNotFoundError:  # no package named cuda at all
            continue
    return Missing("package", "neither cuda-python nor pycuda is installed", "pip install cuda-python")


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
