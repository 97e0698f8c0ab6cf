"""Random views: keypoints follow their pixels, mirrors swap sides, and everything comes from the generator."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import msgspec
import numpy as np
import pytest

from edgepose.data.augment import AugmentConfig, OcclusionConfig, View, augment, cut_patch, mirror
from edgepose.data.coco import Person, read_image
from edgepose.data.cover import joints_covered
from edgepose.errors import AnnotationError, ImageError
from edgepose.pose.preprocess import apply_transforms, crop_transforms, warp
from edgepose.spec import Keypoints, Preprocess

KEYPOINTS = Keypoints(("nose", "left_hand", "right_hand"), flip_pairs=((1, 2),))
COLOURS = np.eye(3)  # nose blue, left hand green, right hand red
PREPROCESS = Preprocess(input_hw=(96, 64))
GEOMETRY = AugmentConfig(color=0, cutout=0, blur=0)
STILL = AugmentConfig(rotation_deg=0, scale=1, shift=0, mirror=0, color=0, cutout=0, blur=0)


def dotted(folder: Path, joints: np.ndarray, size_hw: tuple[int, int], radius: float) -> Person:
    """A photograph with a soft dot of its own colour at each joint; the last row's v may be 0."""
    y, x = np.mgrid[: size_hw[0], : size_hw[1]]
    frame = np.zeros((*size_hw, 3))
    for (px, py, _), colour in zip(joints, COLOURS, strict=True):
        dot = np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * radius**2))
        frame += 255 * dot[..., None] * colour
    path = folder / "dots.png"
    cv2.imwrite(str(path), np.rint(frame).astype(np.uint8))
    low, high = joints[:, :2].min(0) - 7 * radius, joints[:, :2].max(0) + 7 * radius
    return Person(path, 1, 5, np.array([*low, *(high - low)]), joints.astype(np.float32))


@pytest.fixture(params=[1, 5], ids=["small photograph", "large photograph"])
def person(request: pytest.FixtureRequest, tmp_path: Path) -> Person:
    """The large one is shrunk before it is kept."""
    k = request.param
    joints = np.array([[60.3 * k, 40.7 * k, 2], [45.1 * k, 70.2 * k, 1], [82.6 * k, 66.5 * k, 2]])
    return dotted(tmp_path, joints, (110 * k, 130 * k), 3.0 * k)


def found_at(crop: np.ndarray, colour: int) -> np.ndarray:
    """Centre of mass of one colour, (2,) x y."""
    mass = crop[..., colour].astype(np.float64)
    mass[mass < 8] = 0
    rows, columns = np.mgrid[: crop.shape[0], : crop.shape[1]]
    return np.array([(mass * columns).sum(), (mass * rows).sum()]) / mass.sum()


def turn(nose: np.ndarray, left: np.ndarray, right: np.ndarray) -> float:
    """Positive or negative, depending on which side of the way from nose to left hand the right hand lies."""
    (ax, ay), (bx, by) = left - nose, right - nose
    return float(np.sign(ax * by - ay * bx))


@pytest.mark.parametrize("config", [GEOMETRY, msgspec.structs.replace(GEOMETRY, mirror=1.0)], ids=["any", "mirrored"])
def test_keypoints_follow_their_pixels_and_mirrors_swap_sides(person: Person, config: AugmentConfig) -> None:
    patch = cut_patch(person, PREPROCESS)
    mirrored = []
    for seed in range(40):
        view = augment(patch, PREPROCESS, KEYPOINTS, config, np.random.default_rng(seed))
        crop, points = view.crop, view.keypoints
        assert (crop.shape, crop.dtype, points.shape, points.dtype) == ((96, 64, 3), np.uint8, (3, 2), np.float32)
        if not ((points > 11) & (points < (52, 84))).all():
            continue  # a dot may be cut
        nose, left, right = (found_at(crop, colour) for colour in range(3))
        mirrored.append(turn(nose, left, right) != turn(*person.keypoints[:, :2]))
        if mirrored[-1]:  # what was the left hand is a right hand now
            left, right = right, left
        assert np.abs(np.stack([nose, left, right]) - points).max() < 0.3, seed
    assert len(mirrored) > 15
    share = np.mean(mirrored)
    assert share == 1 if config.mirror == 1 else 0.2 < share < 0.8


