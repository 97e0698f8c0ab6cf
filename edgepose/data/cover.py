"""Which joints something stands in front of.

Invariant: a joint is a place with an extent, not a pixel: a thin bar across an elbow does not hide it, nor does a
pinhole in a wall show it. Training and tests share this definition, and nothing else about what hides people.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_RADIUS = 0.03
"""Of a joint, as a share of the larger side of its person's box: about a wrist's half width."""


def joints_covered(covered: NDArray[np.uint8], points: NDArray[np.floating], box_side_px: float) -> NDArray[np.bool_]:
    """Whether at least half of each joint's disc is covered.

    Args:
        covered: (h, w) uint8, how much of each pixel is covered, 0..255.
        points: (n, 2) joints in pixels of that image, all inside it.
        box_side_px: Larger side of the person's box in the same pixels.

    Returns:
        (n,) bool. What lies outside of the image takes no part.
    """
    offsets = _disc(round(_RADIUS * box_side_px * 4) / 4)
    places = np.rint(points).astype(np.intp)[:, None] + offsets[None]
    height, width = covered.shape
    inside = ((places >= 0) & (places < (width, height))).all(axis=2)
    columns, rows = np.where(inside[..., None], places, 0).transpose(2, 0, 1)
    share = (covered[rows, columns] * inside).sum(axis=1) / (255 * inside.sum(axis=1))
    hidden: NDArray[np.bool_] = share >= 0.5
    return hidden


@lru_cache(256)
def _disc(radius_px: float) -> NDArray[np.intp]:
    """Offsets (m, 2) of the pixels whose centre is in the disc; its own pixel at least."""
    reach = int(radius_px)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    chosen = x**2 + y**2 <= radius_px**2
    return np.stack([x[chosen], y[chosen]], axis=1).astype(np.intp)
