"""`python -m edgepose.data.render OUT --count N --seed S --split val [--size 192]`: writes a rendered data set.

Invariant: ends with the exit code of the error tree, one line on stderr saying what went wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

from edgepose.data.render import RenderConfig, write_coco
from edgepose.errors import EdgeposeError


def _reporter() -> Callable[[int, int], None]:
    """A progress line with time left on a terminal; elsewhere one line per tenth."""
    started = time.monotonic()
    terminal = sys.stderr.isatty()

    def report(done: int, count: int) -> None:
        left_s = (time.monotonic() - started) / done * (count - done)
        text = f"rendered {done}/{count}, {left_s:.0f} s left"
        if terminal:
            print(f"\r{text}   ", end="\n" if done == count else "", file=sys.stderr, flush=True)
        elif done * 10 // count != (done - 1) * 10 // count:
            print(text, file=sys.stderr, flush=True)

    return report


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, renders, and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m edgepose.data.render", description="Render people with keypoints.")
    parser.add_argument("out", help="directory of the data set")
    parser.add_argument("--count", type=int, default=100, help="number of pictures (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed, 0 or more (default 0)")
    parser.add_argument("--split", default="val", help="name of the split (default val)")
    parser.add_argument("--size", type=int, default=192, help="side of the square pictures in pixels (default 192)")
    options = parser.parse_args(arguments)
    try:
        config = RenderConfig(size_hw=(options.size, options.size))
        path = write_coco(options.out, options.split, options.count, options.seed, config, progress=_reporter())
    except EdgeposeError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("\ninterrupted; nothing was kept", file=sys.stderr)
        return 130
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
