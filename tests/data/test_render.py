"""`render_person`: exact keypoints, honest visibility, the same bytes for the same seed.

Invariant: geometry is checked against brute force (dense spheres along every cone), never against the renderer's own
closed form.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from edgepose.data.render import LSP14, RenderConfig, RenderedPerson, render_person
from edgepose.data.render.body import build_body, sample_outfit
from edgepose.data.render.person import (
    Camera,
    Figure,
    aim_camera,
    hidden_keypoints,
    inside_picture,
    project_body,
    sample_figure,
)
from edgepose.data.render.raster import Surface, rasterise
from edgepose.data.render.skeleton import (
    LimbAngles,
    Pose,
    Proportions,
    pose_skeleton,
    rotation,
    sample_proportions,
)
from edgepose.data.render.texture import DEFAULT_BANK
from edgepose.errors import UsageError

WHOLE = RenderConfig(occluder_probability=0.0, distractor_probability=0.0, truncation_probability=0.0)
RELAXED = LimbAngles(swing=12.0, azimuth=0.0, twist=0.0, flex=5.0, end=0.0)
NAMES = list(LSP14.names)
LIMB_OF = {
    "ankle": ("lower_leg", "toe"),
    "knee": ("upper_leg", "lower_leg"),
    "elbow": ("upper_arm", "lower_arm"),
    "wrist": ("lower_arm", "hand"),
}


def standing(yaw: float, body: Proportions | None = None, **changes: object) -> Figure:
    """A relaxed person, turned about the vertical axis; 0 faces the camera."""
    rng = np.random.default_rng(4)
    body = body or sample_proportions(rng)
    sides = {"right": RELAXED, "left": RELAXED}
    pose = Pose(spine=(0, 0, 0), neck=(0, 0, 0), arms=sides, legs=sides, root=rotation(1, yaw))  # type: ignore[arg-type]
    pose = replace(pose, **changes)  # type: ignore[arg-type]
    skeleton = pose_skeleton(body, pose)
    outfit = sample_outfit(rng, body)
    return Figure(body, outfit, skeleton, build_body(body, outfit, skeleton))


def drawn(figure: Figure, camera: Camera) -> Surface:
    surface = Surface.empty((192, 192))
    rasterise(project_body(figure.flesh, camera).cones, surface)
    return surface


def brute_force_depth(figure: Figure, camera: Camera, points_xy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Depth of the front surface over each point: the nearest of 200 ellipsoids along every cone."""
    cones = project_body(figure.flesh, camera).cones
    nearest = np.full(len(points_xy), np.inf)
    shares = np.linspace(0, 1, 200)[:, None]
    for i in range(len(cones)):
        centres = cones.start[i] + shares * (cones.end[i] - cones.start[i])
        radii = cones.radius[i, 0] + shares[:, 0] * (cones.radius[i, 1] - cones.radius[i, 0])
        m = cones.metric[i].astype(np.float64)
        offset = points_xy[:, None, :] - centres[None, :, :2]
        # vᵀ M v = r² with v = (offset, z) is a quadratic in z.
        linear = offset @ m[:2, 2]
        constant = np.einsum("psi,ij,psj->ps", offset, m[:2, :2], offset) - radii**2
        room = linear**2 - m[2, 2] * constant
        front = centres[:, 2] + (-linear - np.sqrt(np.maximum(room, 0))) / m[2, 2]
        nearest = np.minimum(nearest, np.where(room >= 0, front, np.inf).min(axis=1))
    return nearest


