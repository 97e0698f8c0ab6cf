"""The wheel and its metadata: what is inside, and that it works in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

import edgepose
from edgepose.profiles import profile_names
from tests.fakes import spot_frame
from tests.tiny_network import spot_bundle

REPOSITORY = Path(__file__).resolve().parents[1]
CONSTRAINTS = REPOSITORY / "deploy" / "cpu" / "constraints.txt"

RUN_HALF = {"numpy", "msgspec", "opencv-python-headless", "pyyaml", "rich", "typer"}
BUILDERS = {"torch", "onnx", "onnxscript", "nncf", "torchao", "torch-pruning", "safetensors"}


def project() -> dict[str, object]:
    return dict(tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"])


def extras() -> dict[str, list[Requirement]]:
    table = project()["optional-dependencies"]
    assert isinstance(table, dict)
    return {name: [Requirement(text) for text in texts] for name, texts in table.items()}


def names(requirements: list[Requirement]) -> set[str]:
    return {requirement.name.lower() for requirement in requirements}


# Metadata


def test_run_half_depends_on_nothing_heavy() -> None:
    dependencies = project()["dependencies"]
    assert isinstance(dependencies, list)
    assert names([Requirement(text) for text in dependencies]) == RUN_HALF


def test_promised_extras_exist() -> None:
    assert set(extras()) >= {"ort", "openvino", "tensorrt", "tensorrt-rtx", "compile", "all", "dev"}


def test_one_runtime_brings_no_builder() -> None:
    for extra in ("ort", "openvino", "tensorrt", "tensorrt-rtx"):
        assert not names(extras()[extra]) & BUILDERS


def test_all_is_what_installs_without_a_gpu() -> None:
    (everything,) = extras()["all"]
    assert everything.extras == {"ort", "openvino", "compile"}


def test_torch_has_a_closed_upper_end() -> None:
    (torch,) = [requirement for requirement in extras()["compile"] if requirement.name == "torch"]
    assert "<" in str(torch.specifier)


def test_every_dependency_is_argued_for() -> None:
    text = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8")
    argued = {match.lower() for match in re.findall(r"^\| `([\w.-]+)`", text, re.MULTILINE)}
    declared = RUN_HALF | {name for requirements in extras().values() for name in names(requirements)} - {"edgepose"}
    assert declared - argued == set(), "docs/dependencies.md says nothing of these"
    assert argued - declared == set(), "docs/dependencies.md speaks of what is no dependency"


def test_changelog_has_a_place_for_the_next_version() -> None:
    assert "## [Unreleased]" in (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")


def test_licence_is_apache_2_in_full() -> None:
    text = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(REPOSITORY)]
    result = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (path,) = out.glob("edgepose-*.whl")
    return path


@pytest.fixture(scope="module")
def fresh(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interpreter of a new environment that holds the wheel with [ort] only, in the CPU image's versions."""
    folder = tmp_path_factory.mktemp("fresh")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(CONSTRAINTS), f"{wheel}[ort]"]
    result = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return python


def ask(python: Path, code: str, cwd: Path) -> str:
    """What `code` prints in the fresh environment, far from the checkout."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run([str(python), "-c", code], cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.slow
def test_wheel_carries_profiles_types_weights_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    for kind in ("recipes", "targets", "gates", "schemas"):
        for path in (REPOSITORY / "profiles" / kind).iterdir():
            assert f"edgepose/_profiles/{kind}/{path.name}" in inside
    for path in (REPOSITORY / "edgepose").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(REPOSITORY).as_posix() in inside
    assert any(name.endswith("licenses/LICENSE") for name in inside)
    assert not [name for name in inside if name.startswith(("tests/", "profiles/")) or "__pycache__" in name]


@pytest.mark.slow
def test_wheel_finds_profiles_by_name_outside_the_checkout(fresh: Path, tmp_path: Path) -> None:
    code = "from edgepose.profiles import *; print(*profile_names('recipes'), *profile_names('targets'))"
    assert ask(fresh, code, tmp_path).split() == [*profile_names("recipes"), *profile_names("targets")]
    assert str(REPOSITORY) not in ask(fresh, "from edgepose.profiles import *; print(profiles_root())", tmp_path)
    assert ask(fresh, "from edgepose.profiles import *; print(load_target('x86-cpu').weight_bits)", tmp_path) == "7"


@pytest.mark.slow
def test_wheel_has_the_version_of_the_package(fresh: Path, tmp_path: Path) -> None:
    code = "import edgepose, importlib.metadata as m; print(edgepose.__version__, m.version('edgepose'))"
    assert ask(fresh, code, tmp_path).split() == [edgepose.__version__] * 2


@pytest.mark.slow
def test_fresh_environment_has_one_runtime_and_no_builder(fresh: Path, tmp_path: Path) -> None:
    code = "import importlib.metadata as m; print(*sorted(d.metadata['Name'].lower() for d in m.distributions()))"
    installed = set(ask(fresh, code, tmp_path).split())
    assert "onnxruntime" in installed
    assert not installed & (BUILDERS | {"openvino"})


@pytest.mark.slow
def test_run_half_imports_in_the_fresh_environment(fresh: Path, tmp_path: Path) -> None:
    code = "import sys, edgepose; [getattr(edgepose, n) for n in edgepose.__all__]; print('torch' in sys.modules)"
    assert ask(fresh, code, tmp_path) == "False"


@pytest.mark.slow
def test_wheel_with_one_runtime_runs_a_bundle(fresh: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "frame.npy", spot_frame((60.0, 90.0), (200.0, 40.0)))
    bundle = spot_bundle(tmp_path)
    code = (
        "import sys, json, numpy as np, edgepose\n"
        f"with edgepose.PoseEstimator.from_bundle({str(bundle.root)!r}) as estimator:\n"
        "    poses = estimator(np.load('frame.npy'))\n"
        "print(json.dumps([poses.backend, poses.keypoints[0].tolist(), 'torch' in sys.modules, 'onnx' in sys.modules]))"
    )
    backend, (blue, red), torch, onnx = json.loads(ask(fresh, code, tmp_path))
    assert backend == "onnxruntime"
    assert (torch, onnx) == (False, False)
    assert np.allclose((blue, red), ((60, 90), (200, 40)), atol=12)  # a bin of the tiny network is that many pixels


@pytest.mark.slow
def test_editable_install_reads_the_checkout_and_keeps_no_copy(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(REPOSITORY)]
    result = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = ask(python, "import edgepose, sysconfig; print(edgepose.__file__, sysconfig.get_path('purelib'))", tmp_path)
    package, site = found.split()
    assert Path(package) == REPOSITORY / "edgepose" / "__init__.py"
    assert not (Path(site) / "edgepose").exists()
