"""The files of poses that `run` writes: JSON, a line of JSON per frame, COCO results.

Invariant: a file appears when the last frame was written to it; standard output gets each line when it is known.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

from edgepose.cli.console import STDOUT, write_json
from edgepose.errors import AnnotationError
from edgepose.pose.results import result_rows
from edgepose.spec import Poses
from edgepose.storage import atomic_file, json_line
from edgepose.video.sources import Shot

PoseSink = Callable[[Shot, Poses], None]

LINES = (".jsonl", ".ndjson")
"""Suffixes of files with a line per frame."""


@contextmanager
def pose_sink(
    json: Path | None, coco: Path | None, *, endless: bool, image_ids: Mapping[str, int] | None = None
) -> Iterator[PoseSink]:
    """Where poses go.

    Args:
        json: All frames as one JSON array, or a line each where it ends in .jsonl; "-" is standard output.
        coco: COCO results, as pycocotools reads them.
        endless: Whether frames come until somebody stops them: standard output then gets lines.
        image_ids: COCO's number of each photograph; None counts frames from 0.

    Raises:
        StorageError: Disk full, read-only or no permission.
        AnnotationError: A photograph has no number.
    """
    rows: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    with ExitStack() as open_files:
        put = rows.append
        if json == STDOUT and endless:
            put = _line
        elif json is not None and json.suffix.lower() in LINES:
            file = open_files.enter_context(open_files.enter_context(atomic_file(json)).open("wb"))
            put = partial(_write_line, file)

        shown = 0

        def write(shot: Shot, poses: Poses) -> None:
            nonlocal shown
            if json is not None:
                put(_row(shot, poses))
            if coco is not None:
                number = _image_id(shot, shown, image_ids)
                results.extend(result_rows([number] * len(poses), poses.keypoints, poses.scores, poses.boxes))
            shown += 1

        yield write
    if json is not None and put == rows.append:
        write_json(json, rows)
    if coco is not None:
        write_json(coco, results)


def _write_line(file: IO[bytes], row: dict[str, Any]) -> None:
    file.write(json_line(row))


def _line(row: dict[str, Any]) -> None:
    sys.stdout.write(json_line(row).decode())
    sys.stdout.flush()


def _image_id(shot: Shot, shown: int, image_ids: Mapping[str, int] | None) -> int:
    if image_ids is None:
        return shown
    if shot.name not in image_ids:
        found = f"no image of the name {shot.name}"
        expected = "one per photograph in the annotations of --boxes"
        raise AnnotationError("--coco-results", found=found, expected=expected)
    return image_ids[shot.name]


def _row(shot: Shot, poses: Poses) -> dict[str, Any]:
    columns = {
        "id": poses.ids,
        "keypoints": poses.keypoints,
        "scores": poses.scores,
        "visibility": poses.visibility,
        "errors_px": poses.errors_px,
        "box": poses.boxes,
    }
    said = {name: values for name, values in columns.items() if values is not None}
    people = [dict(zip(said, person, strict=True)) for person in zip(*said.values(), strict=True)]
    when = {} if shot.number is None else {"frame": shot.number, "time_s": round(shot.time_s, 4)}
    instead = {"degraded": True, "backend": poses.backend} if poses.degraded else {}
    return {"file_name": shot.name, **when, "poses": people, **instead}
