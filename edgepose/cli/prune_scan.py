"""`edgepose prune scan`: what each group of channels, and each quantised layer, is worth on dev; a file and a plot.

Invariant: the scan is kept in the cache figure by figure, so that the same command goes on after Ctrl-C; val is never
read.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from edgepose.blocks.card import paths_of, read_card
from edgepose.cli.console import STDOUT, note, say, show_table, steps, write_json
from edgepose.cli.factory import find_source
from edgepose.cli.options import SeedFlag, check_outputs, flag_fault
from edgepose.data.splits import people_for
from edgepose.errors import MissingDependency
from edgepose.host import physical_cores
from edgepose.profiler.pages.markup import section, table
from edgepose.profiler.pages.report import Report, render_report
from edgepose.profiler.pages.stage_page import Scan, ScanRow, sensitivity_section
from edgepose.storage import atomic_write

if TYPE_CHECKING:
    from edgepose.stages.sensitivity import QuantisedRow, ScanResult, ScanSettings

_SHOWN = 8  # rows of the table on the terminal


def scan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="Name of a zoo network, path of a checkpoint, or package.module:factory[@CHECKPOINT]."
        ),
    ],
    data: Annotated[Path, typer.Option("--data", help="Folder with train.json and images/; dev is held out of it.")],
    out: Annotated[Path, typer.Option("--out", help="The figures, JSON; the plot goes beside it as HTML.")],
    share: Annotated[
        list[float] | None,
        typer.Option("--share", help="Fraction of a layer's channels to remove; repeat [0.25 0.5 0.75]."),
    ] = None,
    importance: Annotated[
        str, typer.Option("--importance", help="Which go first: l1, l2, bn_scale, taylor, fpgm or random.")
    ] = "taylor",
    layer: Annotated[
        list[str] | None, typer.Option("--layer", help="Pattern of layers to scan; repeat. Default: all.")
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Scan quantisation too, layer by layer.")] = False,
    people: Annotated[
        int, typer.Option("--people", min=0, help="Measure on so many people of dev, for speed; 0 for all.")
    ] = 0,
    metric: Annotated[str, typer.Option("--metric", help="What is plotted. Default: pck_torso_0.2.")] = "",
    threads: Annotated[int, typer.Option("--threads", min=0, help="Threads of torch, 0 for all cores.")] = 0,
    seed: SeedFlag = 0,
) -> int:
    """Prune each layer of MODEL alone, by several shares, and measure on dev; nothing is fine-tuned or changed.

    Figures are kept in the cache: Ctrl-C stops the scan, and the same command goes on.
    """
    source, page = find_source(model), out.with_suffix(".html")
    check_outputs([out, page], paths_of(source.path))
    card = read_card(source.path)
    train, dev = people_for(card.name, card.keypoints, data)
    _require(threads)
    from edgepose.stages.people import StageData
    from edgepose.stages.sensitivity import scan_sensitivity

    settings = _settings(share, importance, layer, int8, people, metric, seed)
    with steps() as shown:
        result = scan_sensitivity(source, StageData(train, dev), settings, shown.told)
    write_json(out, result)
    _show(result, err=out == STDOUT)
    if out != STDOUT:
        atomic_write(page, _page(result).encode())
        note(f"wrote {out} and {page}")
    return 0


_FLAGS = ("--share", "--importance", "--layer", "--int8", "--people", "--metric", "--seed")


def _settings(*given: object) -> ScanSettings:
    from edgepose.stages.sensitivity import ScanSettings

    names = ("shares", "importance", "layers", "int8", "people", "metric", "seed")
    fields = {name: value for name, value in zip(names, given, strict=True) if value is not None}
    try:
        return msgspec.convert(fields, ScanSettings)
    except msgspec.ValidationError as err:
        flags = {name: (flag, fields.get(name)) for name, flag in zip(names, _FLAGS, strict=True)}
        raise flag_fault("edgepose prune scan", err, flags, "see edgepose prune scan --help") from err


def _require(threads: int) -> None:
    try:
        import torch

        from edgepose.stages import sensitivity as _sensitivity  # noqa: F401
    except ImportError as err:
        raise MissingDependency(err.name or "torch", extra="compile", needed_for="scanning") from err
    torch.set_num_threads(threads or physical_cores())


def _show(result: ScanResult, *, err: bool) -> None:
    """The layers that lose most, on the terminal."""
    if result.base is None:
        return
    losses: dict[str, dict[float, float]] = {}
    for row in result.rows:
        if row.pck is not None:
            losses.setdefault(row.layer, {})[row.ratio] = 100 * (row.pck - result.base)
    worst = sorted(losses, key=lambda name: min(losses[name].values()))[:_SHOWN]
    rows = [(name, ", ".join(f"{s:.0%}: {loss:+.2f}" for s, loss in sorted(losses[name].items()))) for name in worst]
    title = f"{result.network}: {100 * result.base:.2f} % {result.metric} on {result.people} people of dev"
    if rows:
        show_table(("most sensitive layers", "removed: points"), rows, title=title, err=err)
    if result.base_int8 is not None:
        points = 100 * (result.base_int8 - result.base)
        head = ("layer", "points, alone in 8 bits", "points, alone in float")
        ranked = _by_harm(result)[:_SHOWN]
        show_table(head, ranked, title=f"all layers in 8 bits: {points:+.2f} points", err=err)
    (note if err else say)(f"{len(losses)} layers pruned alone, {len(result.quantised)} quantised alone")


def _by_harm(result: ScanResult) -> Sequence[tuple[str, str, str]]:
    """Quantised layers, the most harmful first, with what each changes in points."""

    def points(value: float | None, base: float | None) -> str:
        return "–" if value is None or base is None else f"{100 * (value - base):+.2f}"

    def harm(row: QuantisedRow) -> float:
        return 1.0 if row.only_int8 is None else row.only_int8

    return [
        (row.layer, points(row.only_int8, result.base), points(row.only_float, result.base_int8))
        for row in sorted(result.quantised, key=harm)
    ]


def _page(result: ScanResult) -> str:
    rows = tuple(ScanRow(row.layer, row.ratio, row.pck) for row in result.rows)
    extra = []
    if result.base is not None and rows:
        extra.append(sensitivity_section(Scan(result.metric, result.base, rows), result.network))
    if result.quantised and result.base_int8 is not None:
        cells = [tuple(escape(cell) for cell in row) for row in _by_harm(result)]
        words = f"<p>With all layers in 8 bits the network has {100 * result.base_int8:.2f} % {result.metric}.</p>"
        head = ("layer", "points, this one alone in 8 bits", "points, this one alone in float")
        extra.append(section("Sensitivity to 8 bits", words, table(head, cells)))
    facts = {
        "network": result.network,
        "weights": result.checkpoint,
        "people": f"{result.people} of dev",
        "channels go by": result.settings.importance,
    }
    return render_report(Report(title=f"{result.network}: sensitivity", facts=facts, extra=extra))
