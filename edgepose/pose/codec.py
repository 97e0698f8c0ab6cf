"""Keypoints to training targets and network outputs to keypoints, whatever the decoder.

The mathematics of each decoder is in a module of its name: `simcc`, `heatmap`, `regression`.

Invariant: `decode(encode(p))` returns p to sub-pixel accuracy, without a half-pixel bias (bins and cells as in `spec`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import SpecError
from edgepose.pose.heatmap import decode_heatmap, encode_heatmap
from edgepose.pose.one_stage import Candidates, best_candidate, candidates
from edgepose.pose.regression import decode_regression, encode_regression
from edgepose.pose.simcc import decode_simcc, encode_simcc
from edgepose.spec import Decoder, Heatmap, OneStage, Regression, SimCC

__all__ = [
    "decode",
    "encode_heatmap",
    "encode_regression",
    "encode_simcc",
    "named_output",
    "output_names",
    "people_candidates",
]

Floats = NDArray[np.float32]


def decode(outputs: Mapping[str, NDArray[Any]], decoder: Decoder) -> tuple[Floats, Floats]:
    """Network outputs to keypoints.

    Args:
        outputs: The network's outputs by name; logits for SimCC, heat-map values for Heatmap, shares for Regression.
        decoder: Which outputs to read, and how.

    Returns:
        Keypoints (N, K, 2) float32 in pixels of the input crop, and scores (N, K) float32 in 0..1; of a one-stage
        network those of each frame's best candidate, whatever its score.

    Raises:
        SpecError: An output that the decoder needs is absent or has too few axes.
    """
    match decoder:
        case SimCC():
            x = named_output(outputs, decoder.x, "(N, K, bins)")
            return decode_simcc(x, named_output(outputs, decoder.y, "(N, K, bins)"), decoder)
        case Heatmap():
            return decode_heatmap(named_output(outputs, decoder.output, "(N, K, h, w)"), decoder)
        case Regression():
            shares = named_output(outputs, decoder.keypoints, "(N, K, 2)")
            scales = named_output(outputs, decoder.scales, "(N, K, 2)") if decoder.scales else None
            scores = named_output(outputs, decoder.scores, "(N, K)") if decoder.scores else None
            return decode_regression(shares, scales, scores, decoder)
        case OneStage():
            return best_candidate(people_candidates(outputs, decoder))


def output_names(decoder: Decoder) -> tuple[str, ...]:
    """The outputs that a decoder reads, in the order in which a network puts them out."""
    match decoder:
        case SimCC():
            return decoder.x, decoder.y
        case Heatmap():
            return (decoder.output,)
        case Regression():
            return tuple(filter(None, (decoder.keypoints, decoder.scales, decoder.scores)))
        case OneStage():
            names = decoder.boxes, decoder.scores, decoder.keypoints, decoder.keypoint_scores
            return tuple(filter(None, names[:2] if not decoder.keypoints else names))


def people_candidates(outputs: Mapping[str, NDArray[Any]], decoder: OneStage) -> Candidates:
    """What a one-stage network says of N frames, in pixels of the input (centres are integers).

    Raises:
        SpecError: An output is absent or does not look as it should.
    """
    return candidates(
        named_output(outputs, decoder.boxes, "(N, A, 4)"),
        named_output(outputs, decoder.scores, "(N, A)"),
        named_output(outputs, decoder.keypoints, "(N, A, K, 2)") if decoder.keypoints else None,
        named_output(outputs, decoder.keypoint_scores, "(N, A, K)")
        if decoder.keypoints and decoder.keypoint_scores
        else None,
    )


def named_output(outputs: Mapping[str, NDArray[Any]], name: str, shape: str) -> Floats:
    """One output as float32.

    Args:
        outputs: The network's outputs by name.
        name: Which one.
        shape: What it has to look like, "(N, K, 2)": the number of axes is checked, and every size that is a number.

    Raises:
        SpecError: It is absent or does not look like that.
    """
    if name not in outputs:
        raise SpecError(
            "decoder",
            found=f"network outputs {sorted(outputs)}",
            expected=f"an output named {name!r}",
            fix="correct the decoder in the model specification",
        )
    values = np.asarray(outputs[name], np.float32)
    sizes = shape.strip("()").split(", ")
    if values.ndim != len(sizes) or any(s.isdigit() and int(s) != n for s, n in zip(sizes, values.shape, strict=True)):
        raise SpecError(f"decoder: output {name!r}", found=f"shape {values.shape}", expected=shape)
    return values
