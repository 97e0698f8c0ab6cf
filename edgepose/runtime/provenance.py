"""Where an engine file comes from, written beside it, and whether it may be loaded here.

    engine.plan         the engine, as the builder wrote it
    engine.plan.json    `Provenance`: sha256 of the engine, what it was built with and for
    engine.plan.seal    HMAC-SHA256 over the JSON with a key of the machine (and user) that built it
    engine.plan.sig     Ed25519 signature of the JSON, by whoever ships engines (optional)

Invariant: an engine is native code, so `trusted_plan` gives its bytes only after they were proven to be what this
machine built or what somebody trusted signed; the bytes that were checked are the bytes that are handed on. That an
engine is whole and safe is never concluded from the engine itself.

The key lies in the cache directory of this user, in a directory of mode 0700 and a file of mode 0600; lost with the
cache, every engine has to be built again. It keeps out engines that came from elsewhere, not somebody who already runs
code as the same user.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import platform
import secrets
import stat
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edgepose.errors import BadInput, IntegrityError, MissingDependency, UsageError
from edgepose.host import cache_directory
from edgepose.runtime.trt_versions import Flavour
from edgepose.storage import atomic_write, json_bytes, storage_faults_at

SCHEMA_VERSION = 1
STRIPPED_WEIGHTS = "weights.onnx"
"""The ONNX file beside an engine without weights; they are put back from it when the engine is loaded."""
_KEY_BYTES = 32
_MAX_JSON_BYTES = 1 << 16
_SEALED = b"edgepose engine seal 1\0"
_SIGNED = b"edgepose engine signature 1\0"
"""What is sealed and signed starts with its purpose, so that neither can be taken for anything else."""


class EngineHost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine is tied to. A field that is empty is not compared: the engine does not depend on it.

    Attributes:
        flavour: TensorRT or TensorRT-RTX.
        version: Its full version ("10.16.1.11").
        gpu: Name of the GPU; empty for an engine that was compiled without one.
        compute_capabilities: Those the engine runs on ("8.9"); of a machine, the one of its GPU.
        driver: Version of the NVIDIA driver, or of L4T on a Jetson.
        platform: Operating system and instruction set ("linux-aarch64").
    """

    flavour: Flavour
    version: str
    gpu: str
    compute_capabilities: tuple[str, ...]
    driver: str
    platform: str


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that is known about an engine file.

    Attributes:
        format: Tells this from other JSON.
        schema_version: Raised whenever an older edgepose could misread it.
        sha256: Of the engine.
        size_bytes: Of the engine.
        built: What it was built with and for.
        hardware: Which other GPUs it runs on, slower: none, any from Ampere on, or any of its compute capability.
        version_compatible: Whether newer versions of TensorRT load it, too.
        dla: Whether layers of it run on a DLA core.
        stripped: Whether its weights lie beside it (`STRIPPED_WEIGHTS`), in the ONNX file of `source`.
        source: Sha256 of the ONNX file it was built from.
        target: Name of the target it was built for.
    """

    format: Literal["edgepose-engine"] = "edgepose-engine"
    schema_version: int = SCHEMA_VERSION
    sha256: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    size_bytes: Annotated[int, msgspec.Meta(ge=1)]
    built: EngineHost
    hardware: Literal["none", "ampere-plus", "same-compute-capability"] = "none"
    version_compatible: bool = False
    dla: bool = False
    stripped: bool = False
    source: str = ""
    target: str = ""


class _Header(msgspec.Struct):
    """The part that every version has."""

    format: Literal["edgepose-engine"]
    schema_version: int


class ForeignEngine(IntegrityError):
    """An engine for another machine: other TensorRT, GPU, driver or system. What else the bundle has may still run."""


def current_platform() -> str:
    """Operating system and instruction set: "linux-aarch64"."""
    return f"{sys.platform}-{platform.machine()}"


def digest_of(plan: bytes | memoryview) -> str:
    """Sha256 of an engine, as in `Provenance`."""
    return hashlib.sha256(plan).hexdigest()


def companions(engine: Path) -> tuple[Path, Path, Path]:
    """Paths of the provenance, the seal and the signature of an engine file; the last two may not exist."""
    return tuple(engine.with_name(engine.name + end) for end in (".json", ".seal", ".sig"))  # type: ignore[return-value]


def write_engine(engine: Path, plan: bytes | memoryview, provenance: Provenance) -> None:
    """Writes an engine that was built here, with its provenance and the seal of this machine.

    Args:
        engine: Where it goes.
        plan: What the builder gave.
        provenance: Its digest and size must be those of `plan`.

    Raises:
        UsageError: They are not.
        StorageError: Disk full, read-only or no permission.
        IntegrityError: The key of this machine can be read or changed by others.
    """
    if (provenance.sha256, provenance.size_bytes) != (digest_of(plan), len(plan)):
        raise UsageError(str(engine), found="the provenance of another engine", expected="digest and size of this one")
    key = _made_key()
    raw = json_bytes(provenance)
    described, seal, signature = companions(engine)
    for stale in (seal, signature):  # of the engine that lay here before
        stale.unlink(missing_ok=True)
    atomic_write(engine, bytes(plan))
    atomic_write(described, raw)
    atomic_write(seal, _seal_of(key, raw).encode() + b"\n")


def sign_engine(engine: Path, private_key: Path) -> Path:
    """Signs an engine for machines that trust the key: the signature's path.

    Args:
        engine: An engine with its provenance, built or verified on this machine.
        private_key: Ed25519, PEM (`openssl genpkey -algorithm ed25519`).

    Raises:
        IntegrityError: The engine is not what its provenance says, or is not from this machine.
        UsageError: `private_key` is no such key.
        MissingDependency: The package cryptography is not installed.
    """
    raw, provenance = _read(engine)
    _check_seal(engine, raw)
    _checked_plan(engine, provenance)
    key = _ed25519("Ed25519PrivateKey", private_key)
    signature = companions(engine)[2]
    atomic_write(signature, key.sign(_SIGNED + raw))
    return signature


def trusted_plan(engine: Path, here: EngineHost, trusted_keys: Sequence[Path] = ()) -> tuple[bytes, Provenance]:
    """The bytes of an engine that may be loaded here, and where they come from.

    Args:
        engine: The engine file; its companions lie beside it.
        here: This machine.
        trusted_keys: Public keys (Ed25519, PEM) whose signatures are accepted instead of this machine's own seal.

    Raises:
        BadInput: The engine is missing, or has no provenance that can be read.
        ForeignEngine: It is for another machine; names the field and the command that builds it anew.
        IntegrityError: It is not proven to come from here, or was changed since.
        MissingDependency: There is a signature to check, and the package cryptography is not installed.
    """
    raw, provenance = _read(engine)
    _check_host(engine, provenance, here)
    _check_origin(engine, raw, trusted_keys)
    return _checked_plan(engine, provenance), provenance


def mismatch(provenance: Provenance, here: EngineHost) -> tuple[str, str, str] | None:
    """The first field in which this machine is not what the engine is for: its name, what is here, what the engine is for.

    TensorRT comes first, as an engine of another version is the most common case, then GPU, compute capability, driver
    and system.
    """  # noqa: E501
    built = provenance.built
    pairs = [("TensorRT", f"{here.flavour} {here.version}", f"{built.flavour} {built.version}")]
    if built.flavour == here.flavour and provenance.version_compatible and _newer(here.version, built.version):
        pairs = []
    if provenance.hardware == "none":
        pairs.append(("GPU", here.gpu, built.gpu))
    pairs += [
        ("compute capability", ", ".join(here.compute_capabilities), _capabilities(provenance, here)),
        ("driver", here.driver, built.driver),
        ("operating system", here.platform, built.platform),
    ]
    return next((pair for pair in pairs if pair[2] and pair[1] != pair[2]), None)


def _capabilities(provenance: Provenance, here: EngineHost) -> str:
    """What the engine runs on; this machine's own capability where that is among it."""
    built, own = provenance.built.compute_capabilities, here.compute_capabilities
    if set(own) <= set(built):
        return ", ".join(own)
    if provenance.hardware == "ampere-plus":
        return ", ".join(own) if own and all(_numbers(one) >= (8, 0) for one in own) else "8.0 or newer"
    return " or ".join(built)


