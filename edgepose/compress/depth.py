"""Depth pruning: which residual blocks a network has, and which of them it misses least.

Invariant: a block is offered for removal only when it has been seen to hand on exactly its input once its branch is
gone: found in its graph, checked on what it reads inside the network. So nothing here knows any block by its class.

Blocks go before channels do: a shortcut ties the widths of a whole stage together, and what is left is narrower work.
Greedy removal by the loss is what Veit et al. ("Residual Networks Behave Like Ensembles of Relatively Shallow
Networks", NeurIPS 2016) make plausible: blocks with identity shortcuts depend little on each other.
"""

from __future__ import annotations

import copy
import math
import operator
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's universal name
from torch import Tensor, fx, nn

from edgepose.compress.exactness import replaced, tensors
from edgepose.compress.fold import trace
from edgepose.compress.importance import Losses
from edgepose.compress.layers import kind_of
from edgepose.compress.macs import count_macs, evaluation_mode
from edgepose.compress.plan import RemovedBlock, parameter_count
from edgepose.errors import CheckpointError, RecipeError

_RECTIFIERS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.ReLU6)
_SILENT: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Dropout2d)
"""Modules that hand on their input when the network is used."""
_ADDITIONS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)
_RECTIFIED: tuple[Any, ...] = (F.relu, F.relu6, torch.relu)


def choose_blocks(
    model: nn.Module, example: Tensor, count: int, losses: Losses, protected: Collection[str] = ()
) -> tuple[RemovedBlock, ...]:
    """The residual blocks to remove, one after the other: each time the one without which the loss is lowest.

    Args:
        model: The trained network; it is not changed.
        example: (N, 3, h, w) input of the size the network is used at.
        count: How many.
        losses: Given a network, yields one training loss per batch; the same people every time.
        protected: Names of layers whose blocks stay.

    Raises:
        RecipeError: There are not so many, or no batch to judge by.
    """
    work = copy.deepcopy(model).eval()
    names = [
        name for name in residual_blocks(work, example) if not any(layer.startswith(f"{name}.") for layer in protected)
    ]
    if len(names) < count:
        raise RecipeError(
            "prune.depth",
            found=str(count),
            expected=f"at most {len(names)}, {', '.join(names)}" if names else _none_of(model),
            fix="lower depth, protect fewer layers, or leave it out",
        )
    macs = count_macs(work, example)
    loss = _mean_loss(work, losses)
    chosen: list[RemovedBlock] = []
    while len(chosen) < count:
        found = {}
        for name in names:
            with replaced(work, {name: nn.Identity()}):
                found[name] = _mean_loss(work, losses)
        best = min(found, key=lambda name: found[name])
        block = work.get_submodule(best)
        chosen.append(RemovedBlock(best, macs.within(best), parameter_count(block), loss, found[best]))
        work.set_submodule(best, nn.Identity())
        names.remove(best)
        loss = found[best]
    return tuple(chosen)


