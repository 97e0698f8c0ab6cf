"""The bundle: one directory that holds a compiled network, its engines and the proof of where they came from.

    NAME.bundle/
      manifest.json     what is in it (`Manifest`), with the sha256 of every other file
      manifest.sha256   sha256 of manifest.json: the bundle's digest
      model.onnx        the network the engines were built from
      engines/<target>/<backend>/…
      golden/           inputs.npy, outputs.npz, keypoints.npy: what the network answers to known inputs

Invariant: a bundle is never changed after it is written; whatever differs from the manifest is an `IntegrityError`, and
no engine reaches a runtime before its hashes were checked. Nothing in it is ever unpickled.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NoReturn
from zipfile import BadZipFile

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgepose import __version__
from edgepose.errors import BadInput, IntegrityError, SpecError
from edgepose.spec import Backend, Dialect, Engine, Execution, ModelSpec, Precision
from edgepose.storage import atomic_directory, json_bytes

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
MODEL = "model.onnx"
Content = bytes | Path
"""What goes into a file of a bundle: the bytes themselves, or the file to copy them from."""


class Golden(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the golden vectors lie, and how far an engine may stray from them.

    Attributes:
        inputs: (N, 3, h, w) float32, normalised, or (N, h, w, 3) uint8 where the network takes images; .npy.
        outputs: One array per network output, by name, .npz.
        keypoints: (N, K, 2) float32, pixels of the input crop, .npy.
        tolerances: Engine path → name of an output → largest absolute difference allowed; "keypoints_px" → largest
            median shift of the keypoints.
    """

    inputs: str
    outputs: str
    keypoints: str
    tolerances: dict[str, dict[str, float]]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All that is known about a bundle.

    Attributes:
        format: Tells an edgepose manifest from other JSON.
        schema_version: Raised whenever an older edgepose could misread the manifest.
        edgepose_version: Version that wrote it.
        name: Name of the bundle, for people.
        spec: What the network eats and says.
        model: The ONNX file.
        engines: In order of preference.
        chain: Digests from data to engine: "dataset", "checkpoint", "plan" where there were any, then "onnx" and
            "engine:<path>" for each engine.
        reports: Stage → what it reported.
        golden: Golden vectors, if it has any.
        files: Every file but the manifest and its digest → sha256.
    """

    format: Literal["edgepose-bundle"] = "edgepose-bundle"
    schema_version: int = SCHEMA_VERSION
    edgepose_version: str
    name: str
    spec: ModelSpec
    model: str
    engines: tuple[Engine, ...]
    chain: dict[str, str]
    reports: dict[str, Any]
    golden: Golden | None
    files: dict[str, str]


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk, manifest checked.

    Attributes:
        root: Its directory.
        manifest: What is in it.
        digest: Sha256 of the manifest's bytes, and so of everything in the bundle.
    """

    root: Path
    manifest: Manifest
    digest: str


@dataclass(frozen=True, slots=True)
class EngineDraft:
    """An engine to put into a bundle; the fields are those of `Engine`.

    Attributes:
        files: File name → content; they land in engines/<target>/<backend>/.
        main: Which of the files the runtime is handed.
        tolerances: Largest absolute difference from the golden vectors by output name; largest median shift for
            "keypoints_px".
    """

    target: str
    backend: Backend
    precision: Precision
    dialect: Dialect
    files: Mapping[str, Content]
    main: str
    builder: str
    threads: int = 0
    execution: Execution = field(default_factory=Execution)
    tolerances: Mapping[str, float] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"engines/{self.target}/{self.backend}"

    @property
    def path(self) -> str:
        return f"{self.folder}/{self.main}"


