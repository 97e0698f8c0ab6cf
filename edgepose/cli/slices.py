"""The table behind `edgepose eval --slices`: which pictures it is measured on, how it is printed, what is kept.

Invariant: what is printed comes from records alone, which `--records` keeps whole; the rendered people are the same for
everybody.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from edgepose.cli.console import STDOUT, Steps, note, show_table
from edgepose.data.coco import PoseDataset, dataset, read_image
from edgepose.data.corrupt import CORRUPTIONS, Corrupted, Occluded, corrupt
from edgepose.data.render import LSP14, RenderConfig, write_coco
from edgepose.errors import SpecError, UsageError
from edgepose.estimator import PoseEstimator
from edgepose.host import cache_directory
from edgepose.pose.preprocess import crop_transforms
from edgepose.profiler.slices import (
    Joints,
    SliceRecord,
    intervals,
    lenders_of,
    measure_slices,
    npz_from_slices,
    paired_difference,
    person_sums,
    require_comparable,
    shown_metrics,
    slices_from_npz,
    together,
    visibility_quality,
)
from edgepose.spec import Keypoints, Preprocess
from edgepose.stats import Interval
from edgepose.storage import atomic_directory, atomic_write
from edgepose.video.sinks import encode

SlicesFlag = Annotated[
    bool, typer.Option("--slices", help="The same people occluded, cut off, in bad light …, with 95 % bounds.")
]
RenderedFlag = Annotated[
    Path | None,
    typer.Option("--rendered", help="With --slices: folder of rendered people (val.json), instead of making some."),
]
PeopleFlag = Annotated[int | None, typer.Option("--people", min=1, help="With --slices: a random sample of so many.")]
DrawsFlag = Annotated[
    int | None, typer.Option("--draws", min=1, help="With --slices: occluded and cut pictures per person. Default: 1.")
]
PicturesFlag = Annotated[
    Path | None, typer.Option("--pictures", help="With --slices: write a sheet of what the slices look like here.")
]
RecordsFlag = Annotated[
    Path | None, typer.Option("--records", help="With --slices: keep every error of every person in this .npz file.")
]
AgainstFlag = Annotated[
    Path | None,
    typer.Option("--against", help="With --slices: another network's --records, compared person by person."),
]

SHEET = "slices.png"
"""The file that --pictures writes into its folder."""

_RENDERED_PEOPLE = 200
_RENDERED_SEED = 730_021
"""Far from the seeds that people train with; recipes and docs name small ones."""
_SHEET_ROWS, _SHEET_PX = 8, 160


@dataclass(frozen=True, slots=True)
class SliceOptions:
    """What was asked for beside the network and its data; each is None where its flag was left off."""

    rendered: Path | None = None
    people: int | None = None
    draws: int | None = None
    pictures: Path | None = None
    records: Path | None = None
    against: Path | None = None


def check_slice_options(options: SliceOptions, *, slices: bool, predictions: Path | None) -> None:
    """Refuses flags that would mean nothing.

    Raises:
        UsageError: Names the flag.
    """
    for name in SliceOptions.__dataclass_fields__:
        if not slices and getattr(options, name) is not None:
            raise UsageError(f"--{name}", found="no --slices", expected="both or neither", fix="add --slices")
    for name, path in (("records", options.records), ("pictures", options.pictures)):
        if path == STDOUT:
            raise UsageError(f"--{name}", found="-, which is stdout", expected="a name: it is no text")
    if slices and predictions is not None:
        fix = "keep the errors with --records, or leave --slices off"
        raise UsageError("--predictions", found="--slices, which has many pictures per person", fix=fix)


def slice_report(
    estimator: PoseEstimator, people: PoseDataset, options: SliceOptions, progress: Steps
) -> dict[str, Any]:
    """Measure the slices, write what is to be kept, and say what came out.

    Raises:
        EdgeposeError: As `measure_slices`, or a file cannot be read or written.
    """
    base = slices_from_npz(options.against) if options.against else None
    measured = people.sample(options.people, seed=0) if options.people else people
    lenders = lenders_of(people)
    draws = options.draws or 1
    for name in sorted(set(base or {}) & set(CORRUPTIONS)):
        require_comparable((base or {})[name], measured, draws=draws)
    rendered = _rendered(options, people.keypoints, progress)
    if base is not None and rendered is not None and "rendered" in base:
        require_comparable(base["rendered"], rendered, draws=1)
    if options.pictures:
        atomic_write(options.pictures / SHEET, encode(contact_sheet(measured, lenders), ".png"))
    told = progress.step("measuring slices")
    records = measure_slices(estimator, measured, draws=draws, lenders=lenders, progress=told)
    if rendered is not None:
        told = progress.step("measuring rendered people")
        found = measure_slices(estimator, rendered, names=("clean",), progress=told)
        records["rendered"] = replace(found["clean"], name="rendered")
    if options.records:
        atomic_write(options.records, npz_from_slices(records))
    result: dict[str, Any] = {
        "persons": len(measured),
        "draws": draws,
        "rendered": rendered and {"file": rendered.source.name, "sha256": rendered.digest, "persons": len(rendered)},
        "slices": slice_rows(records, people.keypoints),
    }
    if base is not None and options.against is not None:
        result["against"] = {"file": options.against.name, "slices": _differences(base, records, people.keypoints)}
    return result


def slice_rows(records: Mapping[str, SliceRecord], keypoints: Keypoints) -> list[dict[str, Any]]:
    """One row per slice, one more for its hidden joints where it has any that count, and one for all occlusion."""
    occluded = [records[name] for name, kind in CORRUPTIONS.items() if isinstance(kind, Occluded) and name in records]
    shown = [*records.values(), *([together(occluded, "occluded_all")] if len(occluded) > 1 else [])]
    wanted, rows = shown_metrics(keypoints), []
    for record in shown:
        for joints in _selections(record):
            known = int(record.known.sum())
            row: dict[str, Any] = {
                "slice": record.name,
                "joints": joints,
                "pictures": len(record),
                "counted_joints": int(record.counted(joints).sum()),
                "hidden_share": float(record.hidden.sum() / known) if known else float("nan"),
                "metrics": _plain(intervals(record, wanted, joints)),
            }
            if joints == "all":
                row["visibility"] = _plain(visibility_quality(record))
            rows.append(row)
    return rows


def _selections(record: SliceRecord) -> tuple[Joints, ...]:
    return ("all", "hidden") if record.counted("hidden").any() else ("all",)


def _plain(found: Mapping[str, Interval]) -> dict[str, dict[str, float]]:
    return {name: {"value": i.estimate, "low": i.low, "high": i.high} for name, i in found.items()}


def _differences(
    base: Mapping[str, SliceRecord], records: Mapping[str, SliceRecord], keypoints: Keypoints
) -> list[dict[str, Any]]:
    rows = []
    for name, record in records.items():
        if name not in base:
            note(f"no comparison of {name}: the other network was not measured on it")
            continue
        for joints in _selections(record):
            found = {
                metric: paired_difference([base[name]], [record], metric, joints, draws=2000)
                if person_sums(record, metric, joints)[1].any()
                else Interval(*[float("nan")] * 3)  # nobody of them has a torso, say
                for metric in shown_metrics(keypoints)
            }
            rows.append({"slice": name, "joints": joints, "differences": _plain(found)})
    return rows


def _rendered(options: SliceOptions, keypoints: Keypoints, progress: Steps) -> PoseDataset | None:
    """Rendered people, whose own bodies hide joints: the given ones, or some made once and kept."""
    if options.rendered is not None:
        given = dataset(options.rendered, "val")
        if given.keypoints.names != keypoints.names:
            found = f"{given.keypoints.count} keypoints ({', '.join(given.keypoints.names[:3])} …)"
            raise SpecError(f"--rendered {options.rendered}", found=found, expected="those of the photographs")
        return given
    if keypoints.names != LSP14.names:
        note("no self-occluded joints: rendered people have LSP's 14 keypoints; give some with --rendered")
        return None
    folder = cache_directory() / "slices" / f"rendered-{_RENDERED_PEOPLE}-{_RENDERED_SEED}-v2"
    if not (folder / "val.json").is_file():
        # Nothing but the own body hides anything here, so that the slice means one thing.
        config = RenderConfig(occluder_probability=0.0, truncation_probability=0.0, texture_seed=_RENDERED_SEED)
        told = progress.step("rendering people")
        # Another process may have finished first: then its people are the same.
        with atomic_directory(folder, replaceable=lambda _: True) as temporary:
            write_coco(temporary, "val", _RENDERED_PEOPLE, _RENDERED_SEED, config, progress=told)
    return dataset(folder, "val")


# -------------------------------------------------------------------------------------------------------------- shown


def show_slices(result: Mapping[str, Any], *, err: bool) -> None:
    """Prints the table; half the width of the 95 % interval stands behind each figure."""
    rows = result["slices"]
    title = (
        f"{result['subject']} on {result['backend']} ({result['precision']}): {result['persons']} people of "
        f"{result['dataset']['file']}, % ± half of the 95 % interval"
    )
    names = list(rows[0]["metrics"])
    says = any(row.get("visibility") for row in rows)
    head = ["slice", "joints", *names, "hidden", *(["AUROC", "ECE"] if says else [])]
    cells = []
    for row in rows:
        line = [_label(row), str(row["counted_joints"]), *(_cell(row["metrics"][name]) for name in names)]
        quality = row.get("visibility")
        line.append(_share(row["hidden_share"]) if row["joints"] == "all" else "")
        if says:
            line += [_cell(quality[name], 1) if quality else "" for name in ("auroc", "ece")]
        cells.append(line)
    show_table(head, cells, title=title, err=err)
    if "against" in result:
        title = f"against {result['against']['file']}, points, paired by person"
        compared = [
            [_label(row), *(_cell(row["differences"][name], sign="+") for name in names)]
            for row in result["against"]["slices"]
        ]
        show_table(["slice", *names], compared, title=title, err=err)


def _label(row: Mapping[str, Any]) -> str:
    if row["joints"] == "all":
        return str(row["slice"]).replace("_", " ")
    return "  self-occluded joints" if row["slice"] == "rendered" else "  hidden joints"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if math.isfinite(value) else "–"


def _cell(interval: Mapping[str, float], scale: float = 100, sign: str = "") -> str:
    value, half = interval["value"], (interval["high"] - interval["low"]) / 2
    if not math.isfinite(value):
        return "–"
    digits = 1 if scale > 1 else 3
    bounds = f" ± {scale * half:.{digits}f}" if math.isfinite(half) else ""  # none of one person
    return f"{scale * value:{sign}.{digits}f}{bounds}"


# ----------------------------------------------------------------------------------------------------------- pictures


def contact_sheet(people: PoseDataset, lenders: Sequence[Path]) -> NDArray[np.uint8]:
    """What the slices look like: a row per person, a column per corruption, (H, W, 3) uint8 BGR.

    Joints that can be seen are green, hidden ones red.
    """
    sample = people.sample(_SHEET_ROWS, seed=1)
    head = [_titled(name) for name in CORRUPTIONS]
    rows = [np.hstack(head)]
    for person in sample.persons:
        frame = read_image(person.image)
        rows.append(np.hstack([_tile(corrupt(kind, frame, person, others=lenders)) for kind in CORRUPTIONS.values()]))
    return np.vstack(rows)


def _titled(name: str) -> NDArray[np.uint8]:
    strip = np.zeros((24, _SHEET_PX, 3), np.uint8)
    cv2.putText(strip, name.replace("_", " "), (6, 17), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
    return strip


def _tile(picture: Corrupted) -> NDArray[np.uint8]:
    (view,) = crop_transforms(picture.box_xyxy[None], Preprocess(input_hw=(_SHEET_PX, _SHEET_PX)))
    crop = np.empty((_SHEET_PX, _SHEET_PX, 3), np.uint8)
    grey = (60, 60, 60)  # tells the end of the frame from black things in it
    cv2.warpAffine(picture.frame, view, (_SHEET_PX, _SHEET_PX), dst=crop, flags=cv2.INTER_LINEAR, borderValue=grey)
    places = np.rint(picture.keypoints[:, :2] @ view[:, :2].T + view[:, 2]).astype(int)
    for (x, y), hidden, known in zip(places.tolist(), picture.hidden, picture.known, strict=True):
        if known and abs(x) < 2 * _SHEET_PX and abs(y) < 2 * _SHEET_PX:
            cv2.circle(crop, (x, y), 2, (0, 0, 255) if hidden else (0, 255, 0), -1)
    return crop
