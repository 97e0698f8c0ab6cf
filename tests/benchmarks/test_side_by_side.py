"""Who beats whom: from bounds, and on a tiny network with a timer that knows the answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import side_by_side
from benchmarks.context import Context, Effort
from benchmarks.rivals import RIVALS, Rival
from benchmarks.side_by_side import (
    FLOAT,
    OURS,
    Row,
    Subject,
    Table,
    _entry,
    compare,
    dominates,
    images_of,
    main,
    markdown,
    verdict,
)
from benchmarks.subjects import METRIC
from edgepose.data.coco import dataset
from edgepose.timing.record import LatencyProtocol
from tests.timing.fake_turns import FakeTimer
from tests.tiny_checkpoint import Compiled, Tiny, environment

FAST, EQUAL, SLOW = (0.80, 0.85), (0.95, 1.05), (1.10, 1.20)
MORE, SAME, LESS = (0.1, 0.9), (-0.5, 0.5), (-0.9, -0.1)


@pytest.mark.parametrize(
    ("time", "points", "beaten"),
    [
        (FAST, MORE, True),
        (FAST, SAME, True),
        (FAST, LESS, False),
        (EQUAL, MORE, True),
        (EQUAL, SAME, False),
        (EQUAL, LESS, False),
        (SLOW, MORE, False),
        (SLOW, SAME, False),
        ((0.98, 0.985), SAME, False),  # surely faster, by less than counts
        ((1.001, 1.01), MORE, True),  # surely slower, by less than counts
    ],
)
def test_better_in_one_respect_and_not_worse_in_the_other(
    time: tuple[float, float], points: tuple[float, float], beaten: bool
) -> None:
    assert dominates(time, points) is beaten


def row(label: str, time: tuple[float, float], points: tuple[float, float]) -> Row:
    figures = {METRIC: 50.0, "pck_torso_0.1": 25.0}
    middle = (time[0] + time[1]) / 2, (points[0] + points[1]) / 2
    return Row(label, (0.5, 0.4, 0.6, 0.1), figures, (middle[0], *time), (middle[1], *points), dominates(time, points))


def table(*rows: Row) -> Table:
    ours = Row(OURS, (0.5, 0.4, 0.6, 0.1), {METRIC: 50.0, "pck_torso_0.1": 25.0}, (1, 1, 1), (0, 0, 0), False)
    return Table("net", "val", "openvino", (ours, *rows), {"NNCF, on ONNX": "it does not run"})


def test_the_front_and_the_promise_are_told() -> None:
    found = table(row("NNCF, defaults", SLOW, SAME), row("quantize_static, defaults", EQUAL, LESS))
    assert found.dominators == ()
    assert found.promise == {"nncf_accuracy": True, "quantize_static_speed": True}
    assert verdict(found).startswith(f"{OURS} is on the Pareto front of openvino")
    text = markdown(found)
    assert "NNCF, on ONNX does not run here: it does not run" in text
    assert "| NNCF, defaults | 0.500 (0.400 to 0.600, spread 10 %)" in text


def test_who_beats_this_project_is_named_with_bounds() -> None:
    found = table(row("NNCF, defaults", EQUAL, MORE), row("quantize_static, defaults", FAST, LESS))
    assert found.dominators == ("NNCF, defaults",)
    assert found.promise == {"nncf_accuracy": False, "quantize_static_speed": False}
    assert "beaten by NNCF, defaults (1.00 x its time, +0.50 points [+0.10, +0.90])" in verdict(found)


# With real networks


@pytest.fixture
def subject(tiny: Tiny, compiled: Compiled) -> Subject:
    whole, small = compiled("fp32").bundle, compiled("ptq-int8").bundle
    spec = whole.manifest.spec
    return Subject(
        "tiny",
        spec,
        whole.root / whole.manifest.model,
        images_of(dataset(tiny.data, "train").sample(8, 0), spec),
        {"onnxruntime": (_entry(OURS, small, "onnxruntime"),)},
        {"onnxruntime": _entry(FLOAT, whole, "onnxruntime")},
    )


def test_everybody_who_runs_is_measured_and_everybody_else_is_named(
    subject: Subject, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    static, openvino = RIVALS[3], RIVALS[0]
    broken = Rival("quantize_static", "nonsense", "onnx", {"no_such_setting": 1})
    monkeypatch.setattr(side_by_side, "RIVALS", (static, broken))
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    assert "onnxruntime" not in openvino.backends
    people = dataset(tiny.data, "val")
    context = Context(tmp_path, tmp_path, effort=Effort(ratio=LatencyProtocol(pairs=2, blocks=10)))
    timer = FakeTimer({FLOAT: 4.0, OURS: 1.0, static.label: 2.0})
    found = compare(context, subject, "onnxruntime", ("val", people), timer)
    assert [row.label for row in found.rows] == [FLOAT, OURS, static.label]
    assert list(found.refused) == [broken.label]
    float_row, ours, theirs = found.rows
    assert float_row.ratio[0] == 1.0
    assert ours.ratio[0] == pytest.approx(0.25, rel=0.02)
    assert theirs.to_ours[0] == pytest.approx(2.0, rel=0.02)
    assert ours.difference[0] == 0.0
    assert theirs.difference[0] == pytest.approx(theirs.figures[METRIC] - ours.figures[METRIC])
    assert not ours.dominates
    assert found.facts["calibration_images"] == 8
    # Networks and predictions are found again, times are not.
    monkeypatch.setattr(side_by_side, "evaluate", None)
    again = compare(
        context, subject, "onnxruntime", ("val", people), FakeTimer({FLOAT: 4.0, OURS: 2.0, static.label: 1})
    )
    assert [row.figures for row in again.rows] == [row.figures for row in found.rows]
    assert again.rows[2].to_ours[0] == pytest.approx(0.5, rel=0.02)


def test_everybody_calibrates_on_what_the_compiler_calibrates_on(tiny: Tiny, compiled: Compiled) -> None:
    import torch

    from edgepose.training.batches import to_input
    from edgepose.training.predict import cut_crops

    spec = compiled("fp32").bundle.manifest.spec
    people = dataset(tiny.data, "train").sample(5, 0)
    expected = to_input(torch.from_numpy(cut_crops(people, spec).pixels), spec).numpy()
    np.testing.assert_allclose(images_of(people, spec), expected, atol=1e-5)


# The command


def test_unknown_networks_and_absent_data_are_said_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["no-such-network"]) == 2
    assert "no network of that name" in capsys.readouterr().err
    with environment(EDGEPOSE_DATA=str(tmp_path)):
        assert main(["kpe-t"]) == 6
    assert "EDGEPOSE_DATA" in capsys.readouterr().err
