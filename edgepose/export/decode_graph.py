"""Decoding as ONNX nodes: what `pose.codec.decode` computes in NumPy, written behind a network's raw outputs.

Invariant: every operator means the same from opset 13 to 21, all arithmetic is float32, and nothing but the batch is of
a free size. No convolution or matrix product is added, so that what runs in integers is counted over the network alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from edgepose.pose.heatmap import DARK_RADIUS, LOWEST, MEAN_RADIUS, cell_grid
from edgepose.pose.regression import NEAR_PX
from edgepose.pose.simcc import MASS, SUPPORT, vote_reach
from edgepose.spec import Heatmap, Regression, SimCC

Value = ir.Value


class Nodes:
    """Nodes on their way into a graph; constants may be given as numbers or arrays.

    Args:
        prefix: Begins the names of all nodes and constants.
    """

    def __init__(self, prefix: str) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[Value] = []
        self._prefix = prefix

    def constant(self, array: NDArray[Any]) -> Value:
        name = f"{self._prefix}_constant_{len(self.constants)}"
        value = Value(
            name=name,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            const_value=ir.tensor(array, name=name),
        )
        self.constants.append(value)
        return value

    def __call__(self, operator: str, *inputs: Value | NDArray[Any], **attributes: Any) -> Value:
        values = [value if isinstance(value, Value) else self.constant(value) for value in inputs]
        name = f"{self._prefix}_{operator}_{len(self.nodes)}"
        node = ir.node(operator, values, attributes, name=name)
        node.outputs[0].name = f"{name}_out"
        self.nodes.append(node)
        return node.outputs[0]


def _floats(*numbers: float) -> NDArray[np.float32]:
    return np.array(numbers[0] if len(numbers) == 1 else numbers, np.float32)


def _integers(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers[0] if len(numbers) == 1 else numbers, np.int64)


def _axes(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def _clip(op: Nodes, value: Value, low: Value | NDArray[Any], high: Value | NDArray[Any]) -> Value:
    return op("Min", op("Max", value, low), high)


# SimCC


def simcc_nodes(op: Nodes, x: Value, y: Value, sizes: tuple[int, int], decoder: SimCC) -> tuple[Value, Value]:
    """See `pose.simcc.decode_simcc`.

    Args:
        op: Receives the nodes.
        x: (N, K, bins) logits.
        y: The same of the other axis.
        sizes: Number of bins of x and of y.
        decoder: Gives the split ratio.

    Returns:
        Keypoints (N, K, 2), pixels of the input crop, and scores (N, K).
    """
    reach = vote_reach(decoder)
    found = [_peak_1d(op, logits, bins, reach) for logits, bins in zip((x, y), sizes, strict=True)]
    positions = op("Concat", *(position for position, _ in found), axis=-1)
    keypoints = op("Div", positions, _floats(decoder.split_ratio))
    score = op("Sqrt", op("Mul", found[0][1], found[1][1]))
    return keypoints, op("Squeeze", score, _axes(2))


def _peak_1d(op: Nodes, logits: Value, bins: int, reach: int) -> tuple[Value, Value]:
    """Sub-bin position and probability mass of (N, K, B) logits, both (N, K, 1)."""
    probability = op("Unsqueeze", op("Softmax", logits, axis=-1), _axes(2))
    summed = op("Squeeze", _windowed(op, _windowed(op, probability, reach), reach), _axes(2))
    voted = op("ArgMax", summed, axis=-1, keepdims=1)
    highest = op("ArgMax", logits, axis=-1, keepdims=1)
    margin = 2 * reach + SUPPORT
    free = op("And", op("GreaterOrEqual", voted, _integers(margin)), op("Less", voted, _integers(bins - margin)))
    peak = op("Where", free, voted, highest)
    sums = op("Log", op("Max", summed, _floats(float(np.finfo(np.float32).tiny))))
    position = op("Where", free, _refined(op, sums, peak, bins), _refined(op, logits, peak, bins))
    around = op("Squeeze", _windowed(op, probability, MASS), _axes(2))
    mass = op("GatherElements", around, peak, axis=-1)
    return position, _clip(op, mass, _floats(0), _floats(1))


def _windowed(op: Nodes, value: Value, reach: int) -> Value:
    """The sum of up to `reach` bins on each side of each bin of (N, K, 1, B), and of itself."""
    size = 2 * reach + 1
    pooled = op("AveragePool", value, kernel_shape=[1, size], pads=[0, reach, 0, reach], count_include_pad=1)
    return op("Mul", pooled, _floats(size))


def _refined(op: Nodes, values: Value, peak: Value, bins: int) -> Value:
    """See `pose.simcc._refined`; (N, K, 1)."""
    centre = _clip(op, peak, _integers(SUPPORT), _integers(bins - 1 - SUPPORT))
    left = op("GatherElements", values, op("Sub", centre, _integers(SUPPORT)), axis=-1)
    middle = op("GatherElements", values, centre, axis=-1)
    right = op("GatherElements", values, op("Add", centre, _integers(SUPPORT)), axis=-1)
    curvature = op("Add", op("Sub", left, op("Mul", middle, _floats(2))), right)
    finite = op("Greater", curvature, _floats(float(np.finfo(np.float32).min)))  # not for NaN either
    usable = op("And", finite, op("Less", curvature, _floats(0)))
    divisor = op("Where", usable, curvature, _floats(-1))
    step = op("Div", op("Mul", op("Sub", left, right), _floats(SUPPORT * 0.5)), divisor)
    shift = op("Where", usable, step, _floats(0))
    inside = op("Equal", centre, peak)
    reach = op("Where", inside, _floats(SUPPORT), _floats(0.5))
    peak_at, centre_at = (op("Cast", value, to=ir.DataType.FLOAT) for value in (peak, centre))
    bounded = _clip(op, op("Add", centre_at, shift), op("Sub", peak_at, reach), op("Add", peak_at, reach))
    position = op("Where", op("Or", inside, usable), bounded, peak_at)
    return _clip(op, position, _floats(0), _floats(bins - 1))


# Heat maps


def heatmap_nodes(op: Nodes, maps: Value, shape: tuple[int, int, int], decoder: Heatmap) -> tuple[Value, Value]:
    """See `pose.heatmap.decode_heatmap`.

    Args:
        op: Receives the nodes.
        maps: (N, K, h, w).
        shape: K, h and w.
        decoder: Gives stride and refinement.

    Returns:
        Keypoints (N, K, 2), pixels of the input crop, and scores (N, K).
    """
    joints, height, width = shape
    flat = op("Reshape", maps, _axes(0, joints, height * width))
    peak = op("ArgMax", flat, axis=-1, keepdims=1)
    score = _clip(op, op("GatherElements", flat, peak, axis=-1), _floats(0), _floats(1))
    row = op("Div", peak, _integers(width))
    column = op("Sub", peak, op("Mul", row, _integers(width)))
    cells = op("Concat", column, row, axis=-1)
    places = op("Cast", cells, to=ir.DataType.FLOAT)
    offsets = _offsets(op, flat, (column, row), shape, decoder.refine)
    if offsets is not None:
        places = op("Add", places, offsets)
    steps, firsts = np.array([cell_grid(width, decoder), cell_grid(height, decoder)], np.float32).T
    points = op("Add", op("Mul", places, np.ascontiguousarray(steps)), np.ascontiguousarray(firsts))
    last = np.array([width, height], np.float32) * np.float32(decoder.stride) - 1
    return _clip(op, points, _floats(0), last), op("Squeeze", score, _axes(2))


def _offsets(
    op: Nodes, flat: Value, cell: tuple[Value, Value], shape: tuple[int, int, int], refine: str
) -> Value | None:
    """From the centre of each peak's cell to the peak, (N, K, 2) cells; None for nowhere."""
    smallest = min(shape[1:])
    match refine:
        case "quarter":
            return _quarter_offset(op, flat, cell, shape)
        case "dark" if smallest > 2 * DARK_RADIUS:
            return _dark_offset(op, _log_patches(op, flat, cell, shape, DARK_RADIUS), shape[0])
        case "softargmax" if smallest > 2 * MEAN_RADIUS:
            return _mean_offset(op, _log_patches(op, flat, cell, shape, MEAN_RADIUS), shape[0])
        case _:
            return None