def _newer(version: str, than: str) -> bool:
    return _numbers(version) >= _numbers(than)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("."))


def _read(engine: Path) -> tuple[bytes, Provenance]:
    """The bytes of the JSON, which are what is sealed and signed, and what they say."""
    described = companions(engine)[0]
    fix = "build the engine here: edgepose build"
    try:
        raw = _read_limited(described, _MAX_JSON_BYTES)
    except OSError as err:
        what = f"{described.name}: {err.strerror or err}" if engine.is_file() else "no such file"
        raise BadInput(f"engine {engine}", found=what, expected="an engine and its provenance", fix=fix) from err
    try:
        version = msgspec.json.decode(raw, type=_Header).schema_version
        if version > SCHEMA_VERSION:
            fix = "update edgepose: pip install --upgrade edgepose"
            found, expected = f"schema version {version}", f"at most {SCHEMA_VERSION}"
            raise BadInput(f"engine {described}", found=found, expected=expected, fix=fix)
        provenance = msgspec.json.decode(raw, type=Provenance)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BadInput(f"engine {described}", found=str(err), expected="an engine's provenance", fix=fix) from err
    return raw, provenance


def _read_limited(path: Path, limit_bytes: int) -> bytes:
    with path.open("rb") as file:
        raw = file.read(limit_bytes + 1)
    if len(raw) > limit_bytes:
        raise BadInput(str(path), found=f"more than {limit_bytes} bytes", expected="a small file")
    return raw


