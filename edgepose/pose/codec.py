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
from edgepose.pose.regression import decode_regression, encode_regression
from edgepose.pose.simcc import decode_simcc, encode_simcc
from edgepose.spec import Decoder, Heatmap, Regression, SimCC

__all__ = ["decode", "encode_heatmap", "encode_regression", "encode_simcc", "named_output", "output_names"]

Floats = NDArray[np.float32]


def decode(outputs: Mapping[str, NDArray[Any]], decoder: Decoder) -> tuple[Floats, Floats]:
    """Network outputs to keypoints.

    Args:
        outputs: The network's outputs by name; logits for SimCC, heat-map values for Heatmap, shares for Regression.
        decoder: Which outputs to read, and how.

    Returns:
        Keypoints (N, K, 2) float32 in pixels of the input crop, and scores (N, K) float32 in 0..1.

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
            return decode_regression(shares, named_output(outputs, decoder.scales, "(N, K, 2)"), decoder)


def output_names(decoder: Decoder) -> tuple[str, ...]:
    """The outputs that a decoder reads, in the order in which a network puts them out."""
    match decoder:
        case SimCC():
            return decoder.x, decoder.y
        case Heatmap():
            return (decoder.output,)
        case Regression():
            return decoder.keypoints, decoder.scales


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
