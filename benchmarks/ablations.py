"""`python benchmarks/ablations.py [NAME … | --table]`: what each choice buys, on short runs of a small network.

Every run changes one thing against another run. Its record (settings, digests, the curve on dev, multiply-accumulates)
is kept in benchmarks/ablations/NAME.json; `--table` prints the table of docs/zoo.md from the records.

Invariant: all runs have the same people, epochs, input size and seed, and figures are of `dev`, never of val; a record
is written only after its run is complete.

Exit codes: 0 done · 2 usage · 6 data absent · 130 interrupted (the same command goes on from there).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # instead of this folder, whose files are the package `benchmarks`

import msgspec  # noqa: E402

from benchmarks.claims import data_root  # noqa: E402
from benchmarks.command import command  # noqa: E402
from benchmarks.context import THREADS  # noqa: E402
from edgepose.blocks.config import PRESETS, KPEConfig, LossConfig, spec_of  # noqa: E402
from edgepose.cli.console import Steps, note, steps  # noqa: E402
from edgepose.data.augment import AugmentConfig, OcclusionConfig  # noqa: E402
from edgepose.data.coco import dataset  # noqa: E402
from edgepose.data.splits import split_train  # noqa: E402
from edgepose.errors import UsageError  # noqa: E402
from edgepose.host import cache_directory  # noqa: E402
from edgepose.storage import atomic_json  # noqa: E402
from edgepose.strict_yaml import did_you_mean  # noqa: E402
from edgepose.training.config import TrainConfig  # noqa: E402

RECORDS = Path(__file__).resolve().parent / "ablations"
SHOWN = ("pck_torso_0.2", "pck_torso_0.1", "auc")


@dataclass(frozen=True, slots=True)
class Ablation:
    """One run.

    Attributes:
        against: The run that it differs from in one thing; "" for the first.
        what: What is different, for people.
        network: Its architecture.
        config: Its settings.
    """

    against: str
    what: str
    network: KPEConfig
    config: TrainConfig


_replace = msgspec.structs.replace
_NETWORK = _replace(PRESETS["kpe-t"], input_hw=(96, 96))
_ADAMW = TrainConfig(epochs=5, batch_size=64, learning_rate=2e-3, sigma_px=2.0, augment=AugmentConfig(cutout=0.0))
_MUON = _replace(_ADAMW, optimizer="muon", learning_rate=3e-3)


def _network(**changes: Any) -> KPEConfig:
    return _replace(_NETWORK, **changes)


def _loss(**changes: Any) -> TrainConfig:
    return _replace(_MUON, loss=LossConfig(**changes))


def _kind(preset: str) -> KPEConfig:
    return _replace(PRESETS[preset], input_hw=_NETWORK.input_hw)


ABLATIONS = {
    "adamw": Ablation("", "AdamW at 2e-3", _NETWORK, _ADAMW),
    "muon": Ablation("adamw", "Muon for hidden weights", _NETWORK, _MUON),
    "no-averaging": Ablation("muon", "last weights instead of averaged ones", _NETWORK, _replace(_MUON, averaging=0.0)),
    "cutout": Ablation("muon", "cut-out", _NETWORK, _replace(_MUON, augment=AugmentConfig())),
    "occlusion": Ablation(
        "muon",
        "things pasted in front",
        _NETWORK,
        _replace(_MUON, augment=AugmentConfig(cutout=0.0, occlusion=OcclusionConfig())),
    ),
    "little-rotation": Ablation(
        "muon",
        "rotation of 10 degrees instead of 30",
        _NETWORK,
        _replace(_MUON, augment=AugmentConfig(cutout=0.0, rotation_deg=10.0)),
    ),
    "spatial": Ablation("muon", "auxiliary loss over map cells", _NETWORK, _loss(spatial=0.5)),
    "ohkm": Ablation("muon", "only the 8 hardest joints count", _NETWORK, _loss(ohkm=8)),
    "kl": Ablation("muon", "Kullback-Leibler divergence", _NETWORK, _loss(kind="kl")),
    "wing": Ablation("muon", "wing loss beside cross-entropy", _NETWORK, _loss(kind="wing")),
    "heatmap": Ablation("muon", "heat maps", _network(head="heatmap"), _MUON),
    "regression": Ablation("muon", "coordinates by RLE", _network(head="regression"), _MUON),
    "refine-1": Ablation("muon", "one refinement stage", _network(refinements=1), _MUON),
    "refine-2": Ablation("refine-1", "two refinement stages", _network(refinements=2), _MUON),
    "inverted": Ablation("muon", "inverted residual blocks", _kind("kpe-t-inverted"), _MUON),
    "reparameterised": Ablation("muon", "re-parameterisable blocks", _kind("kpe-t-rep"), _MUON),
}


def run(name: str, data: Path, shown: Steps) -> dict[str, Any]:
    """Carry a run out, or go on where it was stopped.

    Raises:
        Interrupted: Its state was saved.
    """
    import torch

    from edgepose.blocks.kpe import build
    from edgepose.compress.macs import count_macs
    from edgepose.training.loop import RunOptions, fit

    torch.set_num_threads(THREADS)
    ablation = ABLATIONS[name]
    people = split_train(dataset(data / "lspet", "train"))
    keypoints = people[0].keypoints
    network = build(ablation.network, keypoints, seed=ablation.config.seed)
    macs = count_macs(network, torch.zeros(1, 3, *ablation.network.input_hw)).total
    state = cache_directory() / "ablations" / f"{name}.state"
    state.parent.mkdir(parents=True, exist_ok=True)
    options = RunOptions(state, _Watcher(shown, name))
    result = fit(network, spec_of(ablation.network, keypoints), people, ablation.config, options=options)
    record = {
        "name": name,
        "against": ablation.against,
        "what": ablation.what,
        "architecture": msgspec.to_builtins(ablation.network),
        "config": msgspec.to_builtins(ablation.config),
        "inputs": {"train": people[0].digest, "dev": people[1].digest},
        "macs": macs,
        "curve": list(result.curve),
        "best_epoch": result.best_epoch,
    }
    atomic_json(RECORDS / f"{name}.json", record)
    state.unlink(missing_ok=True)
    return record


class _Watcher:
    def __init__(self, shown: Steps, name: str) -> None:
        self._shown, self._name = shown, name

    def cutting(self, done: int, total: int) -> None:
        self._shown.told(f"{self._name}: reading", done, total)

    def step(self, done: int, total: int, loss: float) -> None:
        self._shown.told(f"{self._name}: training", done, total, f"loss {loss:.3f}")

    def epoch(self, row: dict[str, float]) -> None:
        note(f"{self._name}: epoch {row['epoch'] + 1:.0f}, {SHOWN[0]} {100 * row[SHOWN[0]]:.2f}")


def table(records: dict[str, dict[str, Any]]) -> str:
    """The records as a Markdown table: figures on dev in points, and what the change bought."""
    head = ["run", "what changes", "MMAC", *SHOWN, f"{SHOWN[0]} against"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in ABLATIONS:
        if name not in records:
            continue
        record = records[name]
        best = record["curve"][record["best_epoch"]]
        base = records.get(record["against"])
        gain = "–"
        if base is not None:
            theirs = base["curve"][base["best_epoch"]][SHOWN[0]]
            gain = f"{100 * (best[SHOWN[0]] - theirs):+.1f} ({record['against']})"
        figures = [f"{100 * best[metric]:.1f}" for metric in SHOWN]
        lines.append("| " + " | ".join([name, record["what"], f"{record['macs'] / 1e6:.0f}", *figures, gain]) + " |")
    return "\n".join(lines) + "\n"


def kept() -> dict[str, dict[str, Any]]:
    """The records there are, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RECORDS.glob("*.json"))}


@command
def main() -> int:
    """Runs what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="ablations.py", description="What each choice buys, on short runs.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"out of {', '.join(ABLATIONS)} (default: all without a record)"
    )
    parser.add_argument("--table", action="store_true", help="print the table of the records there are, and stop")
    options = parser.parse_args()
    if options.table:
        if options.names:
            parser.error("--table shows all records there are: leave the names off")
        print(table(kept()), end="")
        return 0
    for name in options.names:
        if name not in ABLATIONS:
            fix = did_you_mean(name, tuple(ABLATIONS))
            raise UsageError(name, found="no such run", expected=f"one of {', '.join(ABLATIONS)}", fix=fix)
    for name in options.names or [name for name in ABLATIONS if name not in kept()]:
        with steps() as shown:
            run(name, data_root(), shown)
    print(table(kept()), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