@dataclass(frozen=True, slots=True)
class GoldenDraft:
    """Golden vectors to put into a bundle; shapes as in `Golden`."""

    inputs: NDArray[Any]
    outputs: Mapping[str, NDArray[np.floating]]
    keypoints: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BundleDraft:
    """What `write_bundle` makes a bundle of.

    Attributes:
        name: Name for people.
        spec: What the network eats and says.
        onnx: The network.
        engines: In order of preference.
        chain: Digests of what came before the ONNX file: "dataset", "checkpoint", "plan".
        reports: Stage → anything that JSON can hold.
        golden: Golden vectors.
    """

    name: str
    spec: ModelSpec
    onnx: Content
    engines: tuple[EngineDraft, ...]
    chain: Mapping[str, str]
    reports: Mapping[str, Any]
    golden: GoldenDraft | None = None


def write_bundle(out: str | os.PathLike[str], draft: BundleDraft, *, replace: bool = False) -> Bundle:
    """Writes a bundle, whole or not at all.

    Args:
        out: Its directory; must not exist yet.
        draft: What goes into it.
        replace: Whether a bundle that is there already may be replaced; anything else never is.

    Raises:
        UsageError: `out` is taken.
        StorageError: Disk full, read-only or no permission.
        SpecError: The draft contradicts itself.
    """
    with atomic_directory(out, replaceable=is_pristine if replace else None) as root:
        _put(root, MODEL, draft.onnx)
        for engine in draft.engines:
            for name, content in engine.files.items():
                _put(root, f"{engine.folder}/{name}", content)
            if engine.main not in engine.files:
                found = f"engine {engine.path}, which is not one of its files"
                raise SpecError("bundle draft", found=found, expected=f"one of {sorted(engine.files)}")
        if draft.golden is not None:
            _put_golden(root / "golden", draft.golden)
        manifest = json_bytes(_manifest(root, draft))
        (root / MANIFEST).write_bytes(manifest)
        (root / DIGEST).write_text(f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST}\n", encoding="ascii")
        read_bundle(root)  # what cannot be read back must not be left behind
    return read_bundle(out)


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Reads and checks the manifest; the other files are checked when they are used, or by `verify_bundle`.

    Raises:
        BadInput: `path` is no bundle, or one that this version cannot read.
        IntegrityError: The manifest was changed, or points outside the bundle.
    """
    root = Path(path)
    raw = _read_manifest(root)
    digest = hashlib.sha256(raw).hexdigest()
    _check_digest_file(root, digest)
    manifest = _decode(root, raw)
    _check_names(root, manifest)
    return Bundle(root, manifest, digest)


def verify_bundle(path: str | os.PathLike[str]) -> Bundle:
    """Checks every byte of a bundle against its manifest.

    Raises:
        BadInput: `path` is no bundle, or one that this version cannot read.
        IntegrityError: A file was changed, is missing or was added; names the first and counts the others.
    """
    bundle = read_bundle(path)
    faults = []
    for name in bundle.manifest.files:
        try:
            check_file(bundle, name)
        except IntegrityError as err:
            faults.append(err)
    listed = {*bundle.manifest.files, MANIFEST, DIGEST}
    faults += [
        _fault(bundle.root, name, found="a file that the manifest does not list", expected="none")
        for name in sorted(set(_files_below(bundle.root)) - listed)
    ]
    links = _chain_from(bundle.manifest.files, bundle.manifest.engines)
    faults += [
        _fault(bundle.root, MANIFEST, found=f"a chain whose link {name!r} is not that of the files", expected=digest)
        for name, digest in links.items()
        if bundle.manifest.chain.get(name) != digest
    ]
    if faults:
        first = faults[0]
        more = f" (and {len(faults) - 1} more faults)" if len(faults) > 1 else ""
        raise IntegrityError(first.where, found=first.found + more, expected=first.expected, fix=first.fix) from first
    return bundle


def check_file(bundle: Bundle, name: str) -> Path:
    """The path of one file of the bundle, after its hash was checked.

    Raises:
        IntegrityError: It is missing or was changed.
    """
    path = bundle.root / name
    if not path.resolve().is_relative_to(bundle.root.resolve()):
        raise _fault(bundle.root, name, found=f"a link to {path.resolve()}", expected="a file inside the bundle")
    try:
        actual = _sha256(path)
    except OSError as err:
        raise _fault(bundle.root, name, found=err.strerror or str(err), expected="a readable file") from err
    expected = bundle.manifest.files[name]
    if actual != expected:
        raise _fault(bundle.root, name, found=f"sha256 {actual[:12]}…", expected=f"{expected[:12]}…")
    return path


def check_engine(bundle: Bundle, engine: Engine) -> Path:
    """The path of the file to hand to the runtime, after the hashes of all the engine's files were checked.

    Raises:
        IntegrityError: One of them is missing or was changed.
    """
    for name in engine.files:
        check_file(bundle, name)
    return bundle.root / engine.path


def golden_vectors(bundle: Bundle) -> GoldenDraft | None:
    """The golden vectors, hashes checked; None where the bundle has none.

    Raises:
        IntegrityError: A file is missing, was changed or is not what it should be.
    """
    golden = bundle.manifest.golden
    if golden is None:
        return None
    paths = [check_file(bundle, name) for name in (golden.inputs, golden.outputs, golden.keypoints)]
    try:
        with np.load(paths[1], allow_pickle=False) as archive:
            outputs = {name: archive[name] for name in archive.files}
        inputs, keypoints = (np.load(path, allow_pickle=False) for path in (paths[0], paths[2]))
    except (ValueError, BadZipFile, OSError, AttributeError) as err:
        raise _fault(bundle.root, "golden", found=f"unreadable arrays ({err})", expected=".npy and .npz") from err
    return GoldenDraft(inputs=inputs, outputs=outputs, keypoints=keypoints)


def _manifest(root: Path, draft: BundleDraft) -> Manifest:
    files = {name: _sha256(root / name) for name in sorted(_files_below(root))}
    engines = tuple(
        Engine(
            target=engine.target,
            backend=engine.backend,
            precision=engine.precision,
            dialect=engine.dialect,
            path=engine.path,
            files=tuple(f"{engine.folder}/{name}" for name in engine.files),
            builder=engine.builder,
            threads=engine.threads,
            execution=engine.execution,
        )
        for engine in draft.engines
    )
    golden = None
    if draft.golden is not None:
        tolerances = {engine.path: dict(engine.tolerances) for engine in draft.engines}
        golden = Golden("golden/inputs.npy", "golden/outputs.npz", "golden/keypoints.npy", tolerances)
    return Manifest(
        edgepose_version=__version__,
        name=draft.name,
        spec=draft.spec,
        model=MODEL,
        engines=engines,
        chain={**draft.chain, **_chain_from(files, engines)},
        reports=dict(draft.reports),
        golden=golden,
        files=files,
    )


def _chain_from(files: Mapping[str, str], engines: tuple[Engine, ...]) -> dict[str, str]:
    """The last links of the chain, which follow from the files themselves."""
    links = {"onnx": files[MODEL]}
    for engine in engines:
        digests = "".join(f"{name}\0{files[name]}\n" for name in sorted(engine.files) if name in files)
        links[f"engine:{engine.path}"] = hashlib.sha256(digests.encode()).hexdigest()
    return links


def _put(root: Path, name: str, content: Content) -> None:
    if not _is_safe(name):
        raise SpecError("bundle draft", found=f"the file name {name!r}", expected="a relative path without '..'")
    path = root / name
    if path.exists():
        raise SpecError("bundle draft", found=f"two files named {name}", expected="different names")
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        shutil.copyfile(content, path)


def _put_golden(folder: Path, golden: GoldenDraft) -> None:
    folder.mkdir()
    (folder / "inputs.npy").write_bytes(_npy(golden.inputs))
    (folder / "keypoints.npy").write_bytes(_npy(golden.keypoints))
    archive = io.BytesIO()
    outputs: dict[str, Any] = {name: np.asarray(value, np.float32) for name, value in golden.outputs.items()}
    np.savez_compressed(archive, **outputs)
    (folder / "outputs.npz").write_bytes(archive.getvalue())


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()  # straight to a file, NumPy would not say why a write failed
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _read_manifest(root: Path) -> bytes:
    try:
        return (root / MANIFEST).read_bytes()
    except OSError as err:
        what = "no such directory" if not root.exists() else "a file" if root.is_file() else f"no {MANIFEST} in it"
        if isinstance(err, PermissionError):
            what = f"{MANIFEST} cannot be read ({err.strerror})"
        fix = "name the directory that `edgepose compile` wrote"
        raise BadInput(f"bundle {root}", found=what, expected="an edgepose bundle", fix=fix) from err


def _check_digest_file(root: Path, digest: str) -> None:
    try:
        stored = (root / DIGEST).read_text(encoding="ascii", errors="replace")
    except OSError as err:
        raise _fault(root, DIGEST, found=err.strerror or str(err), expected="the manifest's digest") from err
    if stored != f"{digest}  {MANIFEST}\n":
        raise _fault(root, MANIFEST, found=f"sha256 {digest[:12]}…", expected=f"{stored[:12]!r} as in {DIGEST}")


class _Header(msgspec.Struct):
    """The part of a manifest that every version has."""

    format: Literal["edgepose-bundle"]
    schema_version: int


def _decode(root: Path, raw: bytes) -> Manifest:
    where = f"{root / MANIFEST}"
    try:
        header = msgspec.json.decode(raw, type=_Header)
        if header.schema_version > SCHEMA_VERSION:
            raise BadInput(
                where,
                found=f"schema version {header.schema_version}",
                expected=f"at most {SCHEMA_VERSION}",
                fix="update edgepose: pip install --upgrade edgepose",
            )
        return msgspec.json.decode(raw, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise BadInput(where, found=str(err), expected="an edgepose manifest", fix="compile the bundle again") from err


def _check_names(root: Path, manifest: Manifest) -> None:
    """Every name must stay inside the bundle, and whatever is referred to must be hashed."""
    for name in manifest.files:
        if not _is_safe(name) or name in (MANIFEST, DIGEST):
            raise _fault(root, MANIFEST, found=f"the file name {name!r}", expected="a relative path without '..'")
    named = [manifest.model]
    for engine in manifest.engines:
        named += engine.files
        if engine.path not in engine.files:
            _unlisted(root, engine.path)
    if manifest.golden is not None:
        named += [manifest.golden.inputs, manifest.golden.outputs, manifest.golden.keypoints]
    for name in named:
        if name not in manifest.files:
            _unlisted(root, name)


def _unlisted(root: Path, name: str) -> NoReturn:
    raise _fault(root, MANIFEST, found=f"{name!r} used without a hash", expected="every file listed under files")


def _is_safe(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and not re.search(r"[\\:\0]", name) and not {"", ".", ".."} & set(parts)


def is_pristine(path: Path) -> bool:
    """Whether `path` is a bundle and holds nothing but a bundle's files, so that it may be replaced."""
    try:
        manifest = msgspec.json.decode((path / MANIFEST).read_bytes(), type=_Listing)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return False
    return set(_files_below(path)) <= {*manifest.files, MANIFEST, DIGEST}


class _Listing(_Header):
    files: dict[str, str]


def _files_below(root: Path) -> list[str]:
    """All that is not a directory, relative to `root`, with forward slashes; links are named, not followed."""
    found = []
    for folder, folders, names in os.walk(root):
        links = [name for name in folders if Path(folder, name).is_symlink()]
        found += [str(PurePosixPath(Path(folder, name).relative_to(root))) for name in (*names, *links)]
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fault(root: Path, name: str, *, found: str, expected: str) -> IntegrityError:
    fix = "copy the bundle again from where it was made, or compile it again"
    return IntegrityError(f"bundle {root}: {name}", found=found, expected=expected, fix=fix)
