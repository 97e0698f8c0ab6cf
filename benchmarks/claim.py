"""What a claim is: a name, a bar and a function that measures; and what comes of measuring one.

Invariant: a claim holds only where a finite value was measured and meets its bar. One that cannot be measured is a row
that does not hold; it is never left out.
"""

from __future__ import annotations

import math
import operator
import os
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from benchmarks.context import Context
from edgepose.errors import EdgeposeError, UsageError

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_BAR = re.compile(r"(>=|<=|==|>|<|in)\s*(\S.*)")


@dataclass(frozen=True, slots=True)
class Bar:
    """What a value has to meet.

    Attributes:
        relation: One of >=, <=, ==, >, <, or "in" for a set of numbers.
        numbers: What the value is compared with; one number unless the relation is "in".
    """

    relation: str
    numbers: tuple[float, ...]

    def met_by(self, value: float | None) -> bool:
        """Whether a value meets the bar; what is missing or not finite never does."""
        if value is None or not math.isfinite(value):
            return False
        if self.relation == "in":
            return value in self.numbers
        return _RELATIONS[self.relation](value, self.numbers[0])


def parse_bar(text: str) -> Bar:
    """Reads ">= 4.0", "<= 1.5", "== 3" or "in 0,7".

    Raises:
        UsageError: It is none of these.
    """
    match = _BAR.fullmatch(text.strip())
    try:
        numbers = tuple(float(number) for number in match[2].split(",")) if match else ()
    except ValueError:
        numbers = ()
    if match is None or not numbers or not all(map(math.isfinite, numbers)) or (len(numbers) > 1 and match[1] != "in"):
        raise UsageError(f"bar {text!r}", found="no bar", expected="'>= 4.0', '<= 1.5', '== 3' or 'in 0,7'")
    return Bar(match[1], numbers)


@dataclass(frozen=True, slots=True)
class Measured:
    """What measuring a claim gives.

    Attributes:
        value: The figure that the bar is about.
        text: One line for people: what the value is made of.
        detail: The parts, for machines; anything that JSON can hold.
        printed: Further lines for people, such as the record of a training run.
    """

    value: float
    text: str
    detail: dict[str, Any] = field(default_factory=dict)
    printed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Claim:
    """A figure that is claimed.

    Attributes:
        name: "area.what".
        unit: Unit of the value.
        bar: What the value has to meet, as the issue that asks for it words it.
        question: What is measured, in a line.
        measure: Measures it.
        needs: Folders below the data root that it reads.
    """

    name: str
    unit: str
    bar: str
    question: str
    measure: Callable[[Context], Measured]
    needs: tuple[str, ...] = ("lspet",)

    def __post_init__(self) -> None:
        parse_bar(self.bar)

    @property
    def area(self) -> str:
        """The part of the name before the first dot."""
        return self.name.partition(".")[0]


class Row(msgspec.Struct, frozen=True):
    """One line of the table.

    Attributes:
        name: Of the claim.
        value: What was measured; None where nothing could be.
        unit: Of the value.
        bar: What it has to meet.
        holds: Whether it does.
        detail: What it is made of: "text" for people, "seconds" it took, "error" where it failed, and the claim's own.
    """

    name: str
    value: float | None
    unit: str
    bar: str
    holds: bool
    detail: dict[str, Any]


def row_of(claim: Claim, context: Context) -> tuple[Row, tuple[str, ...]]:
    """Measures a claim.

    Returns:
        The row, and further lines for people.
    """
    started_s = time.monotonic()
    try:
        measured = claim.measure(context)
    except Exception as err:  # noqa: BLE001 - whatever went wrong, the claim is not shown to hold
        if os.environ.get("EDGEPOSE_DEBUG", "") not in ("", "0"):
            traceback.print_exc()
        text = str(err) if isinstance(err, EdgeposeError) else f"{type(err).__name__}: {err}"
        detail = {"text": f"not measured: {text}", "error": text, "seconds": _since(started_s)}
        return Row(claim.name, None, claim.unit, claim.bar, holds=False, detail=detail), ()
    detail = {"text": measured.text, **measured.detail, "seconds": _since(started_s)}
    value = measured.value if math.isfinite(measured.value) else None
    holds = parse_bar(claim.bar).met_by(value)
    return Row(claim.name, value, claim.unit, claim.bar, holds, detail), measured.printed


def _since(started_s: float) -> float:
    return round(time.monotonic() - started_s, 1)
