"""`python benchmarks/protected.py [NETWORK] [--data DIR]`: what each rule of `compress.protected` is worth.

One calibration set, one rule changed at a time: a protected kind of module is quantised, or a kind of layer that is
quantised stays float. Printed is what that does to the accuracy on dev, of the fake-quantised network, and to the time
of one inference in each backend, beside the network that keeps all rules.

Invariant: figures are of `dev`, never of val; all variants have the same people, in calibration and in measuring.

Exit codes: 0 done · 2 usage · 6 data or a backend absent · 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # instead of this folder, whose files are the package `benchmarks`

import msgspec  # noqa: E402

from benchmarks.claims import data_root  # noqa: E402
from benchmarks.command import command  # noqa: E402
from benchmarks.context import THREADS  # noqa: E402
from edgepose.blocks.zoo import find_checkpoint  # noqa: E402
from edgepose.cli.console import note, show_table  # noqa: E402
from edgepose.data.coco import PoseDataset, dataset  # noqa: E402
from edgepose.data.splits import split_train  # noqa: E402
from edgepose.errors import EdgeposeError  # noqa: E402
from edgepose.runtime import open_session  # noqa: E402
from edgepose.spec import Backend, ModelSpec  # noqa: E402
from edgepose.stages.precisions import Timer  # noqa: E402
from edgepose.storage import atomic_json  # noqa: E402
from edgepose.timing.record import LatencyProtocol, ModelArm  # noqa: E402
from edgepose.timing.turns import time_in_turns  # noqa: E402

BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")
METRICS = ("pck_torso_0.2", "pck_torso_0.1")
_PROTOCOL = LatencyProtocol(pairs=3, blocks=20, dropped_blocks=5, warm_up_ms=300.0, threads=THREADS)


@dataclass(frozen=True, slots=True)
class Variant:
    """A network with one rule changed; the first of a list keeps all.

    Attributes:
        rule: Its name; "" for the network that keeps all rules.
        change: What is done to the rule's parts.
        parts: How many modules they are; 0 where the rule is about values.
        unprotected: Rules to break, as in `QuantiseConfig`.
        protected: Modules to keep float, as in `QuantiseConfig`.
    """

    rule: str
    change: Literal["all rules", "quantised", "kept float"]
    parts: int = 0
    unprotected: tuple[str, ...] = ()
    protected: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Worth:
    """What came of a variant.

    Attributes:
        variant: What was changed.
        figures: Its accuracy on dev, by metric.
        change_points: The same less that of the network that keeps all rules, in points.
        times: Time of one inference over that network's, with its 95 % bounds, by backend.
        refused: Why there is no engine, by backend.
    """

    variant: Variant
    figures: dict[str, float]
    change_points: dict[str, float]
    times: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def row(self, backends: Sequence[Backend]) -> tuple[str, ...]:
        """Cells under `columns`."""
        if not self.variant.rule:
            points = [f"{100 * self.figures[name]:.2f}" for name in METRICS if name in self.figures]
            return ("all rules", "", "", *points, *("1" for _ in backends))
        points = [f"{self.change_points[name]:+.2f}" for name in METRICS if name in self.change_points]
        cells = [self._time(backend) for backend in backends]
        return (self.variant.rule, str(self.variant.parts or ""), self.variant.change, *points, *cells)

    def _time(self, backend: Backend) -> str:
        if backend in self.refused:
            return "does not run"
        if backend not in self.times:
            return "–"
        ratio, low, high = self.times[backend]
        return f"{ratio:.3f} ({low:.3f} to {high:.3f})"


def columns(figures: dict[str, float], backends: Sequence[Backend]) -> tuple[str, ...]:
    """Heads of the table."""
    return ("rule", "parts", "instead", *(f"{name}, points" for name in METRICS if name in figures), *backends)


def variants(network: Any) -> tuple[Variant, ...]:
    """What can be changed about a network: rules whose parts it has."""
    from edgepose.compress.protected import CONSIDERED, OUTPUTS, PROTECTED, protected_parts

    found = [Variant("", "all rules")]
    for entry in PROTECTED:
        others = tuple(other.name for other in PROTECTED if other is not entry)
        parts = protected_parts(network, without=others)
        if parts:
            found.append(Variant(entry.name, "quantised", len(parts), unprotected=(entry.name,)))
    found.append(Variant(OUTPUTS, "quantised", unprotected=(OUTPUTS,)))
    for layer in CONSIDERED:
        members = layer.members(network)
        if members:
            found.append(Variant(layer.name, "kept float", len(members), protected=members))
    return tuple(found)


@dataclass(frozen=True, slots=True, eq=False)
class Bench:
    """What variants are measured with.

    Attributes:
        network: The float network, folded.
        spec: Its specification.
        calibration: Batches (B, 3, h, w) float32, of training people.
        dev: The people that are measured.
        backends: Whose time is measured; none measures accuracy alone.
        folder: Where files go.
    """

    network: Any
    spec: ModelSpec
    calibration: list[Any]
    dev: PoseDataset
    backends: tuple[Backend, ...]
    folder: Path


def open_bench(path: Path, people: tuple[PoseDataset, PoseDataset], backends: tuple[Backend, ...], out: Path) -> Bench:
    """Load a checkpoint and cut its calibration crops.

    Args:
        path: The checkpoint, a float one.
        people: Those to calibrate on, and those to measure.
        backends: Whose time is measured.
        out: Where files go.
    """
    import torch

    from edgepose.compress.fold import fold_batch_norms
    from edgepose.stages.networks import load_network
    from edgepose.training.batches import to_input
    from edgepose.training.predict import cut_crops

    torch.set_num_threads(THREADS)
    network, checkpoint = load_network(path)
    spec, pixels = checkpoint.card.spec, torch.from_numpy(cut_crops(people[0], checkpoint.card.spec).pixels)
    calibration = [to_input(part, spec).contiguous() for part in pixels.split(32)]
    return Bench(fold_batch_norms(network), spec, calibration, people[1], backends, out)


def measure(bench: Bench, timer: Timer = time_in_turns) -> tuple[Worth, ...]:
    """All variants, the one that keeps all rules first."""
    found: list[Worth] = []
    files: list[Path] = []
    for number, variant in enumerate(variants(bench.network)):
        note(f"{variant.rule or 'all rules'}: {variant.change}")
        path = bench.folder / f"variant{number}.onnx"
        figures = _quantised(bench, variant, path)
        base = found[0].figures if found else figures
        changes = {name: 100 * (figures[name] - base[name]) for name in METRICS if name in figures}
        found.append(Worth(variant, figures, changes))
        files.append(path)
    for backend in bench.backends:
        found = _timed(found, files, backend, timer)
    return tuple(found)


def _quantised(bench: Bench, variant: Variant, path: Path) -> dict[str, float]:
    """Writes the variant's Q/DQ file; returns the fake-quantised network's accuracy on dev."""
    from edgepose.compress.quantise import QuantiseConfig, convert, prepare
    from edgepose.export.onnx import onnx_from_torch
    from edgepose.export.qdq import quantised_onnx
    from edgepose.training.loop import dev_metrics
    from edgepose.training.predict import cut_crops, predict

    images = sum(len(batch) for batch in bench.calibration)
    config = QuantiseConfig(protected=variant.protected, unprotected=variant.unprotected, subset_size=images)
    wrapped = prepare(bench.network, bench.calibration, config)
    plain, ranges = convert(wrapped)
    before = path.with_suffix(".float.onnx")
    onnx_from_torch(plain, bench.spec, before, ranges=ranges)
    quantised_onnx(before, ranges, path, dialect="u8s8")
    crops = cut_crops(bench.dev, bench.spec)
    return dev_metrics(predict(wrapped, bench.spec, crops), crops)


def _timed(found: list[Worth], files: Sequence[Path], backend: Backend, timer: Timer) -> list[Worth]:
    """Adds the times in a backend: all that it runs take turns."""
    refused: dict[int, str] = {}
    for number, path in enumerate(files):
        try:
            open_session(path, backend, threads=1, precision="int8").close()
        except EdgeposeError as err:
            refused[number] = str(err)
    running = [number for number in range(len(files)) if number not in refused]
    marked = list(found)
    for number, reason in refused.items():
        marked[number] = replace(found[number], refused={**found[number].refused, backend: reason})
    if 0 in refused or len(running) < 2:
        return marked
    arms = [ModelArm(f"{n}: {found[n].variant.rule}", str(files[n]), backend, "int8") for n in running]
    turns = timer(arms, _PROTOCOL, first_group=0)
    for place, number in enumerate(running):
        if number:
            pair = turns.between(0, place)
            marked[number] = replace(marked[number], times={**marked[number].times, backend: (pair.ratio, *pair.ci95)})
    return marked


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(prog="protected.py", description="What each rule of compress.protected is worth.")
    parser.add_argument("network", nargs="?", default="kpe-t", help="zoo network or checkpoint (default: kpe-t)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="labelled people (default: lspet)")
    parser.add_argument("--images", type=int, default=300, metavar="N", help="calibration people (default: 300)")
    parser.add_argument("--dev", type=int, metavar="N", help="measure a sample of dev instead of all")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="whose time (default: both)")
    parser.add_argument("--no-time", action="store_true", help="accuracy alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to this file")
    options = parser.parse_args(arguments)
    if options.no_time and options.backend:
        parser.error("--no-time times nothing: leave --backend off")
    backends: tuple[Backend, ...] = () if options.no_time else tuple(options.backend or BACKENDS)
    train, dev = split_train(dataset(options.data or data_root() / "lspet", "train"))
    people = (train.sample(options.images, 0), dev if options.dev is None else dev.sample(options.dev, 0))
    with tempfile.TemporaryDirectory(prefix="edgepose-protected-") as folder:
        found = measure(open_bench(find_checkpoint(options.network), people, backends, Path(folder)))
    show_table(columns(found[0].figures, backends), [worth.row(backends) for worth in found])
    for worth in found:
        for backend, reason in worth.refused.items():
            print(f"{worth.variant.rule} in {backend}: {reason}")
    if options.json is not None:
        atomic_json(options.json, msgspec.to_builtins(list(found)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