def residual_blocks(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Names of the blocks that can go, in order of definition; of blocks within blocks, the inner ones.

    A block is a module of one input that adds what its layers make of that input to the input itself, and at most
    rectifies the sum, which must be without effect on inputs that are rectified already. A block that changes the
    map's size or its channels has a shortcut with weights, so it is none.

    Args:
        model: The network.
        example: (N, 3, h, w) input; its values do not matter.
    """
    places = Counter(id(part) for _, part in model.named_modules(remove_duplicate=False))
    found = {}
    for name, part in model.named_modules():
        if name and places[id(part)] == 1 and list(part.children()):
            rest = _without_branch(part)
            if rest is not None:
                found[name] = rest
    inner = [name for name in found if not any(other.startswith(f"{name}.") for other in found)]
    read = _inputs_of(model, inner, example)
    with torch.no_grad():
        silent = [name for name in inner if read[name] and all(torch.equal(found[name](x), x) for x in read[name])]
    return tuple(name for name in silent if _runs_without(model, name, example))


def _none_of(model: nn.Module) -> str:
    return (
        f"none: this {type(model).__name__} has no residual block whose shortcut is the identity "
        "(downsampling blocks, folded branches and blocks of several inputs cannot go)"
    )


def _mean_loss(model: nn.Module, losses: Losses) -> float:
    """Mean over batches; infinite where it is not a number."""
    with torch.no_grad(), evaluation_mode(model):
        found = [float(loss) for loss in losses(model)]
    if not found:
        raise RecipeError(
            "prune.depth",
            found="no batch to judge blocks by",
            expected="losses of at least one training batch",
            fix="hand over training data, or leave depth out",
        )
    mean = sum(found) / len(found)
    return mean if math.isfinite(mean) else math.inf


def _without_branch(part: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a residual block computes when its branch adds nothing; None where it is no such block."""
    try:
        graph = trace(part)
    except CheckpointError:
        return None
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (output,) = [node for node in graph.nodes if node.op == "output"]
    if len(inputs) != 1:
        return None
    modules = dict(part.named_modules())
    total = _through(output.args[0], modules, (*_SILENT, *_RECTIFIERS), _RECTIFIED)
    terms = _terms(total)
    if terms is None:
        return None
    shortcuts = [term for term in terms if _through(term, modules, _SILENT, ()) is inputs[0]]
    branches = [term for term in terms if term not in shortcuts]
    if len(shortcuts) != 1 or not _is_branch(branches[0], inputs[0], modules):
        return None
    assert isinstance(total, fx.Node)
    total.replace_all_uses_with(shortcuts[0])
    rest = fx.GraphModule(part, graph).eval()
    rest.graph.eliminate_dead_code()
    rest.recompile()
    return rest


def _through(node: Any, modules: dict[str, nn.Module], kinds: tuple[type[nn.Module], ...], functions: Any) -> Any:
    """The node behind calls of certain modules and functions of one argument."""
    while isinstance(node, fx.Node):
        module = node.op == "call_module" and isinstance(modules[str(node.target)], kinds)
        if not module and not (node.op == "call_function" and node.target in functions):
            return node
        node = node.args[0] if node.args else None
    return None


def _terms(node: Any) -> Sequence[fx.Node] | None:
    """The two terms of an addition of two tensors."""
    if not isinstance(node, fx.Node) or node.kwargs or len(node.args) != 2:
        return None
    known: tuple[Any, ...] = {"call_function": _ADDITIONS, "call_method": ("add", "add_")}.get(node.op, ())
    terms = [term for term in node.args if isinstance(term, fx.Node)]
    return terms if node.target in known and len(terms) == 2 else None


def _is_branch(node: fx.Node, source: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a value is made from the block's input by layers with weights."""
    seen, open_, weighted = {node}, [node], False
    while open_:
        current = open_.pop()
        weighted = weighted or (current.op == "call_module" and kind_of(modules[str(current.target)]) is not None)
        new = [before for before in current.all_input_nodes if before not in seen]
        seen.update(new)
        open_.extend(new)
    return weighted and source in seen


def _inputs_of(model: nn.Module, names: Sequence[str], example: Tensor) -> dict[str, list[Tensor]]:
    """What each of the named blocks reads in one forward pass; none where it is not one tensor that stays as it is."""
    read: dict[str, list[Tensor]] = {name: [] for name in names}
    spoilt = set()
    handles = []
    for name in names:

        def before(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
            if len(inputs) == 1 and isinstance(inputs[0], Tensor):
                read[name].append(inputs[0].clone())
            else:
                spoilt.add(name)

        def after(_: nn.Module, inputs: tuple[Any, ...], output: Any, name: str = name) -> None:
            if name in spoilt or not torch.equal(inputs[0], read[name][-1]) or output.shape != inputs[0].shape:
                spoilt.add(name)

        block = model.get_submodule(name)
        handles += [block.register_forward_pre_hook(before), block.register_forward_hook(after)]
    try:
        with evaluation_mode(model), torch.no_grad():
            model(example[:1])
    finally:
        for handle in handles:
            handle.remove()
    return {name: [] if name in spoilt else inputs for name, inputs in read.items()}


def _runs_without(model: nn.Module, name: str, example: Tensor) -> bool:
    """Whether the network does without a block: nobody reaches into it, and all outputs keep their shapes."""
    with evaluation_mode(model), torch.no_grad():
        expected = [out.shape for out in tensors(model(example[:1]))]
        try:
            with replaced(model, {name: nn.Identity()}):
                return [out.shape for out in tensors(model(example[:1]))] == expected
        except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
            return False
