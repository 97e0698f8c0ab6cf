"""The one-euro filter against its paper's formulas, and through everything a video does to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.errors import SpecError, UsageError
from edgepose.pose.smoothing import OneEuro, SmoothingState, smooth_people

quick = settings(max_examples=40, deadline=None)


def filtered(values: list[float], times_s: list[float], config: OneEuro) -> list[float]:
    """One joint of one person, whose x takes these values."""
    state, found = SmoothingState(), []
    for value, time_s in zip(values, times_s, strict=True):
        points, state = smooth_people(state, ["one"], np.array([[[value, 0.0]]]), time_s, config)
        found.append(float(points[0, 0, 0]))
    return found


def paper(values: list[float], times_s: list[float], config: OneEuro) -> list[float]:
    """Algorithm 1 of the paper, one number at a time."""
    found, speed = [values[0]], 0.0
    for i in range(1, len(values)):
        interval_s = times_s[i] - times_s[i - 1]

        def alpha(cutoff_hz: float, interval_s: float = interval_s) -> float:
            tau = 1 / (2 * math.pi * cutoff_hz)
            return 1 / (1 + tau / interval_s)

        a = alpha(config.speed_cutoff_hz)
        speed = a * (values[i] - found[-1]) / interval_s + (1 - a) * speed
        a = alpha(config.min_cutoff_hz + config.beta * abs(speed))
        found.append(a * values[i] + (1 - a) * found[-1])
    return found


@quick
@given(
    st.lists(st.tuples(st.floats(-500, 500), st.floats(0.005, 0.4)), min_size=1, max_size=12),
    st.sampled_from([OneEuro(), OneEuro(min_cutoff_hz=0.3, beta=0.0), OneEuro(beta=1.0, speed_cutoff_hz=5.0)]),
)
def test_equals_the_paper_at_irregular_intervals(steps: list[tuple[float, float]], config: OneEuro) -> None:
    values, times_s = [v for v, _ in steps], np.cumsum([t for _, t in steps]).tolist()
    np.testing.assert_allclose(filtered(values, times_s, config), paper(values, times_s, config), rtol=1e-5, atol=1e-4)


def test_first_step_by_hand() -> None:
    # beta 0, cutoff 1 / (2 pi) Hz, one second: tau = 1 s, alpha = 1/2.
    assert filtered([0.0, 10.0, 10.0], [0.0, 1.0, 2.0], OneEuro(1 / (2 * math.pi), 0.0, 1.0, 9.0)) == pytest.approx(
        [0, 5, 7.5]
    )


@quick
@given(st.lists(st.floats(-500, 500), min_size=2, max_size=10))
def test_output_lies_between_the_last_one_and_the_new_value(values: list[float]) -> None:
    times_s = [i / 30 for i in range(len(values))]
    found = filtered(values, times_s, OneEuro())
    for before, now, value in zip(found, found[1:], values[1:], strict=False):
        assert min(before, value) - 1e-3 <= now <= max(before, value) + 1e-3


def test_rest_is_steadied_and_movement_is_followed() -> None:
    rng = np.random.default_rng(0)
    times_s = [i / 30 for i in range(120)]
    noise = rng.normal(0, 1, 120)
    rest = filtered(noise.tolist(), times_s, OneEuro())
    assert np.std(rest[30:]) < 0.5 * np.std(noise[30:])
    moving = [600.0 * t for t in times_s]
    prompt, slow = (filtered(moving, times_s, OneEuro(beta=beta)) for beta in (0.05, 0.0))
    lag_px, slow_lag_px = moving[-1] - prompt[-1], moving[-1] - slow[-1]
    assert lag_px < 10
    assert slow_lag_px > 60


def test_a_joint_that_is_lost_stays_lost_and_comes_back_where_it_is_remembered() -> None:
    config = OneEuro(forget_after_s=0.5)
    values = [100.0, float("nan"), float("nan"), 110.0]
    found = filtered(values, [0.0, 0.1, 0.2, 0.3], config)
    assert np.isnan(found[1:3]).all()
    assert 100 < found[3] < 110
    assert found[3] == pytest.approx(
        filtered([100.0, 110.0], [0.0, 0.3], config)[1]
    )  # as if it had not been looked for
    assert filtered(values, [0.0, 0.1, 0.2, 0.6], config)[3] == 110.0
    assert filtered([float("nan"), 7.0], [0.0, 0.1], config)[1] == 7.0


def test_joints_of_one_person_are_lost_one_by_one() -> None:
    state = SmoothingState()
    _, state = smooth_people(state, ["one"], np.array([[[0.0, 0.0], [50.0, 50.0]]]), 0.0)
    second, state = smooth_people(state, ["one"], np.array([[[10.0, 10.0], [np.nan, 60.0]]]), 0.1)
    assert (second[0, 0] > 0).all()
    assert (second[0, 0] < 10).all()
    assert np.isnan(second[0, 1]).all()  # half a joint is none


def test_people_may_come_go_and_change_places() -> None:
    state = SmoothingState()
    here, there = np.zeros((1, 2)), np.full((1, 2), 500.0)
    _, state = smooth_people(state, ["a", "b"], np.stack([here, there]), 0.0)
    found, state = smooth_people(state, ["b", "a"], np.stack([there, here]), 0.1)
    np.testing.assert_array_equal(found, np.stack([there, here]))
    found, state = smooth_people(state, ["c", "b"], np.stack([here + 7, there]), 0.2)  # a new one is taken as it is
    np.testing.assert_array_equal(found, np.stack([here + 7, there]))
    found, state = smooth_people(state, ["a"], here[None] + 10, 0.3)  # away for a moment
    assert 0 < found[0, 0, 0] < 10
    found, state = smooth_people(state, [], np.empty((0, 1, 2)), 0.4)
    assert found.shape == (0, 1, 2)
    found, state = smooth_people(state, ["a"], here[None] + 99, 5.0)  # forgotten
    np.testing.assert_array_equal(found, here[None] + 99)
    assert set(state.tracks) == {"a"}


def test_a_step_changes_neither_its_state_nor_its_arrays() -> None:
    points = np.zeros((1, 1, 2))
    _, state = smooth_people(SmoothingState(), [0], points, 0.0)
    once = smooth_people(state, [0], points + 9, 0.1)[0]
    assert np.array_equal(smooth_people(state, [0], points + 9, 0.1)[0], once)
    assert points.tolist() == [[[0, 0]]]
    started_over, _ = smooth_people(SmoothingState(), [0], points + 9, 0.05)
    assert started_over.tolist() == [[[9, 9]]]


@pytest.mark.parametrize("time_s", [1.0, 0.5, math.nan, math.inf])
def test_time_has_to_go_forward(time_s: float) -> None:
    _, state = smooth_people(SmoothingState(), [0], np.zeros((1, 1, 2)), 1.0)
    with pytest.raises(UsageError, match=r"more than the last one, 1\.0 s"):
        smooth_people(state, [0], np.zeros((1, 1, 2)), time_s)


def test_what_does_not_fit_is_refused() -> None:
    _, state = smooth_people(SmoothingState(), [0], np.zeros((1, 3, 2)), 0.0)
    with pytest.raises(SpecError, match="found 4 keypoints, expected 3"):
        smooth_people(state, [0], np.zeros((1, 4, 2)), 0.1)
    with pytest.raises(SpecError, match=r"shape \(2, 3, 2\) for 1 people"):
        smooth_people(state, [0], np.zeros((2, 3, 2)), 0.1)
    with pytest.raises(UsageError, match="the same person twice"):
        smooth_people(state, [0, 0], np.zeros((2, 3, 2)), 0.1)
    zeros = {"min_cutoff_hz": 0.0}, {"beta": -1.0}, {"speed_cutoff_hz": math.nan}, {"forget_after_s": 0.0}
    for bad in (*zeros, {"min_cutoff_hz": math.inf}, {"speed_cutoff_hz": math.inf}, {"beta": math.inf}):
        with pytest.raises(UsageError, match="one-euro filter"):
            OneEuro(**bad)
