"""The waterfall: a change is the difference of two figures on the same persons, with bounds; nothing is made up."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import pytest

from edgepose.errors import SpecError
from edgepose.pose import metrics
from edgepose.profiler.accuracy import AccuracyRecord, summary
from edgepose.profiler.slices import SliceRecord
from edgepose.profiler.waterfall import Evidence, Kind, Waterfall, waterfall, worst_persons
from edgepose.spec import Keypoints
from tests.profiler.simulated import KEYPOINTS, record

HEAD = "pck_torso_0.2"
PER_JOINT = ("predicted", "scores", "visibility", "errors_px")


def step(name: str, accuracy: AccuracyRecord | None, kind: Kind = "network", why: str = "") -> Evidence:
    return Evidence(name, name.upper(), kind, "torch", why, accuracy=accuracy)


def whole_chain(persons: int = 120) -> list[Evidence]:
    return [
        step("fp32", record(persons)),
        step("prune", record(persons, lost=0.2)),
        step("recover", record(persons, lost=0.05)),
        step("onnx", record(persons, lost=0.06), "onnx"),
        step("ort int8", record(persons, lost=0.07), "engine"),
        step("openvino int8", record(persons, lost=0.08), "engine"),
    ]


@cache
def whole() -> Waterfall:
    return waterfall(whole_chain(), KEYPOINTS)


def test_a_change_is_the_difference_to_the_step_before() -> None:
    found = whole()
    for before, after in (("fp32", "prune"), ("prune", "recover"), ("recover", "onnx"), ("onnx", "ort int8")):
        change = found.step(after).changes[HEAD]
        difference = 100 * (found.step(after).metrics[HEAD] - found.step(before).metrics[HEAD])
        assert change.against == before
        assert change.points == pytest.approx(difference)
        assert change.low is not None
        assert change.high is not None
        assert change.low <= change.points <= change.high
        assert change.persons == 120


def test_engines_are_compared_with_the_graph_and_not_with_each_other() -> None:
    found = whole()
    assert found.step("openvino int8").changes[HEAD].against == "onnx"


def test_totals_are_against_the_float_network() -> None:
    found = whole()
    assert found.reference == "fp32"
    assert found.step("fp32").totals == {}
    total = found.step("openvino int8").totals[HEAD]
    assert total.points == pytest.approx(100 * (found.steps[-1].metrics[HEAD] - found.steps[0].metrics[HEAD]))
    assert total.points < 0


@pytest.mark.parametrize(("gained", "reference"), [(0.2, "control"), (0.0, "fp32")])
def test_the_reference_is_the_better_of_float_network_and_control(gained: float, reference: str) -> None:
    control = step("control", record(120, gained=gained), "control")
    found = waterfall([control, *whole_chain()[:2]], KEYPOINTS)
    assert found.reference == reference
    assert found.step("prune").totals[HEAD].against == reference
    assert found.step("prune").changes[HEAD].against == "fp32"
    assert found.step("control").changes == {}
    assert found.step("control").totals == {}


def test_a_step_that_was_not_measured_has_no_figure_and_is_passed_over() -> None:
    chain = whole_chain()
    chain[1] = dataclasses.replace(chain[1], accuracy=None, why="gone from the cache", recorded={HEAD: 0.5})
    found = waterfall(chain, KEYPOINTS)
    lost = found.step("prune")
    assert (lost.measured, lost.metrics, lost.changes, lost.joints) == (False, {}, {}, {})
    assert lost.why == "gone from the cache"
    assert lost.recorded == {HEAD: 0.5}
    assert found.step("recover").changes[HEAD].against == "fp32"


def test_without_the_float_network_there_are_no_totals() -> None:
    chain = whole_chain()
    chain[0] = dataclasses.replace(chain[0], accuracy=None)
    found = waterfall(chain, KEYPOINTS)
    assert found.reference == ""
    assert found.joints == ()
    assert all(not one.totals for one in found.steps)
    assert found.step("recover").changes[HEAD].against == "prune"


def test_nothing_measured_at_all() -> None:
    found = waterfall([dataclasses.replace(one, accuracy=None) for one in whole_chain()], KEYPOINTS)
    assert not any(one.measured or one.changes for one in found.steps)
    assert found.compressed == ""


def test_more_persons_show_smaller_changes() -> None:
    few, many = (
        waterfall([step("fp32", record(persons)), step("prune", record(persons, lost=0.1))], KEYPOINTS)
        for persons in (40, 640)
    )
    sizes = [one.step("prune").changes[HEAD].detectable_points for one in (few, many)]
    assert sizes[0] is not None
    assert sizes[1] is not None
    assert sizes[1] < sizes[0] / 2


def test_a_detectable_change_is_mostly_seen() -> None:
    """The promise of the smallest change that shows: its 95 % bounds leave out zero nine times in ten."""
    persons = 150
    size = waterfall([step("a", record(persons)), step("b", record(persons, lost=0.05, lost_seed=99))], KEYPOINTS)
    change = size.step("b").changes[HEAD]
    assert change.detectable_points is not None
    share = change.detectable_points / 100 / summary(record(persons), KEYPOINTS)[HEAD]  # of right joints that go wrong
    seen = 0
    for seed in range(10):
        pair = [step("a", record(persons)), step("b", record(persons, lost=share, lost_seed=seed))]
        high = waterfall(pair, KEYPOINTS).step("b").changes[HEAD].high
        seen += high is not None and high < 0
    assert seen >= 7


def test_people_of_one_photograph_have_no_bounds() -> None:
    alike = [
        dataclasses.replace(one.accuracy, image_id=np.zeros(120, np.int64)) for one in whole_chain()[:2] if one.accuracy
    ]
    found = waterfall([step("fp32", alike[0]), step("prune", alike[1])], KEYPOINTS)
    change = found.step("prune").changes[HEAD]
    assert (change.low, change.high, change.detectable_points) == (None, None, None)
    assert change.points < 0


def test_keypoints_without_a_torso_have_metrics_of_their_own() -> None:
    spots = Keypoints(("blue", "red"))
    two = [
        dataclasses.replace(
            record(50, lost=lost),
            **{name: getattr(record(50, lost=lost), name)[:, :2] for name in PER_JOINT},
            torso_px=np.full(50, np.nan),
        )
        for lost in (0.0, 0.3)
    ]
    found = waterfall([step("fp32", two[0]), step("ptq", two[1])], spots)
    assert found.metrics == ("pck_extent_0.1",)
    assert found.step("ptq").changes["pck_extent_0.1"].points < 0
    assert [joint.joint for joint in found.joints] == ["blue", "red"]


def test_nobody_with_a_torso() -> None:
    bare = [dataclasses.replace(record(20, lost=lost), torso_px=np.full(20, np.nan)) for lost in (0.0, 0.2)]
    found = waterfall([step("fp32", bare[0]), step("ptq", bare[1])], KEYPOINTS)
    assert math.isnan(found.step("ptq").metrics[HEAD])
    assert set(found.step("ptq").changes) == {"limb12_extent_0.1"}
    assert found.joints == ()


def test_other_persons_are_refused() -> None:
    with pytest.raises(SpecError, match="the same persons"):
        waterfall([step("fp32", record(50)), step("prune", record(60))], KEYPOINTS)


def test_two_steps_of_one_name_are_refused() -> None:
    with pytest.raises(SpecError, match="two steps called 'fp32'"):
        waterfall([step("fp32", None), step("fp32", None)], KEYPOINTS)


def test_joints_are_those_of_the_first_engine_against_the_reference() -> None:
    chain = [step("fp32", record(300)), step("ort int8", record(300, lost=0.5, joint="neck"), "engine")]
    found = waterfall(chain, KEYPOINTS)
    assert found.compressed == "ort int8"
    lost = [joint.joint for joint in found.joints if joint.lost]
    assert lost == ["neck"]
    assert found.steps[1].joints["neck"] < found.steps[0].joints["neck"]


def slice_of(accuracy: AccuracyRecord, name: str = "low_light") -> dict[str, SliceRecord]:
    errors = metrics.JointErrors(accuracy.errors_px, accuracy.torso_px, accuracy.extent_px, metrics.limb12(KEYPOINTS))
    hidden = np.zeros(accuracy.errors_px.shape, bool)
    hidden[:, 3] = ~np.isnan(accuracy.errors_px[:, 3])
    return {name: SliceRecord(name, accuracy.annotation_id, errors, hidden, np.ones_like(hidden), None)}


def test_slices_have_changes_of_their_own() -> None:
    chain = [dataclasses.replace(one, slices=slice_of(one.accuracy)) for one in whole_chain()[:3] if one.accuracy]
    found = waterfall(chain, KEYPOINTS)
    whole, hidden = found.step("recover").slices
    assert (whole.slice, whole.joints, hidden.joints) == ("low_light", "all", "hidden")
    assert whole.metrics[HEAD].estimate == pytest.approx(found.step("recover").metrics[HEAD])
    assert whole.changes[HEAD].estimate == pytest.approx(found.step("recover").changes[HEAD].points)
    assert whole.totals[HEAD].estimate == pytest.approx(found.step("recover").totals[HEAD].points)
    assert whole.changes[HEAD].low < whole.changes[HEAD].estimate < whole.changes[HEAD].high


def test_slices_of_one_step_only_have_no_changes() -> None:
    chain = whole_chain()[:2]
    assert chain[1].accuracy is not None
    chain[1] = dataclasses.replace(chain[1], slices=slice_of(chain[1].accuracy))
    assert waterfall(chain, KEYPOINTS).step("prune").slices[0].changes == {}


def test_worst_persons_are_those_who_lost_most() -> None:
    before = record(30)
    errors = before.errors_px.copy()
    labelled = ~np.isnan(errors)
    errors[7][labelled[7]] += 60
    errors[3][labelled[3]] += 30
    errors[9][labelled[9]] = 0.0
    worst = worst_persons(before, dataclasses.replace(before, errors_px=errors), 5)
    assert [one.row for one in worst] == [7, 3]
    assert worst[0].compressed > worst[0].reference


def test_nobody_is_worst_where_nothing_changed() -> None:
    assert worst_persons(record(10), record(10), 3) == ()


def test_a_lost_prediction_is_as_bad_as_any_but_not_endless() -> None:
    before = record(10)
    errors = before.errors_px.copy()
    errors[2, 0] = np.inf
    (worst,) = worst_persons(before, dataclasses.replace(before, errors_px=errors), 3)
    assert worst.row == 2
    assert worst.compressed <= 0.5
