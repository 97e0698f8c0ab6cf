"""What every area's tests share: real data, golden files, two threads.

Invariant: a test that needs real data either runs, is skipped with a line at the end of the run, or fails under
EDGEPOSE_REQUIRE_DATA=1.
"""

from __future__ import annotations

import os
import signal

# Before anything loads a numerical library: tests run beside other work, and idle OpenMP threads spin.
_THREADS = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"  # one of two processes, or the only one
for _variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_variable, _THREADS)

os.environ.setdefault("EDGEPOSE_AIM", "none")  # tests of other things need not measure which engine is fastest

from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402

from tests.stream import stream  # noqa: E402, F401 - fixture
from tests.tiny_checkpoint import compiled, tiny  # noqa: E402, F401 - fixtures

REPOSITORY = Path(__file__).resolve().parents[1]
GOLDENS = Path(__file__).resolve().parent / "golden"

Golden = Callable[[str, str], None]

_absent_data = pytest.StashKey[list[str]]()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Torch on one thread: networks as small as those of tests lose time to threads that wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-goldens", action="store_true", help="write what tests found over the golden files")


def pytest_configure(config: pytest.Config) -> None:
    # Shells start background jobs with SIGINT ignored, children inherit that, and Ctrl-C could not be tested.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_absent_data] = []


def data_root() -> Path:
    """The folder that holds lspet/ and coco17/: $EDGEPOSE_DATA, else shared/data beside the checkout."""
    return Path(os.environ.get("EDGEPOSE_DATA") or REPOSITORY.parent / "shared" / "data")


@pytest.fixture
def real_data(request: pytest.FixtureRequest) -> Path:
    """Folder of real data sets: `real_data / "lspet"` holds train.json, val.json and images/."""
    root = data_root()
    if (root / "lspet" / "val.json").is_file():
        return root
    message = f"no real data: {root}/lspet/val.json does not exist; set EDGEPOSE_DATA to the folder that holds lspet/"
    if os.environ.get("EDGEPOSE_REQUIRE_DATA") == "1":
        pytest.fail(f"{message} (EDGEPOSE_REQUIRE_DATA=1 forbids skipping)", pytrace=False)
    request.config.stash[_absent_data].append(request.node.nodeid)
    pytest.skip(message)


@pytest.fixture
def update_goldens(request: pytest.FixtureRequest) -> bool:
    """Whether golden files are to be rewritten instead of compared."""
    return bool(request.config.getoption("--update-goldens"))


@pytest.fixture
def golden(update_goldens: bool) -> Golden:
    """`golden(name, text)` compares text with tests/golden/NAME, or writes it there under --update-goldens."""

    def compare(name: str, text: str) -> None:
        path = GOLDENS / name
        if update_goldens:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            return
        if not path.is_file():
            pytest.fail(f"{path} does not exist; run pytest with --update-goldens and review the file", pytrace=False)
        assert text == path.read_text(encoding="utf-8"), f"{path} differs; --update-goldens accepts the new text"

    return compare


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    absent = config.stash[_absent_data]
    if absent:
        terminalreporter.section("REAL DATA ABSENT", sep="!", yellow=True)
        terminalreporter.write_line(
            f"{len(absent)} tests were skipped because {data_root()}/lspet does not exist. "
            "Set EDGEPOSE_DATA; EDGEPOSE_REQUIRE_DATA=1 turns these skips into failures."
        )
