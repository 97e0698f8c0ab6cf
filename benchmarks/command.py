"""How a benchmark ends: its exit code, and one line about what went wrong."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

from edgepose.errors import EdgeposeError

INTERRUPTED = 130

P = ParamSpec("P")


def command(main: Callable[P, int]) -> Callable[P, int]:
    """Makes errors and Ctrl-C of a `main` its exit code, and one line on stderr."""
    name = Path(main.__code__.co_filename).stem

    @functools.wraps(main)
    def ended(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except EdgeposeError as err:
            print(f"{name}: {err}", file=sys.stderr)
            return err.exit_code
        except KeyboardInterrupt:
            print(f"{name}: interrupted; what it was at is not written", file=sys.stderr)
            return INTERRUPTED

    return ended
