"""No engine is given out that was not proven to come from here or from somebody trusted, or that is for elsewhere."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgepose.errors import BadInput, IntegrityError, MissingDependency, StorageError, UsageError
from edgepose.runtime.provenance import (
    EngineHost,
    ForeignEngine,
    Provenance,
    companions,
    current_platform,
    digest_of,
    mismatch,
    rebuild_command,
    sign_engine,
    trusted_plan,
    write_engine,
)

PLAN = b"native code" * 100
HERE = EngineHost(
    flavour="tensorrt",
    version="10.16.1.11",
    gpu="Orin (nvgpu)",
    compute_capabilities=("8.7",),
    driver="L4T 36.4.3",
    platform="linux-aarch64",
)


def provenance_of(plan: bytes, built: EngineHost = HERE, **fields: Any) -> Provenance:
    return Provenance(sha256=digest_of(plan), size_bytes=len(plan), built=built, **fields)


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of its own, without a key yet."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("EDGEPOSE_CACHE", str(cache))
    return cache


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    path = tmp_path / "engines" / "jetson" / "tensorrt" / "engine.plan"
    write_engine(path, PLAN, provenance_of(PLAN, target="jetson"))
    return path


def test_engine_built_here_is_given_out(engine: Path) -> None:
    plan, provenance = trusted_plan(engine, HERE)
    assert plan == PLAN
    assert (provenance.target, provenance.sha256) == ("jetson", hashlib.sha256(PLAN).hexdigest())


def test_key_is_for_this_user_alone(engine: Path, machine: Path) -> None:
    assert (machine / "keys").stat().st_mode & 0o777 == 0o700
    assert (machine / "keys" / "engines.key").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (machine / "keys").iterdir()] == ["engines.key"]


def test_key_is_made_once(engine: Path, tmp_path: Path, machine: Path) -> None:
    key = (machine / "keys" / "engines.key").read_bytes()
    write_engine(tmp_path / "second.plan", PLAN, provenance_of(PLAN))
    assert (machine / "keys" / "engines.key").read_bytes() == key
    trusted_plan(engine, HERE)


def test_processes_that_build_at_once_agree_on_a_key(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.plan" for number in range(8)]
    threads = [threading.Thread(target=write_engine, args=(path, PLAN, provenance_of(PLAN))) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(trusted_plan(path, HERE)[0] == PLAN for path in paths)


# Tampering


def flip(path: Path, at: int = -3) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def test_one_changed_bit_of_the_engine_is_noticed(engine: Path) -> None:
    flip(engine)
    with pytest.raises(IntegrityError, match=r"sha256 .* expected .*; edgepose build") as caught:
        trusted_plan(engine, HERE)
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("content", [b"", PLAN[:-1], PLAN + b"x"])
def test_engine_of_another_length_is_noticed(engine: Path, content: bytes) -> None:
    engine.write_bytes(content)
    with pytest.raises(IntegrityError, match=f"of {len(PLAN)} bytes"):
        trusted_plan(engine, HERE)


def test_other_engine_with_a_provenance_made_to_fit_has_no_seal_that_fits(engine: Path) -> None:
    evil = b"evil native code"
    engine.write_bytes(evil)
    companions(engine)[0].write_bytes(msgspec.json.encode(provenance_of(evil)))
    with pytest.raises(IntegrityError, match="a seal that fails: nothing proves that this machine built it"):
        trusted_plan(engine, HERE)


@pytest.mark.parametrize("seal", [b"", b"\n", b"0" * 64, b"\xff" * 64, b"short"])
def test_seal_that_is_wrong_or_missing_is_refused(engine: Path, seal: bytes) -> None:
    companions(engine)[1].write_bytes(seal)
    with pytest.raises(IntegrityError, match=r"seal.*not loaded on trust"):
        trusted_plan(engine, HERE)
    companions(engine)[1].unlink()
    with pytest.raises(IntegrityError, match="found no seal"):
        trusted_plan(engine, HERE)


def test_engine_of_another_machine_is_refused(engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "other"))
    with pytest.raises(IntegrityError, match="a seal, but no key of this machine"):
        trusted_plan(engine, HERE)
    assert not (tmp_path / "other").exists()  # looking makes no key
    write_engine(tmp_path / "own.plan", PLAN, provenance_of(PLAN))
    with pytest.raises(IntegrityError, match="a seal that fails"):
        trusted_plan(engine, HERE)


def test_key_that_others_can_read_is_no_key(engine: Path, machine: Path) -> None:
    key = machine / "keys" / "engines.key"
    key.chmod(0o640)
    with pytest.raises(IntegrityError, match="mode 0640, which lets others in"):
        trusted_plan(engine, HERE)
    key.chmod(0o600)
    key.parent.chmod(0o755)
    with pytest.raises(IntegrityError, match=r"keys: found mode 0755.*; remove"):
        trusted_plan(engine, HERE)
    with pytest.raises(IntegrityError, match="mode 0755"):
        write_engine(engine, PLAN, provenance_of(PLAN))


def test_key_that_is_a_link_or_broken_is_no_key(engine: Path, machine: Path, tmp_path: Path) -> None:
    key = machine / "keys" / "engines.key"
    (tmp_path / "elsewhere").write_bytes(key.read_bytes())
    (tmp_path / "elsewhere").chmod(0o600)
    key.unlink()
    key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match=r"engines\.key"):
        trusted_plan(engine, HERE)
    key.unlink()
    key.write_bytes(b"short")
    key.chmod(0o600)
    with pytest.raises(IntegrityError, match="5 bytes where 32 belong"):
        trusted_plan(engine, HERE)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "provenance"),
        (b"{}", "missing required field"),
        (b"\xff\xfe", "provenance"),
        (b'{"format": "something else"}', "something else"),
        (b" " * 70_000, "more than 65536 bytes"),
        (msgspec.json.encode({**msgspec.to_builtins(provenance_of(PLAN)), "surprise": 1}), "surprise"),
        (msgspec.json.encode({**msgspec.to_builtins(provenance_of(PLAN)), "sha256": "../.."}), "sha256"),
        (msgspec.json.encode({**msgspec.to_builtins(provenance_of(PLAN)), "schema_version": 2, "new": 1}), "update"),
    ],
)
def test_provenance_that_cannot_be_read_is_bad_input(engine: Path, raw: bytes, text: str) -> None:
    companions(engine)[0].write_bytes(raw)
    with pytest.raises(BadInput, match=text) as caught:
        trusted_plan(engine, HERE)
    assert caught.value.exit_code == 2


def test_missing_files_are_named(engine: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no such file"):
        trusted_plan(tmp_path / "nowhere.plan", HERE)
    engine.unlink()
    with pytest.raises(BadInput, match="No such file"):
        trusted_plan(engine, HERE)
    engine.write_bytes(PLAN)
    companions(engine)[0].unlink()
    with pytest.raises(BadInput, match=r"engine\.plan\.json: No such file"):
        trusted_plan(engine, HERE)


# Writing


def test_provenance_of_another_engine_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the provenance of another engine"):
        write_engine(tmp_path / "engine.plan", b"this", provenance_of(b"that"))
    assert not (tmp_path / "engine.plan").exists()


def test_rewritten_engine_loses_the_signature_of_the_old_one(engine: Path) -> None:
    companions(engine)[2].write_bytes(b"of the old one")
    write_engine(engine, b"new" * 9, provenance_of(b"new" * 9))
    assert not companions(engine)[2].exists()
    assert trusted_plan(engine, HERE)[0] == b"new" * 9


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_cache_that_cannot_be_written_is_said(tmp_path: Path, machine: Path) -> None:
    machine.mkdir()
    machine.chmod(0o500)
    with pytest.raises(StorageError):
        write_engine(tmp_path / "engine.plan", PLAN, provenance_of(PLAN))


def test_interrupted_writing_leaves_nothing_that_is_trusted(engine: Path) -> None:
    """The engine is written before its provenance: whatever lies there in between is refused."""
    engine.write_bytes(b"half of the next engine")
    with pytest.raises(IntegrityError):
        trusted_plan(engine, HERE)


# Another machine's


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"version": "10.3.0"}, "TensorRT: found tensorrt 10.3.0, expected tensorrt 10.16.1.11"),
        ({"flavour": "tensorrt-rtx"}, "TensorRT: found tensorrt-rtx 10.16"),
        ({"gpu": "NVIDIA L4"}, "GPU: found NVIDIA L4, expected Orin"),
        ({"gpu": ""}, "GPU: found none"),
        ({"compute_capabilities": ("8.9",)}, "compute capability: found 8.9, expected 8.7"),
        ({"driver": "580.95.05"}, "driver: found 580.95.05, expected L4T 36.4.3"),
        ({"platform": "linux-x86_64"}, "operating system: found linux-x86_64"),
    ],
)
def test_engine_for_elsewhere_names_the_field_and_the_command(engine: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(ForeignEngine) as caught:
        trusted_plan(engine, msgspec.structs.replace(HERE, **change))
    assert field in str(caught.value)
    assert "edgepose build BUNDLE --target jetson --out REBUILT.bundle" in str(caught.value)
    assert caught.value.exit_code == 8


def test_command_names_the_bundle_that_the_engine_lies_in(engine: Path) -> None:
    bundle = engine.parents[3]
    (bundle / "manifest.json").write_text("{}")
    assert rebuild_command(engine, "jetson") == f"edgepose build {bundle} --target jetson --out REBUILT.bundle"
    assert "BUNDLE --target TARGET" in rebuild_command(Path("engine.plan"), "")


ORIN = provenance_of(PLAN)
AHEAD = provenance_of(
    PLAN, EngineHost("tensorrt-rtx", "1.7.1.116", "", ("7.5", "8.6", "8.9"), "", ""), hardware="none"
)  # compiled without a GPU: GPU, driver and system are open
DESKTOP = EngineHost("tensorrt-rtx", "1.7.1.116", "RTX 4090", ("8.9",), "580.95", "linux-x86_64")


@pytest.mark.parametrize(
    ("provenance", "here", "field"),
    [
        (ORIN, HERE, None),
        (AHEAD, DESKTOP, None),
        (AHEAD, msgspec.structs.replace(DESKTOP, compute_capabilities=("12.0",)), "compute capability"),
        (AHEAD, msgspec.structs.replace(DESKTOP, version="1.8.0.1"), "TensorRT"),
        (msgspec.structs.replace(ORIN, hardware="ampere-plus"),
         msgspec.structs.replace(HERE, gpu="other", compute_capabilities=("12.0",)), None),
        (msgspec.structs.replace(ORIN, hardware="ampere-plus"),
         msgspec.structs.replace(HERE, gpu="other", compute_capabilities=("7.5",)), "compute capability"),
        (msgspec.structs.replace(ORIN, hardware="same-compute-capability"),
         msgspec.structs.replace(HERE, gpu="other"), None),
        (msgspec.structs.replace(ORIN, hardware="same-compute-capability"),
         msgspec.structs.replace(HERE, gpu="other", compute_capabilities=("8.6",)), "compute capability"),
        (msgspec.structs.replace(ORIN, version_compatible=True),
         msgspec.structs.replace(HERE, version="11.4.0.1"), None),
        (msgspec.structs.replace(ORIN, version_compatible=True), msgspec.structs.replace(HERE, version="10.3.0"),
         "TensorRT"),
        (msgspec.structs.replace(ORIN, version_compatible=True),
         msgspec.structs.replace(HERE, flavour="tensorrt-rtx", version="99.0"), "TensorRT"),
        (ORIN, msgspec.structs.replace(HERE, compute_capabilities=("8.6",), driver="1"), "compute capability"),
    ],
)  # fmt: skip
def test_what_an_engine_is_tied_to(provenance: Provenance, here: EngineHost, field: str | None) -> None:
    found = mismatch(provenance, here)
    assert (found and found[0]) == field


def test_platform_names_system_and_instruction_set() -> None:
    assert current_platform().startswith(f"{sys.platform}-")


# Signatures


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A key pair: private, public."""
    pytest.importorskip("cryptography", reason="edgepose[signing] is not installed: signatures are not tested")
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    folder = tmp_path_factory.mktemp("keys")
    key = Ed25519PrivateKey.generate()
    pem = serialization.Encoding.PEM
    (folder / "private.pem").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    (folder / "public.pem").write_bytes(public)
    return folder / "private.pem", folder / "public.pem"