def test_another_bank_of_textures_shows_the_same_pose_in_other_patterns() -> None:
    config = RenderConfig(size_hw=(64, 64), jpeg_probability=0.0)
    usual, other = (
        render_person(np.random.default_rng(3), replace(config, texture_seed=seed)) for seed in (DEFAULT_BANK, 7)
    )
    np.testing.assert_array_equal(usual.keypoints[:, :2], other.keypoints[:, :2])
    assert (usual.image != other.image).mean() > 0.2
    again = render_person(np.random.default_rng(3), config)
    np.testing.assert_array_equal(usual.image, again.image)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    first, again, other = (render_person(np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.image.tobytes() == again.image.tobytes()
    assert first.keypoints.tobytes() == again.keypoints.tobytes()
    assert first.image.tobytes() != other.image.tobytes()


@pytest.mark.parametrize("size_hw", [(192, 192), (128, 96), (64, 160)])
def test_arrays_have_the_documented_shapes_and_ranges(size_hw: tuple[int, int]) -> None:
    person = render_person(np.random.default_rng(1), replace(WHOLE, size_hw=size_hw))
    assert person.image.shape == (*size_hw, 3)
    assert person.image.dtype == np.uint8
    assert person.keypoints.shape == (14, 3)
    assert person.keypoints.dtype == np.float32
    assert person.bbox_xywh.shape == (4,)
    assert person.hidden_by_self.dtype == np.bool_
    x, y, w, h = person.bbox_xywh
    assert 0 <= x < x + w <= size_hw[1]
    assert 0 <= y < y + h <= size_hw[0]


def test_nothing_is_lost_when_nothing_cuts_the_person_off() -> None:
    for seed in range(12):
        person = render_person(np.random.default_rng(seed), WHOLE)
        assert (person.keypoints[:, 2] >= 1).all()
        assert ((person.keypoints[:, 2] == 1) == person.hidden_by_self).all()
        low, high = person.keypoints[:, :2].min(axis=0), person.keypoints[:, :2].max(axis=0)
        assert 0.5 - 1e-3 <= ((high - low) / 192).max() <= 0.8 + 1e-3
        assert (person.bbox_xywh[:2] <= low).all()
        assert (person.bbox_xywh[:2] + person.bbox_xywh[2:] >= high).all()


def test_keypoints_lie_inside_the_silhouette_of_their_own_limb() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        figure = sample_figure(rng)
        camera = aim_camera(rng, figure, (192, 192), 0.7)
        screen, _ = camera.project(figure.skeleton.keypoints())
        for row, name in enumerate(NAMES):
            side, _, joint = name.partition("_")
            frames = [figure.skeleton.frames[f"{side}_{bone}"] for bone in LIMB_OF.get(joint, ())]
            frames = frames or [figure.skeleton.frames[bone] for bone in ("pelvis", "abdomen", "chest", "head")]
            own = tuple(
                part
                for part in figure.flesh
                if any(np.allclose(part.axes / np.linalg.norm(part.axes, axis=0), frame) for frame in frames)
            )
            depth = brute_force_depth(replace(figure, flesh=own), camera, screen[row : row + 1, :2])
            assert np.isfinite(depth).all(), name
            assert depth[0] <= screen[row, 2] + 0.25, f"{name} lies in front of its own limb"


def test_z_buffer_agrees_with_brute_force() -> None:
    rng = np.random.default_rng(8)
    for _ in range(4):
        figure = sample_figure(rng)
        camera = aim_camera(rng, figure, (192, 192), 0.7)
        surface = drawn(figure, camera)
        rows, columns = rng.integers(40, 152, 150), rng.integers(40, 152, 150)
        expected = brute_force_depth(figure, camera, np.stack([columns, rows], axis=1).astype(float))
        found = surface.depth[rows, columns]
        assert (np.isinf(expected) == np.isinf(found)).mean() > 0.99
        both = np.isfinite(expected) & np.isfinite(found)
        assert both.sum() > 20
        # Sampled spheres stay a little behind the true envelope; silhouettes may differ by a grazing pixel.
        assert np.quantile(np.abs(expected[both] - found[both]), 0.97) < 0.25


def test_hidden_keypoints_agree_with_an_independent_depth_test() -> None:
    compared = hidden = 0
    for seed in range(30):
        rng = np.random.default_rng(100 + seed)
        figure = sample_figure(rng)
        camera = aim_camera(rng, figure, (192, 192), 0.7)
        screen, _ = camera.project(figure.skeleton.keypoints())
        found = hidden_keypoints(drawn(figure, camera), screen, figure, camera)
        behind = screen[:, 2] - brute_force_depth(figure, camera, np.rint(screen[:, :2]))
        # Every limb is deeper than 2 % of the stature and no trunk deeper than 15 %: only between may opinions differ.
        clear = (behind < 0.022 * camera.stature_px) | (behind > 0.15 * camera.stature_px)
        assert (found[clear] == (behind[clear] > 0.1 * camera.stature_px)).all()
        compared += int(clear.sum())
        hidden += int(found[clear].sum())
    assert compared > 60
    assert hidden > 10


def test_the_far_arm_of_a_profile_is_hidden_and_the_near_one_is_not() -> None:
    figure = standing(90.0)  # turned to the viewer's right, so that the person's right side is near
    camera = Camera(6.0, 120.0, (96.0, 96.0))
    screen, _ = camera.project(figure.skeleton.keypoints())
    hidden = hidden_keypoints(drawn(figure, camera), screen, figure, camera)
    assert hidden[NAMES.index("left_shoulder")]
    assert hidden[NAMES.index("left_hip")]
    assert not hidden[NAMES.index("right_shoulder")]
    assert not hidden[NAMES.index("right_hip")]
    assert not hidden[NAMES.index("right_wrist")]


def test_left_and_right_are_the_persons_own() -> None:
    for yaw, sign in ((0.0, 1.0), (180.0, -1.0)):
        screen, _ = Camera(6.0, 120.0, (96.0, 96.0)).project(standing(yaw).skeleton.keypoints())
        for joint in ("ankle", "knee", "hip", "wrist", "elbow", "shoulder"):
            left, right = screen[NAMES.index(f"left_{joint}"), 0], screen[NAMES.index(f"right_{joint}"), 0]
            assert sign * (left - right) > 2.0, f"{joint} at yaw {yaw}"


def test_a_standing_person_has_the_head_up_and_bends_the_way_people_do() -> None:
    body = sample_proportions(np.random.default_rng(4))
    joints = standing(0.0, body).skeleton.joints
    assert joints["head_top"][1] > joints["neck"][1] > joints["right_hip"][1] > joints["right_knee"][1]
    assert joints["right_toe"][2] > joints["right_ankle"][2] + 0.08  # toes point to the front
    bent = {side: replace(RELAXED, swing=5.0, flex=90.0) for side in ("right", "left")}
    joints = standing(0.0, body, arms=bent, legs=bent).skeleton.joints
    assert joints["left_wrist"][2] > joints["left_elbow"][2] + 0.1  # elbows bend to the front
    assert joints["left_ankle"][2] < joints["left_knee"][2] - 0.1  # knees bend to the back
    forward = standing(0.0, body, spine=(60.0, 0.0, 0.0)).skeleton.joints
    assert forward["neck"][2] > 0.1
    raised = {side: replace(RELAXED, swing=90.0, azimuth=0.0) for side in ("right", "left")}
    joints = standing(0.0, body, arms=raised).skeleton.joints
    assert joints["left_wrist"][0] > 0.3
    assert joints["right_wrist"][0] < -0.3


def test_bones_keep_their_lengths_in_every_pose() -> None:
    for seed in range(30):
        figure = sample_figure(np.random.default_rng(seed))
        joints, body = figure.skeleton.joints, figure.body
        for side in ("left", "right"):
            for start, end, length in (
                ("hip", "knee", body.thigh),
                ("knee", "ankle", body.shank),
                ("shoulder", "elbow", body.upper_arm),
                ("elbow", "wrist", body.forearm),
            ):
                assert np.linalg.norm(joints[f"{side}_{start}"] - joints[f"{side}_{end}"]) == pytest.approx(length)
        for frame in figure.skeleton.frames.values():
            assert np.allclose(frame.T @ frame, np.eye(3))
            assert np.linalg.det(frame) == pytest.approx(1.0)


def test_occluders_hide_joints_that_the_body_does_not() -> None:
    config = replace(WHOLE, occluder_probability=1.0)
    people = [render_person(np.random.default_rng(seed), config) for seed in range(20)]
    by_things = sum(int(((p.keypoints[:, 2] == 1) & ~p.hidden_by_self).sum()) for p in people)
    assert by_things >= 10
    assert all((p.keypoints[:, 2] == 2).any() for p in people)


def test_cut_off_people_have_unlabelled_joints_outside_the_picture() -> None:
    config = replace(WHOLE, truncation_probability=1.0)
    people = [render_person(np.random.default_rng(seed), config) for seed in range(16)]
    assert sum(bool((p.keypoints[:, 2] == 0).any()) for p in people) >= 8
    for person in people:
        labelled = person.keypoints[:, 2] > 0
        assert labelled.sum() >= 7
        assert (person.keypoints[~labelled] == 0).all()
        assert inside_picture(person.keypoints[labelled, :2].astype(float), (192, 192)).all()


def test_mirroring_a_person_mirrors_keypoints_through_the_flip_pairs() -> None:
    body = sample_proportions(np.random.default_rng(2))
    reach = replace(RELAXED, swing=100.0, azimuth=20.0, twist=15.0, flex=40.0)
    straight = standing(0.0, body, arms={"right": reach, "left": RELAXED}).skeleton.keypoints()
    mirrored = standing(0.0, body, arms={"right": RELAXED, "left": reach}).skeleton.keypoints()
    order = np.arange(14)
    for first, second in LSP14.flip_pairs:
        order[[first, second]] = second, first
    assert np.allclose(mirrored, straight[order] * (-1, 1, 1))
    for first, second in LSP14.flip_pairs:
        assert {NAMES[first].partition("_")[2]} == {NAMES[second].partition("_")[2]}


def test_the_person_stands_out_from_what_is_behind() -> None:
    """With the same seed but another body, pixels differ where bodies are: people are really drawn."""
    figure = sample_figure(np.random.default_rng(3))
    camera = aim_camera(np.random.default_rng(3), figure, (192, 192), 0.75)
    silhouette = drawn(figure, camera).part >= 0
    assert 0.04 < silhouette.mean() < 0.6
    assert len(np.unique(drawn(figure, camera).part)) > 15  # many parts are visible: volume, not sticks


def test_pictures_vary_like_photographs() -> None:
    people = [render_person(np.random.default_rng(seed)) for seed in range(40)]
    brightness = np.array([p.image.mean() for p in people])
    contrast = np.array([p.image.std() for p in people])
    assert 60 < brightness.mean() < 160
    assert brightness.std() > 15
    assert 25 < contrast.mean() < 80
    upside_down = np.mean([_head_below_hips(p) for p in people])
    assert 0.1 < upside_down < 0.6


def _head_below_hips(person: RenderedPerson) -> bool:
    points = person.keypoints
    return bool(points[NAMES.index("head_top"), 1] > points[[2, 3], 1].mean())


@pytest.mark.parametrize(
    "options",
    [{"size_hw": (16, 192)}, {"occluder_probability": 1.5}, {"extent": (0.9, 0.5)}, {"texture_seed": -1}],
)
def test_impossible_configs_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=r"RenderConfig\."):
        RenderConfig(**options)  # type: ignore[arg-type]
