"""The COCO reader: real files, every way in which a file can be wrong, and photographs that cannot be decoded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from edgepose.data.coco import COCO17_SIGMAS, dataset, read_coco, read_image
from edgepose.errors import AnnotationError, DataUnavailable, ImageError

Document = dict[str, Any]


def document() -> Document:
    """Two people on two photographs, three keypoints each."""
    return {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}],
        "categories": [
            {
                "id": 1,
                "name": "person",
                "keypoints": ["nose", "left_eye", "right_eye"],
                "skeleton": [[1, 2], [1, 3]],
                "oks_sigmas": [0.1, 0.2, 0.3],
            }
        ],
        "annotations": [
            {
                "id": 41,
                "image_id": 7,
                "category_id": 1,
                "bbox": [1, 2.5, 30, 20],
                "keypoints": [3, 4, 2, 5.5, 6, 1, 0, 0, 0],
            },
            {"id": 42, "image_id": 8, "category_id": 1, "bbox": [0, 0, 9, 9], "keypoints": [1, 1, 2, 2, 2, 2, 3, 3, 2]},
        ],
    }


def write(folder: Path, content: Document | str | bytes) -> Path:
    """DIR/val.json with `content`, and the photographs."""
    (folder / "images").mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(folder / "images" / name), np.full((40, 50, 3), 90, np.uint8))
    text = json.dumps(content) if isinstance(content, dict) else content
    (folder / "val.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / "val.json"


def test_reads_people_and_keypoints(tmp_path: Path) -> None:
    write(tmp_path, document())
    people = dataset(tmp_path, "val")
    first, second = people.persons
    assert first.image == tmp_path / "images" / "a.png"
    assert (first.image_id, first.annotation_id, second.image_id, second.annotation_id) == (7, 41, 8, 42)
    assert first.bbox_xywh.tolist() == [1, 2.5, 30, 20]
    assert first.box_xyxy.tolist() == [1, 2.5, 31, 22.5]
    assert first.keypoints.dtype == np.float32
    assert first.keypoints.tolist() == [[3, 4, 2], [5.5, 6, 1], [0, 0, 0]]
    assert people.keypoints.names == ("nose", "left_eye", "right_eye")
    assert people.keypoints.skeleton == ((0, 1), (0, 2))  # the file counts from 1
    assert people.keypoints.flip_pairs == ((1, 2),)  # found by name
    assert people.keypoints.sigmas == (0.1, 0.2, 0.3)


def test_crowds_other_categories_and_unlabelled_people_are_left_out(tmp_path: Path) -> None:
    content = document()
    content["categories"].append({"id": 2, "name": "dog"})
    template = content["annotations"][0]
    content["annotations"] += [
        template | {"id": 43, "iscrowd": 1, "keypoints": "none"},
        template | {"id": 44, "category_id": 2, "keypoints": None},
        template | {"id": 45, "keypoints": [0] * 9, "bbox": [0, 0, 0, 0]},
    ]
    assert [p.annotation_id for p in read_coco(write(tmp_path, content), tmp_path / "images").persons] == [41, 42]


def test_flip_pairs_of_the_file_win(tmp_path: Path) -> None:
    content = document()
    content["categories"][0]["flip_pairs"] = []
    assert dataset(write(tmp_path, content).parent, "val").keypoints.flip_pairs == ()


def test_subsets_have_digests_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, document())
    people = dataset(tmp_path, "val")
    one, other = people.subset([41]), people.without([41])
    assert [p.annotation_id for p in one.persons] == [41]
    assert [p.annotation_id for p in other.persons] == [42]
    assert len({people.digest, one.digest, other.digest}) == 3
    assert one.digest == people.without([42]).digest
    assert people.sample(1, seed=3).digest == people.sample(1, seed=3).digest
    assert people.sample(5, seed=3) is people
    assert {people.sample(1, seed=s).persons[0].annotation_id for s in range(20)} == {41, 42}


def _first(content: Document) -> Document:
    found: Document = content["annotations"][0]
    return found


def _set(field: str, value: object) -> Callable[[Document], None]:
    return lambda content: _first(content).__setitem__(field, value)


def _category(field: str, value: object) -> Callable[[Document], None]:
    return lambda content: content["categories"][0].__setitem__(field, value)


def _keypoint(position: int, value: object) -> Callable[[Document], None]:
    return lambda content: _first(content)["keypoints"].__setitem__(position, value)


BROKEN: dict[str, tuple[Callable[[Document], None], tuple[str, ...]]] = {
    "too few keypoints": (_set("keypoints", [1, 2, 2]), ("annotation 41: keypoints", "3 numbers", "9 numbers")),
    "too many keypoints": (_set("keypoints", [1] * 12), ("annotation 41: keypoints", "12 numbers", "9 numbers")),
    "no keypoints": (lambda c: _first(c).pop("keypoints"), ("annotation 41: keypoints", "nothing")),
    "keypoints that are no list": (_set("keypoints", {"x": 1}), ("annotation 41: keypoints", "dict")),
    "NaN": (_keypoint(1, float("nan")), ("annotation 41: keypoints", "nan", "finite")),
    "infinity": (_keypoint(0, float("inf")), ("annotation 41: keypoints", "inf", "finite")),
    "an integer of 400 digits": (_keypoint(0, 10**400), ("annotation 41: keypoints", "finite")),
    "beyond float32": (_keypoint(0, 1e39), ("annotation 41: keypoints", "1e+39", "finite")),
    "a string": (_keypoint(3, "5.5"), ("annotation 41: keypoints", "'5.5'", "finite numbers")),
    "a null": (_keypoint(3, None), ("annotation 41: keypoints", "None")),
    "a bool": (_keypoint(2, True), ("annotation 41: keypoints", "True")),
    "visibility 3": (_keypoint(2, 3), ("annotation 41: keypoints", "visibility 3", "0 (not labelled)")),
    "no bbox": (lambda c: _first(c).pop("bbox"), ("annotation 41: bbox", "nothing", "4 numbers")),
    "three bbox numbers": (_set("bbox", [1, 2, 3]), ("annotation 41: bbox", "3 numbers")),
    "NaN in bbox": (_set("bbox", [1, 2, float("nan"), 3]), ("annotation 41: bbox", "nan")),
    "bbox of no width": (_set("bbox", [1, 2, 0, 5]), ("annotation 41: bbox", "width 0", "above 0")),
    "bbox of negative height": (_set("bbox", [1, 2, 5, -1]), ("annotation 41: bbox", "height -1")),
    "unknown image": (_set("image_id", 99), ("annotation 41: image_id", "99")),
    "image id that is a list": (_set("image_id", [7]), ("annotation 41: image_id", "[7]")),
    "image id that is a float": (_set("image_id", 7.0), ("annotation 41: image_id", "7.0")),
    "no image id": (lambda c: _first(c).pop("image_id"), ("annotation 41: image_id", "None")),
    "no category id": (lambda c: _first(c).pop("category_id"), ("annotation 41: category_id", "None", "[1]")),
    "unknown category": (_set("category_id", 5), ("annotation 41: category_id", "5", "[1]")),
    "duplicate annotation id": (_set("id", 42), ("annotation 42: id", "twice")),
    "annotation id that is a string": (_set("id", "41"), ("annotations[0]", "integer id")),
    "annotation id that is a bool": (_set("id", True), ("annotations[0]", "integer id")),
    "no annotation id": (lambda c: c["annotations"][1].pop("id"), ("annotations[1]", "integer id")),
    "annotation that is a list": (lambda c: c["annotations"].append([1]), ("annotations[2]", "[1]")),
    "duplicate image id": (lambda c: c["images"][1].update(id=7), ("image 7: id", "twice")),
    "image without id": (lambda c: c["images"][1].pop("id"), ("images[1]", "integer id")),
    "image without name": (lambda c: c["images"][0].pop("file_name"), ("image 7: file_name", "None")),
    "missing photograph": (lambda c: c["images"][0].update(file_name="x.png"), ("annotation 41: image_id", "x.png")),
    "two categories with keypoints": (
        lambda c: c["categories"].append(c["categories"][0] | {"id": 2}),
        ("categories", "2 categories with keypoints", "exactly one"),
    ),
    "no category with keypoints": (lambda c: c["categories"][0].pop("keypoints"), ("categories", "0 categories")),
    "category id that is a list": (_category("id", [1]), ("categories[0]", "integer id")),
    "keypoint names that repeat": (_category("keypoints", ["a", "a", "b"]), ("categories[1]: keypoints", "distinct")),
    "keypoint names that are numbers": (_category("keypoints", [1, 2, 3]), ("categories[1]: keypoints",)),
    "skeleton counted from 0": (_category("skeleton", [[0, 1]]), ("categories[1]: skeleton", "[0, 1]", "1..3")),
    "skeleton of triples": (_category("skeleton", [[1, 2, 3]]), ("categories[1]: skeleton", "pairs")),
    "skeleton that is text": (_category("skeleton", "1-2"), ("categories[1]: skeleton", "str")),
    "flip pair outside": (_category("flip_pairs", [[1, 3]]), ("categories[1]: flip_pairs", "[1, 3]", "0..2")),
    "flip pair with itself": (_category("flip_pairs", [[1, 1]]), ("categories[1]: flip_pairs",)),
    "flip pairs that overlap": (_category("flip_pairs", [[0, 1], [1, 2]]), ("categories[1]: flip_pairs", "two places")),
    "too few sigmas": (_category("oks_sigmas", [0.1]), ("categories[1]: oks_sigmas", "1 numbers", "3")),
    "sigmas that are text": (_category("oks_sigmas", ["a", "b", "c"]), ("categories[1]: oks_sigmas", "'a'")),
    "no annotations": (lambda c: c.pop("annotations"), ("annotations", "nothing")),
    "misspelt annotations": (
        lambda c: c.update(anotations=c.pop("annotations")),
        ("annotations", "rename 'anotations'"),
    ),
    "images that are an object": (lambda c: c.update(images={"7": "a.png"}), ("images", "dict")),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_refused_by_file_annotation_and_field(case: str, tmp_path: Path) -> None:
    change, fragments = BROKEN[case]
    content = document()
    change(content)
    path = write(tmp_path, content)
    with pytest.raises(AnnotationError) as caught:
        read_coco(path, tmp_path / "images")
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    assert all(fragment in text for fragment in fragments), text
    assert len(text) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        ("{not json", "not JSON"),
        ("", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1, 2]", "a JSON list"),
        ("null", "a JSON NoneType"),
    ],
)
def test_text_that_is_no_annotation_file(content: str | bytes, fragment: str, tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match=fragment):
        read_coco(write(tmp_path, content), tmp_path / "images")


def test_absent_data_says_what_there_is(tmp_path: Path) -> None:
    write(tmp_path, document())
    with pytest.raises(DataUnavailable, match=r"test\.json.*choose a split among \['val'\]"):
        dataset(tmp_path, "test")
    with pytest.raises(DataUnavailable, match="no such folder"):
        dataset(tmp_path / "nowhere", "val")
    with pytest.raises(DataUnavailable, match="No such file"):
        read_coco(tmp_path / "x.json", tmp_path / "images")
    with pytest.raises(DataUnavailable, match="photos"):
        read_coco(tmp_path / "val.json", tmp_path / "photos")


# Photographs


def _encoded(extension: str, pixels: np.ndarray) -> bytes:
    return cv2.imencode(extension, pixels)[1].tobytes()


@pytest.fixture
def photo() -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


@pytest.mark.parametrize("extension", [".png", ".bmp", ".jpg", ".webp"])
def test_reads_what_was_written(extension: str, tmp_path: Path, photo: np.ndarray) -> None:
    (tmp_path / "x").write_bytes(_encoded(extension, photo))
    frame = read_image(tmp_path / "x")
    assert frame.shape == photo.shape
    assert frame.dtype == np.uint8
    assert np.abs(frame.astype(int) - photo).mean() < 3


def test_grey_is_repeated_alpha_dropped_and_16_bits_halved(tmp_path: Path, photo: np.ndarray) -> None:
    grey = photo[..., 0]
    for name, pixels, expected in [
        ("grey.png", grey, np.repeat(grey[..., None], 3, axis=2)),
        ("alpha.png", np.dstack([photo, grey]), photo),
        ("deep.png", photo.astype(np.uint16) * 257, photo),
    ]:
        (tmp_path / name).write_bytes(_encoded(".png", pixels))
        assert np.array_equal(read_image(tmp_path / name), expected), name


@pytest.mark.parametrize("share", [0.98, 0.5, 0.1, 0.02])
@pytest.mark.parametrize("extension", [".jpg", ".png", ".webp"])
def test_truncated_photographs_are_refused(extension: str, share: float, tmp_path: Path, photo: np.ndarray) -> None:
    raw = _encoded(extension, photo)
    (tmp_path / "cut").write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(ImageError, match="cut"):
        read_image(tmp_path / "cut")


def test_a_jpeg_is_whole_or_not_whatever_its_thumbnail_and_its_trailer(tmp_path: Path, photo: np.ndarray) -> None:
    raw, thumbnail = _encoded(".jpg", photo), _encoded(".jpg", photo[::4, ::4])
    segment = b"\xff\xe2" + struct.pack(">H", len(thumbnail) + 2) + thumbnail
    with_thumbnail = raw[:2] + segment + raw[2:]
    (tmp_path / "whole.jpg").write_bytes(with_thumbnail + b"\0" * 5000)  # phones append films
    assert np.array_equal(read_image(tmp_path / "whole.jpg"), cv2.imdecode(np.frombuffer(raw, np.uint8), 1))
    (tmp_path / "cut.jpg").write_bytes(with_thumbnail[:-300])
    with pytest.raises(ImageError, match="truncated JPEG"):
        read_image(tmp_path / "cut.jpg")


def test_what_is_no_photograph(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    for name in ("empty.jpg", "text.png"):
        with pytest.raises(ImageError, match=rf"{name}.*do not decode"):
            read_image(tmp_path / name)
    with pytest.raises(ImageError, match="No such file"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match="directory"):
        read_image(tmp_path)


def test_a_header_that_asks_for_too_much_memory(tmp_path: Path) -> None:
    header = b"BM" + struct.pack("<IHHI", 60, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, 60000, 60000, 1, 24, *[0] * 6)
    (tmp_path / "bomb.bmp").write_bytes(header + b"\0" * 6)
    with pytest.raises(ImageError, match="bomb"):
        read_image(tmp_path / "bomb.bmp")


# Real data


def test_reads_lspet(real_data: Path) -> None:
    people = dataset(real_data / "lspet", "val")
    assert len(people) == 733
    assert people.keypoints.count == 14
    assert people.keypoints.flip_pairs == ((0, 5), (1, 4), (2, 3), (6, 11), (7, 10), (8, 9))
    names = people.keypoints.names
    assert all(
        names[a].removeprefix("right_") == names[b].removeprefix("left_") for a, b in people.keypoints.flip_pairs
    )
    assert ("neck", "head_top") in {(names[a], names[b]) for a, b in people.keypoints.skeleton}
    assert len(people.keypoints.sigmas) == 14
    frame = read_image(people.persons[0].image)
    x, y = people.persons[0].keypoints[:, :2].T
    assert ((x >= 0) & (x < frame.shape[1]) & (y >= 0) & (y < frame.shape[0])).all()


def test_reads_coco17(real_data: Path) -> None:
    people = dataset(real_data / "coco17", "train")
    assert len(people) == 139
    assert people.keypoints.sigmas == COCO17_SIGMAS
    names = people.keypoints.names
    assert len(people.keypoints.flip_pairs) == 8
    assert all(names[a].replace("left", "right") == names[b] for a, b in people.keypoints.flip_pairs)
    visibility = np.stack([p.keypoints[:, 2] for p in people.persons])
    assert (visibility == 1).sum() == 177
