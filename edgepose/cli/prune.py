"""`edgepose prune`: plan which blocks and channels go, look at the plan, apply it to a checkpoint.

Invariant: a plan is a file that people can read; planning changes no checkpoint, and applying needs the plan and a
checkpoint of the planned architecture, nothing else.
"""

from __future__ import annotations

import json as json_text
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from edgepose.blocks.card import Card, paths_of, read_card
from edgepose.bundle import read_bundle
from edgepose.cli.console import STDOUT, note, say, show_table, write_json
from edgepose.cli.factory import find_source, names_code
from edgepose.cli.options import StdoutJsonFlag, check_outputs, flag_fault
from edgepose.cli.prune_scan import scan
from edgepose.cli.subject import find_subject
from edgepose.data.splits import people_for
from edgepose.errors import CheckpointError, MissingDependency, UsageError
from edgepose.profiles import load_target
from edgepose.recipe import Prune, Recipe, load_recipe
from edgepose.stages.settings import PruneStage, plan_of
from edgepose.storage import atomic_write

if TYPE_CHECKING:
    from edgepose.compress.plan import PruningPlan
    from edgepose.stages.people import StageData

EXAMPLES = (
    "edgepose prune plan kpe-s --ratio 0.5 --data lspet --out plan.json",
    "edgepose prune plan kpe-s --recipe prune-qat-int8 --data lspet --out plan.json",
    "edgepose prune plan kpe-t --ratio 0.3 --importance l2 --layer backbone.stages.3.*.conv1.0=0.5 --out plan.json",
    "edgepose prune plan kpe-s --depth 2 --data lspet --out shallower.json",
    "edgepose prune plan mine.networks:small --ratio 0.5 --data photos --out plan.json",
    "edgepose prune show plan.json",
    "edgepose prune show small.bundle --json",
    "edgepose prune apply kpe-s plan.json --data lspet --out runs/pruned",
    "edgepose prune apply mine.networks:small plan.json --data photos --out runs/pruned",
    "edgepose prune scan kpe-s --data lspet --people 200 --out scan.json",
    "edgepose prune scan kpe-t --data lspet --share 0.5 --importance l2 --int8 --out scan.json",
)

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Name of a zoo network, path of a checkpoint, or package.module:factory[@CHECKPOINT]."
    ),
]


def prune() -> None:
    """Plan which blocks and channels of a network go, look at the plan, apply it.

    `edgepose compile` does all of it by a recipe, and recovers the accuracy as well.
    """


def plan(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="The plan, JSON (- for stdout).")],
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="Take the settings of this recipe; flags win over it.")
    ] = None,
    ratio: Annotated[
        float | None, typer.Option("--ratio", help="Fraction of the network's multiply-accumulates to remove.")
    ] = None,
    importance: Annotated[
        str | None, typer.Option("--importance", help="l1, l2, bn_scale, taylor, fpgm or random [taylor].")
    ] = None,
    scope: Annotated[str | None, typer.Option("--scope", help="global or uniform [global].")] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option("--layer", help="PATTERN=FRACTION of these layers' output channels to remove; repeat for more."),
    ] = None,
    protect: Annotated[
        list[str] | None, typer.Option("--protect", help="Pattern of layers that keep all; repeat for more.")
    ] = None,
    depth: Annotated[int | None, typer.Option("--depth", min=0, help="Residual blocks to remove.")] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="2:4: two of every four weights become zero, for Ampere and Orin.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option("--target", help="Its kernels say how channels are rounded [this-cpu].")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder with train.json and images/: for taylor and --depth.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of everything random [0].")] = None,
) -> int:
    """Choose what to remove from MODEL, and write it down; nothing is changed or trained."""
    flags = {
        "ratio": ratio,
        "importance": importance,
        "scope": scope,
        "ratios": _ratios(layer) if layer else None,
        "protected": protect or None,
        "depth": depth,
        "pattern": pattern,
    }
    source = find_source(model)
    _check_free([out], [*paths_of(source.path)])
    settings = _settings(
        recipe, target or [], {name: value for name, value in flags.items() if value is not None}, seed
    )
    _check_data(settings, data)
    card = read_card(source.path)
    people = None if data is None else _people(data, card)
    _require_torch()
    from edgepose.compress.plan import PLAN_COLUMNS, plan_table, plan_to_json
    from edgepose.stages.compress import plan_network

    made = plan_network(source, people, settings)
    title = f"{card.name}: {settings.goal}, by {settings.importance}"
    if out == STDOUT:
        say(plan_to_json(made).decode().rstrip())
    else:
        atomic_write(out, plan_to_json(made))
    show_table(PLAN_COLUMNS, plan_table(made), title=title, err=out == STDOUT)
    (note if out == STDOUT else say)(f"{out}: {_summary(made)}")
    return 0


