"""Where the level of a series changes: PELT (Killick, Fearnhead, Eckley, 2012) as the package ruptures has it.

Invariant: the cost is that of absolute deviations from a segment's median, so that a single run of a bad day makes no
change point; equal series give equal change points.
"""

from __future__ import annotations

import math

import numpy as np
import ruptures
from numpy.typing import NDArray


def segments(values: NDArray[np.float64], *, noise: float, penalty: float, shortest: int = 3) -> list[tuple[int, int]]:
    """Stretches of one level.

    Args:
        values: (N,) in the order of time.
        noise: Standard deviation of a value about its level.
        penalty: What a further segment costs, in units of noise · ln N.
        shortest: Least values of a segment.

    Returns:
        (first, one past the last) of each, in order; one segment where the series is too short for two.
    """
    count = len(values)
    if count < 2 * shortest:
        return [(0, count)]
    found = ruptures.Pelt(model="l1", min_size=shortest, jump=1).fit(values.reshape(-1, 1))
    ends = [int(end) for end in found.predict(pen=penalty * noise * math.log(count))]
    return list(zip([0, *ends[:-1]], ends, strict=True))
