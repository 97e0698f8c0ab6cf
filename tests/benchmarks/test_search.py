"""The search for the least setting that has an effect."""

from __future__ import annotations

import pytest

from benchmarks.search import least_reaching
from edgepose.errors import EdgeposeError


def test_result_reaches_the_target_and_hardly_more() -> None:
    setting, effect = least_reaching(lambda x: 10 * x, 5.0, slack=0.5, start=0.01, steps=12)
    assert effect == pytest.approx(10 * setting)
    assert 5.0 <= effect < 5.5


def test_start_that_is_too_much_already_is_reduced() -> None:
    _, effect = least_reaching(lambda x: x, 5.0, slack=0.5, start=80.0, steps=12)
    assert 5.0 <= effect < 5.5


def test_effect_that_jumps_over_the_target_still_reaches_it() -> None:
    setting, effect = least_reaching(lambda x: 9.0 if x >= 3 else 0.0, 5.0, slack=1.0, start=1.0)
    assert effect == 9.0
    assert setting == pytest.approx(3, abs=0.1)


def test_target_out_of_reach_is_an_error() -> None:
    with pytest.raises(EdgeposeError, match="expected 5 or more"):
        least_reaching(lambda _: 4.0, 5.0, slack=1.0, start=1.0)


def test_effect_that_is_no_number_reaches_nothing() -> None:
    with pytest.raises(EdgeposeError):
        least_reaching(lambda _: float("nan"), 5.0, slack=1.0, start=1.0)
