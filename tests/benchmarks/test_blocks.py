"""The mean pose: the best prediction that does not look at the photograph."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.areas.blocks import mean_pose, placed
from edgepose.data.coco import Person, PoseDataset
from edgepose.spec import Keypoints, Preprocess

PREPROCESS = Preprocess(input_hw=(64, 64))


def people(*rows: tuple[tuple[float, float, float, float], list[tuple[float, float, float]]]) -> PoseDataset:
    persons = tuple(
        Person(Path("x.jpg"), number, number, np.array(box), np.array(points, np.float32))
        for number, (box, points) in enumerate(rows)
    )
    return PoseDataset(persons, Keypoints(("head", "foot")), "digest", Path("train.json"))


def test_mean_pose_is_placed_relative_to_each_crop() -> None:
    train = people(((0, 0, 100, 100), [(50, 25, 2), (50, 75, 2)]))
    # The same person at twice the size, elsewhere.
    val = people(((200, 100, 200, 200), [(0, 0, 2), (0, 0, 2)]))
    found = placed(mean_pose(train, PREPROCESS), val, PREPROCESS)
    np.testing.assert_allclose(found[0], [[300, 150], [300, 250]], atol=1e-3)


def test_narrow_box_is_widened_to_the_crop_before_its_pose_counts() -> None:
    train = people(((0, 0, 100, 100), [(0, 50, 2), (100, 50, 2)]))
    val = people(((100, 0, 20, 100), [(0, 0, 2), (0, 0, 2)]))
    found = placed(mean_pose(train, PREPROCESS), val, PREPROCESS)
    np.testing.assert_allclose(found[0, :, 0], [110 - 50, 110 + 50], atol=1e-3)


def test_unlabelled_joints_do_not_count() -> None:
    box = (0.0, 0.0, 100.0, 100.0)
    both = people((box, [(40, 20, 2), (50, 90, 2)]), (box, [(60, 20, 2), (0, 0, 0)]))
    found = placed(mean_pose(both, PREPROCESS), both, PREPROCESS)
    np.testing.assert_allclose(found[0], [[50, 20], [50, 90]], atol=1e-3)


def test_mean_pose_of_real_people_stands_upright(real_data: Path) -> None:
    from edgepose.data.coco import dataset

    train = dataset(real_data / "lspet", "val")
    pose = mean_pose(train, PREPROCESS)
    names = train.keypoints.names
    assert pose.shape == (14, 2)
    assert pose[names.index("head_top"), 1] < pose[names.index("left_ankle"), 1]
    assert (pose > 0).all()
    assert (pose < 64).all()
