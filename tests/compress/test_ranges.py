from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.compress.ranges import Range, Ranges, read_ranges, write_ranges
from edgepose.errors import CheckpointError

ACTIVATION = Range("post_hooks.relu/0__0", "activation", (0.1,), (0,), 0, 255)
scales = st.floats(min_value=np.float32(1e-30), max_value=np.float32(1e30), width=32)


@st.composite
def range_entries(draw: st.DrawFn, key: str) -> Range:
    if draw(st.booleans()):
        count = draw(st.integers(1, 5))
        return Range(
            key, "weight", tuple(draw(st.lists(scales, min_size=count, max_size=count))), (0,) * count, -127, 127, 0
        )
    low = draw(st.sampled_from([0, -128]))
    return Range(key, "activation", (draw(scales),), (draw(st.integers(low, low + 255)),), low, low + 255)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 99), unique=True, max_size=6).flatmap(
    lambda keys: st.tuples(*[range_entries(f"post_hooks.{key}__0") for key in keys])
))  # fmt: skip
def test_ranges_come_back_from_json_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory, entries: tuple[Range, ...]
) -> None:
    path = tmp_path_factory.mktemp("ranges") / "r.json"
    ranges = Ranges(entries, protected=("head",))
    write_ranges(path, ranges)
    again = read_ranges(path)
    assert again == ranges
    for one, other in zip(again.ranges, ranges.ranges, strict=True):
        np.testing.assert_array_equal(one.scales, other.scales)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"scale": (0.0,)}, "scale"),
        ({"scale": (0.1, 0.2)}, "2 scales and 1 zero points"),
        ({"zero_point": (256,)}, "zero point outside"),
        ({"high": 511}, "0..511"),
        ({"kind": "bias"}, "kind"),
    ],
)
def test_ranges_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, object], found: str) -> None:
    path = tmp_path / "r.json"
    content = msgspec.to_builtins(Ranges((ACTIVATION,)))
    content["ranges"][0].update(change)
    path.write_bytes(msgspec.json.encode(content))
    with pytest.raises(CheckpointError, match=found):
        read_ranges(path)


def test_a_place_may_have_one_quantiser_only(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    write_ranges(path, Ranges((ACTIVATION, ACTIVATION)))
    with pytest.raises(CheckpointError, match="twice"):
        read_ranges(path)


def test_a_missing_or_damaged_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.json.*No such file"):
        read_ranges(tmp_path / "absent.json")
    (tmp_path / "r.json").write_text('{"ranges": [')
    with pytest.raises(CheckpointError, match=r"r\.json"):
        read_ranges(tmp_path / "r.json")
