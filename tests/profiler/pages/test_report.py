"""The report: everything it is given appears, nothing is loaded from elsewhere, and foreign text stays text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from edgepose.errors import ImageError
from edgepose.profiler.gate.judge import ArmEvidence, PairEvidence, decide
from edgepose.profiler.gate.rules import GateRules
from edgepose.profiler.gate.run import gather_latency
from edgepose.profiler.pages.report import Picture, Report, render_report
from edgepose.timing.record import ProfileProtocol, ProfileRecord, pack, percentiles
from tests.profiler.simulated import KEYPOINTS, Machine, host, record, worker_facts

JPEG = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags close in order, and collects tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def profile_record() -> ProfileRecord:
    samples = np.random.default_rng(0).integers(100_000, 900_000, (100, 3))
    return ProfileRecord(
        label="kpe",
        bundle_digest="d",
        backend="onnxruntime",
        precision="int8",
        protocol=ProfileProtocol(),
        people=1,
        host=host(),
        load_average=(0.5, 0.7),
        stages=("crop", "infer", "decode"),
        samples_ns=pack(samples),
        latency=percentiles(samples.sum(axis=1)),
        stage_ms=(0.3, 0.5, 0.2),
        persons_per_s=700.0,
        facts=worker_facts(),
        cpu_share=1.5,
    )


def full_report(*, name: str = "after") -> Report:
    rules = GateRules("r")
    assert rules.latency is not None
    latency, confirmation = gather_latency(Machine(0.0, 0), rules.latency)
    arms = ArmEvidence("before", record(200)), ArmEvidence(name, record(200, lost=0.1))
    return Report(
        title=name,
        subtitle="200 people",
        facts={"bundle": name},
        verdict=decide(*arms, PairEvidence(KEYPOINTS, latency, confirmation), rules),
        latency=latency,
        profiles=[profile_record()],
        metrics={"before": {"pck_torso_0.2": 0.55, "mpjpe_px": 12.5}, "after": {"pck_torso_0.2": float("nan")}},
        stages={"export": {"opset": 18, "checks": [{"output": "simcc_x", "difference": 1.5e-6}], "name": name}},
        pictures=[Picture("most different", [("before", JPEG), (name, JPEG)])],
    )


def test_everything_that_is_given_appears() -> None:
    page = Page(render_report(full_report()))
    for words in (
        "Regression", "exit code 3", "pck_torso_0.2", "left wrist", "12.50 px", "p99", "needs 662 calls", "simcc_x",
        "most different", "200 people", "6 pairs of fresh processes",
    ):  # fmt: skip
        assert words in page.text, words
    assert page.count("svg") >= 4 + KEYPOINTS.count
    assert page.count("img") == 2


def test_the_page_loads_nothing() -> None:
    html = render_report(full_report())
    page = Page(html)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        for attribute in ("src", "href"):
            assert (attributes.get(attribute) or "data:").startswith("data:image/") or attribute not in attributes
    assert not re.search(r"url\(|@import|https?://", html)


def test_foreign_text_stays_text() -> None:
    evil = '<script>alert(1)</script>${title} & "quoted"'
    page = Page(render_report(full_report(name=evil)))
    assert page.count("script") == 0
    assert evil in page.text


def test_sections_without_content_are_left_out() -> None:
    page = Page(render_report(Report("empty")))
    assert page.count("section") == 0
    assert "empty" in page.text


def test_charts_hold_numbers_only() -> None:
    html = render_report(full_report())
    assert not re.search(r'(?:points|d|x1|y1|cx|width)="[^"]*(?:nan|inf)', html)


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ImageError, match="PNG or JPEG"):
        render_report(Report("x", pictures=[Picture("", [("", b"GIF89a")])]))
