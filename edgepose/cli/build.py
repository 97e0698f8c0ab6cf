"""`edgepose build`: engines for other targets from a bundle's own network, as a new bundle.

Invariant: the source bundle is only read; what was built, and what was found in this host's cache, is said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepose.cli.compile import Watcher, describe
from edgepose.cli.console import steps
from edgepose.rebuild import BuildRequest, build_bundle

EXAMPLES = (
    "edgepose build kpe-s.bundle --target x86-cpu --out kpe-s-x86.bundle",
    "edgepose build kpe-s.bundle --target this-cpu --target x86-cpu --out both.bundle",
    "edgepose build kpe-s.bundle --target rtx-40 --out kpe-s-rtx.bundle --sign release.pem",
    "edgepose build kpe-s.bundle --target ./my-board.yaml --out board.bundle --replace",
)


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle's folder; it is not changed.")],
    target: Annotated[list[str], typer.Option(help="Name of a target, or path of a YAML file; repeat for several.")],
    out: Annotated[Path, typer.Option(help="Directory of the new bundle; must not exist yet.")],
    replace: Annotated[bool, typer.Option("--replace", help="Replace another bundle at OUT.")] = False,
    sign: Annotated[
        Path | None,
        typer.Option(
            metavar="KEY",
            help="Sign TensorRT engines with this private key (Ed25519, PEM): machines that "
            "trust it load them, others load only what they built themselves.",
        ),
    ] = None,
) -> int:
    """Build the engines of a bundle for other targets, as a new bundle; each is checked against the golden vectors.

    The new bundle has engines for the targets named here and none of the old ones. For CPUs without VNNI the weights
    of a quantised network are rounded to 7 bits. For NVIDIA GPUs a float network is halved (fp16) and a quantised one
    is spelt symmetrically; TensorRT builds on the device, TensorRT-RTX on any machine.
    """
    with steps() as shown:
        result = build_bundle(BuildRequest(bundle, target, out, replace=replace, sign=sign), Watcher(shown))
    describe(result)
    return 0