@pytest.fixture
def elsewhere(engine: Path, keys: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A signed engine on another machine."""
    sign_engine(engine, keys[0])
    monkeypatch.setenv("EDGEPOSE_CACHE", str(tmp_path / "other machine"))
    return engine


def test_signed_engine_runs_where_the_key_is_trusted(elsewhere: Path, keys: tuple[Path, Path]) -> None:
    assert trusted_plan(elsewhere, HERE, [keys[1]])[0] == PLAN
    with pytest.raises(IntegrityError, match="no key of this machine"):
        trusted_plan(elsewhere, HERE)  # nobody said whom to trust


@pytest.mark.parametrize("part", [0, 1, 2], ids=["engine", "provenance", "signature"])
def test_change_to_a_signed_engine_is_noticed(elsewhere: Path, keys: tuple[Path, Path], part: int) -> None:
    described, _, signature = companions(elsewhere)
    flip((elsewhere, described, signature)[part])
    with pytest.raises((IntegrityError, BadInput)):
        trusted_plan(elsewhere, HERE, [keys[1]])


def test_signature_of_somebody_else_is_refused_even_where_the_machine_sealed(
    engine: Path, keys: tuple[Path, Path]
) -> None:
    companions(engine)[2].write_bytes(b"\0" * 64)
    with pytest.raises(IntegrityError, match="a signature by none of the 1 trusted keys"):
        trusted_plan(engine, HERE, [keys[1]])


def test_seal_and_signature_are_not_each_other(engine: Path, keys: tuple[Path, Path]) -> None:
    _, seal, signature = companions(engine)
    signature.write_bytes(seal.read_bytes())
    with pytest.raises(IntegrityError):
        trusted_plan(engine, HERE, [keys[1]])


def test_trusted_key_does_not_shut_out_what_this_machine_built(engine: Path, keys: tuple[Path, Path]) -> None:
    assert trusted_plan(engine, HERE, [keys[1]])[0] == PLAN


def test_only_what_is_proven_is_signed(engine: Path, keys: tuple[Path, Path]) -> None:
    flip(engine)
    with pytest.raises(IntegrityError):
        sign_engine(engine, keys[0])
    assert not companions(engine)[2].exists()


def test_what_is_no_key_is_refused(elsewhere: Path, keys: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "text.pem").write_text("not a key")
    for key in (tmp_path / "text.pem", tmp_path / "nowhere.pem", keys[0]):
        with pytest.raises(UsageError, match="Ed25519PublicKey"):
            trusted_plan(elsewhere, HERE, [key])


def test_key_made_by_openssl_is_understood(engine: Path, tmp_path: Path) -> None:
    pytest.importorskip("cryptography", reason="edgepose[signing] is not installed: signatures are not tested")
    private, public, rsa = (tmp_path / name for name in ("private.pem", "public.pem", "rsa.pem"))
    try:
        subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", private], check=True)
        subprocess.run(["openssl", "pkey", "-in", private, "-pubout", "-out", public], check=True)
        subprocess.run(["openssl", "genpkey", "-algorithm", "x25519", "-out", rsa], check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        pytest.skip(f"openssl cannot make keys here: {err}")
    sign_engine(engine, private)
    assert trusted_plan(engine, HERE, [public])[0] == PLAN
    with pytest.raises(UsageError, match="X25519PrivateKey, expected an Ed25519PrivateKey"):
        sign_engine(engine, rsa)


def test_missing_cryptography_names_the_extra(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    companions(engine)[2].write_bytes(b"\0" * 64)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    monkeypatch.setitem(sys.modules, "cryptography.exceptions", None)
    with pytest.raises(MissingDependency, match=r"edgepose\[signing\]"):
        trusted_plan(engine, HERE, [Path("public.pem")])
