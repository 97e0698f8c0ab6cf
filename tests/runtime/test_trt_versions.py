"""Everything of TensorRT that the code touches, held against the recorded interface of every supported version."""

from __future__ import annotations

import ast
import json
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from edgepose.errors import BackendUnavailable
from edgepose.runtime.trt_versions import CONDITIONAL, FLAVOURS, OLDEST, Flavour, TrtApi, import_trt
from tests.conftest import GOLDENS, REPOSITORY

RECORDED = json.loads((GOLDENS / "tensorrt_api.json").read_text(encoding="utf-8"))
VERSIONS: list[str] = RECORDED["versions"]
TABLE = "edgepose/runtime/trt_versions.py"

OBJECTS = {
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "runtime_config": "IRuntimeConfig",
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "builder_config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "timing_cache": "ITimingCache",
    "inspector": "EngineInspector",
    "layer": "ILayer",
    "tensor": "ITensor",
    "onnx_error": "ParserError",
    "refitter": "Refitter",
    "parser_refitter": "OnnxParserRefitter",
}
"""What these names stand for in every module that touches TensorRT."""


def names_of(version: str) -> set[str]:
    column = VERSIONS.index(version)
    return {name for name, row in RECORDED["names"].items() if row[column] == "1"}


def api_of(version: str) -> TrtApi:
    flavour, _, number = version.partition(" ")
    assert flavour in FLAVOURS
    return TrtApi(types.ModuleType("none"), flavour, number)


@dataclass(frozen=True)
class Touch:
    """One use of TensorRT's interface; `guards` are the conditional names that the same function asks for."""

    name: str
    where: str
    guards: frozenset[str]


def modules_touching_tensorrt() -> list[Path]:
    found = []
    for path in sorted((REPOSITORY / "edgepose").rglob("*.py")):
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and node.module == "edgepose.runtime.trt_versions"
            for alias in node.names
        }
        if imported & {"TrtApi", "import_trt"}:
            found.append(path)
    return found


def asked_names(scope: ast.AST) -> Iterator[str]:
    for node in ast.walk(scope):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("has", "require", "value")
            and node.args
            and isinstance(node.args[0], ast.Constant)
            and isinstance(node.args[0].value, str)
        ):
            yield node.args[0].value


def owner_of(node: ast.expr) -> str:
    """The last part of what an attribute is taken from, underscores before it left out: self._context → context."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.lstrip("_")


def attributes(text: str) -> list[Touch]:
    """Every attribute of TensorRT in a module's source."""
    tree = ast.parse(text)
    scopes: dict[ast.AST, ast.AST] = {}
    for scope in ast.walk(tree):  # outer ones come first, so the innermost function wins
        if isinstance(scope, (ast.Module, ast.FunctionDef)):
            scopes.update(dict.fromkeys(ast.walk(scope), scope))
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        owner = owner_of(node.value)
        if owner in OBJECTS:
            name = f"{OBJECTS[owner]}.{node.attr}"
        elif owner == "trt":
            name = node.attr
        elif isinstance(node.value, ast.Attribute) and owner_of(node.value.value) == "trt":
            name = f"{node.value.attr}.{node.attr}"
        else:
            continue
        found.append(Touch(name, f"line {node.lineno}", frozenset(asked_names(scopes[node]))))
    return found


def faults(text: str, versions: list[str] = VERSIONS) -> list[str]:
    """What a module's source does wrong: touches what some version lacks, unguarded, or asks for unknown names."""
    found = [f"{name} is not in CONDITIONAL" for name in asked_names(ast.parse(text)) if name not in CONDITIONAL]
    for touch in attributes(text):
        if touch.name.rpartition(".")[2].startswith("__"):
            continue
        lacking = [version for version in versions if touch.name not in names_of(version)]
        if lacking and not (touch.name in CONDITIONAL and touch.name in touch.guards):
            found.append(f"{touch.where}: {touch.name} is not in {', '.join(lacking)}")
    return found


def test_runtime_and_builder_are_among_the_modules_that_touch_tensorrt() -> None:
    names = [str(path.relative_to(REPOSITORY)) for path in modules_touching_tensorrt()]
    assert {"edgepose/runtime/tensorrt.py", "edgepose/export/tensorrt.py"} <= set(names)
    assert TABLE not in names


@pytest.mark.parametrize("path", modules_touching_tensorrt(), ids=lambda path: path.stem)
def test_every_attribute_touched_is_in_every_recorded_version_or_guarded(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not faults(text)


def test_walk_sees_what_the_runtime_does() -> None:
    """The walk itself: were it to see nothing, the test above could not fail."""
    text = (REPOSITORY / "edgepose" / "runtime" / "tensorrt.py").read_text(encoding="utf-8")
    assert {
        *("Runtime", "Runtime.deserialize_cuda_engine", "ICudaEngine.create_execution_context"),
        *("IExecutionContext.execute_async_v3", "IExecutionContext.set_tensor_address", "TensorIOMode.INPUT"),
    } <= {touch.name for touch in attributes(text)}


def test_walk_sees_what_the_builder_does() -> None:
    text = (REPOSITORY / "edgepose" / "export" / "tensorrt.py").read_text(encoding="utf-8")
    assert {
        *("Builder", "Builder.build_serialized_network", "OnnxParser.parse_from_file", "ParserError.node_name"),
        *("IBuilderConfig.set_flag", "IBuilderConfig.can_run_on_DLA", "IBuilderConfig.set_compute_capability"),
        *("BuilderFlag.STRIP_PLAN", "INetworkDefinition.get_layer", "ILayer.type", "IOptimizationProfile.set_shape"),
        *("ITimingCache.serialize", "EngineInspector.get_engine_information", "IProgressMonitor"),
    } <= {touch.name for touch in attributes(text)}


def test_compute_capabilities_are_those_of_the_table() -> None:
    """They are looked up by a table of their own, which the walk does not see through."""
    from edgepose.export.tensorrt import CAPABILITIES

    compiled = {name for name in CONDITIONAL if name.startswith("ComputeCapability.SM")}
    assert set(CAPABILITIES.values()) == compiled


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("trt.BuilderFlag.FP16", "line 1: BuilderFlag.FP16 is not in tensorrt 11.0.0.114, tensorrt 11.4.0.106, tensor"),
        ("trt.BuilderFlag.FP61", "BuilderFlag.FP61 is not in tensorrt 10.3.0"),
        ("self._context.execute_async_v4(0)", "IExecutionContext.execute_async_v4 is not in"),
        ("self.loaded.engine.device_memory_size", "ICudaEngine.device_memory_size is not in tensorrt 11.0.0.114"),
        ("context.is_stream_capturable(1)", "IExecutionContext.is_stream_capturable is not in tensorrt 10.3.0"),
        ("def f():\n  api.has('IExecutionContext.is_stream_capturable')\ndef g():\n  context.is_stream_capturable(1)",
         "line 4: IExecutionContext.is_stream_capturable"),
        ("api.value('BuilderFlag.FP32')", "BuilderFlag.FP32 is not in CONDITIONAL"),
    ],
)  # fmt: skip
def test_walk_finds_what_is_wrong(text: str, fault: str) -> None:
    assert fault in " / ".join(faults(text))


