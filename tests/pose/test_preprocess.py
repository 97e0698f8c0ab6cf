"""Crops: which part of the source they show, where its pixels land, and the way back."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.pose.preprocess import apply_transforms, crop_transforms, normalise, to_source, warp
from edgepose.spec import Preprocess

quick = settings(max_examples=40, deadline=None)
sizes = st.sampled_from([(64, 64), (96, 64), (64, 160), (256, 192)])
corners = st.floats(-2000, 4000)
sides = st.floats(2, 3000)


@quick
@given(sizes, st.lists(st.tuples(corners, corners, sides, sides), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_to_source_inverts_apply_transforms(
    hw: tuple[int, int], boxes: list[tuple[float, float, float, float]], seed: int
) -> None:
    xyxy = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes])
    transforms = crop_transforms(xyxy, Preprocess(input_hw=hw))
    # Points of the crop and around it, and the source points that they are.
    inside = np.random.default_rng(seed).uniform(-hw[0], 2 * hw[0], (len(boxes), 5, 2))
    source = to_source(inside, transforms)
    assert source.shape == inside.shape
    assert source.dtype == np.float32
    # What float32 coordinates of that size can say, in pixels of the crop.
    resolution = np.abs(source).max() * 2**-23 * transforms[:, 0, 0].max()
    assert np.abs(apply_transforms(source, transforms) - inside).max() <= 1e-3 + 2 * resolution


@quick
@given(sizes, st.tuples(corners, corners, sides, sides), st.floats(1.0, 2.0))
def test_crop_is_the_padded_box_widened_to_the_input(
    hw: tuple[int, int], box: tuple[float, float, float, float], padding: float
) -> None:
    (height, width), (x, y, w, h) = hw, box
    transform = crop_transforms(np.array([[x, y, x + w, y + h]]), Preprocess(input_hw=hw, padding=padding))[0]
    scale = transform[0, 0]
    assert transform[1, 1] == scale
    assert transform[0, 1] == transform[1, 0] == 0
    # The box's centre is the input's centre, where integer coordinates are pixel centres.
    centre = transform[:, :2] @ (x + w / 2, y + h / 2) + transform[:, 2]
    assert centre == pytest.approx(((width - 1) / 2, (height - 1) / 2), abs=1e-6 * max(1, scale * 7000))
    # The box fills 1 / padding of one side and no more than that of the other.
    shares = np.array([scale * w / width, scale * h / height])
    assert shares.max() == pytest.approx(1 / padding)


@pytest.mark.parametrize(
    ("box", "input_hw", "crop_wh"),
    [
        ((10, 20, 50, 40), (64, 64), (50, 50)),  # wide box, square input: the height is widened
        ((10, 20, 30, 60), (64, 64), (50, 50)),  # tall box, square input: the width
        ((10, 20, 50, 40), (64, 128), (50, 25)),  # the input's aspect: nothing is widened
        ((10, 20, 30, 60), (64, 128), (100, 50)),
        ((10, 20, 50, 40), (128, 64), (50, 100)),
    ],
)
def test_crop_sizes_by_hand(box: tuple[int, ...], input_hw: tuple[int, int], crop_wh: tuple[float, float]) -> None:
    transform = crop_transforms(np.array([box]), Preprocess(input_hw=input_hw))
    height, width = input_hw
    edges = to_source(np.array([[[-0.5, -0.5], [width - 0.5, height - 0.5]]]), transform)[0]
    assert edges[1] - edges[0] == pytest.approx(crop_wh)
    assert edges.mean(0) == pytest.approx(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2))


def test_integer_boxes_are_taken_as_they_are() -> None:
    preprocess = Preprocess(input_hw=(64, 64))
    whole, floating = np.array([[1, 2, 4, 9]]), np.array([[1.0, 2.0, 4.0, 9.0]], np.float32)
    assert np.array_equal(crop_transforms(whole, preprocess), crop_transforms(floating, preprocess))


def _noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_a_crop_of_the_frames_own_size_is_the_frame() -> None:
    frame = _noise(48, 64)
    preprocess = Preprocess(input_hw=(48, 64), padding=1.0)
    # A pixel covers half a pixel around its centre.
    transforms = crop_transforms(np.array([[-0.5, -0.5, 63.5, 47.5]]), preprocess)
    assert np.array_equal(warp(frame, transforms, (48, 64))[0], frame)


def test_outside_the_frame_is_black() -> None:
    frame = _noise(48, 64)
    transforms = crop_transforms(np.array([[9.5, -20.5, 73.5, 27.5]]), Preprocess(input_hw=(48, 64), padding=1.0))
    crop = warp(frame, transforms, (48, 64))[0]
    expected = np.zeros_like(frame)
    expected[20:, :54] = frame[:28, 10:]
    assert np.array_equal(crop, expected)


@pytest.mark.parametrize("box", [(11.0, 7.0, 39.0, 44.0), (-9.0, 20.0, 90.0, 40.0)])
def test_a_mirrored_frame_gives_the_mirrored_crop(box: tuple[float, ...]) -> None:
    """A shift of half a pixel anywhere would show here twice."""
    frame = cv2.GaussianBlur(_noise(60, 80), (0, 0), 2)
    x0, y0, x1, y1 = box
    mirrored_box = (79 - x1, 59 - y1, 79 - x0, 59 - y0)
    preprocess = Preprocess(input_hw=(96, 64))
    crop = warp(frame, crop_transforms(np.array([box]), preprocess), (96, 64))[0]
    mirrored = warp(frame[::-1, ::-1], crop_transforms(np.array([mirrored_box]), preprocess), (96, 64))[0]
    assert np.abs(mirrored[::-1, ::-1].astype(int) - crop).max() <= 3


def test_a_spot_is_where_the_transform_says() -> None:
    spot = np.array([41.3, 27.6])
    y, x = np.mgrid[:80, :100]
    blob = 255 * np.exp(-((x - spot[0]) ** 2 + (y - spot[1]) ** 2) / (2 * 2.5**2))
    frame = np.repeat(np.rint(blob).astype(np.uint8)[..., None], 3, axis=2)
    transforms = crop_transforms(np.array([[20, 10, 60, 50], [30, 20, 90, 40]]), Preprocess(input_hw=(96, 64)))
    crops = warp(frame, transforms, (96, 64))
    assert crops.shape == (2, 96, 64, 3)
    for crop, expected in zip(crops, apply_transforms(np.tile(spot, (2, 1, 1)), transforms)[:, 0], strict=True):
        mass = crop[..., 0].astype(np.float64)
        rows, columns = np.mgrid[:96, :64]
        found = np.array([(mass * columns).sum(), (mass * rows).sum()]) / mass.sum()
        assert np.abs(found - expected).max() < 0.1


@pytest.mark.parametrize("color", ["rgb", "bgr"])
def test_normalise_follows_its_definition(color: str) -> None:
    crops = np.stack([_noise(8, 6, 1), _noise(8, 6, 2)])
    preprocess = Preprocess(input_hw=(8, 6), color=color, mean=(10, 20, 30), std=(2, 3, 4))  # type: ignore[arg-type]
    tensor = normalise(crops, preprocess)
    channels = crops[..., ::-1] if color == "rgb" else crops
    expected = ((channels - np.array([10.0, 20, 30])) / [2, 3, 4]).transpose(0, 3, 1, 2)
    assert tensor.dtype == np.float32
    assert tensor.flags.c_contiguous
    assert np.abs(tensor - expected).max() < 1e-4


def test_nobody_is_a_batch_of_none() -> None:
    preprocess = Preprocess(input_hw=(32, 64))
    transforms = crop_transforms(np.empty((0, 4)), preprocess)
    crops = warp(_noise(10, 10), transforms, preprocess.input_hw)
    assert crops.shape == (0, 32, 64, 3)
    assert normalise(crops, preprocess).shape == (0, 3, 32, 64)
    assert to_source(np.empty((0, 5, 2)), transforms).shape == (0, 5, 2)
