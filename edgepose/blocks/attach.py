"""A keypoint block on any backbone: feature maps are named, the graph is cut there, and the block is put on top.

    seen = feature_shapes(backbone, (160, 160))              # {"layer2": (64, 20, 20), "layer3": (128, 10, 10), …}
    block = KPEBlock((64, 128), num_keypoints=17, map_hw=(20, 20), bins_hw=(320, 320))
    network = attach(backbone, block, out=("layer2", "layer3"), input_hw=(160, 160))
    spec = describe(network, "mine", keypoints, Preprocess((160, 160)), SimCC())

Invariant: what `attach` returns holds no forward hooks: it computes by a graph of its own, shares the backbone's
parameters under their names, and runs nothing of the backbone that no named feature needs.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgepose.blocks.heads import Stage
from edgepose.blocks.kpe import KPEBlock
from edgepose.errors import SpecError
from edgepose.pose.codec import output_names
from edgepose.spec import Decoder, Keypoints, ModelSpec, Preprocess, TensorSpec
from edgepose.strict_yaml import did_you_mean

OUTPUT = "output"
"""Name of what the backbone returns; parts of a tuple or dict are "output[0]" or "output[name]"."""

Shape = tuple[int, ...]


def feature_shapes(backbone: nn.Module, input_hw: tuple[int, int], *, channels: int = 3) -> dict[str, Shape]:
    """Everything in a backbone that can be named, in order of execution, with its shape behind the batch.

    Names are those of modules ("layer2.0.conv1") and, for a module that returns several tensors, of its parts
    ("stages[1]", "neck[p3]"); the backbone's own results are "output".

    Args:
        backbone: forward(images (N, channels, h, w) float32) → tensor, or a tuple, list or dict of tensors.
        input_hw: Size of the images.
        channels: Their channels.

    Raises:
        SpecError: The backbone cannot be run on such images.
    """
    found: dict[str, Shape] = {}

    def note(name: str, value: object) -> None:
        found.update({path: tuple(tensor.shape[1:]) for path, tensor in _named(name, value)})

    handles = [
        part.register_forward_hook(lambda _part, _args, value, name=name: note(name, value))
        for name, part in backbone.named_modules()
        if name
    ]
    try:
        note(OUTPUT, _run(backbone, torch.zeros(1, channels, *input_hw), "the backbone"))
    finally:
        for handle in handles:
            handle.remove()
    return found


def attach(
    backbone: nn.Module, block: nn.Module, *, out: Sequence[str], input_hw: tuple[int, int], keep: Sequence[str] = ()
) -> Attached:
    """Put a block on feature maps of a backbone.

    Args:
        backbone: Any module whose forward torch.fx can trace as far down as the named features lie. Its parts keep
            their names and are shared, not copied.
        block: forward(list of maps (N, C, h, w)) → tensor or tuple of tensors, a `KPEBlock` for instance.
        out: Names of the maps that the block reads, finest first, each half the size of the one before; see
            `feature_shapes`.
        input_hw: Size of the images the network is for.
        keep: Names of features or of the backbone's results ("output") that are returned behind the block's outputs.

    Raises:
        SpecError: A name that is unknown, not reached by tracing, or whose map does not fit; a block that cannot read
            these maps.
    """
    shapes = feature_shapes(backbone, input_hw)
    if not out:
        raise _unknown("nothing", shapes)
    for name in (*out, *keep):
        if name not in shapes:
            raise _unknown(repr(name), shapes, did_you_mean(name, shapes))
    _check_pyramid([(name, shapes[name]) for name in out], shapes)
    _check_reads(block, [shapes[name] for name in out], out)
    attached = Attached(_cut(backbone, tuple(out), tuple(keep)), block, kept=len(keep))
    _run(attached, torch.zeros(1, 3, *input_hw), f"{type(block).__name__} on {', '.join(out)}")
    return attached


class Attached(nn.Module):
    """A cut backbone with a block on top: images → the block's outputs, then what was kept of the backbone.

    Attributes:
        backbone: Returns the block's maps and what is kept.
        block: Reads the maps.
    """

    def __init__(self, backbone: fx.GraphModule, block: nn.Module, *, kept: int) -> None:
        super().__init__()
        self.backbone, self.block, self.kept = backbone, block, kept

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps, kept = self.backbone(images)
        outputs = self.block(maps)
        said = (outputs,) if isinstance(outputs, Tensor | fx.Proxy) else tuple(outputs)
        return (*said, *kept)

    def stages(self, images: Tensor) -> list[Stage]:
        """What every stage of the block says, for training; the last one's outputs are those of `forward`.

        A fake-quantised copy, whose forward was replaced on the instance, answers with the last stage, without maps.
        """
        if not isinstance(self.block, KPEBlock) or "forward" in vars(self):
            return [Stage(self(images), None)]
        maps, kept = self.backbone(images)
        *earlier, last = self.block.stages(maps)
        return [*earlier, Stage((*last.outputs, *kept), last.maps)]


def describe(
    network: nn.Module,
    name: str,
    keypoints: Keypoints,
    preprocess: Preprocess,
    decoder: Decoder,
    *,
    extra: Sequence[str] = (),
) -> ModelSpec:
    """The specification of a network of one's own: shapes are found by running it.

    Args:
        network: forward(images) → tuple of tensors: those that the decoder reads in its order, then `extra`.
        name: Name of the network.
        keypoints: What it predicts.
        preprocess: What it eats.
        decoder: Which outputs say where the keypoints are, and how.
        extra: Names of the outputs behind; those called "visibility" and "log_error" are taken for what
            `ModelSpec.visibility` and `ModelSpec.uncertainty` say. The decoder reads none of them.

    Raises:
        SpecError: The network puts out another number of tensors, or none for each keypoint.
    """
    names = (*output_names(decoder), *extra)
    outputs = _run(network, torch.zeros(1, 3, *preprocess.input_hw), name)
    tensors = [tensor for _, tensor in _named("", outputs)]
    if len(tensors) != len(names):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise SpecError(
            f"{name}: outputs", found=f"{len(tensors)} ({shapes})", expected=f"{len(names)}: {', '.join(names)}"
        )
    for output, tensor in zip(output_names(decoder), tensors, strict=False):
        if tensor.ndim < 2 or tensor.shape[1] != keypoints.count:
            raise SpecError(
                f"{name}: output {output!r}",
                found=f"shape {tuple(tensor.shape)}",
                expected=f"(batch, {keypoints.count}, …), something for each keypoint",
            )
    return ModelSpec(
        name=name,
        keypoints=keypoints,
        preprocess=preprocess,
        decoder=decoder,
        inputs=(TensorSpec("image", ("batch", 3, *preprocess.input_hw)),),
        outputs=tuple(
            TensorSpec(output, ("batch", *tensor.shape[1:])) for output, tensor in zip(names, tensors, strict=True)
        ),
        visibility="visibility" if "visibility" in extra else "",
        uncertainty="log_error" if "log_error" in extra else "",
    )


def _named(name: str, value: object) -> Iterator[tuple[str, Any]]:
    """The tensors (or, while tracing, proxies and nodes) in what a module returned, by name."""
    if isinstance(value, Tensor | fx.Proxy | fx.Node):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _named(f"{name}[{key}]", part)
    elif isinstance(value, tuple | list):
        for position, part in enumerate(value):
            yield from _named(f"{name}[{position}]", part)


def _run(module: nn.Module, images: Tensor, what: str) -> object:
    """One pass in evaluation mode; training mode and statistics stay as they were."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            return module(images)
    except (RuntimeError, ValueError, TypeError, IndexError) as err:
        raise SpecError(
            f"running {what}", found=str(err), expected=f"a network for images of {tuple(images.shape)}"
        ) from err
    finally:
        for part, training in modes:
            part.training = training


