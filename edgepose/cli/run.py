"""`edgepose run`: poses of the people in a photograph, a folder of photographs, or a video.

Invariant: the drawn pictures and the JSON appear only when the last frame was done; an error leaves neither.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from numpy.typing import NDArray

from edgepose.cli.boxes import BoxFile, read_boxes
from edgepose.cli.console import STDOUT, note, say, steps, write_json
from edgepose.cli.options import (
    AimFlag,
    BackendFlag,
    DeviceFlag,
    FlipTestFlag,
    JsonFlag,
    PrecisionFlag,
    ProviderFlag,
    StrictFlag,
    ThreadsFlag,
    check_outputs,
    checked_aim,
    checked_backend,
    checked_execution,
    checked_precision,
)
from edgepose.cli.pictures import Shot, Source, check_output_suffix, open_source, picture_sink, shots
from edgepose.errors import AnnotationError, ImageError, UsageError
from edgepose.estimator import EstimatorInfo, EstimatorOptions, PoseEstimator
from edgepose.pose.draw import draw
from edgepose.pose.metrics import oks_sigmas
from edgepose.pose.nms import oks_nms
from edgepose.pose.smoothing import SmoothingState, smooth_people
from edgepose.profiler.accuracy import AREA_OF_BOX
from edgepose.spec import Aim, Backend, Execution, Keypoints, OneStage, Poses, Precision

EXAMPLES = (
    "edgepose run kpe-s.bundle photo.jpg --out drawn.jpg",
    "edgepose run kpe-s.bundle photo.jpg --boxes boxes.json --json poses.json",
    "edgepose run kpe-s.bundle photos --boxes annotations.json --flip-test --oks-nms 0.9 --out drawn",
    "edgepose run kpe-s.bundle street.jpg --detector people.bundle --out drawn.jpg",
    "edgepose run kpe-s.bundle match.mp4 --backend openvino --threads 4 --smooth --out drawn.mp4",
)


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A photograph, a folder of photographs, or a video.")
    ],
    boxes: Annotated[
        Path | None,
        typer.Option(
            "--boxes",
            help="Where the people are: JSON [[x1, y1, x2, y2], …], {file name: such a list}, or COCO annotations. "
            "Default: one person fills the frame.",
        ),
    ] = None,
    detector: Annotated[
        Path | None,
        typer.Option("--detector", help="Bundle of a box detector or one-stage network that finds the people first."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Draw the poses: a picture, a folder or a video, as SOURCE is.")
    ] = None,
    json: JsonFlag = None,
    backend: BackendFlag = None,
    precision: PrecisionFlag = None,
    provider: ProviderFlag = None,
    device: DeviceFlag = None,
    strict: StrictFlag = False,
    threads: ThreadsFlag = None,
    aim: AimFlag = None,
    flip_test: FlipTestFlag = False,
    min_score: Annotated[
        float, typer.Option("--min-score", min=0.0, max=1.0, help="Joints below it are drawn hollow.")
    ] = 0.3,
    max_oks: Annotated[
        float | None,
        typer.Option(
            "--oks-nms", min=0.0, max=1.0, help="Where poses are more alike than this (OKS), keep the most confident."
        ),
    ] = None,
    smooth: Annotated[
        bool,
        typer.Option("--smooth", help="Steady the joints of a video (one-euro filter); boxes in one order throughout."),
    ] = False,
    convert: Annotated[
        bool, typer.Option("--convert", help="Take grey photographs and such with an alpha channel.")
    ] = False,
    allow_short: Annotated[
        bool, typer.Option("--allow-short", help="Take a video that ends before its header says.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder of pictures that is at --out.")] = False,
) -> int:
    """Find the poses of the people in SOURCE.

    Prints a line per photograph; --out draws, --json writes keypoints [x, y] in pixels of the source, scores and, where
    the network says them, each joint's visibility 0..1 and expected error in pixels.
    """
    check_outputs([out, json], [path for path in (source, bundle, boxes, detector) if path is not None])
    wanted, execution = checked_execution(checked_backend(backend), provider, device, strict=strict)
    opening = _Opening(wanted, threads, checked_precision(precision), execution, checked_aim(aim), strict)
    opened = open_source(source)
    if out is not None:
        check_output_suffix(out, opened.kind)
    _check_post_processing(opened, smooth=smooth, duplicates=max_oks is not None, people=(boxes, detector))
    people = read_boxes(boxes, several=opened.kind == "folder") if boxes is not None else None
    with (
        opening.open(bundle, flip_test=flip_test) as estimator,
        nullcontext() if detector is None else _detector(detector, estimator, opening) as finder,
    ):
        info = estimator.info()
        processed = _PostProcessing(estimator.spec.keypoints, max_oks, opened.fps if smooth else 0.0)
        frames = shots(opened, convert=convert, allow_short=allow_short)
        found = ((shot, processed(shot, _poses(estimator, shot, people, finder))) for shot in frames)
        rows = _written(found, opened, _Outputs(out, json, force, min_score), estimator.spec.keypoints)
    if people is None and finder is None and not isinstance(estimator.spec.decoder, OneStage):
        note("no --boxes and no --detector given: took each whole frame as one person")
    _say_how(info)
    if json != STDOUT:
        _summary(opened, rows, min_score)
    _say_where(out, json)
    return 0


@dataclass(frozen=True, slots=True)
class _Opening:
    """How engines are chosen and run, as the flags say."""

    backend: Backend | None
    threads: int | None
    precision: Precision | None
    execution: Execution | None
    aim: Aim | Literal["none"] | None
    strict: bool

    def open(self, bundle: Path, *, flip_test: bool = False) -> PoseEstimator:
        """The network of a bundle; shows progress where there is something to measure first."""
        wishes = self.backend, self.threads, self.precision
        with steps() as shown:
            options = EstimatorOptions(flip_test, self.execution, self.strict, shown.told)
            return PoseEstimator.from_bundle(bundle, *wishes, aim=self.aim, options=options)


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Where poses go.

    Attributes:
        out: Pictures, a folder of them or a video; None for none.
        json: The rows; None for nowhere.
        replace: Whether a folder that is at `out` goes.
        min_score: Joints below it are drawn hollow.
    """

    out: Path | None
    json: Path | None
    replace: bool
    min_score: float


