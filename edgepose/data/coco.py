"""The COCO-keypoints reader, strict: every error names the file, the annotation and the field.

Invariant: a `PoseDataset` is complete and valid once built: each image file exists, each keypoint array has the
category's length, every number is finite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from edgepose.errors import AnnotationError, DataUnavailable, ImageError
from edgepose.spec import Keypoints


@dataclass(frozen=True, slots=True, eq=False)
class Person:
    """One labelled person.

    Attributes:
        image: Path of the photograph.
        image_id: COCO image id.
        annotation_id: COCO annotation id.
        bbox_xywh: (4,) float64, pixels of the source image.
        keypoints: (K, 3) float32: x, y in pixels of the source image and v (0 not labelled, 1 hidden, 2 visible).
    """

    image: Path
    image_id: int
    annotation_id: int
    bbox_xywh: NDArray[np.float64]
    keypoints: NDArray[np.float32]

    @property
    def box_xyxy(self) -> NDArray[np.float64]:
        """(4,) float64 xyxy, pixels of the source image."""
        x, y, w, h = self.bbox_xywh
        return np.array([x, y, x + w, y + h])


@dataclass(frozen=True, slots=True, eq=False)
class PoseDataset:
    """The labelled people of one annotation file.

    Attributes:
        persons: People with at least one labelled keypoint, in file order.
        keypoints: The category's keypoint set.
        digest: sha256 of the annotation file; after `subset` or `without`, of that digest and the annotation ids left.
        source: The annotation file.
    """

    persons: tuple[Person, ...]
    keypoints: Keypoints
    digest: str
    source: Path

    def __len__(self) -> int:
        return len(self.persons)

    def subset(self, annotation_ids: Iterable[int]) -> PoseDataset:
        """Only the people with these annotation ids."""
        wanted = set(annotation_ids)
        return self._select([p for p in self.persons if p.annotation_id in wanted])

    def without(self, annotation_ids: Iterable[int]) -> PoseDataset:
        """All people but those with these annotation ids."""
        unwanted = set(annotation_ids)
        return self._select([p for p in self.persons if p.annotation_id not in unwanted])

    def sample(self, count: int, seed: int) -> PoseDataset:
        """`count` people drawn without replacement (all of them where there are fewer), in file order."""
        if count >= len(self.persons):
            return self
        rows = np.sort(np.random.default_rng(seed).permutation(len(self.persons))[:count])
        return self._select([self.persons[i] for i in rows])

    def _select(self, persons: Sequence[Person]) -> PoseDataset:
        text = self.digest + ",".join(str(p.annotation_id) for p in persons)
        return replace(self, persons=tuple(persons), digest=hashlib.sha256(text.encode()).hexdigest())


def dataset(directory: Path | str, split: str) -> PoseDataset:
    """Read `directory`/`split`.json with its photographs in `directory`/images.

    Raises:
        DataUnavailable: The directory or its annotation file does not exist.
        AnnotationError: The file breaks the format.
    """
    directory = Path(directory)
    annotations = directory / f"{split}.json"
    if not annotations.is_file():
        there = sorted(p.stem for p in directory.glob("*.json")) if directory.is_dir() else []
        raise DataUnavailable(
            str(annotations),
            found="no such file" if directory.is_dir() else "no such folder",
            expected="COCO keypoint annotations, with the photographs in images/ beside them",
            fix=f"choose a split among {there}" if there else "give the folder that holds them",
        )
    return read_coco(annotations, directory / "images")


def read_coco(annotations: Path | str, images: Path | str) -> PoseDataset:
    """Read COCO keypoint JSON.

    Args:
        annotations: The JSON file.
        images: The folder in which `images[].file_name` lies.

    Raises:
        AnnotationError: Naming file, annotation id and field.
        DataUnavailable: The file does not exist.
    """
    path, folder = Path(annotations), Path(images)
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise DataUnavailable(
            str(path),
            found=err.strerror or "an unreadable file",
            expected="COCO keypoint annotations",
            fix="check the path",
        ) from err
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise AnnotationError(
            str(path), found=f"text that is not JSON ({err})", expected="COCO keypoint annotations"
        ) from err
    if not isinstance(document, dict):
        raise AnnotationError(
            str(path),
            found=f"a JSON {type(document).__name__}",
            expected="an object with images, annotations and categories",
        )
    reader = _Reader(path, folder, document)
    return PoseDataset(tuple(reader.persons()), reader.keypoints, hashlib.sha256(raw).hexdigest(), path)


class _Reader:
    def __init__(self, path: Path, folder: Path, document: dict[str, Any]) -> None:
        self.path, self.folder = path, folder
        self.annotations = self._by_id(document, "annotations")
        self.categories = self._by_id(document, "categories")
        with_keypoints = [(i, category) for i, category in self.categories.items() if category.get("keypoints")]
        if len(with_keypoints) != 1:
            raise AnnotationError(
                f"{path}: categories",
                found=f"{len(with_keypoints)} categories with keypoints",
                expected="exactly one",
                fix="split the file by category",
            )
        self.category_id, category = with_keypoints[0]
        self.keypoints = _keypoints(f"{path}: categories[{self.category_id}]", category)
        self.files: dict[int, str] = {}
        for image_id, image in self._by_id(document, "images").items():
            if not isinstance(image.get("file_name"), str):
                raise AnnotationError(
                    f"{path}: image {image_id}: file_name",
                    found=repr(image.get("file_name"))[:60],
                    expected="the name of a file",
                )
            self.files[image_id] = image["file_name"]
        try:
            self.present = {entry.name for entry in folder.iterdir()}
        except OSError as err:
            raise DataUnavailable(
                str(folder),
                found=err.strerror or "an unreadable folder",
                expected="the photographs",
                fix="check the path",
            ) from err

    def _list(self, document: dict[str, Any], field: str) -> list[Any]:
        value = document.get(field)
        if not isinstance(value, list):
            close = get_close_matches(field, document, n=1)
            hint = f"rename {close[0]!r}" if close and value is None else "see the COCO keypoint format"
            raise AnnotationError(
                f"{self.path}: {field}",
                found="nothing" if value is None else type(value).__name__,
                expected="a list",
                fix=hint,
            )
        return value

    def _by_id(self, document: dict[str, Any], field: str) -> dict[int, dict[str, Any]]:
        """The objects of a list by their id, in file order."""
        objects: dict[int, dict[str, Any]] = {}
        for position, value in enumerate(self._list(document, field)):
            if not isinstance(value, dict) or not _is_int(value.get("id")):
                raise AnnotationError(
                    f"{self.path}: {field}[{position}]", found=repr(value)[:60], expected="an object with an integer id"
                )
            if value["id"] in objects:
                raise AnnotationError(
                    f"{self.path}: {field.rstrip('s')} {value['id']}: id",
                    found="an id used twice",
                    expected=f"unique ids in {field}",
                )
            objects[value["id"]] = value
        return objects

    def persons(self) -> Iterable[Person]:
        for number, annotation in self.annotations.items():
            where = f"{self.path}: annotation {number}"
            category = annotation.get("category_id")
            if not _is_int(category) or category not in self.categories:
                raise AnnotationError(
                    f"{where}: category_id", found=repr(category)[:60], expected=f"one of {sorted(self.categories)}"
                )
            if category != self.category_id or annotation.get("iscrowd"):
                continue
            keypoints = self._keypoint_array(where, annotation.get("keypoints"))
            if not (keypoints[:, 2] > 0).any():
                continue
            bbox = self._numbers(f"{where}: bbox", annotation.get("bbox"), 4)
            if bbox[2] <= 0 or bbox[3] <= 0:
                raise AnnotationError(
                    f"{where}: bbox", found=f"width {bbox[2]:g} and height {bbox[3]:g}", expected="both above 0"
                )
            yield Person(
                self._image(where, annotation.get("image_id")),
                annotation["image_id"],
                number,
                bbox,
                keypoints.astype(np.float32),
            )

    def _keypoint_array(self, where: str, value: object) -> NDArray[np.float64]:
        keypoints = self._numbers(f"{where}: keypoints", value, 3 * self.keypoints.count).reshape(-1, 3)
        if not np.isin(keypoints[:, 2], (0, 1, 2)).all():
            bad = keypoints[~np.isin(keypoints[:, 2], (0, 1, 2)), 2][0]
            raise AnnotationError(
                f"{where}: keypoints",
                found=f"visibility {bad:g}",
                expected="0 (not labelled), 1 (hidden) or 2 (visible)",
            )
        return keypoints

    def _numbers(self, where: str, value: object, count: int) -> NDArray[np.float64]:
        if not isinstance(value, list) or len(value) != count:
            found = (
                f"{len(value)} numbers"
                if isinstance(value, list)
                else "nothing"
                if value is None
                else type(value).__name__
            )
            raise AnnotationError(
                where, found=found, expected=f"{count} numbers", fix="correct or remove the annotation"
            )
        for number in value:
            # The bound keeps float32 finite; it also refuses NaN, which is not smaller than anything.
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < _LARGEST:
                raise AnnotationError(
                    where, found=repr(number)[:60], expected="finite numbers", fix="correct or remove the annotation"
                )
        return np.array(value, np.float64)

    def _image(self, where: str, image_id: object) -> Path:
        if not isinstance(image_id, int) or isinstance(image_id, bool) or image_id not in self.files:
            raise AnnotationError(
                f"{where}: image_id", found=repr(image_id)[:60], expected="the id of an entry in images"
            )
        name = self.files[image_id]
        path = self.folder / name
        if name not in self.present and not path.is_file():
            raise AnnotationError(
                f"{where}: image_id", found=f"no file {path}", expected="the photograph", fix="check the images folder"
            )
        return path


_LARGEST = 1e9
"""No coordinate in pixels is as large."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _keypoints(where: str, category: dict[str, Any]) -> Keypoints:
    names = category["keypoints"]
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names) or len(set(names)) != len(names):
        raise AnnotationError(f"{where}: keypoints", found=str(names)[:60], expected="a list of distinct names")
    index = {name: i for i, name in enumerate(names)}
    pairs = category.get("flip_pairs")
    if pairs is None:
        pairs = [
            [i, index["right" + n[4:]]] for n, i in index.items() if n.startswith("left") and "right" + n[4:] in index
        ]
    flip_pairs = _index_pairs(f"{where}: flip_pairs", pairs, len(names), first=0)
    skeleton = _index_pairs(f"{where}: skeleton", category.get("skeleton") or [], len(names), first=1)
    swapped = [i for pair in flip_pairs for i in pair]
    if len(set(swapped)) != len(swapped):
        raise AnnotationError(f"{where}: flip_pairs", found="a keypoint in two places", expected="each at most once")
    sigmas = category.get("oks_sigmas") or (COCO17_SIGMAS if tuple(names) == COCO17_NAMES else ())
    if not isinstance(sigmas, (list, tuple)) or (sigmas and len(sigmas) != len(names)):
        found = f"{len(sigmas)} numbers" if isinstance(sigmas, list) else type(sigmas).__name__
        raise AnnotationError(f"{where}: oks_sigmas", found=found, expected=f"{len(names)} numbers")
    for sigma in sigmas:
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0 < sigma < _LARGEST:
            raise AnnotationError(f"{where}: oks_sigmas", found=repr(sigma)[:60], expected="numbers above 0")
    return Keypoints(tuple(names), skeleton, flip_pairs, tuple(float(s) for s in sigmas))


