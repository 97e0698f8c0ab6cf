"""The CPU image, linted by hadolint and by rules that hadolint does not have; building it takes a Docker engine."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "deploy" / "cpu"


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (instruction, arguments), continuation lines joined, comments dropped."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    pairs = [line.split(maxsplit=1) for line in joined.splitlines() if line.strip()]
    return [(name.upper(), " ".join(arguments.split())) for name, arguments in pairs]


def last_stage() -> list[tuple[str, str]]:
    everything = instructions()
    start = max(index for index, (name, _) in enumerate(everything) if name == "FROM")
    return everything[start:]


def arguments_of(name: str, stage: list[tuple[str, str]]) -> list[str]:
    return [arguments for instruction, arguments in stage if instruction == name]


def constraints() -> dict[str, str]:
    pins = {}
    for line in (FOLDER / "constraints.txt").read_text().splitlines():
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            pins[name.lower().replace("_", "-")] = version
    return pins


def run_half_requirements() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return [Requirement(text) for text in (*project["dependencies"], *extras["ort"], *extras["openvino"])]


def test_hadolint_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "hadolint"
    tool = str(beside) if beside.is_file() else shutil.which("hadolint")
    assert tool, "hadolint is missing: pip install 'edgepose[dev]' brings it"
    result = subprocess.run([tool, str(FOLDER / "Dockerfile")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_base_images_are_slim_and_exact() -> None:
    for base in arguments_of("FROM", instructions()):
        assert re.fullmatch(r"python:3\.1[12]\.\d+-slim-[a-z]+(@sha256:[0-9a-f]{64})?( AS \w+)?", base), base


def test_container_does_not_run_as_root() -> None:
    user = arguments_of("USER", last_stage())[-1]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "a numeric id, so that orchestrators can check it"


def test_finished_image_installs_and_compiles_nothing() -> None:
    for command in arguments_of("RUN", last_stage()):
        assert not re.search(r"\b(pip|apt|apt-get|curl|wget|gcc|make)\b", command), command
    for command in arguments_of("RUN", instructions()):
        assert not re.search(r"\b(apt|apt-get|gcc|g\+\+|build-essential|curl|wget)\b", command), command
    assert "--without-pip" in arguments_of("RUN", instructions())[0]


def test_only_the_run_half_and_one_backend_are_installed() -> None:
    (install,) = [command for command in arguments_of("RUN", instructions()) if " install " in command]
    assert install.endswith('".[${BACKEND}]"')
    assert ("ARG", "BACKEND=ort") in instructions()
    assert "--constraint constraints.txt" in install


def test_health_is_asked_of_doctor_and_answers_zero_or_one() -> None:
    (check,) = arguments_of("HEALTHCHECK", last_stage())
    assert "edgepose doctor" in check
    assert check.endswith('|| exit 1"]'), "docker reserves other codes"


def test_copied_files_exist_and_reach_the_build() -> None:
    allowed = [
        line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    ]
    copies = [arguments for arguments in arguments_of("COPY", instructions()) if not arguments.startswith("--from")]
    sources = [source for arguments in copies for source in arguments.split()[:-1]]
    assert sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert source.rstrip("/") in allowed, source


def test_every_dependency_of_the_run_half_is_pinned_within_its_range() -> None:
    pins = constraints()
    for requirement in run_half_requirements():
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, name
        assert requirement.specifier.contains(pins[name]), name
