"""`edgepose compile`: a checkpoint to a bundle by a recipe.

Invariant: stdout says what was made and which stages were reused; progress goes to stderr.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from edgepose.cli.console import Steps, duration, note, say, show_table, steps
from edgepose.cli.factory import find_source
from edgepose.cli.options import check_outputs
from edgepose.compiler import CompileRequest, CompileResult, compile_bundle, planned_stages
from edgepose.errors import MissingDependency, UsageError
from edgepose.recipe import Recipe, load_recipe
from edgepose.stages.cache import StageResult
from edgepose.stages.latency import STAIR_COLUMNS, stair_rows, staircase_of

EXAMPLES = (
    "edgepose compile ptq-int8 --model kpe-s --data lspet --out kpe-s.bundle",
    "edgepose compile prune-qat-int8 --model kpe-s --out small.bundle",
    "edgepose compile my.yaml --model runs/mine.safetensors --data photos --target x86-cpu --out mine.bundle",
    "edgepose compile fp32 --model kpe-t --out kpe-t.bundle --dry-run",
    "edgepose compile ptq-int8 --data lspet --image-input --decoding --out camera.bundle",
    "edgepose compile ptq-int8 --model imported.bundle --data photos --out imported-int8.bundle",
    "edgepose compile qat-int8 --model mine.networks:small --data photos --out mine.bundle",
)


def compile_(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, or path of a YAML file.")],
    out: Annotated[Path, typer.Option(help="Directory of the bundle; must not exist yet.")],
    model: Annotated[
        str,
        typer.Option(
            help="Name of a zoo network, path of a checkpoint or of an imported bundle, or package.module:factory "
            "for one of your own (@CHECKPOINT behind it: with weights that were made of it)."
        ),
    ] = "kpe-s",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder with train.json and images/; for a bundle, photographs without labels will do."),
    ] = None,
    rendered: Annotated[
        Path | None,
        typer.Option(help="People of `edgepose render`, for the share of each batch that the recipe's training says."),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help="Target to build for; repeat for several.")] = None,
    image_input: Annotated[
        bool,
        typer.Option("--image-input", help="Take uint8 images: colours, mean, std and layout go into the graph."),
    ] = False,
    decoding: Annotated[
        bool, typer.Option("--decoding", help="Say keypoints and scores: decoding becomes part of the graph.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say which stages would run, and stop.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace another bundle at OUT.")] = False,
) -> int:
    """Turn a checkpoint into a bundle: prune, recover, quantise, export, build engines; each is checked and cached.

    Where MODEL is a float bundle, an imported one say, its ONNX network is quantised after training (mode: ptq).
    """
    loaded = load_recipe(recipe, targets=target or ())
    asked = loaded.export
    ends = {"image_input": image_input or asked.image_input, "decoding": decoding or asked.decoding}
    loaded = msgspec.structs.replace(loaded, export=msgspec.structs.replace(asked, **ends))
    if Path(model).is_dir():
        if rendered is not None:
            raise UsageError("--rendered", found=f"the bundle {model}, which is not trained", expected="a checkpoint")
        return _quantise_bundle(_Wish(loaded, Path(model), data, out), dry_run=dry_run, replace=replace)
    request = CompileRequest(loaded, find_source(model), data, out, replace, rendered)
    if dry_run:
        rows = [(stage, state) for stage, state in planned_stages(request)]
        show_table(("stage", "would be"), rows, title=f"{request.recipe.name}: {request.recipe.description}")
        return 0
    with steps() as shown:
        result = compile_bundle(request, Watcher(shown))
    describe(result)
    return 0


@dataclass(frozen=True, slots=True)
class _Wish:
    """What was asked of a bundle: recipe, bundle, data, place of the new one."""

    recipe: Recipe
    bundle: Path
    data: Path | None
    out: Path


def _quantise_bundle(wish: _Wish, *, dry_run: bool, replace: bool) -> int:
    if dry_run:
        found = f"the bundle {wish.bundle}, of which there are two stages only: ptq and engines"
        raise UsageError("--dry-run", found=found, expected="a checkpoint", fix="leave it off")
    if wish.recipe.export.has_ends:
        found = f"the bundle {wish.bundle}, whose network is taken as it is"
        fix = "leave --image-input and --decoding off, here and in the recipe"
        raise UsageError("export", found=found, expected="a checkpoint", fix=fix)
    check_outputs([wish.out], [wish.bundle])
    try:
        from edgepose.importer.quantise import QuantiseRequest, quantise_bundle
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or str(err), extra="compile", needed_for=f"quantising {wish.bundle}") from err
    with steps() as shown:
        request = QuantiseRequest(wish.bundle, wish.recipe, wish.data, wish.out, replace)
        result = quantise_bundle(request, Watcher(shown))
    describe(result)
    return 0


def describe(result: CompileResult) -> None:
    """Say what a compile made, stage by stage."""
    rows = [
        (stage.stage, "reused" if stage.reused else f"ran, {duration(stage.seconds)}", headline(stage.report))
        for stage in result.stages
    ]
    rows.append(("bundle", "reused" if result.reused else "written", str(result.bundle.root)))
    show_table(("stage", "", ""), rows)
    for target in result.later:
        say(f"engines for {target} are built there: edgepose build {result.bundle.root} --target {target} --out OUT")
    show_latency({stage.stage: stage.report for stage in result.stages})
    if result.reused:
        say(f"nothing changed: {result.bundle.root} is up to date")


def show_latency(reports: Mapping[str, Any]) -> None:
    """Say what a search for a latency saw, and what the finished engine does; nothing where there was no search."""
    if "prune" in reports and "latency" in reports["prune"]:
        staircase = staircase_of(reports["prune"]["latency"])
        form = staircase.form
        title = f"{staircase.goal}: shapes timed in {form.backend} {form.precision} on {form.threads} threads"
        show_table(STAIR_COLUMNS, stair_rows(staircase), title=f"\n{title} ({staircase.cpu})")
    if "latency" in reports:
        say(reports["latency"]["text"])


def headline(report: dict[str, Any]) -> str:
    """What a stage's report comes down to, in a few words."""
    parts = []
    if "macs_after" in report:
        parts.append(f"{report['macs_before'] / 1e6:.0f} → {report['macs_after'] / 1e6:.0f} MMAC")
    if "pck_torso_0.2" in report.get("dev", {}):
        parts.append(f"dev PCK@0.2 {100 * report['dev']['pck_torso_0.2']:.2f}")
    if "precision" in report:
        parts.append(f"{report['precision']}, median shift {report['shift']['median_px']:.3f} px")
    if "kept" in report:
        parts.append(report["text"])
    if "stairs" in report:
        timing = report["predicted"]
        parts.append(f"{len(report['stairs'])} of {report['shapes']} shapes timed, {timing['speedup']:.2f} x predicted")
    if "achieved" in report:
        parts.append(f"{report['achieved']['speedup']:.2f} x achieved")
    if "median_ms" in report.get("latency", {}):
        parts.append(f"{report['latency']['median_ms']:.2f} ms on {report['latency']['threads']} threads")
    if "int8_share" in report and "arithmetic" not in report:
        parts.append(f"{100 * report['int8_share']:.1f} % of MACs in INT8")
    if "pck_torso_0.2" in report.get("activations", {}).get("symmetric_costs_points", {}):
        points = report["activations"]["symmetric_costs_points"]["pck_torso_0.2"]
        parts.append(f"calibrated symmetric activations {-points:+.2f} points against asymmetric ones")
    if "arithmetic" in report:
        done = report["arithmetic"]["achieved"]
        parts.append(", ".join(f"{100 * share:.1f} % of MACs in {name}" for name, share in done.items() if share))
    if report.get("lint"):
        parts.append(f"lint warns of {', '.join(finding['rule'] for finding in report['lint'])}")
    if "max_drop" in report:
        parts.append(f"{len(report['max_drop']['path'])} layers given back to float")
    if "figures" in report:
        forms = {name.rpartition("/")[2]: row.get("pck_torso_0.2") for name, row in report["figures"].items()}
        parts += [f"{name} {100 * figure:.2f}" for name, figure in forms.items() if figure is not None]
    return ", ".join(parts)