def show(
    subject: Annotated[str, typer.Argument(metavar="PLAN", help="A plan.json, a bundle, a checkpoint or a zoo name.")],
    json: StdoutJsonFlag = False,
) -> int:
    """Print a plan as a table: what each layer keeps, and its share of the multiply-accumulates."""
    _require_torch()
    from edgepose.compress.plan import PLAN_COLUMNS, plan_rows, plan_table

    found = _plan_of(subject)
    if json:
        rows = [row._asdict() for row in plan_rows(found)]
        write_json(STDOUT, {"rows": rows, "plan": msgspec.to_builtins(found)})
        return 0
    show_table(PLAN_COLUMNS, plan_table(found), title=f"{subject}: {found.architecture}")
    if found.sparse:
        say(f"{found.config.pattern} sparse: {', '.join(found.sparse)}")
    if found.frozen:
        show_table(("left alone", "channels", "because"), [(g.name, str(g.channels), g.reason) for g in found.frozen])
    say(_summary(found))
    return 0


def apply(
    model: ModelArgument,
    plan: Annotated[Path, typer.Argument(metavar="PLAN", help="What `edgepose prune plan` wrote.")],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint: OUT.safetensors and OUT.json.")],
    data: Annotated[
        Path | None,
        typer.Option("--data", help="Folder with train.json and images/: repairs the statistics, measures on dev."),
    ] = None,
) -> int:
    """Apply a plan to MODEL, trained or fresh, and write the pruned checkpoint; compile it to quantise and export."""
    source = find_source(model)
    _check_free(paths_of(out), [plan, *paths_of(source.path)])
    people = None if data is None else _people(data, read_card(source.path))
    _require_torch()
    from edgepose.stages.compress import replay

    report = replay(source, _read_plan(plan), people, out)
    removed = 1 - report["macs_after"] / max(report["macs_before"], 1)
    dev = report.get("dev", {})
    accuracy = f", on dev pck_torso_0.2 {100 * dev['pck_torso_0.2']:.2f}" if "pck_torso_0.2" in dev else ""
    say(f"{paths_of(out)[0]}: {100 * removed:.1f} % of the multiply-accumulates removed{accuracy}")
    if people is None:
        note("the normalisation statistics are those of the unpruned network; --data DIR repairs them")
    if names_code(model):
        note(f"its code is not in the checkpoint: name it {model.partition('@')[0]}@{_spelt(out)}")
    return 0


def _spelt(checkpoint: Path) -> str:
    """A checkpoint as the command line takes it: with a slash, or it would be a name of the zoo."""
    return str(checkpoint) if "/" in str(checkpoint) else f"./{checkpoint}"


ACTIONS = (plan, show, apply, scan)
"""What stands behind `edgepose prune`; each is a command with flags of its own."""


_FLAGS = {
    "ratio": "--ratio", "importance": "--importance", "scope": "--scope", "ratios": "--layer", "protected": "--protect",
    "depth": "--depth", "pattern": "--pattern",
}  # fmt: skip


def _settings(recipe: str | None, targets: Sequence[str], flags: dict[str, Any], seed: int | None) -> PruneStage:
    """What a recipe and flags come to."""
    base = Recipe("flags", "") if recipe is None else load_recipe(recipe)
    if recipe is not None and base.prune is None:
        raise UsageError(
            f"--recipe {recipe}", found="no prune section", expected="one", fix="choose another recipe, or give --ratio"
        )
    chosen = tuple(targets) or base.targets
    fields = {} if base.prune is None else msgspec.to_builtins(base.prune)
    if "ratio" in flags:
        fields.update(speedup=None, target_latency_ms=None)
    try:
        prune = msgspec.convert({**fields, **flags}, Prune)
    except msgspec.ValidationError as err:
        given = {name: (flag, flags.get(name)) for name, flag in _FLAGS.items()}
        fix = "give --ratio, --layer, --depth or --pattern"
        raise flag_fault("edgepose prune plan", err, given, fix) from err
    whole = msgspec.structs.replace(base, prune=prune, quantise=None, seed=base.seed if seed is None else seed)
    planned = plan_of(whole, tuple(load_target(name) for name in chosen))
    assert planned.prune is not None
    if planned.prune.aimed:
        raise UsageError(
            f"--recipe {recipe}",
            found=f"a network that is {planned.prune.goal}",
            expected="a ratio, which only compiling and timing finds out for a latency",
            fix="add --ratio, or run edgepose compile",
        )
    if planned.steps > 1:
        note(f"the recipe prunes in {planned.steps} steps; this plan does it in one")
    return planned.prune


