"""`python benchmarks/soak.py BUNDLE [--inferences N]`: does anything grow while an estimator runs and runs?

Invariant: memory is compared between the end of the warm-up and the end, by the median of samples around either, and
the script proves each time that it would notice a leak: `--leak 1024` keeps so many bytes of every inference.

Exit codes: 0 nothing grew · 1 something did · 2 usage.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # instead of this folder, whose files are the package `benchmarks`

import numpy as np  # noqa: E402

from benchmarks.command import command  # noqa: E402
from edgepose.cli.console import steps  # noqa: E402
from edgepose.estimator import PoseEstimator  # noqa: E402
from edgepose.timing.engine_stages import synthetic_frame  # noqa: E402

_SAMPLES = 200
_WARM_UP = 0.1  # of all inferences: caches and pools fill up there


@dataclass(frozen=True, slots=True)
class Soak:
    """What was seen.

    Attributes:
        inferences: How many there were.
        start_mb: Resident memory after the warm-up.
        growth_mb: What it gained until the end.
        descriptors: Open file descriptors gained.
        threads: Threads gained.
    """

    inferences: int
    start_mb: float
    growth_mb: float
    descriptors: int
    threads: int

    @property
    def allowed_mb(self) -> float:
        """A hundredth of what it took after the warm-up, and at least 5 MB: an allocator's arenas come and go."""
        return max(0.01 * self.start_mb, 5.0)

    @property
    def clean(self) -> bool:
        """Whether nothing grew."""
        return self.growth_mb <= self.allowed_mb and self.descriptors <= 0 and self.threads <= 0


def soak(
    bundle: Path, inferences: int, *, leak_bytes: int = 0, progress: Callable[[int, int], None] | None = None
) -> Soak:
    """Runs an estimator for a while.

    Args:
        bundle: The bundle.
        inferences: How often a frame of one person is answered.
        leak_bytes: Kept of every inference, on purpose.
        progress: Told now and then.

    Raises:
        EdgeposeError: As the estimator.
    """
    frame, boxes = synthetic_frame((480, 640), 1, 0)
    kept: list[bytes] = []
    every = max(1, inferences // _SAMPLES)
    memory_mb: list[float] = []
    counted: list[tuple[int, int]] = []
    with PoseEstimator.from_bundle(bundle, threads=2, aim="none") as estimator:
        for number in range(1, inferences + 1):
            estimator(frame, boxes)
            if leak_bytes:
                kept.append(os.urandom(leak_bytes))
            if number % every == 0:
                memory_mb.append(resident_mb())
                counted.append((_descriptors(), threading.active_count()))
                if progress is not None:
                    progress(number, inferences)
    first = max(1, round(_WARM_UP * len(memory_mb)))
    around = max(1, len(memory_mb) // 20)
    start = float(np.median(memory_mb[first : first + around]))
    end = float(np.median(memory_mb[-around:]))
    descriptors, threads = (counted[-1][place] - counted[first][place] for place in (0, 1))
    return Soak(inferences, start, end - start, descriptors, threads)


def resident_mb() -> float:
    """Resident memory of this process."""
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the soak that the command line asks for.

    Args:
        arguments: What follows the script's name; None takes it from the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="soak.py", description="Does anything grow while an estimator runs?")
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--inferences", type=int, default=1_000_000, metavar="N", help="how many (default: %(default)s)"
    )
    parser.add_argument("--leak", type=int, default=0, metavar="BYTES", help="keep so much of each, to see it noticed")
    options = parser.parse_args(arguments)
    with steps() as shown:
        found = soak(
            options.bundle, options.inferences, leak_bytes=options.leak, progress=shown.step("frames answered")
        )
    for name, value in asdict(found).items():
        print(f"{name:<12} {value:g}")
    print(f"{'allowed_mb':<12} {found.allowed_mb:g}")
    print("nothing grew" if found.clean else "something grew")
    return 0 if found.clean else 1


if __name__ == "__main__":
    sys.exit(main())
