"""`render_person`: one random person in one random place, with exact keypoints and visibility.

Invariant: the same generator state and config give the same bytes; visibility is decided by depth at the keypoint's
pixel, never by guesswork about the pose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.data.render import scene, texture
from edgepose.data.render.body import Flesh, Outfit, build_body, joint_radii, sample_outfit
from edgepose.data.render.raster import Cones, Surface, metric_from_axes, rasterise
from edgepose.data.render.shade import ScreenBody, sample_light, shade
from edgepose.data.render.skeleton import (
    F64,
    LSP14,
    Proportions,
    Skeleton,
    pose_skeleton,
    sample_pose,
    sample_proportions,
)
from edgepose.errors import UsageError

F32 = NDArray[np.float32]

# Camera axes have y up and z to the viewer, screen axes y down and z away.
_SCREEN_FROM_CAMERA = np.diag([1.0, -1.0, -1.0])
# LSPET's boxes: the extent of the labelled joints, widened by this share of its larger side on every side.
_BOX_MARGIN = 0.1


@dataclass(frozen=True, slots=True)
class RenderConfig:
    """What to render.

    Attributes:
        size_hw: Height and width of the picture in pixels, at least 32.
        extent: Range of the larger side of the keypoints' extent relative to the picture.
        occluder_probability: How often things stand in front of the person.
        distractor_probability: How often a second, smaller person stands behind, unlabelled.
        truncation_probability: How often the picture cuts the person off.
        jpeg_probability: How often the picture goes through JPEG compression.
        texture_seed: Which bank of textures everything is made of; another one for people that are to be tested on.
    """

    size_hw: tuple[int, int] = (192, 192)
    extent: tuple[float, float] = (0.5, 0.8)
    occluder_probability: float = 0.3
    distractor_probability: float = 0.2
    truncation_probability: float = 0.08
    jpeg_probability: float = 0.5
    texture_seed: int = texture.DEFAULT_BANK

    def __post_init__(self) -> None:
        if min(self.size_hw) < 32:
            raise UsageError("RenderConfig.size_hw", found=f"{self.size_hw}", expected="at least 32 x 32 pixels")
        if not 0.05 <= self.extent[0] <= self.extent[1] <= 1.0:
            raise UsageError("RenderConfig.extent", found=f"{self.extent}", expected="0.05 <= low <= high <= 1")
        for name in ("occluder", "distractor", "truncation", "jpeg"):
            value = getattr(self, f"{name}_probability")
            if not 0.0 <= value <= 1.0:
                raise UsageError(f"RenderConfig.{name}_probability", found=f"{value}", expected="0..1")
        if self.texture_seed < 0:
            raise UsageError("RenderConfig.texture_seed", found=f"{self.texture_seed}", expected="0 or more")


@dataclass(frozen=True, slots=True)
class RenderedPerson:
    """A picture and its labels.

    Attributes:
        image: (H, W, 3) uint8 BGR.
        keypoints: (14, 3) float32 x, y, v in the order of `LSP14`: v = 2 visible, 1 hidden by the own body or an
            occluder, 0 outside the picture (x = y = 0 then, as COCO has it).
        bbox_xywh: (4,) float32, pixels: the extent of the keypoints inside the picture, widened by 10 % of its larger
            side and clipped, as LSPET's boxes are.
        hidden_by_self: (14,) bool, in the picture but behind another part of the own body.
    """

    image: NDArray[np.uint8]
    keypoints: F32
    bbox_xywh: F32
    hidden_by_self: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Figure:
    """A person before it is drawn: flesh, clothes and joints in camera axes, statures."""

    body: Proportions
    outfit: Outfit
    skeleton: Skeleton
    flesh: tuple[Flesh, ...]


@dataclass(frozen=True, slots=True)
class Camera:
    """Perspective with the middle of the hips at `distance` statures.

    Attributes:
        distance: Statures.
        stature_px: Pixels per stature at that distance.
        center_xy: Where the middle of the hips appears, pixels.
    """

    distance: float
    stature_px: float
    center_xy: tuple[float, float]

    def project(self, points: F64) -> tuple[F64, F64]:
        """Projects camera-axes points.

        Args:
            points: (N, 3), statures.

        Returns:
            (N, 3) screen x, y and depth in pixels (depth 0 at the hips), and (N,) pixels per stature at each point.
        """
        local = self.stature_px * self.distance / (self.distance - points[:, 2])
        screen = np.stack(
            [
                self.center_xy[0] + local * points[:, 0],
                self.center_xy[1] - local * points[:, 1],
                -self.stature_px * points[:, 2],
            ],
            axis=1,
        )
        return screen, local


def sample_figure(rng: np.random.Generator) -> Figure:
    """Draws body, pose and clothes; poses whose limbs pierce the trunk are drawn again a few times."""
    body = sample_proportions(rng)
    skeleton = pose_skeleton(body, sample_pose(rng))
    for _ in range(5):
        if not _pierces(skeleton):
            break
        skeleton = pose_skeleton(body, sample_pose(rng))
    outfit = sample_outfit(rng, body)
    return Figure(body, outfit, skeleton, build_body(body, outfit, skeleton))


def _pierces(skeleton: Skeleton) -> bool:
    """Whether hands, elbows, knees or feet are inside the trunk or the head."""
    joints = skeleton.joints
    limbs = np.stack(
        [joints[f"{side}_{name}"] for side in ("left", "right") for name in ("elbow", "wrist", "hand", "knee", "ankle")]
    )
    for low, high, room in (("pelvis", "waist", 0.095), ("waist", "neck", 0.1), ("neck", "head_top", 0.065)):
        axis = joints[high] - joints[low]
        along = np.clip((limbs - joints[low]) @ axis / (axis @ axis), 0.0, 1.0)
        if np.any(np.linalg.norm(limbs - joints[low] - along[:, None] * axis, axis=1) < room):
            return True
    return False


def aim_camera(rng: np.random.Generator, figure: Figure, size_hw: tuple[int, int], extent: float) -> Camera:
    """Places the person so that the larger relative side of its keypoints' extent is `extent` of the picture."""
    distance = float(np.exp(rng.uniform(np.log(2.2), np.log(9.0))))
    height, width = size_hw
    keypoints, _ = Camera(distance, 1.0, (0.0, 0.0)).project(figure.skeleton.keypoints())
    low, high = keypoints[:, :2].min(axis=0), keypoints[:, :2].max(axis=0)
    stature_px = extent / float(np.max((high - low) / (width, height)))
    slack = np.maximum(np.array([width, height]) - stature_px * (high - low), 0.0)
    offset = np.clip(rng.normal(0.0, 0.12, 2), -0.4, 0.4) * slack
    center = np.array([width - 1, height - 1]) / 2 - stature_px * (low + high) / 2 + offset
    if extent > 1.0:  # cut off: slide by what does not fit
        center += rng.uniform(-0.5, 0.5, 2) * np.maximum(stature_px * (high - low) - (width, height), 0.0) * 1.4
    return Camera(distance, stature_px, (float(center[0]), float(center[1])))