def _is_map(shape: Shape) -> bool:
    return len(shape) == 3 and min(shape) > 0


def _spelt(shapes: Mapping[str, Shape]) -> str:
    """The outermost features that are maps, with their shapes."""
    maps = {name: shape for name, shape in shapes.items() if _is_map(shape)}
    outer = {name: shape for name, shape in maps.items() if name.count(".") <= 1} or maps
    shown = [f"{name} {'x'.join(map(str, shape))}" for name, shape in outer.items()]
    return ", ".join(shown[:_SHOWN]) + (", …" if len(shown) > _SHOWN else "")


_SHOWN = 24


def _unknown(found: str, shapes: Mapping[str, Shape], fix: str = "") -> SpecError:
    return SpecError("attach: out", found=found, expected=f"names of features: {_spelt(shapes)}", fix=fix)


def _check_pyramid(maps: Sequence[tuple[str, Shape]], shapes: Mapping[str, Shape]) -> None:
    for name, shape in maps:
        if not _is_map(shape):
            raise SpecError(
                f"attach: out: {name}",
                found=f"shape {shape} behind the batch",
                expected=f"a feature map (channels, height, width), one of: {_spelt(shapes)}",
            )
    for (name, fine), (below, coarse) in itertools.pairwise(maps):
        if fine[1:] != (2 * coarse[1], 2 * coarse[2]):
            raise SpecError(
                f"attach: out: {name}, {below}",
                found=f"maps of {fine[1]}x{fine[2]} and {coarse[1]}x{coarse[2]}",
                expected="finest first, each half the size of the one before",
                fix=f"choose among: {_spelt(shapes)}",
            )


