"""`edgepose train --control-of RECIPE`: the arm that a compressed network is compared with.

Invariant: what is trained, for how long and by whom is the recipe's to say; a flag that would change it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgepose.blocks.card import paths_of, read_card
from edgepose.cli.compile import Watcher
from edgepose.cli.console import say, steps
from edgepose.cli.factory import find_source
from edgepose.cli.train_run import figures, require_torch
from edgepose.data.coco import dataset
from edgepose.data.splits import people_for
from edgepose.errors import UsageError
from edgepose.profiles import load_target
from edgepose.recipe import load_recipe
from edgepose.stages.control import control_phases, train_control
from edgepose.stages.people import StageData
from edgepose.stages.settings import plan_of

_TAKEN = ("data", "out", "source", "rendered", "workers", "threads", "control_of", "force")


def train_control_arm(flags: Mapping[str, Any]) -> int:
    """Train the network of --from as the recipe of --control-of would, without compressing it.

    Args:
        flags: All of `edgepose train`, by the name of their parameter; None where not given.

    Raises:
        UsageError: A flag that the recipe decides, no --from, or a recipe that trains nothing.
        CheckpointError: Keypoints of network and data differ, or the network is compressed already.
        EdgeposeError: Whatever training raises.
    """
    given = [f"--{name.replace('_', '-')}" for name, value in flags.items() if value is not None and name not in _TAKEN]
    if given:
        raise UsageError(
            given[0],
            found="given beside --control-of",
            expected="nothing that the recipe decides",
            fix=f"leave it out: the control does what {flags['control_of']} does",
        )
    if flags["source"] is None:
        raise UsageError("--control-of", found="no network", expected="--from with the checkpoint that is compressed")
    recipe = load_recipe(flags["control_of"])
    plan = plan_of(recipe, tuple(load_target(name) for name in recipe.targets))
    control_phases(plan)  # before any work
    source = find_source(flags["source"])
    card = read_card(source.path)
    train, dev = people_for(card.name, card.keypoints, flags["data"])
    rendered = None if flags["rendered"] is None else dataset(flags["rendered"], "train")
    require_torch(flags["threads"])
    with steps() as shown:
        phases = train_control(
            source, StageData(train, dev, rendered), plan, flags["out"], (Watcher(shown), flags["workers"])
        )
    trained = sum(len(phase.report["curve"]) for phase in phases)
    reached = {name: value for name, value in phases[-1].report["dev"].items() if value is not None}
    say(f"{paths_of(flags['out'])[0]}: {trained} epochs in {len(phases)} phases, on dev {figures(reached)}")
    return 0
