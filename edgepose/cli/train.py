"""`edgepose train`: a network from labelled photographs, from scratch or from another network's weights.

Invariant: the people held out as `dev` choose the best epoch, and `val` is never read; a run that was stopped, by
Ctrl-C or a kill, goes on from its state when the same command is given again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import typer

from edgepose.blocks.card import Card, paths_of, read_card
from edgepose.blocks.config import PRESETS, KPEConfig
from edgepose.cli.console import note, say
from edgepose.cli.factory import find_source
from edgepose.cli.train_control import train_control_arm
from edgepose.cli.train_run import People, Training, figures, require_torch
from edgepose.data.coco import dataset
from edgepose.data.splits import some_images, split_train
from edgepose.errors import AnnotationError, CheckpointError, UsageError
from edgepose.stages.source import Source
from edgepose.strict_yaml import did_you_mean, read_yaml
from edgepose.training.config import TrainConfig

EXAMPLES = (
    "edgepose train --model kpe-s --data lspet --out runs/kpe-s",
    "edgepose train --model kpe-t --data lspet --out runs/kpe-t --epochs 20 --learning-rate 1e-3 --seed 1",
    "edgepose train --model orn-s --data lspet --out runs/long --settings long.yaml --rendered rendered",
    "edgepose train --from kpe-s --data horses --images 100 --out runs/horses --epochs 40 --freeze-epochs 5",
    "edgepose train --from runs/kpe-s --data lspet --out runs/kpe-s-192 --input-size 192 --epochs 10",
    "edgepose train --model kpe-s --data lspet --out runs/taught --distill-from runs/teacher.safetensors",
    "edgepose train --from kpe-s --data lspet --out runs/kpe-s-control --control-of prune-qat-int8",
    "edgepose train --from mine.networks:small --data photos --out runs/small --epochs 20",
)

_EPOCHS = {"kpe-t": 18, "kpe-s": 29}
"""Enough on a few thousand people to be of use; longer is better. Other presets take the largest."""

_SETTINGS = ("epochs", "freeze_epochs", "batch_size", "learning_rate", "seed", "distill_weight")
"""Flags that change one setting of training."""

_LEAST_DEV = 2  # people in dev, below which choosing an epoch means nothing
_DISTILL_WEIGHT = 0.5


def train(
    data: Annotated[Path, typer.Option("--data", help="Folder with train.json and images/.")],
    out: Annotated[Path, typer.Option("--out", help="Checkpoint: OUT.safetensors and OUT.json.")],
    model: Annotated[
        str | None, typer.Option("--model", help=f"Architecture: {', '.join(PRESETS)}. Default: that of --from.")
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="Start from these weights: a checkpoint, a name of the zoo, or package.module:factory[@CHECKPOINT].",
        ),
    ] = None,
    head: Annotated[str | None, typer.Option("--head", help="simcc, heatmap or regression.")] = None,
    backbone: Annotated[str | None, typer.Option("--backbone", help="residual, inverted or reparameterised.")] = None,
    refinements: Annotated[
        int | None, typer.Option("--refinements", min=0, help="Stages that better the first prediction.")
    ] = None,
    input_size: Annotated[
        int | None, typer.Option("--input-size", min=32, help="Side of the input, pixels: a multiple of 32.")
    ] = None,
    settings: Annotated[
        Path | None, typer.Option("--settings", help="YAML with everything about training; flags win over it.")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", min=1, help="Default: enough for the model.")] = None,
    freeze_epochs: Annotated[
        int | None, typer.Option("--freeze-epochs", min=0, help="First epochs that leave the backbone as it is.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=2, help="People per step [32].")] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", min=1e-9, help="Peak of the schedule [0.0015].")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of everything random [0].")] = None,
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="Train on so many photographs, drawn with the seed.")
    ] = None,
    rendered: Annotated[
        Path | None, typer.Option("--rendered", help="People of `edgepose render`, for the share that --settings says.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that prepare batches.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Threads of torch, 0 for all cores.")] = 0,
    distill_from: Annotated[str | None, typer.Option("--distill-from", help="Teacher: whatever --from takes.")] = None,
    distill_weight: Annotated[
        float | None, typer.Option("--distill-weight", min=0.0, max=1.0, help="Share of the teacher in the loss [0.5].")
    ] = None,
    control_of: Annotated[
        str | None, typer.Option("--control-of", help="Train --from for as long as this recipe does, uncompressed.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint that is at OUT.")] = False,
) -> int:
    """Train a network on DATA/train.json; 10 % of its people are held out to choose the best epoch.

    Ctrl-C saves the run beside OUT; the same command goes on from there. With --control-of RECIPE the network of --from
    gets the recipe's fine-tuning (epochs, schedules, loss, teachers) and nothing of its compression: the arm that
    compressed networks are compared with.
    """
    flags = dict(locals())
    state = _check_free(out, force=force)
    if control_of is not None:
        return train_control_arm(flags)
    start, start_card = _checkpoint(source)
    changes = {"head": head, "backbone": backbone, "refinements": refinements, "input_hw": _square(input_size)}
    architecture = _architecture(model, start_card, changes)
    config = _config(settings, architecture, {name: flags[name] for name in _SETTINGS})
    teacher, _ = _checkpoint(distill_from)
    config = _with_teacher(config, distill_weight, teaches=teacher is not None)
    _check_share(config, rendered)
    people = _people(data, rendered, images, config.seed)
    if _says_visibility(architecture, start_card):
        people = people.judged_on(rendered)
    if architecture is None and start_card is not None:
        _check_own(start_card, people)
    run = Training(architecture, config, people, start, teacher, state, workers)
    require_torch(threads)
    result = run.carry_out(out)
    if result is None:
        return _interrupted(state)
    best = result.curve[result.best_epoch]
    say(f"{paths_of(out)[0]}: best epoch {result.best_epoch + 1} of {config.epochs}, on dev {figures(best)}")
    return 0


def _check_free(out: Path, *, force: bool) -> Path:
    """Refuses a taken name; gives that of the state."""
    weights, card = paths_of(out)
    if not force and (taken := next((path for path in (weights, card) if path.exists()), None)):
        fix = "choose another name, or pass --force to replace it"
        raise UsageError(f"--out {out}", found=f"{taken.name}, which is there already", expected="a free name", fix=fix)
    return weights.with_suffix(".state")


def _checkpoint(name: str | None) -> tuple[Source | None, Card | None]:
    if name is None:
        return None, None
    source = find_source(name)
    return source, read_card(source.path)


def _square(side_px: int | None) -> tuple[int, int] | None:
    if side_px is not None and side_px % 32:
        near = max(32, round(side_px / 32) * 32)
        raise UsageError("--input-size", found=str(side_px), expected="a multiple of 32", fix=f"try {near}")
    return None if side_px is None else (side_px, side_px)


def _architecture(model: str | None, start: Card | None, changes: Mapping[str, Any]) -> KPEConfig | None:
    """The preset, or that of the network to start from, with what flags change; None for a user's own network."""
    if start is not None and start.own is not None:
        _check_unchanged(model, changes)
        return None
    if model is None:
        if start is None:
            expected = f"--model, one of {', '.join(PRESETS)}, or --from with a checkpoint"
            raise UsageError("command line", found="no architecture", expected=expected)
        config = start.kpe
    elif model in PRESETS:
        config = PRESETS[model]
    else:
        expected = f"one of {', '.join(PRESETS)}"
        raise UsageError("--model", found=repr(model), expected=expected, fix=did_you_mean(model, tuple(PRESETS)))
    for field in ("head", "backbone"):
        known = _choices(field)
        if changes[field] is not None and changes[field] not in known:
            raise UsageError(
                f"--{field}",
                found=repr(changes[field]),
                expected=f"one of {', '.join(known)}",
                fix=did_you_mean(changes[field], known),
            )
    if changes["refinements"] and (changes["head"] or config.head) == "regression":
        raise UsageError("--refinements", found="stages behind a regression head", expected="simcc or heatmap")
    return msgspec.structs.replace(config, **{name: value for name, value in changes.items() if value is not None})


