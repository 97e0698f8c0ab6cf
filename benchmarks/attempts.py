"""`python benchmarks/attempts.py CHECKPOINT --name NAME --what TEXT [--against CHECKPOINT]`: long runs, on record.

A run of hours that did not become a network of the zoo has taught something too. Its record (settings of every stage,
its last curve, what it makes of clean and of occluded people of `dev`) is kept in benchmarks/attempts/NAME.json, its
weights are not; `--table` alone prints the table of docs/zoo.md from the records.

Invariant: figures are of `dev`, never of val, behind occluders that no network was trained with; a difference is
taken on the same pictures, person by person.

Exit codes: 0 done · 2 usage · 6 data absent · 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # instead of this folder, whose files are the package `benchmarks`

from benchmarks.claims import data_root  # noqa: E402
from benchmarks.command import command  # noqa: E402
from benchmarks.context import THREADS  # noqa: E402
from edgepose.blocks.zoo import find_checkpoint  # noqa: E402
from edgepose.cli.console import Steps, steps  # noqa: E402
from edgepose.data.coco import dataset  # noqa: E402
from edgepose.data.splits import split_train  # noqa: E402
from edgepose.profiler.slices import (  # noqa: E402
    SliceRecord,
    intervals,
    lenders_of,
    measure_slices,
    paired_difference,
    visibility_quality,
)
from edgepose.stats import Interval  # noqa: E402
from edgepose.storage import atomic_json  # noqa: E402

RECORDS = Path(__file__).resolve().parent / "attempts"
METRIC, OCCLUDED, DRAWS = "pck_torso_0.2", "occluded_30", 3


def put_on_record(checkpoint: Path, told: dict[str, str], base: Path | None, shown: Steps) -> dict[str, Any]:
    """Measure a run and keep what it was and what came out.

    Args:
        checkpoint: Its weights.
        told: Its `name`, and `what` was tried, for people.
        base: Weights of the run it is compared with; None for none.
        shown: Told about progress.
    """
    import torch

    from edgepose.stages.networks import load_network

    torch.set_num_threads(THREADS)
    card = load_network(checkpoint)[1].card
    mine = _measured(checkpoint, shown)
    record: dict[str, Any] = {
        **told,
        "network": card.name,
        "weights_sha256": card.weights_sha256,
        "settings": [entry.config for entry in card.lineage if entry.stage == "train"],
        "epochs": sum(len(entry.report["curve"]) for entry in card.lineage if entry.stage == "train"),
        "curve": next(entry for entry in reversed(card.lineage) if entry.stage == "train").report["curve"],
        "clean": _points(intervals(mine["clean"], (METRIC,), "all")[METRIC]),
        "occluded": _points(intervals(mine[OCCLUDED], (METRIC,), "all")[METRIC]),
        "hidden": _points(intervals(mine[OCCLUDED], (METRIC,), "hidden")[METRIC]),
        "visibility": {
            name: [found.estimate, found.low, found.high] for name, found in visibility_quality(mine[OCCLUDED]).items()
        },
    }
    if base is not None:
        theirs = _measured(base, shown)
        record["against"] = load_network(base)[1].card.name
        record["gain"] = {
            name: _points(paired_difference([theirs[name]], [mine[name]], METRIC)) for name in ("clean", OCCLUDED)
        }
    atomic_json(RECORDS / f"{told['name']}.json", record)
    return record


def _measured(checkpoint: Path, shown: Steps) -> dict[str, SliceRecord]:
    from edgepose.estimator import PoseEstimator
    from edgepose.stages.networks import load_network
    from edgepose.training.session import TorchSession

    people = dataset(data_root() / "lspet", "train")
    module, loaded = load_network(checkpoint)
    spec = loaded.card.spec

    def progress(done: int, total: int) -> None:
        shown.told(f"{checkpoint.name}: clean and behind occluders", done, total)

    with PoseEstimator(TorchSession(module, spec), spec, backend="torch") as estimator:
        dev, lenders = split_train(people)[1], lenders_of(people)
        return measure_slices(
            estimator, dev, names=("clean", OCCLUDED), draws=DRAWS, lenders=lenders, progress=progress
        )


def _points(found: Interval) -> list[float]:
    return [100 * found.estimate, 100 * found.low, 100 * found.high]


def table(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    head = ["run", "what was tried", "clean", "occluded", "hidden joints", "AUROC", "ECE", "occluded, against"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for record in records:
        said = [f"{record['visibility'][name][0]:.3f}" if record["visibility"] else "–" for name in ("auroc", "ece")]
        gain = "–"
        if "gain" in record:
            point, low, high = record["gain"][OCCLUDED]
            gain = f"{point:+.2f} [{low:+.2f}, {high:+.2f}] ({record['against']})"
        figures = [f"{record[name][0]:.1f}" for name in ("clean", "occluded", "hidden")]
        lines.append("| " + " | ".join([record["name"], record["what"], *figures, *said, gain]) + " |")
    return "\n".join(lines) + "\n"


def kept() -> list[dict[str, Any]]:
    """The records there are, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))]


@command
def main() -> int:
    """Does what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="attempts.py", description="Long runs on record.")
    parser.add_argument("checkpoint", nargs="?", help="weights of the run: a checkpoint or a name of the zoo")
    parser.add_argument("--name", help="of the record")
    parser.add_argument("--what", help="what was tried, for people")
    parser.add_argument("--against", metavar="CHECKPOINT", help="weights of the run it is compared with")
    parser.add_argument("--table", action="store_true", help="print the table of the records there are, and stop")
    options = parser.parse_args()
    if not options.table:
        if not (options.checkpoint and options.name and options.what):
            parser.error("CHECKPOINT, --name and --what are needed, or --table alone")
        told = {"name": options.name, "what": options.what}
        base = find_checkpoint(options.against) if options.against else None
        with steps() as shown:
            put_on_record(find_checkpoint(options.checkpoint), told, base, shown)
    print(table(kept()), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
