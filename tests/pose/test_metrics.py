"""Metrics against cases worked out by hand.

Invariant: every expected number here was computed on paper or by a formula written differently from the code's.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.data.coco import dataset, read_coco
from edgepose.errors import SpecError
from edgepose.pose import metrics
from edgepose.spec import Keypoints

LSP = Keypoints(
    names=(
        *("right_ankle", "right_knee", "right_hip", "left_hip", "left_knee", "left_ankle"),
        *("right_wrist", "right_elbow", "right_shoulder", "left_shoulder", "left_elbow", "left_wrist"),
        *("neck", "head_top"),
    ),
    sigmas=(0.089, 0.087, 0.107, 0.107, 0.087, 0.089, 0.062, 0.072, 0.079, 0.079, 0.072, 0.062, 0.079, 0.079),
)
HAND = Keypoints(names=("wrist", "thumb_tip", "index_tip"))
RIGHT_HIP, LEFT_SHOULDER, NECK, HEAD = 2, 9, 12, 13


def person() -> np.ndarray:
    """All joints on a 100 px wide, 60 px high grid; left shoulder at (0, 0), right hip at (30, 40): torso 50 px."""
    truth = np.zeros((14, 3))
    truth[:, 0], truth[:, 1], truth[:, 2] = 50.0, 30.0, 2.0
    truth[LEFT_SHOULDER, :2] = 0.0, 0.0
    truth[RIGHT_HIP, :2] = 30.0, 40.0
    truth[0, :2] = 100.0, 60.0
    return truth


def moved(truth: np.ndarray, offsets_px: dict[int, float]) -> np.ndarray:
    predicted = truth[..., :2].copy()
    for joint, offset in offsets_px.items():
        predicted[joint, 0] += offset
    return predicted


def figures(predicted: np.ndarray, truth: np.ndarray, keypoints: Keypoints = LSP) -> dict[str, float]:
    joints = metrics.measure(predicted, truth, keypoints)
    return {name: metrics.pooled(name, joints) for name in metrics.available(keypoints)}


def test_one_person_by_hand() -> None:
    # Torso 50 px: limits 10 and 5 px. Extent 100 px: limit 10 px. Errors: 4, 7, 9.5, 12 px and ten zeros.
    truth = person()
    found = figures(moved(truth, {0: 4.0, 1: 7.0, NECK: 9.5, HEAD: 12.0})[None], truth[None])
    assert found["pck_torso_0.2"] == pytest.approx(13 / 14)
    assert found["pck_torso_0.1"] == pytest.approx(11 / 14)
    assert found["limb12_torso_0.2"] == pytest.approx(1.0)
    assert found["limb12_torso_0.1"] == pytest.approx(11 / 12)
    assert found["limb12_extent_0.1"] == pytest.approx(1.0)
    assert found["mpjpe_px"] == pytest.approx((4 + 7 + 9.5 + 12) / 14)
    assert tuple(found) == metrics.METRICS


def test_an_error_equal_to_the_limit_is_not_below_it() -> None:
    truth = person()
    assert figures(moved(truth, {0: 10.0})[None], truth[None])["pck_torso_0.2"] == pytest.approx(13 / 14)
    assert figures(moved(truth, {0: 9.999})[None], truth[None])["pck_torso_0.2"] == 1.0


def test_auc_is_the_trapezoid_under_the_pooled_curve() -> None:
    truth = np.stack([person(), person()])
    predicted = truth[..., :2] + np.random.default_rng(0).normal(0, 9, (2, 14, 2))
    errors = np.hypot(*(predicted - truth[..., :2]).reshape(-1, 2).T)
    thresholds = np.linspace(0.0, 0.5, 51)
    curve = [(errors < t * 50.0).mean() for t in thresholds]
    assert figures(predicted, truth)["auc"] == pytest.approx(np.trapezoid(curve, thresholds) / 0.5, abs=1e-12)


def test_auc_of_exact_predictions_lacks_only_the_threshold_zero() -> None:
    # No error is below 0, so the first trapezoid of 50 has half its area.
    truth = person()[None]
    assert figures(truth[..., :2], truth)["auc"] == pytest.approx(0.99)


def test_auc_of_one_person_by_hand() -> None:
    # Torso 50 px, thresholds 0, 0.5, 1 … 25 px. Errors: twelve of 0 px (right from the second threshold on: 49.5 of 50
    # steps), one of 12.3 px (from 12.5 px, the 25th step, on: 25.5 of 50) and one of 25 px (never below).
    truth = person()
    found = figures(moved(truth, {0: 12.3, NECK: 25.0})[None], truth[None])
    assert found["auc"] == pytest.approx((12 * 49.5 / 50 + 25.5 / 50 + 0.0) / 14)


def test_joints_are_pooled_not_averaged_over_persons() -> None:
    # First person: 14 joints, all right. Second: torso joints only, both wrong: 14 of 16, not (1 + 0) / 2.
    second = person()
    second[:, 2] = 0.0
    second[[LEFT_SHOULDER, RIGHT_HIP], 2] = 2.0
    truth = np.stack([person(), second])
    predicted = truth[..., :2].copy()
    predicted[1] += 1000.0
    assert figures(predicted, truth)["pck_torso_0.2"] == pytest.approx(14 / 16)


def test_hidden_joints_count_and_unlabelled_ones_never() -> None:
    truth = person()
    truth[0, 2], truth[1, 2] = 1.0, 0.0
    found = figures(moved(truth, {0: 500.0, 1: 500.0})[None], truth[None])
    assert found["pck_torso_0.2"] == pytest.approx(12 / 13)
    assert found["mpjpe_px"] == pytest.approx(500 / 13)


@pytest.mark.parametrize("joint", [LEFT_SHOULDER, RIGHT_HIP])
def test_persons_without_both_torso_joints_count_only_where_no_torso_is_needed(joint: int) -> None:
    incomplete = person()
    incomplete[joint, 2] = 0.0
    truth = np.stack([person(), incomplete])
    predicted = truth[..., :2].copy()
    predicted[1] += 1000.0
    found = figures(predicted, truth)
    assert found["pck_torso_0.2"] == found["pck_torso_0.1"] == found["limb12_torso_0.2"] == 1.0
    assert found["auc"] == pytest.approx(0.99)
    assert found["limb12_extent_0.1"] == pytest.approx(12 / 23)
    assert found["mpjpe_px"] == pytest.approx(13 * np.hypot(1000, 1000) / 27)


def test_nobody_with_a_torso_gives_nan_not_zero() -> None:
    truth = person()[None]
    truth[0, LEFT_SHOULDER, 2] = 0.0
    found = figures(truth[..., :2], truth)
    assert np.isnan(found["pck_torso_0.2"])
    assert np.isnan(found["auc"])
    assert found["mpjpe_px"] == 0.0


def test_extent_is_that_of_labelled_joints_only() -> None:
    truth = person()
    truth[0, 2] = 0.0  # the far corner: x now spans 0..50, y 0..40
    np.testing.assert_array_equal(metrics.extent_px(truth[None]), [50.0])
    truth[:, 2] = 0.0
    assert np.isnan(metrics.extent_px(truth[None])[0])
    truth[3, 2] = 1.0
    np.testing.assert_array_equal(metrics.extent_px(truth[None]), [0.0])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_prediction_that_is_not_finite_is_wrong_rather_than_left_out(value: float) -> None:
    truth = person()[None]
    predicted = truth[..., :2].copy()
    predicted[0, 4, 1] = value
    found = figures(predicted, truth)
    assert found["pck_torso_0.2"] == pytest.approx(13 / 14)
    assert found["limb12_extent_0.1"] == pytest.approx(11 / 12)
    assert found["mpjpe_px"] == np.inf


def test_torso_and_limbs_are_found_by_name_not_by_position() -> None:
    order = np.random.default_rng(1).permutation(14)
    shuffled = Keypoints(names=tuple(LSP.names[i] for i in order))
    truth = person()
    predicted = moved(truth, {0: 4.0, 1: 7.0, NECK: 9.5, HEAD: 12.0})
    assert figures(predicted[None, order], truth[None, order], shuffled) == pytest.approx(
        figures(predicted[None], truth[None])
    )


def test_sets_without_shoulders_and_hips_have_only_extent_and_pixel_metrics() -> None:
    truth = np.array([[[0.0, 0.0, 2.0], [40.0, 0.0, 2.0], [0.0, 20.0, 2.0]]])  # extent 40: limit 4 px
    predicted = truth[..., :2] + np.array([[[3.9, 0.0], [4.1, 0.0], [0.0, 0.0]]])
    assert figures(predicted, truth, HAND) == pytest.approx({"pck_extent_0.1": 2 / 3, "mpjpe_px": 8 / 3})
    with pytest.raises(SpecError, match="twelve limb joints"):
        metrics.joint_values("limb12_extent_0.1", metrics.measure(predicted, truth, HAND))


def test_coco17_has_the_same_twelve_limb_joints(real_data) -> None:
    coco = read_coco(real_data / "coco17" / "train.json", real_data / "coco17" / "images").keypoints
    chosen = {name for name, limb in zip(coco.names, metrics.limb12(coco), strict=True) if limb}
    assert chosen == set(coco.names) - {"nose", "left_eye", "right_eye", "left_ear", "right_ear"}
    assert chosen == set(LSP.names) - {"neck", "head_top"}
    assert metrics.available(coco) == metrics.METRICS


def test_val_has_as_many_torso_persons_and_joints_as_its_description_says(real_data) -> None:
    val = dataset(real_data / "lspet", "val")
    truth = np.stack([person.keypoints for person in val.persons])
    _, counted = metrics.joint_values("pck_torso_0.2", metrics.measure(truth[..., :2], truth, val.keypoints))
    assert (int(counted.any(axis=1).sum()), int(counted.sum())) == (556, 7355)


def test_person_sums_rebuild_the_pooled_metric() -> None:
    rng = np.random.default_rng(2)
    truth = np.stack([person() for _ in range(6)])
    truth[..., 2] = rng.integers(0, 3, truth.shape[:2])
    joints = metrics.measure(truth[..., :2] + rng.normal(0, 8, (6, 14, 2)), truth, LSP)
    for name in metrics.METRICS:
        total, number = metrics.person_sums(name, joints)
        assert total.shape == number.shape == (6,)
        assert total.sum() / number.sum() == pytest.approx(metrics.pooled(name, joints))


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 100.0), st.floats(-500.0, 500.0), st.integers(0, 2**32 - 1))
def test_fractions_do_not_depend_on_scale_or_place(scale: float, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.concatenate([rng.uniform(0, 100, (3, 14, 2)), rng.integers(0, 3, (3, 14, 1))], axis=2)
    predicted = truth[..., :2] + rng.normal(0, 10, (3, 14, 2))
    other = truth.copy()
    other[..., :2] = truth[..., :2] * scale + shift
    before, after = figures(predicted, truth), figures(predicted * scale + shift, other)
    for name in metrics.METRICS[:-1]:
        assert after[name] == pytest.approx(before[name], nan_ok=True)
    assert after["mpjpe_px"] == pytest.approx(before["mpjpe_px"] * scale, nan_ok=True, rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e6, np.nan, np.inf]))
def test_no_figure_looks_at_unlabelled_joints(seed: int, junk: float) -> None:
    rng = np.random.default_rng(seed)
    truth = np.concatenate([rng.uniform(0, 100, (4, 14, 2)), rng.integers(0, 3, (4, 14, 1))], axis=2)
    predicted = truth[..., :2] + rng.normal(0, 10, (4, 14, 2))
    unlabelled = truth[..., 2] == 0
    other_truth, other_predicted = truth.copy(), predicted.copy()
    # COCO writes unlabelled joints as 0, 0; other tools leave anything there. Predictions there are nobody's business.
    other_truth[unlabelled, :2] = rng.uniform(-1e6, 1e6, (int(unlabelled.sum()), 2))
    other_predicted[unlabelled] = junk
    before, after = metrics.measure(predicted, truth, LSP), metrics.measure(other_predicted, other_truth, LSP)
    np.testing.assert_array_equal(after.errors_px, before.errors_px)
    for name in (*metrics.METRICS, "pck_extent_0.1"):
        np.testing.assert_array_equal(metrics.person_sums(name, after), metrics.person_sums(name, before))
        np.testing.assert_array_equal(metrics.pooled(name, after), metrics.pooled(name, before))
    area, sigmas = np.full(4, 900.0), np.array(LSP.sigmas)
    np.testing.assert_array_equal(
        metrics.oks(after.errors_px, area, sigmas), metrics.oks(before.errors_px, area, sigmas)
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_labelled_joint_always_counts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = np.concatenate([rng.uniform(0, 100, (3, 14, 2)), rng.integers(0, 3, (3, 14, 1))], axis=2)
    joints = metrics.measure(truth[..., :2] + 1.0, truth, LSP)
    _, counted = metrics.joint_values("mpjpe_px", joints)
    np.testing.assert_array_equal(counted, truth[..., 2] > 0)
    if counted.any():
        assert metrics.pooled("mpjpe_px", joints) == pytest.approx(2**0.5)


def test_oks_by_hand() -> None:
    # One joint, sigma 0.1, area 400: e = d² / (2 · 400 · 0.2²) = d² / 32.
    errors = np.array([[4.0, np.nan], [0.0, np.inf], [np.nan, np.nan]])
    found = metrics.oks(errors, np.array([400.0, 400.0, 400.0]), np.array([0.1, 0.1]))
    np.testing.assert_allclose(found, [np.exp(-0.5), 0.5, np.nan])


def test_sigmas_come_from_the_set_or_from_coco_by_name() -> None:
    by_name = metrics.oks_sigmas(Keypoints(names=LSP.names))
    np.testing.assert_array_equal(by_name, LSP.sigmas)
    with pytest.raises(SpecError, match="thumb_tip"):
        metrics.oks_sigmas(HAND)
    with pytest.raises(SpecError, match="one per name"):
        metrics.oks_sigmas(Keypoints(names=("nose", "neck"), sigmas=(0.1,)))


def test_arrays_that_do_not_fit_are_refused_with_their_shapes() -> None:
    truth = person()[None]
    with pytest.raises(SpecError, match=r"shape \(1, 13, 2\).*\(1, 14, 2\)"):
        metrics.measure(truth[:, :13, :2], truth, LSP)
    with pytest.raises(SpecError, match=r"\(P, 14, 3\)"):
        metrics.measure(truth[..., :2], truth[..., :2], LSP)
    with pytest.raises(SpecError, match=r"\(P, 3, 3\)"):
        metrics.torso_px(truth, HAND)
    with pytest.raises(SpecError, match="unknown name"):
        metrics.pooled("pck_torso_0.3", metrics.measure(truth[..., :2], truth, LSP))
    with pytest.raises(SpecError, match="OKS sigmas"):
        metrics.oks(np.zeros((1, 14)), np.ones(1), np.ones(17))
