"""A pytest plugin: the fixture `edgepose_gate` fails a test when a candidate is worse than its baseline.

    def test_the_new_bundle_may_replace_the_old_one(edgepose_gate):
        edgepose_gate("base.bundle", "candidate.bundle", data="lspet", rules="ci-quick")

`--edgepose-gate-out DIR` keeps every verdict as JSON, JUnit, SARIF and Markdown.

Invariant: importing this imports pytest and nothing heavier, since pytest loads it in every project that has edgepose
installed; and an undecided gate fails its test, as it ends the program with an error code.
"""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from edgepose.profiler.gate.rules import GateRules
    from edgepose.profiler.gate.run import GateOptions
    from edgepose.profiler.gate.verdict import Verdict

_OUT = "edgepose_gate_out"
_verdicts: pytest.StashKey[list[tuple[str, list[str]]]] = pytest.StashKey()


class GateWarning(UserWarning):
    """A gate passed with a warning."""


class EdgeposeGate:
    """What the fixture `edgepose_gate` gives: call it to gate a candidate.

    Args:
        request: The test that gates.
    """

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._node, self._config = request.node, request.config
        self._count = 0

    def __call__(
        self,
        baseline: str | os.PathLike[str],
        candidate: str | os.PathLike[str],
        *,
        data: str | os.PathLike[str] | None = None,
        rules: str | GateRules = "default",
        options: GateOptions | None = None,
    ) -> Verdict:
        """Fails the test unless the candidate may replace the baseline; a warning becomes a `GateWarning`.

        Args:
            baseline: Directory of the bundle that is good enough.
            candidate: Directory of the bundle that wants to replace it.
            data: Folder with val.json and images/; needed where the rules ask for accuracy.
            rules: Name or file of the gate's rules, or the rules themselves.
            options: Engine, threads, seed; None takes the defaults.

        Returns:
            The verdict, which is pass or warn.

        Raises:
            EdgeposeError: The two could not be compared at all.
        """
        verdict = self.verdict(baseline, candidate, data=data, rules=rules, options=options)
        if verdict.exit_code:
            from edgepose.profiler.gate.files import lines_from_verdict

            pytest.fail("\n".join(lines_from_verdict(verdict)), pytrace=False)
        for reason in verdict.reasons:
            warnings.warn(reason, GateWarning, stacklevel=2)
        return verdict

    def verdict(
        self,
        baseline: str | os.PathLike[str],
        candidate: str | os.PathLike[str],
        *,
        data: str | os.PathLike[str] | None = None,
        rules: str | GateRules = "default",
        options: GateOptions | None = None,
    ) -> Verdict:
        """The verdict whatever it is, for tests that judge themselves; arguments as above.

        Raises:
            EdgeposeError: The two could not be compared at all.
        """
        from edgepose.data.coco import dataset
        from edgepose.profiler.gate.rules import load_rules
        from edgepose.profiler.gate.run import run_gate

        loaded = load_rules(rules) if isinstance(rules, str) else rules
        if loaded.latency is not None and hasattr(self._config, "workerinput"):
            pytest.fail(
                f"gate rules {loaded.name} time engines, and pytest-xdist runs other tests beside them: "
                "run such tests with -n 0, or take rules with latency: null",
                pytrace=False,
            )
        people = None if data is None else dataset(Path(data), "val")
        verdict = run_gate(baseline, candidate, people, loaded, options=options).verdict
        self._keep(verdict)
        return verdict

    def _keep(self, verdict: Verdict) -> None:
        """Into pytest's own JUnit file, the summary at the end, and the folder that was asked for."""
        from edgepose.profiler.gate.files import json_from_verdict, junit_from_verdict, lines_from_verdict
        from edgepose.profiler.gate.sarif import sarif_from_verdict
        from edgepose.profiler.gate.table import markdown_from_verdict
        from edgepose.storage import atomic_write

        self._count += 1
        self._node.user_properties.append(("edgepose_gate", f"{verdict.verdict} ({verdict.exit_code})"))
        self._config.stash[_verdicts].append((self._node.nodeid, lines_from_verdict(verdict)))
        folder = self._config.getoption(_OUT)
        if folder is None:
            return
        name = re.sub(r"[^\w.-]+", "-", self._node.nodeid)[-120:].strip("-.") + f"-{self._count}"
        for ending, content in (
            ("json", json_from_verdict(verdict)),
            ("xml", junit_from_verdict(verdict)),
            ("sarif", sarif_from_verdict(verdict)),
            ("md", markdown_from_verdict(verdict).encode()),
        ):
            atomic_write(Path(folder, f"{name}.{ending}"), content)


@pytest.fixture
def edgepose_gate(request: pytest.FixtureRequest) -> EdgeposeGate:
    """Compares two bundles and fails the test when the candidate is worse, or when that cannot be decided."""
    return EdgeposeGate(request)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--edgepose-gate-out`."""
    group = parser.getgroup("edgepose")
    group.addoption("--edgepose-gate-out", dest=_OUT, metavar="DIR", help="keep every verdict of edgepose_gate here")


def pytest_configure(config: pytest.Config) -> None:
    """Makes room for the verdicts of this run."""
    config.stash[_verdicts] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Shows every verdict at the end of the run, also of tests that passed."""
    found = config.stash[_verdicts]
    if found:
        terminalreporter.section("edgepose gate")
    for node, lines in found:
        terminalreporter.write_line(node)
        for line in lines:
            terminalreporter.write_line(f"  {line}")
