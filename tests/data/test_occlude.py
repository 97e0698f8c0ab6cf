"""Occluders of training: what covers people, how much of them, and where frames end."""

from __future__ import annotations

import cv2
import msgspec
import numpy as np
import pytest

from edgepose.data.occlude import Donors, OcclusionConfig, Target, occlude, severity, truncated
from edgepose.data.patch import Patch

CONFIG = OcclusionConfig(pasted=1, joints=0, soft=0)
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
    none = {"shapes": 0.0, "body_parts": 0.0, "objects": 0.0, "cutout": 0.0}
    return msgspec.structs.replace(CONFIG, **{**none, **weights})


def test_severity_grows_from_start_to_one() -> None:
    config = OcclusionConfig(start=0.2, ramp=0.5)
    assert [severity(config, progress) for progress in (0, 0.25, 0.5, 1)] == pytest.approx([0.2, 0.6, 1, 1])
    assert severity(OcclusionConfig(start=0.2, ramp=0), 0) == 1


@pytest.mark.parametrize("family", ["shapes", "body_parts", "objects", "cutout"])
def test_every_family_covers_what_it_says_and_nothing_else(family: str) -> None:
    donors = Donors([patch(np.full((90, 80, 3), 100, np.uint8))], SKELETON)
    donors.patches[0].pixels[...] = np.random.default_rng(0).integers(0, 256, (90, 80, 3))
    for seed in range(25):
        found = covered_by(only(**{family: 1.0}), donors, seed)
        changed = (found.crop != 100).any(axis=2)
        assert not (changed & (found.covered == 0)).any()
        assert found.covered.any()
        # Only colours that happen to be the crop's own stay.
        assert changed[found.covered > 0].mean() > 0.9 or family in ("shapes", "cutout")


def test_pieces_of_photographs_are_the_donors_pixels() -> None:
    donors = Donors([patch(np.full((90, 80, 3), 7, np.uint8))], SKELETON)
    for family in ("body_parts", "objects"):
        found = covered_by(only(**{family: 1.0}), donors, 3)
        assert (found.crop[found.covered > 0] == 7).all()
        assert (found.crop[found.covered == 0] == 100).all()


def test_without_donors_the_other_families_take_over() -> None:
    nobody = Donors((), SKELETON)
    assert covered_by(CONFIG, nobody, 0).covered.any()
    assert not covered_by(only(body_parts=1.0), nobody, 0).covered.any()


def test_the_covered_share_follows_the_largest_one() -> None:
    donors = Donors([patch(coordinates())], SKELETON)
    shares = {}
    for largest in (0.1, 0.6):
        config = msgspec.structs.replace(CONFIG, largest=largest)
        shares[largest] = [np.count_nonzero(covered_by(config, donors, seed).covered) / BOX_PX2 for seed in range(60)]
    assert np.mean(shares[0.1]) < 0.12
    assert 0.15 < np.mean(shares[0.6]) < 0.45
    assert max(shares[0.1]) < 0.25


def test_joint_masks_lie_on_joints() -> None:
    config = OcclusionConfig(pasted=0, joints=1, soft=0)
    for seed in range(30):
        found = covered_by(config, Donors((), SKELETON), seed)
        distance = cv2.distanceTransform((found.covered == 0).astype(np.uint8), cv2.DIST_L2, 5)
        columns, rows = found.points.astype(int).T
        assert distance[rows, columns].min() < 3
        assert np.count_nonzero(found.covered) < 0.15 * BOX_PX2


def test_soft_edges_are_covered_where_more_than_half_of_the_piece_shows() -> None:
    white = Donors([patch(np.full((90, 80, 3), 255, np.uint8))], SKELETON)
    for seed in range(10):
        found = covered_by(msgspec.structs.replace(only(objects=1.0), soft=1.0), white, seed)
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
