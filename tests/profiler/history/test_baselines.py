"""The store of accepted figures: what goes in, what is refused, and that nothing of other conditions is mixed in."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.errors import BadInput, UsageError
from edgepose.profiler.gate.verdict import FactPair, Verdict
from edgepose.profiler.history.baselines import (
    Acceptance,
    Key,
    accept,
    comparable,
    current,
    device_name,
    find_series,
    points_of,
    read_series,
)
from edgepose.timing.record import LatencyProtocol
from tests.profiler.verdicts import BAD, CONDITIONS, GOOD, REFUSED, accuracy, latency, size, verdict

DEVICE = "box"
LATENCY = Key("main", DEVICE, "latency")


def acceptance(commit: str = "c1", **changes: Any) -> Acceptance:
    return Acceptance(
        **{"branch": "main", "commit": commit, "accepted": "2026-01-02T03:04:05+00:00", "device": DEVICE, **changes}
    )


def under(changed: Verdict = GOOD, **conditions: Any) -> Verdict:
    return msgspec.structs.replace(changed, conditions=msgspec.structs.replace(CONDITIONS, **conditions))


def test_every_metric_becomes_a_point_that_reads_back(tmp_path: Path) -> None:
    written = accept(tmp_path, GOOD, acceptance())
    assert {key.metric for key in written} == {"latency", "accuracy pck_torso_0.2", "macs"}
    assert find_series(tmp_path) == sorted(written)
    for key, point in written.items():
        assert read_series(tmp_path, key) == [point]
        assert point.begins
    timing = written[LATENCY]
    assert timing.worse == pytest.approx(math.log(1.004))
    assert timing.low < timing.worse < timing.high


def test_worse_is_positive_whichever_way_a_metric_runs() -> None:
    facts = (FactPair("engine_bytes", "bytes", 1e6, 2e6), FactPair("executed_int8_share", "share", 0.99, 0.95))
    slower = msgspec.structs.replace(verdict(size(), accuracy(diff=-1.0), latency(ratio=1.1)), facts=facts)
    points = {point.metric: point for point in points_of(slower, CONDITIONS, acceptance())}
    assert points["latency"].worse == pytest.approx(math.log(1.1))
    assert points["accuracy pck_torso_0.2"].worse == pytest.approx(1.0)
    assert points["accuracy pck_torso_0.2"].low == pytest.approx(0.7)
    assert points["engine_bytes"].worse == pytest.approx(math.log(2))
    assert (points["executed_int8_share"].worse, points["executed_int8_share"].scale) == (pytest.approx(4), "points")


def test_facts_without_a_reference_and_counts_of_nodes_are_no_points() -> None:
    facts = (
        FactPair("macs", "MACs", None, 1e6),
        FactPair("parameters", "count", 0.0, 4.0),
        FactPair("engine_nodes", "count", 100.0, 300.0),
        FactPair("nodes.Conv", "count", 1.0, 2.0),
    )
    assert {p.metric for p in points_of(msgspec.structs.replace(GOOD, facts=facts), CONDITIONS, acceptance())} == {
        "latency",
        "accuracy pck_torso_0.2",
    }


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"host": "f" * 64}, "host"),
        ({"cores": 8}, "cores"),
        ({"governor": "powersave"}, "governor"),
        ({"timed": "frame"}, "timed"),
        ({"protocol": LatencyProtocol(pairs=1, threads=2)}, "protocol"),
        ({"baseline_digest": "a" * 64}, "baseline digest"),
        ({"candidate_engine": "openvino int8"}, "candidate engine"),
    ],
)
def test_other_conditions_are_refused_and_named_and_nothing_is_written(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    accept(tmp_path, GOOD, acceptance("c1"))
    before = {key: read_series(tmp_path, key) for key in find_series(tmp_path)}
    with pytest.raises(BadInput, match=f"another {named}"):
        accept(tmp_path, under(**change), acceptance("c2"))
    assert {key: read_series(tmp_path, key) for key in find_series(tmp_path)} == before


def test_a_new_series_begins_only_when_asked_for_and_only_where_conditions_differ(tmp_path: Path) -> None:
    accept(tmp_path, GOOD, acceptance("c1"))
    accept(tmp_path, under(cores=8), acceptance("c2", new_series=True))
    points = read_series(tmp_path, LATENCY)
    assert [point.begins for point in points] == [True, True]
    assert [point.commit for point in current(points)] == ["c2"]
    exact = read_series(tmp_path, Key("main", DEVICE, "macs"))
    assert [point.commit for point in current(exact)] == ["c1", "c2"]  # multiplications know nothing of cores


def test_another_candidate_is_what_a_series_is_for() -> None:
    assert comparable("latency", CONDITIONS, msgspec.structs.replace(CONDITIONS, candidate_digest="9" * 64)) == ()
    other_people = msgspec.structs.replace(CONDITIONS, dataset="0" * 64)
    assert comparable("latency", CONDITIONS, other_people) == ()
    assert comparable("accuracy auc", CONDITIONS, other_people) == ("dataset",)


def test_the_same_commit_replaces_its_point(tmp_path: Path) -> None:
    for commit in ("c1", "c2", "c2"):
        accept(tmp_path, GOOD, acceptance(commit))
    points = read_series(tmp_path, LATENCY)
    assert [(point.commit, point.begins) for point in points] == [("c1", True), ("c2", False)]


@pytest.mark.parametrize("found", [BAD, REFUSED])
def test_what_did_not_pass_needs_a_reason(tmp_path: Path, found: Verdict) -> None:
    with pytest.raises(UsageError, match="--note"):
        accept(tmp_path, found, acceptance())
    accept(tmp_path, found, acceptance(note="agreed"))
    assert read_series(tmp_path, LATENCY)[0].note == "agreed"


def test_a_verdict_without_conditions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="run the gate again"):
        accept(tmp_path, msgspec.structs.replace(GOOD, conditions=None), acceptance())


def test_a_spoilt_line_is_named_by_file_and_number(tmp_path: Path) -> None:
    accept(tmp_path, GOOD, acceptance())
    path = tmp_path / "main" / DEVICE / "latency.jsonl"
    path.write_bytes(path.read_bytes() + b"<<<<<<< theirs\n")
    with pytest.raises(BadInput, match=r"latency\.jsonl: line 2"):
        read_series(tmp_path, LATENCY)


def test_a_store_that_is_not_there_is_an_error_and_a_filter_finds_its_own(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--store"):
        find_series(tmp_path / "none")
    accept(tmp_path, GOOD, acceptance())
    accept(tmp_path, GOOD, acceptance(branch="next"))
    assert {key.branch for key in find_series(tmp_path, branch="next")} == {"next"}
    assert len(find_series(tmp_path, metric="latency")) == 2


@given(st.text(min_size=1, max_size=20).filter(lambda name: name.isprintable()))
@settings(max_examples=60, deadline=None)
def test_names_of_branches_never_leave_the_store(tmp_path_factory: pytest.TempPathFactory, branch: str) -> None:
    store = tmp_path_factory.mktemp("names") / "store"
    accept(store, GOOD, acceptance(branch=branch))
    assert {key.branch for key in find_series(store)} == {branch}
    assert [path.name for path in store.parent.iterdir()] == ["store"]


def test_an_empty_branch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        accept(tmp_path, GOOD, acceptance(branch=""))


def test_devices_of_one_kind_are_told_apart_by_their_digest() -> None:
    assert device_name(CONDITIONS) == "a-processor-at-2-ghz-eeeeeeee"
