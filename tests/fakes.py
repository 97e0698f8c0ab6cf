"""Fakes that stand for the outside world in tests, and the small specification they answer to.

Invariant: a fake is a real implementation of the interface, only smaller; it checks its input as the real one does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgepose.runtime.session import ClosedSession, check_feeds
from edgepose.spec import Keypoints, ModelSpec, Preprocess, SimCC, TensorSpec

Array = NDArray[Any]
HEIGHT, WIDTH = 48, 32


def spot_spec() -> ModelSpec:
    """A network with two keypoints: the brightest blue spot and the brightest red one."""
    return ModelSpec(
        name="spots",
        keypoints=Keypoints(names=("blue", "red"), skeleton=((0, 1),), sigmas=(0.05, 0.05)),
        preprocess=Preprocess(input_hw=(HEIGHT, WIDTH), color="bgr", mean=(0, 0, 0), std=(255, 255, 255)),
        decoder=SimCC(split_ratio=1.0),
        inputs=(TensorSpec("images", ("batch", 3, HEIGHT, WIDTH)),),
        outputs=(TensorSpec("simcc_x", ("batch", 2, WIDTH)), TensorSpec("simcc_y", ("batch", 2, HEIGHT))),
    )


def spot_outputs(images: Array) -> dict[str, Array]:
    """What the spot network answers: the sums of each channel over rows and over columns.

    Args:
        images: (N, 3, h, w) float32, blue first.
    """
    planes = images[:, [0, 2]]
    return {"simcc_x": planes.sum(axis=2), "simcc_y": planes.sum(axis=3)}


class FakeSession:
    """A session whose network is a Python function; `batches` records the size of each call.

    Args:
        spec: Gives names and shapes.
        network: From the only input to the outputs by name.
        batch: Fixed batch size; 0 leaves it free.
    """

    def __init__(
        self, spec: ModelSpec, network: Callable[[Array], dict[str, Array]] = spot_outputs, *, batch: int = 0
    ) -> None:
        self.inputs = tuple(TensorSpec(t.name, (batch or t.shape[0], *t.shape[1:]), t.dtype) for t in spec.inputs)
        self.outputs = spec.outputs
        self.batches: list[int] = []
        self.closed = False
        self._network = network

    def infer(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        if self.closed:
            raise ClosedSession
        (images,) = check_feeds(feeds, self.inputs).values()
        self.batches.append(len(images))
        return self._network(images)

    def close(self) -> None:
        self.closed = True


def spot_frame(blue_xy: tuple[float, float], red_xy: tuple[float, float], hw: tuple[int, int] = (240, 320)) -> Array:
    """A (H, W, 3) uint8 BGR frame with one round blue and one round red spot, centres in pixels, x first."""
    y, x = np.mgrid[: hw[0], : hw[1]]
    frame = np.zeros((*hw, 3), np.uint8)
    for channel, (cx, cy) in ((0, blue_xy), (2, red_xy)):
        frame[..., channel] = np.round(255 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * 6.0**2)))
    return frame
