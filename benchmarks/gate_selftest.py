"""`python benchmarks/gate_selftest.py [KIND …] [--gates N]`: does the latency gate cry wolf, does it sleep?

Gates an engine against itself, and against copies with real extra work in their graph, while another process makes
load. Hundreds of gates take hours, so that each is on record when it is done (benchmarks/gates/KIND.jsonl) and a second
start goes on behind the last one. What is kept of a gate are the log-ratios of every round of every pair of processes:
the verdict is computed from these, here and by `claims.py gate`, and can be computed again under other rules.

Invariant: records are only appended to; a gate that was interrupted leaves none. Engines, rules and machine are in the
head of each file, and gates under other ones are refused instead of mixed in.

Exit codes: 0 done · 2 usage · 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

REPOSITORY = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)  # instead of this folder, whose files are the package `benchmarks`

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from benchmarks.command import command  # noqa: E402
from edgepose import stats  # noqa: E402
from edgepose.cli.console import steps  # noqa: E402
from edgepose.errors import EnvironmentFault, IntegrityError, UsageError  # noqa: E402
from edgepose.host import fingerprint  # noqa: E402
from edgepose.profiler.gate.judge import latency_zone  # noqa: E402
from edgepose.profiler.gate.rules import LatencyRule, load_rules, protocol_of  # noqa: E402
from edgepose.profiler.gate.run import gather_latency  # noqa: E402
from edgepose.storage import atomic_write, json_line  # noqa: E402
from edgepose.timing.pairs import compare_latency  # noqa: E402
from edgepose.timing.record import LatencyComparison, LatencyProtocol, ModelArm  # noqa: E402

Kind = Literal["aa", "slower3", "slower5", "slower10"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SLOWER: dict[Kind, float] = {"aa": 0.0, "slower3": 0.03, "slower5": 0.05, "slower10": 0.10}
GATES: dict[Kind, int] = {"aa": 300, "slower3": 60, "slower5": 100, "slower10": 60}
RECORDS = Path(__file__).resolve().parent / "gates"

_THREADS = 1
_PLACES = 5  # decimals of a log-ratio: a thousandth of a per cent
_CALIBRATION = LatencyProtocol(pairs=4, blocks=40, dropped_blocks=10, threads=_THREADS)
_NEAR = 0.005
_SETTLE_S = 1.0


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One gate on record.

    Attributes:
        number: Its number; also the seed of its random orders.
        seconds: How long it took.
        sample: Log-ratios (candidate over baseline) of the rounds of each pair that the first verdict came from.
        confirmation: The same of the fresh pairs behind a FAIL; empty where there were none.
        load_average: Of the machine when it ended.
    """

    number: int
    seconds: float
    sample: list[list[float]]
    confirmation: list[list[float]] = []
    load_average: float = -1.0


@dataclass(frozen=True, slots=True)
class Counted:
    """Verdicts of some gates.

    Attributes:
        outcomes: Outcome → how many.
        gates: How many there are.
    """

    outcomes: dict[str, int]
    gates: int

    @property
    def text(self) -> str:
        """In words."""
        parts = ", ".join(f"{name} {count}" for name, count in sorted(self.outcomes.items()))
        return f"{self.gates} gates: {parts}"


def verdict_of(gate: Gate, rule: LatencyRule) -> str:
    """What the rule says of a gate: as `judge_latency`, from the rounds alone."""
    outcome = zone_of(gate.sample, rule, gate.number)
    if outcome != "fail" or not rule.confirm:
        return outcome
    if not gate.confirmation:
        return "inconclusive"
    if _bounds(gate.confirmation, rule, gate.number)[0] > 1 + rule.fail_above:
        return "fail"
    together = zone_of([*gate.sample, *gate.confirmation], rule, gate.number)
    return "inconclusive" if together == "fail" else together


