"""`edgepose import`: somebody else's ONNX network to a bundle, by a specification that says what it eats and means.

Invariant: stdout says what was made, and everything that was found and changed on the way is said; nothing is guessed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepose.cli.compile import Watcher, describe
from edgepose.cli.console import note, steps
from edgepose.cli.options import check_outputs
from edgepose.errors import MissingDependency

EXAMPLES = (
    "edgepose import other.onnx --spec spec.yaml --out other.bundle",
    "edgepose import yolo-pose.onnx --spec yolo-pose.yaml --target x86-cpu --out yolo-pose.bundle",
)


def import_(
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="The ONNX file; its external data beside it.")],
    spec: Annotated[Path, typer.Option(help="YAML: input, outputs, keypoints; `edgepose inspect MODEL` proposes one.")],
    out: Annotated[Path, typer.Option(help="Directory of the bundle; must not exist yet.")],
    target: Annotated[
        list[str] | None, typer.Option(help="Target to build for, this-cpu by default; repeat for several.")
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace another bundle at OUT.")] = False,
) -> int:
    """Import an ONNX pose network or box detector of somebody else's as a bundle.

    The file is checked, brought to a current opset, given the project's input and outputs, compared with itself in ONNX
    Runtime after every step, and built for the targets. Heat maps, SimCC, coordinates, one-stage networks (YOLO-pose,
    RTMO) and box detectors are understood.
    """
    check_outputs([out], [model, spec])
    try:
        from edgepose.importer.bundle import ImportRequest, import_model
        from edgepose.importer.spec import read_spec
    except ModuleNotFoundError as err:
        raise MissingDependency(err.name or str(err), extra="compile", needed_for=f"importing {model}") from err
    request = ImportRequest(model, read_spec(spec), tuple(target or ("this-cpu",)), out, replace)
    with steps() as shown:
        result = import_model(request, Watcher(shown))
    describe(result)
    for line in result.bundle.manifest.reports["import"]["notes"]:
        note(line)
    return 0