def _index_pairs(where: str, value: object, count: int, *, first: int) -> tuple[tuple[int, int], ...]:
    """Pairs of keypoint numbers that start at `first` in the file, as pairs of 0-based indices."""
    expected = f"pairs of numbers {first}..{count - 1 + first}"
    if not isinstance(value, list):
        raise AnnotationError(where, found=type(value).__name__, expected=expected)
    for pair in value:
        fits = isinstance(pair, list) and len(pair) == 2 and all(_is_int(i) and 0 <= i - first < count for i in pair)
        if not fits or pair[0] == pair[1]:
            raise AnnotationError(where, found=repr(pair)[:60], expected=expected)
    return tuple((a - first, b - first) for a, b in value)


COCO17_NAMES = (
    "nose",
    *(f"{side}_{part}" for part in ("eye", "ear", "shoulder", "elbow", "wrist") for side in ("left", "right")),
    *(f"{side}_{part}" for part in ("hip", "knee", "ankle") for side in ("left", "right")),
)


COCO17_SIGMAS = (
    0.026,
    0.025,
    0.025,
    0.035,
    0.035,
    0.079,
    0.079,
    0.072,
    0.072,
    0.062,
    0.062,
    0.107,
    0.107,
    0.087,
    0.087,
    0.089,
    0.089,
)
"""COCO's own keypoint sigmas (cocodataset.org, keypoint evaluation), for files that do not carry any."""