def project_body(flesh: Sequence[Flesh], camera: Camera) -> ScreenBody:
    """Projects a body; radii grow with the perspective of each end, so cones stay cones."""
    start, start_scale = camera.project(np.stack([item.start for item in flesh]))
    end, end_scale = camera.project(np.stack([item.end for item in flesh]))
    origins, _ = camera.project(np.stack([item.origin for item in flesh]))
    radius = np.array([item.radius for item in flesh]) * np.stack([start_scale, end_scale], axis=1)
    axes = _SCREEN_FROM_CAMERA @ np.stack([item.axes for item in flesh])
    return ScreenBody(
        cones=Cones(
            start.astype(np.float32), end.astype(np.float32), radius.astype(np.float32), metric_from_axes(axes)
        ),
        frames=(axes / np.linalg.norm(axes, axis=1, keepdims=True)).astype(np.float32),
        origins=origins.astype(np.float32),
        stature_px=camera.stature_px,
    )


def hidden_keypoints(surface: Surface, screen: F64, figure: Figure, camera: Camera) -> NDArray[np.bool_]:
    """Depth test: a keypoint is hidden where the surface lies further in front of it than its own limb is thick.

    Args:
        surface: The z-buffer of the person.
        screen: (14, 3) projected keypoints.
        figure: For the thickness of the limbs.
        camera: For pixels per stature.

    Returns:
        (14,) bool; False outside the picture.
    """
    radii = joint_radii(figure.body, figure.outfit)
    thickness = np.array([radii[name.removeprefix("right_").removeprefix("left_")] for name in LSP14.names])
    inside = inside_picture(screen, surface.depth.shape)
    columns, rows = np.rint(np.where(inside[:, None], screen[:, :2], 0.0)).astype(int).T
    in_front = screen[:, 2] - surface.depth[rows, columns]
    return np.asarray(inside & (in_front > 1.35 * thickness * camera.stature_px + 0.5))


def inside_picture(screen: F64, size_hw: tuple[int, ...]) -> NDArray[np.bool_]:
    """Which projected points (N, 2 or 3) round to a pixel of the picture."""
    limit = np.array([size_hw[1], size_hw[0]]) - 0.5
    return np.asarray(((screen[:, :2] >= -0.5) & (screen[:, :2] < limit)).all(axis=1))


def render_person(rng: np.random.Generator, config: RenderConfig | None = None) -> RenderedPerson:
    """Renders one random person.

    Args:
        rng: The only source of randomness.
        config: What to render; the defaults when None.

    Returns:
        The picture and its labels. At least four keypoints are inside the picture.
    """
    config = config or RenderConfig()
    with texture.bank_of(config.texture_seed):
        return _render(rng, config)


