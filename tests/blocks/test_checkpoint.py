"""Checkpoints: what comes back, what is refused, and what a failed write leaves."""

from __future__ import annotations

import hashlib
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import safetensors.torch
import torch
from torch import Tensor

from edgepose.blocks.card import Card, Lineage, paths_of, read_card
from edgepose.blocks.checkpoint import load_checkpoint, load_into, save_checkpoint
from edgepose.blocks.config import KPEConfig, spec_of
from edgepose.blocks.kpe import build
from edgepose.errors import CheckpointError, IntegrityError, StorageError
from edgepose.spec import Keypoints

TINY = KPEConfig("tiny", (32, 32), 4, (8, 8, 16, 24), (1, 1, 1, 1), 8)
THREE = Keypoints(("head", "left", "right"), flip_pairs=((1, 2),))


def card(config: KPEConfig = TINY) -> Card:
    lineage = Lineage("train", {"epochs": 3}, {"train": "d" * 64}, {"curve": [{"loss": 1.5}]})
    return Card(config.name, config, THREE, "", lineage=(lineage,), metrics={"dev": {"auc": 0.5}}, notes="for tests")


def weights(config: KPEConfig = TINY, seed: int = 0) -> dict[str, Tensor]:
    return build(config, THREE, seed=seed).state_dict()


def names_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip_in_fp32_is_exact(tmp_path: Path) -> None:
    state = weights()
    written = save_checkpoint(tmp_path / "deep" / "net", card(), state)
    found = load_checkpoint(tmp_path / "deep" / "net")
    assert names_below(tmp_path / "deep") == ["net.json", "net.safetensors"]
    assert found.card == written
    assert msgspec.structs.replace(found.card, weights_sha256="") == card()
    assert found.digest == written.weights_sha256
    assert found.digest == hashlib.sha256((tmp_path / "deep" / "net.safetensors").read_bytes()).hexdigest()
    assert found.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert found.tensors[name].dtype == tensor.dtype
        assert torch.equal(found.tensors[name], tensor)
    assert found.card.spec == spec_of(TINY, THREE)


def test_half_rounds_large_weights_only(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        "large": torch.randn(64, 64, generator=generator),
        "large conv": torch.randn(32, 16, 3, 3, generator=generator),
        "small": torch.randn(63, 65, generator=generator),  # one element less than 4096
        "scale": torch.rand(1, 64, 1, 1, generator=generator) * 1e-6,  # of a quantiser: FP16 would make it denormal
        "variance": torch.rand(5000, generator=generator) * 1e-5,
        "count": torch.tensor(123456789),
        "beyond FP16": torch.full((64, 64), 1e5),
    }
    save_checkpoint(tmp_path / "net", card(), state, storage="fp16")
    on_disk = safetensors.torch.load_file(tmp_path / "net.safetensors")
    assert {name for name, t in on_disk.items() if t.dtype == torch.float16} == {"large", "large conv"}
    found = load_checkpoint(tmp_path / "net").tensors
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        if name.startswith("large"):
            assert torch.equal(found[name], tensor.half().float())
        else:
            assert torch.equal(found[name], tensor)


def test_half_keeps_every_normalisation_statistic_of_a_network(tmp_path: Path) -> None:
    config = msgspec.structs.replace(TINY, widths=(8, 8, 64, 96))
    state = {n: t + 1e-4 if "running" in n else t for n, t in weights(config).items()}
    save_checkpoint(tmp_path / "net", card(config), state, storage="fp16")
    found = load_checkpoint(tmp_path / "net").tensors
    rounded = {name for name, t in state.items() if not torch.equal(found[name], t)}
    assert rounded
    assert all(state[name].ndim > 1 and state[name].numel() >= 4096 for name in rounded)


def test_int8_rounds_large_weights_to_half_a_step_of_their_channel(tmp_path: Path) -> None:
    state = {**weights(msgspec.structs.replace(TINY, widths=(8, 8, 64, 96))), "beyond": torch.full((64, 64), torch.inf)}
    save_checkpoint(tmp_path / "net", card(), state, storage="int8")
    save_checkpoint(tmp_path / "half", card(), state, storage="fp16")
    assert (tmp_path / "net.safetensors").stat().st_size < 0.75 * (tmp_path / "half.safetensors").stat().st_size
    found = load_checkpoint(tmp_path / "net").tensors
    assert found.keys() == state.keys()
    changed = 0
    for name, tensor in state.items():
        if torch.equal(found[name], tensor):
            continue
        changed += 1
        step = tensor.abs().amax(tuple(range(1, tensor.ndim)), keepdim=True) / 127
        assert tensor.ndim > 1
        assert tensor.numel() >= 4096
        assert bool(((found[name] - tensor).abs() <= 0.5001 * step).all())
    assert changed > 3