def test_guarded_and_common_attributes_pass() -> None:
    guarded = "def f():\n  if api.has('IExecutionContext.is_stream_capturable'):\n    context.is_stream_capturable(1)"
    assert not faults(guarded)
    assert not faults("trt.BuilderFlag.TF32\nbuilder_config.max_aux_streams = 0\nother.FP16")


@pytest.mark.parametrize("path", modules_touching_tensorrt(), ids=lambda path: path.stem)
def test_nobody_asks_an_object_whether_it_has_an_attribute(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    asked = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"))
        or (isinstance(node, ast.ExceptHandler) and node.type is not None and "AttributeError" in ast.dump(node.type))
    ]
    assert not asked


# The table itself


@pytest.mark.parametrize("version", VERSIONS)
def test_table_says_what_is_recorded(version: str) -> None:
    names, api = names_of(version), api_of(version)
    wrong = [name for name in CONDITIONAL if api.has(name) != (name in names)]
    assert not wrong


def test_what_every_version_has_does_not_belong_into_the_table() -> None:
    everywhere = set.intersection(*map(names_of, VERSIONS))
    assert not everywhere & set(CONDITIONAL)


def test_recorded_versions_are_those_that_are_promised() -> None:
    numbers = [version.partition(" ")[2].split(".")[:2] for version in VERSIONS]
    assert numbers == [["10", "3"], ["10", "7"], ["10", "13"], ["10", "16"], ["11", "0"], ["11", "4"], ["1", "7"]]


@pytest.mark.parametrize(
    ("flavour", "version", "name", "there"),
    [
        ("tensorrt", "10.9.0", "BuilderFlag.EDITABLE_TIMING_CACHE", False),  # first seen in 10.13
        ("tensorrt", "10.20.1", "BuilderFlag.EDITABLE_TIMING_CACHE", True),
        ("tensorrt", "10.20.1", "BuilderFlag.FP16", True),
        ("tensorrt", "12.0", "BuilderFlag.FP16", False),
        ("tensorrt-rtx", "1.8", "ComputeCapability.SM89", True),
        ("tensorrt", "11.4", "ComputeCapability.SM89", False),
    ],
)
def test_versions_between_the_recorded_ones(flavour: Flavour, version: str, name: str, there: bool) -> None:
    assert TrtApi(types.ModuleType("none"), flavour, version).has(name) is there


def test_what_a_version_lacks_is_said_with_where_it_exists() -> None:
    api = api_of("tensorrt 11.4.0.106")
    with pytest.raises(
        BackendUnavailable, match=r"has no BuilderFlag.FP16, expected tensorrt from 10\.3 and before 11"
    ):
        api.require("BuilderFlag.FP16")
    with pytest.raises(BackendUnavailable, match="expected tensorrt-rtx"):
        api.value("ComputeCapability.SM89")
    with pytest.raises(KeyError):
        api.has("BuilderFlag.FP32")


def test_value_reaches_into_the_module() -> None:
    module = types.ModuleType("tensorrt")
    module.BuilderFlag = types.SimpleNamespace(STRICT_NANS="here")  # type: ignore[attr-defined]
    assert TrtApi(module, "tensorrt", "10.7.0").value("BuilderFlag.STRICT_NANS") == "here"


@pytest.mark.parametrize(("version", "fault"), [("8.6.1", "10.3 or newer"), ("dev", "numbers with dots")])
def test_version_that_is_not_supported_is_refused(monkeypatch: pytest.MonkeyPatch, version: str, fault: str) -> None:
    module = types.ModuleType("tensorrt")
    module.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    with pytest.raises(BackendUnavailable, match=fault):
        import_trt("tensorrt")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_is_installed_here_is_as_recorded(flavour: Flavour) -> None:
    """Where a recorded version is installed, the recording is held against it."""
    module = pytest.importorskip(flavour.replace("-", "_"), reason=f"{flavour} is not installed", exc_type=ImportError)
    name = f"{flavour} {module.__version__}"
    if name not in VERSIONS:
        pytest.skip(f"{name} is not recorded; the oldest supported is {OLDEST[flavour]}")

    def exists(dotted: str) -> bool:
        found: object = module
        for part in dotted.split("."):
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True

    recorded = names_of(name)
    assert [n for n in RECORDED["names"] if exists(n) != (n in recorded)] == []