def test_weights_count_what_is_labelled_and_in_the_crop(tmp_path: Path) -> None:
    joints = np.array([[60.0, 40, 2], [45, 70, 1], [82, 66, 0]])
    patch = cut_patch(dotted(tmp_path, joints, (110, 130), 3), PREPROCESS)
    weights = augment(patch, PREPROCESS, KEYPOINTS, STILL, np.random.default_rng(0)).weights
    assert weights.dtype == np.float32
    assert weights.tolist() == [1, 1, 0]
    # The unlabelled joint stays unlabelled under its new name.
    mirrored = msgspec.structs.replace(STILL, mirror=1.0)
    weights = augment(patch, PREPROCESS, KEYPOINTS, mirrored, np.random.default_rng(0)).weights
    assert weights.tolist() == [1, 0, 1]
    wild = msgspec.structs.replace(GEOMETRY, shift=0.6)
    outside = 0
    for seed in range(30):
        view = augment(patch, PREPROCESS, KEYPOINTS, wild, np.random.default_rng(seed))
        points, weights = view.keypoints, view.weights
        inside = ((points >= 0) & (points <= (63, 95))).all(1)
        assert not weights[~inside].any()
        outside += (~inside).sum()
        assert (weights[inside] > 0).sum() >= inside.sum() - 1
    assert outside > 20


def test_equal_generators_give_equal_views_and_others_do_not(person: Person) -> None:
    patch = cut_patch(person, PREPROCESS)
    before = patch.pixels.copy(), patch.keypoints.copy(), patch.box_xyxy.copy()
    everything = AugmentConfig(blur=0.5, cutout=1.0)
    views = [augment(patch, PREPROCESS, KEYPOINTS, everything, np.random.default_rng(s)) for s in (3, 3, 4)]
    for field in dataclasses.fields(View):
        assert np.array_equal(getattr(views[0], field.name), getattr(views[1], field.name)), field.name
    assert not np.array_equal(views[0].crop, views[2].crop)
    assert not np.array_equal(views[0].keypoints, views[2].keypoints)
    for now, then in zip((patch.pixels, patch.keypoints, patch.box_xyxy), before, strict=True):
        assert np.array_equal(now, then)


@pytest.mark.parametrize("name", ["color", "cutout", "blur"])
def test_each_disturbance_changes_pixels_and_never_keypoints(name: str, person: Person) -> None:
    patch = cut_patch(person, PREPROCESS)
    plain = augment(patch, PREPROCESS, KEYPOINTS, STILL, np.random.default_rng(1))
    config = msgspec.structs.replace(STILL, **{name: 1.0})
    disturbed = augment(patch, PREPROCESS, KEYPOINTS, config, np.random.default_rng(1))
    assert (disturbed.crop != plain.crop).mean() > 0.02
    assert np.array_equal(disturbed.keypoints, plain.keypoints)
    assert np.array_equal(disturbed.weights, plain.weights)


@pytest.mark.parametrize("input_hw", [(96, 64), (64, 96), (64, 64)])
def test_no_augmentation_is_the_evaluation_crop(input_hw: tuple[int, int], tmp_path: Path) -> None:
    """Training and evaluation must agree on what the network sees."""
    preprocess = Preprocess(input_hw=input_hw)
    noise = np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "x.png"), cv2.GaussianBlur(noise, (0, 0), 2))
    person = Person(tmp_path / "x.png", 1, 1, np.array([50.0, 30, 40, 50]), np.ones((3, 3), np.float32))
    view = augment(cut_patch(person, preprocess), preprocess, KEYPOINTS, STILL, np.random.default_rng(0))
    crop, points = view.crop, view.keypoints
    transforms = crop_transforms(person.box_xyxy[None], preprocess)
    assert np.abs(points - apply_transforms(person.keypoints[None, :, :2], transforms)[0]).max() < 1e-3
    assert np.abs(crop.astype(int) - warp(read_image(person.image), transforms, input_hw)[0]).max() <= 3


