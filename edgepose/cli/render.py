"""`edgepose render`: people made by the project, with every joint's place and visibility known exactly.

Invariant: nothing is written before the flags are checked, and neither split is left half-written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgepose.cli.console import say, steps
from edgepose.errors import UsageError

EXAMPLES = (
    "edgepose render --out rendered",
    "edgepose render --out rendered --people 20000 --held-out 500 --seed 3",
)

HELD_OUT = "held_out"
"""Name of the split that calibration takes."""

_OTHER_PEOPLE = 1_000_003  # between the seeds of the two splits, and between their banks of textures


def render(
    out: Annotated[Path, typer.Option("--out", help="Folder for train.json, held_out.json and images/.")],
    people: Annotated[int, typer.Option("--people", min=1, help="People in train.json.")] = 5000,
    held_out: Annotated[
        int, typer.Option("--held-out", min=1, help="People in held_out.json, of other textures.")
    ] = 300,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything random.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace people that are in OUT.")] = False,
) -> int:
    """Render people for `edgepose train --rendered`: LSP's 14 joints, hidden by bodies, things in front and the frame.

    Training fills a share of each batch from train.json; an occlusion-robust network's word on visibility is calibrated
    on held_out.json, whose textures it has never seen.
    """
    taken = [name for name in ("train.json", "held_out.json") if (out / name).exists()]
    if taken and not force:
        fix = "choose another folder, or pass --force to replace them"
        raise UsageError(
            f"--out {out}", found=f"{' and '.join(taken)} there already", expected="a free folder", fix=fix
        )
    from edgepose.data.render import RenderConfig, write_coco

    usual = RenderConfig()
    other = RenderConfig(texture_seed=usual.texture_seed + _OTHER_PEOPLE + seed)
    with steps() as shown:
        write_coco(out, "train", people, seed, usual, progress=shown.step("rendering train"))
        write_coco(
            out, HELD_OUT, held_out, seed + _OTHER_PEOPLE, other, progress=shown.step("rendering held-out people")
        )
    say(f"{out}: {people} people in train.json, {held_out} of other textures in {HELD_OUT}.json")
    return 0
