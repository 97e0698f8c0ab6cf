"""Finding profile files: the recipes, targets and gate rules that come with edgepose, and the user's own.

Invariant: text that contains a slash or ends in .yaml or .yml is always a path; all other text is always the name of a
profile that comes with edgepose. Nothing depends on what happens to lie in the working directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

from edgepose.errors import RecipeError
from edgepose.spec import Target
from edgepose.strict_yaml import did_you_mean, read_yaml

T = TypeVar("T")

Kind = Literal["recipes", "targets", "gates"]

_NOUNS: dict[Kind, str] = {"recipes": "recipe", "targets": "target", "gates": "gate rules"}


def profiles_root() -> Path:
    """The folder of the profiles that come with edgepose: inside an installed wheel, or at the top of the checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "_profiles"
    return installed if installed.is_dir() else package.parent / "profiles"


def profile_names(kind: Kind) -> tuple[str, ...]:
    """Names of the profiles that come with edgepose, sorted."""
    return tuple(sorted(path.stem for path in (profiles_root() / kind).glob("*.yaml")))


def find_profile(kind: Kind, name_or_path: str) -> Path:
    """Path of a profile's file.

    Text with a slash or ending in .yaml or .yml is a path; anything else names a profile that comes with edgepose.

    Raises:
        RecipeError: There is no such file, or no profile of that name.
    """
    if "/" in name_or_path or name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise RecipeError(
                str(path), found=found, expected=f"a {_NOUNS[kind]} file", fix=f"check the path{_or_one_of(kind)}"
            )
        return path
    path = profiles_root() / kind / f"{name_or_path}.yaml"
    if name_or_path not in profile_names(kind):
        raise RecipeError(
            f"{_NOUNS[kind]} {name_or_path!r}",
            found="no profile of that name",
            expected=f"one of {', '.join(profile_names(kind))}, or a path that ends in .yaml",
            fix=did_you_mean(name_or_path, profile_names(kind)) or "choose one of these",
        )
    return path


def load_profile(kind: Kind, name_or_path: str, struct: type[T]) -> T:
    """The profile called `name_or_path` (see find_profile) as an instance of `struct`.

    Raises:
        RecipeError: It cannot be found or does not decode.
    """
    return read_yaml(find_profile(kind, name_or_path), struct)


def load_target(name_or_path: str) -> Target:
    """The target called `name_or_path` (see find_profile).

    Raises:
        RecipeError: It cannot be found or does not decode.
    """
    return load_profile("targets", name_or_path, Target)


def _or_one_of(kind: Kind) -> str:
    names = profile_names(kind)
    return f", or name one of {', '.join(names)}" if names else ""