@pytest.mark.parametrize("input_hw", [(96, 64), (64, 96)])
def test_a_patch_holds_all_that_upright_views_can_see(input_hw: tuple[int, int], tmp_path: Path) -> None:
    preprocess = Preprocess(input_hw=input_hw)
    cv2.imwrite(str(tmp_path / "white.png"), np.full((400, 400, 3), 255, np.uint8))
    upright = msgspec.structs.replace(GEOMETRY, rotation_deg=0)
    for box in ([190.0, 150, 30, 90], [150.0, 190, 90, 30]):
        person = Person(tmp_path / "white.png", 1, 1, np.array(box), np.ones((3, 3), np.float32))
        patch = cut_patch(person, preprocess)
        assert patch.pixels.shape[0] < 400  # otherwise this test says nothing
        for seed in range(30):
            assert augment(patch, preprocess, KEYPOINTS, upright, np.random.default_rng(seed)).crop.min() == 255


def test_large_photographs_are_kept_at_twice_the_inputs_resolution(tmp_path: Path) -> None:
    joints = np.array([[600.0, 400, 2], [450, 700, 2], [820, 660, 2]])
    person = dotted(tmp_path, joints, (1100, 1300), 20)
    patch = cut_patch(person, PREPROCESS)
    scale = crop_transforms(patch.box_xyxy[None], PREPROCESS)[0, 0, 0]
    assert scale == pytest.approx(0.5, rel=0.01)
    assert patch.pixels.nbytes < 0.1 * 1100 * 1300 * 3


def test_a_box_beside_the_photograph_is_refused(person: Person) -> None:
    for box in ([-50.0, 10, 40, 40], [10.0, 5000, 40, 40]):
        outside = Person(person.image, 1, 77, np.array(box), person.keypoints)
        with pytest.raises(AnnotationError, match=r"dots\.png: annotation 77: bbox: .*meets the photograph"):
            cut_patch(outside, PREPROCESS)


def test_a_speck_of_a_photograph_in_a_huge_box_is_bearable(person: Person) -> None:
    huge = Person(person.image, 1, 1, np.array([-5e5, -5e5, 1e6, 1e6]), person.keypoints)
    crop = augment(cut_patch(huge, PREPROCESS), PREPROCESS, KEYPOINTS, STILL, np.random.default_rng(0)).crop
    assert crop.shape == (96, 64, 3)


def test_a_missing_photograph_is_named(tmp_path: Path) -> None:
    absent = Person(tmp_path / "absent.png", 1, 1, np.array([0.0, 0, 9, 9]), np.ones((3, 3), np.float32))
    with pytest.raises(ImageError, match=r"absent\.png"):
        cut_patch(absent, PREPROCESS)


def test_mirroring_twice_changes_nothing() -> None:
    points = np.random.default_rng(0).uniform(0, 63, (3, 2)).astype(np.float32)
    weights = np.array([1, 0, 1], np.float32)
    once = mirror(points, weights, 64, KEYPOINTS)
    assert once[0][0].tolist() == pytest.approx([63 - points[0, 0], points[0, 1]])
    assert once[0][1].tolist() == pytest.approx([63 - points[2, 0], points[2, 1]])
    assert once[1].tolist() == [1, 1, 0]
    twice = mirror(*once, 64, KEYPOINTS)
    assert np.abs(twice[0] - points).max() < 1e-4
    assert np.array_equal(twice[1], weights)


def test_views_without_occlusion_are_what_they_always_were(tmp_path: Path) -> None:
    """Networks of before there was occlusion can be trained again: the same numbers are drawn in the same order."""
    joints = np.array([[60.3, 40.7, 2], [45.1, 70.2, 1], [82.6, 66.5, 2]])
    patch = cut_patch(dotted(tmp_path, joints, (110, 130), 3.0), PREPROCESS)
    expected = {
        0: ([[25.381, 31.827], [15.944, 47.512], [36.719, 46.836]], 0.2997118905373848),
        1: ([[35.874, 41.181], [20.794, 66.813], [53.543, 64.102]], 0.7884287034284043),
        2: ([[33.551, 32.78], [23.405, 48.444], [44.596, 48.457]], 0.4227846732701278),
    }
    for seed, (points, following) in expected.items():
        rng = np.random.default_rng(seed)
        view = augment(patch, PREPROCESS, KEYPOINTS, AugmentConfig(), rng)
        assert np.abs(view.keypoints - points).max() < 2e-3
        assert rng.random() == following