def _check_unchanged(model: str | None, changes: Mapping[str, Any]) -> None:
    """A network of the user's own is trained as it is: what it is made of is its code's to say."""
    flags = {"head": "--head", "backbone": "--backbone", "refinements": "--refinements", "input_hw": "--input-size"}
    given = ["--model"] if model is not None else [flags[name] for name in flags if changes[name] is not None]
    if given:
        raise UsageError(given[0], found="given beside a network of your own", fix="leave it off, and change the code")


def _check_own(card: Card, people: People) -> None:
    """It finds the very keypoints of the data, and nothing of it is compressed."""
    if card.plan is not None or card.quantisation is not None:
        raise CheckpointError(
            card.name,
            found="a compressed checkpoint",
            expected="a float one",
            fix="fine-tune it by a recipe: edgepose compile",
        )
    names = people.train.keypoints.names
    if card.keypoints.names != names:
        raise CheckpointError(
            card.name,
            found=f"a network for the keypoints {', '.join(card.keypoints.names)}",
            expected=f"those of the data: {', '.join(names)}",
            fix="choose data with the network's keypoints, or change its spec",
        )


def _choices(field: str) -> tuple[str, ...]:
    """What a field of the architecture may be."""
    kind = next(f.type for f in msgspec.structs.fields(KPEConfig) if f.name == field)
    return get_args(kind)


