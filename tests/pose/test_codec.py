"""Keypoints to labels and back: accuracy, bias, borders, scores, and outputs that do not fit."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgepose.errors import SpecError
from edgepose.pose.codec import decode, encode_heatmap, encode_regression, encode_simcc, output_names
from edgepose.spec import Decoder, Heatmap, Regression, SimCC

quick = settings(max_examples=40, deadline=None)
HW = (96, 64)  # height and width differ, so that a swapped axis shows
DARK = Heatmap(stride=4.0)
TWO_BINS = SimCC(split_ratio=2.0)
MEAN = Heatmap(stride=4.0, refine="softargmax")
SHARES = Regression(input_hw=HW)
PRECISE = (TWO_BINS, DARK, MEAN, SHARES)  # every decoder that promises a quarter of a pixel


def simcc_outputs(points: np.ndarray, sigma_px: float, decoder: SimCC = TWO_BINS) -> dict[str, np.ndarray]:
    """Logits of a network that has learnt the labels by heart; floored, as no network says minus infinity."""
    labels = encode_simcc(points, HW, decoder, sigma_px)
    return {name: np.log(np.maximum(label, 1e-13)) for name, label in zip((decoder.x, decoder.y), labels, strict=True)}


def points_between(low: float, high_x: float, high_y: float) -> st.SearchStrategy[np.ndarray]:
    x, y = st.floats(low, high_x, width=32), st.floats(low, high_y, width=32)
    return st.lists(st.tuples(x, y), min_size=1, max_size=6).map(lambda p: np.array([p], np.float32))


anywhere = points_between(0, HW[1] - 1, HW[0] - 1)


def outputs_for(points: np.ndarray, decoder: Decoder, sigma_px: float = 3.0) -> dict[str, np.ndarray]:
    """The outputs of a network that has learnt the labels by heart."""
    match decoder:
        case SimCC():
            return simcc_outputs(points, sigma_px, decoder)
        case Heatmap():
            return {decoder.output: encode_heatmap(points, HW, decoder, sigma_px)}
        case Regression():
            scales = np.full(points.shape, 0.02, np.float32)
            return {decoder.keypoints: encode_regression(points, decoder), decoder.scales: scales}


def decoded(points: np.ndarray, decoder: Decoder, sigma_px: float = 3.0) -> np.ndarray:
    return decode(outputs_for(points, decoder, sigma_px), decoder)[0]


@quick
@given(anywhere, st.sampled_from([1.0, 2.0, 3.0, 5.0]))
def test_simcc_round_trip_is_exact_up_to_the_border(points: np.ndarray, sigma_px: float) -> None:
    found, scores = decode(simcc_outputs(points, sigma_px), SimCC())
    assert found.shape == points.shape
    assert found.dtype == scores.dtype == np.float32
    assert np.abs(found - points).max() <= 0.02


@quick
@given(anywhere, st.sampled_from([3.0, 4.0, 5.0]), st.sampled_from([DARK, MEAN]))
def test_heatmap_round_trip_is_within_a_quarter_pixel_up_to_the_border(
    points: np.ndarray, sigma_px: float, decoder: Heatmap
) -> None:
    assert np.abs(decoded(points, decoder, sigma_px) - points).max() <= 0.25


@quick
@given(points_between(6, HW[1] - 7, HW[0] - 7), st.sampled_from([2.0, 2.5]), st.sampled_from([DARK, MEAN]))
def test_heatmap_narrower_than_its_cells_is_still_within_a_quarter_pixel_inside(
    points: np.ndarray, sigma_px: float, decoder: Heatmap
) -> None:
    assert np.abs(decoded(points, decoder, sigma_px) - points).max() <= 0.25


@quick
@given(points_between(-20, HW[1] + 20, HW[0] + 20))
def test_regression_round_trip_is_exact_even_outside_the_crop(points: np.ndarray) -> None:
    assert np.abs(decoded(points, SHARES) - points).max() < 1e-4


def test_regression_shares_are_measured_between_the_outer_edges() -> None:
    outputs = {"keypoints": np.array([[[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]]]), "scales": np.full((1, 3, 2), 0.01)}
    assert decode(outputs, SHARES)[0].tolist() == [[[-0.5, -0.5], [63.5, 95.5], [31.5, 47.5]]]
    assert encode_regression(np.array([[[0.0, 0.0]]]), SHARES).tolist() == [[[0.5 / 64, pytest.approx(0.5 / 96)]]]


def test_regression_is_as_sure_as_its_scales_are_small() -> None:
    # Scales of 3 pixels on both axes: a Laplacian has 1 - 1/e of its mass within one scale.
    scales = np.array([[[3 / 64, 3 / 96], [0.0, 0.0], [1.0, 1.0]]])
    scores = decode({"keypoints": np.zeros((1, 3, 2)), "scales": scales}, SHARES)[1]
    assert scores[0] == pytest.approx([1 - np.exp(-1), 1.0, np.sqrt((1 - np.exp(-3 / 64)) * (1 - np.exp(-3 / 96)))])


@pytest.mark.parametrize("decoder", PRECISE, ids=lambda d: getattr(d, "refine", type(d).__name__))
def test_there_is_no_bias_over_all_places_and_phases(decoder: Decoder) -> None:
    rng = np.random.default_rng(0)
    points = (rng.uniform(size=(1, 2000, 2)) * (HW[1] - 1, HW[0] - 1)).astype(np.float32)
    error = decoded(points, decoder) - points
    assert np.abs(error.mean((0, 1))).max() < 0.005
    phase = (points % 4).astype(int)  # and none within a heat map's cell either
    for axis in (0, 1):
        for part in range(4):
            assert np.abs(error[..., axis][phase[..., axis] == part].mean()) < 0.02


@quick
@given(points_between(0, HW[1] - 17, HW[0] - 17), st.integers(0, 4), st.integers(0, 4), st.sampled_from(PRECISE))
def test_shifting_the_labels_by_whole_cells_shifts_the_answer_by_as_much(
    points: np.ndarray, right: int, down: int, decoder: Decoder
) -> None:
    shift = np.array([4 * right, 4 * down], np.float32)
    assert np.abs(decoded(points + shift, decoder) - decoded(points, decoder) - shift).max() < 0.02


@quick
@given(anywhere, st.floats(-3, 3), st.floats(-3, 3), st.sampled_from(PRECISE))
def test_shifting_the_labels_a_little_shifts_the_answer_as_little(
    points: np.ndarray, right: float, down: float, decoder: Decoder
) -> None:
    moved = np.clip(points + np.array([right, down], np.float32), 0, (HW[1] - 1, HW[0] - 1)).astype(np.float32)
    assert np.abs((decoded(moved, decoder) - decoded(points, decoder)) - (moved - points)).max() < 0.05


@quick
@given(anywhere, st.sampled_from(PRECISE))
def test_mirroring_the_labels_mirrors_the_answer_about_the_pixel_centres(points: np.ndarray, decoder: Decoder) -> None:
    last = np.array([HW[1] - 1, HW[0] - 1], np.float32)
    assert np.abs(decoded(points, decoder) + decoded(last - points, decoder) - last).max() < 0.02


def _sweep() -> np.ndarray:
    """(1, 200, 2) points over the inside of the crop, at every sub-pixel phase."""
    return np.stack([np.linspace(12, 51, 200), np.linspace(15, 80, 200)], -1)[None].astype(np.float32)


def test_a_simcc_peak_is_where_most_of_the_probability_is_nearby_not_the_highest_bin() -> None:
    probability = np.full((1, 1, 256), 1e-6)
    probability[..., 40] = 0.12  # one bin, a spike of noise
    probability[..., 150:161] = 0.08
    x = np.log(probability).astype(np.float32)
    (keypoint,), _ = decode({"simcc_x": x, "simcc_y": x}, SimCC())
    assert keypoint[0] == pytest.approx([155 / 2, 155 / 2], abs=1e-3)


@pytest.mark.parametrize("place", [60, 60.5, 2, 255])
def test_simcc_logits_that_are_sure_of_one_or_two_bins_are_taken_at_their_word(place: float) -> None:
    x = np.full((1, 1, 256), -60, np.float32)
    x[..., [math.floor(place), math.ceil(place)]] = 10
    (keypoint,), (score,) = decode({"simcc_x": x, "simcc_y": x}, SimCC())
    assert keypoint[0] == pytest.approx([place / 2] * 2, abs=0.1)
    assert score[0] == pytest.approx(1)


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


@pytest.mark.parametrize("refine", ["none", "quarter", "dark", "softargmax"])
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
    for decoder in PRECISE:
        assert np.abs(decoded(points, decoder) - points).max() < 0.05


def test_quarter_refinement_beside_a_border_moves_along_it_only() -> None:
    maps = np.zeros((1, 1, 24, 16), np.float32)
    maps[0, 0, 0, 7] = 1
    maps[0, 0, 1, 7] = maps[0, 0, 0, 8] = 0.5
    assert decode({"heatmap": maps}, Heatmap(stride=4.0, refine="quarter"))[0].tolist() == [[[30.5, 1.5]]]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_maps_too_small_to_refine_give_the_centre_of_the_cell(size: int) -> None:
    maps = np.zeros((1, 1, size, size), np.float32)
    maps[0, 0, -1, -1] = 1
    for decoder in (DARK, MEAN):
        assert decode({"heatmap": maps}, decoder)[0].tolist() == [[[4 * size - 2.5] * 2]]


def test_a_noisy_border_moves_a_peak_by_less_than_its_cell() -> None:
    rng = np.random.default_rng(0)
    points = np.stack([rng.uniform(0, 1, 200), rng.uniform(10, 80, 200)], -1)[None].astype(np.float32)
    maps = encode_heatmap(points, HW, DARK, 4.0)
    noisy = maps + rng.normal(0, 0.03, maps.shape).astype(np.float32)
    for decoder in (DARK, MEAN):
        error = decode({"heatmap": noisy}, decoder)[0] - points
        assert np.abs(error).mean() < 0.6
        assert np.abs(error).max() < 4


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
@given(heat, st.sampled_from(["none", "quarter", "dark", "softargmax"]))
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
    empty |= {"keypoints": np.empty((0, 3, 2)), "scales": np.empty((0, 3, 2))}
    for decoder in (SimCC(), DARK, MEAN, SHARES):
        keypoints, scores = decode(empty, decoder)
        assert keypoints.shape == (0, 3, 2)
        assert scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("decoder", "outputs", "named"),
    [
        (SimCC(), {"simcc_x": np.zeros((1, 2, 8))}, "simcc_y"),
        (SimCC(x="a"), {"simcc_x": np.zeros((1, 2, 8)), "simcc_y": np.zeros((1, 2, 8))}, "'a'"),
        (Heatmap(), {"maps": np.zeros((1, 2, 8, 8))}, "'heatmap'"),
        (SHARES, {"keypoints": np.zeros((1, 2, 2))}, "'scales'"),
    ],
)
def test_a_missing_output_is_named_with_those_there_are(
    decoder: Decoder, outputs: dict[str, np.ndarray], named: str
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
    with pytest.raises(SpecError, match=r"scales.*\(1, 2, 1\).*\(N, K, 2\)"):
        decode({"keypoints": np.zeros((1, 2, 2)), "scales": np.zeros((1, 2, 1))}, SHARES)


def test_names_of_the_outputs_are_those_that_decoding_reads() -> None:
    for decoder in (SimCC(x="a", y="b"), Heatmap(output="c"), Regression(HW, keypoints="d", scales="e")):
        outputs = outputs_for(np.full((1, 2, 2), 20.0, np.float32), decoder)
        assert tuple(outputs) == output_names(decoder)
        for name in outputs:
            with pytest.raises(SpecError, match=repr(name)):
                decode({other: value for other, value in outputs.items() if other != name}, decoder)


# Conventions of other people's networks


@pytest.mark.parametrize(
    ("alignment", "cell_x", "expected_x"),
    [("tiled", 5, 21.5), ("scaled", 5, 20.0), ("corners", 5, 5 * 31 / 7), ("corners", 7, 31.0), ("scaled", 0, 0.0)],
)
def test_a_cell_stands_for_what_the_alignment_says(
    alignment: Literal["tiled", "scaled", "corners"], cell_x: int, expected_x: float
) -> None:
    decoder = Heatmap(stride=4.0, refine="none", alignment=alignment)
    maps = np.zeros((1, 1, 6, 8), np.float32)  # of an input 24 high and 32 wide
    maps[0, 0, 2, cell_x] = 1
    keypoints, _ = decode({"heatmap": maps}, decoder)
    assert keypoints[0, 0, 0] == pytest.approx(expected_x)


@pytest.mark.parametrize("alignment", ["tiled", "scaled", "corners"])
def test_every_alignment_decodes_what_it_encoded(alignment: Literal["tiled", "scaled", "corners"]) -> None:
    decoder = Heatmap(stride=4.0, alignment=alignment)
    points = np.array([[[10.3, 40.9], [33.0, 12.2]]], np.float32)
    maps = encode_heatmap(points, (64, 48), decoder, sigma_px=8.0)
    np.testing.assert_allclose(decode({"heatmap": maps}, decoder)[0], points, atol=0.1)


def test_coordinates_with_scores_or_with_nothing() -> None:
    outputs = {
        "keypoints": np.array([[[0.5, 0.25], [1.0, 0.0]]], np.float32),
        "scores": np.array([[0.25, 1.5]], np.float32),
    }
    keypoints, scores = decode(outputs, Regression((40, 20), scales="", scores="scores"))
    assert keypoints.tolist() == [[[9.5, 9.5], [19.5, -0.5]]]
    assert scores.tolist() == [[0.25, 1.0]]
    assert decode(outputs, Regression((40, 20), scales=""))[1].tolist() == [[1, 1]]
    assert output_names(Regression((40, 20), scales="", scores="scores")) == ("keypoints", "scores")