def _check_host(engine: Path, provenance: Provenance, here: EngineHost) -> None:
    if (fault := mismatch(provenance, here)) is not None:
        field, found, expected = fault
        fix = f"build it anew on this machine: {rebuild_command(engine, provenance.target)}"
        raise ForeignEngine(f"engine {engine}: {field}", found=found or "none", expected=expected, fix=fix)


def rebuild_command(engine: Path, target: str) -> str:
    """The command that builds an engine anew; BUNDLE and TARGET stand for what the path does not tell."""
    bundle = next((str(folder) for folder in engine.parents if (folder / "manifest.json").is_file()), "BUNDLE")
    return f"edgepose build {bundle} --target {target or 'TARGET'} --out REBUILT.bundle"


def _check_origin(engine: Path, raw: bytes, trusted_keys: Sequence[Path]) -> None:
    """Passes what a trusted key signed; else what this machine sealed."""
    signature = companions(engine)[2]
    if trusted_keys and signature.is_file():
        if _is_signed(raw, _read_limited(signature, 4096), trusted_keys):
            return
        found = f"a signature by none of the {len(trusted_keys)} trusted keys"
        raise IntegrityError(f"engine {engine}", found=found, fix="get the engine again from who made it")
    _check_seal(engine, raw)


def _check_seal(engine: Path, raw: bytes) -> None:
    seal = companions(engine)[1]
    key = _host_key()
    try:
        stored = _read_limited(seal, 4096).strip()
    except OSError:
        stored = b""
    if key is None or not hmac.compare_digest(stored, _seal_of(key, raw).encode()):
        found = (
            "no seal" if not stored else "a seal, but no key of this machine" if key is None else "a seal that fails"
        )
        raise IntegrityError(
            f"engine {engine}",
            found=f"{found}: nothing proves that this machine built it",
            expected="an engine built here, or one signed by a trusted key",
            fix=f"engines are native code and are not loaded on trust; {rebuild_command(engine, '')}",
        )


