"""What a network says stage by stage, the feature maps in between, and how far a student's are from its teacher's.

Invariant: hooks stand for one forward pass only, so no network keeps any; which maps are compared follows from the
names and sizes of the two networks' parts alone, so that a resumed run compares the same ones.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, nn

from edgepose.blocks.heads import Stage
from edgepose.errors import UsageError

Maps = Mapping[str, Tensor]
"""Feature maps (N, C, h, w) by the name of the part that put them out."""

_RIDGE = 1e-4  # of the mean square of the student's channels: dead channels leave the fit without a solution
_LEAST_VARIANCE = 1e-6


def stages_of(model: nn.Module, images: Tensor) -> list[Stage]:
    """What a network says at each of its stages; a network without stages has one.

    Args:
        model: The network.
        images: (N, 3, h, w) float32.
    """
    stages = getattr(model, "stages", None)  # a method; other networks may have parts of that name
    return stages(images) if inspect.ismethod(stages) else [Stage(model(images), None)]


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Notes what some parts of a network put out while the block runs; of a part that runs twice, the last.

    Args:
        model: The network.
        names: Names of the parts (`named_modules`).

    Yields:
        The tensors by name; what is no tensor is passed over.
    """
    maps: dict[str, Tensor] = {}
    handles = [model.get_submodule(name).register_forward_hook(partial(_note, maps, name)) for name in names]
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def _note(maps: dict[str, Tensor], name: str, _part: nn.Module, _inputs: Any, output: Any) -> None:
    if isinstance(output, Tensor):
        maps[name] = output


class FeatureMatching(nn.Module):
    """Distance of a student's feature maps from its teacher's, of parts that bear the same name and see the same size.

    A student with other channels, a pruned one say, is compared through 1x1 convolutions that are trained with it and
    then thrown away (Romero et al., "FitNets", ICLR 2015). They start as the least-squares fit on the first batch, so
    that the first steps already go towards what the student lacks and not towards random directions.

    Args:
        student: Maps of the student on some images, of the parts to compare.
        teacher: The teacher's maps of the same parts on the same images.
    """

    started: Tensor

    def __init__(self, student: Maps, teacher: Maps) -> None:
        super().__init__()
        self.names = tuple(teacher)
        self.projections = nn.ModuleList(_projection(student[name], teacher[name]) for name in self.names)
        self.register_buffer("started", torch.tensor(False))

    def forward(self, student: Maps, teacher: Maps) -> Tensor:
        """The share of the teacher's variance that the student does not explain, mean over the parts: a scalar."""
        if not self.started:
            self._start(student, teacher)
        distances = []
        for name, projection in zip(self.names, self.projections, strict=True):
            target = teacher[name].detach().float()
            spread = target.var(correction=0).clamp(min=_LEAST_VARIANCE)
            distances.append(F.mse_loss(projection(student[name].float()), target) / spread)
        return torch.stack(distances).mean()

    @torch.no_grad()
    def _start(self, student: Maps, teacher: Maps) -> None:
        for name, projection in zip(self.names, self.projections, strict=True):
            if isinstance(projection, nn.Conv2d):
                weight, bias = _least_squares(student[name], teacher[name])
                projection.weight.copy_(weight[:, :, None, None])
                assert projection.bias is not None
                projection.bias.copy_(bias)
        self.started.fill_(True)


def feature_matching(student: nn.Module, teacher: nn.Module, images: Tensor) -> FeatureMatching:
    """Feature matching between two networks.

    Compared are the outermost parts that put out one map (the stages of a backbone, its neck, a head's maps), and of
    neighbours that see the same size the last.

    Args:
        student: Pruned, fake-quantised or neither.
        teacher: Has parts of the same names.
        images: (N, 3, h, w) float32 of the networks' size; the values do not matter.

    Raises:
        UsageError: The networks have no map in common.
    """
    theirs, outputs = _maps(teacher, teacher, images)
    own, _ = _maps(student, partial(stages_of, student), images)
    said = {id(tensor) for tensor in _tensors(outputs)}
    common = {
        name: tensor
        for name, tensor in theirs.items()
        if name in own and _sizes(own[name]) == _sizes(tensor) and id(tensor) not in said
    }
    names = _outermost(teacher, common)
    if not names:
        raise UsageError(
            "training: feature_weight",
            found=f"no feature map that {type(student).__name__} and its teacher {type(teacher).__name__} have alike",
            expected="parts of the same name that put out maps of the same height and width",
            fix="set feature_weight to 0, or choose a teacher of the same family and input size",
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FeatureMatching({name: own[name] for name in names}, {name: common[name] for name in names})


def _maps(model: nn.Module, run: Callable[[Tensor], object], images: Tensor) -> tuple[dict[str, Tensor], object]:
    """The 4-D outputs of all parts that run once, by name, and what the network says."""
    training = model.training
    names = [name for name, _ in model.named_modules() if name]
    calls: dict[str, int] = dict.fromkeys(names, 0)
    handles = [model.get_submodule(name).register_forward_hook(partial(_count, calls, name)) for name in names]
    try:
        with torch.no_grad(), recording(model.eval(), names) as maps:
            outputs = run(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {name: tensor for name, tensor in maps.items() if tensor.ndim == 4 and calls[name] == 1}, outputs


def _count(calls: dict[str, int], name: str, _part: nn.Module, _inputs: Any, _output: Any) -> None:
    calls[name] += 1


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.shape[0], *tensor.shape[2:])


def _tensors(outputs: object) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (tuple, list)):
        for part in outputs:
            yield from _tensors(part)


def _outermost(model: nn.Module, maps: Maps) -> tuple[str, ...]:
    """Names among `maps` that lie in no other one's part, of neighbours of one size only the last."""
    found: list[str] = []
    for name, _ in model.named_modules():
        if name in maps and not any(name.startswith(f"{outer}.") for outer in found):
            found.append(name)

    def superseded(name: str, following: str) -> bool:
        return name.rpartition(".")[0] == following.rpartition(".")[0] and _sizes(maps[name]) == _sizes(maps[following])

    pairs = itertools.pairwise([*found, ""])
    return tuple(name for name, following in pairs if not following or not superseded(name, following))


def _projection(student: Tensor, teacher: Tensor) -> nn.Module:
    inputs, outputs = student.shape[1], teacher.shape[1]
    return nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)


def _least_squares(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (Ct, Cs) and bias (Ct,) that bring a student's channels closest to its teacher's, float32."""
    given, wanted = (maps.double().movedim(1, -1).flatten(0, -2) for maps in (student, teacher))
    mean, target = given.mean(0), wanted.mean(0)
    given, wanted = given - mean, wanted - target
    gram = given.T @ given
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean() + 1e-12)
    weight = torch.linalg.solve(gram, given.T @ wanted).T
    return weight.float(), (target - weight @ mean).float()