def _quarter_offset(op: Nodes, flat: Value, cell: tuple[Value, Value], shape: tuple[int, int, int]) -> Value:
    _, height, width = shape
    column, row = cell

    def at(x: Value, y: Value) -> Value:
        return op("GatherElements", flat, op("Add", op("Mul", y, _integers(width)), x), axis=-1)

    steps = []
    for place, size, along_x in ((column, width, True), (row, height, False)):
        after = op("Min", op("Add", place, _integers(1)), _integers(size - 1))
        before = op("Max", op("Sub", place, _integers(1)), _integers(0))
        higher, lower = (at(moved, row) if along_x else at(column, moved) for moved in (after, before))
        sign = op("Sign", op("Sub", higher, lower))
        inside = op("And", op("Greater", place, _integers(0)), op("Less", place, _integers(size - 1)))
        steps.append(op("Where", inside, op("Mul", sign, _floats(0.25)), _floats(0)))
    return op("Concat", *steps, axis=-1)


def _log_patches(op: Nodes, flat: Value, cell: tuple[Value, Value], shape: tuple[int, int, int], radius: int) -> Value:
    """See `pose.heatmap._log_patches`; (N, K, 2·radius + 1, 2·radius + 1)."""
    joints, height, width = shape
    size = 2 * radius + 1
    wanted = [op("Sub", place, _integers(radius)) for place in cell]
    starts = [
        _clip(op, place, _integers(0), _integers(cells - size))
        for place, cells in zip(wanted, (width, height), strict=True)
    ]
    around = (np.arange(size)[:, None] * width + np.arange(size)).reshape(-1).astype(np.int64)
    index = op("Add", op("Add", op("Mul", starts[1], _integers(width)), starts[0]), around)
    inside = op("Max", op("GatherElements", flat, index, axis=-1), _floats(LOWEST))
    logs = op("Reshape", op("Log", inside), _axes(0, joints, size, size))
    shifts = [op("Sub", place, start) for place, start in zip(wanted, starts, strict=True)]
    turned = op("Transpose", _shifted(op, logs, shifts[0], size), perm=[0, 1, 3, 2])
    return op("Transpose", _shifted(op, turned, shifts[1], size), perm=[0, 1, 3, 2])


