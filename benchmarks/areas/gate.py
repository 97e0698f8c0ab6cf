"""The gate: does it cry wolf, does it sleep, does it say truly what it can see, and how long does it take?

Invariant: of latency gates some are fresh, measured in this run; all the others are recomputed from the rounds that
`benchmarks/gate_selftest.py` put on record, never copied from a verdict.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.claim import Claim, Measured
from benchmarks.context import Context
from benchmarks.subjects import METRIC, bundle_record, compiled, torch_record, val_people
from edgepose.blocks.zoo import find_checkpoint
from edgepose.errors import DataUnavailable

_FRESH = 20
_NULL_DRAWS, _REPLICATES = 300, 200
_REPOSITORY = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------------------------------------- latency


def latency_share(kind: str, outcome: str, *, share: bool) -> Callable[[Context], Measured]:
    """How many of a kind's gates, or which share of them, end so: those on record and fresh ones."""

    def measure(context: Context) -> Measured:
        found = _gates(context, kind)
        hits = found["outcomes"].get(outcome, 0)
        value = hits / found["gates"] if share else float(hits)
        return Measured(value, found["text"], found)

    return measure


def _gates(context: Context, kind: str) -> dict[str, Any]:
    from benchmarks import gate_selftest
    from edgepose.profiler.gate.rules import load_rules

    def work() -> dict[str, Any]:
        rule = load_rules("default").latency
        assert rule is not None
        recorded = gate_selftest.read_gates(gate_selftest.RECORDS / f"{kind}.jsonl")[1]
        fresh = _fresh(context, kind) if kind in ("aa", "slower5") else []
        gates = [*recorded, *fresh]
        if not gates:
            fix = f"run: python benchmarks/gate_selftest.py {kind}"
            raise DataUnavailable(f"gates of {kind}", found="none on record", expected="some", fix=fix)
        outcomes: dict[str, int] = {}
        for gate in gates:
            said = gate_selftest.verdict_of(gate, rule)
            outcomes[said] = outcomes.get(said, 0) + 1
        counts = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
        text = f"{len(gates)} gates, {len(fresh)} of them fresh: {counts}"
        return {"outcomes": outcomes, "gates": len(gates), "fresh": len(fresh), "text": text}

    return context.once(f"gates {kind}", work)


def _fresh(context: Context, kind: str) -> list[Any]:
    from benchmarks import gate_selftest
    from edgepose.profiler.gate.rules import load_rules

    rule = load_rules("default").latency
    assert rule is not None
    arms = gate_selftest.arms_of(kind, _network(context), context.folder)  # type: ignore[arg-type]
    gates = []
    with gate_selftest.loaded():
        for number in range(_FRESH):
            context.told(f"fresh gates of {kind}", number, _FRESH)
            gates.append(gate_selftest.measure(arms, rule, 10_000 + number))
    return gates


def _network(context: Context) -> Path:
    from benchmarks.gate_selftest import network_of

    def work() -> Path:
        folder = context.folder / "gated"
        folder.mkdir()
        return network_of(folder)

    return context.once("gated network", work)


def cell_seconds(context: Context) -> Measured:
    """Seconds of one latency gate of the engine against itself, with nothing beside it."""
    from benchmarks import gate_selftest
    from edgepose.profiler.gate.rules import load_rules

    rule = load_rules("default").latency
    assert rule is not None
    context.told("one latency cell", 0, 1)
    gate = gate_selftest.measure(gate_selftest.arms_of("aa", _network(context), context.folder), rule, 20_000)
    pairs = len(gate.sample) + len(gate.confirmation)
    return Measured(gate.seconds, f"{gate.seconds:.0f} s for {pairs} pairs of processes", {"pairs": pairs})


# ------------------------------------------------------------------------------------------------------------ accuracy


def accuracy_null(context: Context) -> Measured:
    """FAILs among draws in which FP32 and INT8 predictions change places at random: there is nothing to find."""
    from benchmarks.gate_accuracy import outcomes, swapped

    first, second = _float_record(context), _int8_record(context, "prune-qat-int8")
    said = outcomes(
        lambda rng: swapped(first, second, rng), val_people(context).keypoints, _rule(), _NULL_DRAWS,
        context.step("arms that change places"),
    )  # fmt: skip
    return Measured(said.count("fail"), _in_words(said), {"outcomes": _counts(said)})


def accuracy_pass_share(context: Context) -> Measured:
    """Share of PASS for FP32 against the same network quantised after training, people drawn anew."""
    from benchmarks.gate_accuracy import drawn_again, outcomes

    first, second = _float_record(context), _int8_record(context, "ptq-int8")
    said = outcomes(
        lambda rng: drawn_again(first, second, rng), val_people(context).keypoints, _rule(), _REPLICATES,
        context.step("people drawn anew"),
    )  # fmt: skip
    return Measured(said.count("pass") / len(said), _in_words(said), {"outcomes": _counts(said)})


def power_prediction(context: Context) -> Measured:
    """Largest difference between how often injected losses are found and how often the gate says it would find them."""
    from benchmarks import gate_accuracy as trial
    from edgepose.profiler.gate.judge import judge_accuracy

    base, keypoints, rule = _float_record(context), val_people(context).keypoints, _rule()
    rng, joint = np.random.default_rng(1), trial.joint_of_most(base)
    spoilt = {f"joint {keypoints.names[joint]} lost for {share:.0%}": trial.without_joint(base, joint, share, rng)
              for share in (0.1, 0.3)}  # fmt: skip
    spoilt |= {f"least sure {share:.0%} lost": trial.without_unsure(base, share) for share in (0.01, 0.04)}
    spoilt |= {f"noise of {sigma:g} on the weights": _noisy_record(context, sigma) for sigma in (0.05, 0.1)}
    rows = {}
    for name, record in spoilt.items():
        predicted = trial.predicted_power(judge_accuracy(base, record, keypoints, rule), rule)
        redrawn = partial(_drawn_again, base, record)
        said = trial.outcomes(redrawn, keypoints, rule, _REPLICATES, context.step(f"power: {name}"))
        rows[name] = {"predicted": predicted, "observed": said.count("fail") / len(said)}
    worst = max(abs(row["predicted"] - row["observed"]) for row in rows.values())
    text = "; ".join(f"{name}: said {r['predicted']:.2f}, found {r['observed']:.2f}" for name, r in rows.items())
    return Measured(worst, text, {"losses": rows})


