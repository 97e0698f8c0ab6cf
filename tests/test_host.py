"""What a host is read as, from recorded file trees and on the machine that runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edgepose.host import (
    Fingerprint,
    cache_directory,
    cpu_flags,
    energy,
    energy_between_uj,
    engine_cache,
    fingerprint,
    physical_cores,
    weight_bits,
)


def tree(root: Path, **files: str) -> Path:
    """Writes files below `root`; a key's double underscores stand for slashes."""
    for name, content in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return root


def machine(root: Path, allowed: str = "0-3", siblings: tuple[str, ...] = ("0-1", "0-1", "2-3", "2-3")) -> Path:
    """A machine whose CPU i has siblings[i] as hyper-threads; this process may use `allowed`."""
    tree(root, proc__self__status=f"Name:\tx\nCpus_allowed_list:\t{allowed}\n")
    for cpu, group in enumerate(siblings):
        path = root / f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        path.parent.mkdir(parents=True)
        path.write_text(group + "\n", encoding="utf-8")
    return root


def with_flags(root: Path, *lines: str) -> Fingerprint:
    return fingerprint(
        tree(root, proc__cpuinfo="".join(f"processor : {i}\n{line}\n\n" for i, line in enumerate(lines)))
    )


# Processor


@pytest.mark.parametrize(
    ("flags", "bits"),
    [
        ("flags\t\t: fpu avx2 fma", 7),
        ("flags\t\t: fpu avx2 avx512f avx512bw", 7),
        ("flags\t\t: avx2 avx512f avx512_vnni", 8),
        ("flags\t\t: avx2 avx_vnni", 8),
        ("Features\t: fp asimd", 7),
        ("Features\t: fp asimd asimddp", 8),
        ("", 7),
    ],
)
def test_weights_get_eight_bits_only_where_products_are_summed_in_32(tmp_path: Path, flags: str, bits: int) -> None:
    found, reason = weight_bits(with_flags(tmp_path, flags))
    assert found == bits
    assert ("saturate" in reason) == (bits == 7)


def test_only_flags_that_every_core_has_count(tmp_path: Path) -> None:
    host = with_flags(tmp_path, "flags : avx2 avx_vnni", "flags : avx2 sse2")
    assert host.flags == ("avx2",)


def test_hyper_threads_count_once(tmp_path: Path) -> None:
    assert physical_cores(machine(tmp_path)) == 2


def test_affinity_bounds_the_cores(tmp_path: Path) -> None:
    root = machine(tmp_path, allowed="0,2-3")
    assert physical_cores(root) == 2
    assert fingerprint(root).logical_cpus == 3
    assert physical_cores(machine(tmp_path / "b", allowed="1")) == 1


@pytest.mark.parametrize(("quota", "cores"), [("max 100000", 4), ("250000 100000", 2), ("50000 100000", 1), ("", 4)])
def test_cgroup_2_quota_bounds_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    root = machine(tmp_path, siblings=("0", "1", "2", "3"))
    tree(root, proc__self__cgroup="0::/user/app\n", sys__fs__cgroup__user__cpu_max="")
    (root / "sys/fs/cgroup/user/cpu.max").write_text(quota + "\n", encoding="utf-8")  # an ancestor's limit binds too
    assert physical_cores(root) == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("200000", 2)])
def test_cgroup_1_quota_bounds_the_cores(tmp_path: Path, quota: str, cores: int) -> None:
    root = machine(tmp_path, siblings=("0", "1", "2", "3"))
    tree(
        root,
        proc__self__cgroup="4:cpu,cpuacct:/app\n3:memory:/app\n",
        **{"sys__fs__cgroup__cpu__app__cpu.cfs_quota_us": quota, "sys__fs__cgroup__cpu__cpu.cfs_period_us": "100000"},
    )
    assert physical_cores(root) == cores


def test_cores_without_topology_are_all_physical(tmp_path: Path) -> None:
    assert physical_cores(machine(tmp_path, siblings=())) == 4


# The rest of the machine


def test_cgroup_bounds_the_memory(tmp_path: Path) -> None:
    root = tree(tmp_path, proc__meminfo="MemTotal:  8000000 kB\n", proc__self__cgroup="0::/\n")
    assert fingerprint(root).memory_bytes == 8_000_000 * 1024
    tree(root, **{"sys__fs__cgroup__memory.max": "1073741824"})
    assert fingerprint(root).memory_bytes == 2**30


