"""Slow creep: many small steps are found and named, noise and single bad days are not."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import msgspec
import numpy as np
import pytest

from edgepose.errors import BadInput, MissingDependency
from edgepose.profiler.gate.rules import TrendRule
from edgepose.profiler.history.baselines import Key, Point
from edgepose.profiler.history.trend import Trend, spelt_worse, trend_of
from tests.profiler.verdicts import CONDITIONS

KEY = Key("main", "box", "latency")
RULE = TrendRule()


def point(index: int, worse: float, *, half: float = 0.0, metric: str = "latency", **conditions: Any) -> Point:
    return Point(
        metric=metric,
        worse=worse,
        low=worse - half,
        high=worse + half,
        scale="points" if metric.startswith("accuracy") else "log-ratio",
        value=1.0,
        reference=1.0,
        candidate="net",
        conditions=msgspec.structs.replace(CONDITIONS, **conditions),
        commit=f"c{index}",
        accepted="2026-01-02T03:04:05+00:00",
        verdict="pass",
    )


def series(values: np.ndarray | list[float], *, half: float = 0.004, metric: str = "latency") -> list[Point]:
    return [point(index, float(value), half=half, metric=metric) for index, value in enumerate(values)]


def found(values: np.ndarray | list[float], **kinds: Any) -> Trend:
    metric = kinds.get("metric", "latency")
    return trend_of(Key("main", "box", metric), series(values, **kinds), RULE)


def test_noise_about_the_reference_is_steady_and_has_no_steps() -> None:
    for seed in range(6):
        trend = found(np.random.default_rng(seed).normal(0, 0.002, 24))
        assert (trend.tendency, trend.exit_code, trend.steps) == ("steady", 0, ())


def test_steps_that_each_pass_a_gate_add_up_to_creep_and_are_named() -> None:
    """Three changes of 1.5 %: none is above the gate's 2 %."""
    level = np.repeat([0.0, 0.015, 0.030, 0.045], 8)
    trend = found(level + np.random.default_rng(1).normal(0, 0.002, 32))
    assert (trend.tendency, trend.exit_code) == ("creep", 4)
    assert trend.steps is not None
    assert [step.index for step in trend.steps] == pytest.approx([8, 16, 24], abs=1)
    assert trend.steps[0].commit in trend.text or trend.steps[-1].commit in trend.text
    assert trend.level == pytest.approx(0.045, abs=0.003)


def test_a_slope_without_any_step_is_creep_too() -> None:
    trend = found(np.linspace(0, 0.05, 30) + np.random.default_rng(2).normal(0, 0.001, 30))
    assert trend.tendency == "creep"


def test_a_single_bad_day_is_no_step_and_no_creep() -> None:
    values = np.random.default_rng(3).normal(0, 0.002, 20)
    values[11] = 0.3
    trend = found(values)
    assert (trend.tendency, trend.steps) == ("steady", ())


def test_worse_than_allowed_but_not_surely_is_watched() -> None:
    trend = found(np.full(12, 0.025), half=0.01)
    assert (trend.tendency, trend.exit_code) == ("watch", 0)
    assert trend.surely < trend.allowed < trend.level


def test_what_came_back_is_steady_again_and_the_steps_are_kept() -> None:
    trend = found(np.repeat([0.0, 0.06, 0.0], 7) + np.random.default_rng(4).normal(0, 0.002, 21))
    assert trend.tendency == "steady"
    assert trend.steps is not None
    assert len(trend.steps) == 2


def test_exact_facts_step_where_they_step_and_ignore_single_bytes() -> None:
    key, rule = Key("main", "box", "engine_bytes"), RULE
    points = [point(i, v, metric="engine_bytes") for i, v in enumerate([0.0, 1e-6, 2e-6, 0.0, 1e-6, 0.0])]
    assert trend_of(key, points, rule).steps == ()
    points += [point(6 + i, 0.03, metric="engine_bytes") for i in range(4)]
    trend = trend_of(key, points, rule)
    assert trend.tendency == "creep"
    assert [step.commit for step in trend.steps or ()] == ["c6"]


def test_accuracy_is_in_points_and_exits_with_its_own_code() -> None:
    values = np.repeat([0.0, 0.3, 0.6, 0.9], 4)
    trend = found(values, half=0.2, metric="accuracy pck_torso_0.2")
    assert (trend.tendency, trend.exit_code, trend.scale) == ("creep", 3, "points")
    assert "0.90 points worse than the reference" in trend.text
    assert found(values, half=0.6, metric="accuracy pck_torso_0.2").tendency == "watch"


def test_a_short_series_stands_on_its_last_point_and_says_so() -> None:
    trend = found([0.0, 0.0, 0.05], half=0.001)
    assert (trend.tendency, trend.steps) == ("creep", None)
    assert "too few points" in trend.text


def test_only_the_window_counts() -> None:
    rule = msgspec.structs.replace(RULE, window=10)
    values = np.concatenate([np.full(30, 0.1), np.zeros(10)])
    assert trend_of(KEY, series(values), rule).points == 10


@pytest.mark.parametrize("change", [{"host": "f" * 64}, {"protocol": None}, {"baseline_digest": "a" * 64}])
def test_points_of_other_conditions_are_never_compared(change: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match="another"):
        trend_of(KEY, [point(0, 0.0), point(1, 0.0, **change)], RULE)


def test_no_points_are_an_error() -> None:
    with pytest.raises(BadInput, match="no points"):
        trend_of(KEY, [], RULE)


def test_without_ruptures_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **more: Any) -> Any:
        if name.startswith("ruptures"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "edgepose.profiler.history.change_points", raising=False)
    with pytest.raises(MissingDependency, match=r"edgepose\[trend\]"):
        found(np.zeros(12))
    assert found(np.zeros(3)).tendency == "steady"  # too few points to need it


def test_levels_are_spelt_as_people_say_them() -> None:
    assert spelt_worse(0.0198, "log-ratio") == "2.0 % worse"
    assert spelt_worse(float(np.log(0.25)), "log-ratio") == "75.0 % better"
    assert spelt_worse(-0.4, "points") == "0.40 points better"


@pytest.mark.parametrize(("metric", "tendency"), [("peak_memory_bytes", "steady"), ("engine_bytes", "creep")])
def test_memory_may_vary_where_files_may_not(metric: str, tendency: str) -> None:
    points = [point(index, 0.05, metric=metric) for index in range(8)]
    assert trend_of(Key("main", "box", metric), points, RULE).tendency == tendency
