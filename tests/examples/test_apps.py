"""The small examples run as they stand: a photograph, several sources, a server that changes its bundle."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import pytest
from fastapi.testclient import TestClient

from edgepose.data.coco import read_image
from examples import cameras, image, server
from tests.cli.conftest import write_video
from tests.fakes import spot_frame
from tests.tiny_network import flip_a_byte, spot_bundle

HW = (240, 320)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return spot_bundle(tmp_path).root


@pytest.fixture
def picture() -> bytes:
    return cv2.imencode(".png", spot_frame((80, 60), (200, 150), HW))[1].tobytes()


def test_a_photograph_is_drawn_on(
    bundle: Path, picture: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.png").write_bytes(picture)
    image.main(str(bundle), str(tmp_path / "photo.png"), str(tmp_path / "drawn.png"))
    assert capsys.readouterr().out == "1 people by onnxruntime\n"
    assert read_image(tmp_path / "drawn.png").shape == (*HW, 3)
    with pytest.raises(SystemExit, match="no photograph"):
        image.main(str(bundle), str(tmp_path / "absent.png"), str(tmp_path / "drawn.png"))


def test_several_sources_share_an_estimator(
    bundle: Path, stream: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cameras, "_FRAMES", 5)
    video = write_video(tmp_path / "match.avi", 6, "MJPG")
    cameras.main(str(bundle), str(video), f"http://{stream}", str(video))
    lines = sorted(capsys.readouterr().out.splitlines())
    assert len(lines) == 3
    assert lines[0].startswith(f"http://{stream}: ")
    assert lines[1] == lines[2] == "match.avi: 1 people"


@pytest.fixture
def client(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TestClient]:
    monkeypatch.setenv("EDGEPOSE_BUNDLE", str(bundle))
    with TestClient(server.app) as opened:
        yield opened


def test_a_server_answers_and_takes_another_bundle(client: TestClient, picture: bytes, tmp_path: Path) -> None:
    found = client.post("/poses", content=picture).json()
    assert len(found["people"][0]["keypoints"]) == 2
    assert (found["backend"], found["degraded"]) == ("onnxruntime", False)
    assert client.post("/poses", content=b"no picture").status_code == 415
    (tmp_path / "other").mkdir()
    other = spot_bundle(tmp_path / "other")
    assert client.post("/reload", params={"bundle": str(other.root)}).json() == {"serving": other.digest}
    assert client.post("/poses", content=picture).json() == found
    flip_a_byte(other.root / other.manifest.engines[0].path)
    refused = client.post("/reload", params={"bundle": str(other.root)})
    assert refused.status_code == 422
    assert client.post("/poses", content=picture).json() == found
