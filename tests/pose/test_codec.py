"""Keypoints to labels and back: accuracy, bias, borders, scores, and outputs that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgepose.errors import SpecError
from edgepose.pose.codec import decode, encode_heatmap, encode_simcc
from edgepose.spec import Heatmap, SimCC

quick = settings(max_examples=40, deadline=None)
HW = (96, 64)  # height and width differ, so that a swapped axis shows
DARK = Heatmap(stride=4.0)
TWO_BINS = SimCC(split_ratio=2.0)


def simcc_outputs(points: np.ndarray, sigma_px: float, decoder: SimCC = TWO_BINS) -> dict[str, np.ndarray]:
    """Logits of a network that has learnt the labels by heart; floored, as no network says minus infinity."""
    labels = encode_simcc(points, HW, decoder, sigma_px)
    return {name: np.log(np.maximum(label, 1e-13)) for name, label in zip((decoder.x, decoder.y), labels, strict=True)}


def points_between(low: float, high_x: float, high_y: float) -> st.SearchStrategy[np.ndarray]:
    x, y = st.floats(low, high_x, width=32), st.floats(low, high_y, width=32)
    return st.lists(st.tuples(x, y), min_size=1, max_size=6).map(lambda p: np.array([p], np.float32))


anywhere = points_between(0, HW[1] - 1, HW[0] - 1)


@quick
@given(anywhere, st.sampled_from([1.0, 2.0, 3.0, 5.0]))
def test_simcc_round_trip_is_within_a_quarter_pixel(points: np.ndarray, sigma_px: float) -> None:
    found, scores = decode(simcc_outputs(points, sigma_px), SimCC())
    assert found.shape == points.shape
    assert found.dtype == scores.dtype == np.float32
    assert np.abs(found - points).max() <= 0.2501


@quick
@given(points_between(2, HW[1] - 3, HW[0] - 3))
def test_simcc_inside_the_crop_is_far_better_than_its_bins(points: np.ndarray) -> None:
    assert np.abs(decode(simcc_outputs(points, 3.0), SimCC())[0] - points).max() < 0.02


@quick
@given(points_between(4, HW[1] - 5, HW[0] - 5), st.sampled_from([2.0, 2.5, 3.0]))
def test_heatmap_round_trip_is_within_a_quarter_pixel(points: np.ndarray, sigma_px: float) -> None:
    found, _ = decode({"heatmap": encode_heatmap(points, HW, DARK, sigma_px)}, DARK)
    assert np.abs(found - points).max() <= 0.25


def _sweep() -> np.ndarray:
    """(1, 200, 2) points over the inside of the crop, at every sub-pixel phase."""
    return np.stack([np.linspace(12, 51, 200), np.linspace(15, 80, 200)], -1)[None].astype(np.float32)


def test_simcc_labels_and_answers_mirror_about_the_pixel_centres() -> None:
    points = _sweep()
    mirrored = np.array([HW[1] - 1, HW[0] - 1], np.float32) - points
    for label, flipped, side in zip(
        encode_simcc(points, HW, SimCC(), 2.0), encode_simcc(mirrored, HW, SimCC(), 2.0), HW[::-1], strict=True
    ):
        last = 2 * (side - 1)  # the bin of the last pixel's centre; one more lies behind it
        assert np.abs(flipped[..., : last + 1] - label[..., last::-1]).max() < 1e-6
    found, other = (decode(simcc_outputs(p, 2.0), SimCC())[0] for p in (points, mirrored))
    assert np.abs(found + other - (HW[1] - 1, HW[0] - 1)).max() < 1e-3
    assert np.abs((found - points).mean((0, 1))).max() < 1e-3


@pytest.mark.parametrize("refine", ["none", "quarter", "dark"])
def test_heatmap_labels_and_answers_mirror_about_the_pixel_centres(refine: str) -> None:
    decoder = Heatmap(stride=4.0, refine=refine)  # type: ignore[arg-type]
    points = _sweep()
    mirrored = np.array([HW[1] - 1, HW[0] - 1], np.float32) - points
    maps, flipped = (encode_heatmap(p, HW, decoder, 3.0) for p in (points, mirrored))
    assert np.abs(flipped - maps[..., ::-1, ::-1]).max() < 1e-4
    found, _ = decode({"heatmap": maps}, decoder)
    other, _ = decode({"heatmap": np.flip(maps, (2, 3))}, decoder)
    assert np.abs(found + other - (HW[1] - 1, HW[0] - 1)).max() < 1e-2
    assert np.abs((found - points).mean((0, 1))).max() < 0.1


def test_heatmap_cells_stand_for_their_centres() -> None:
    maps = np.zeros((1, 1, 24, 16), np.float32)
    maps[0, 0, 5, 7] = 1
    assert decode({"heatmap": maps}, Heatmap(stride=4.0, refine="none"))[0].tolist() == [[[29.5, 21.5]]]


def test_quarter_refinement_moves_a_quarter_cell_towards_the_higher_neighbour() -> None:
    maps = np.zeros((1, 1, 24, 16), np.float32)
    maps[0, 0, 5, 7] = 1
    maps[0, 0, 5, 8] = maps[0, 0, 4, 7] = 0.5
    assert decode({"heatmap": maps}, Heatmap(stride=4.0, refine="quarter"))[0].tolist() == [[[30.5, 20.5]]]


@pytest.mark.parametrize("point", [(0, 0), (63, 95), (0, 50), (30, 95), (0.4, 94.6)])
def test_peaks_at_borders_stay_at_borders(point: tuple[float, float]) -> None:
    points = np.array([[point]], np.float32)
    assert np.abs(decode(simcc_outputs(points, 3.0), SimCC())[0] - points).max() <= 0.2501
    # A border cell has no neighbour to refine it by: half a cell.
    found, _ = decode({"heatmap": encode_heatmap(points, HW, DARK, 3.0)}, DARK)
    assert np.abs(found - points).max() <= 2.0


@pytest.mark.parametrize("beyond", [(-30.0, 40.0), (500.0, 40.0), (20.0, -1e5)])
def test_labels_outside_the_crop_are_finite(beyond: tuple[float, float]) -> None:
    points = np.array([[beyond]], np.float32)
    for label in encode_simcc(points, HW, SimCC(), 2.0):
        assert label.sum(-1) == pytest.approx(1)
    assert np.isfinite(encode_heatmap(points, HW, DARK, 2.0)).all()


@pytest.mark.parametrize("ratio", [1.0, 1.5, 2.0, 3.0])
def test_split_ratio_sets_the_bins(ratio: float) -> None:
    points = _sweep()
    decoder = SimCC(split_ratio=ratio)
    x, y = encode_simcc(points, HW, decoder, 3.0)
    assert x.shape == (1, 200, round(64 * ratio))
    assert y.shape == (1, 200, round(96 * ratio))
    assert x.sum(-1) == pytest.approx(1, abs=1e-5)
    assert np.abs(decode(simcc_outputs(points, 3.0, decoder), decoder)[0] - points).max() < 0.05


logits = hnp.arrays(np.float32, (2, 2, 24), elements=st.floats(-60, 60, width=32))
heat = hnp.arrays(np.float32, (2, 2, 6, 4), elements=st.floats(-2, 3, width=32))


@quick
@given(logits, logits)
def test_any_logits_give_keypoints_in_the_crop_and_scores_up_to_one(x: np.ndarray, y: np.ndarray) -> None:
    keypoints, scores = decode({"simcc_x": x, "simcc_y": y}, SimCC())
    assert ((keypoints >= 0) & (keypoints <= 11.5)).all()
    assert ((scores >= 0) & (scores <= 1)).all()


@quick
@given(heat, st.sampled_from(["none", "quarter", "dark"]))
def test_any_heat_maps_give_keypoints_in_the_crop_and_scores_up_to_one(maps: np.ndarray, refine: str) -> None:
    keypoints, scores = decode({"heatmap": maps}, Heatmap(stride=4.0, refine=refine))  # type: ignore[arg-type]
    assert ((keypoints >= 0) & (keypoints <= (15, 23))).all()
    assert ((scores >= 0) & (scores <= 1)).all()


def test_scores_say_how_sure_the_network_is() -> None:
    points = np.array([[[30.0, 40.0]]], np.float32)
    sharp, wide = (decode(simcc_outputs(points, s), SimCC())[1].item() for s in (0.5, 8.0))
    flat = decode({"simcc_x": np.zeros((1, 1, 128)), "simcc_y": np.zeros((1, 1, 192))}, SimCC())[1].item()
    assert sharp > 0.99
    assert 0.2 < wide < 0.6
    assert flat < 0.1
    maps = encode_heatmap(points, HW, DARK, 3.0)
    assert decode({"heatmap": maps}, DARK)[1] == pytest.approx(maps.max())
    assert decode({"heatmap": 0.3 * maps}, DARK)[1] == pytest.approx(0.3 * maps.max())


def test_coarse_steps_of_int8_logits_cost_less_than_a_pixel() -> None:
    points = _sweep()
    outputs = {}
    for name, values in simcc_outputs(points, 3.0).items():
        clipped = np.maximum(values, -12.0)
        step = (clipped.max() - clipped.min()) / 255
        outputs[name] = np.rint(clipped / step) * step
    error = np.abs(decode(outputs, SimCC())[0] - points)
    assert error.max() < 0.5
    assert error.mean() < 0.15


def test_impossible_bins_do_not_spoil_the_position() -> None:
    x = np.full((1, 1, 20), -np.inf, np.float32)
    x[0, 0, 10] = 0
    keypoints, scores = decode({"simcc_x": x, "simcc_y": x}, SimCC())
    assert keypoints.tolist() == [[[5, 5]]]
    assert scores == pytest.approx(1)


def test_memory_layout_and_precision_of_outputs_do_not_matter() -> None:
    maps = encode_heatmap(_sweep()[:, :30].reshape(2, 15, 2), HW, DARK, 3.0)
    expected = decode({"heatmap": maps}, DARK)[0]
    channels_last = np.ascontiguousarray(maps.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert not channels_last.flags.c_contiguous
    assert np.array_equal(decode({"heatmap": channels_last}, DARK)[0], expected)
    assert np.array_equal(decode({"heatmap": maps.astype(np.float64)}, DARK)[0], expected)
    assert np.abs(decode({"heatmap": maps.astype(np.float16)}, DARK)[0] - expected).max() < 0.1


def test_outputs_are_not_changed() -> None:
    outputs = simcc_outputs(_sweep(), 3.0) | {"heatmap": encode_heatmap(_sweep(), HW, DARK, 3.0)}
    before = {name: values.copy() for name, values in outputs.items()}
    decode(outputs, SimCC())
    decode(outputs, DARK)
    assert all(np.array_equal(outputs[name], before[name]) for name in outputs)


def test_nobody_is_a_batch_of_none() -> None:
    empty = {"simcc_x": np.empty((0, 3, 128)), "simcc_y": np.empty((0, 3, 192)), "heatmap": np.empty((0, 3, 24, 16))}
    for decoder in (SimCC(), DARK):
        keypoints, scores = decode(empty, decoder)
        assert keypoints.shape == (0, 3, 2)
        assert scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("decoder", "outputs", "named"),
    [
        (SimCC(), {"simcc_x": np.zeros((1, 2, 8))}, "simcc_y"),
        (SimCC(x="a"), {"simcc_x": np.zeros((1, 2, 8)), "simcc_y": np.zeros((1, 2, 8))}, "'a'"),
        (Heatmap(), {"maps": np.zeros((1, 2, 8, 8))}, "'heatmap'"),
    ],
)
def test_a_missing_output_is_named_with_those_there_are(
    decoder: SimCC | Heatmap, outputs: dict[str, np.ndarray], named: str
) -> None:
    with pytest.raises(SpecError) as caught:
        decode(outputs, decoder)
    assert named in caught.value.expected
    assert all(name in caught.value.found for name in outputs)


def test_outputs_of_another_kind_are_refused() -> None:
    maps = np.zeros((1, 2, 8, 8))
    with pytest.raises(SpecError, match=r"simcc_x.*\(1, 2, 8, 8\).*\(N, K, bins\)"):
        decode({"simcc_x": maps, "simcc_y": maps}, SimCC())
    with pytest.raises(SpecError, match=r"heatmap.*\(2, 8, 8\).*\(N, K, h, w\)"):
        decode({"heatmap": maps[0]}, Heatmap())
