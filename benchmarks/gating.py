"""Running `edgepose gate` as a user does: in a process of its own, judged by its exit code.

Invariant: an exit code is returned only together with the verdict that explains it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from benchmarks.context import THREADS, Context
from benchmarks.subjects import lspet
from edgepose.errors import EdgeposeError
from edgepose.profiler.gate.files import verdict_from_json
from edgepose.profiler.gate.verdict import Verdict

_REPOSITORY = Path(__file__).resolve().parents[1]
_LIMIT_S = 1200.0


@dataclass(frozen=True, slots=True)
class Gated:
    """How a gate ended.

    Attributes:
        exit_code: Of the process.
        verdict: What it wrote.
    """

    exit_code: int
    verdict: Verdict

    @property
    def facts(self) -> dict[str, object]:
        """The verdict without its tables."""
        found = self.verdict
        return {
            "exit_code": self.exit_code,
            "verdict": found.verdict,
            "reasons": list(found.reasons),
            "accuracy": msgspec.to_builtins(found.accuracy),
            "latency": msgspec.to_builtins(found.latency),
        }

    @property
    def text(self) -> str:
        """One line for people."""
        parts = [f"exit {self.exit_code}, {self.verdict.verdict}"]
        parts += [check.text for check in (self.verdict.accuracy, self.verdict.latency) if check is not None]
        return "; ".join(parts)


def gate(context: Context, base: Path, candidate: Path, name: str) -> Gated:
    """Gates one bundle against another on lspet val.

    Args:
        context: This run.
        base: The baseline.
        candidate: What wants to replace it.
        name: What to call the comparison; names the file that the verdict is written to.

    Raises:
        EdgeposeError: The gate gave no verdict.
    """
    written = context.folder / f"{name}.json"
    command = [sys.executable, "-m", "edgepose", "gate", str(base), str(candidate), "--data", str(lspet(context))]
    command += ["--rules", context.effort.rules, "--threads", str(THREADS), "--json", str(written)]
    path = os.pathsep.join(filter(None, (str(_REPOSITORY), os.environ.get("PYTHONPATH"))))
    context.told(f"gating {name}", 0, 1)
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=_LIMIT_S, check=False
    )
    context.told(f"gating {name}", 1, 1)
    where = f"edgepose gate ({name})"
    if not written.is_file():
        said = " ".join(done.stderr.split())[-400:]
        raise EdgeposeError(where, found=f"exit code {done.returncode} and no verdict, saying: {said}")
    verdict = verdict_from_json(written.read_bytes())
    if verdict.exit_code != done.returncode:
        raise EdgeposeError(where, found=f"exit code {done.returncode}", expected=f"the verdict's {verdict.exit_code}")
    return Gated(done.returncode, verdict)
