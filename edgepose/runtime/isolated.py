"""A session in a process of its own: what it does to its process (a CUDA context that is lost for good, a crash in
native code, a hang in a driver) ends that process and no other.

Invariant: an inference is answered whole or raises; the process ends when the session is closed, when it is abandoned,
or, unless native code holds its interpreter, about a second after whoever started it has ended.

Arrays are copied through a pipe in both directions, which takes time that grows with them: for backends that can poison
their process, not for those of the CPU.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from edgepose.errors import EdgeposeError, EnvironmentFault, UsageError
from edgepose.runtime.session import Array, ClosedSession, SessionFacts, check_feeds, facts_of
from edgepose.spec import TensorSpec

_START_S = 120.0
"""How long a process may take to load an engine."""
_FAREWELL_S = 5.0
_LOOK_S = 1.0


class IsolatedSession:
    """A session that another process holds.

    Args:
        opener: "package.module:function", which is called there and returns the session.
        arguments: Keyword arguments of it; they are pickled.
        start_s: How long that may take.

    Raises:
        UsageError: A frozen program, which has no interpreter to start.
        EnvironmentFault: The process does not start, or ends while it loads.
        EdgeposeError: Whatever the opener raises.
    """

    def __init__(self, opener: str, arguments: Mapping[str, Any], *, start_s: float = _START_S) -> None:
        if getattr(sys, "frozen", False):
            found = "a program frozen into one file, which has no interpreter to start"
            raise UsageError("isolated", found=found, expected="Python", fix="leave isolated out")
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        command = [sys.executable, "-m", "edgepose.runtime.isolated"]
        try:
            self._process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
            )
        except OSError as err:
            raise EnvironmentFault("isolated engine", found=f"a process that does not start ({err})") from err
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._requests = Connection(os.dup(self._process.stdin.fileno()), readable=False)
        self._replies = Connection(os.dup(self._process.stdout.fileno()), writable=False)
        self._process.stdin.close()
        self._process.stdout.close()
        self._closing = threading.Lock()
        self._closed = False
        try:
            said = self._ask((opener, dict(arguments)), start_s)
        except BaseException:
            self.abandon()
            raise
        self.inputs: tuple[TensorSpec, ...] = said["inputs"]
        self.outputs: tuple[TensorSpec, ...] = said["outputs"]
        self._facts: SessionFacts | None = said["facts"]

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """See `Session.infer`.

        Raises:
            EnvironmentFault: The process has ended.
        """
        if self._closed:
            raise ClosedSession
        checked = check_feeds(feeds, self.inputs)
        outputs: dict[str, Array] = self._ask(checked, None)
        return outputs

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the process as the system would, for want of memory say; the session finds out with its next answer."""
        self._process.kill()

    def facts(self) -> SessionFacts | None:
        """What the runtime said of it when it was loaded."""
        return self._facts

    def close(self) -> None:
        """See `Session.close`; a process that does not end by itself is ended."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(OSError):
            self._requests.send_bytes(pickle.dumps(None))
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_FAREWELL_S)
        self._end()

    def abandon(self) -> None:
        """Ends the process at once, whatever it is doing; whoever waits for its answer gets an error."""
        with self._closing:
            self._closed = True
        self._end()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                pipe.close()

    def _ask(self, request: Any, patience_s: float | None) -> Any:
        try:
            self._requests.send_bytes(pickle.dumps(request, pickle.HIGHEST_PROTOCOL))
            if patience_s is not None and not self._replies.poll(patience_s):
                raise EnvironmentFault("isolated engine", found=f"nothing for {patience_s:g} s", expected="a session")
            said = _received(self._replies)
        except (EOFError, OSError) as err:
            raise self._death() from err
        if isinstance(said, BaseException):
            raise said
        return said

    def _death(self) -> EnvironmentFault:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_FAREWELL_S)
        code = self._process.returncode
        if code is None:
            cause = "that was closed"
        else:
            cause = f"that ended with {code}" if code >= 0 else f"ended by signal {-code}"
        return EnvironmentFault("isolated engine", found=f"a process {cause}", expected="an answer")


def _serve(requests: Connection, replies: Connection) -> None:
    """The other process: opens the session, answers, until it is told to end or nobody is left to tell it."""
    session = None
    try:
        opener, arguments = _received(requests)
        try:
            module, _, name = opener.partition(":")
            session = getattr(import_module(module), name)(**arguments)
            said: Any = {"inputs": session.inputs, "outputs": session.outputs, "facts": facts_of(session)}
        except Exception as err:  # noqa: BLE001 - it belongs to whoever asked
            said = _portable(err)
        replies.send_bytes(pickle.dumps(said, pickle.HIGHEST_PROTOCOL))
        while session is not None and (feeds := _received(requests)) is not None:
            try:
                said = session.infer(feeds)
            except Exception as err:  # noqa: BLE001 - likewise
                said = _portable(err)
            replies.send_bytes(pickle.dumps(said, pickle.HIGHEST_PROTOCOL))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # whoever asked has gone
    finally:
        if session is not None:
            session.close()


def _received(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())  # noqa: S301 - from a child of this program, or its parent


def _portable(err: Exception) -> Exception:
    """An exception that can be pickled and is known on the other side."""
    return err if isinstance(err, EdgeposeError) else EnvironmentFault("engine", found=f"{type(err).__name__}: {err}")


def _end_with(parent: int) -> None:
    """Ends this process when its parent has: in the middle of an inference nobody looks at the pipe."""
    while os.getppid() == parent:
        time.sleep(_LOOK_S)
    os._exit(1)


def main() -> None:
    """The program of the other process; what libraries print goes to the standard error."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    requests, replies = Connection(os.dup(0), writable=False), Connection(os.dup(1), readable=False)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    _serve(requests, replies)


if __name__ == "__main__":
    main()
