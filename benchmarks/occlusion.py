"""What occlusion does to networks: the same people behind the same occluders, network against network.

Invariant: networks are compared on the same pictures, person by person, and only where both cost the same
multiply-accumulates and epochs; occluders are of the families of `edgepose.data.corrupt`, which no network was trained
with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from benchmarks.context import THREADS, Context
from benchmarks.subjects import METRIC, val_people
from edgepose.blocks.zoo import find_checkpoint
from edgepose.data.coco import PoseDataset, dataset, read_image
from edgepose.data.render import RenderConfig, write_coco
from edgepose.errors import AnnotationError, CheckpointError, SpecError
from edgepose.estimator import PoseEstimator
from edgepose.pose import metrics
from edgepose.profiler.slices import SliceRecord, measure_slices, paired_difference, visibility_quality
from edgepose.stats import Interval

OCCLUDED = "occluded_30"
DRAWS = 6
"""Pictures per person with things in front, as chance decides where they are."""

_SLICES = ("clean", OCCLUDED)
_RENDERED_PEOPLE, _RENDERED_SEED = 400, 904_117  # nobody trains with this seed, nor with its textures
_HIDDEN_SHARE = (0.2, 0.8)
_MACS_MAY_DIFFER = 0.05


@dataclass(frozen=True, slots=True)
class Cost:
    """What a network costs.

    Attributes:
        macs: Multiply-accumulates for one person.
        epochs: Of all the trainings that led to its weights.
    """

    macs: int
    epochs: int


def records(context: Context, network: str) -> dict[str, SliceRecord]:
    """What a network of the zoo makes of val, clean and occluded, in torch."""

    def work() -> dict[str, SliceRecord]:
        with _estimator(network) as estimator:
            told = context.step(f"{network}: clean and behind occluders")
            return measure_slices(estimator, val_people(context), names=_SLICES, draws=DRAWS, progress=told)

    return context.once(f"slices {network}", work)


def difference(context: Context, base: Sequence[str], candidate: Sequence[str], name: str) -> Interval:
    """Points of `pck_torso_0.2` by which the mean of some networks is above the mean of others on a slice.

    Raises:
        CheckpointError: They cost more than 5 % more or fewer multiply-accumulates, or not as many epochs.
    """
    for network in (*base[1:], *candidate):
        _check_same_cost(base[0], cost(context, base[0]), network, cost(context, network))
    first, other = ([records(context, network)[name] for network in networks] for networks in (base, candidate))
    found = paired_difference(first, other, METRIC, "all")
    return Interval(100 * found.estimate, 100 * found.low, 100 * found.high)


def cost(context: Context, network: str) -> Cost:
    """What a network of the zoo costs, counted on its weights and read from its card."""

    def work() -> Cost:
        import torch

        from edgepose.compress.macs import count_macs
        from edgepose.stages.networks import load_network

        module, loaded = load_network(find_checkpoint(network))
        height, width = loaded.card.spec.preprocess.input_hw
        trained = [entry for entry in loaded.card.lineage if entry.stage == "train"]
        epochs = sum(len(entry.report["curve"]) for entry in trained)
        return Cost(count_macs(module, torch.zeros(1, 3, height, width)).total, epochs)

    return context.once(f"cost {network}", work)


def _check_same_cost(name: str, mine: Cost, other_name: str, other: Cost) -> None:
    if mine.epochs != other.epochs or abs(other.macs - mine.macs) > _MACS_MAY_DIFFER * mine.macs:
        raise CheckpointError(
            f"{other_name} against {name}",
            found=f"{other.macs} multiply-accumulates and {other.epochs} epochs of training",
            expected=f"{mine.macs} within {_MACS_MAY_DIFFER:.0%}, and {mine.epochs}",
            fix="train both for as long, or make one wider",
        )


def visibility(context: Context, network: str) -> dict[str, dict[str, Any]]:
    """AUROC and calibration error, with bounds, of what a network says of visibility, by kind of picture.

    Raises:
        AnnotationError: So few or so many joints are hidden that the figures would say little.
        SpecError: The network says nothing of visibility.
    """
    result: dict[str, dict[str, Any]] = {}
    for kind, record in _visibility_records(context, network).items():
        known = int(record.known.sum())
        share = float(record.hidden.sum() / known)
        if kind != "coco17" and not _HIDDEN_SHARE[0] <= share <= _HIDDEN_SHARE[1]:
            expected = "between 20 % and 80 %"
            raise AnnotationError(f"visibility on {kind}", found=f"{100 * share:.1f} % hidden", expected=expected)
        quality = visibility_quality(record)
        if not quality and kind != "coco17":
            found = "a network that does not say which joints can be seen"
            raise SpecError(f"visibility on {kind}", found=found, expected="one with a visibility head")
        result[kind] = {"hidden_share": share, "joints": known, "hidden_joints": int(record.hidden.sum())} | {
            name: {"value": i.estimate, "low": i.low, "high": i.high} for name, i in quality.items()
        }
    return result


def _visibility_records(context: Context, network: str) -> dict[str, SliceRecord]:
    """Photographs behind unseen occluders, rendered people of another seed, and coco17's labelled joints."""

    def work() -> dict[str, SliceRecord]:
        photographs = records(context, network)[OCCLUDED]
        with _estimator(network) as estimator:
            told = context.step(f"{network}: rendered people")
            rendered = measure_slices(estimator, _rendered(context), names=("clean",), progress=told)["clean"]
            found = {"photographs": photographs, "rendered": replace(rendered, name="rendered")}
            if (context.data / "coco17").is_dir():  # no claim rests on it: so few of its joints are hidden
                found["coco17"] = _joints_of_coco17(estimator, dataset(context.data / "coco17", "train"))
        return found

    return context.once(f"visibility {network}", work)


