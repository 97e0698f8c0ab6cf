"""Rules of the code base that no other tool checks: layers, cycles, bare imports, budgets, naming, private text."""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "edgepose"

BUILD_HALF = (
    "blocks", "cli", "compiler", "compress", "export", "importer", "pytest_plugin", "rebuild", "recipe", "schemas",
    "stages", "training", "__main__",
)  # fmt: skip
"""Parts of edgepose that may load anything; all other modules belong to the run half, except data beyond data.coco."""

LEAVES = {
    "edgepose.pose.coco_map": "faster_coco_eval",
    "edgepose.profiler.history.change_points": "ruptures",
    "edgepose.runtime.openvino": "openvino",
    "edgepose.runtime.ort": "onnxruntime",
    "edgepose.runtime.tensorrt": "tensorrt",
}
"""Modules of the run half that load one library more than the rest; each is imported by its dispatcher only."""

RUN_HALF_LIBRARIES = {"numpy", "msgspec", "cv2", "yaml", "typing_extensions"}  # the last by msgspec, where it is there

HEAVY_LIBRARIES = (
    "faster_coco_eval", "nncf", "onnx", "onnxruntime", "onnxscript", "openvino", "pycocotools", "pycuda", "rich",
    "ruptures", "safetensors", "scipy", "sklearn", "tensorrt", "tensorrt_rtx", "torch", "torch_pruning", "torchao",
    "typer",
)  # fmt: skip


def module_files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.stat().st_size)


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def run_half() -> list[str]:
    names = []
    for name in map(module_name, module_files()):
        part = name.split(".")[1] if "." in name else ""
        if part in BUILD_HALF or (
            part == "data" and name not in ("edgepose.data", "edgepose.data.coco", "edgepose.data.corrupt")
        ):
            continue
        names.append(name)
    return names


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([argument for argument in arguments if argument.arg not in ("self", "cls")])


# Layers


def test_import_contracts_hold() -> None:
    tool = Path(sys.executable).parent / "lint-imports"
    result = subprocess.run(
        [str(tool), "--no-logo", "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_modules_do_not_import_in_a_circle() -> None:
    grimp = pytest.importorskip("grimp")
    graph = grimp.build_graph("edgepose", cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    imports["edgepose"] = set()  # it re-exports lazily: see its __getattr__
    sorter = graphlib.TopologicalSorter(imports)
    try:
        sorter.prepare()
    except graphlib.CycleError as err:
        pytest.fail(f"import cycle: {' → '.join(err.args[1])}")


# Bare imports, in fresh processes

_BARE_IMPORT = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ImportError(f"bare environment: {{name}} is not installed")

sys.meta_path.insert(0, Refuse())
before = set(sys.modules)
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ImportError as err:
        sys.exit(f"{{name}}: {{err}}")
tops = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(top for top in tops if top not in sys.stdlib_module_names and getattr(sys.modules.get(top), "__file__", None)))
"""  # noqa: E501


def libraries_loaded_by(names: list[str], allowed: tuple[str, ...] = ()) -> set[str]:
    """Third-party top-level packages that importing `names` loads in a process that has none of the heavy ones."""
    heavy = tuple(library for library in HEAVY_LIBRARIES if library not in allowed)
    code = _BARE_IMPORT.format(heavy=heavy, names=names)
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return set(result.stdout.split()) - {"edgepose"}


def test_run_half_imports_in_a_bare_environment() -> None:
    names = [name for name in run_half() if name not in LEAVES]
    assert "edgepose.spec" in names
    assert libraries_loaded_by(names) <= RUN_HALF_LIBRARIES


def test_importing_edgepose_costs_numpy_and_msgspec_only() -> None:
    assert libraries_loaded_by(["edgepose"]) <= {"numpy", "msgspec"}


def test_leaves_of_the_run_half_exist() -> None:
    assert set(LEAVES) <= set(map(module_name, module_files()))


@pytest.mark.parametrize(("leaf", "library"), LEAVES.items())
def test_leaf_loads_its_own_library_and_no_other(leaf: str, library: str) -> None:
    tree = ast.parse((REPOSITORY / Path(*leaf.split("."))).with_suffix(".py").read_text(encoding="utf-8"))
    imported = {
        alias.name.partition(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    } | {
        (node.module or "").partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert imported & set(HEAVY_LIBRARIES) <= {library, *(("tensorrt_rtx",) if library == "tensorrt" else ())}


# Budgets and naming


@pytest.mark.parametrize("path", module_files(), ids=module_name)
def test_module_stays_within_its_budget(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600, "holds two ideas: split it"
    for node in functions(ast.parse(text)):
        assert length(node) <= 80, f"{node.name} has {length(node)} lines"
        if "cli" not in path.parts:  # there, every parameter is a flag
            assert parameters(node) <= 6, f"{node.name} has {parameters(node)} parameters: make a config type"


def test_typical_lengths_stay_low() -> None:
    lines = [path.read_text(encoding="utf-8").count("\n") for path in module_files()]
    spans = [length(node) for path in module_files() for node in functions(ast.parse(path.read_text(encoding="utf-8")))]
    assert statistics.quantiles(lines, n=10)[-1] <= 450
    assert statistics.quantiles(spans, n=10)[-1] <= 40


@pytest.mark.parametrize("path", module_files(), ids=module_name)
def test_module_opens_with_what_it_holds_and_an_invariant(path: Path) -> None:
    opening = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert opening, "no docstring"
    if path.name not in ("__init__.py", "__main__.py"):
        assert "Invariant" in opening


@pytest.mark.parametrize("path", module_files(), ids=module_name)
def test_nothing_is_called_utils_or_manager(path: Path) -> None:
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
    classes = [
        node.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and re.search(r"(Manager|Helper|Handler|Utils)$", node.name)
    ]
    assert not classes


# Private text

# Character classes of one letter keep the pattern from matching itself.
_PRIVATE = re.compile(
    r"/w[o]rk/|/r[o]ot/|/home/[a-z]|/Users/[A-Za-z]|/opt/(p[y]pi|w[h]eels)|\.r-[s]eed-|"
    r"\b(10|192\.168|172\.16)(\.\d{1,3}){2,3}:\d+|(https?|ssh|git)://[\w.-]*(a[r]tifactory|n[e]xus|d[e]vpi)"
)


def tracked_files() -> list[Path]:
    git = shutil.which("git")
    if git is None or not (REPOSITORY / ".git").exists():
        pytest.skip("not a git checkout: tracked files cannot be listed")
    result = subprocess.run([git, "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return [REPOSITORY / name for name in result.stdout.split("\0") if name and (REPOSITORY / name).is_file()]


def test_no_machine_paths_or_hosts_in_tracked_files() -> None:
    found = []
    for path in tracked_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            text = path.read_bytes().decode("latin-1")  # paths hide in binary files too
        found += [f"{path.relative_to(REPOSITORY)}: {match.group()}" for match in _PRIVATE.finditer(text)]
    assert not found


@pytest.mark.parametrize(
    "parts", [("see /wo", "rk/main/x"), ("/ro", "ot/.venv"), ("/ho", "me/ann/x"), ("http://10.0.0", ".7:8080/simple")]
)
def test_private_text_would_be_noticed(parts: tuple[str, str]) -> None:
    assert _PRIVATE.search("".join(parts))


def test_tracked_files_stay_small() -> None:
    big = [str(path) for path in tracked_files() if path.stat().st_size > 16 * 2**20]
    assert not big
