"""Profiles by name and by path, and the facts that the shipped targets state."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgepose.errors import RecipeError
from edgepose.profiles import find_profile, load_target, profile_names, profiles_root
from edgepose.spec import Target

TARGETS = (
    *("jetson-agx-orin", "jetson-orin-nano", "jetson-orin-nx", "jetson-thor", "l4", "rtx-30", "rtx-40", "rtx-50"),
    *("rtx-desktop", "t4", "this-cpu", "x86-cpu"),
)
CAPABILITIES = {"jetson-thor": "11.0", "l4": "8.9", "rtx-30": "8.6", "rtx-40": "8.9", "rtx-50": "12.0", "t4": "7.5"}


def test_all_promised_targets_come_along() -> None:
    assert set(TARGETS) <= set(profile_names("targets"))


@pytest.mark.parametrize("name", profile_names("targets"))
def test_shipped_target_reads_and_is_named_like_its_file(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.description.endswith(".")
    assert target.backends
    assert "int8" in target.precisions


@pytest.mark.parametrize("kind", ["recipes", "targets"])
def test_shipped_profiles_point_editors_to_an_existing_schema(kind: str) -> None:
    for path in (profiles_root() / kind).glob("*.yaml"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        prefix, _, schema = first.partition("$schema=")
        assert prefix == "# yaml-language-server: ", path
        assert (path.parent / schema).is_file(), path


def test_gpu_targets_state_their_compute_capability_and_cpu_targets_none() -> None:
    for name in profile_names("targets"):
        target = load_target(name)
        on_gpu = any(backend.startswith("tensorrt") for backend in target.backends)
        assert bool(target.compute_capability) == on_gpu
        if name.startswith("jetson") and "orin" in name:
            assert target.compute_capability == "8.7"
        if name in CAPABILITIES:
            assert target.compute_capability == CAPABILITIES[name]


def test_generic_x86_target_is_safe_without_vnni() -> None:
    assert load_target("x86-cpu").weight_bits == 7


def test_misspelt_target_is_answered_with_the_names() -> None:
    with pytest.raises(RecipeError, match=r"jetson-orin-nano.*did you mean 'jetson-orin-nano'") as caught:
        find_profile("targets", "jetson-orin-nanoo")
    assert caught.value.exit_code == 2


def test_name_is_never_looked_up_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("name: mine\n")
    (tmp_path / "this-cpu").write_text("nonsense")
    monkeypatch.chdir(tmp_path)
    assert load_target("this-cpu").name == "this-cpu"
    with pytest.raises(RecipeError, match="no profile of that name"):
        find_profile("targets", "mine")


def test_path_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = msgspec.structs.replace(load_target("this-cpu"), name="mine")
    (tmp_path / "mine.yaml").write_bytes(msgspec.json.encode(mine))
    monkeypatch.chdir(tmp_path)
    for text in ("mine.yaml", "./mine.yaml", str(tmp_path / "mine.yaml")):
        assert load_target(text) == mine


@pytest.mark.parametrize("text", ["absent.yaml", "./absent", "../targets/this-cpu", ""])
def test_what_is_not_there_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError):
        find_profile("targets", text)


def test_folder_is_not_taken_for_a_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="found a folder"):
        find_profile("targets", f"{tmp_path}/")


def test_every_field_of_a_target_is_written_down_in_a_shipped_one() -> None:
    used = set()
    for name in profile_names("targets"):
        defaults = {field.name: field.default for field in msgspec.structs.fields(Target)}
        target = load_target(name)
        used |= {field for field, default in defaults.items() if getattr(target, field) != default}
    assert used >= set(Target.__struct_fields__) - {"threads"}