def test_visible_says_what_the_labels_know(tmp_path: Path) -> None:
    joints = np.array([[60.0, 40, 2], [45, 70, 1], [82, 66, 0]])
    patch = cut_patch(dotted(tmp_path, joints, (110, 130), 3), PREPROCESS)
    view = augment(patch, PREPROCESS, KEYPOINTS, STILL, np.random.default_rng(0))
    assert view.visible.tolist() == [1, 0, 0]
    assert view.known.tolist() == [1, 1, 0]
    assert view.weights.tolist() == [1, 1, 0]
    mirrored = msgspec.structs.replace(STILL, mirror=1.0)
    view = augment(patch, PREPROCESS, KEYPOINTS, mirrored, np.random.default_rng(0))
    assert view.visible.tolist() == [1, 0, 0]
    assert view.known.tolist() == [1, 0, 1]
    assert {array.dtype for array in (view.visible, view.known, view.weights)} == {np.dtype(np.float32)}


def test_a_joint_outside_the_crop_is_known_not_to_be_seen(person: Person) -> None:
    patch = cut_patch(person, PREPROCESS)
    wild = msgspec.structs.replace(GEOMETRY, shift=0.6)
    outside = 0
    for seed in range(30):
        view = augment(patch, PREPROCESS, KEYPOINTS, wild, np.random.default_rng(seed))
        gone = view.weights == 0
        assert not view.visible[gone].any()
        assert view.known.all()
        outside += int(gone.sum())
    assert outside > 20


def test_a_joint_beyond_the_photograph_is_not_seen_but_counts(tmp_path: Path) -> None:
    joints = np.array([[60.0, 40, 2], [45, 70, 2], [131, 66, 2]])  # the photograph is 130 pixels wide
    view = augment(
        cut_patch(dotted(tmp_path, joints, (110, 130), 3), PREPROCESS), PREPROCESS, KEYPOINTS, STILL,
        np.random.default_rng(0),
    )  # fmt: skip
    assert view.weights.tolist() == [1, 1, 1]
    assert view.visible.tolist() == [1, 1, 0]


def test_joints_under_the_cut_out_rectangle_are_hidden(person: Person) -> None:
    patch = cut_patch(person, PREPROCESS)
    plain = augment(patch, PREPROCESS, KEYPOINTS, STILL, np.random.default_rng(0))
    config = msgspec.structs.replace(STILL, cutout=1.0)
    hidden = 0
    for seed in range(60):
        view = augment(patch, PREPROCESS, KEYPOINTS, config, np.random.default_rng(seed))
        for (x, y), seen, before in zip(np.rint(view.keypoints).astype(int), view.visible, plain.visible, strict=True):
            changed = bool((view.crop[y, x] != plain.crop[y, x]).any())
            assert changed or seen == before  # a rectangle may have the joint's colour, but then it is not there
            assert not (changed and seen)
            hidden += int(changed)
        assert np.array_equal(view.weights, plain.weights)
    assert hidden > 5


def noisy_people(folder: Path, count: int) -> list[Person]:
    """People whose photographs are noise, so that hardly any pixel is like another."""
    people = []
    for number in range(count):
        rng = np.random.default_rng(number)
        path = folder / f"noise{number}.png"
        cv2.imwrite(str(path), rng.integers(0, 256, (110, 130, 3), dtype=np.uint8))
        joints = np.array([[60.3, 40.7, 2], [45.1, 70.2, 2], [82.6, 66.5, 2]], np.float32)
        people.append(Person(path, number, number, np.array([35.0, 30, 60, 50]), joints))
    return people


