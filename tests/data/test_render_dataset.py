"""`write_coco` and `python -m edgepose.data.render`: complete data sets or none at all."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgepose.data.coco import dataset
from edgepose.data.render import LSP14, RenderConfig, write_coco
from edgepose.data.render import dataset as writer
from edgepose.data.render.__main__ import main
from edgepose.errors import StorageError, UsageError

SMALL = RenderConfig(size_hw=(64, 64))


def test_the_reader_reads_what_was_written(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "val", 3, seed=1, config=SMALL)
    assert path == tmp_path / "val.json"
    people = dataset(tmp_path, "val")
    assert len(people) == 3
    assert people.keypoints == LSP14
    for person in people.persons:
        image = cv2.imread(str(person.image))
        assert image is not None
        assert image.shape == (64, 64, 3)
        assert set(np.unique(person.keypoints[:, 2])) <= {0.0, 1.0, 2.0}
    assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [f"val_{i:06d}.jpg" for i in (1, 2, 3)]


def test_the_category_is_that_of_the_photographs(tmp_path: Path, real_data: Path) -> None:
    path = write_coco(tmp_path, "val", 1, config=SMALL)
    ours = json.loads(path.read_text())
    theirs = json.loads((real_data / "lspet" / "val.json").read_text())
    assert ours["categories"] == theirs["categories"]
    assert set(ours) == set(theirs)
    assert set(ours["annotations"][0]) == set(theirs["annotations"][0]) - {"lr_swap_suspect"}
    assert set(ours["images"][0]) == set(theirs["images"][0])


def test_a_picture_does_not_depend_on_how_many_follow(tmp_path: Path) -> None:
    write_coco(tmp_path / "few", "train", 2, seed=7, config=SMALL)
    write_coco(tmp_path / "more", "train", 4, seed=7, config=SMALL)
    few, more = (tmp_path / name / "images" / "train_000002.jpg" for name in ("few", "more"))
    assert few.read_bytes() == more.read_bytes()


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = writer.atomic_write

    def fills_up(path: Path, content: bytes) -> None:
        if path.name == "val_000003.jpg":
            raise StorageError(str(path), found="no space left") from OSError(errno.ENOSPC, "No space left on device")
        original(path, content)

    monkeypatch.setattr(writer, "atomic_write", fills_up)
    with pytest.raises(StorageError):
        write_coco(tmp_path, "val", 4, config=SMALL)
    assert not (tmp_path / "val.json").exists()
    assert not list((tmp_path / "images").iterdir())


def test_interrupting_leaves_nothing_behind(tmp_path: Path) -> None:
    def stop(done: int, count: int) -> None:
        assert count == 4
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_coco(tmp_path, "val", 4, config=SMALL, progress=stop)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(("split", "count", "seed"), [("a/b", 1, 0), ("", 1, 0), ("val", 0, 0), ("val", 1, -1)])
def test_unusable_arguments_are_refused_before_anything_is_written(
    tmp_path: Path, split: str, count: int, seed: int
) -> None:
    with pytest.raises(UsageError):
        write_coco(tmp_path / "out", split, count, seed)
    assert not (tmp_path / "out").exists()


def test_the_command_writes_a_data_set_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([str(tmp_path), "--count", "2", "--seed", "3", "--split", "dev", "--size", "48"])
    said = capsys.readouterr()
    assert code == 0
    assert said.out.strip() == str(tmp_path / "dev.json")
    assert "rendered 2/2" in said.err
    assert json.loads((tmp_path / "dev.json").read_text())["images"][0]["width"] == 48


def test_the_command_explains_bad_input_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--size", "8"]) == 2
    assert main([str(tmp_path / "file.txt"), "--count", "0"]) == 2
    (tmp_path / "taken").write_text("a file")
    assert main([str(tmp_path / "taken"), "--count", "1", "--size", "48"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)
