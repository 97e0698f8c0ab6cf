"""The flip test: what a network says of a crop and of its mirror image, merged into one answer.

Mirroring a crop of width w takes x to w - 1 - x, since integer coordinates are pixel centres. So it takes SimCC's bin
b to (w - 1)·split_ratio - b, which is not the reversed row (there is a bin behind the last pixel's centre, and none
before the first's), and the cells of a heat map that tile the crop to the reversed row exactly.

Invariant: a network that answers the mirrored crop with the mirrored answer gets its own answer back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError
from edgepose.pose.codec import named_output
from edgepose.pose.heatmap import cell_grid
from edgepose.spec import Decoder, Heatmap, Keypoints, ModelSpec, OneStage, Regression, SimCC

Floats = NDArray[np.float32]


def mirror_order(keypoints: Keypoints) -> NDArray[np.intp]:
    """Where each keypoint of a mirrored crop is found: a permutation (K,) that swaps the two of every flip pair.

    Raises:
        SpecError: The names have sides but there are no pairs, or a pair is not one of two different keypoints.
    """
    order = np.arange(keypoints.count)
    where = "keypoints.flip_pairs"
    if not keypoints.flip_pairs and any(name.startswith(("left_", "right_")) for name in keypoints.names):
        fix = "name the pairs that swap places when the image is mirrored"
        raise SpecError(where, found="none, and keypoints with a left and a right", fix=fix)
    for pair in keypoints.flip_pairs:
        if len(set(pair)) != 2 or not all(0 <= i < len(order) for i in pair) or any(order[i] != i for i in pair):
            raise SpecError(where, found=f"{list(pair)}", expected="two keypoints that are in no other pair")
        order[list(pair)] = pair[::-1]
    return order


def mirror_images(images: NDArray[Any]) -> NDArray[Any]:
    """The network's input, (N, 3, h, w) float32 or (N, h, w, 3) uint8, with columns in reverse order, C-contiguous."""
    return np.ascontiguousarray(images[:, :, ::-1] if images.dtype == np.uint8 else images[..., ::-1])


def unmirror(outputs: Mapping[str, NDArray[Any]], spec: ModelSpec) -> dict[str, Floats]:
    """What a network said of mirrored crops, in terms of the crops.

    Args:
        outputs: By name, batch first: those of the decoder, of visibility and of uncertainty; others are left out.
        spec: The network's decoder, input size, keypoints and names of outputs.

    Returns:
        float32 arrays of the same shapes. A bin whose mirror image lies outside the mirrored answer is extrapolated.

    Raises:
        SpecError: An output is missing or misshapen, or the flip pairs are.
    """
    order = mirror_order(spec.keypoints)
    turned = _coordinates(outputs, spec.decoder, spec.preprocess.input_hw[1])
    for name in filter(None, (spec.visibility, spec.uncertainty)):
        turned[name] = named_output(outputs, name, "(N, K)")
    for name, values in turned.items():
        if values.shape[1] != len(order):
            raise SpecError(f"output {name!r}", found=f"{values.shape[1]} keypoints", expected=f"{len(order)}")
    return {name: values[:, order] for name, values in turned.items()}


def merge_flipped(
    outputs: Mapping[str, NDArray[Any]], mirrored: Mapping[str, NDArray[Any]], spec: ModelSpec
) -> dict[str, Floats]:
    """The mean of what a network said of crops and of their mirror images.

    Logits are averaged, not probabilities: of two Gaussians that disagree about a place the mean of the logits makes
    one in the middle, the mean of the probabilities two beside it.

    Args:
        outputs: Of the crops, by name, batch first.
        mirrored: Of the mirrored crops.
        spec: The network's specification.

    Returns:
        The outputs of the decoder, of visibility and of uncertainty, float32.

    Raises:
        SpecError: As `unmirror`.
    """
    half = np.float32(0.5)
    turned = unmirror(mirrored, spec)
    return {name: (np.asarray(outputs[name], np.float32) + values) * half for name, values in turned.items()}


def _coordinates(outputs: Mapping[str, NDArray[Any]], decoder: Decoder, width: int) -> dict[str, Floats]:
    """The decoder's outputs with x mirrored, keypoints still in the mirrored order."""
    match decoder:
        case SimCC():
            x, y = named_output(outputs, decoder.x, "(N, K, bins)"), named_output(outputs, decoder.y, "(N, K, bins)")
            return {decoder.x: _reflected(x, (width - 1) * decoder.split_ratio), decoder.y: y}
        case Heatmap():
            maps = named_output(outputs, decoder.output, "(N, K, h, w)")
            step, first = cell_grid(maps.shape[-1], decoder)
            return {decoder.output: _reflected(maps, (width - 1 - 2 * first) / step)}
        case Regression():
            shares = named_output(outputs, decoder.keypoints, "(N, K, 2)")
            x_mirrored = np.stack([1 - shares[..., 0], shares[..., 1]], -1)
            turned: dict[str, Floats] = {decoder.keypoints: x_mirrored}
            if decoder.scales:
                turned[decoder.scales] = named_output(outputs, decoder.scales, "(N, K, 2)")
            if decoder.scores:
                turned[decoder.scores] = named_output(outputs, decoder.scores, "(N, K)")
            return turned
        case OneStage():
            raise SpecError("flip test", found="a one-stage network", expected="one that is shown a person at a time")


def _reflected(values: Floats, last: float) -> Floats:
    """Position i of the last axis gets the value at last - i.

    Between two positions the value is interpolated linearly, which lifts a parabola by a constant and so leaves the
    place of its peak as it is. Before the first position the parabola through the first three goes on, downwards only:
    there are no labels out there.
    """
    source = last - np.arange(values.shape[-1])
    inside = np.clip(source, 0, values.shape[-1] - 1)
    low = np.floor(inside).astype(np.intp)
    share = (inside - low).astype(np.float32)
    reflected = values[..., low]
    if share.any():
        high = np.minimum(low + 1, values.shape[-1] - 1)
        reflected = reflected * (1 - share) + values[..., high] * share
    before = source < 0
    if before.any() and values.shape[-1] > 2:
        steps = -source[before].astype(np.float32)
        a, b, c = (values[..., i, None] for i in range(3))
        beyond = a + steps * (a - b) + steps * (steps + 1) / 2 * (a - 2 * b + c)
        reflected[..., before] = np.clip(beyond, values.min(-1, keepdims=True), a)
    return reflected
