"""Writing files and directories so that a reader finds either the whole of the new content or the whole of the old.

Invariant: whatever ends a write (an error, a full disk, Ctrl-C), the target is as it was before and nothing else is
left behind. Everything is built in a sibling with a temporary name, flushed to the disk, then renamed over the target.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np

from edgepose.errors import StorageError, UsageError

_STORAGE_FAULTS = {
    errno.ENOSPC: ("no space left on the device", "free some space or choose another place"),
    errno.EDQUOT: ("the disk quota used up", "free some space or choose another place"),
    errno.EFBIG: ("the limit on the size of a file reached", "raise the limit (ulimit -f) or choose another place"),
    errno.EROFS: ("a read-only file system", "choose a place that can be written"),
    errno.EACCES: ("no permission to write", "choose a place that can be written"),
    errno.EPERM: ("no permission to write", "choose a place that can be written"),
    errno.EIO: ("an input/output error of the device", "choose another disk"),
}
"""What the system says when the storage, not the program, is at fault: (found, fix)."""


def storage_error(path: Path, err: OSError) -> StorageError | None:
    """The `StorageError` that stands for `err`, or None where `err` does not blame the storage.

    Args:
        path: What was being written.
        err: What the system said.
    """
    # NumPy's tofile reports a write cut short in words only: "13824 requested and 4064 written".
    number = errno.ENOSPC if err.errno is None and re.search(r"requested and \d+ written", str(err)) else err.errno
    if number not in _STORAGE_FAULTS:
        return None
    found, fix = _STORAGE_FAULTS[number]
    if number == errno.ENOSPC:
        with contextlib.suppress(OSError):
            found += f" ({shutil.disk_usage(_nearest_existing(path)).free / 1e6:.1f} MB free)"
    return StorageError(f"writing {path}", found=found, expected="room and permission to write", fix=fix)


@contextlib.contextmanager
def storage_faults_at(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an `OSError` that blames the storage (disk full, read-only, no permission) into a `StorageError`.

    For writes that are appended or streamed and therefore cannot be atomic; other `OSError` pass through.

    Raises:
        StorageError: The storage failed inside the block.
    """
    try:
        yield
    except OSError as err:
        fault = storage_error(Path(path), err)
        if fault is None:
            raise
        raise fault from err


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` to the file at `path`, whole or not at all; missing parent directories are made.

    A device or pipe ("/dev/stdout") is written straight to, since it cannot be renamed over.

    Raises:
        StorageError: Disk full, read-only or no permission.
        UsageError: `path` cannot be a file (it is a directory, or lies below a file).
    """
    if _is_special(Path(path)):
        with storage_faults_at(path):
            Path(path).write_bytes(content)
        return
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def atomic_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` as indented JSON, atomically.

    Structs, dataclasses, paths, NumPy scalars and arrays are understood; NaN and infinities become null.

    Raises:
        StorageError: Disk full, read-only or no permission.
        UsageError: `path` cannot be a file.
    """
    atomic_write(path, json_bytes(value))


def json_bytes(value: Any) -> bytes:
    """`value` as indented UTF-8 JSON that ends in a newline; equal values give equal bytes (keys keep their order)."""
    return msgspec.json.format(msgspec.json.encode(value, enc_hook=_plain), indent=2) + b"\n"


def json_line(value: Any) -> bytes:
    """`value` as one line of UTF-8 JSON that ends in a newline, as `json_bytes` otherwise."""
    return msgspec.json.encode(value, enc_hook=_plain) + b"\n"


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """For libraries that write to a path of their own: yields a temporary sibling that becomes `path` at the end.

    The temporary name has the same extension, so writers that look at it choose the same format.

    Raises:
        StorageError: Disk full, read-only or no permission.
        UsageError: `path` cannot be a regular file.
    """
    if _is_special(Path(path)):
        _refuse(Path(path), found="a device or pipe", fix="name a regular file")
    target = Path(os.path.realpath(path))  # writing through a symbolic link changes the file it points to
    if target.is_dir():
        _refuse(target, found="a directory", fix="name a file")
    temporary = _sibling(target)
    with storage_faults_at(target), _parents_of(target):
        try:
            yield temporary
            _flush(temporary)
            temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_directory(
    out: str | os.PathLike[str], *, replaceable: Callable[[Path], bool] | None = None
) -> Iterator[Path]:
    """Yields an empty temporary directory that becomes `out` when the block ends without an exception.

    Args:
        out: Where the directory shall be; missing parents are made. Nothing may be there yet, not even an empty one.
        replaceable: Says whether what is at `out` may be replaced; None replaces nothing. Asked before and after.

    Raises:
        StorageError: Disk full, read-only or no permission.
        UsageError: Something is at `out` that may not be replaced.
    """
    target = Path(out).absolute()
    _refuse_occupied(target, replaceable)  # before the block: it may compute for hours
    temporary = _sibling(target)
    with storage_faults_at(target), _parents_of(target):
        try:
            temporary.mkdir()
            yield temporary
            _flush_tree(temporary)
            _refuse_occupied(target, replaceable)  # somebody else may have written it meanwhile
            _move_into_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _move_into_place(temporary: Path, target: Path) -> None:
    if not os.path.lexists(target):
        try:
            temporary.rename(target)
        except OSError as err:
            if err.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                _refuse(target, found="something that was written there meanwhile", fix="choose another name", err=err)
            raise
        return
    replaced = _sibling(target)
    try:
        target.rename(replaced)
        temporary.rename(target)
    finally:
        if os.path.lexists(target):
            shutil.rmtree(replaced, ignore_errors=True)
        elif os.path.lexists(replaced):
            replaced.rename(target)  # interrupted between the two: the old one comes back


def _refuse_occupied(target: Path, replaceable: Callable[[Path], bool] | None) -> None:
    if not os.path.lexists(target):
        return
    if replaceable is None:
        _refuse(target, found="something already there", fix="choose another name, or ask for it to be replaced")
    if target.is_symlink() or not replaceable(target):
        _refuse(target, found="something that edgepose did not write", fix="choose another name, or remove it yourself")


def _refuse(target: Path, *, found: str, fix: str, err: OSError | None = None) -> NoReturn:
    raise UsageError(f"writing {target}", found=found, expected="a free name", fix=fix) from err


def _is_special(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _sibling(target: Path) -> Path:
    """A name beside `target` that nobody uses: hidden, same extension, short enough for every file system."""
    return target.with_name(f".{target.stem[:80]}.{secrets.token_hex(6)}.tmp{target.suffix[:40]}")


@contextlib.contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Makes the missing parents of `target`, and takes them away again if the block fails."""
    missing = [parent for parent in target.parents if not parent.exists()]
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as err:
            _refuse(target, found="a file where a directory is needed", fix="choose another place", err=err)
        yield
    except BaseException:
        for parent in missing:  # innermost first
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _nearest_existing(path: Path) -> Path:
    return next((parent for parent in (path, *path.parents) if parent.exists()), Path())


def _flush(path: Path) -> None:
    """Waits until the file is on the disk: a disk that delays its writes says only now that it is full."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _flush(Path(folder, name))


def _plain(value: Any) -> Any:
    """What msgspec does not know by itself."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"cannot be written as JSON: {type(value).__name__}")
