"""Who am I: processor, cores this process may use, memory, GPU, library versions; and where this host keeps its cache.

Invariant: everything is read from files and package metadata; no program is started, no heavy library is imported, and
a file that is missing leaves its field empty instead of failing.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

_ROOT = Path("/")

X86_FLAGS = (
    *("fma", "avx2", "f16c", "avx512f", "avx512bw"),
    *("avx512_vnni", "avx_vnni", "avx_vnni_int8", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
)
ARM_FLAGS = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2")
_X86_VNNI = ("avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8")
_ARM_DOT = ("asimddp", "i8mm")

_LIBRARIES = (
    "numpy",
    "opencv-python-headless",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-python",
    "torch",
    "onnx",
    "nncf",
)
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13")


class Fingerprint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What decides how fast, and whether at all, an engine runs here.

    Attributes:
        cpu: Model name of the processor, or of the board where the processor has none (Jetson, Raspberry Pi).
        arch: Instruction set ("x86_64", "aarch64").
        flags: Instruction extensions that matter to neural networks, sorted; names as in /proc/cpuinfo.
        physical_cores: Cores this process may use: affinity and cgroup quota respected, hyper-threads counted once.
        logical_cpus: CPUs this process is allowed on.
        memory_bytes: Memory of the machine, or of the cgroup if that is less.
        os: Name and version of the operating system.
        kernel: Release of the kernel.
        governor: Frequency governor of the allowed CPUs ("performance"); several joined by "+"; empty if unknown.
        gpus: NVIDIA GPUs, by name.
        driver: Version of the NVIDIA driver; empty without one.
        python: Version of the interpreter.
        libraries: Distribution → version, of those that are installed and matter.
    """

    cpu: str
    arch: str
    flags: tuple[str, ...]
    physical_cores: int
    logical_cpus: int
    memory_bytes: int
    os: str
    kernel: str
    governor: str
    gpus: tuple[str, ...]
    driver: str
    python: str
    libraries: dict[str, str]

    @property
    def digest(self) -> str:
        """Sha256 over what an engine is built for: processor, GPU, driver and runtimes.

        Cores, memory, governor, kernel and Python are left out: they change from one start to the next, and engines
        survive that.
        """
        runtimes = {name: version for name, version in sorted(self.libraries.items()) if name in _RUNTIMES}
        identity = (self.cpu, self.arch, self.flags, self.gpus, self.driver, runtimes)
        return hashlib.sha256(msgspec.json.encode(identity)).hexdigest()


def fingerprint(root: Path = _ROOT) -> Fingerprint:
    """Reads this host.

    Args:
        root: Where /proc, /sys and /etc are looked for; another directory than "/" describes a recorded machine.
    """
    cpus = _allowed_cpus(root)
    gpus, driver = _nvidia(root)
    return Fingerprint(
        cpu=_cpu_model(root),
        arch=platform.machine(),
        flags=cpu_flags(root),
        physical_cores=physical_cores(root),
        logical_cpus=len(cpus),
        memory_bytes=_memory_bytes(root),
        os=_os_name(root),
        kernel=platform.release(),
        governor=_governor(root, cpus),
        gpus=gpus,
        driver=driver,
        python=platform.python_version(),
        libraries=_library_versions(),
    )


