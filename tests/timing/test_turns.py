"""Several arms in the same rounds: any two compare as a pair would, and no process stays behind."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from edgepose.errors import BadInput, EnvironmentFault
from edgepose.timing.record import CallableArm, LatencyComparison, call_times_ms
from edgepose.timing.turns import time_in_turns
from tests.timing.fake_turns import FakeTimer
from tests.timing.test_pairs import SHORT, arm, children

FAKES = tuple(CallableArm(name, "nowhere:nothing") for name in "abc")


def test_every_arm_runs_in_every_round_and_any_two_can_be_compared() -> None:
    seen: list[tuple[int, int]] = []
    arms = [arm("sleeper", label, milliseconds=time) for label, time in (("a", 1), ("b", 30), ("c", 2))]
    turns = time_in_turns(arms, SHORT, lambda *p: seen.append(p))
    (group,) = turns.groups
    assert len(group.orders) == 6
    assert all(sorted(order) == [0, 1, 2] for order in group.orders)
    assert len(set(group.orders)) > 1
    assert turns.between(0, 1).ratio > 1.5  # 30 on an idle machine
    assert turns.between(1, 2).ratio < 0.8
    assert (call_times_ms(turns.between(0, 1).pairs[0].b, SHORT) >= 30).all()
    assert seen == [(done, 6) for done in range(1, 7)]
    assert not children()


def test_a_dying_arm_is_named_and_takes_the_others_with_it() -> None:
    arms = [arm("sleeper", "well"), arm("dies_after", "ill", calls=3), arm("sleeper", "also well")]
    with pytest.raises(EnvironmentFault, match=r"measuring ill.*died"):
        time_in_turns(arms, SHORT)
    assert not children()


def test_one_arm_cannot_be_compared() -> None:
    with pytest.raises(BadInput, match=r"1 arms.*two or more"):
        time_in_turns([arm("sleeper")], SHORT)


def test_ratios_are_those_of_the_times_and_their_inverse() -> None:
    turns = FakeTimer({"a": 4.0, "b": 2.0, "c": 1.0})(FAKES, SHORT)
    assert turns.between(0, 1).ratio == pytest.approx(0.5, rel=0.02)
    assert turns.between(0, 2).ratio == pytest.approx(0.25, rel=0.02)
    assert turns.between(2, 0).ratio == pytest.approx(1 / turns.between(0, 2).ratio)
    comparison = turns.between(1, 2)
    assert (comparison.a.label, comparison.b.label) == ("b", "c")
    assert msgspec.json.decode(msgspec.json.encode(comparison), type=LatencyComparison) == comparison


def test_order_says_which_of_the_two_went_first() -> None:
    turns = FakeTimer({"a": 1.0, "b": 1.0, "c": 1.0})(FAKES, SHORT)
    (group,) = turns.groups
    (pair,) = turns.between(2, 0).pairs
    assert pair.order == "".join("A" if o.index(2) < o.index(0) else "B" for o in group.orders)
    assert len(pair.log_ratios) == SHORT.blocks


def test_more_groups_continue_the_sample() -> None:
    timer = FakeTimer({"a": 1.0, "b": 2.0, "c": 3.0})
    first, later = timer(FAKES, SHORT), timer(FAKES, msgspec.structs.replace(SHORT, pairs=2), first_group=1)
    both = first.followed_by(later)
    assert both.protocol.pairs == len(both.groups) == 3
    np.testing.assert_array_equal(both.between(0, 1).pairs[0].log_ratios, first.between(0, 1).pairs[0].log_ratios)
    other = timer(FAKES[::-1], SHORT)
    with pytest.raises(BadInput, match="different arms"):
        first.followed_by(other)
