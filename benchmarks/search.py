"""Searching for the least setting that has an effect.

Invariant: what is returned was measured at the returned setting and reaches the target.
"""

from __future__ import annotations

from collections.abc import Callable

from edgepose.errors import EdgeposeError


def least_reaching(
    effect: Callable[[float], float], target: float, *, slack: float, start: float, steps: int = 6
) -> tuple[float, float]:
    """About the smallest setting whose effect is `target` or more, for an effect that grows with the setting.

    Doubles until the target is reached, then halves the gap until the effect exceeds the target by less than `slack`
    or the steps are used up.

    Args:
        effect: Measures a setting.
        target: What the effect must reach.
        slack: How far beyond is near enough.
        start: First setting, above 0.
        steps: Doublings, and then halvings, at most.

    Returns:
        The setting and its effect.

    Raises:
        EdgeposeError: The target is out of reach.
    """
    low, high = 0.0, start
    found = effect(high)
    for _ in range(steps):
        if found >= target:
            break
        low, high = high, 2 * high
        found = effect(high)
    if not found >= target:
        raise EdgeposeError("search", found=f"an effect of {found:.3g} at {high:.3g}", expected=f"{target:g} or more")
    for _ in range(steps):
        if found < target + slack:
            break
        middle = (low + high) / 2
        reached = effect(middle)
        if reached >= target:
            high, found = middle, reached
        else:
            low = middle
    return high, found