def _written(
    found: Iterable[tuple[Shot, Poses]], source: Source, outputs: _Outputs, keypoints: Keypoints
) -> list[dict[str, Any]]:
    """Draws and writes poses as they are found, with progress; the rows."""
    rows: list[dict[str, Any]] = []
    what = f"running over {source.path.name}"
    with steps() as progress:
        with picture_sink(outputs.out, source, replace=outputs.replace) as sink:
            for shot, poses in found:
                sink(shot, draw(shot.frame, poses, keypoints, min_score=outputs.min_score))
                rows.append(_row(shot, poses))
                if len(rows) < source.total:
                    progress.told(what, len(rows), source.total)
            if outputs.json is not None:
                write_json(outputs.json, rows)
        if source.total > 1:
            progress.told(what, len(rows), len(rows))
    return rows


def _check_post_processing(
    source: Source, *, smooth: bool, duplicates: bool, people: tuple[Path | None, Path | None]
) -> None:
    """Refuses flags that would do nothing.

    Raises:
        UsageError: Names the flag.
    """
    boxes, detector = people
    if boxes is not None and detector is not None:
        raise UsageError("--detector", found="--boxes as well", expected="one of them", fix="leave one of them off")
    if smooth and source.kind != "video":
        raise UsageError("--smooth", found=f"{source.path}, which has no time", expected="a video", fix="leave it off")
    if duplicates and people == (None, None):
        found = "no --boxes, so one pose per frame"
        raise UsageError("--oks-nms", found=found, expected="several boxes", fix="give --boxes, or leave it off")


def _say_how(info: EstimatorInfo) -> None:
    """After the work, so that a failure is the one line that is said."""
    precision = f" {info.engine.precision}" if info.engine else ""
    threads = f"threads: {info.threads}" if info.threads else "all physical cores"
    flipped = ", flip test" if info.flip_test else ""
    why = f" ({info.selection.why})" if info.selection is not None else ""
    note(f"{info.name} on {info.backend}{precision}, {threads}{flipped}{why}")


def _say_where(*paths: Path | None) -> None:
    for path in paths:
        if path not in (None, STDOUT):
            note(f"wrote {path}")


