"""Writes are whole or not at all: content, failures, interruptions, full and read-only disks."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgepose.errors import StorageError, UsageError
from edgepose.storage import atomic_directory, atomic_file, atomic_json, atomic_write, storage_faults_at


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def anything(_: Path) -> bool:
    return True


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 KiB."""
    mount = shutil.which("mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("no right to mount a small file system; the size-limit tests cover the same code")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# Files


def test_file_is_written_with_its_parents_and_the_usual_permissions(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a/b/c.bin", b"content")
    assert (tmp_path / "a/b/c.bin").read_bytes() == b"content"
    assert everything_below(tmp_path) == {"a", "a/b", "a/b/c.bin"}
    (tmp_path / "plain").write_bytes(b"")
    assert (tmp_path / "a/b/c.bin").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_file_is_replaced(tmp_path: Path) -> None:
    atomic_write(tmp_path / "file", b"old")
    atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert everything_below(tmp_path) == {"file"}


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_failing_writer_leaves_the_old_file_and_nothing_else(tmp_path: Path, fault: type[BaseException]) -> None:
    atomic_write(tmp_path / "file.txt", b"old")
    with pytest.raises(fault), atomic_file(tmp_path / "file.txt") as temporary:
        temporary.write_bytes(b"half of the ne")
        raise fault
    assert (tmp_path / "file.txt").read_bytes() == b"old"
    assert everything_below(tmp_path) == {"file.txt"}


def test_parents_made_for_a_failing_write_are_taken_away(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), atomic_file(tmp_path / "a/b/c"):
        raise ValueError("stop")
    assert everything_below(tmp_path) == set()


def test_temporary_file_has_the_extension_of_the_target(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "image.png") as temporary:
        assert temporary.suffix == ".png"
        assert temporary.parent == tmp_path
        temporary.write_bytes(b"")


def test_longest_file_name_is_still_written(tmp_path: Path) -> None:
    name = "n" * 251 + ".bin"
    atomic_write(tmp_path / name, b"x")
    assert (tmp_path / name).read_bytes() == b"x"


def test_directory_is_not_overwritten_by_a_file(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UsageError, match="a directory"):
        atomic_write(tmp_path / "taken", b"")


def test_file_in_place_of_a_parent_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="a file where a directory is needed"):
        atomic_write(tmp_path / "file" / "below", b"")
    assert everything_below(tmp_path) == {"file"}


def test_link_stays_a_link_and_its_file_changes(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    atomic_write(pipe, b"through")
    reader.join(timeout=10)
    assert received == [b"through"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_json_understands_structs_arrays_and_paths(tmp_path: Path) -> None:
    class Row(msgspec.Struct):
        value: float

    value = {
        "row": Row(0.5),
        "array": np.arange(3),
        "scalar": np.float64(2.0),
        "path": Path("a/b"),
        "nan": float("nan"),
    }
    atomic_json(tmp_path / "file.json", value)
    text = (tmp_path / "file.json").read_text(encoding="utf-8")
    expected = {"row": {"value": 0.5}, "array": [0, 1, 2], "scalar": 2.0, "path": "a/b", "nan": None}
    assert msgspec.json.decode(text) == expected
    assert text.startswith('{\n  "row"')
    assert text.endswith("}\n")


def test_what_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="complex"):
        atomic_json(tmp_path / "file.json", {"value": 1j})
    assert everything_below(tmp_path) == set()


# Directories


def test_directory_appears_whole(tmp_path: Path) -> None:
    with atomic_directory(tmp_path / "a" / "out") as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_bytes(b"x")
        assert not (tmp_path / "a" / "out").exists()
    assert everything_below(tmp_path) == {"a", "a/out", "a/out/sub", "a/out/sub/file"}


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_failing_build_of_a_directory_leaves_nothing(tmp_path: Path, fault: type[BaseException]) -> None:
    with pytest.raises(fault), atomic_directory(tmp_path / "a" / "out") as temporary:
        (temporary / "file").write_bytes(b"x")
        raise fault
    assert everything_below(tmp_path) == set()


@pytest.mark.parametrize("taken", ["file", "empty directory", "directory", "dangling link"])
def test_existing_target_is_refused_before_the_work_starts(tmp_path: Path, taken: str) -> None:
    out = tmp_path / "out"
    match taken:
        case "file":
            out.write_bytes(b"")
        case "dangling link":
            out.symlink_to("nowhere")
        case _:
            out.mkdir()
            if taken == "directory":
                (out / "mine").write_bytes(b"precious")
    before = everything_below(tmp_path)
    with pytest.raises(UsageError, match="already there"), atomic_directory(out):
        pytest.fail("the work started")
    assert everything_below(tmp_path) == before


def test_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError), atomic_directory(out):
        out.mkdir()
        (out / "theirs").write_bytes(b"precious")
    assert everything_below(tmp_path) == {"out", "out/theirs"}


def test_replaceable_directory_is_exchanged(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(b"")
    with atomic_directory(out, replaceable=anything) as temporary:
        (temporary / "new").write_bytes(b"")
        assert (out / "old").exists()
    assert everything_below(tmp_path) == {"out", "out/new"}


def test_what_may_not_be_replaced_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UsageError, match="did not write"), atomic_directory(out, replaceable=lambda _: False):
        pytest.fail("the work started")


def test_failing_exchange_brings_the_old_directory_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_bytes(b"")
    with pytest.raises(FileNotFoundError), atomic_directory(out, replaceable=anything) as temporary:
        temporary.rmdir()  # so that the second of the two renames fails
    assert everything_below(tmp_path) == {"out", "out/old"}


def test_ctrl_c_during_a_build_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; from edgepose.storage import atomic_directory\n"
        "with atomic_directory(sys.argv[1]) as t:\n"
        "    (t / 'half').write_bytes(b'x'); print('inside', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a" / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert "KeyboardInterrupt" in stderr
    assert everything_below(tmp_path) == set()


# Storage that fails


def test_full_device_is_a_storage_error() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(StorageError, match="no space left"):
        atomic_write("/dev/full", b"x")


def test_full_disk_leaves_the_old_file(small_disk: Path) -> None:
    atomic_write(small_disk / "file", b"old")
    with pytest.raises(StorageError, match=r"no space left on the device \(0\.\d MB free\).*free some space"):
        atomic_write(small_disk / "file", bytes(2**20))
    assert (small_disk / "file").read_bytes() == b"old"
    assert everything_below(small_disk) == {"file"}


def test_full_disk_leaves_no_directory(small_disk: Path) -> None:
    with pytest.raises(StorageError, match="no space left"), atomic_directory(small_disk / "a" / "out") as temporary:
        for index in range(100):
            (temporary / f"{index}").write_bytes(bytes(2**14))
    assert everything_below(small_disk) == set()


def test_read_only_disk_is_a_storage_error(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(StorageError, match="read-only"):
        atomic_write(small_disk / "file", b"x")
    with pytest.raises(StorageError, match="read-only"), atomic_directory(small_disk / "out"):
        pytest.fail("the work started")


def test_array_that_numpy_could_not_write_is_a_storage_error(small_disk: Path) -> None:
    with pytest.raises(StorageError, match="no space left"), atomic_file(small_disk / "array.npy") as temporary:
        np.save(temporary, np.zeros(2**18))  # NumPy's own error has no number
    assert everything_below(small_disk) == set()


def test_size_limit_is_a_storage_error_and_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from edgepose.storage import atomic_write\n"
        "from edgepose.errors import EdgeposeError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: atomic_write(sys.argv[1], bytes(65536))\n"
        "except EdgeposeError as err: print(err); sys.exit(err.exit_code)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a" / "file")], capture_output=True, text=True, check=False
    )
    assert result.returncode == 6, result.stderr
    assert "limit on the size of a file" in result.stdout
    assert everything_below(tmp_path) == set()


def test_missing_permission_is_a_storage_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(StorageError, match="no permission"):
        atomic_write(tmp_path / "locked" / "file", b"")


def test_other_system_errors_keep_their_own_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), storage_faults_at(tmp_path / "out"):
        (tmp_path / "nowhere" / "input").read_bytes()