def _shifted(op: Nodes, logs: Value, shift: Value, size: int) -> Value:
    """Patches (N, K, S, S) moved along their last axis by (N, K, 1) cells, extrapolated where they end."""
    last = size - 1
    index = op("Unsqueeze", op("Add", shift, np.arange(size, dtype=np.int64)), _axes(2))
    held = op("Add", _clip(op, index, _integers(0), _integers(last)), np.zeros((1, 1, size, 1), np.int64))
    moved = op("GatherElements", logs, held, axis=3)
    below = op("Max", op("Neg", index), _integers(0))
    above = op("Max", op("Sub", index, _integers(last)), _integers(0))
    lowest = _floats(float(np.log(LOWEST)))
    for count, ends in ((below, (0, 1, 2)), (above, (last, last - 1, last - 2))):
        steps = op("Cast", count, to=ir.DataType.FLOAT)
        a, b, c = (op("Gather", logs, _axes(end), axis=3) for end in ends)
        slope = op("Mul", steps, op("Sub", a, b))
        triangle = op("Div", op("Mul", steps, op("Add", steps, _floats(1))), _floats(2))
        bend = op("Mul", triangle, op("Add", op("Sub", a, op("Mul", b, _floats(2))), c))
        beyond = _clip(op, op("Add", op("Add", a, slope), bend), lowest, a)
        moved = op("Where", op("Greater", count, _integers(0)), beyond, moved)
    return moved


