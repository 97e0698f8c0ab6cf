"""What the command line's tests run on: the spot bundle, spot photographs, labelled spots, tiny networks.

Invariant: everything is made here in a second; tests that spoil something get a copy.
"""

from __future__ import annotations

import contextlib
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import pytest

from edgepose.__main__ import main
from edgepose.blocks.config import PRESETS, KPEConfig
from tests.fakes import spot_frame
from tests.tiny_network import spot_bundle

BLUE, RED = (60.0, 90.0), (200.0, 40.0)
HW = (240, 320)
TINY = KPEConfig("tiny", (32, 32), 4, (4, 4, 4, 4), (1, 1, 1, 1), 4)


@dataclass(frozen=True)
class Outcome:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def line(self) -> str:
        """The one line of an error."""
        (line,) = self.err.splitlines()
        return line


Cli = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("EDGEPOSE_DEBUG", "GITHUB_ACTIONS", "NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs `edgepose …` in this process; what libraries write to the file descriptors is captured too."""

    def run(*words: object) -> Outcome:
        capfd.readouterr()
        code = main([str(word) for word in words])
        return Outcome(code, *capfd.readouterr())

    return run


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The spot bundle; not to be changed."""
    return spot_bundle(tmp_path_factory.mktemp("pristine")).root


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A copy of the spot bundle that a test may spoil."""
    return Path(shutil.copytree(pristine, tmp_path / "spots.bundle"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photograph of a blue and a red spot."""
    path = tmp_path / "photo.png"
    cv2.imwrite(str(path), spot_frame(BLUE, RED, HW))
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with three photographs."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        cv2.imwrite(str(folder / f"{number}.jpg"), spot_frame((60.0 + 20 * number, 90.0), RED, HW))
    return folder


def write_video(path: Path, frames: int, codec: str) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10.0, (HW[1], HW[0]))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(spot_frame((60.0 + 10 * number, 90.0), RED, HW))
    writer.release()
    return path


@pytest.fixture
def video(tmp_path: Path) -> Path:
    """Eight frames of Motion JPEG, whose header says how many they are."""
    return write_video(tmp_path / "video.avi", 8, "MJPG")


def write_people(folder: Path, split: str, count: int) -> None:
    """`count` photographs with one labelled pair of spots each, as COCO keypoints."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for number in range(count):
        blue, red = (50.0 + 7 * (number % 10), 90.0 + number), (200.0 - 5 * (number % 7), 60.0 + number)
        name = f"{split}{number}.jpg"
        cv2.imwrite(str(folder / "images" / name), spot_frame(blue, red, HW))
        images.append({"id": number, "file_name": name, "width": HW[1], "height": HW[0]})
        person = {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [0, 0, HW[1], HW[0]]}
        annotations.append({**person, "keypoints": [*blue, 2, *red, 2], "num_keypoints": 2, "area": 1000, "iscrowd": 0})
    categories = [
        {"id": 1, "name": "spots", "keypoints": ["blue", "red"], "skeleton": [[1, 2]], "oks_sigmas": [0.1, 0.1]}
    ]
    document = {"images": images, "annotations": annotations, "categories": categories}
    (folder / f"{split}.json").write_text(json.dumps(document))


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """A data set: 20 people in train, 24 in val."""
    write_people(tmp_path / "people", "train", 20)
    write_people(tmp_path / "people", "val", 24)
    return tmp_path / "people"


@pytest.fixture
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an architecture that trains in a second."""
    monkeypatch.setitem(PRESETS, TINY.name, TINY)
    return TINY.name


@contextlib.contextmanager
def disk_of(size_bytes: int) -> Iterator[None]:
    """No file may grow beyond `size_bytes`: what a full disk looks like to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