def _render(rng: np.random.Generator, config: RenderConfig) -> RenderedPerson:
    size = config.size_hw
    picture = scene.background(rng, size)
    light = sample_light(rng)
    if rng.random() < config.distractor_probability:
        _draw_distractor(rng, picture)
    figure = sample_figure(rng)
    camera, screen = _aim(rng, figure, config)
    projected = project_body(figure.flesh, camera)
    surface = Surface.empty(size)
    rasterise(projected.cones, surface)
    if rng.random() < 0.5:
        scene.cast_shadow(rng, picture, surface.part >= 0)
    pixels, colors = shade(figure.flesh, figure.outfit, projected, surface, light)
    picture.reshape(-1, 3)[pixels] = colors
    hidden_by_self = hidden_keypoints(surface, screen, figure, camera)
    covered = _draw_occluders(rng, picture, screen, config, camera.stature_px)
    inside = inside_picture(screen, size)
    columns, rows = np.rint(np.where(inside[:, None], screen[:, :2], 0.0)).astype(int).T
    hidden = hidden_by_self | (inside & covered[rows, columns])
    keypoints = np.zeros((LSP14.count, 3), np.float32)
    keypoints[inside, :2] = screen[inside, :2]
    keypoints[:, 2] = np.where(inside, np.where(hidden, 1, 2), 0)
    return RenderedPerson(
        image=_through_jpeg(rng, scene.photograph(rng, picture), config.jpeg_probability),
        keypoints=keypoints,
        bbox_xywh=_box(keypoints, size),
        hidden_by_self=hidden_by_self,
    )


def _aim(rng: np.random.Generator, figure: Figure, config: RenderConfig) -> tuple[Camera, F64]:
    """Camera and projected keypoints (14, 3); a picture that would cut off nearly everything is framed again."""
    joints = figure.skeleton.keypoints()
    if rng.random() < config.truncation_probability:
        for _ in range(4):
            camera = aim_camera(rng, figure, config.size_hw, float(rng.uniform(1.02, 1.6)))
            screen, _ = camera.project(joints)
            if inside_picture(screen, config.size_hw).sum() >= 7:
                return camera, screen
    camera = aim_camera(rng, figure, config.size_hw, float(rng.uniform(*config.extent)))
    return camera, camera.project(joints)[0]


def _draw_distractor(rng: np.random.Generator, picture: F32) -> None:
    """A second person, smaller and anywhere, behind the first; in place."""
    size = (picture.shape[0], picture.shape[1])
    figure = sample_figure(rng)
    camera = aim_camera(rng, figure, size, float(rng.uniform(0.15, 0.4)))
    moved = (float(rng.uniform(0, size[1])), float(rng.uniform(0.2, 0.9) * size[0]))
    projected = project_body(figure.flesh, Camera(camera.distance, camera.stature_px, moved))
    surface = Surface.empty(size)
    rasterise(projected.cones, surface)
    if not (surface.part >= 0).any():
        return
    pixels, colors = shade(figure.flesh, figure.outfit, projected, surface, sample_light(rng))
    picture.reshape(-1, 3)[pixels] = colors


def _draw_occluders(
    rng: np.random.Generator, picture: F32, screen: F64, config: RenderConfig, stature_px: float
) -> NDArray[np.bool_]:
    """Puts things in front, near random joints; in place. Returns (H, W) bool, what they cover.

    An occluder that would hide most of the person is left out: nobody labels such pictures.
    """
    covered = np.zeros(config.size_hw, np.bool_)
    if rng.random() >= config.occluder_probability:
        return covered
    inside = np.flatnonzero(inside_picture(screen, config.size_hw))
    columns, rows = np.rint(screen[inside, :2]).astype(int).T
    for _ in range(int(rng.choice([1, 2, 3], p=[0.65, 0.25, 0.1]))):
        joint = screen[int(rng.choice(inside))]
        mask = scene.occluder_mask(rng, config.size_hw, (float(joint[0]), float(joint[1])), stature_px)
        if (covered | mask)[rows, columns].mean() > 0.45:
            continue
        scene.paint_occluder(rng, picture, mask)
        covered |= mask
    return covered


def _through_jpeg(rng: np.random.Generator, image: NDArray[np.uint8], probability: float) -> NDArray[np.uint8]:
    if rng.random() >= probability:
        return image
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(40, 95))])
    return np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR), np.uint8)


def _box(keypoints: F32, size_hw: tuple[int, int]) -> F32:
    """LSPET's box around the labelled keypoints, (4,) xywh."""
    points = keypoints[keypoints[:, 2] > 0, :2]
    low, high = points.min(axis=0), points.max(axis=0)
    margin = _BOX_MARGIN * float((high - low).max())
    limit = np.array([size_hw[1] - 1, size_hw[0] - 1], np.float32)
    low, high = np.clip(low - margin, 0, limit), np.clip(high + margin, 0, limit)
    return np.concatenate([low, high - low]).astype(np.float32)
