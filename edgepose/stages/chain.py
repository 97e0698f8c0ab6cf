"""Which checkpoints a bundle's network went through, by their hashes, and where they still lie.

Invariant: a checkpoint counts as found only when its weights have the very digest that the chain names; what is not
found keeps the reason and the figures that were recorded. Nothing is loaded but cards.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgepose.blocks.card import Card, Lineage, paths_of, read_card
from edgepose.blocks.zoo import find_checkpoint, zoo_names
from edgepose.bundle import Bundle
from edgepose.errors import CheckpointError
from edgepose.host import cache_directory

FLOAT = "fp32"
"""Name of the first link: the checkpoint that compression began with."""

_Told = tuple[str, str, Mapping[str, Any]]
"""A stage, the digest of what it made ("" if unknown), its report."""

_NOT_COMPRESSION = ("reference", "export", "transfer", "train")


@dataclass(frozen=True, slots=True)
class Link:
    """One checkpoint of the chain.

    Attributes:
        name: Unique within the chain: the stage that made it, numbered where it ran before ("recover 2").
        stage: The stage; `FLOAT` for the checkpoint that was compressed.
        digest: sha256 of its weights; "" where nothing tells any more.
        recorded: Metrics on dev, as that stage reported them.
        macs: Multiply-accumulates that pruning reported for it; None where nothing did.
        path: The checkpoint, without suffix; None where it was not found.
        why: Why it was not.
    """

    name: str
    stage: str
    digest: str
    recorded: Mapping[str, float]
    macs: int | None = None
    path: Path | None = None
    why: str = ""


def chain_of(bundle: Bundle, *, given: Sequence[Path] = ()) -> tuple[Link, ...]:
    """The checkpoints of a bundle, the float one first, looked for in the zoo, in this user's cache and in `given`.

    Args:
        bundle: The bundle.
        given: Checkpoints to look at besides.
    """
    shelf = _Shelf(given)
    chain, reports = bundle.manifest.chain, bundle.manifest.reports
    start = chain.get("checkpoint", "")
    final = chain.get("compressed", "")
    card = shelf.card(final) if final else shelf.card(start)
    compression = _compression(card.lineage) if card is not None and final else ()
    if compression and compression[0].inputs.get("checkpoint") == start:
        digests = [*(entry.inputs.get("checkpoint", "") for entry in compression[1:]), final]
        told: list[_Told] = [
            (entry.stage, digest, entry.report) for entry, digest in zip(compression, digests, strict=True)
        ]
    else:
        told = _walked(shelf, start, final, reports)
    float_figures = _float_figures(reports, card or shelf.card(start), compression)
    before = next((report["macs_before"] for _, _, report in told if "macs_before" in report), None)
    links = [Link(FLOAT, FLOAT, start, float_figures, before), *_links(told, before)]
    return tuple(_placed(link, shelf) for link in links)


def _compression(lineage: Sequence[Lineage]) -> tuple[Lineage, ...]:
    """What happened to a checkpoint after its last training."""
    trained = [place for place, entry in enumerate(lineage) if entry.stage == "train"]
    after = lineage[trained[-1] + 1 :] if trained else lineage
    return tuple(entry for entry in after if entry.stage not in _NOT_COMPRESSION)


def _walked(shelf: _Shelf, start: str, final: str, reports: Mapping[str, Any]) -> list[_Told]:
    """The stages as the manifest reports them; each is matched with a card that continues the one before."""
    compiled = reports.get("compile")
    names = compiled.get("stages", []) if isinstance(compiled, Mapping) else []
    stages = [
        name for name in names
        if isinstance(reports.get(name), Mapping) and "dev" in reports[name] and name not in _NOT_COMPRESSION
    ]  # fmt: skip
    told: list[_Told] = []
    before = start
    for stage in stages:
        report = {name: value for name, value in reports[stage].items() if name != "seconds"}
        before = shelf.successor(before, stage, report) if before else ""
        told.append((stage, before, report))
    if told and not told[-1][1]:
        told[-1] = (told[-1][0], final, told[-1][2])
    return told


def _links(told: Iterable[_Told], macs: int | None) -> Iterator[Link]:
    seen: Counter[str] = Counter()
    for stage, digest, report in told:
        seen[stage] += 1
        macs = report.get("macs_after", macs)  # only pruning changes them
        name = stage if seen[stage] == 1 else f"{stage} {seen[stage]}"
        yield Link(name, stage, digest, _finite(report.get("dev")), macs)


def _float_figures(
    reports: Mapping[str, Any], card: Card | None, compression: Sequence[Lineage]
) -> Mapping[str, float]:
    """What the float network reached on dev: measured by the compile, or when it was trained, if on the same dev."""
    reference = reports.get("reference")
    if isinstance(reference, Mapping):
        return _finite(reference.get("dev"))
    dev = compression[0].inputs.get("dev") if compression else None
    for entry in reversed(card.lineage if card is not None else ()):
        if entry.stage == "train" and dev in (None, entry.inputs.get("dev")):
            curve, best = entry.report.get("curve"), entry.report.get("best_epoch")
            if isinstance(curve, list) and isinstance(best, int) and 0 <= best < len(curve):
                return {name: value for name, value in _finite(curve[best]).items() if _is_metric(name)}
    return {}


def _is_metric(name: str) -> bool:
    return name.startswith(("pck_", "limb12_", "auc", "mpjpe"))


def _finite(figures: Any) -> dict[str, float]:
    if not isinstance(figures, Mapping):
        return {}
    return {
        str(name): float(value)
        for name, value in figures.items()
        if isinstance(value, int | float) and math.isfinite(value)
    }


def _placed(link: Link, shelf: _Shelf) -> Link:
    if not link.digest:
        return replace(link, why="nothing says which checkpoint it was: the ones made from it are gone from the cache")
    path, why = shelf.find(link.digest)
    return replace(link, path=path, why=why)


class _Shelf:
    """Checkpoints of the zoo, of the user's cache, and others, by the digest that their cards name."""

    def __init__(self, given: Sequence[Path]) -> None:
        self._cards: dict[str, list[tuple[Path, Card]]] = {}
        for path in _places(given):
            try:
                card = read_card(path)
            except CheckpointError:
                continue  # half a card says nothing that could be trusted; what it stood for counts as not there
            self._cards.setdefault(card.weights_sha256, []).append((path, card))

    def card(self, digest: str) -> Card | None:
        found = self._cards.get(digest)
        return found[0][1] if found else None

    def successor(self, digest: str, stage: str, report: Mapping[str, Any]) -> str:
        """Digest of what `stage` made of a checkpoint when it reported this; "" where it is not there."""
        for own, entries in self._cards.items():
            last = entries[0][1].lineage[-1:]
            if any(
                entry.stage == stage and entry.inputs.get("checkpoint") == digest and entry.report == report
                for entry in last
            ):
                return own
        return ""

    def find(self, digest: str) -> tuple[Path | None, str]:
        """A checkpoint whose weights have that digest; or None, and why."""
        entries = self._cards.get(digest, [])
        for path, _ in entries:
            try:
                weights = paths_of(path)[0].read_bytes()
            except OSError:
                continue
            if hashlib.sha256(weights).hexdigest() == digest:
                return path, ""
        if entries:
            return None, f"the weights {digest[:12]}… in the cache are damaged: they are not what their card says"
        return None, f"the checkpoint {digest[:12]}… is neither in the zoo nor in the cache any more"


def _places(given: Sequence[Path]) -> Iterator[Path]:
    yield from given
    for name in zoo_names():
        yield find_checkpoint(name)
    cache = cache_directory()
    for folder in ("stages", "modules"):
        for card in sorted((cache / folder).glob("*/network.json")):
            yield card.with_suffix("")