def _checked_plan(engine: Path, provenance: Provenance) -> bytes:
    try:
        with engine.open("rb") as file:
            plan = file.read(provenance.size_bytes + 1)
    except OSError as err:
        fix = "build the engine again"
        raise BadInput(f"engine {engine}", found=err.strerror or str(err), expected="a readable file", fix=fix) from err
    if len(plan) != provenance.size_bytes or digest_of(plan) != provenance.sha256:
        found = f"sha256 {digest_of(plan)[:12]}… of {len(plan)} bytes"
        expected = f"{provenance.sha256[:12]}… of {provenance.size_bytes} bytes"
        raise IntegrityError(f"engine {engine}", found=found, expected=expected, fix=rebuild_command(engine, ""))
    return plan


# The key of this machine


def _seal_of(key: bytes, raw: bytes) -> str:
    return hmac.new(key, _SEALED + raw, hashlib.sha256).hexdigest()


def _key_file() -> Path:
    return cache_directory() / "keys" / "engines.key"


def _made_key() -> bytes:
    """The secret of this machine and user, made where there is none yet."""
    file = _key_file()
    with storage_faults_at(file):
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.path.lexists(file):
            _make_key(file)
    key = _host_key()
    if key is None:
        raise _unsafe(file, "that it went away while it was made")
    return key


def _host_key() -> bytes | None:
    """The secret of this machine and user; None where there is none yet.

    Raises:
        IntegrityError: Others could read it, or put another in its place.
    """
    file = _key_file()
    try:
        _check_private(file.parent, file.parent.lstat())
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as err:  # a link is ELOOP
        raise _unsafe(file, err.strerror or str(err)) from err
    with os.fdopen(descriptor, "rb") as opened:
        _check_private(file, os.fstat(opened.fileno()))
        key = opened.read(_KEY_BYTES + 1)
    if len(key) != _KEY_BYTES:
        raise _unsafe(file, f"{len(key)} bytes where {_KEY_BYTES} belong")
    return key


def _make_key(file: Path) -> None:
    """Makes the key, unless another process is faster: nobody ever sees half of one."""
    temporary = file.with_name(f".{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(secrets.token_bytes(_KEY_BYTES))
            opened.flush()
            os.fsync(opened.fileno())
        with suppress(FileExistsError):
            os.link(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _check_private(path: Path, status: os.stat_result) -> None:
    kind = stat.S_IMODE(status.st_mode)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
        raise _unsafe(path, "a link or a special file")
    if status.st_uid != os.geteuid():
        raise _unsafe(path, f"a file of user {status.st_uid}")
    if kind & 0o077:
        raise _unsafe(path, f"mode {kind:04o}, which lets others in")


def _unsafe(path: Path, found: str) -> IntegrityError:
    expected = "the key of this machine, readable by this user alone"
    fix = f"remove {path} and build the engines of this machine again"
    return IntegrityError(f"engine key {path}", found=found, expected=expected, fix=fix)


# Signatures


def _is_signed(raw: bytes, signature: bytes, trusted_keys: Sequence[Path]) -> bool:
    keys = [_ed25519("Ed25519PublicKey", path) for path in trusted_keys]
    from cryptography.exceptions import InvalidSignature

    for key in keys:
        with suppress(InvalidSignature):
            key.verify(signature, _SIGNED + raw)
            return True
    return False


def _ed25519(kind: Literal["Ed25519PrivateKey", "Ed25519PublicKey"], path: Path) -> Any:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519
    except ImportError as err:
        raise MissingDependency("cryptography", extra="signing", needed_for="signatures of engines") from err
    try:
        raw = _read_limited(path, _MAX_JSON_BYTES)
        key: Any = (
            serialization.load_pem_private_key(raw, password=None)
            if kind == "Ed25519PrivateKey"
            else serialization.load_pem_public_key(raw)
        )
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as err:  # TypeError: it has a passphrase
        raise UsageError(f"key {path}", found=str(err), expected=f"an {kind} in a PEM file") from err
    wanted = ed25519.Ed25519PrivateKey if kind == "Ed25519PrivateKey" else ed25519.Ed25519PublicKey
    if not isinstance(key, wanted):
        raise UsageError(f"key {path}", found=f"an {type(key).__name__}", expected=f"an {kind}")
    return key
