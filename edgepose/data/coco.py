"""The COCO-keypoints reader, strict: every error names the file, the annotation and the field.

Invariant: a `PoseDataset` is complete and valid once built: each image file exists, each keypoint array has the
category's length, every number is finite.
"""

from __future__ import annotations

import hashlib
import json
import math
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
    except ValueError as err:
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
        self.annotations = self._list(document, "annotations")
        self.categories = {}
        for category in self._list(document, "categories"):
            if isinstance(category, dict) and category.get("keypoints"):
                self.categories[category.get("id")] = category
        if len(self.categories) != 1:
            raise AnnotationError(
                f"{path}: categories",
                found=f"{len(self.categories)} categories with keypoints",
                expected="exactly one",
                fix="split the file by category",
            )
        self.category_id, category = next(iter(self.categories.items()))
        self.keypoints = _keypoints(f"{path}: categories[{self.category_id}]", category)
        self.files = {}
        for image in self._list(document, "images"):
            if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
                raise AnnotationError(
                    f"{path}: images", found=f"{str(image)[:60]}", expected="an object with id and file_name"
                )
            self.files[image["id"]] = image["file_name"]
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

    def persons(self) -> Iterable[Person]:
        seen: set[int] = set()
        for position, annotation in enumerate(self.annotations):
            if not isinstance(annotation, dict) or not isinstance(annotation.get("id"), int):
                raise AnnotationError(
                    f"{self.path}: annotations[{position}]", found="no integer id", expected="an annotation with an id"
                )
            if annotation.get("category_id") != self.category_id or annotation.get("iscrowd"):
                continue
            where = f"{self.path}: annotation {annotation['id']}"
            if annotation["id"] in seen:
                raise AnnotationError(f"{where}: id", found="an id used twice", expected="unique annotation ids")
            seen.add(annotation["id"])
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
                annotation["id"],
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
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
                raise AnnotationError(
                    where, found=repr(number), expected="finite numbers", fix="correct or remove the annotation"
                )
        return np.array(value, np.float64)

    def _image(self, where: str, image_id: object) -> Path:
        if image_id not in self.files:
            raise AnnotationError(f"{where}: image_id", found=repr(image_id), expected="the id of an entry in images")
        name: str = self.files[image_id]
        path = self.folder / name
        if name not in self.present and not path.is_file():
            raise AnnotationError(
                f"{where}: image_id", found=f"no file {path}", expected="the photograph", fix="check the images folder"
            )
        return path


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
    sigmas = category.get("oks_sigmas") or (COCO17_SIGMAS if len(names) == len(COCO17_SIGMAS) else ())
    skeleton = [(a - 1, b - 1) for a, b in category.get("skeleton", [])]
    for field, indices in (("flip_pairs", pairs), ("skeleton", skeleton)):
        if any(not 0 <= i < len(names) for pair in indices for i in pair):
            raise AnnotationError(
                f"{where}: {field}",
                found="an index outside the keypoints",
                expected=f"indices of {len(names)} keypoints",
            )
    if sigmas and len(sigmas) != len(names):
        raise AnnotationError(f"{where}: oks_sigmas", found=f"{len(sigmas)} numbers", expected=f"{len(names)}")
    return Keypoints(tuple(names), tuple(skeleton), tuple((a, b) for a, b in pairs), tuple(float(s) for s in sigmas))


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
    if raw[:2] == b"\xff\xd8" and b"\xff\xd9" not in raw[-1024:]:
        raise ImageError(
            str(path), found="a truncated JPEG (no end marker)", expected="a whole image", fix="copy the file again"
        )
    frame = cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR) if raw else None
    if frame is None:
        raise ImageError(
            str(path),
            found=f"{len(raw)} bytes that do not decode",
            expected="a JPEG, PNG or other image",
            fix="check the file",
        )
    return np.asarray(frame, np.uint8)
