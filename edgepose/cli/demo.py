"""`edgepose demo`: the whole way on what the repository carries, or on the user's photographs.

Invariant: every figure it prints was measured by this call; only the compile's stages are reused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import typer

from edgepose.bundle import Bundle
from edgepose.cli.compile import Watcher, describe
from edgepose.cli.console import Steps, note, say, show_table, steps, write_json
from edgepose.compiler import CompileRequest, CompileResult, compile_bundle
from edgepose.data.coco import Person, PoseDataset, dataset, read_image
from edgepose.data.render import write_coco
from edgepose.errors import UsageError
from edgepose.estimator import PoseEstimator
from edgepose.pose.draw import draw
from edgepose.profiler.accuracy import AccuracyRecord, evaluate, summary
from edgepose.profiler.gate.files import lines_from_verdict
from edgepose.profiler.gate.rules import load_rules
from edgepose.profiler.gate.run import GateRun, run_gate
from edgepose.profiler.pages.report import Picture, Report, render_report
from edgepose.recipe import load_recipe
from edgepose.spec import Keypoints, Poses
from edgepose.storage import atomic_write
from edgepose.timing.profile import profile
from edgepose.timing.record import ProfileProtocol, ProfileRecord

EXAMPLES = ("edgepose demo", "edgepose demo --data lspet --model kpe-s")

_RECIPES = ("fp32", "ptq-int8")  # baseline and candidate of the gate
_RENDERED = {"train": 330, "val": 120}  # people; 300 of train are left for calibration once dev is held out
_PEOPLE = 300  # of val, at most: the demo is a tour, `edgepose eval` measures all
_PICTURES = 8


def demo(
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with train.json, val.json, images/. Default: rendered people.")
    ] = None,
    model: Annotated[str, typer.Option("--model", help="Name of a zoo network, or path of a checkpoint.")] = "kpe-t",
    out: Annotated[Path, typer.Option("--out", help="Folder for everything the demo makes.")] = Path("runs/demo"),
) -> int:
    """Compile a network, run it, measure its accuracy, profile it and gate it against its float original."""
    with steps() as shown:
        folder = data or _rendered_people(out / "people", shown)
        bundles = {recipe: _compile(recipe, model, folder, out, shown) for recipe in _RECIPES}
        people = dataset(folder, "val").sample(_PEOPLE, seed=0)
        records = {recipe: _evaluate(built.bundle, people, shown) for recipe, built in bundles.items()}
        profiles = {recipe: _profile(built.bundle, shown) for recipe, built in bundles.items()}
        base, candidate = (bundles[recipe].bundle.root for recipe in _RECIPES)
        gated = run_gate(base, candidate, people, load_rules("ci-quick"), progress=shown.told)
    pictures = _draw(bundles, people, out / "pictures")
    _show(bundles, records, profiles, people.keypoints)
    for line in lines_from_verdict(gated.verdict):
        say(line)
    write_json(out / "gate.json", gated.verdict)
    report = _report(bundles[_RECIPES[1]].bundle, records, list(profiles.values()), gated, (pictures, people.keypoints))
    atomic_write(out / "report.html", report.encode())
    say(f"bundle    {candidate}")
    say(f"pictures  {out / 'pictures'}")
    say(f"report    {out / 'report.html'}")
    if gated.verdict.exit_code:
        note(
            f"the short gate of the demo ended {gated.verdict.verdict}; `edgepose gate` with the default rules decides"
        )
    return 0


def _rendered_people(folder: Path, shown: Steps) -> Path:
    for seed, (split, count) in enumerate(_RENDERED.items(), start=1):
        if not (folder / f"{split}.json").exists():
            write_coco(folder, split, count, seed, progress=shown.step(f"rendering {split}"))
    return folder


def _compile(recipe: str, model: str, data: Path, out: Path, shown: Steps) -> CompileResult:
    name = Path(model).with_suffix("").name
    request = CompileRequest(load_recipe(recipe), model, data, out / f"{name}-{recipe}.bundle", replace=True)
    result = compile_bundle(request, Watcher(shown))
    note(f"compile {recipe}: {'reused, nothing changed' if result.reused else 'written'}")
    return result


def _evaluate(bundle: Bundle, people: PoseDataset, shown: Steps) -> AccuracyRecord:
    with PoseEstimator.from_bundle(bundle.root, aim="none") as estimator:
        return evaluate(estimator, people, progress=shown.step(f"evaluating {bundle.manifest.name}"))


def _profile(bundle: Bundle, shown: Steps) -> ProfileRecord:
    what = f"profiling {bundle.manifest.name}"
    return profile(
        bundle.root, ProfileProtocol(duration_s=1.5), progress=lambda done, whole: shown.told(what, done, whole)
    )


def _draw(bundles: dict[str, CompileResult], people: PoseDataset, folder: Path) -> list[Picture]:
    """Run the compressed network on some photographs, draw what it found, and keep the drawings."""
    shots: list[tuple[Person, np.ndarray]] = []
    with PoseEstimator.from_bundle(bundles[_RECIPES[1]].bundle.root, aim="none") as estimator:
        for person in people.sample(_PICTURES, seed=1).persons:
            frame = read_image(person.image)
            poses = estimator(frame, person.box_xyxy[None])
            shots.append((person, _beside(frame, _labels(person), poses, people.keypoints)))
    pictures = []
    folder.mkdir(parents=True, exist_ok=True)  # never replaced as a whole: --out may name a folder of the user's
    for person, image in shots:
        encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
        atomic_write(folder / f"{person.image.stem}-poses.jpg", encoded)
        pictures.append(Picture(f"{person.image.name}: labels, network", [("labels | network", encoded)]))
    return pictures


def _beside(frame: np.ndarray, labels: Poses, poses: Poses, keypoints: Keypoints) -> np.ndarray:
    return np.hstack([draw(frame, labels, keypoints), draw(frame, poses, keypoints)])


def _labels(person: Person) -> Poses:
    xy = person.keypoints[None, :, :2].copy()
    xy[person.keypoints[None, :, 2] == 0] = np.nan
    return Poses(xy, (person.keypoints[None, :, 2] > 0).astype(np.float32), person.box_xyxy[None].astype(np.float32))


def _show(
    bundles: dict[str, CompileResult],
    records: dict[str, AccuracyRecord],
    profiles: dict[str, ProfileRecord],
    keypoints: Keypoints,
) -> None:
    describe(bundles[_RECIPES[1]])
    rows = []
    for recipe in _RECIPES:
        figures, record = summary(records[recipe], keypoints), profiles[recipe]
        size = sum(path.stat().st_size for path in _engine_files(bundles[recipe].bundle, record.backend))
        rows.append(
            (
                recipe,
                f"{100 * figures[_headline(figures)]:.1f}",
                "–" if record.latency[0].value_ms is None else f"{record.latency[0].value_ms:.2f}",
                f"{record.persons_per_s:.0f}",
                f"{size / 1e6:.1f}",
            )
        )
    head = ("bundle", f"{_headline(figures)} %", "frame → pose, median ms", "people/s", "engine MB")
    show_table(head, rows, title=f"{len(records[_RECIPES[0]])} people, on this machine, now")


def _headline(figures: dict[str, float]) -> str:
    return next(iter(figures))


def _engine_files(bundle: Bundle, backend: str) -> list[Path]:
    for engine in bundle.manifest.engines:
        if engine.backend == backend:
            return [bundle.root / name for name in engine.files]
    raise UsageError(f"bundle {bundle.root}", found=f"no engine of {backend}", expected="the one that was profiled")


def _report(
    bundle: Bundle,
    records: dict[str, AccuracyRecord],
    profiles: list[ProfileRecord],
    gated: GateRun,
    shown: tuple[list[Picture], Keypoints],
) -> str:
    pictures, keypoints = shown
    return render_report(
        Report(
            title=f"edgepose demo: {bundle.manifest.name}",
            subtitle="compiled, run, evaluated, profiled and gated on this machine",
            facts={"digest": bundle.digest, **bundle.manifest.chain},
            verdict=gated.verdict,
            latency=gated.timings,
            profiles=profiles,
            metrics={recipe: summary(record, keypoints) for recipe, record in records.items()},
            stages=bundle.manifest.reports,
            pictures=pictures,
        )
    )