def zone_of(pairs: Sequence[Sequence[float]], rule: LatencyRule, seed: int) -> str:
    """The outcome of one sample: as `judge.latency_zone`."""
    low, high = _bounds(pairs, rule, seed)
    if low > 1 + rule.fail_above:
        return "warn" if high < 1 + rule.pass_below else "fail"
    if high >= 1 + rule.pass_below:
        return "inconclusive"
    return "warn" if np.exp(stats.median_of_medians(_arrays(pairs))) > 1 + rule.fail_above else "pass"


def counted(kind: Kind, rule: LatencyRule, folder: Path = RECORDS) -> Counted:
    """The verdicts of a kind's gates on record."""
    outcomes: dict[str, int] = {}
    gates = read_gates(folder / f"{kind}.jsonl")[1]
    for gate in gates:
        outcome = verdict_of(gate, rule)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return Counted(outcomes, len(gates))


def read_gates(path: Path) -> tuple[dict[str, Any], list[Gate]]:
    """Head and gates of a file; both empty where there is none.

    Raises:
        IntegrityError: A line is none of ours.
    """
    if not path.is_file():
        return {}, []
    lines = path.read_bytes().splitlines()
    try:
        return json.loads(lines[0]), [msgspec.json.decode(line, type=Gate) for line in lines[1:]]
    except (ValueError, msgspec.DecodeError) as err:
        raise IntegrityError(str(path), found=f"a line that is no gate ({err})", expected="a head, then gates") from err


# --------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True, slots=True)
class Arms:
    """What is gated.

    Attributes:
        base: The engine.
        candidate: The engine, or its copy with extra work.
        head: What is written down of them.
    """

    base: ModelArm
    candidate: ModelArm
    head: dict[str, Any]


def arms_of(kind: Kind, network: Path, folder: Path) -> Arms:
    """The two arms of a kind of gate; extra work is fitted to what it costs on this machine.

    Args:
        kind: Which.
        network: The ONNX file of the engine.
        folder: Where the copy goes.

    Raises:
        UsageError: No amount of extra work comes near enough.
    """
    from benchmarks.copies import burden

    base = ModelArm("the engine", str(network), "onnxruntime", "int8")
    head = {"kind": kind, "network": network.name, "threads": _THREADS, "host": fingerprint().digest}
    if kind == "aa":
        return Arms(base, msgspec.structs.replace(base, label="itself"), {**head, "cost": 0.0})
    wanted, tried = 1 + SLOWER[kind], []
    for convolutions in range(1, 40):
        copy = folder / f"slower-{convolutions}.onnx"
        burden(network, convolutions, copy, stride=16)
        arm = ModelArm(f"{convolutions} more convolutions", str(copy), "onnxruntime", "int8")
        ratio = compare_latency(base, arm, _CALIBRATION).ratio
        tried.append(f"{convolutions}: {ratio:.4f}")
        if abs(ratio - wanted) < _NEAR:
            return Arms(base, arm, {**head, "convolutions": convolutions, "cost": ratio - 1})
        if ratio > wanted + _NEAR:
            break
    raise UsageError(f"gate_selftest {kind}", found=f"costs of {', '.join(tried)}", expected=f"one near {wanted:g}")


def measure(arms: Arms, rule: LatencyRule, number: int) -> Gate:
    """One gate, as `edgepose gate` measures it."""
    protocol = protocol_of(rule, threads=_THREADS, batch=1, seed=number)
    started_s = time.monotonic()

    def pairs(first: int, count: int) -> LatencyComparison:
        part = msgspec.structs.replace(protocol, pairs=count)
        return compare_latency(arms.base, arms.candidate, part, first_pair=first)

    sample, again = gather_latency(pairs, rule)
    rounded = [_rounded(found) for found in (sample, again)]
    load = sample.pairs[-1].load_average
    gate = Gate(number, round(time.monotonic() - started_s, 1), rounded[0], rounded[1], round(load, 2))
    assert latency_zone(sample, rule) == zone_of(gate.sample, rule, number)  # what is kept says the same
    return gate


