"""`python benchmarks/side_by_side.py [NETWORK …] [--split dev|val] [--json FILE]`: this project beside other tools.

From one checkpoint and the same calibration images come NNCF's own networks, those of ONNX Runtime's `quantize_static`
and this project's; on each backend all that run there are timed in turns in one run, beside the FP32 network, and
measured on the same people. See `benchmarks.rivals` for their settings.

A rival dominates this project where it is better in one respect and not worse in the other, noise left aside: faster
(its time's upper bound below 98 %) and not less accurate (the upper 95 % bound of the paired difference of PCK at 0 or
above), or more accurate (lower bound above 0) and not slower (its time's lower bound at most 102 %). Whom nobody
dominates is on the Pareto front.

Invariant: what is timed is timed now, never read from a file; networks and predictions, which stay the same, are
cached.

Exit codes: 0 on the front of both backends · 1 not · 2 usage · 6 data absent · 130 interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # instead of this folder, whose files are the package `benchmarks`

import msgspec  # noqa: E402

from benchmarks.claims import data_root  # noqa: E402
from benchmarks.command import command  # noqa: E402
from benchmarks.context import THREADS, Context  # noqa: E402
from benchmarks.rivals import NNCF, QUANTIZE_STATIC, RIVALS, Images, Made, digest_of, made  # noqa: E402
from benchmarks.subjects import METRIC, compiled, lspet, val_people  # noqa: E402
from edgepose.blocks.zoo import find_checkpoint, zoo_names  # noqa: E402
from edgepose.bundle import Bundle, check_engine  # noqa: E402
from edgepose.cli.console import steps  # noqa: E402
from edgepose.data.coco import PoseDataset, dataset  # noqa: E402
from edgepose.data.splits import split_train  # noqa: E402
from edgepose.engines import choose_engine  # noqa: E402
from edgepose.errors import DataUnavailable, UsageError  # noqa: E402
from edgepose.estimator import PoseEstimator  # noqa: E402
from edgepose.host import fingerprint  # noqa: E402
from edgepose.pose.preprocess import normalise  # noqa: E402
from edgepose.profiler.accuracy import AccuracyRecord, evaluate, json_from_record, record_from_json, summary  # noqa: E402
from edgepose.profiler.gate.judge import judge_accuracy  # noqa: E402
from edgepose.profiler.gate.rules import AccuracyRule  # noqa: E402
from edgepose.recipe import QuantiseAfterTraining, load_recipe  # noqa: E402
from edgepose.runtime import open_session  # noqa: E402
from edgepose.spec import Backend, ModelSpec  # noqa: E402
from edgepose.stages.cache import StageKey, run_stage  # noqa: E402
from edgepose.stages.precisions import Timer  # noqa: E402
from edgepose.storage import atomic_json  # noqa: E402
from edgepose.timing.record import LatencyComparison, ModelArm  # noqa: E402
from edgepose.timing.turns import time_in_turns  # noqa: E402

BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")
FLOAT, OURS, TRAINED = "FP32", "edgepose, PTQ", "edgepose, QAT"
SECOND_METRIC = "pck_torso_0.1"
TIE = 0.02
"""Share of the time by which two networks count as equally fast."""

Split = Literal["dev", "val"]
Bounds = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Entry:
    """A network file that takes part on one backend.

    Attributes:
        label: What it is called.
        path: The file to hand to the runtime.
        precision: Arithmetic of its engine.
    """

    label: str
    path: Path
    precision: Literal["fp32", "int8"] = "int8"


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one entry on one backend.

    Attributes:
        label: Who.
        ratio: Its time over FP32's, with 95 % bounds and the rounds' spread.
        figures: PCK in points, by metric.
        to_ours: Its time over that of this project's PTQ, with 95 % bounds; (1, 1, 1) for itself.
        difference: Points of `METRIC` above this project's PTQ, with paired 95 % bounds.
        dominates: Whether this project's PTQ is beaten by it.
        tool_seconds: How long the tool took to make it; 0 where that was not measured.
    """

    label: str
    ratio: tuple[float, float, float, float]
    figures: dict[str, float]
    to_ours: tuple[float, float, float]
    difference: tuple[float, float, float]
    dominates: bool
    tool_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Table:
    """One backend's comparison.

    Attributes:
        network: Name of the network.
        split: People that PCK was measured on.
        backend: The runtime.
        rows: FP32 first, then this project, then the others.
        refused: Entries that the runtime does not execute, and why.
        facts: How and where it was timed.
    """

    network: str
    split: str
    backend: Backend
    rows: tuple[Row, ...]
    refused: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def dominators(self) -> tuple[str, ...]:
        """Who beats this project here; nobody where it is on the Pareto front."""
        return tuple(row.label for row in self.rows if row.dominates)

    @property
    def promise(self) -> dict[str, bool]:
        """Whether it has NNCF's accuracy and `quantize_static`'s speed, or better, noise left aside."""
        accuracy = [row for row in self.rows if row.label.startswith(NNCF)]
        speed = [row for row in self.rows if row.label.startswith(QUANTIZE_STATIC)]
        return {
            "nncf_accuracy": not any(row.difference[1] > 0 for row in accuracy),
            "quantize_static_speed": not any(row.to_ours[2] < 1 - TIE for row in speed),
        }


# ------------------------------------------------------------------------------------------------------- who takes part


@dataclass(frozen=True, slots=True)
class Subject:
    """A checkpoint in all the forms that are compared.

    Attributes:
        name: Of the network.
        spec: What it eats and says.
        network: The float ONNX file, which everybody starts from.
        images: (N, 3, h, w) float32, what everybody calibrates on.
        ours: This project's networks by backend, PTQ first.
        floats: The FP32 network by backend.
    """

    name: str
    spec: ModelSpec
    network: Path
    images: Images
    ours: dict[Backend, tuple[Entry, ...]]
    floats: dict[Backend, Entry]


def subject(context: Context, name: str) -> Subject:
    """A network of the zoo; this project's INT8 networks are those that `edgepose compile` makes.

    Raises:
        CheckpointError: No such network.
    """
    whole, small = compiled(context, name, "fp32"), compiled(context, name, "ptq-int8")
    bundles = [(OURS, small)]
    if f"{name}-qat-int8" in zoo_names():
        bundles.append((TRAINED, compiled(context, name, "qat-int8")))
    return Subject(
        name,
        whole.manifest.spec,
        whole.root / whole.manifest.model,
        calibration_images(context, whole.manifest.spec),
        {backend: tuple(_entry(label, bundle, backend) for label, bundle in bundles) for backend in BACKENDS},
        {backend: _entry(FLOAT, whole, backend) for backend in BACKENDS},
    )


def _entry(label: str, bundle: Bundle, backend: Backend) -> Entry:
    engine = choose_engine(bundle, backend)
    return Entry(label, check_engine(bundle, engine), "fp32" if engine.precision == "fp32" else "int8")


def calibration_images(context: Context, spec: ModelSpec) -> Images:
    """What the recipe ptq-int8 calibrates on: the same people, crops and order, (N, 3, h, w) float32."""
    recipe = load_recipe("ptq-int8")
    if not isinstance(recipe.quantise, QuantiseAfterTraining):
        raise UsageError("recipe ptq-int8", found="no post-training quantisation", expected="mode: ptq")
    train, _ = split_train(dataset(lspet(context), "train"))
    return images_of(train.sample(recipe.quantise.calibration_images, recipe.seed), spec)


def images_of(people: PoseDataset, spec: ModelSpec) -> Images:
    """The network's inputs for some people, (P, 3, h, w) float32."""
    from edgepose.training.predict import cut_crops  # with torch, which the command's --help does not need

    return normalise(cut_crops(people, spec).pixels, spec.preprocess)


def people_of(context: Context, split: Split) -> PoseDataset:
    """Whom PCK is measured on."""
    return val_people(context) if split == "val" else split_train(dataset(lspet(context), "train"))[1]


# ------------------------------------------------------------------------------------------------------------ measuring


def compare(
    context: Context, subject: Subject, backend: Backend, people: tuple[str, PoseDataset], timer: Timer = time_in_turns
) -> Table:
    """This project, NNCF and `quantize_static` on one backend.

    Args:
        context: The run; its `effort.ratio` is how arms are timed.
        subject: The checkpoint.
        backend: The runtime.
        people: Name of the split, and whom PCK is measured on.
        timer: Times arms in turns.
    """
    others = []
    for done, rival in enumerate(RIVALS):
        context.told(f"{subject.name}: {rival.label}", done, len(RIVALS))
        others.append(made(rival, subject.network, subject.images))
    present = [found for found in others if backend in found.files]
    entries = [subject.floats[backend], *subject.ours[backend]]
    entries += [Entry(found.rival.label, found.files[backend]) for found in present]
    records = [prediction(context, entry, backend, subject.spec, people[1]) for entry in entries]
    context.told(f"timing {len(entries)} networks in {backend}", 0, 1)
    arms = [ModelArm(entry.label, str(entry.path), backend, entry.precision) for entry in entries]
    turns = timer(arms, context.effort.ratio, first_group=0)
    seconds = {found.rival.label: found.seconds for found in present}
    ours = 1
    rows = [
        _row(
            entry.label,
            (turns.between(0, number), turns.between(ours, number)),
            (records[ours], records[number]),
            people[1],
            seconds.get(entry.label, 0.0),
        )
        for number, entry in enumerate(entries)
    ]
    facts = {
        "protocol": msgspec.to_builtins(turns.protocol),
        "load_average": [group.load_average for group in turns.groups],
        "calibration_images": len(subject.images),
        "persons": len(people[1].persons),
        "host": {"cpu": turns.host.cpu, "flags": list(turns.host.flags), "libraries": turns.host.libraries},
    }
    return Table(subject.name, people[0], backend, tuple(rows), _refused(others, backend), facts)


def _refused(others: Sequence[Made], backend: Backend) -> dict[str, str]:
    return {found.rival.label: found.refused[backend] for found in others if backend in found.refused}


def _row(
    label: str,
    timed: tuple[LatencyComparison, LatencyComparison],
    records: tuple[AccuracyRecord, AccuracyRecord],
    people: PoseDataset,
    seconds: float,
) -> Row:
    against_float, against_ours = timed
    judged = judge_accuracy(records[0], records[1], people.keypoints, AccuracyRule(metric=METRIC))
    figures = summary(records[1], people.keypoints)
    is_rival = label not in (FLOAT, OURS, TRAINED)
    return Row(
        label,
        (against_float.ratio, *against_float.ci95, against_float.pair_spread),
        {metric: 100 * figures[metric] for metric in (METRIC, SECOND_METRIC)},
        (against_ours.ratio, *against_ours.ci95),
        (judged.diff_points, *judged.ci95),
        is_rival and dominates(against_ours.ci95, judged.ci95),
        seconds,
    )


def dominates(time: Bounds, points: Bounds) -> bool:
    """Whether somebody beats this project: better in one respect, not worse in the other.

    Args:
        time: 95 % bounds of their time over ours.
        points: 95 % bounds of their PCK above ours.
    """
    faster, slower = time[1] < 1 - TIE, time[0] > 1 + TIE
    more, less = points[0] > 0, points[1] < 0
    return (faster and not less) or (more and not slower)


def prediction(
    context: Context, entry: Entry, backend: Backend, spec: ModelSpec, people: PoseDataset
) -> AccuracyRecord:
    """What a network predicts for some people; from the cache where it was asked before."""
    inputs = {"network": digest_of(entry.path), "people": people.digest, "host": fingerprint().digest}
    inputs["spec"] = hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(spec, name=""))).hexdigest()

    def work(folder: Path) -> dict[str, Any]:
        session = open_session(entry.path, backend, threads=THREADS, precision=entry.precision)
        with PoseEstimator(session, spec, backend=backend) as estimator:
            told = context.step(f"predicting with {entry.label} in {backend}")
            record = evaluate(estimator, people, progress=told)
        (folder / "record.json").write_bytes(json_from_record(record))
        return {}

    key = StageKey("prediction", inputs, [backend, entry.precision, THREADS], ("onnxruntime", "openvino"))
    path = run_stage(key, work).path / "record.json"
    return record_from_json(path.read_bytes(), where=str(path))


# -------------------------------------------------------------------------------------------------------------- telling


def markdown(table: Table) -> str:
    """A table as Markdown, with the verdict under it."""
    lines = [
        f"### {table.network} in {table.backend}, PCK on {table.split}",
        "",
        "| network | time over FP32 | PCK@0.2 | PCK@0.1 | above ours (95 % bounds) | time over ours | dominates |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table.rows:
        first, second = row.figures[METRIC], row.figures[SECOND_METRIC]
        lines.append(
            f"| {row.label} | {row.ratio[0]:.3f} ({row.ratio[1]:.3f} to {row.ratio[2]:.3f}, spread "
            f"{100 * row.ratio[3]:.0f} %) | {first:.2f} | {second:.2f} | {row.difference[0]:+.2f} "
            f"({row.difference[1]:+.2f} to {row.difference[2]:+.2f}) | {row.to_ours[0]:.3f} ({row.to_ours[1]:.3f} to "
            f"{row.to_ours[2]:.3f}) | {'yes' if row.dominates else 'no'} |"
        )
    lines += ["", *(f"{label} does not run here: {why}" for label, why in table.refused.items()), verdict(table), ""]
    return "\n".join(lines)


def verdict(table: Table) -> str:
    """Whether this project is on the front, in a line."""
    kept = ", ".join(
        f"{name.replace('_', ' ').replace('nncf', 'NNCF').replace('quantize static', QUANTIZE_STATIC)}: "
        f"{'yes' if holds else 'no'}"
        for name, holds in table.promise.items()
    )
    beaten = "; ".join(
        f"{row.label} ({row.to_ours[0]:.2f} x its time, {row.difference[0]:+.2f} points "
        f"[{row.difference[1]:+.2f}, {row.difference[2]:+.2f}])"
        for row in table.rows
        if row.dominates
    )
    front = f"not on the Pareto front: beaten by {beaten}" if beaten else "on the Pareto front"
    return f"{OURS} is {front} of {table.backend}; {kept}"


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Compares what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="side_by_side.py", description="This project beside other quantisers.")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help="of the zoo (default: kpe-s)")
    parser.add_argument("--split", choices=("dev", "val"), default="dev", help="whom PCK is measured on (default: dev)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables to this file")
    options = parser.parse_args(arguments)
    names = options.networks or ["kpe-s"]
    for name in names:
        find_checkpoint(name)
    root = data_root()
    if not (root / "lspet" / "train.json").is_file():
        raise DataUnavailable(f"{root}/lspet", found="no train.json", expected="the data set", fix="set EDGEPOSE_DATA")
    tables = _measured(names, options.split, root)
    if options.json is not None:
        atomic_json(options.json, tables)
    return 1 if any(table.dominators for table in tables) else 0


def _measured(names: Sequence[str], split: Split, root: Path) -> list[Table]:
    tables = []
    with tempfile.TemporaryDirectory(prefix="edgepose-side-by-side-") as folder:
        context = Context(root, Path(folder))
        for name in names:
            for backend in BACKENDS:
                with steps() as shown:
                    context.told = shown.told
                    found = context.once(f"subject {name}", partial(subject, context, name))
                    table = compare(context, found, backend, (split, people_of(context, split)))
                tables.append(table)
                print(markdown(table), flush=True)
    return tables


if __name__ == "__main__":
    raise SystemExit(main())