def cpu_flags(root: Path = _ROOT) -> tuple[str, ...]:
    """Those of `X86_FLAGS` and `ARM_FLAGS` that every core has, sorted; empty where /proc/cpuinfo is missing."""
    lines = re.findall(r"^(?:flags|Features)\s*:\s*(.*)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    if not lines:
        return ()
    common = set.intersection(*(set(line.split()) for line in lines))
    return tuple(sorted(common.intersection((*X86_FLAGS, *ARM_FLAGS))))


def weight_bits(host: Fingerprint) -> tuple[Literal[7, 8], str]:
    """How many bits quantised weights may have on this processor, and why.

    Without VNNI, x86 multiplies u8 by s8 and adds pairs into int16, which saturates: 255·127·2 > 32767. Seven-bit
    weights keep the sum below that.

    Returns:
        7 or 8, and the reason in a few words.
    """
    for flag in (*_X86_VNNI, *_ARM_DOT):
        if flag in host.flags:
            return 8, f"{flag} sums u8·s8 products in 32 bits"
    return 7, "no VNNI or dot-product instruction: sums of u8·s8 products saturate at 16 bits"


def physical_cores(root: Path = _ROOT) -> int:
    """Cores that this process may keep busy, at least 1: hyper-threads count once, affinity and cgroup quota bind."""
    cpus = _allowed_cpus(root)
    cores = {_text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in cpus}
    quota = _cgroup_cpu_quota(root)
    return max(1, len(cores) if quota is None else min(len(cores), int(quota)))


def core_cpus(root: Path = _ROOT) -> tuple[int, ...]:
    """The first CPU of each physical core that this process may use, at least one."""
    first: dict[str, int] = {}
    for cpu in _allowed_cpus(root):
        first.setdefault(
            _text(root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu), cpu
        )
    return tuple(first.values()) or (0,)


Energy = tuple[tuple[int, int], ...]
"""Microjoules that each processor package has used so far, and the count after which it starts again at 0."""


def energy(root: Path = _ROOT) -> Energy | None:
    """Reads the energy counters; None where there are none that this user may read.

    They are RAPL's, of Intel and AMD, as Linux shows them in /sys/class/powercap; a package's parts have counters of
    their own, which are not looked at.
    """
    zones = [zone for zone in sorted((root / "sys/class/powercap").glob("intel-rapl:*")) if zone.name.count(":") == 1]
    found = [tuple(_text(zone / name) for name in ("energy_uj", "max_energy_range_uj")) for zone in zones]
    if not found or not all(text.isdigit() for texts in found for text in texts):
        return None
    return tuple((int(used), int(most)) for used, most in found)


def energy_between_uj(before: Energy, after: Energy) -> int:
    """Microjoules between two readings, also where counters started again in between."""
    return sum((now - then) % (most + 1) for (then, _), (now, most) in zip(before, after, strict=True))


def cache_directory() -> Path:
    """This user's directory for what can be computed again; it need not exist yet.

    $EDGEPOSE_CACHE, else $XDG_CACHE_HOME/edgepose, else ~/.cache/edgepose.
    """
    if chosen := os.environ.get("EDGEPOSE_CACHE"):
        return Path(chosen).expanduser()
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # The XDG specification says that relative paths are to be ignored.
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "edgepose"


def engine_cache(bundle_digest: str, host: Fingerprint) -> Path:
    """Where engines built on this host for one bundle lie; another bundle or another host never finds them."""
    return cache_directory() / "engines" / f"{bundle_digest[:16]}-{host.digest[:16]}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    except OSError:
        return ""


def _allowed_cpus(root: Path) -> list[int]:
    if root == _ROOT and hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    match = re.search(r"^Cpus_allowed_list:\s*(\S+)", _text(root / "proc/self/status"), re.MULTILINE)
    if match is None:
        return list(range(os.cpu_count() or 1))
    spans = (span.partition("-") for span in match[1].split(","))
    return [cpu for first, _, last in spans for cpu in range(int(first), int(last or first) + 1)]


def _cpu_model(root: Path) -> str:
    info = _text(root / "proc/cpuinfo")
    match = re.search(r"^(?:model name|Model|Hardware)\s*:\s*(.+)$", info, re.MULTILINE)
    return match[1].strip() if match else _text(root / "proc/device-tree/model") or platform.processor()


def _cgroup_values(root: Path, v2_name: str, v1_controller: str, v1_name: str) -> list[str]:
    """Contents of one limit's file in this process's cgroup and all its ancestors: each of them binds."""
    found = []
    base = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and v1_controller not in controllers.split(","):
            continue
        top, name = (base / v1_controller, v1_name) if controllers else (base, v2_name)
        group = top / path.strip("/")
        found += [_text(folder / name) for folder in (group, *group.parents) if folder.is_relative_to(top)]
    return [value for value in found if value]


def _cgroup_cpu_quota(root: Path) -> float | None:
    quotas = []
    for value in _cgroup_values(root, "cpu.max", "cpu", "cpu.cfs_quota_us"):
        quota, _, period = value.partition(" ")
        if quota.isdigit():  # "max" and -1 stand for no limit
            quotas.append(int(quota) / int(period or _cfs_period(root)))
    return min(quotas, default=None)


def _cfs_period(root: Path) -> int:
    return int(next(iter(_cgroup_values(root, "", "cpu", "cpu.cfs_period_us")), "100000"))


def _memory_bytes(root: Path) -> int:
    match = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    limits = _cgroup_values(root, "memory.max", "memory", "memory.limit_in_bytes")
    known = [int(limit) for limit in limits if limit.isdigit()]
    if match:
        known.append(int(match[1]) * 1024)
    return min(known, default=0)


def _os_name(root: Path) -> str:
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)', _text(root / "etc/os-release"), re.MULTILINE)
    return match[1] if match else platform.system()


def _governor(root: Path, cpus: list[int]) -> str:
    seen = {_text(root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_governor") for cpu in cpus}
    return "+".join(sorted(seen - {""}))


def _nvidia(root: Path) -> tuple[tuple[str, ...], str]:
    """Names of the NVIDIA GPUs, and the driver's version."""
    driver = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", _text(root / "proc/driver/nvidia/version"))
    names = []
    for file in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        match = re.search(r"^Model:\s*(.+)$", _text(file), re.MULTILINE)
        names.append(match[1].strip() if match else "NVIDIA GPU")
    board = _text(root / "proc/device-tree/model")
    if not names and board.startswith("NVIDIA"):
        names.append(board)
    tegra = re.search(r"^# R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    version = driver[1] if driver else f"L4T {tegra[1]}.{tegra[2]}" if tegra else ""
    return tuple(names), version


@cache
def _library_versions() -> dict[str, str]:
    from importlib import metadata

    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions
