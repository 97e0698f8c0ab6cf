"""A z-buffer of sphere-swept cones: tapered capsules with an optional elliptic cross-section, solved exactly per pixel.

A cone is all spheres with centre c(s) = start + s·(end - start) and radius r(s) = r0 + s·(r1 - r0), s in 0..1.
"Sphere" is meant in the cone's own metric M (symmetric, positive definite): |v|² = vᵀ M v, so a metric flatter along
one axis makes trunks and feet of it. With U such that Uᵀ U = M and U[0, 2] = U[1, 2] = 0, viewing rays along z stay
viewing rays along z in the space of U·v, where the cone is round. There the front of sphere s over a pixel lies at
z(s) = c_z(s) - sqrt(D(s)), D(s) = r(s)² - |pixel - c_xy(s)|², and z is convex in s where D is concave, so that its
minimum has a closed form.

Invariant: screen space has x right, y down (pixels, integer = pixel centre) and z away from the viewer in pixels;
smaller z hides larger z; a pixel that nothing covers has depth infinity and part -1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
I16 = NDArray[np.int16]

_END_ON_SAMPLES = tuple(float(s) for s in np.linspace(0.0, 1.0, 9))


@dataclass(frozen=True, slots=True)
class Cones:
    """N sphere-swept cones in screen space.

    Attributes:
        start: (N, 3) float32, pixels.
        end: (N, 3) float32, pixels.
        radius: (N, 2) float32, pixels, at start and end.
        metric: (N, 3, 3) float32; the identity makes round cones.
    """

    start: F32
    end: F32
    radius: F32
    metric: F32

    def __len__(self) -> int:
        return int(self.start.shape[0])


@dataclass(slots=True)
class Surface:
    """The z-buffer; `rasterise` fills it in place and may be called again to add things.

    Attributes:
        depth: (H, W) float32, pixels, infinity where empty.
        part: (H, W) int16, index of the visible cone, -1 where empty.
        along: (H, W) float32, s of the visible point, 0..1.
    """

    depth: F32
    part: I16
    along: F32

    @staticmethod
    def empty(size_hw: tuple[int, int]) -> Surface:
        return Surface(
            depth=np.full(size_hw, np.inf, np.float32),
            part=np.full(size_hw, -1, np.int16),
            along=np.zeros(size_hw, np.float32),
        )


def metric_from_axes(axes: NDArray[np.floating]) -> F32:
    """Metrics whose unit spheres are the ellipsoids with these half axes.

    Args:
        axes: (N, 3, 3), orthogonal columns, screen axes.

    Returns:
        (N, 3, 3) float32.
    """
    shrunk = axes / (axes**2).sum(axis=1, keepdims=True)
    return np.asarray(shrunk @ np.swapaxes(shrunk, 1, 2), np.float32)


def sheared(metric: F32) -> F32:
    """U of the module's text for each metric: (N, 3, 3) float32, Uᵀ U = metric, z does not enter its first two rows."""
    u = np.zeros_like(metric)
    depth = np.sqrt(metric[:, 2, 2])
    row = metric[:, 2, :2] / depth[:, None]
    s00 = metric[:, 0, 0] - row[:, 0] ** 2
    s01 = metric[:, 0, 1] - row[:, 0] * row[:, 1]
    s11 = metric[:, 1, 1] - row[:, 1] ** 2
    a = np.sqrt(s00)
    b = s01 / a
    u[:, 0, 0], u[:, 0, 1] = a, b
    u[:, 1, 1] = np.sqrt(np.maximum(s11 - b**2, 1e-12))
    u[:, 2, :2], u[:, 2, 2] = row, depth
    return u