def read_image(path: Path | str) -> NDArray[np.uint8]:
    """Decode a photograph.

    Returns:
        (H, W, 3) uint8 BGR; grey images are repeated over three channels, alpha is dropped.

    Raises:
        ImageError: The file is missing, truncated or not an image.
    """
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as err:
        raise ImageError(
            str(path), found=err.strerror or "an unreadable file", expected="an image file", fix="check the path"
        ) from err
    if raw[:2] == b"\xff\xd8" and not _jpeg_ends(raw):
        raise ImageError(
            str(path), found="a truncated JPEG (no end marker)", expected="a whole image", fix="copy the file again"
        )
    try:
        frame = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR) if raw else None
    except cv2.error as err:  # a header that asks for more pixels than OpenCV decodes
        raise ImageError(
            str(path), found=f"an image that OpenCV refuses ({err})", expected="an ordinary image", fix="check the file"
        ) from err
    if frame is None:
        raise ImageError(
            str(path),
            found=f"{len(raw)} bytes that do not decode",
            expected="a JPEG, PNG or other image",
            fix="check the file",
        )
    return np.asarray(frame, np.uint8)


def _jpeg_ends(raw: bytes) -> bool:
    """Whether the entropy-coded data of a JPEG are followed by an end marker.

    Decoders fill what is missing with grey. Thumbnails in the header have end markers of their own, and phones append
    films behind the photograph's, so neither the first nor the last marker in the file tells.
    """
    position = 2
    while raw[position : position + 1] == b"\xff" and position + 4 <= len(raw):
        marker = raw[position + 1]
        if marker == 0xDA:  # start of scan: behind it 0xff is always followed by 0 unless it starts a marker
            return raw.find(b"\xff\xd9", position) >= 0
        # 0xff may be repeated as padding; every other marker before the scan carries its length.
        position += 1 if marker == 0xFF else 2 + int.from_bytes(raw[position + 2 : position + 4], "big")
    return False
