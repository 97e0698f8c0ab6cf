"""Is a network still 2:4 sparse in the ONNX file that engines are built from?

Invariant: what is looked at are the stored weights as the operator reads them, float or int8, along its input channels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgepose.errors import ParityError
from edgepose.recipe import GROUP, KEPT

_PASSED = frozenset({"DequantizeLinear", "Identity", "Transpose"})
"""Operators between a stored weight and its reader."""


def check_sparse_onnx(path: str | os.PathLike[str], layers: Mapping[str, NDArray[np.float32]]) -> None:
    """Check the weights of the named layers in a file that `onnx_from_torch` or `quantised_onnx` wrote.

    Args:
        path: The ONNX file.
        layers: Names of the layers (`PruningPlan.sparse`) and the weights (outputs, inputs, …) that were exported, by
            which one is known again that the exporter turned round and gave another name; none makes this do nothing.

    Raises:
        ParityError: A layer is not in the file, or three of four consecutive input channels have weights.
    """
    if not layers:
        return
    stored = list(_weights(onnx.load(path).graph))
    for layer, weight in layers.items():
        # "LAYER.weight", or "LAYER.weight_codes" of a quantised one
        found = [array for name, array in stored if name.rpartition(".weight")[0] == layer]
        found = found or [array for name, array in stored if ".weight" not in name and np.array_equal(array, weight)]
        if not found or not all(map(_is_sparse, found)):
            raise ParityError(
                f"{os.fspath(path)}: {layer}",
                found="weights that are not 2:4 sparse" if found else "no such weights",
                expected="two zeros in every four consecutive input channels, as the network has them",
                fix="export the network that was fine-tuned under its plan",
            )


def sparse_weights(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the weights of a file that have the pattern, of those of at least one group of input channels."""
    return tuple(name for name, array in _weights(onnx.load(path).graph) if np.any(array) and _is_sparse(array))


def _is_sparse(weight: NDArray[np.generic]) -> bool:
    """Whether a weight (outputs, inputs, …), float or int8, has the pattern."""
    last = np.moveaxis(weight, 1, -1)
    return last.shape[-1] % GROUP == 0 and int(np.count_nonzero(last.reshape(-1, GROUP), axis=1).max()) <= KEPT


def _weights(graph: onnx.GraphProto) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Names of stored weights, each (outputs, inputs, …) as its reader takes it."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        name, turns = node.input[1], []
        while name in makers and makers[name].op_type in _PASSED:
            if makers[name].op_type == "Transpose":
                turns.append(_permutation(makers[name]))
            name = makers[name].input[0]
        if name not in stored:
            continue  # a product of activations
        weight = numpy_helper.to_array(stored[name])
        for permutation in reversed(turns):
            weight = weight.transpose(permutation)
        yield name, np.moveaxis(weight, _input_axis(node, weight.ndim), 1)


def _permutation(node: onnx.NodeProto) -> tuple[int, ...] | None:
    return next((tuple(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)


def _input_axis(node: onnx.NodeProto, rank: int) -> int:
    """The axis of the second operand that is summed over."""
    if node.op_type == "Conv":
        return 1
    if node.op_type == "Gemm":
        return 1 if any(attribute.name == "transB" and attribute.i for attribute in node.attribute) else 0
    return rank - 2
