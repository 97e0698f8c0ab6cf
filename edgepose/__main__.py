"""The program `edgepose`: runs one verb and turns whatever ends it into one line and an exit code.

Invariant: nothing heavier than the error tree is imported here, so that `edgepose --help` answers at once.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from edgepose.errors import EdgeposeError, EnvironmentFault

INTERRUPTED = 130
"""Exit code after Ctrl-C."""

# What shells give to programs that a signal ended.
_TERMINATED = 128 + signal.SIGTERM
_PIPE_CLOSED = 128 + signal.SIGPIPE
_STORAGE_AT_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: What follows the program's name; None takes it from the process.

    Returns:
        The exit code.
    """
    # Before any library reads it: OpenMP threads that spin while they wait make training many times slower as soon as
    # another process wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = os.environ.get("EDGEPOSE_DEBUG", "") not in ("", "0")
    if "--debug" in words:
        words.remove("--debug")
        debug = True
    with _terminated_as_an_exception():
        return _guarded(words, debug)


def _guarded(words: list[str], debug: bool) -> int:
    name = "edgepose"
    try:
        from edgepose.cli import VERBS, dispatch

        name += f" {words[0]}" if words and words[0] in VERBS else ""
        code = dispatch(words)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has left (`| head`); Python would complain once more when it flushes at its end.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _end(name, "interrupted; nothing was left half-written", INTERRUPTED)
    except Exception as err:  # noqa: BLE001 - the last place where anything can be said about it
        if debug:
            import traceback

            traceback.print_exc()
        known = _known(err)
        return _end(name, str(known), known.exit_code)
    return code


def _known(err: Exception) -> EdgeposeError:
    """The deliberate error that `err` is or stands for."""
    match err:
        case EdgeposeError():
            return err
        case MemoryError():
            return EnvironmentFault("memory", found="too little of it", fix="close other programs, or do less at once")
        case OSError() if err.errno == errno.ENOMEM:
            return EnvironmentFault("memory", found="too little of it", fix="close other programs, or do less at once")
        case OSError() if err.errno in _STORAGE_AT_FAULT:
            from pathlib import Path

            from edgepose.storage import storage_error

            fault = storage_error(Path(err.filename or "."), err)
            return fault or _unexpected(err)
        case _:
            return _unexpected(err)


def _unexpected(err: Exception) -> EdgeposeError:
    what = f"{type(err).__name__}: {err}" if str(err) else type(err).__name__
    fix = "add --debug (or EDGEPOSE_DEBUG=1) to see where, and report it: this is a fault of edgepose"
    return EdgeposeError("unexpected error", found=what, fix=fix)


def _end(name: str, text: str, code: int) -> int:
    with suppress(OSError, ValueError):  # stderr may be closed too
        print(f"{name}: {text}", file=sys.stderr, flush=True)
        if os.environ.get("GITHUB_ACTIONS") == "true" and code != INTERRUPTED:
            from edgepose.cli.console import annotation

            print(annotation("error", name, text), file=sys.stderr, flush=True)
    return code


@contextmanager
def _terminated_as_an_exception() -> Iterator[None]:
    """SIGTERM ends the program as Ctrl-C does: through every `finally`, so that temporary files are taken away."""

    def leave(_number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(_TERMINATED)

    try:
        previous = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not the main thread: whoever runs us decides
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
