"""`edgepose run`: poses of the people in a photograph, a folder of photographs, a video, or before a camera.

Invariant: the drawn pictures and the files of poses appear only when the last frame was done; an error leaves none of
them. Ctrl-C ends a camera's run, which has no other end, as if its last frame had come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from edgepose.cli.boxes import read_boxes
from edgepose.cli.console import STDOUT, Steps, note, say, steps
from edgepose.cli.options import (
    AimFlag,
    BackendFlag,
    DeviceFlag,
    FlipTestFlag,
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
from edgepose.cli.pose_files import pose_sink
from edgepose.cli.run_frames import Finders, Following, found_in
from edgepose.errors import UsageError
from edgepose.estimator import EstimatorInfo, EstimatorOptions, PoseEstimator
from edgepose.pose.draw import draw
from edgepose.spec import Aim, Backend, Execution, Keypoints, OneStage, Poses, Precision
from edgepose.video.sinks import check_output_suffix, picture_sink
from edgepose.video.sources import Shot, Source, open_source, shots

EXAMPLES = (
    "edgepose run kpe-s.bundle photo.jpg --out drawn.jpg",
    "edgepose run kpe-s.bundle photo.jpg --boxes boxes.json --json poses.json",
    "edgepose run kpe-s.bundle photos --boxes annotations.json --flip-test --oks-nms 0.9 --coco-results results.json",
    "edgepose run kpe-s.bundle match.mp4 --detector people.bundle --track --smooth --out drawn.mp4 --json poses.jsonl",
    "edgepose run kpe-s.bundle 0 --track --smooth --seconds 30 --out me.mp4",
    "edgepose run kpe-s.bundle rtsp://camera/stream --detector people.bundle --track --json -",
)


BoxesFlag = Annotated[
    Path | None,
    typer.Option(
        "--boxes",
        help="Where the people are: JSON [[x1, y1, x2, y2], …], {file name: such a list}, or COCO annotations. "
        "Default: one person fills the frame.",
    ),
]
DetectorFlag = Annotated[
    Path | None,
    typer.Option("--detector", help="Bundle of a box detector or one-stage network that finds the people first."),
]
OutFlag = Annotated[
    Path | None, typer.Option("--out", help="Draw the poses: a picture, a folder or a video, as SOURCE is.")
]
PosesFlag = Annotated[
    Path | None,
    typer.Option(
        "--json",
        help="Write the poses: a JSON array, or a line per frame where the name ends in .jsonl (- for stdout, with "
        "lines while a camera runs).",
    ),
]
CocoFlag = Annotated[
    Path | None,
    typer.Option(
        "--coco-results",
        help="Write COCO keypoint results; image ids are those of the annotations in --boxes, else 0, 1, …",
    ),
]
MinScoreFlag = Annotated[float, typer.Option("--min-score", min=0.0, max=1.0, help="Joints below it are drawn hollow.")]
OksFlag = Annotated[
    float | None,
    typer.Option(
        "--oks-nms", min=0.0, max=1.0, help="Where poses are more alike than this (OKS), keep the most confident."
    ),
]
TrackFlag = Annotated[
    bool,
    typer.Option(
        "--track",
        help="Follow people through a video: each keeps a number, and is looked for where they were in the frame "
        "before; --detector then looks every tenth frame and where somebody got lost.",
    ),
]
SmoothFlag = Annotated[
    bool, typer.Option("--smooth", help="Steady the joints of everybody in a video (one-euro filter).")
]
EveryFrameFlag = Annotated[
    bool,
    typer.Option(
        "--every-frame", help="Of a camera take each frame in turn; default: the latest one, others are dropped."
    ),
]
SecondsFlag = Annotated[
    float | None, typer.Option("--seconds", min=0.1, help="Stop after this long (default: Ctrl-C, or the end).")
]
ConvertFlag = Annotated[bool, typer.Option("--convert", help="Take grey photographs and such with an alpha channel.")]
ShortFlag = Annotated[bool, typer.Option("--allow-short", help="Take a video that ends before its header says.")]
IsolatedFlag = Annotated[
    bool,
    typer.Option("--isolated", help="Run engines in processes of their own, replaced when they crash or hang."),
]
ForceFlag = Annotated[bool, typer.Option("--force", help="Replace a folder of pictures that is at --out.")]


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A photograph, a folder of photographs, a video, a camera (its number or /dev/video0), or a stream "
            "(rtsp://, http://).",
        ),
    ],
    boxes: BoxesFlag = None,
    detector: DetectorFlag = None,
    out: OutFlag = None,
    json: PosesFlag = None,
    coco_results: CocoFlag = None,
    backend: BackendFlag = None,
    precision: PrecisionFlag = None,
    provider: ProviderFlag = None,
    device: DeviceFlag = None,
    strict: StrictFlag = False,
    threads: ThreadsFlag = None,
    aim: AimFlag = None,
    isolated: IsolatedFlag = False,
    flip_test: FlipTestFlag = False,
    min_score: MinScoreFlag = 0.3,
    max_oks: OksFlag = None,
    track: TrackFlag = False,
    smooth: SmoothFlag = False,
    every_frame: EveryFrameFlag = False,
    seconds: SecondsFlag = None,
    convert: ConvertFlag = False,
    allow_short: ShortFlag = False,
    force: ForceFlag = False,
) -> int:
    """Find the poses of the people in SOURCE.

    Prints a line per photograph; --out draws, --json writes keypoints [x, y] in pixels of the source, scores and, where
    the network says them, each joint's visibility 0..1 and expected error in pixels.
    """
    inputs = [path for path in (Path(source), bundle, boxes, detector) if path is not None]
    check_outputs([out, json, coco_results], inputs)
    if json == coco_results == STDOUT:
        raise UsageError("--coco-results -", found="--json - as well", expected="one of them on stdout")
    wanted, execution = checked_execution(checked_backend(backend), provider, device, strict=strict)
    opening = _Opening(wanted, threads, checked_precision(precision), execution, checked_aim(aim), strict, isolated)
    opened = open_source(source, policy="every" if every_frame else "latest")
    with nullcontext() if opened.live is None else opened.live:
        if out is not None:
            check_output_suffix(out, opened.kind)
        following = Following(track, smooth, max_oks)
        _check_flags(opened, following, people=(boxes, detector), timed=(every_frame, seconds))
        people = read_boxes(boxes, several=opened.kind == "folder") if boxes is not None else None
        with (
            opening.open(bundle, flip_test=flip_test) as estimator,
            nullcontext() if detector is None else _detector(detector, estimator, opening) as finder,
        ):
            info = estimator.info()
            frames = _until(shots(opened, convert=convert, allow_short=allow_short), seconds)
            found = found_in(frames, opened, Finders(estimator, finder, people, following))
            files = _Files(out, json, coco_results, force, people.image_ids if people is not None else None)
            tally = _written(found, opened, files, estimator.spec.keypoints, min_score)
    if people is None and finder is None and not (track or isinstance(estimator.spec.decoder, OneStage)):
        note("no --boxes and no --detector given: took each whole frame as one person")
    _say_how(info)
    if STDOUT not in (json, coco_results):
        tally.say(opened)
    _say_where(out, json, coco_results)
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
    isolated: bool

    def open(self, bundle: Path, *, flip_test: bool = False) -> PoseEstimator:
        """The network of a bundle; shows progress where there is something to measure first."""
        wishes = self.backend, self.threads, self.precision
        with steps() as shown:
            options = EstimatorOptions(flip_test, self.execution, self.strict, self.isolated, shown.told)
            return PoseEstimator.from_bundle(bundle, *wishes, aim=self.aim, options=options)


def _until(frames: Iterator[Shot], seconds: float | None) -> Iterator[Shot]:
    """The frames up to a time."""
    for shot in frames:
        if seconds is not None and shot.time_s >= seconds:
            return
        yield shot


@dataclass(frozen=True, slots=True)
class _Files:
    """Where poses go.

    Attributes:
        out: Pictures, a folder of them or a video; None for none.
        json: The rows; None for nowhere.
        coco: COCO results; None for nowhere.
        replace: Whether a folder that is at `out` goes.
        image_ids: COCO's number of each photograph, where it is known.
    """

    out: Path | None
    json: Path | None
    coco: Path | None
    replace: bool
    image_ids: Mapping[str, int] | None


@dataclass(slots=True)
class _Tally:
    """What there was.

    Attributes:
        lines: A line per photograph.
        frames: How many.
        poses: How many.
    """

    lines: list[str]
    frames: int = 0
    poses: int = 0

    def add(self, shot: Shot, poses: Poses, min_score: float) -> None:
        """Counts a frame."""
        self.frames += 1
        self.poses += len(poses)
        if shot.number is not None:
            return
        who = f"{len(poses)} {'person' if len(poses) == 1 else 'people'}"
        above = f", {int((poses.scores >= min_score).sum())} of {poses.scores.size} joints above {min_score:g}"
        self.lines.append(f"{shot.name}: {who}{above if poses.scores.size else ''}")

    def say(self, source: Source) -> None:
        """Prints it."""
        for line in self.lines:
            say(line)
        if source.has_time:
            dropped = f", {source.live.dropped} dropped" if source.live is not None else ""
            say(f"{source.name}: {self.frames} frames{dropped}, {self.poses} poses")


def _written(
    found: Iterator[tuple[Shot, Poses]], source: Source, files: _Files, keypoints: Keypoints, min_score: float
) -> _Tally:
    """Draws and writes poses as they are found, with progress."""
    tally = _Tally([])
    with steps() as progress, closing(found):  # type: ignore[type-var]
        with (
            picture_sink(files.out, source, replace=files.replace) as put_picture,
            pose_sink(files.json, files.coco, endless=source.live is not None, image_ids=files.image_ids) as put_poses,
        ):
            try:
                for shot, poses in found:
                    put_picture(shot, draw(shot.frame, poses, keypoints, min_score=min_score))
                    put_poses(shot, poses)
                    tally.add(shot, poses, min_score)
                    _show(progress, source, tally.frames)
            except KeyboardInterrupt:
                if source.live is None:
                    raise
        if source.total > 1:
            progress.told(f"running over {source.name}", tally.frames, tally.frames)
    return tally


def _show(progress: Steps, source: Source, frames: int) -> None:
    what = f"running over {source.name}"
    if source.live is not None:
        progress.told(what, frames, float("inf"), f"{source.live.dropped} dropped; Ctrl-C ends it")
    elif frames < source.total:
        progress.told(what, frames, source.total)


def _check_flags(
    source: Source,
    following: Following,
    *,
    people: tuple[Path | None, Path | None],
    timed: tuple[bool, float | None],
) -> None:
    """Refuses flags that would do nothing.

    Raises:
        UsageError: Names the flag.
    """
    boxes, detector = people
    every_frame, seconds = timed
    off = "leave it off"
    if boxes is not None and detector is not None:
        raise UsageError("--detector", found="--boxes as well", expected="one of them", fix="leave one of them off")
    given = {"--smooth": following.smooth, "--track": following.track, "--seconds": seconds is not None}
    for flag, asked in given.items():
        if asked and not source.has_time:
            raise UsageError(flag, found=f"{source.name}, which has no time", expected="a video or a camera", fix=off)
    if every_frame and source.kind != "live":
        found = f"{source.name}, of which every frame is taken anyway"
        raise UsageError("--every-frame", found=found, expected="a camera or a stream", fix=off)
    if boxes is not None and source.kind == "live":
        found = "a camera, of which nobody knows where people will be"
        raise UsageError("--boxes", found=found, expected="a file", fix="use --detector")
    if following.max_oks is not None and people == (None, None) and not following.track:
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
