"""Writes rendered people as a COCO keypoint data set: DIR/<split>.json and DIR/images/<split>_000001.jpg and so on.

Invariant: the JSON is written last, so a split whose JSON exists is complete; picture i depends on (seed, i, config)
only, not on how many are rendered.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgepose.data.render.person import RenderConfig, RenderedPerson, render_person
from edgepose.data.render.skeleton import LSP14
from edgepose.errors import UsageError
from edgepose.storage import atomic_write, storage_faults_at

# Share of its box that a person covers; LSPET's conversion uses the same for COCO's `area`.
_AREA_SHARE = 0.53
_JPEG_QUALITY = 92


def write_coco(
    directory: Path | str,
    split: str,
    count: int,
    seed: int = 0,
    config: RenderConfig | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Renders people into a data set that is laid out like LSPET here, with visibility 0, 1 and 2.

    An older split of the same name is replaced. When anything goes wrong, the pictures of this call are removed.

    Args:
        directory: The data set; made if it does not exist.
        split: Name of the JSON and prefix of the pictures ("val").
        count: Number of pictures, one person each.
        seed: Not negative.
        config: What to render.
        progress: Called with (pictures done, count) after each.

    Returns:
        Path of the JSON.

    Raises:
        UsageError: A split that is no file name, a count below 1 or a negative seed.
        StorageError: Disk full, read-only or no permission.
    """
    _check(split, count, seed)
    config = config or RenderConfig()
    target = Path(directory) / f"{split}.json"
    images = Path(directory) / "images"
    written: list[Path] = []
    # A directory that is a file is for the first write to complain about.
    with storage_faults_at(target), contextlib.suppress(NotADirectoryError):
        target.unlink(missing_ok=True)
    try:
        records: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number in range(1, count + 1):
            person = render_person(np.random.default_rng([seed, number]), config)
            path = images / f"{split}_{number:06d}.jpg"
            written.append(path)
            atomic_write(path, _jpeg(person))
            records.append(_image_record(number, path.name, config.size_hw))
            annotations.append(_annotation(number, person))
            if progress is not None:
                progress(number, count)
        atomic_write(target, json.dumps(_document(records, annotations, seed), separators=(",", ":")).encode())
    except BaseException:
        _remove(written)
        raise
    return target


def _check(split: str, count: int, seed: int) -> None:
    if not split or Path(split).name != split or split.startswith("."):
        raise UsageError("split", found=repr(split), expected="a plain name", fix="use for example 'val'")
    if count < 1:
        raise UsageError("count", found=str(count), expected="at least 1")
    if seed < 0:
        raise UsageError("seed", found=str(seed), expected="0 or more")


def _jpeg(person: RenderedPerson) -> bytes:
    _, data = cv2.imencode(".jpg", person.image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return data.tobytes()


def _remove(paths: list[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # the error that brought us here matters more
            path.unlink(missing_ok=True)


def _image_record(number: int, name: str, size_hw: tuple[int, int]) -> dict[str, Any]:
    return {"id": number, "file_name": name, "height": size_hw[0], "width": size_hw[1]}


def _annotation(number: int, person: RenderedPerson) -> dict[str, Any]:
    box = [round(float(value), 2) for value in person.bbox_xywh]
    flat: list[float | int] = []
    for x, y, v in person.keypoints:
        flat += [round(float(x), 2), round(float(y), 2), int(v)]
    return {
        "id": number,
        "image_id": number,
        "category_id": 1,
        "iscrowd": 0,
        "bbox": box,
        "area": round(_AREA_SHARE * box[2] * box[3], 2),
        "num_keypoints": int((person.keypoints[:, 2] > 0).sum()),
        "keypoints": flat,
    }


def _document(records: list[dict[str, Any]], annotations: list[dict[str, Any]], seed: int) -> dict[str, Any]:
    return {
        "info": {
            "description": "Rendered people with exact keypoints",
            "source": f"edgepose.data.render, seed {seed}",
            "notes": "visibility: 2 = visible, 1 = hidden by the own body or an occluder, 0 = outside the picture. "
            "bbox = extent of labelled joints padded by 10% of the larger side on each side, clipped to the image.",
        },
        "licenses": [],
        "images": records,
        "annotations": annotations,
        "categories": [
            {
                "id": 1,
                "name": "person",
                "supercategory": "person",
                "keypoints": list(LSP14.names),
                "skeleton": [[first + 1, second + 1] for first, second in LSP14.skeleton],
                "flip_pairs": [list(pair) for pair in LSP14.flip_pairs],
                "oks_sigmas": list(LSP14.sigmas),
            }
        ],
    }
