"""Trained networks that come with edgepose: NAME.safetensors with its card NAME.json, found by name.

Invariant: weights are FP16 on disk, or int8 where a network is kept for comparison only, and go back to random weights:
the lineage in the card names every run in between.
"""

from __future__ import annotations

from pathlib import Path

from edgepose.errors import CheckpointError
from edgepose.strict_yaml import did_you_mean

_FOLDER = Path(__file__).resolve().parent


def zoo_names() -> tuple[str, ...]:
    """Names of the zoo's checkpoints, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json") if path.with_suffix(".safetensors").exists()))


def find_checkpoint(name_or_path: str) -> Path:
    """Path of a checkpoint, without suffix: text with a slash or ending in .safetensors is a path, all else a zoo name.

    Raises:
        CheckpointError: No network of that name.
    """
    if "/" in name_or_path or name_or_path.endswith((".safetensors", ".json")):
        path = Path(name_or_path)
        return path.with_suffix("") if path.suffix in (".safetensors", ".json") else path
    if name_or_path not in zoo_names():
        raise CheckpointError(
            f"network {name_or_path!r}",
            found="no network of that name in the zoo",
            expected=f"one of {', '.join(zoo_names()) or '(none committed)'}, or the path of a checkpoint",
            fix=did_you_mean(name_or_path, zoo_names()) or "write ./NAME for a file in this folder",
        )
    return _FOLDER / name_or_path
