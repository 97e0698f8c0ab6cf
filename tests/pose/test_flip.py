"""The flip test: bins, columns and shares mirrored exactly, sides swapped, two answers merged into one."""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.errors import SpecError
from edgepose.pose.codec import decode, encode_heatmap, encode_regression, encode_simcc
from edgepose.pose.flip import merge_flipped, mirror_images, mirror_order, unmirror
from edgepose.spec import Decoder, Heatmap, Keypoints, ModelSpec, Preprocess, Regression, SimCC, TensorSpec

quick = settings(max_examples=40, deadline=None)
HW = (96, 64)
NAMES = Keypoints(("nose", "left_hand", "right_hand"), flip_pairs=((1, 2),))
DECODERS = (
    SimCC(split_ratio=2.0), SimCC(split_ratio=1.0), SimCC(split_ratio=1.5),
    Heatmap(stride=4.0), Heatmap(stride=4.0, refine="softargmax"), Regression(HW),
)  # fmt: skip


def spec_with(decoder: Decoder, keypoints: Keypoints = NAMES) -> ModelSpec:
    preprocess = Preprocess(input_hw=HW)
    return ModelSpec("net", keypoints, preprocess, decoder, (), (), visibility="seen", uncertainty="errors")


def answer(points: np.ndarray, decoder: Decoder) -> dict[str, np.ndarray]:
    """What a network that knows the (K, 2) points says, and visibility and errors that tell the joints apart."""
    match decoder:
        case SimCC():
            logits = [np.log(np.maximum(p, 1e-13)) for p in encode_simcc(points[None], HW, decoder, 3.0)]
            outputs = {decoder.x: logits[0], decoder.y: logits[1]}
        case Heatmap():
            outputs = {decoder.output: encode_heatmap(points[None], HW, decoder, 3.0)}
        case Regression():
            outputs = {decoder.keypoints: encode_regression(points[None], decoder)}
            outputs[decoder.scales] = np.array([[[0.01, 0.02], [0.03, 0.04], [0.05, 0.06]]], np.float32)
    return outputs | {"seen": np.array([[0.0, 1.0, 2.0]]), "errors": np.array([[3.0, 4.0, 5.0]])}


def mirrored_answer(points: np.ndarray, decoder: Decoder) -> dict[str, np.ndarray]:
    """What the same network says of the mirrored crop: x becomes w - 1 - x, and the hands change places."""
    order = [0, 2, 1]
    turned = np.stack([HW[1] - 1 - points[:, 0], points[:, 1]], -1)[order]
    outputs = answer(turned.astype(np.float32), decoder)
    said = {"seen": outputs["seen"][:, order], "errors": outputs["errors"][:, order]}
    if isinstance(decoder, Regression):
        said[decoder.scales] = outputs[decoder.scales][:, order]
    return outputs | said


@st.composite
def three_points(draw: st.DrawFn) -> np.ndarray:
    rows = st.tuples(st.floats(0, HW[1] - 1, width=32), st.floats(0, HW[0] - 1, width=32))
    return np.array(draw(st.lists(rows, min_size=3, max_size=3)), np.float32)


@quick
@given(three_points(), st.sampled_from(DECODERS))
def test_answer_to_the_mirrored_crop_turns_into_the_answer_to_the_crop(points: np.ndarray, decoder: Decoder) -> None:
    expected = answer(points, decoder)
    found = unmirror(mirrored_answer(points, decoder), spec_with(decoder))
    assert set(found) == set(expected)
    shift_px = np.abs(decode(found, decoder)[0] - decode(expected, decoder)[0])[0].max(1)
    inside = np.abs(points[:, 0] - (HW[1] - 1) / 2) < (HW[1] - 1) / 2 - 3.0  # beyond the borders bins are extrapolated
    assert (shift_px < np.where(inside, 0.03, 0.1)).all()
    for name in ("seen", "errors"):
        assert np.array_equal(found[name], expected[name])


@quick
@given(three_points(), st.sampled_from(DECODERS))
def test_merging_two_equal_answers_changes_nothing(points: np.ndarray, decoder: Decoder) -> None:
    expected = answer(points, decoder)
    found = merge_flipped(expected, mirrored_answer(points, decoder), spec_with(decoder))
    assert np.abs(decode(found, decoder)[0] - decode(expected, decoder)[0]).max() < 0.03
    # With one and a half bins per pixel a mirrored answer lies between bins, which flattens a peak at the border most.
    assert decode(found, decoder)[1] == pytest.approx(decode(expected, decoder)[1], abs=0.04)