def rasterise(cones: Cones, surface: Surface, first_part: int = 0) -> None:
    """Draws cones into the z-buffer.

    Args:
        cones: What to draw; cone i becomes part `first_part` + i.
        surface: Changed in place.
        first_part: Offset of the part numbers.
    """
    if not len(cones):
        return
    height, width = surface.depth.shape
    u = sheared(cones.metric)
    swept = np.einsum("nij,nj->ni", u, cones.end - cones.start)
    # Half extents of an ellipsoid vᵀ M v = r² along x and y are r·sqrt of the inverse metric's diagonal.
    half = np.sqrt(np.diagonal(np.linalg.inv(cones.metric), axis1=1, axis2=2)[:, :2])
    low = np.minimum(cones.start[:, :2] - half * cones.radius[:, :1], cones.end[:, :2] - half * cones.radius[:, 1:])
    high = np.maximum(cones.start[:, :2] + half * cones.radius[:, :1], cones.end[:, :2] + half * cones.radius[:, 1:])
    x0, y0 = np.clip(np.ceil(low), 0, (width, height)).astype(int).T
    x1, y1 = np.clip(np.floor(high) + 1, 0, (width, height)).astype(int).T
    columns, rows = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    for i in range(len(cones)):
        if x0[i] >= x1[i] or y0[i] >= y1[i]:
            continue
        window = np.s_[y0[i] : y1[i], x0[i] : x1[i]]
        dx = columns[x0[i] : x1[i]] - cones.start[i, 0]
        dy = (rows[y0[i] : y1[i]] - cones.start[i, 1])[:, None]
        depth, along = _front(dx, dy, u[i], swept[i], cones.radius[i])
        depth += cones.start[i, 2]
        nearer = depth < surface.depth[window]
        np.copyto(surface.depth[window], depth, where=nearer)
        np.copyto(surface.along[window], along, where=nearer)
        np.copyto(surface.part[window], np.int16(first_part + i), where=nearer)


def _front(dx: F32, dy: F32, u: F32, swept: F32, radius: F32) -> tuple[F32, F32]:
    """Depth relative to the start (infinity where missed) and s of one cone over a window of pixels.

    Args:
        dx: (w,) pixels from the cone's start to the columns.
        dy: (h, 1) the same for the rows.
        u: (3, 3) shear of the cone's metric.
        swept: (3,) `u` applied to end - start.
        radius: (2,).
    """
    a, b, d = float(u[0, 0]), float(u[0, 1]), float(u[1, 1])
    ex, ey, ez = (float(value) for value in swept)
    r0, dr = float(radius[0]), float(radius[1] - radius[0])
    qx = a * dx + b * dy
    qy = d * dy
    # D(s) = gamma + 2·beta·s - concave·s²
    gamma = r0 * r0 - qx * qx - qy * qy
    beta = (r0 * dr) + ex * qx + ey * qy
    concave = ex * ex + ey * ey - dr * dr
    if concave > 1e-3 * (1.0 + ez * ez):
        middle = beta * np.float32(1.0 / concave)
        peak = np.maximum(gamma + beta * middle, 0.0)
        along = middle - np.float32(ez / np.sqrt(concave * (concave + ez * ez))) * np.sqrt(peak)
        np.clip(along, 0.0, 1.0, out=along)
        room = gamma + along * (2.0 * beta - concave * along)
        front = along * np.float32(ez) - np.sqrt(np.maximum(room, 0.0))
        front[room < 0.0] = np.inf
    else:  # seen nearly end on: one end's disc covers the other's, and z(s) is no longer convex
        front = np.full(qx.shape, np.inf, np.float32)
        along = np.zeros(qx.shape, np.float32)
        ball = dr == 0.0 and ex == ey == ez == 0.0
        for s in _END_ON_SAMPLES[:1] if ball else _END_ON_SAMPLES:
            room = gamma + s * (2.0 * beta - concave * s)
            here = np.where(room >= 0.0, np.float32(s * ez) - np.sqrt(np.maximum(room, 0.0)), np.float32(np.inf))
            along[here < front] = s
            np.minimum(front, here, out=front)
    depth = (front - np.float32(u[2, 0]) * dx - np.float32(u[2, 1]) * dy) * np.float32(1.0 / u[2, 2])
    return np.asarray(depth, np.float32), np.asarray(along, np.float32)


def surface_points(cones: Cones, surface: Surface, first_part: int = 0) -> tuple[NDArray[np.intp], F32, F32, F32]:
    """Geometry of the visible pixels of `cones`.

    Args:
        cones: As given to `rasterise`.
        surface: A filled z-buffer.
        first_part: As given to `rasterise`.

    Returns:
        (P,) flat pixel indices whose part is one of `cones`; (P, 3) positions and (P, 3) unit normals that point at the
        viewer's side, screen axes; (P,) s along the cone.
    """
    parts = surface.part.ravel()
    pixels = np.flatnonzero((parts >= first_part) & (parts < first_part + len(cones)))
    which = parts[pixels].astype(np.intp) - first_part
    along = np.asarray(surface.along.ravel()[pixels], np.float32)
    rows, columns = np.divmod(pixels, surface.depth.shape[1])
    points = np.stack([columns, rows, surface.depth.ravel()[pixels]], axis=1).astype(np.float32)
    centres = cones.start[which] + along[:, None] * (cones.end - cones.start)[which]
    normals = np.einsum("pij,pj->pi", cones.metric[which], points - centres)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-9)
    return pixels, points, np.asarray(normals, np.float32), along
