"""`edgepose run`: photographs, folders and videos in, poses and pictures out, and nothing of them after an error."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import edgepose.cli.run as run_module
from edgepose.data.coco import read_image
from tests.cli.conftest import BLUE, HW, RED, Cli, disk_of, write_video
from tests.fakes import spot_frame
from tests.tiny_network import flip_a_byte

REPOSITORY = Path(__file__).resolve().parents[2]


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# What comes out


def test_photograph_gives_a_drawing_and_json(cli: Cli, bundle: Path, photo: Path, tmp_path: Path) -> None:
    outcome = cli("run", bundle, photo, "--out", tmp_path / "drawn.jpg", "--json", tmp_path / "poses.json")
    assert outcome.code == 0
    assert "photo.png: 1 person, 2 of 2 joints above 0.3" in outcome.out
    assert "took each whole frame as one person" in outcome.err
    (row,) = json.loads((tmp_path / "poses.json").read_text())
    assert row["file_name"] == "photo.png"
    (pose,) = row["poses"]
    assert np.allclose(pose["keypoints"], [BLUE, RED], atol=12)  # a bin of the tiny network is that many pixels
    assert len(pose["scores"]) == 2
    assert pose["box"] == [0, 0, HW[1], HW[0]]
    drawn = read_image(tmp_path / "drawn.jpg")
    assert drawn.shape == (*HW, 3)
    assert np.abs(drawn.astype(int) - read_image(photo)).max() > 100


def test_boxes_of_one_photograph_are_a_list(cli: Cli, bundle: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "boxes.json").write_text("[[10, 10, 300, 200], [40, 20, 250, 140]]")
    outcome = cli("run", bundle, photo, "--boxes", tmp_path / "boxes.json", "--json", "-")
    assert outcome.code == 0
    assert "whole frame" not in outcome.err
    (row,) = json.loads(outcome.out)
    assert [pose["box"] for pose in row["poses"]] == [[10, 10, 300, 200], [40, 20, 250, 140]]


def test_backend_and_threads_are_the_ones_asked_for(cli: Cli, bundle: Path, photo: Path) -> None:
    outcome = cli("run", bundle, photo, "--backend", "openvino", "--threads", "2")
    assert outcome.code == 0
    assert "spots on openvino fp32, threads: 2" in outcome.err


def test_flip_test_is_done_and_said(cli: Cli, bundle: Path, photo: Path) -> None:
    plain, flipped = cli("run", bundle, photo, "--json", "-"), cli("run", bundle, photo, "--flip-test", "--json", "-")
    assert flipped.code == 0
    assert "flip test" in flipped.err
    assert "flip test" not in plain.err
    once, twice = (json.loads(outcome.out)[0]["poses"][0]["keypoints"] for outcome in (plain, flipped))
    assert np.allclose(once, twice, atol=0.01)  # the spot network has no sides


def test_duplicate_poses_go_and_other_people_stay(cli: Cli, bundle: Path, photos: Path, tmp_path: Path) -> None:
    people = [[0, 0, 320, 240], [2, 1, 318, 239], [4, 0, 320, 238]]  # one person, found three times
    (tmp_path / "boxes.json").write_text(json.dumps({"0.jpg": people, "1.jpg": people[:1], "2.jpg": []}))
    flags = ["run", bundle, photos, "--boxes", tmp_path / "boxes.json", "--json", "-"]
    counts = [len(row["poses"]) for row in json.loads(cli(*flags).out)]
    assert counts == [3, 1, 0]
    outcome = cli(*flags, "--oks-nms", "0.3")
    assert outcome.code == 0
    assert [len(row["poses"]) for row in json.loads(outcome.out)] == [1, 1, 0]
    assert [len(row["poses"]) for row in json.loads(cli(*flags, "--oks-nms", "1").out)] == [3, 1, 0]
    assert cli(*flags, "--oks-nms", "1.5").code == 2


def test_smoothing_of_a_video_lags_behind_movement_and_is_refused_without_time(
    cli: Cli, bundle: Path, video: Path, photo: Path
) -> None:
    plain, smooth = cli("run", bundle, video, "--json", "-"), cli("run", bundle, video, "--smooth", "--json", "-")
    assert smooth.code == 0
    raw_x, smooth_x = (
        [row["poses"][0]["keypoints"][0][0] for row in json.loads(outcome.out)] for outcome in (plain, smooth)
    )
    assert smooth_x[0] == raw_x[0]
    assert all(before < now for before, now in itertools.pairwise(smooth_x))
    assert all(0 < raw - smoothed < 15 for raw, smoothed in zip(raw_x[1:], smooth_x[1:], strict=True))
    outcome = cli("run", bundle, photo, "--smooth")
    assert outcome.code == 2
    assert "which has no time, expected a video or a camera" in outcome.line


def test_people_are_followed_and_keep_their_numbers(cli: Cli, bundle: Path, video: Path, tmp_path: Path) -> None:
    boxes = [[[0, 0, 200, 240], [150, 0, 320, 240]][:: 1 - 2 * (frame % 2)] for frame in range(8)]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    flags = ["--boxes", tmp_path / "boxes.json", "--track", "--oks-nms", "1", "--json", tmp_path / "poses.jsonl"]
    outcome = cli("run", bundle, video, *flags)
    assert outcome.code == 0
    rows = [json.loads(line) for line in (tmp_path / "poses.jsonl").read_text().splitlines()]
    assert [row["frame"] for row in rows] == list(range(8))
    assert [row["time_s"] for row in rows] == pytest.approx([frame / 10 for frame in range(8)])
    for row in rows:
        assert {pose["id"]: pose["box"][0] for pose in row["poses"]} == {1: 0, 2: 150}


def test_coco_results_have_the_annotations_image_ids(cli: Cli, bundle: Path, people: Path, tmp_path: Path) -> None:
    for path in (people / "images").glob("train*"):
        path.unlink()
    flags = ["--boxes", people / "val.json", "--coco-results", tmp_path / "results.json"]
    assert cli("run", bundle, people / "images", *flags).code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    ids = [image["id"] for image in json.loads((people / "val.json").read_text())["images"]]
    assert sorted(row["image_id"] for row in results) == sorted(ids)
    assert results[0]["bbox"] == [0, 0, 320, 240]
    assert len(results[0]["keypoints"]) == 6


def test_coco_results_of_a_video_count_its_frames(cli: Cli, bundle: Path, video: Path) -> None:
    results = json.loads(cli("run", bundle, video, "--coco-results", "-").out)
    assert [row["image_id"] for row in results] == list(range(8))


def test_a_camera_runs_until_the_time_is_over(cli: Cli, bundle: Path, stream: str, tmp_path: Path) -> None:
    flags = ["--seconds", "1.5", "--out", tmp_path / "seen.avi", "--json", "-"]
    outcome = cli("run", bundle, f"http://me:secret@{stream}", *flags)
    assert outcome.code == 0
    rows = [json.loads(line) for line in outcome.out.splitlines()]
    assert [row["frame"] for row in rows] == list(range(len(rows)))
    assert rows[0]["file_name"] == f"http://{stream}"
    assert "secret" not in outcome.out + outcome.err
    capture = cv2.VideoCapture(str(tmp_path / "seen.avi"))
    shown_s = capture.get(cv2.CAP_PROP_FRAME_COUNT) / capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    assert shown_s == pytest.approx(rows[-1]["time_s"] - rows[0]["time_s"], abs=0.2)


def test_ctrl_c_ends_a_camera_as_its_last_frame_would(
    cli: Cli, bundle: Path, stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, drawn = run_module.draw, itertools.count()

    def draw_until_ctrl_c(*arguments: object, **settings: object) -> object:
        if next(drawn) == 2:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "draw", draw_until_ctrl_c)
    outcome = cli("run", bundle, f"http://{stream}", "--json", tmp_path / "poses.json", "--out", tmp_path / "seen.avi")
    assert outcome.code == 0
    assert "2 frames" in outcome.out
    assert len(json.loads((tmp_path / "poses.json").read_text())) == 2
    assert (tmp_path / "seen.avi").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["photo.png", "--json", "-", "--coco-results", "-"], "--coco-results -: found --json - as well"),
        (["photo.png", "--track"], "--track: found photo.png, which has no time, expected a video or a camera"),
        (["photo.png", "--seconds", "3"], "--seconds: found photo.png, which has no time"),
        (["photo.png", "--every-frame"], "--every-frame: found photo.png, of which every frame is taken anyway"),
        (["ftp://host/video.mp4"], "found a URL of the kind ftp, expected one of rtsp"),
        (["/dev/video77"], "/dev/video77: found nothing there that can be read, expected a camera or stream"),
    ],
)
def test_flags_and_sources_that_do_not_fit(
    cli: Cli, bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    monkeypatch.chdir(photo.parent)
    outcome = cli("run", bundle, *flags)
    assert outcome.code == 2
    assert words in outcome.line


def test_min_score_decides_which_joints_are_sure(cli: Cli, bundle: Path, photo: Path) -> None:
    assert "0 of 2 joints above 1" in cli("run", bundle, photo, "--min-score", "1").out


def test_folder_gives_a_folder_in_order(cli: Cli, bundle: Path, photos: Path, tmp_path: Path) -> None:
    boxes = {f"{number}.jpg": [[0, 0, 320, 240]] * number for number in range(3)}
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    (photos / "notes.txt").write_text("no photograph")
    flags = ["--boxes", tmp_path / "boxes.json", "--out", tmp_path / "drawn", "--json", tmp_path / "poses.json"]
    outcome = cli("run", bundle, photos, *flags)
    assert outcome.code == 0
    rows = json.loads((tmp_path / "poses.json").read_text())
    assert [(row["file_name"], len(row["poses"])) for row in rows] == [("0.jpg", 0), ("1.jpg", 1), ("2.jpg", 2)]
    assert files_below(tmp_path / "drawn") == {"0.jpg", "1.jpg", "2.jpg"}
    assert outcome.out.splitlines()[0] == "0.jpg: 0 people"


def test_coco_annotations_serve_as_boxes(cli: Cli, bundle: Path, people: Path) -> None:
    outcome = cli("run", bundle, people / "images", "--boxes", people / "val.json")
    assert outcome.code == 2  # the folder holds the train photographs too, and val.json says nothing of them
    assert "no boxes of train0.jpg" in outcome.line
    for path in (people / "images").glob("train*"):
        path.unlink()
    outcome = cli("run", bundle, people / "images", "--boxes", people / "val.json", "--json", "-")
    assert [row["poses"][0]["box"] for row in json.loads(outcome.out)] == [[0, 0, 320, 240]] * 24


def test_folder_is_replaced_only_when_asked_and_only_if_it_holds_pictures(
    cli: Cli, bundle: Path, photos: Path, tmp_path: Path
) -> None:
    command = ["run", bundle, photos, "--out", tmp_path / "drawn"]
    assert cli(*command).code == 0
    assert cli(*command).code == 2
    assert cli(*command, "--force").code == 0
    (tmp_path / "drawn" / "diary.txt").write_text("precious")
    assert cli(*command, "--force").code == 2
    assert (tmp_path / "drawn" / "diary.txt").read_text() == "precious"


@pytest.mark.parametrize("name", ["drawn.mp4", "drawn.avi"])
def test_video_gives_a_video_of_as_many_frames(cli: Cli, bundle: Path, video: Path, tmp_path: Path, name: str) -> None:
    outcome = cli("run", bundle, video, "--out", tmp_path / name, "--json", tmp_path / "poses.json")
    assert outcome.code == 0
    rows = json.loads((tmp_path / "poses.json").read_text())
    assert [row["frame"] for row in rows] == list(range(8))
    found = [row["poses"][0]["keypoints"][0][0] for row in rows]
    assert np.allclose(found, [60 + 10 * number for number in range(8)], atol=14)
    capture = cv2.VideoCapture(str(tmp_path / name))
    assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 8
    assert capture.get(cv2.CAP_PROP_FPS) == 10
    capture.release()


def test_video_may_have_boxes_frame_by_frame(cli: Cli, bundle: Path, video: Path, tmp_path: Path) -> None:
    lists = [[[number, 0, 320, 240]] for number in range(8)]
    (tmp_path / "boxes.json").write_text(json.dumps(lists))
    outcome = cli("run", bundle, video, "--boxes", tmp_path / "boxes.json", "--json", "-")
    assert [row["poses"][0]["box"][0] for row in json.loads(outcome.out)] == list(range(8))
    (tmp_path / "boxes.json").write_text(json.dumps(lists[:5]))
    outcome = cli("run", bundle, video, "--boxes", tmp_path / "boxes.json")
    assert outcome.code == 2
    assert "5 lists of boxes" in outcome.line


# Bad input: exit code 2, one line, nothing left


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:900]), "decode"),
        (lambda path: path.write_bytes(b""), "0 bytes"),
        (lambda path: cv2.imwrite(str(path), spot_frame(BLUE, RED)[..., 0]), "a grey image"),
        (lambda path: cv2.imwrite(str(path), np.zeros((20, 30, 4), np.uint8)), "alpha"),
        (lambda path: cv2.imwrite(str(path), np.zeros((20, 30, 3), np.uint16)), "16 bits"),
    ],
)
def test_bad_photograph(cli: Cli, bundle: Path, photo: Path, tmp_path: Path, spoil: object, words: str) -> None:
    spoil(photo)  # type: ignore[operator]
    before = files_below(tmp_path)
    outcome = cli("run", bundle, photo, "--out", tmp_path / "drawn.png", "--json", tmp_path / "poses.json")
    assert outcome.code == 2
    assert outcome.line.startswith(f"edgepose run: {photo}: found ")
    assert words in outcome.line
    assert files_below(tmp_path) == before


def test_truncated_jpeg_in_a_folder_leaves_no_folder(cli: Cli, bundle: Path, photos: Path, tmp_path: Path) -> None:
    last = photos / "2.jpg"
    last.write_bytes(last.read_bytes()[:-500])
    before = files_below(tmp_path)
    outcome = cli("run", bundle, photos, "--out", tmp_path / "drawn", "--json", tmp_path / "poses.json")
    assert outcome.code == 2
    assert f"{last}: found a truncated JPEG" in outcome.line
    assert files_below(tmp_path) == before


def test_grey_photograph_is_taken_when_asked(cli: Cli, bundle: Path, photo: Path, tmp_path: Path) -> None:
    cv2.imwrite(str(photo), spot_frame(BLUE, RED)[..., 0])
    assert cli("run", bundle, photo, "--convert", "--out", tmp_path / "drawn.png").code == 0
    assert read_image(tmp_path / "drawn.png").shape == (*HW, 3)


@pytest.mark.parametrize(
    ("boxes", "words"),
    [
        ("[[10, 10, 10, 50]]", "boxes: row 0: found [10, 10, 10, 50], of zero size"),
        ("[[0, 0, 9, 9], [400, 10, 500, 50]]", "boxes: row 1: found [400, 10, 500, 50], outside the frame"),
        ("[[50, 10, 10, 50]]", "in the wrong order"),
        ("[[1, 2, 3]]", "box 0: found 3 entries, expected 4 numbers"),
        ("[1, 2, 3, 4]", "one box [1, 2, 3, 4] instead of a list of boxes"),
        ("[[1, 2, NaN, 4]]", "found nan, expected finite numbers"),
        ('[[1, 2, "3", 4]]', "found '3', expected finite numbers"),
        ('{"foto.png": []}', "no boxes of photo.png, expected one list per photograph; rename 'foto.png'"),
        ('{"images": [], "annotations": [{"id": 7, "image_id": 1}]}', "annotation 7: image_id: found 1"),
        ("{", "not JSON"),
        ("3", "a JSON int"),
    ],
)
def test_bad_boxes(cli: Cli, bundle: Path, photo: Path, tmp_path: Path, boxes: str, words: str) -> None:
    (tmp_path / "boxes.json").write_text(boxes)
    before = files_below(tmp_path)
    outcome = cli("run", bundle, photo, "--boxes", tmp_path / "boxes.json", "--out", tmp_path / "drawn.png")
    assert outcome.code == 2
    assert words in outcome.line
    assert files_below(tmp_path) == before


def test_video_that_ends_early_leaves_nothing(cli: Cli, bundle: Path, video: Path, tmp_path: Path) -> None:
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    before = files_below(tmp_path)
    command = ["run", bundle, video, "--out", tmp_path / "drawn.avi", "--json", tmp_path / "poses.json"]
    outcome = cli(*command)
    assert outcome.code == 2
    assert "frames, then the end, expected 8 frames as its header says" in outcome.line
    assert files_below(tmp_path) == before
    assert cli(*command, "--allow-short").code == 0
    assert 0 < len(json.loads((tmp_path / "poses.json").read_text())) < 8


@pytest.mark.parametrize("content", [None, b"no video at all", b""])
def test_bad_video(cli: Cli, bundle: Path, tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "bad.mp4"
    if content is not None:
        path.write_bytes(content)
    outcome = cli("run", bundle, path, "--out", tmp_path / "drawn.mp4")
    assert outcome.code == 2
    assert str(path) in outcome.line
    assert not (tmp_path / "drawn.mp4").exists()


def test_video_whose_index_is_cut_off_is_refused(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    path = write_video(tmp_path / "short.mp4", 8, "mp4v")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    outcome = cli("run", bundle, path)
    assert outcome.code == 2
    assert "truncated" in outcome.line


def test_folder_without_photographs(cli: Cli, bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "without photographs" in cli("run", bundle, tmp_path / "empty").line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--out", "photo.png"], "the input itself"),
        (["--json", "spots.bundle/poses.json"], "a bundle never changes"),
        (["--out", "drawn.xyz"], "the suffix '.xyz'"),
        (["--out", "same.png", "--json", "same.png"], "given twice"),
        (["--backend", "tensorflow"], "found 'tensorflow', expected one of onnxruntime"),
        (["--backend", "tensorrt"], "expected tensorrt"),
        (["--precision", "int9"], "found 'int9'"),
        (["--precision", "int8"], "expected int8"),
        (["--min-score", "high"], "--min-score"),
        (["--oks-nms", "0.9"], "--oks-nms: found no --boxes, so one pose per frame"),
        (["--bokses", "x"], "--bokses"),
    ],
)
def test_wrong_flags(
    cli: Cli, bundle: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files_below(tmp_path)
    outcome = cli("run", "spots.bundle", "photo.png", *flags)
    assert outcome.code == 2
    assert words in outcome.line
    assert files_below(tmp_path) == before


def test_bundle_with_one_byte_changed_exits_8(cli: Cli, bundle: Path, photo: Path, tmp_path: Path) -> None:
    flip_a_byte(bundle / "engines/cpu/onnxruntime/fp32.onnx")
    outcome = cli("run", bundle, photo, "--out", tmp_path / "drawn.png")
    assert outcome.code == 8
    assert "fp32.onnx" in outcome.line
    assert not (tmp_path / "drawn.png").exists()


def test_no_bundle(cli: Cli, photo: Path, tmp_path: Path) -> None:
    assert cli("run", tmp_path / "nothing.bundle", photo).code == 2


# A full disk, Ctrl-C


@pytest.mark.parametrize("out", ["drawn.png", "drawn.avi", "drawn.mp4", "drawn"])
def test_full_disk_exits_6_and_leaves_nothing(
    cli: Cli, bundle: Path, photo: Path, photos: Path, tmp_path: Path, out: str
) -> None:
    source = {"drawn.png": photo, "drawn": photos}.get(out) or write_video(tmp_path / "long.avi", 30, "MJPG")
    before = files_below(tmp_path)
    with disk_of(1000):
        outcome = cli("run", bundle, source, "--out", tmp_path / out)
    assert outcome.code == 6
    assert f"writing {tmp_path / out}" in outcome.line
    assert files_below(tmp_path) == before


def test_ctrl_c_between_frames_leaves_nothing(
    cli: Cli, bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[object] = []
    real = run_module.draw

    def draw_until_ctrl_c(*arguments: object, **settings: object) -> object:
        if len(drawn) == 2:
            signal.raise_signal(signal.SIGINT)
        drawn.append(None)
        return real(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(run_module, "draw", draw_until_ctrl_c)
    before = files_below(tmp_path)
    outcome = cli("run", bundle, photos, "--out", tmp_path / "drawn", "--json", tmp_path / "poses.json")
    assert outcome.code == 130
    assert outcome.line == "edgepose run: interrupted; nothing was left half-written"
    assert files_below(tmp_path) == before


def test_sigterm_between_frames_leaves_nothing(
    cli: Cli, bundle: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "draw", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    before, previous = files_below(tmp_path), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        cli("run", bundle, photos, "--out", tmp_path / "drawn")
    assert ended.value.code == 143
    assert files_below(tmp_path) == before
    assert signal.getsignal(signal.SIGTERM) == previous


def test_ctrl_c_in_a_process_of_its_own_leaves_nothing(bundle: Path, tmp_path: Path) -> None:
    source = write_video(tmp_path / "long.avi", 600, "MJPG")
    before = files_below(tmp_path)
    command = [sys.executable, "-m", "edgepose", "run", str(bundle), str(source), "--out", str(tmp_path / "drawn.avi")]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env={**os.environ, "CI": "1"}
    )
    try:
        deadline_s = time.monotonic() + 60
        while files_below(tmp_path) == before and time.monotonic() < deadline_s and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert files_below(tmp_path) == before
