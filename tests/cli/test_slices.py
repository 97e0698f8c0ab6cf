"""`edgepose eval --slices`: the table, what it keeps, and flags that mean nothing alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from edgepose.cli import slices
from edgepose.cli.console import Steps
from edgepose.cli.slices import SliceOptions, show_slices, slice_report
from edgepose.data.coco import dataset
from edgepose.data.corrupt import CORRUPTIONS
from edgepose.data.render import LSP14, RenderConfig, write_coco
from edgepose.errors import DataUnavailable
from edgepose.estimator import PoseEstimator
from edgepose.host import cache_directory
from edgepose.profiler import slices as profiler_slices
from edgepose.spec import ModelSpec, Preprocess, SimCC, TensorSpec
from tests.cli.conftest import Cli
from tests.fakes import Array, FakeSession


def test_slices_of_a_bundle(cli: Cli, bundle: Path, people: Path, tmp_path: Path) -> None:
    files = ["--json", tmp_path / "s.json", "--records", tmp_path / "s.npz", "--pictures", tmp_path / "look"]
    outcome = cli("eval", bundle, "--data", people, "--slices", "--people", 5, "--draws", 2, *files)
    assert outcome.code == 0
    result = json.loads((tmp_path / "s.json").read_text())
    assert (result["persons"], result["draws"], result["rendered"]) == (5, 2, None)
    assert result["network"] == "spots"
    rows = {(row["slice"], row["joints"]): row for row in result["slices"]}
    assert {name for name, _ in rows} == {*CORRUPTIONS, "occluded_all"}
    clean, covered = rows["clean", "all"], rows["occluded_40", "all"]
    assert clean["metrics"]["pck_extent_0.1"]["value"] > 0.8
    assert (clean["pictures"], covered["pictures"]) == (5, 10)
    assert clean["counted_joints"] == 10
    assert covered["metrics"]["pck_extent_0.1"]["value"] < clean["metrics"]["pck_extent_0.1"]["value"]
    for row in rows.values():
        for interval in row["metrics"].values():
            assert interval["low"] is None or interval["low"] <= interval["value"] <= interval["high"]
    # Two keypoints are no person: that is said, and nothing is made up.
    assert "no self-occluded joints" in outcome.err
    assert "occluded 30" in outcome.out
    assert "hidden joints" in outcome.out
    assert "AUROC" not in outcome.out
    sheet = cv2.imread(str(tmp_path / "look" / slices.SHEET))
    assert sheet.shape == (24 + 5 * 160, len(CORRUPTIONS) * 160, 3)

    # The same network against itself, person by person.
    again = cli("eval", bundle, "--data", people, "--slices", "--people", 5, "--draws", 2, "--against",
                tmp_path / "s.npz", "--json", "-")  # fmt: skip
    assert again.code == 0
    compared = json.loads(again.out)["against"]
    assert compared["file"] == "s.npz"
    assert {row["slice"] for row in compared["slices"]} == set(CORRUPTIONS)
    for row in compared["slices"]:
        assert row["differences"]["pck_extent_0.1"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert "against s.npz" in again.err

    # Other pictures cannot be compared, and that is said before any is made.
    look = tmp_path / "never"
    other = cli("eval", bundle, "--data", people, "--slices", "--people", 4, "--against", tmp_path / "s.npz",
                "--pictures", look)  # fmt: skip
    assert other.code == 2
    assert "found 5 pictures in clean, expected the 4 to be measured" in other.err
    assert not look.exists()


def test_rendered_people_with_other_keypoints_are_refused(cli: Cli, bundle: Path, people: Path, tmp_path: Path) -> None:
    write_coco(tmp_path / "rendered", "val", 1, 1, RenderConfig(size_hw=(48, 48)))
    outcome = cli("eval", bundle, "--data", people, "--slices", "--rendered", tmp_path / "rendered")
    assert outcome.code == 2
    assert "found 14 keypoints (right_ankle, right_knee, right_hip …)" in outcome.line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--draws", "3"], "--draws: found no --slices"),
        (["--against", "x.npz"], "--against: found no --slices"),
        (["--pictures", "x"], "--pictures: found no --slices"),
        (["--slices", "--predictions", "x.json"], "--predictions: found --slices"),
        (["--slices", "--json", "x", "--records", "x"], "the same name given twice"),
        (["--slices", "--records", "-"], "--records: found -, which is stdout"),
        (["--slices", "--pictures", "-"], "--pictures: found -, which is stdout"),
    ],
)
def test_flags_that_mean_nothing_are_refused(
    cli: Cli, bundle: Path, people: Path, flags: list[str], words: str
) -> None:
    outcome = cli("eval", bundle, "--data", people, *flags)
    assert outcome.code == 2
    assert words in outcome.line


def test_another_networks_records_are_read_before_anything_is_measured(
    cli: Cli, bundle: Path, people: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.npz").write_bytes(b"nothing of the kind")
    outcome = cli("eval", bundle, "--data", people, "--slices", "--against", tmp_path / "bad.npz")
    assert outcome.code == 2
    assert "bad.npz" in outcome.line


def seeing_network() -> PoseEstimator:
    """Puts every joint in the middle, and says that the first seven can be seen."""
    side = 32
    spec = ModelSpec(
        name="middle",
        keypoints=LSP14,
        preprocess=Preprocess(input_hw=(side, side)),
        decoder=SimCC(split_ratio=1.0),
        inputs=(TensorSpec("images", ("batch", 3, side, side)),),
        outputs=(
            TensorSpec("simcc_x", ("batch", 14, side)),
            TensorSpec("simcc_y", ("batch", 14, side)),
            TensorSpec("seen", ("batch", 14)),
        ),
        visibility="seen",
    )

    def network(images: Array) -> dict[str, Array]:
        line = np.zeros((len(images), 14, side), np.float32)
        line[..., side // 2] = 9.0
        seen = np.tile(np.where(np.arange(14) < 7, 2.0, -2.0).astype(np.float32), (len(images), 1))
        return {"simcc_x": line, "simcc_y": line.copy(), "seen": seen}

    return PoseEstimator(FakeSession(spec, network), spec, backend="fake")


def test_rendered_people_are_made_once_and_hide_their_own_joints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slices, "_RENDERED_PEOPLE", 6)
    monkeypatch.setattr(profiler_slices, "_VISIBILITY_DRAWS", 30)
    write_coco(tmp_path / "people", "val", 3, 1, RenderConfig(size_hw=(96, 96)))
    people = dataset(tmp_path / "people", "val")
    first = slice_report(seeing_network(), people, SliceOptions(), Steps(None))
    (made,) = (cache_directory() / "slices").glob("*/val.json")
    written = made.stat().st_mtime_ns
    second = slice_report(seeing_network(), people, SliceOptions(), Steps(None))
    assert made.stat().st_mtime_ns == written
    assert json.dumps(second) == json.dumps(first)
    assert first["rendered"]["persons"] == 6
    rows = {(row["slice"], row["joints"]): row for row in first["slices"]}
    rendered = dataset(made.parent, "val")
    labels = np.concatenate([person.keypoints[:, 2] for person in rendered.persons])
    assert rows["rendered", "hidden"]["counted_joints"] == (labels == 1).sum() > 0
    assert rows["rendered", "all"]["hidden_share"] == pytest.approx((labels == 1).sum() / (labels > 0).sum())
    quality = rows["occluded_all", "all"]["visibility"]
    assert set(quality) == {"auroc", "ece"}
    assert 0 <= quality["auroc"]["low"] <= quality["auroc"]["value"] <= quality["auroc"]["high"] <= 1

    capsys.readouterr()
    shown = {"subject": "m", "backend": "fake", "precision": "fp32", "dataset": {"file": "val.json"}, **first}
    show_slices(shown, err=False)
    out = capsys.readouterr().out
    assert "self-occluded joints" in out
    assert "AUROC" in out

    # Given people are taken instead, and their absence is an error rather than an empty row.
    given = slice_report(seeing_network(), people, SliceOptions(rendered=tmp_path / "people"), Steps(None))
    assert given["rendered"]["persons"] == 3
    with pytest.raises(DataUnavailable, match="nowhere"):
        slice_report(seeing_network(), people, SliceOptions(rendered=tmp_path / "nowhere"), Steps(None))


def test_people_of_whom_nobody_has_a_torso_are_compared_by_what_they_have(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One person, without a torso: no figure of torsos, no bounds, and no fault."""
    write_coco(tmp_path, "val", 1, 1, RenderConfig(size_hw=(48, 48)))
    document = json.loads((tmp_path / "val.json").read_text())
    for annotation in document["annotations"]:
        annotation["keypoints"][3 * LSP14.names.index("left_shoulder") + 2] = 0
    (tmp_path / "val.json").write_text(json.dumps(document))
    people, records = dataset(tmp_path, "val"), tmp_path / "r.npz"
    asked = SliceOptions(rendered=tmp_path, records=records)
    slice_report(seeing_network(), people, asked, Steps(None))
    result = slice_report(seeing_network(), people, replace(asked, against=records), Steps(None))
    row = result["against"]["slices"][0]["differences"]
    assert row["limb12_extent_0.1"]["value"] == 0
    assert np.isnan([row["pck_torso_0.2"]["value"], row["limb12_extent_0.1"]["low"]]).all()
    told = {"subject": "x", "backend": "y", "precision": "z", "dataset": {"file": "val.json"}}
    show_slices(result | told, err=False)
    shown = capsys.readouterr().out
    assert "–" in shown
    assert "nan" not in shown
