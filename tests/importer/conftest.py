"""Files of networks in the style of others, exported once per run, and a cache of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import foreign
from edgepose.importer.bundle import ImportRequest, import_model
from edgepose.importer.spec import parse_spec
from edgepose.stages.assemble import CompileResult
from tests.tiny_checkpoint import Watch

STYLES = {name: (style.network, style.spec, style.outputs, style.hw) for name, style in foreign.STYLES.items()}
Exported = Callable[..., Path]


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A function from style, opset, batch and listing to a file."""
    folder = tmp_path_factory.mktemp("foreign")

    def export(style: str, opset: int = 17, *, batch: int = 0, listed: bool = False) -> Path:
        network, _, outputs, hw = STYLES[style]
        path = folder / f"{style}-{opset}-{batch}-{listed}.onnx"
        if not path.exists():
            foreign.export(network(), path, opset=opset, hw=hw, outputs=outputs, batch=batch, listed=listed)
        return path

    return export


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def imported(exported: Exported, tmp_path: Path) -> Callable[..., CompileResult]:
    """A function that imports one of the styles."""

    def run(
        style: str,
        opset: int = 17,
        *,
        batch: int = 0,
        listed: bool = False,
        targets: tuple[str, ...] = ("this-cpu",),
    ) -> CompileResult:
        model = exported(style, opset, batch=batch, listed=listed)
        request = ImportRequest(model, parse_spec(STYLES[style][1]), targets, tmp_path / f"{style}.bundle")
        return import_model(request, Watch())

    return run