def _rendered(context: Context) -> PoseDataset:
    """People whose own bodies and things in front hide joints; which, is known exactly."""
    folder = context.folder / "rendered-for-visibility"
    config = RenderConfig(texture_seed=_RENDERED_SEED)
    write_coco(folder, "val", _RENDERED_PEOPLE, _RENDERED_SEED, config, progress=context.step("rendering people"))
    return dataset(folder, "val")


def _joints_of_coco17(estimator: PoseEstimator, people: PoseDataset) -> SliceRecord:
    """The joints that coco17 and the network both have a name for."""
    names = people.keypoints.names
    own = estimator.spec.keypoints
    pairs = [(own.names.index(name), names.index(name)) for name in names if name in own.names]
    mine, theirs = (np.array(side) for side in zip(*pairs, strict=True))
    truth, predicted, said = [], [], []
    for person in people.persons:
        poses = estimator(read_image(person.image), person.box_xyxy[None])
        whole = np.zeros((own.count, 3), np.float32)
        whole[mine] = person.keypoints[theirs]
        truth.append(whole)
        predicted.append(poses.keypoints[0])
        said.append(np.full(own.count, np.nan) if poses.visibility is None else poses.visibility[0])
    labels = np.stack(truth)
    return SliceRecord(
        name="coco17",
        annotation_id=np.array([person.annotation_id for person in people.persons], np.int64),
        errors=metrics.measure(np.stack(predicted), labels, own),
        hidden=labels[..., 2] == 1,
        known=labels[..., 2] > 0,
        visibility=np.stack(said).astype(np.float64),
    )


def _estimator(network: str) -> PoseEstimator:
    import torch

    from edgepose.stages.networks import load_network
    from edgepose.training.session import TorchSession

    torch.set_num_threads(THREADS)
    module, loaded = load_network(find_checkpoint(network))
    spec = loaded.card.spec
    return PoseEstimator(TorchSession(module, spec), spec, backend="torch")