@contextmanager
def loaded() -> Iterator[subprocess.Popen[bytes]]:
    """One process beside the block that multiplies matrices without an end."""
    busy = "import numpy as np\na = np.random.rand(300, 300)\nwhile True: a @ a"
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", busy], env=os.environ | one)
    try:
        time.sleep(_SETTLE_S)
        if process.poll() is not None:
            raise EnvironmentFault("load beside the gates", found="a process that ended", expected="one that is busy")
        yield process
    finally:
        process.kill()
        process.wait()


def append(path: Path, arms: Arms, rule: LatencyRule, gate: Gate) -> None:
    """Puts a gate on record.

    Raises:
        UsageError: The file is of other engines, rules or of another machine.
    """
    head = json.loads(json_line({**arms.head, "rule": rule}))  # as it is read back
    there, gates = read_gates(path)
    same = ("network", "threads", "host", "rule")
    if there and any(there.get(name) != head[name] for name in same):
        differs = next(name for name in same if there.get(name) != head[name])
        fix = "move the file away to begin anew"
        raise UsageError(str(path), found=f"gates under another {differs}", expected="the same", fix=fix)
    path.parent.mkdir(exist_ok=True)
    atomic_write(path, b"".join(map(json_line, [there or head, *gates, gate])))


def _rounded(found: LatencyComparison | None) -> list[list[float]]:
    return [] if found is None else [np.round(pair, _PLACES).tolist() for pair in found.log_ratios()]


def _bounds(pairs: Sequence[Sequence[float]], rule: LatencyRule, seed: int) -> tuple[float, float]:
    """As `judge.decision_bounds`."""
    rounds = _arrays(pairs)
    draws = stats.ratio_draws(rounds, seed=seed)
    interval = stats.ratio_interval(draws, stats.median_of_medians(rounds), alpha=rule.alpha / len(rule.looks))
    return interval.low, interval.high


def _arrays(pairs: Sequence[Sequence[float]]) -> list[NDArray[np.float64]]:
    return [np.array(pair) for pair in pairs]


def network_of(folder: Path) -> Path:
    """The ONNX file of the engine that is gated: the compressed kpe-s.

    Args:
        folder: Where it is made.
    """
    from edgepose.blocks.zoo import find_checkpoint
    from edgepose.stages.export import MODEL, export
    from edgepose.stages.source import Source

    export(Source(find_checkpoint("kpe-s-prune-qat-int8")), 18, folder)
    return folder / MODEL


@command
def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the gates that the command line asks for.

    Args:
        arguments: What follows the script's name; None takes it from the process.

    Returns:
        The exit code.
    """
    import tempfile

    parser = argparse.ArgumentParser(prog="gate_selftest.py", description="Does the gate cry wolf, does it sleep?")
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], metavar="KIND", help=", ".join(KINDS))
    parser.add_argument("--gates", type=int, metavar="N", help="have so many on record (default: as claimed)")
    parser.add_argument("--table", action="store_true", help="count the verdicts on record, and stop")
    options = parser.parse_args(arguments)
    rules = load_rules("default").latency
    assert rules is not None
    kinds: Sequence[Kind] = options.kinds or KINDS
    if options.table:
        for kind in kinds:
            print(f"{kind:<9} {counted(kind, rules).text}")
        return 0
    with tempfile.TemporaryDirectory(prefix="edgepose-gates-") as folder, steps() as shown:
        network = network_of(Path(folder))
        for kind in kinds:
            wanted = options.gates or GATES[kind]
            path = RECORDS / f"{kind}.jsonl"
            done = len(read_gates(path)[1])
            if done >= wanted:
                continue
            arms = arms_of(kind, network, Path(folder))  # fitted while nothing else runs
            with loaded():
                for number in range(done, wanted):
                    shown.told(f"gating: {kind}", number, wanted)
                    append(path, arms, rules, measure(arms, rules, number))
            shown.told(f"gating: {kind}", wanted, wanted)
    for kind in kinds:
        print(f"{kind:<9} {counted(kind, rules).text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
