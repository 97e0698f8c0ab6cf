"""`edgepose verify`: is a bundle what was written, and do its engines still answer what they answered then?

Invariant: every byte is hashed before any engine is loaded, and an engine that could not be run is named, never passed
over.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from edgepose.bundle import Bundle, verify_bundle
from edgepose.cli.console import STDOUT, note, say, show_table, steps, write_json
from edgepose.cli.options import (
    BackendFlag,
    DeviceFlag,
    ProviderFlag,
    StdoutJsonFlag,
    StrictFlag,
    ThreadsFlag,
    checked_backend,
    checked_execution,
)
from edgepose.engines import engines_of, open_engine
from edgepose.errors import BackendUnavailable, EnvironmentFault, IntegrityError, ParityError
from edgepose.golden import KEYPOINTS, check_golden
from edgepose.runtime import SessionFacts, facts_of
from edgepose.runtime.provenance import ForeignEngine
from edgepose.spec import Engine, Execution

EXAMPLES = (
    "edgepose verify kpe-s.bundle",
    "edgepose verify kpe-s.bundle --provider cuda --strict",
    "edgepose verify kpe-s.bundle --hashes-only",
    "edgepose verify kpe-s.bundle --kit golden",
    "edgepose verify kpe-s.bundle --json",
)

_WORDS = {
    "same": "answers as recorded",
    "different": "ANSWERS DIFFERENTLY",
    "unknown": "runs, nothing to compare with",
    "not run": "not run here",
}


@dataclass(frozen=True, slots=True)
class EngineCheck:
    """What became of one engine.

    Attributes:
        engine: Path in the bundle.
        backend: Runtime it is for.
        precision: Its precision.
        outcome: "same" and "different" compare with the golden vectors; "unknown" where the bundle has none.
        detail: The largest difference of the keypoints, or why it was not run.
        fault: The error behind "different" and "not run".
        runs: Where its nodes run, in a few words; empty where it was not run or its runtime does not tell.
        facts: All that its runtime says of it.
    """

    engine: str
    backend: str
    precision: str
    outcome: Literal["same", "different", "unknown", "not run"]
    detail: str
    fault: ParityError | EnvironmentFault | IntegrityError | None = None
    runs: str = ""
    facts: SessionFacts | None = None


def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder.")],
    threads: ThreadsFlag = None,
    hashes_only: Annotated[bool, typer.Option("--hashes-only", help="Run no engine.")] = False,
    backend: BackendFlag = None,
    provider: ProviderFlag = None,
    device: DeviceFlag = None,
    strict: StrictFlag = False,
    kit: Annotated[
        Path | None,
        typer.Option(
            "--kit",
            metavar="DIR",
            help="Write what a program in another language has to reproduce: frames, boxes, the network's input, its "
            "outputs and keypoints as .npy, tolerances as JSON.",
        ),
    ] = None,
    json: StdoutJsonFlag = False,
) -> int:
    """Check every byte of a bundle, then run each engine on the bundle's golden inputs.

    Says where the nodes of each engine run: which execution provider of ONNX Runtime, which device of OpenVINO.

    Exit code 8 where a file was changed, 5 where an engine answers differently, 6 where no engine can be run here. An
    engine that was built for another machine is not run; its line names what differs and the command that rebuilds it.
    """
    wanted, execution = checked_execution(checked_backend(backend), provider, device, strict=strict)
    checked = verify_bundle(bundle)
    files = len(checked.manifest.files)
    if not json:
        say(f"{bundle}: all {files} files are what the manifest says; digest {checked.digest}")
    engines = () if hashes_only else engines_of(checked, wanted, None)
    checks: list[EngineCheck] = []
    with steps() as progress:
        for number, engine in enumerate(engines):
            progress.told("running engines", number, len(engines))
            checks.append(_check(checked, engine, threads, execution))
    if json:
        rows = [{**asdict(check), "fault": str(check.fault or "")} for check in checks]
        write_json(STDOUT, {"bundle": str(bundle), "digest": checked.digest, "files": files, "engines": rows})
    elif checks:
        cells = [(c.engine, f"{c.backend} {c.precision}", _WORDS[c.outcome], c.runs, c.detail) for c in checks]
        show_table(("engine", "runtime", "outcome", "runs", ""), cells)
    code = _conclude(bundle, checks)
    if kit is not None:
        from edgepose.golden_kit import write_kit

        note(f"wrote {kit}: {write_kit(checked, kit)} people")
    return code


def _check(bundle: Bundle, engine: Engine, threads: int | None, execution: Execution | None) -> EngineCheck:
    told = engine.path, engine.backend, engine.precision
    try:
        session = open_engine(bundle, engine, threads, execution)
    except (ForeignEngine, EnvironmentFault) as err:
        return EngineCheck(*told, "not run", str(err), err)
    try:
        facts = facts_of(session)
        runs = "" if facts is None else facts.text
        found = check_golden(bundle, engine, session)
    except ParityError as err:
        return EngineCheck(*told, "different", str(err), err, runs, facts)
    finally:
        session.close()
    if found is None:
        return EngineCheck(*told, "unknown", "the bundle has no golden vectors", None, runs, facts)
    detail = f"keypoints moved by {found.differences[KEYPOINTS]:.3g} px (median)"
    return EngineCheck(*told, "same", detail, None, runs, facts)


def _conclude(bundle: Path, checks: list[EngineCheck]) -> int:
    for check in checks:
        if isinstance(check.fault, ParityError):
            raise check.fault
    idle = [check for check in checks if check.fault is not None]
    if idle and len(idle) == len(checks):
        raise BackendUnavailable(
            f"{bundle}",
            found=f"no engine that can be run on this machine ({idle[0].detail})",
            expected="at least one",
            fix="install a runtime or build it for this machine, or check the files alone with --hashes-only",
        )
    for check in idle:
        note(f"{check.engine} was not run")
    return 0
