"""Reading the file of `run --boxes`: who stands where in which photograph.

Three forms are understood: a JSON list of boxes (one photograph or every frame of a video; a list of such lists gives a
video one per frame), an object {file name: list of boxes}, and COCO annotations. Boxes are x1 y1 x2 y2 in pixels, those
of COCO annotations x y width height.

Invariant: what is returned are finite numbers, four per box; whether a box fits its frame is the estimator's question.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from edgepose.errors import AnnotationError

Box = tuple[float, float, float, float]
Boxes = list[Box]

_FORMS = "a list of boxes [[x1, y1, x2, y2], …], an object {file name: list of boxes}, or COCO annotations"


@dataclass(frozen=True, slots=True)
class BoxFile:
    """The boxes of one file.

    Attributes:
        source: The file.
        everywhere: Boxes of the one photograph, or of every frame; None where there is one list per name or frame.
        by_frame: One list per frame of a video.
        by_name: One list per photograph or video.
        image_ids: COCO's number of each photograph; None where the file is no COCO annotations.
    """

    source: Path
    everywhere: Boxes | None = None
    by_frame: list[Boxes] | None = None
    by_name: Mapping[str, Boxes] = field(default_factory=dict)
    image_ids: Mapping[str, int] | None = None

    def of(self, name: str, frame: int | None = None) -> Boxes:
        """Boxes of one photograph, or of one frame of a video.

        Args:
            name: File name, relative to the folder that is run over.
            frame: Number of the frame, from 0; None for a photograph.

        Raises:
            AnnotationError: The file says nothing of it.
        """
        if self.by_frame is not None:
            if frame is None or frame >= len(self.by_frame):
                found = f"{len(self.by_frame)} lists of boxes, one per frame"
                which = f"one for frame {frame} of {name}" if frame is not None else f"the boxes of {name} alone"
                raise AnnotationError(f"{self.source}", found=found, expected=which)
            return self.by_frame[frame]
        if self.everywhere is not None:
            return self.everywhere
        if name not in self.by_name:
            close = get_close_matches(name, self.by_name, n=1)
            fix = f"rename {close[0]!r}" if close else "add it, with [] where nobody is in it"
            raise AnnotationError(
                f"{self.source}", found=f"no boxes of {name}", expected="one list per photograph", fix=fix
            )
        return self.by_name[name]


def read_boxes(path: Path, *, several: bool) -> BoxFile:
    """Reads a file of boxes.

    Args:
        path: The JSON file.
        several: Whether more than one photograph is run over, so that a bare list would be ambiguous.

    Raises:
        AnnotationError: It is none of the three forms; names the entry.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as err:
        found = err.strerror or "an unreadable file"
        raise AnnotationError(str(path), found=found, expected="a file of boxes", fix="check the path") from err
    except ValueError as err:
        raise AnnotationError(str(path), found=f"text that is not JSON ({err})", expected=_FORMS) from err
    match document:
        case {"annotations": list(), "images": list()}:
            boxes = _coco(path, document)
            return BoxFile(path, by_name=boxes, image_ids={i["file_name"]: i["id"] for i in document["images"]})
        case dict():
            names = {name: _boxes(f"{path}: {name}", value) for name, value in document.items()}
            return BoxFile(path, by_name=names)
        case list() if several:
            found = "a list without file names"
            raise AnnotationError(str(path), found=found, expected="an object {file name: list of boxes}")
        case [[[*_], *_], *_] | [[], *_]:
            return BoxFile(path, by_frame=[_boxes(f"{path}: frame {i}", value) for i, value in enumerate(document)])
        case list():
            return BoxFile(path, everywhere=_boxes(str(path), document))
        case _:
            raise AnnotationError(str(path), found=f"a JSON {type(document).__name__}", expected=_FORMS)


def _coco(path: Path, document: dict[str, Any]) -> dict[str, Boxes]:
    """Boxes by file name; photographs without annotations get an empty list, crowds are nobody."""
    files: dict[Any, str] = {}
    for position, image in enumerate(document["images"]):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str) or "id" not in image:
            where = f"{path}: images[{position}]"
            raise AnnotationError(where, found=str(image)[:60], expected="an object with id and file_name")
        files[image["id"]] = image["file_name"]
    found: dict[str, Boxes] = {name: [] for name in files.values()}
    for position, annotation in enumerate(document["annotations"]):
        if not isinstance(annotation, dict):
            where = f"{path}: annotations[{position}]"
            raise AnnotationError(where, found=type(annotation).__name__, expected="an object")
        where = f"{path}: annotation {annotation.get('id', position)}"
        if annotation.get("iscrowd"):
            continue
        if annotation.get("image_id") not in files:
            image_id = repr(annotation.get("image_id"))
            raise AnnotationError(f"{where}: image_id", found=image_id, expected="the id of an entry in images")
        x, y, width, height = _box(f"{where}: bbox", annotation.get("bbox"))
        found[files[annotation["image_id"]]].append((x, y, x + width, y + height))
    return found


def _boxes(where: str, value: object) -> Boxes:
    if not isinstance(value, list):
        raise AnnotationError(
            where, found=f"a JSON {type(value).__name__}", expected="a list of boxes [x1, y1, x2, y2]"
        )
    if len(value) == 4 and not any(isinstance(entry, list) for entry in value):
        found = f"one box {value} instead of a list of boxes"
        raise AnnotationError(where, found=found, expected="[[x1, y1, x2, y2], …]", fix="put it into a list")
    return [_box(f"{where}: box {row}", entry) for row, entry in enumerate(value)]


def _box(where: str, value: object) -> Box:
    if not isinstance(value, list) or len(value) != 4:
        found = f"{len(value)} entries" if isinstance(value, list) else "nothing" if value is None else repr(value)[:60]
        raise AnnotationError(where, found=found, expected="4 numbers")
    for number in value:
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not math.isfinite(number):
            raise AnnotationError(where, found=repr(number), expected="finite numbers")
    x1, y1, x2, y2 = map(float, value)
    return x1, y1, x2, y2
