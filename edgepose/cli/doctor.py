"""`edgepose doctor`: what this machine is, what it can run, and exactly what is missing for the rest.

Invariant: a backend counts as usable only after its library was loaded here; nothing is concluded from a version.
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import msgspec

from edgepose.cli.console import STDOUT, say, show_facts, show_table, write_json
from edgepose.cli.options import StdoutJsonFlag
from edgepose.errors import BackendUnavailable
from edgepose.host import Fingerprint, cache_directory, fingerprint, weight_bits
from edgepose.runtime import BACKENDS, extra_of, installed_backends
from edgepose.spec import Backend

EXAMPLES = (
    "edgepose doctor",
    "edgepose doctor --json",
)


@dataclass(frozen=True, slots=True)
class BackendState:
    """What was found out about one backend.

    Attributes:
        backend: Its name.
        installed: Whether its package can be found.
        usable: Whether it can execute engines here.
        version: Version of its package; empty where it is not installed.
        devices: Execution providers of ONNX Runtime, devices of OpenVINO; none where it is not usable.
        missing: What stands between this machine and a running engine, most basic first: what was found, what to do.
    """

    backend: Backend
    installed: bool
    usable: bool
    version: str
    missing: tuple[tuple[str, str], ...]
    devices: tuple[str, ...] = ()


def doctor(json: StdoutJsonFlag = False) -> int:
    """Say what this machine is, which backends work, and what is missing for the others.

    Exit code 6 where no backend at all can be used.
    """
    host = fingerprint()
    bits, reason = weight_bits(host)
    backends = [_backend(backend, host) for backend in BACKENDS]
    packages = _build_half()
    cache = _cache()
    if json:
        result = {
            "host": msgspec.to_builtins(host),
            "host_digest": host.digest,
            "weight_bits": bits,
            "weight_bits_reason": reason,
            "backends": [asdict(backend) for backend in backends],
            "build_half": packages,
            "cache": cache,
        }
        write_json(STDOUT, result)
    else:
        _show_host(host, f"{bits} bits: {reason}")
        _show_backends(backends)
        _show_build_half(packages)
        show_facts({name: str(value) for name, value in cache.items()}, title="\ncache of engines and stages")
    if not any(backend.usable for backend in backends):
        first = backends[0]
        found, fix = first.missing[0]
        raise BackendUnavailable("this machine", found=f"no usable backend ({first.backend}: {found})", fix=fix)
    return 0


def _backend(backend: Backend, host: Fingerprint) -> BackendState:
    installed = backend in installed_backends()
    version = next((host.libraries[name] for name in _distributions(backend) if name in host.libraries), "")
    if backend in ("tensorrt", "tensorrt-rtx"):
        from edgepose.runtime.trt_diagnosis import diagnose

        missing = tuple((item.found, item.fix) for item in diagnose(backend))
        return BackendState(backend, installed, not missing, version, missing)
    if not installed:
        gap = f"the package {backend} is not installed", f"pip install 'edgepose[{extra_of(backend)}]'"
        return BackendState(backend, False, False, version, (gap,))
    try:
        import_module(f"edgepose.runtime.{'ort' if backend == 'onnxruntime' else backend}")
    except (ImportError, OSError, RuntimeError) as err:  # a wheel without its libraries raises any of them
        fix = f"pip install --force-reinstall 'edgepose[{extra_of(backend)}]'"
        return BackendState(backend, True, False, version, ((f"an installed package that does not load ({err})", fix),))
    return BackendState(backend, True, True, version, (), _devices(backend))


def _devices(backend: Backend) -> tuple[str, ...]:
    if backend == "onnxruntime":
        from edgepose.runtime.ort import available_providers

        return available_providers()
    from edgepose.runtime.openvino import available_devices

    return available_devices()


def _distributions(backend: Backend) -> tuple[str, ...]:
    extra = {"onnxruntime": ("onnxruntime-gpu",), "tensorrt-rtx": ("tensorrt-rtx-cu13",)}
    return (backend, *extra.get(backend, ()))


def _build_half() -> dict[str, str]:
    """Packages of the extra [compile] → installed version, "" where missing; empty where the metadata is not there."""
    try:
        requirements = metadata.requires("edgepose") or []
    except metadata.PackageNotFoundError:  # run from a checkout that nobody installed
        return {}
    versions = {}
    for requirement in requirements:
        if re.search(r"extra == ['\"]compile['\"]", requirement) is None:
            continue
        match = re.match(r"[\w.-]+", requirement)
        if match is not None:
            versions[match[0]] = _version(match[0])
    return versions


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def _cache() -> dict[str, Any]:
    directory = cache_directory()
    existing = next((path for path in (directory, *directory.parents) if path.exists()), Path("/"))
    return {
        "directory": str(directory),
        "writable": existing.is_dir() and os.access(existing, os.W_OK),
        "free_mb": round(shutil.disk_usage(existing).free / 1e6),
    }


def _show_host(host: Fingerprint, bits: str) -> None:
    facts = {
        "processor": f"{host.cpu or 'unknown'} ({host.arch})",
        "extensions": " ".join(host.flags) or "none that matter",
        "quantised weights": bits,
        "cores": f"{host.physical_cores} physical and {host.logical_cpus} logical that this process may use",
        "memory": f"{host.memory_bytes / 1e9:.1f} GB" if host.memory_bytes else "unknown",
        "frequency governor": host.governor or "unknown",
        "GPUs": ", ".join(host.gpus) or "none",
        "driver": host.driver or "none",
        "system": f"{host.os}, kernel {host.kernel}, Python {host.python}",
        "fingerprint": host.digest,
    }
    show_facts(facts, title="this machine")


def _show_backends(backends: list[BackendState]) -> None:
    rows = []
    for state in backends:
        outcome = "usable" if state.usable else "not usable" if state.installed else "not installed"
        rows.append((state.backend, state.version or "–", outcome, ", ".join(state.devices)))
    show_table(("backend", "version", "", "providers or devices"), rows, title="\nbackends")
    for state in backends:
        for found, fix in state.missing:
            say(f"  {state.backend}: {found}: {fix}")


def _show_build_half(packages: dict[str, str]) -> None:
    if not packages:
        say("\nbuild half: unknown, as edgepose itself is not installed")
        return
    title = "\nbuild half: complete" if all(packages.values()) else "\nbuild half: incomplete"
    rows = [(name, version or "missing: pip install 'edgepose[compile]'") for name, version in packages.items()]
    show_table(("package", "version"), rows, title=title)