def test_memory_layout_and_shared_memory_do_not_matter(tmp_path: Path) -> None:
    shared = torch.arange(24.0).reshape(1, 2, 3, 4)
    state = {"a": shared, "b": shared, "c": shared.to(memory_format=torch.channels_last), "d": shared[:, :1]}
    save_checkpoint(tmp_path / "net", card(), state)
    found = load_checkpoint(tmp_path / "net").tensors
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["net", "net.json", "net.safetensors"])
def test_a_checkpoint_is_named_with_or_without_suffix(name: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / name, card(), weights())
    assert names_below(tmp_path) == ["net.json", "net.safetensors"]
    assert read_card(tmp_path / name).name == "tiny"


def test_other_dots_belong_to_the_name() -> None:
    assert paths_of("runs/v1.2") == (Path("runs/v1.2.safetensors"), Path("runs/v1.2.json"))


@pytest.mark.parametrize("share", [0.01, 0.5, 0.999])
def test_one_changed_byte_is_an_integrity_error(share: float, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "net", card(), weights())
    path = tmp_path / "net.safetensors"
    raw = bytearray(path.read_bytes())
    raw[int(share * len(raw))] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"net\.safetensors: found sha256 .*as its card says"):
        load_checkpoint(tmp_path / "net")


@pytest.mark.parametrize("missing", ["net.json", "net.safetensors"])
def test_both_files_are_needed(missing: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "net", card(), weights())
    (tmp_path / missing).unlink()
    with pytest.raises(CheckpointError, match=rf"{missing}: found no such file.*NAME\.json beside it"):
        load_checkpoint(tmp_path / "net")


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "net", card(), weights())
    description = tmp_path / "net.json"
    good = msgspec.json.decode(description.read_bytes())
    for change, fragment in [
        ({"surprise": 1}, "surprise"),
        ({"architecture": {**good["architecture"], "head": "magic"}}, "magic"),
        ({"keypoints": None}, "keypoints"),
        ({"schema": 2}, "schema: found 2, expected 1"),
    ]:
        description.write_bytes(msgspec.json.encode({**good, **change}))
        with pytest.raises(CheckpointError, match=fragment):
            read_card(tmp_path / "net")
    description.write_bytes(b"{half a ca")
    with pytest.raises(CheckpointError, match="card of an edgepose checkpoint"):
        read_card(tmp_path / "net")
    noise = b"no tensors at all"
    (tmp_path / "net.safetensors").write_bytes(noise)
    description.write_bytes(msgspec.json.encode({**good, "weights_sha256": hashlib.sha256(noise).hexdigest()}))
    with pytest.raises(CheckpointError, match="expected safetensors"):
        load_checkpoint(tmp_path / "net")


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"depths": (1, 2, 1, 1)}, "lacks 'backbone.stages.1.1"),
        ({"widths": (8, 8, 16, 32)}, "another shape of 'backbone.stages.3"),
        ({"head": "heatmap"}, "lacks 'block.head.hidden"),
    ],
)
def test_weights_of_another_architecture_change_nothing(
    changes: dict[str, object], fragment: str, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "net", card(), weights(seed=1))
    other = build(msgspec.structs.replace(TINY, **changes), THREE)
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=f"net.safetensors: found a checkpoint of another architecture.*{fragment}"
    ):
        load_into(other, load_checkpoint(tmp_path / "net"), "net.safetensors")
    assert all(torch.equal(t, before[name]) for name, t in other.state_dict().items())


def test_a_tensor_too_many_is_another_architecture(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "net", card(), weights() | {"stray": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="unknown tensor 'stray'"):
        load_into(build(TINY, THREE), load_checkpoint(tmp_path / "net"), "net")


def test_loaded_weights_compute_the_same(tmp_path: Path) -> None:
    original, other = build(TINY, THREE, seed=1).eval(), build(TINY, THREE, seed=2).eval()
    save_checkpoint(tmp_path / "net", card(), original.state_dict())
    load_into(other, load_checkpoint(tmp_path / "net"), "net")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(original(images), other(images), strict=True))


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """As on a disk that has room for so much and no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room_bytes", [100, 20_000])
def test_a_full_disk_leaves_the_older_checkpoint_whole(room_bytes: int, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "net", card(), weights(seed=1))
    with largest_file(room_bytes), pytest.raises(StorageError, match="net"):
        save_checkpoint(tmp_path / "net", card(), weights(seed=2))
    assert names_below(tmp_path) == ["net.json", "net.safetensors"]
    found = load_checkpoint(tmp_path / "net").tensors
    assert all(torch.equal(found[name], t) for name, t in weights(seed=1).items())
