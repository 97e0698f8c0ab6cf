"""Occluders of training: what covers people, how much of them, and where frames end."""

from __future__ import annotations

import cv2
import msgspec
import numpy as np
import pytest

from edgepose.data.occlude import Donors, OcclusionConfig, Target, occlude, severity, truncated
from edgepose.data.patch import Patch

CONFIG = OcclusionConfig(pasted=1, joints=0, soft=0, translucent=0, jitter=0)
FAMILIES = ("shapes", "body_parts", "objects", "scene", "cutout")
LAYOUTS = ("single", "clutter", "tangles", "walls", "veils")
SKELETON = ((0, 1), (1, 2))
BOX_PX2 = 60.0 * 70


def coordinates(height: int = 90, width: int = 80) -> np.ndarray:
    """A picture whose pixels say where they are: blue is x, green is y."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.zeros_like(x)], axis=2).astype(np.uint8)


def patch(pixels: np.ndarray) -> Patch:
    joints = np.array([[40, 20, 2], [30, 45, 2], [55, 70, 2]], np.float32)
    return Patch(pixels, np.array([10.0, 10, 70, 80]), joints)


def target(value: int = 100) -> Target:
    crop = np.full((96, 96, 3), value, np.uint8)
    return Target(crop, np.zeros((96, 96), np.uint8), np.array([[48, 20], [40, 50], [60, 80]], np.float32), BOX_PX2)


def covered_by(config: OcclusionConfig, donors: Donors, seed: int) -> Target:
    covered = target()
    occlude(covered, donors, config, 1.0, np.random.default_rng(seed))
    return covered


def only(**weights: float) -> OcclusionConfig:
    """One family, and one layout if any is named."""
    groups = [group for group in (FAMILIES, LAYOUTS) if set(group) & set(weights)]
    return msgspec.structs.replace(CONFIG, **{**{name: 0.0 for group in groups for name in group}, **weights})


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)


def test_severity_grows_from_start_to_one() -> None:
    config = OcclusionConfig(start=0.2, ramp=0.5)
    assert [severity(config, progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx([0.2, 0.6, 1, 1])
    assert severity(OcclusionConfig(start=0.2, ramp=0), 0) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_covers_what_it_says_and_nothing_else(family: str, layout: str) -> None:
    donors = Donors([patch(noise(90, 80)[::-1])], SKELETON)
    before, unchanged, covered = noise(96, 96), 0, 0
    for seed in range(10):
        found = target()
        found.crop[...] = before
        occlude(found, donors, only(**{family: 1.0, layout: 1.0}), 1.0, np.random.default_rng(seed))
        changed = (found.crop != before).any(axis=2)
        assert not (changed & (found.covered == 0)).any()
        assert set(np.unique(found.covered)) <= {0, 255}
        assert found.covered.any()
        unchanged += np.count_nonzero(~changed & (found.covered > 0))
        covered += np.count_nonzero(found.covered)
    assert unchanged < 0.001 * covered  # a colour may be the one that was there


@pytest.mark.parametrize("jitter", [0.0, 1.0])
def test_what_shows_through_is_less_than_half(jitter: float) -> None:
    white = Donors([patch(np.full((90, 80, 3), 255, np.uint8))], SKELETON)
    config = msgspec.structs.replace(only(objects=1.0, single=1.0), translucent=1.0, jitter=jitter)
    levels = set()
    for seed in range(20):
        found = covered_by(config, white, seed)
        changed = (found.crop != 100).any(axis=2)
        assert not (changed & (found.covered == 0)).any()
        assert (found.covered[found.covered > 0] >= 191).all()
        levels |= set(np.unique(found.covered).tolist())
        if not jitter:
            assert ((found.crop[found.covered > 0] - 100) / 155 >= 0.73).all()
    assert len(levels) > 8


def test_the_scene_lends_its_own_background() -> None:
    """From far away of the joints: from the right half, where the left half holds them all."""
    taken = 0
    for seed in range(20):
        crop = np.full((96, 96, 3), 10, np.uint8)
        crop[:, 48:] = 200
        found = Target(crop, np.zeros((96, 96), np.uint8), np.array([[10, 20], [12, 70]], np.float32), BOX_PX2 / 4)
        occlude(found, Donors((), SKELETON), only(scene=1.0, single=1.0), 1.0, np.random.default_rng(seed))
        taken += int((found.crop[:, :40] > 100).any())
    assert taken > 15


def test_pieces_of_photographs_vary_in_colour_where_they_are_jittered() -> None:
    donors = Donors([patch(np.full((90, 80, 3), 77, np.uint8))], SKELETON)
    config = msgspec.structs.replace(only(objects=1.0, clutter=1.0), jitter=1.0)
    found = covered_by(config, donors, 3)
    assert len(np.unique(found.crop[found.covered > 0])) > 10
    assert (found.crop[found.covered == 0] == 100).all()


def test_pieces_of_photographs_are_the_donors_pixels() -> None:
    donors = Donors([patch(np.full((90, 80, 3), 7, np.uint8))], SKELETON)
    for family in ("body_parts", "objects"):
        found = covered_by(only(**{family: 1.0}), donors, 3)
        assert (found.crop[found.covered > 0] == 7).all()
        assert (found.crop[found.covered == 0] == 100).all()


def test_without_donors_the_other_families_take_over() -> None:
    nobody = Donors((), SKELETON)
    assert covered_by(CONFIG, nobody, 0).covered.any()
    for family in ("body_parts", "objects"):
        assert covered_by(only(**{family: 1.0, "scene": 1.0}), nobody, 0).covered.any()
        assert not covered_by(only(**{family: 1.0}), nobody, 0).covered.any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_covered_share_follows_the_largest_one(layout: str) -> None:
    """Of what is around the joints, here columns 27 to 73 and rows 13 to 86: walls go on beyond it."""
    donors = Donors([patch(coordinates())], SKELETON)
    shares = {}
    for largest in (0.1, 0.6):
        config = msgspec.structs.replace(only(**{layout: 1.0}), largest=largest)
        shares[largest] = [
            np.count_nonzero(covered_by(config, donors, seed).covered[13:87, 27:73]) / (74 * 46) for seed in range(40)
        ]
    assert np.mean(shares[0.1]) < 0.12
    assert 0.15 < np.mean(shares[0.6]) < 0.45
    assert max(shares[0.1]) < 0.3


def test_joint_masks_lie_on_joints() -> None:
    config = OcclusionConfig(pasted=0, joints=1, soft=0, translucent=0)
    for seed in range(30):
        found = covered_by(config, Donors((), SKELETON), seed)
        distance = cv2.distanceTransform((found.covered == 0).astype(np.uint8), cv2.DIST_L2, 5)
        columns, rows = found.points.astype(int).T
        assert distance[rows, columns].min() < 3
        assert np.count_nonzero(found.covered) < 0.15 * BOX_PX2


def test_soft_edges_are_covered_where_more_than_half_of_the_piece_shows() -> None:
    white = Donors([patch(np.full((90, 80, 3), 255, np.uint8))], SKELETON)
    for seed in range(10):
        found = covered_by(msgspec.structs.replace(only(objects=1.0, single=1.0), soft=1.0), white, seed)
        shown = (found.crop[..., 0].astype(float) - 100) / 155
        assert len(np.unique(found.covered)) > 10
        assert (shown[found.covered >= 128] >= 0.5).all()
        assert (shown[found.covered == 0] == 0).all()
        assert (shown[found.covered < 128] < 0.5).mean() > 0.99  # two soft edges may lie over each other


def test_nobody_is_covered_at_probability_zero() -> None:
    found = covered_by(OcclusionConfig(pasted=0, joints=0), Donors((), SKELETON), 0)
    assert not found.covered.any()
    assert (found.crop == 100).all()


def test_a_person_without_joints_in_the_crop_can_be_covered() -> None:
    empty = target()
    bare = Target(empty.crop, empty.covered, empty.points[:0], BOX_PX2)
    occlude(bare, Donors((), SKELETON), msgspec.structs.replace(CONFIG, joints=1), 1.0, np.random.default_rng(1))
    assert bare.covered.any()


def test_truncated_frames_keep_joints_on_their_pixels() -> None:
    whole = patch(coordinates())
    config = OcclusionConfig(truncation=1)
    gone = clipped = 0
    for seed in range(80):
        cut = truncated(whole, config, 1.0, np.random.default_rng(seed))
        height, width = cut.pixels.shape[:2]
        size = cut.box_xyxy[2:] - cut.box_xyxy[:2]
        share = 1 - size.prod() / (60 * 70)
        assert 0.08 < share < 0.47
        gone += (height, width) != (90, 80)
        clipped += (height, width) == (90, 80)
        for (x, y, v), (old_x, old_y, _) in zip(cut.keypoints, whole.keypoints, strict=True):
            assert v == 2
            if 0 <= x < width and 0 <= y < height:
                assert cut.pixels[int(y), int(x), :2].tolist() == [old_x, old_y]
        assert (cut.box_xyxy[:2] >= -0.5).all()
        assert (cut.box_xyxy[2:] <= (width - 0.5, height - 0.5)).all()
    assert gone > 20
    assert clipped > 20


def test_truncation_at_probability_zero_returns_the_patch_itself() -> None:
    whole = patch(coordinates())
    assert truncated(whole, OcclusionConfig(truncation=0), 1.0, np.random.default_rng(0)) is whole


def test_a_speck_cannot_be_truncated() -> None:
    speck = Patch(np.zeros((1, 1, 3), np.uint8), np.array([-5.0, -5, 5, 5]), np.zeros((3, 3), np.float32))
    for seed in range(20):
        assert truncated(speck, OcclusionConfig(truncation=1), 1.0, np.random.default_rng(seed)).pixels.size


def test_settings_of_before_there_were_layouts_are_still_read() -> None:
    written = b'{"pasted":0.6,"largest":0.5,"shapes":0.35,"body_parts":0.25,"objects":0.3,"cutout":0.1,"joints":0.25,'
    written += b'"truncation":0.15,"largest_truncation":0.45,"soft":0.4,"start":0.3,"ramp":0.3}'
    config = msgspec.json.decode(written, type=OcclusionConfig)
    assert (config.shapes, config.soft, config.walls) == (0.35, 0.4, OcclusionConfig().walls)