def _ratios(pairs: Sequence[str]) -> dict[str, float]:
    ratios: dict[str, float] = {}
    for pair in pairs:
        pattern, _, number = pair.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            pattern, value = "", 0.0
        if not pattern or pattern in ratios:
            found = f"{pair!r}, the same pattern again" if pattern else repr(pair)
            raise UsageError("--layer", found=found, expected="PATTERN=FRACTION, each pattern once")
        ratios[pattern] = value
    return ratios


def _check_data(settings: PruneStage, data: Path | None) -> None:
    """Refuses what cannot be judged without people, and people that nobody would look at."""
    by_gradients = settings.importance == "taylor"
    judged = [name for name, asked in (("depth", settings.depth > 0), ("importance taylor", by_gradients)) if asked]
    if judged and data is None:
        raise UsageError(
            "edgepose prune plan",
            found=f"{' and '.join(judged)} without data",
            expected="training people to judge by",
            fix="add --data DIR" if settings.depth else "add --data DIR, or --importance l2",
        )
    if data is not None and not judged:
        raise UsageError(
            "--data",
            found=f"a folder that importance {settings.importance} does not look at",
            expected="taylor or --depth, which do",
            fix="leave it off",
        )


def _people(data: Path, card: Card) -> StageData:
    train, dev = people_for(card.name, card.keypoints, data)
    _require_torch()
    from edgepose.stages.people import StageData

    return StageData(train, dev)


def _plan_of(subject: str) -> PruningPlan:
    """The plan that a file, a bundle or a checkpoint holds."""
    from edgepose.compress.plan import plan_from_json

    path = Path(subject)
    if path.is_file() and path.suffix != ".safetensors" and not paths_of(path)[0].is_file():
        return _read_plan(path)
    found = find_subject(subject)
    if found.is_bundle:
        held = read_bundle(found.path).manifest.reports.get("compile", {}).get("plan")
    else:
        held = read_card(found.path).plan
    if held is None:
        raise CheckpointError(
            subject, found="a network that was not pruned", expected="a pruning plan", fix="name one that was pruned"
        )
    return plan_from_json(json_text.dumps(held).encode(), where=f"{subject}: plan")


def _read_plan(path: Path) -> PruningPlan:
    from edgepose.compress.plan import plan_from_json

    try:
        content = path.read_bytes()
    except OSError as err:
        raise CheckpointError(
            str(path), found=err.strerror or "an unreadable file", expected="a pruning plan", fix="check the path"
        ) from err
    return plan_from_json(content, where=str(path))


def _summary(made: PruningPlan) -> str:
    macs = f"{made.macs_before / 1e6:.1f} → {made.macs_after / 1e6:.1f} MMAC"
    parts = [f"{macs}, {made.params_before / 1e6:.2f} → {made.params_after / 1e6:.2f} M parameters"]
    parts += [f"{len(made.blocks)} blocks removed"] if made.blocks else []
    parts += [f"{len(made.sparse)} layers {made.config.pattern} sparse"] if made.sparse else []
    return ", ".join(parts)


def _check_free(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    check_outputs(outputs, inputs)
    for output in outputs:
        if output.exists():
            raise UsageError(f"--out {output}", found="a file that is there", fix="choose another name, or remove it")


def _require_torch() -> None:
    try:
        import torch_pruning as _torch_pruning  # noqa: F401

        from edgepose.stages import compress as _compress  # noqa: F401
    except ImportError as err:
        raise MissingDependency(err.name or "torch", extra="compile", needed_for="pruning") from err