class Watcher:
    """Shows a compile's progress on the terminal."""

    def __init__(self, shown: Steps) -> None:
        self._shown = shown
        self._stage = ""

    def started(self, stage: str) -> None:
        """Remember the stage for the bars to come."""
        self._stage = stage

    def finished(self, stage: StageResult) -> None:
        """Leave one line per stage that really ran."""
        if not stage.reused:
            note(f"{stage.stage}: {duration(stage.seconds)}  {headline(stage.report)}")

    def building(self, what: str, done: int, total: int) -> None:
        """Show how far a builder is."""
        self._shown.told(f"{self._stage}: building", done, total, what)

    def cutting(self, done: int, total: int) -> None:
        """Show the reading of photographs."""
        self._shown.told(f"{self._stage}: reading", done, total)

    def step(self, done: int, total: int, loss: float) -> None:
        """Show a step of fine-tuning."""
        self._shown.told(f"{self._stage}: fine-tuning", done, total, f"loss {loss:.3f}")

    def epoch(self, row: dict[str, float]) -> None:
        """Show an epoch's figures on dev."""
        accuracy = f", dev PCK@0.2 {100 * row['pck_torso_0.2']:.2f}" if "pck_torso_0.2" in row else ""
        note(f"{self._stage}: epoch {row['epoch']:.0f}, loss {row['loss']:.3f}{accuracy}")

    def timed(self, what: str, done: int, total: int) -> None:
        """Show that a shape was timed."""
        self._shown.told(f"{self._stage}: timing {what}", done, total)