def _drawn_again(base: Any, record: Any, rng: np.random.Generator) -> Any:
    from benchmarks.gate_accuracy import drawn_again

    return drawn_again(base, record, rng)


def _float_record(context: Context) -> Any:
    return torch_record(context, find_checkpoint("kpe-s"))


def _int8_record(context: Context, recipe: str) -> Any:
    return bundle_record(context, compiled(context, "kpe-s", recipe), "onnxruntime")


def _noisy_record(context: Context, sigma: float) -> Any:
    from benchmarks.context import THREADS
    from benchmarks.copies import disturb
    from edgepose.estimator import PoseEstimator
    from edgepose.profiler.accuracy import evaluate
    from edgepose.runtime import open_session

    bundle = compiled(context, "kpe-s", "fp32")
    network = context.folder / f"noisy-{sigma}.onnx"
    disturb(bundle.root / bundle.manifest.model, sigma, network)
    with PoseEstimator(open_session(network, "onnxruntime", threads=THREADS), bundle.manifest.spec) as estimator:
        return evaluate(estimator, val_people(context), progress=context.step(f"predicting with noise of {sigma:g}"))


def _rule() -> Any:
    from edgepose.profiler.gate.rules import load_rules

    return next(rule for rule in load_rules("default").accuracy if rule.metric == METRIC)


def _counts(said: list[str]) -> dict[str, int]:
    return {outcome: said.count(outcome) for outcome in sorted(set(said))}


def _in_words(said: list[str]) -> str:
    return f"{len(said)} draws: {', '.join(f'{name} {count}' for name, count in _counts(said).items())}"


# ---------------------------------------------------------------------------------------------------------- exit codes


def exit_codes(context: Context) -> Measured:
    """Published exit codes that a test produces through the command line."""
    context.told("producing every exit code", 0, 1)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider"]
    command += [f"tests/cli/{test}" for test in EXIT_TESTS.values()]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=_REPOSITORY, check=False)
    passed = set(re.findall(r"^PASSED tests/cli/(\S+?)(?:\[|$)", ran.stdout, re.MULTILINE))
    failed = set(re.findall(r"^(?:FAILED|ERROR) tests/cli/(\S+?)(?:\[| |$)", ran.stdout, re.MULTILINE))
    produced = [code for code, test in EXIT_TESTS.items() if test in passed - failed]
    missing = sorted(set(EXIT_TESTS) - set(produced))
    absent = f"; not {', '.join(map(str, missing))}" if missing else ""
    return Measured(len(produced), f"codes {', '.join(map(str, produced))}{absent}", {"produced": produced})


EXIT_TESTS = {
    0: "test_run.py::test_photograph_gives_a_drawing_and_json",
    1: "test_main.py::test_unexpected_error_is_one_line_that_says_how_to_see_more",
    2: "test_run.py::test_bad_photograph",
    3: "test_verbs.py::test_gate_exits_3_for_a_worse_candidate",
    4: "test_gate.py::test_growth_alone_exits_4_and_is_the_first_row_of_the_table",
    5: "test_verbs.py::test_verify_notices_an_engine_that_answers_differently",
    6: "test_run.py::test_full_disk_exits_6_and_leaves_nothing",
    7: "test_gate.py::test_undecided_exits_7_and_every_file_says_so",
    8: "test_run.py::test_bundle_with_one_byte_changed_exits_8",
    130: "test_main.py::test_ctrl_c_exits_130_with_one_line",
}
"""Exit code → the test in tests/cli that runs the command line until it ends so."""


def _latency(name: str, unit: str, bar: str, question: str, counted: tuple[str, str]) -> Claim:
    measure = latency_share(*counted, share=unit == "share")
    return Claim(f"gate.{name}", unit, bar, question, measure, needs=())


CLAIMS = (
    _latency("aa_fail", "FAILs", "== 0", "gates of an engine against itself", ("aa", "fail")),
    _latency("aa_pass_share", "share", ">= 0.9", "PASSes of the same", ("aa", "pass")),
    _latency("power_5pct", "share", ">= 0.95", "FAILs of a copy that is 5 % slower", ("slower5", "fail")),
    _latency("power_10pct", "share", ">= 1.0", "FAILs of a copy that is 10 % slower", ("slower10", "fail")),
    _latency("pass_at_3pct", "PASSes", "== 0", "plain PASSes of a copy that is 3 % slower", ("slower3", "pass")),
    Claim("gate.accuracy_null_fail", "FAILs", "== 0", "arms that change places at random", accuracy_null),
    Claim("gate.accuracy_pass_share", "share", ">= 0.8", "PASSes of FP32 against PTQ", accuracy_pass_share),
    Claim("gate.power_prediction_error", "share", "<= 0.15", "said against found power", power_prediction),
    Claim("gate.cell_s", "s", "<= 60", "one latency cell", cell_seconds, needs=()),
    Claim("gate.exit_codes", "codes", f">= {len(EXIT_TESTS)}", "exit codes that tests produce", exit_codes, needs=()),
)