def test_jetson_is_recognised(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__cpuinfo="processor : 0\nFeatures : fp asimd asimddp\n",
        **{
            "proc__device-tree__model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "etc__nv_tegra_release": "# R36 (release), REVISION: 4.0, GCID: 1, BOARD: generic, EABI: aarch64\n",
            "etc__os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 22.04.5 LTS"\n',
        },
    )
    host = fingerprint(root)
    assert host.cpu == "NVIDIA Jetson Orin Nano Developer Kit"
    assert host.gpus == ("NVIDIA Jetson Orin Nano Developer Kit",)
    assert host.driver == "L4T 36.4.0"
    assert host.os == "Ubuntu 22.04.5 LTS"


def test_graphics_cards_are_listed_with_their_driver(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        proc__driver__nvidia__version="NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23\n",
        **{"proc__driver__nvidia__gpus__0000:01:00.0__information": "Model: \t\t NVIDIA L4\nIRQ: 1\n"},
    )
    host = fingerprint(root)
    assert host.gpus == ("NVIDIA L4",)
    assert host.driver == "570.86.15"
    open_driver = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  575.51.03  Release Build\n"
    assert fingerprint(tree(root, proc__driver__nvidia__version=open_driver)).driver == "575.51.03"


def test_different_governors_are_all_named(tmp_path: Path) -> None:
    root = machine(tmp_path, allowed="0-1")
    for cpu, governor in enumerate(("powersave", "performance")):
        tree(root, **{f"sys__devices__system__cpu__cpu{cpu}__cpufreq__scaling_governor": governor})
    assert fingerprint(root).governor == "performance+powersave"


def test_energy_is_that_of_the_packages(tmp_path: Path) -> None:
    zones = {"intel-rapl:0": 900, "intel-rapl:0:0": 5, "intel-rapl:1": 50, "intel-rapl-mmio:0": 7}
    for name, used in zones.items():
        folder = tmp_path / "sys/class/powercap" / name
        folder.mkdir(parents=True)
        (folder / "energy_uj").write_text(f"{used}\n")
        (folder / "max_energy_range_uj").write_text("999\n")
    before = energy(tmp_path)
    assert before == ((900, 999), (50, 999))
    assert energy_between_uj(before, ((20, 999), (60, 999))) == 120 + 10  # the first one started again


@pytest.mark.parametrize("content", [None, "", "n/a"])
def test_energy_that_cannot_be_read_is_none(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "sys/class/powercap/intel-rapl:0"
    folder.mkdir(parents=True)
    (folder / "max_energy_range_uj").write_text("999")
    if content is not None:
        (folder / "energy_uj").write_text(content)
    assert energy(tmp_path) is None
    assert energy(tmp_path / "nowhere") is None


def test_empty_tree_gives_empty_fields(tmp_path: Path) -> None:
    host = fingerprint(tmp_path)
    assert (host.flags, host.gpus, host.driver, host.governor, host.memory_bytes) == ((), (), "", "", 0)
    assert host.physical_cores >= 1


def test_garbage_in_the_files_does_not_stop_the_reading(tmp_path: Path) -> None:
    root = tree(tmp_path, proc__self__cgroup="nonsense\n::\n", proc__cpuinfo="\xff:\n", proc__meminfo="MemTotal: ?\n")
    assert fingerprint(root).memory_bytes == 0


# Fingerprint and cache


def test_digest_changes_with_the_runtime_and_not_with_the_governor() -> None:
    host = fingerprint()
    assert msgspec.structs.replace(host, governor="other", physical_cores=99).digest == host.digest
    newer = {**host.libraries, "openvino": "9999.0"}
    assert msgspec.structs.replace(host, libraries=newer).digest != host.digest
    assert msgspec.structs.replace(host, flags=()).digest != host.digest


def test_this_machine_is_read() -> None:
    host = fingerprint()
    assert host.logical_cpus == len(os.sched_getaffinity(0))
    assert 1 <= host.physical_cores <= host.logical_cpus
    assert host.cpu
    assert host.memory_bytes > 2**28
    assert host.libraries["numpy"]
    assert msgspec.json.decode(msgspec.json.encode(host), type=Fingerprint) == host


def test_pinned_process_sees_one_core() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from edgepose.host import physical_cores; print(physical_cores())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "1\n"


def test_flags_are_those_of_the_kernel() -> None:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert all(f" {flag}" in text for flag in cpu_flags())


def test_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("EDGEPOSE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "edgepose"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert cache_directory() == tmp_path / ".cache" / "edgepose"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "edgepose"
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"


def test_engines_of_different_bundles_and_hosts_are_kept_apart() -> None:
    host = fingerprint()
    other = msgspec.structs.replace(host, cpu="another")
    places = {engine_cache(digest, h) for digest in ("a" * 64, "b" * 64) for h in (host, other)}
    assert len(places) == 4