def _dark_offset(op: Nodes, logs: Value, joints: int) -> Value:
    """See `pose.heatmap._dark_offset`: (N, K, 5, 5) to (N, K, 2)."""
    heat = op("Exp", logs)
    for _ in range(2):  # two boxes of two cells are the 1 2 1 of the smoothing
        heat = op("AveragePool", heat, kernel_shape=[2, 2])
    flat = op("Reshape", op("Log", heat), _axes(0, joints, 9))

    def v(row: int, column: int) -> Value:
        return op("Gather", flat, _axes(3 * row + column), axis=2)

    def minus(left: Value, right: Value) -> Value:
        return op("Sub", left, right)

    def times(left: Value, right: Value) -> Value:
        return op("Mul", left, right)

    twice = op("Mul", v(1, 1), _floats(2))
    dx = op("Div", minus(v(1, 2), v(1, 0)), _floats(2))
    dy = op("Div", minus(v(2, 1), v(0, 1)), _floats(2))
    dxx = op("Add", minus(v(1, 2), twice), v(1, 0))
    dyy = op("Add", minus(v(2, 1), twice), v(0, 1))
    dxy = op("Div", op("Add", minus(minus(v(2, 2), v(2, 0)), v(0, 2)), v(0, 0)), _floats(4))
    determinant = minus(times(dxx, dyy), times(dxy, dxy))
    usable = op("And", op("Greater", determinant, _floats(1e-9)), op("Less", dxx, _floats(0)))
    upper = op("Concat", minus(times(dyy, dx), times(dxy, dy)), minus(times(dxx, dy), times(dxy, dx)), axis=-1)
    step = op("Neg", op("Div", upper, op("Where", usable, determinant, _floats(1))))
    return op("Where", usable, _clip(op, step, _floats(-1), _floats(1)), _floats(0))


def _mean_offset(op: Nodes, logs: Value, joints: int) -> Value:
    """See `pose.heatmap._mean_offset`: (N, K, 7, 7) to (N, K, 2)."""
    size = 2 * MEAN_RADIUS + 1
    heat = op("Reshape", op("Exp", logs), _axes(0, joints, size * size))
    axis = np.arange(-MEAN_RADIUS, MEAN_RADIUS + 1, dtype=np.float32)
    total = op("ReduceSum", heat, _axes(2), keepdims=1)

    def mean(weights: NDArray[np.float32]) -> Value:
        return op("Div", op("ReduceSum", op("Mul", heat, weights), _axes(2), keepdims=1), total)

    both = op("Concat", mean(np.tile(axis, size)), mean(np.repeat(axis, size)), axis=-1)
    return _clip(op, both, _floats(-1), _floats(1))


# Coordinates


def regression_scores(
    op: Nodes, shares: Value, scales: Value | None, scores: Value | None, decoder: Regression
) -> Value:
    """See `pose.regression.decode_regression`; scores (N, K)."""
    if scores is not None:
        return _clip(op, scores, _floats(0), _floats(1))

    def first(value: Value, axis: int) -> Value:
        return op("Squeeze", op("Gather", value, _axes(axis), axis=2), _axes(2))

    if scales is None:
        return op("Add", op("Mul", first(shares, 0), _floats(0)), _floats(1))
    height, width = decoder.input_hw
    size = np.array([width, height], np.float32)
    spread = op("Max", op("Mul", scales, size), _floats(1e-6))
    near = op("Sub", _floats(1), op("Exp", op("Div", _floats(-NEAR_PX), spread)))
    return op("Sqrt", op("Mul", first(near, 0), first(near, 1)))