def _config(path: Path | None, architecture: KPEConfig | None, flags: Mapping[str, Any]) -> TrainConfig:
    """The file's settings, or the defaults, with what flags say."""
    given = {field: value for field, value in flags.items() if value is not None}
    if path is not None:
        return msgspec.structs.replace(read_yaml(path, TrainConfig), **given)
    name = "" if architecture is None else architecture.name
    return TrainConfig(**{"epochs": _EPOCHS.get(name, max(_EPOCHS.values())), **given})


def _with_teacher(config: TrainConfig, distill_weight: float | None, *, teaches: bool) -> TrainConfig:
    """Makes teacher and share of the loss fit each other."""
    for name, weight in (("distill_weight", config.distill_weight), ("feature_weight", config.feature_weight)):
        if not teaches and weight > 0:
            raise UsageError(
                name,
                found=f"{weight:g} without a teacher",
                expected="a teacher for this share of the loss",
                fix="add --distill-from CHECKPOINT, or leave the weight out",
            )
    if teaches and distill_weight == config.feature_weight == 0:
        raise UsageError(
            "--distill-weight",
            found="0 with a teacher, who would teach nothing",
            expected="a share of the loss",
            fix="leave out --distill-from, or name a weight above 0",
        )
    if teaches and distill_weight is None and config.distill_weight == 0:
        return msgspec.structs.replace(config, distill_weight=_DISTILL_WEIGHT)
    return config


def _check_share(config: TrainConfig, rendered: Path | None) -> None:
    if (rendered is not None) != (config.rendered > 0):
        raise UsageError(
            "--rendered",
            found=f"{rendered or 'no folder'} and a share of {config.rendered:g}",
            expected="a folder and the share of each batch that it fills",
            fix="write 'rendered: 0.25' into a file for --settings, and name the folder with --rendered",
        )


def _people(data: Path, rendered: Path | None, images: int | None, seed: int) -> People:
    people = dataset(data, "train")
    if not people.persons:
        raise AnnotationError(f"{people.source}", found="no labelled person", expected="people to train on")
    train_people, dev = split_train(people)
    if len(dev) < _LEAST_DEV:
        found = f"{len(people)} people, of whom {len(dev)} are held out to choose the best epoch"
        raise AnnotationError(f"{people.source}", found=found, expected="at least 20 people", fix="label more")
    if images is not None:
        train_people = some_images(train_people, images, seed)
    return People(train_people, dev, None if rendered is None else dataset(rendered, "train"))


def _says_visibility(architecture: KPEConfig | None, start: Card | None) -> bool:
    if architecture is not None:
        return architecture.orn is not None
    return start is not None and start.spec.visibility != ""


def _interrupted(state: Path) -> int:
    note(f"edgepose train: interrupted; the run is saved in {state}: give the same command again to go on from there")
    return 130
