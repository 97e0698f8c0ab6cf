"""The zoo: finding networks by name or path, and the promises of the committed ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors

from edgepose.blocks import zoo
from edgepose.blocks.card import read_card
from edgepose.blocks.checkpoint import load_checkpoint
from edgepose.errors import CheckpointError


@pytest.fixture
def small_zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("kpe-s", "kpe-t", "kpe-s.qat-int8"):
        (tmp_path / f"{name}.json").write_text("{}")
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    (tmp_path / "half.json").write_text("{}")  # no weights beside it
    monkeypatch.setattr(zoo, "_FOLDER", tmp_path)
    return tmp_path


def test_networks_are_found_by_name(small_zoo: Path) -> None:
    assert zoo.zoo_names() == ("kpe-s", "kpe-s.qat-int8", "kpe-t")
    assert zoo.find_checkpoint("kpe-t") == small_zoo / "kpe-t"
    assert zoo.find_checkpoint("kpe-s.qat-int8") == small_zoo / "kpe-s.qat-int8"


@pytest.mark.parametrize("text", ["./kpe-t", "runs/kpe-t", "kpe-t.safetensors", "runs/kpe-t.json", "/abs/v1.2"])
def test_text_with_a_slash_or_suffix_is_a_path(text: str, small_zoo: Path) -> None:
    expected = text.removesuffix(".safetensors").removesuffix(".json")
    assert zoo.find_checkpoint(text) == Path(expected)


def test_a_misspelt_name_is_answered(small_zoo: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'kpe_s'.*one of kpe-s, .*did you mean 'kpe-s'\?"):
        zoo.find_checkpoint("kpe_s")
    with pytest.raises(CheckpointError, match=r"write \./NAME"):
        zoo.find_checkpoint("zzzzzz")


def test_committed_networks_are_whole_small_and_described() -> None:
    folder = Path(zoo.__file__).parent
    for weights in folder.glob("*.safetensors"):
        assert weights.stat().st_size <= 16e6
        assert weights.stem in zoo.zoo_names(), "weights without a card"
    for name in zoo.zoo_names():
        checkpoint = load_checkpoint(zoo.find_checkpoint(name))
        card = checkpoint.card
        assert card == read_card(zoo.find_checkpoint(name))
        assert card.lineage
        assert card.lineage[0].stage in ("train", "render")
        assert card.notes, f"{name} does not say what it was trained on"
        with safetensors.safe_open(folder / f"{name}.safetensors", "pt") as stored:
            whole = {name for name in stored.keys() if not name.endswith("::step")}  # noqa: SIM118 - no mapping
        assert whole == checkpoint.tensors.keys()
