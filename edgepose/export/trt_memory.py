"""How much memory building a TensorRT engine takes, and what is asked for less where there is not enough.

Invariant: nothing is given up silently: every attempt after the first says what it does without.

An estimate, not a measurement: three copies of the weights (file, network, engine), twice what is alive at the busiest
node at the largest batch (a kernel that is tried has inputs and outputs of its own), and what a builder takes before it
has seen a network. On a Jetson, GPU and CPU share the memory, and a builder that takes all of it is killed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import msgspec
import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # no stubs are installed

from edgepose.errors import OnnxError
from edgepose.spec import TensorrtBuild

MIB = 1 << 20
_BUILDER_BYTES = 700 * MIB
"""Kernels and context that a builder loads before it sees a network: its library for one GPU has 120 to 450 MB."""
_SAFE_SHARE = 0.8
_COPIES_OF_WEIGHTS, _COPIES_OF_ACTIVATIONS = 3, 2
_BATCH_STEPS = (64, 32, 16, 8, 4, 2, 1)

Profile = tuple[int, int, int]


class Needs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a network takes.

    Attributes:
        weights_bytes: All its constants.
        peak_bytes: What is alive at its busiest node, for one image.
    """

    weights_bytes: int
    peak_bytes: int

    def build_bytes(self, batch: int) -> int:
        """What building for a batch takes, about."""
        activations = _COPIES_OF_ACTIVATIONS * self.peak_bytes * batch
        return _BUILDER_BYTES + _COPIES_OF_WEIGHTS * self.weights_bytes + activations


@dataclass(frozen=True, slots=True)
class Attempt:
    """One way to build.

    Attributes:
        profiles: Smallest, best and largest batch of each profile.
        level: The builder's optimisation level.
        workspace_bytes: Most memory that a kernel may take for itself; 0 leaves it to TensorRT.
        without: What is given up compared with what was asked for.
    """

    profiles: tuple[Profile, ...]
    level: int
    workspace_bytes: int
    without: tuple[str, ...] = ()


def needs_of(path: str | os.PathLike[str]) -> Needs:
    """Reads off a graph what it takes.

    Raises:
        OnnxError: Not a readable ONNX file.
    """
    graph = inferred(path).graph
    sizes = {value.name: _bytes(value.type.tensor_type) for value in (*graph.value_info, *graph.input, *graph.output)}
    weights = {tensor.name: _tensor_bytes(tensor) for tensor in graph.initializer}
    last = {name: place for place, node in enumerate(graph.node) for name in node.input}
    last |= dict.fromkeys((value.name for value in graph.output), len(graph.node))
    alive = {value.name for value in graph.input} - set(weights)
    peak = 0
    for place, node in enumerate(graph.node):
        alive |= set(node.output)
        peak = max(peak, sum(sizes.get(name, 0) for name in alive))
        alive = {name for name in alive if last.get(name, -1) > place}
    return Needs(sum(weights.values()), peak)


def inferred(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """The model for one image, with the shape of every value that can be known.

    Raises:
        OnnxError: Not a readable ONNX file.
    """
    try:
        model = onnx.load(path)
        for value in model.graph.input:
            for size in value.type.tensor_type.shape.dim:
                if not size.HasField("dim_value"):
                    size.dim_value = 1
        del model.graph.value_info[:]
        for value in model.graph.output:
            value.type.tensor_type.ClearField("shape")
        return onnx.shape_inference.infer_shapes(model, data_prop=True)
    except OSError as err:
        raise OnnxError(str(path), found=err.strerror or str(err), expected="an ONNX file") from err
    except (DecodeError, ValueError, onnx.shape_inference.InferenceError) as err:
        raise OnnxError(str(path), found=str(err), expected="a readable ONNX file") from err


def attempts(build: TensorrtBuild, max_batch: int, needs: Needs, free_bytes: int) -> tuple[Attempt, ...]:
    """What is tried, one after the other, until an engine is built.

    Args:
        build: What the target asks for.
        max_batch: The target's largest batch.
        needs: What the network takes.
        free_bytes: Memory that is free; 0 where that is not to be looked at.

    Returns:
        At least one; the first is what was asked for where there is memory enough.
    """
    asked = Attempt(_up_to(build.profiles, max_batch), build.level, build.workspace_mib * MIB)
    if not free_bytes:
        return (asked,)
    largest = max(profile[2] for profile in asked.profiles)
    fitting = next((size for size in _BATCH_STEPS if needs.build_bytes(size) <= _SAFE_SHARE * free_bytes), 1)
    first = _limited(asked, fitting, free_bytes) if fitting < largest else asked
    if not first.workspace_bytes:
        first = replace(first, workspace_bytes=max(free_bytes // 2 // MIB, 1) * MIB)  # never all that the board has
    steps = [first]
    batch = max(profile[2] for profile in first.profiles)
    for level in (2, 0):
        batch = max(batch // 4, 1)
        smaller = _limited(steps[-1], batch, free_bytes)
        if level < smaller.level:
            smaller = replace(
                smaller, level=level, without=(*smaller.without, f"level {level} instead of {smaller.level}")
            )
        steps.append(replace(smaller, workspace_bytes=max(smaller.workspace_bytes // 2, 64 * MIB)))
    return tuple(step for place, step in enumerate(steps) if step not in steps[:place])


def _limited(attempt: Attempt, batch: int, free_bytes: int) -> Attempt:
    profiles = _up_to(attempt.profiles, batch)
    if profiles == attempt.profiles:
        return attempt
    before = max(profile[2] for profile in attempt.profiles)
    why = f"batch {batch} instead of {before}: {free_bytes // MIB} MiB are free"
    return replace(attempt, profiles=profiles, without=(*attempt.without, why))


def _up_to(profiles: tuple[Profile, ...], batch: int) -> tuple[Profile, ...]:
    """Profiles cut at a largest batch; those that become equal are one."""
    low, best, high = zip(*profiles, strict=True)
    cut = [(min(a, batch), min(b, batch), min(c, batch)) for a, b, c in zip(low, best, high, strict=True)]
    return tuple(dict.fromkeys(cut))


def _bytes(kind: onnx.TypeProto.Tensor) -> int:
    if not kind.elem_type:
        return 0
    item_bytes = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).itemsize
    return int(np.prod([max(size.dim_value, 1) for size in kind.shape.dim], dtype=np.int64)) * item_bytes


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    item_bytes = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return int(np.prod(list(tensor.dims), dtype=np.int64)) * item_bytes
