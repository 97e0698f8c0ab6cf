"""Which people are held out as dev, and telling sets that share photographs."""

from __future__ import annotations

import dataclasses
import json
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from edgepose.data.coco import Person, PoseDataset, dataset
from edgepose.data.splits import dev_ids, draw_dev_ids, image_digests, people_for, some_images, split_train
from edgepose.errors import CheckpointError, DataUnavailable, UsageError
from edgepose.spec import Keypoints
from tests.training.dots import KEYPOINTS, dots


def people(count: int, folder: Path = Path()) -> PoseDataset:
    persons = tuple(
        Person(folder / f"{i}.png", i, 1000 - i, np.array([0.0, 0, 9, 9]), np.ones((2, 3), np.float32))
        for i in range(count)
    )
    return PoseDataset(persons, Keypoints(("a", "b")), "no digest of a committed split", Path("train.json"))


def test_committed_ids_follow_the_rule_and_fit_the_file(real_data: Path) -> None:
    train = dataset(real_data / "lspet", "train")
    committed = json.loads((files("edgepose.data.splits") / "lspet.json").read_text())
    assert committed["train_sha256"] == train.digest
    assert dev_ids(train) == tuple(committed["annotation_ids"]) == draw_dev_ids(train)
    rest, dev = split_train(train)
    assert (len(train), len(dev), len(rest)) == (5867, 587, 5280)
    ids = [{p.annotation_id for p in part.persons} for part in (rest, dev)]
    assert not ids[0] & ids[1]
    assert ids[0] | ids[1] == {p.annotation_id for p in train.persons}


def test_committed_ids_win_over_the_rule(real_data: Path) -> None:
    train = dataset(real_data / "lspet", "train")
    smaller = train.sample(100, seed=1)  # another set: its digest has no committed ids
    assert dev_ids(smaller) == draw_dev_ids(smaller)
    assert len(dev_ids(smaller)) == 10
    assert set(dev_ids(smaller)) <= {p.annotation_id for p in smaller.persons}


def test_people_fit_the_network_or_are_refused(tmp_path: Path) -> None:
    whole = dots(tmp_path, "train", 20)
    rest, dev = people_for("dots", KEYPOINTS, tmp_path)
    assert (rest.digest, dev.digest) == tuple(part.digest for part in split_train(whole))
    with pytest.raises(CheckpointError, match=f"net: found a network for 2 keypoints, expected the 4 of {tmp_path}"):
        people_for("net", Keypoints(("a", "b")), tmp_path)
    with pytest.raises(DataUnavailable):
        people_for("dots", KEYPOINTS, tmp_path / "nowhere")


@pytest.mark.parametrize(("count", "held_out"), [(1, 1), (2, 1), (5, 1), (20, 2), (95, 10)])
def test_a_tenth_is_held_out_and_somebody_at_least(count: int, held_out: int) -> None:
    train = people(count)
    rest, dev = split_train(train)
    assert (len(rest), len(dev)) == (count - held_out, held_out)
    assert not {p.annotation_id for p in rest.persons} & {p.annotation_id for p in dev.persons}


def test_the_draw_does_not_depend_on_file_order() -> None:
    train = people(50)
    shuffled = PoseDataset(train.persons[::-1], train.keypoints, train.digest, train.source)
    assert draw_dev_ids(train) == draw_dev_ids(shuffled)
    assert draw_dev_ids(train) == tuple(sorted(draw_dev_ids(train)))


def test_photographs_are_known_by_content(tmp_path: Path) -> None:
    for name, content in (("0.png", b"a"), ("1.png", b"b"), ("2.png", b"a")):
        (tmp_path / name).write_bytes(content)
    digests = image_digests(people(3, tmp_path))
    assert len(digests) == 2
    assert set(digests.values()) >= {"1.png"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0.png").write_bytes(b"b")
    assert len(digests.keys() & image_digests(people(1, tmp_path / "other")).keys()) == 1


def test_some_images_bring_all_their_people_and_follow_the_seed() -> None:
    both = people(40)
    pairs = tuple(dataclasses.replace(p, image=Path(f"{i // 2}.png")) for i, p in enumerate(both.persons))
    crowd = dataclasses.replace(both, persons=pairs)
    chosen = some_images(crowd, 5, seed=1)
    assert len({person.image for person in chosen.persons}) == 5
    assert len(chosen) == 10
    assert chosen.digest == some_images(crowd, 5, seed=1).digest != some_images(crowd, 5, seed=2).digest
    with pytest.raises(UsageError, match="20 photographs to train on, expected at least 21"):
        some_images(crowd, 21, seed=0)
