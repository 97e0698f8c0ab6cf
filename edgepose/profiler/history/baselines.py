"""Accepted figures over time: one file per branch, device and metric, one line per accepted candidate.

    STORE/BRANCH/DEVICE/METRIC.jsonl

The folder may lie in git (profiles/baselines) or anywhere else; lines are appended, so that branches merge.

Invariant: all points of a series were measured against the same frozen reference under the same conditions; one that
was not starts a new series, and only where somebody asked for that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple
from urllib.parse import quote, unquote

import msgspec

from edgepose.errors import BadInput, UsageError
from edgepose.profiler.facts import FACTS, Unit
from edgepose.profiler.gate.verdict import Conditions, Verdict
from edgepose.storage import atomic_write

Scale = Literal["log-ratio", "points"]

_ENDING = ".jsonl"
_STRUCTURE = ("network_nodes", "engine_nodes")  # no costs: quantising trebles them, and is none the worse for it


class Point(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One metric of one accepted candidate, against the frozen reference.

    Attributes:
        metric: "latency", "accuracy pck_torso_0.2", or a fact's name.
        worse: How much worse than the reference: natural logarithm of the ratio, or points; negative is better.
        low: Lower 95 % bound of `worse`; equal to it where the metric is exact.
        high: Upper 95 % bound.
        scale: Which of the two `worse` is.
        value: The candidate's value: milliseconds, share of right joints, or the fact in its unit.
        reference: The reference's value.
        candidate: What the candidate is called.
        conditions: What was compared, where and how.
        commit: Which state of the sources it was made from.
        accepted: When, ISO 8601.
        verdict: What the gate said.
        note: Why it was accepted all the same.
        begins: Whether a new series begins here, with another reference or under other conditions.
    """

    metric: str
    worse: float
    low: float
    high: float
    scale: Scale
    value: float
    reference: float
    candidate: str
    conditions: Conditions
    commit: str
    accepted: str
    verdict: str
    note: str = ""
    begins: bool = False


class Key(NamedTuple):
    """Which series."""

    branch: str
    device: str
    metric: str


class Acceptance(msgspec.Struct, frozen=True):
    """Who accepts what.

    Attributes:
        branch: Branch whose baseline it becomes.
        commit: State of the sources.
        accepted: Now, ISO 8601.
        device: What the device is called; "" takes the processor's name and the host's digest.
        note: Why; needed where the gate did not pass.
        new_series: Whether points of another reference or other conditions may begin a new series.
    """

    branch: str
    commit: str
    accepted: str
    device: str = ""
    note: str = ""
    new_series: bool = False


def accept(store: str | os.PathLike[str], verdict: Verdict, acceptance: Acceptance) -> dict[Key, Point]:
    """Writes what a verdict says of its candidate into the series of a branch and a device.

    All series are checked before the first is written. A commit that is accepted again replaces its last point.

    Raises:
        UsageError: The gate did not pass and no note says why it is accepted.
        BadInput: The verdict has no conditions, or they are not those of the series.
    """
    conditions = verdict.conditions
    if conditions is None:
        raise BadInput(
            f"verdict on {verdict.candidate}",
            found="no conditions in it",
            expected="what an up-to-date edgepose gate --json writes",
            fix="run the gate again",
        )
    if verdict.verdict not in ("pass", "warn") and not acceptance.note:
        raise UsageError(
            f"verdict on {verdict.candidate}",
            found=verdict.verdict,
            expected="pass or warn",
            fix="say with --note why it becomes the baseline all the same",
        )
    device = acceptance.device or device_name(conditions)
    changed = {}
    for point in points_of(verdict, conditions, acceptance):
        key = Key(acceptance.branch, device, point.metric)
        changed[key] = _appended(key, read_series(store, key), point, new_series=acceptance.new_series)
    for key, points in changed.items():
        atomic_write(_path(store, key), b"".join(msgspec.json.encode(point) + b"\n" for point in points))
    return {key: points[-1] for key, points in changed.items()}


def points_of(verdict: Verdict, conditions: Conditions, acceptance: Acceptance) -> list[Point]:
    """One point per metric of a verdict; facts that are no costs, or have no reference, are left out."""

    def point(metric: str, spread: tuple[float, float, float], scale: Scale, values: tuple[float, float]) -> Point:
        worse, low, high = spread
        return Point(
            metric=metric,
            worse=worse,
            low=low,
            high=high,
            scale=scale,
            value=values[0],
            reference=values[1],
            candidate=verdict.candidate,
            conditions=conditions,
            commit=acceptance.commit,
            accepted=acceptance.accepted,
            verdict=verdict.verdict,
            note=acceptance.note,
        )

    found = []
    if verdict.latency is not None:
        timing = verdict.latency
        logs = math.log(timing.ratio), math.log(timing.ci95[0]), math.log(timing.ci95[1])
        found.append(point("latency", logs, "log-ratio", (timing.candidate_ms, timing.baseline_ms)))
    for outcome in (*filter(None, (verdict.accuracy,)), *verdict.other_accuracy):
        loss = -outcome.diff_points, -outcome.ci95[1], -outcome.ci95[0]
        name = f"accuracy {outcome.metric}"
        found.append(point(name, loss, "points", (outcome.candidate, outcome.baseline)))
    for fact in verdict.facts:
        kind = FACTS.get(fact.name)
        if kind is None or fact.name in _STRUCTURE or fact.baseline is None or fact.candidate is None:
            continue
        scale = _scale_of(kind.unit)
        if scale == "log-ratio" and (fact.baseline <= 0 or fact.candidate <= 0):
            continue
        grown = (
            math.log(fact.candidate / fact.baseline) if scale == "log-ratio" else 100 * (fact.candidate - fact.baseline)
        )
        worse = (grown if kind.better == "lower" else -grown) + 0.0  # no negative zeros in files
        found.append(point(fact.name, (worse, worse, worse), scale, (fact.candidate, fact.baseline)))
    return found