@quick
@given(three_points(), st.sampled_from(DECODERS))
def test_merging_is_symmetric_so_the_mean_has_no_side(points: np.ndarray, decoder: Decoder) -> None:
    # The merged answer of the mirrored crop must be the mirror image of the merged answer of the crop.
    points = np.clip(points, 8, 50)
    one, other = answer(points, decoder), mirrored_answer(points + np.float32(1.5), decoder)
    spec = spec_with(decoder)
    merged, turned = (
        decode(merge_flipped(one, other, spec), decoder)[0],
        decode(merge_flipped(other, one, spec), decoder)[0],
    )
    assert np.abs(merged[0, [0, 2, 1], 0] + turned[0, :, 0] - (HW[1] - 1)).max() < 0.05
    assert np.abs(merged - (points + 0.75)).max() < 0.25


@pytest.mark.parametrize("ratio", [1.0, 2.0, 3.0])
def test_bins_go_to_the_bin_of_the_mirrored_coordinate(ratio: float) -> None:
    decoder = SimCC(split_ratio=ratio)
    bins, last = round(HW[1] * ratio), round((HW[1] - 1) * ratio)
    x = np.random.default_rng(0).normal(size=(2, 3, bins)).astype(np.float32)
    outputs = {"simcc_x": x, "simcc_y": np.zeros((2, 3, 8)), "seen": np.zeros((2, 3)), "errors": np.zeros((2, 3))}
    found = unmirror(outputs, spec_with(decoder))["simcc_x"]
    for b in range(last + 1):
        assert np.array_equal(found[:, [0, 2, 1], b], x[:, :, last - b])
    assert found[:, :, last + 1 :].shape[-1] == ratio - 1  # behind the last pixel's centre: no partner
    assert (found[:, :, last + 1 :] <= found[:, :, last : last + 1]).all()


def test_columns_are_reversed_exactly_and_sides_swapped() -> None:
    maps = np.random.default_rng(0).normal(size=(2, 3, 24, 16)).astype(np.float32)
    outputs = {"heatmap": maps, "seen": np.zeros((2, 3)), "errors": np.zeros((2, 3))}
    found = unmirror(outputs, spec_with(Heatmap(stride=4.0)))["heatmap"]
    assert np.array_equal(found, maps[:, [0, 2, 1], :, ::-1])


def test_images_are_mirrored_in_memory_order() -> None:
    images = np.arange(24, dtype=np.float32).reshape(1, 2, 3, 4)
    turned = mirror_images(images)
    assert turned.flags.c_contiguous
    assert np.array_equal(turned, images[..., ::-1])
    assert np.array_equal(mirror_images(turned), images)


def test_arguments_stay_as_they_were() -> None:
    outputs = answer(np.full((3, 2), 20.0, np.float32), SimCC())
    before = {name: values.copy() for name, values in outputs.items()}
    merge_flipped(outputs, outputs, spec_with(SimCC()))
    assert all(np.array_equal(outputs[name], before[name]) for name in outputs)


def test_sides_swap_by_the_pairs() -> None:
    assert mirror_order(NAMES).tolist() == [0, 2, 1]
    assert mirror_order(Keypoints(("blue", "red"))).tolist() == [0, 1]
    with pytest.raises(SpecError, match=r"flip_pairs: found none, and keypoints with a left and a right"):
        mirror_order(msgspec.structs.replace(NAMES, flip_pairs=()))
    for pairs in (((1, 1),), ((1, 3),), ((0, -1),), ((0, 1), (1, 2))):
        with pytest.raises(SpecError, match="two keypoints that are in no other pair"):
            mirror_order(msgspec.structs.replace(NAMES, flip_pairs=pairs))


def test_outputs_that_do_not_fit_the_keypoints_are_refused() -> None:
    outputs = answer(np.full((3, 2), 20.0, np.float32), SimCC())
    with pytest.raises(SpecError, match="found 2 keypoints, expected 3"):
        unmirror({**outputs, "simcc_x": outputs["simcc_x"][:, :2]}, spec_with(SimCC()))
    with pytest.raises(SpecError, match="'seen'"):
        unmirror({name: values for name, values in outputs.items() if name != "seen"}, spec_with(SimCC()))


@pytest.mark.parametrize("alignment", ["scaled", "corners"])
def test_other_alignments_of_cells_mirror_about_the_crops_middle(alignment: Literal["scaled", "corners"]) -> None:
    decoder = Heatmap(stride=4.0, alignment=alignment)
    spec = ModelSpec(
        "one", Keypoints(("nose",)), Preprocess((64, 48)), decoder,
        (TensorSpec("images", ("batch", 3, 64, 48)),), (TensorSpec("heatmap", ("batch", 1, 16, 12)),),
    )  # fmt: skip
    point = np.array([[[17.0, 30.0]]], np.float32)
    maps, mirrored = (
        encode_heatmap(place, (64, 48), decoder, sigma_px=8.0) for place in (point, [47, 0] + point * [-1, 1])
    )
    merged = merge_flipped({"heatmap": maps}, {"heatmap": mirrored}, spec)
    np.testing.assert_allclose(decode(merged, decoder)[0], point, atol=0.15)