def _detector(path: Path, estimator: PoseEstimator, opening: _Opening) -> PoseEstimator:
    """The network that finds people for another one.

    Raises:
        UsageError: It is shown one person at a time itself, or the other one needs nobody to find people for it.
    """
    if isinstance(estimator.spec.decoder, OneStage):
        found = f"{estimator.spec.name}, which finds people itself"
        raise UsageError("--detector", found=found, expected="a network that is shown one person", fix="leave it off")
    finder = opening.open(path)
    if not isinstance(finder.spec.decoder, OneStage):
        finder.close()
        found = f"{finder.spec.name}, which is shown one person at a time"
        raise UsageError("--detector", found=found, expected="a box detector or one-stage network")
    return finder


def _poses(estimator: PoseEstimator, shot: Shot, people: BoxFile | None, finder: PoseEstimator | None = None) -> Poses:
    where = shot.name if shot.number is None else f"{shot.name}: frame {shot.number}"
    try:
        if finder is not None:
            return estimator(shot.frame, _inside(finder(shot.frame).boxes))
        return estimator(shot.frame, people.of(shot.name, shot.number) if people is not None else None)
    except (AnnotationError, ImageError) as err:
        if err.where.startswith(("boxes", "frame")):
            text = f"{where}: {err.where}"
            raise type(err)(text, found=err.found, expected=err.expected, fix=err.fix) from err
        raise


def _inside(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Boxes that are left of those found when they were cut off at the frame's borders."""
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


@dataclass(slots=True)
class _PostProcessing:
    """What is done to the poses of a frame: duplicates go, then joints are smoothed over time.

    Attributes:
        keypoints: The network's keypoint set.
        oks_nms: Poses more alike than this are one person's; None keeps all.
        fps: Frames per second of the video to smooth; 0 for no smoothing.
        smoothing: What is remembered of the last frames.
    """

    keypoints: Keypoints
    oks_nms: float | None
    fps: float
    smoothing: SmoothingState = field(default_factory=SmoothingState)

    def __call__(self, shot: Shot, poses: Poses) -> Poses:
        rows = np.arange(len(poses))
        if self.oks_nms is not None:
            sides = (poses.boxes[:, 2:] - poses.boxes[:, :2]).astype(np.float64)
            areas_px2, sigmas = AREA_OF_BOX * sides.prod(axis=1), oks_sigmas(self.keypoints)
            rows = np.sort(oks_nms(poses.keypoints, poses.scores.mean(1), areas_px2, sigmas, threshold=self.oks_nms))
        points = poses.keypoints[rows]
        if self.fps and shot.number is not None:
            # Without a tracker a person is known by their place among the boxes.
            time_s = shot.number / self.fps
            points, self.smoothing = smooth_people(self.smoothing, rows.tolist(), points, time_s)
        visibility, errors_px = (None if v is None else v[rows] for v in (poses.visibility, poses.errors_px))
        return replace(
            poses, keypoints=points, scores=poses.scores[rows], boxes=poses.boxes[rows], visibility=visibility,
            errors_px=errors_px,
        )  # fmt: skip


def _row(shot: Shot, poses: Poses) -> dict[str, Any]:
    columns = {
        "keypoints": poses.keypoints,
        "scores": poses.scores,
        "visibility": poses.visibility,
        "errors_px": poses.errors_px,
        "box": poses.boxes,
    }
    said = {name: values for name, values in columns.items() if values is not None}
    people = [dict(zip(said, person, strict=True)) for person in zip(*said.values(), strict=True)]
    number = {} if shot.number is None else {"frame": shot.number}
    instead = {"degraded": True, "backend": poses.backend} if poses.degraded else {}
    return {"file_name": shot.name, **number, "poses": people, **instead}


def _summary(source: Source, rows: list[dict[str, Any]], min_score: float) -> None:
    if source.kind == "video":
        people = sum(len(row["poses"]) for row in rows)
        say(f"{source.path.name}: {len(rows)} frames, {people} poses")
        return
    for row in rows:
        scores = [score for pose in row["poses"] for score in pose["scores"]]
        count = len(row["poses"])
        who = f"{count} {'person' if count == 1 else 'people'}"
        sure = (
            f", {sum(bool(s >= min_score) for s in scores)} of {len(scores)} joints above {min_score:g}"
            if scores
            else ""
        )
        say(f"{row['file_name']}: {who}{sure}")
