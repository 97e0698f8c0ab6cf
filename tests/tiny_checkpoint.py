"""A network that compiles in seconds: trained for an epoch on rendered people, compiled by each recipe at most once.

Invariant: what the fixtures give is shared by the whole run; a test that spoils something takes a copy.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from edgepose.blocks.config import KPEConfig
from edgepose.compiler import CompileRequest, CompileResult, compile_bundle
from edgepose.recipe import QuantisationAware, Recipe, load_recipe
from edgepose.stages.cache import StageResult

CONFIG = KPEConfig("tiny", (64, 64), 32, (32, 32, 64, 64), (1, 1, 1, 1), 32)
_PEOPLE = {"train": 36, "val": 6}


@dataclass(frozen=True)
class Tiny:
    """A trained checkpoint, the people it was trained on, and a cache for what is made of it."""

    checkpoint: Path
    data: Path
    cache: Path


@dataclass
class Watch:
    """An observer that remembers, and stops where it is told to."""

    stop_at: str = ""
    begun: list[str] = field(default_factory=list)
    stages: list[StageResult] = field(default_factory=list)

    def started(self, stage: str) -> None:
        self.begun.append(stage)
        if stage == self.stop_at:
            raise KeyboardInterrupt

    def finished(self, stage: StageResult) -> None:
        self.stages.append(stage)

    def building(self, what: str, done: int, total: int) -> None: ...
    def cutting(self, done: int, total: int) -> None: ...
    def step(self, done: int, total: int, loss: float) -> None: ...
    def epoch(self, row: dict[str, float]) -> None: ...
    def timed(self, what: str, done: int, total: int) -> None: ...

    @property
    def ran(self) -> list[str]:
        return [stage.stage for stage in self.stages if not stage.reused]

    @property
    def reused(self) -> list[str]:
        return [stage.stage for stage in self.stages if stage.reused]


def quick(name: str) -> Recipe:
    """A recipe that comes with edgepose, with one epoch wherever it has several."""
    recipe = load_recipe(name)
    if recipe.prune is not None:
        recipe = msgspec.structs.replace(recipe, prune=msgspec.structs.replace(recipe.prune, epochs=1))
    if isinstance(recipe.quantise, QuantisationAware):
        recipe = msgspec.structs.replace(recipe, quantise=msgspec.structs.replace(recipe.quantise, epochs=1))
    return recipe


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    """Environment variables for a while, also outside of a test."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """The checkpoint and its people."""
    import torch

    from edgepose.blocks.card import Card, Lineage
    from edgepose.blocks.checkpoint import save_checkpoint
    from edgepose.blocks.config import spec_of
    from edgepose.blocks.kpe import build
    from edgepose.data.coco import dataset
    from edgepose.data.render import RenderConfig, write_coco
    from edgepose.data.splits import split_train
    from edgepose.training.config import TrainConfig
    from edgepose.training.loop import RunOptions, fit

    folder = tmp_path_factory.mktemp("tiny")
    for seed, (split, count) in enumerate(_PEOPLE.items()):
        write_coco(folder / "people", split, count, seed, RenderConfig(size_hw=(96, 96)))
    people = split_train(dataset(folder / "people", "train"))
    config = TrainConfig(epochs=1, batch_size=16, bf16=False)
    torch.set_num_threads(1)
    network = build(CONFIG, people[0].keypoints, seed=0)
    result = fit(network, spec_of(CONFIG, people[0].keypoints), people, config, options=RunOptions(workers=0))
    report = {"curve": list(result.curve), "best_epoch": result.best_epoch}
    inputs = {"train": people[0].digest, "dev": people[1].digest}
    lineage = Lineage("train", msgspec.to_builtins(config), inputs, report)
    save_checkpoint(folder / "tiny", Card("tiny", CONFIG, people[0].keypoints, "", (lineage,)), network.state_dict())
    return Tiny(folder / "tiny", folder / "people", folder / "cache")


Compiled = Callable[[str], CompileResult]


@pytest.fixture(scope="session")
def compiled(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """`compiled(recipe)`: the tiny network compiled by a recipe that comes with edgepose; compiled once."""
    results: dict[str, CompileResult] = {}
    folder = tmp_path_factory.mktemp("compiled")

    def compile_once(name: str) -> CompileResult:
        if name not in results:
            request = CompileRequest(quick(name), f"{tiny.checkpoint}", tiny.data, folder / f"{name}.bundle")
            with environment(EDGEPOSE_CACHE=str(tiny.cache)):
                results[name] = compile_bundle(request, Watch())
        return results[name]

    return compile_once


def subprocess_environment(cache: Path) -> Mapping[str, str]:
    """This process's environment with another cache."""
    return {**os.environ, "EDGEPOSE_CACHE": str(cache)}
