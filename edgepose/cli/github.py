"""What a verdict looks like in GitHub Actions: annotations beside the pull request, the step's summary, its outputs.

Invariant: what GitHub reads back (summary, outputs) is appended to, as its documentation asks; nothing of a bundle's
name reaches a workflow command unescaped.
"""

from __future__ import annotations

import os
from pathlib import Path

from edgepose.cli.console import annotate
from edgepose.errors import UsageError
from edgepose.profiler.gate.table import annotations_from_verdict, markdown_from_verdict
from edgepose.profiler.gate.verdict import Verdict
from edgepose.storage import storage_faults_at

_SUMMARY, _OUTPUT = "GITHUB_STEP_SUMMARY", "GITHUB_OUTPUT"


def require_github() -> None:
    """Refuses to publish where there is nothing to publish to.

    Raises:
        UsageError: This is no step of a GitHub workflow.
    """
    if not os.environ.get(_SUMMARY):
        fix = "leave --github off, or take --markdown FILE"
        raise UsageError("--github", found=f"no {_SUMMARY}", expected="a step of a GitHub workflow", fix=fix)


def annotate_verdict(verdict: Verdict) -> None:
    """One annotation per check that is not a plain pass; says nothing outside of GitHub Actions."""
    for level, title, text in annotations_from_verdict(verdict):
        annotate(level, title, text)


def publish_verdict(verdict: Verdict) -> None:
    """Annotations, a Markdown summary of the step, and its outputs `verdict` and `exit-code`.

    Raises:
        UsageError: This is no step of a GitHub workflow.
        StorageError: Disk full, read-only or no permission.
    """
    require_github()
    annotate_verdict(verdict)
    _append(os.environ[_SUMMARY], markdown_from_verdict(verdict) + "\n")
    if path := os.environ.get(_OUTPUT):
        _append(path, f"verdict={verdict.verdict}\nexit-code={verdict.exit_code}\n")


def _append(path: str, text: str) -> None:
    with storage_faults_at(path), Path(path).open("a", encoding="utf-8") as file:
        file.write(text)