def comparable(metric: str, first: Conditions, second: Conditions) -> tuple[str, ...]:
    """Names of the conditions that keep two figures of a metric from being compared; empty where nothing does.

    The candidate's digest may differ, of course. Facts of the files depend on no host, accuracy on no protocol.
    """
    names = ["baseline_digest", "baseline_engine", "candidate_engine"]
    if metric.startswith("accuracy "):
        names += ["host", "dataset"]
    elif metric == "latency" or (metric in FACTS and FACTS[metric].measured):
        names += ["host", "cores", "governor", "timed", "protocol"]
    return tuple(name for name in names if getattr(first, name) != getattr(second, name))


def device_name(conditions: Conditions) -> str:
    """What a host is called in the store: its processor, and the digest that tells its like apart."""
    words = "-".join("".join(c if c.isalnum() else " " for c in conditions.device).lower().split())
    return f"{words[:40].rstrip('-')}-{conditions.host[:8]}"


def read_series(store: str | os.PathLike[str], key: Key) -> list[Point]:
    """All points of a series in the order they were accepted; none where there is no such series.

    Raises:
        BadInput: A line is no point.
    """
    path = _path(store, key)
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as err:
        raise BadInput(str(path), found=err.strerror or str(err), expected="a readable file") from err
    points = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            points.append(msgspec.json.decode(line, type=Point))
        except msgspec.DecodeError as err:
            fix = "restore the file; a merge may have left its marks in it"
            raise BadInput(f"{path}: line {number}", found=str(err), expected="an accepted point", fix=fix) from err
    return points


def current(points: Sequence[Point]) -> list[Point]:
    """The points since the last new series began."""
    first = max((index for index, point in enumerate(points) if point.begins), default=0)
    return list(points[first:])


def find_series(store: str | os.PathLike[str], *, branch: str = "", device: str = "", metric: str = "") -> list[Key]:
    """The series there are, sorted; empty words stand for any.

    Raises:
        BadInput: There is no such folder.
    """
    root = Path(store)
    if not root.is_dir():
        fix = "name the folder with --store, or accept a first verdict"
        raise BadInput(f"baselines {root}", found="no such folder", expected="a store of baselines", fix=fix)
    wanted = (branch, device, metric)
    return [key for key in _keys(root) if all(not want or want == part for want, part in zip(wanted, key, strict=True))]


def _keys(root: Path) -> Iterator[Key]:
    for path in sorted(root.glob(f"*/*/*{_ENDING}")):
        folders = path.relative_to(root).parts
        yield Key(unquote(folders[0]), unquote(folders[1]), unquote(folders[2].removesuffix(_ENDING)))


def _path(store: str | os.PathLike[str], key: Key) -> Path:
    parts = [_quoted(part) for part in key]
    return Path(store, parts[0], parts[1], parts[2] + _ENDING)


def _quoted(name: str) -> str:
    """A name as one part of a path: slashes of branches are written as %2F, and nothing is hidden or above."""
    if not name:
        raise UsageError("baseline", found="an empty name", expected="a branch, a device and a metric")
    text = quote(name, safe=" ")
    return f"%2E{text[1:]}" if text.startswith(".") else text


def _appended(key: Key, points: list[Point], point: Point, *, new_series: bool) -> list[Point]:
    if not points:
        return [msgspec.structs.replace(point, begins=True)]
    last = points[-1]
    differing = comparable(key.metric, last.conditions, point.conditions)
    if differing and not new_series:
        raise BadInput(
            f"baseline of {key.branch} on {key.device}: {key.metric}",
            found=f"another {' and '.join(name.replace('_', ' ') for name in differing)}",
            expected=f"that of the series: {_spelt(differing, last.conditions)}",
            fix="gate against the series' reference under its conditions, or begin a new one with --new-series",
        )
    if differing:
        return [*points, msgspec.structs.replace(point, begins=True)]
    if point.commit and point.commit == last.commit:
        return [*points[:-1], msgspec.structs.replace(point, begins=last.begins)]
    return [*points, point]


def _spelt(names: Iterable[str], conditions: Conditions) -> str:
    values = [getattr(conditions, name) for name in names]
    return ", ".join(value[:16] if isinstance(value, str) else msgspec.json.encode(value).decode() for value in values)


def _scale_of(unit: Unit) -> Scale:
    return "points" if unit == "share" else "log-ratio"