def test_a_joint_is_hidden_exactly_where_most_of_it_was_painted_over(tmp_path: Path) -> None:
    patches = [cut_patch(person, PREPROCESS) for person in noisy_people(tmp_path, 4)]
    plain = augment(patches[0], PREPROCESS, KEYPOINTS, STILL, np.random.default_rng(0))
    sharp = OcclusionConfig(pasted=1, joints=0.5, truncation=0, soft=0, translucent=0)
    config = msgspec.structs.replace(STILL, occlusion=sharp)
    hidden = wrong = 0
    for seed in range(120):
        view = augment(patches[0], PREPROCESS, KEYPOINTS, config, np.random.default_rng(seed), donors=patches)
        assert np.array_equal(view.keypoints, plain.keypoints)
        assert view.weights.tolist() == [1, 1, 1]
        painted = (view.crop != plain.crop).any(axis=2).astype(np.uint8) * 255
        side_px = PREPROCESS.input_hw[1] / PREPROCESS.padding  # the box is wide: it fills the width but for the padding
        expected = joints_covered(painted, view.keypoints, side_px)
        wrong += int((expected != (view.visible == 0)).sum())
        hidden += int(expected.sum())
    assert wrong <= 3  # of 360: paint may have a pixel's own colour
    assert 40 < hidden < 320


def test_the_view_without_what_was_pasted_differs_only_where_things_are(tmp_path: Path) -> None:
    people = noisy_people(tmp_path, 4)
    patches = [cut_patch(person, PREPROCESS) for person in people]
    config = AugmentConfig(color=0.0, blur=0.0, cutout=0.0, occlusion=OcclusionConfig(pasted=1.0, start=1.0))
    for seed, patch in enumerate(patches):
        rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
        view = augment(patch, PREPROCESS, KEYPOINTS, config, rng, donors=patches, keep_uncovered=True)
        alone = augment(patch, PREPROCESS, KEYPOINTS, config, same, donors=patches)
        assert view.uncovered is not None
        assert alone.uncovered is None
        np.testing.assert_array_equal(view.crop, alone.crop)
        assert rng.random() == same.random()
        differs = (view.crop != view.uncovered).any(axis=2)
        assert differs.any()
        assert not differs[view.covered == 0].any()


def test_the_curriculum_hides_more_as_the_run_goes_on(tmp_path: Path) -> None:
    patches = [cut_patch(person, PREPROCESS) for person in noisy_people(tmp_path, 4)]
    config = msgspec.structs.replace(STILL, occlusion=OcclusionConfig(start=0.1, ramp=0.5))

    def hidden(progress: float) -> float:
        views = [
            augment(
                patches[0], PREPROCESS, KEYPOINTS, config, np.random.default_rng(seed),
                progress=progress, donors=patches,
            ).visible
            for seed in range(80)
        ]  # fmt: skip
        return 1 - float(np.mean(views))

    early, middle, late = hidden(0.0), hidden(0.25), hidden(1.0)
    assert early < middle < late
    assert hidden(0.5) == late
    assert early < 0.05
    assert late > 0.15


def test_occlusion_leaves_patches_and_donors_alone(tmp_path: Path) -> None:
    patches = [cut_patch(person, PREPROCESS) for person in noisy_people(tmp_path, 3)]
    before = [(p.pixels.copy(), p.box_xyxy.copy(), p.keypoints.copy()) for p in patches]
    config = AugmentConfig(occlusion=OcclusionConfig(pasted=1, joints=1, truncation=1))
    for seed in range(20):
        augment(patches[0], PREPROCESS, KEYPOINTS, config, np.random.default_rng(seed), donors=patches)
    for patch, arrays in zip(patches, before, strict=True):
        for now, then in zip((patch.pixels, patch.box_xyxy, patch.keypoints), arrays, strict=True):
            assert np.array_equal(now, then)


@pytest.mark.parametrize(
    "text",
    [
        '{"scale": 0.5}',
        '{"shift": -0.1}',
        '{"mirror": 2}',
        '{"occlusion": {"pasted": 1.5}}',
        '{"occlusion": {"shapes": -1}}',
        '{"occlusion": {"largest_truncation": 3}}',
        '{"occlusion": {"ramp": -0.5}}',
        '{"occlusion": {"colour": 1}}',
    ],
)
def test_settings_from_a_file_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=AugmentConfig)


def test_settings_survive_their_file() -> None:
    config = AugmentConfig(occlusion=OcclusionConfig(shapes=3.0, ramp=0))
    assert msgspec.json.decode(msgspec.json.encode(config), type=AugmentConfig) == config
    assert msgspec.convert(msgspec.to_builtins(config), AugmentConfig) == config
