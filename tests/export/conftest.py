"""Exporting takes seconds, so the networks are exported once."""

from __future__ import annotations

import pytest

from edgepose.compress.quantise import QuantiseConfig
from tests.export.networks import Exported, export


@pytest.fixture(scope="package")
def simcc(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """What the zoo's networks are made of, unsigned ranges."""
    return export(tmp_path_factory.mktemp("simcc"), ("residual", "pyramid"), "simcc", QuantiseConfig())


@pytest.fixture(scope="package")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Everything else, unsigned ranges, heat map."""
    blocks = ("inverted", "concat", "pools", "gate")
    return export(tmp_path_factory.mktemp("mixed"), blocks, "heatmap", QuantiseConfig())


@pytest.fixture(scope="package")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Ranges that TensorRT takes."""
    blocks = ("residual", "inverted", "concat")
    return export(tmp_path_factory.mktemp("signed"), blocks, "simcc", QuantiseConfig(symmetric=True, protected=("y",)))