def _check_reads(block: nn.Module, shapes: Sequence[Shape], names: Sequence[str]) -> None:
    """Says which map a block was not made for, where the block can tell."""
    lateral = getattr(getattr(block, "neck", None), "lateral", None)
    if not isinstance(lateral, nn.ModuleList):
        return
    wanted = [conv.weight.shape[1] for conv in (part.get_submodule("0") for part in lateral)]  # type: ignore[index]
    found = [shape[0] for shape in shapes]
    if wanted != found:
        raise SpecError(
            f"attach: {type(block).__name__}",
            found=f"a block for maps of {', '.join(map(str, wanted))} channels",
            expected=f"{', '.join(map(str, found))}, as {', '.join(names)} have",
            fix=f"build it with in_channels={tuple(found)}",
        )
    map_hw = getattr(getattr(block, "head", None), "map_hw", None)
    if map_hw is not None and tuple(map_hw) != tuple(shapes[0][1:]):
        raise SpecError(
            f"attach: {type(block).__name__}",
            found=f"a block for a finest map of {map_hw[0]}x{map_hw[1]}",
            expected=f"{shapes[0][1]}x{shapes[0][2]}, as {names[0]} has",
            fix=f"build it with map_hw={tuple(shapes[0][1:])}",
        )


# Cutting the graph.

_PART = re.compile(r"(\[[^\]]*\])+$")


@dataclass(frozen=True, slots=True)
class _Traced:
    """A backbone's graph, and which of its nodes computes what."""

    graph: fx.Graph
    nodes: dict[str, fx.Node]


class _Tracer(fx.Tracer):
    """Looks into those modules only that have a named feature inside; all others stay calls.

    So only the containers on the way to the features have to be traceable, and blocks keep what Python does in them.
    """

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.opened = {name[: match.start()] for name in names for match in re.finditer(r"\.", name)}
        self.values: dict[str, Any] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - as fx calls it
        return module_qualified_name not in self.opened

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        value = super().call_module(m, forward, args, kwargs)
        self.values[self.path_of_module(m)] = value
        return value


def _trace(backbone: nn.Module, names: Sequence[str]) -> _Traced:
    tracer = _Tracer(names)
    try:
        graph = tracer.trace(backbone)
    except (fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as err:
        raise SpecError(
            f"attach: {type(backbone).__name__}",
            found=f"a forward that torch.fx cannot trace ({err})",
            expected="no control flow that depends on tensor values around the named features",
            fix="move such code into a module of its own",
        ) from err
    nodes = {path: proxy.node for name, value in tracer.values.items() for path, proxy in _named(name, value)}
    (returned,) = (node.args[0] for node in graph.nodes if node.op == "output")
    nodes.update(_named(OUTPUT, returned))
    return _Traced(graph, nodes)


def _cut(backbone: nn.Module, out: tuple[str, ...], keep: tuple[str, ...]) -> fx.GraphModule:
    """The backbone as a module that returns the maps `out` and the features `keep`."""
    modes = [(part, part.training) for part in backbone.modules()]
    codes, graphs = [], []
    for training in (True, False):  # Python's `if self.training` is decided while tracing
        backbone.train(training)
        graph = _ending_in(_trace(backbone, (*out, *keep)), out, keep)
        graphs.append(graph)
        codes.append(graph.python_code("self").src)
    for part, training in modes:
        part.training = training
    if codes[0] != codes[1]:
        raise SpecError(
            f"attach: {type(backbone).__name__}",
            found="a forward that does other things in training than in evaluation",
            expected="one graph for both",
            fix="move what differs (dropout for instance) into modules",
        )
    cut = fx.GraphModule(backbone, graphs[1], type(backbone).__name__)
    cut.delete_all_unused_submodules()
    for name, part in cut.named_modules():
        part.training = backbone.get_submodule(name).training
    return cut


def _ending_in(traced: _Traced, out: tuple[str, ...], keep: tuple[str, ...]) -> fx.Graph:
    graph = traced.graph
    maps, kept = ([_node(traced, name) for name in names] for names in (out, keep))
    (end,) = (node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(end):
        graph.output((list(maps), list(kept)))
    graph.erase_node(end)
    for node in reversed(graph.nodes):  # fx's own keeps random operators
        if node.op not in ("placeholder", "output") and not node.users:
            graph.erase_node(node)
    graph.lint()
    return graph


def _node(traced: _Traced, name: str) -> fx.Node:
    """The node that computes a feature; parts of a module's result are taken out of it."""
    if name in traced.nodes:
        return traced.nodes[name]
    match = _PART.search(name)
    whole = traced.nodes.get(name[: match.start()]) if match else None
    if match is None or whole is None:
        raise SpecError(
            f"attach: out: {name}",
            found="a feature that tracing does not reach",
            expected="one that forward computes by calling modules",
            fix=f"choose among: {', '.join(sorted(traced.nodes))}",
        )
    (end,) = (node for node in traced.graph.nodes if node.op == "output")
    node = whole
    for key in re.findall(r"\[([^\]]*)\]", match.group()):
        with traced.graph.inserting_before(end):
            node = traced.graph.call_function(operator.getitem, (node, int(key) if key.isdigit() else key))
    return node
