"""A bundle is written whole, reads back, and every change to it is noticed."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgepose.bundle import (
    DIGEST,
    MANIFEST,
    Bundle,
    Content,
    Manifest,
    check_engine,
    golden_vectors,
    read_bundle,
    verify_bundle,
    write_bundle,
)
from edgepose.errors import BadInput, EdgeposeError, IntegrityError, SpecError, StorageError, UsageError
from edgepose.golden import check_golden
from edgepose.runtime import open_session
from edgepose.storage import json_bytes
from tests.fakes import FakeSession, spot_outputs, spot_spec
from tests.tiny_network import flip_a_byte, forge, spot_bundle, spot_draft

FILES = (
    MANIFEST,
    DIGEST,
    "model.onnx",
    "engines/cpu/onnxruntime/fp32.onnx",
    "engines/cpu/openvino/fp32.xml",
    "engines/cpu/openvino/fp32.bin",
    "golden/inputs.npy",
    "golden/outputs.npz",
    "golden/keypoints.npy",
)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return spot_bundle(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def bundle(pristine: Bundle, tmp_path: Path) -> Bundle:
    """A bundle that the test may spoil."""
    return read_bundle(shutil.copytree(pristine.root, tmp_path / "spots.bundle"))


# Writing and reading


def test_bundle_reads_back_what_was_written(bundle: Bundle) -> None:
    assert read_bundle(bundle.root) == bundle == verify_bundle(bundle.root)
    assert bundle.manifest.spec == spot_spec()
    assert {str(path.relative_to(bundle.root)) for path in bundle.root.rglob("*") if path.is_file()} == set(FILES)
    assert set(bundle.manifest.files) == set(FILES) - {MANIFEST, DIGEST}
    assert bundle.manifest.reports == {"export": {"largest_difference": 0.5, "shape": [1, 2]}}
    assert [engine.backend for engine in bundle.manifest.engines] == ["onnxruntime", "openvino"]


def test_digest_is_that_of_the_manifest_and_sha256sum_can_check_it(bundle: Bundle) -> None:
    assert bundle.digest == hashlib.sha256((bundle.root / MANIFEST).read_bytes()).hexdigest()
    subprocess.run(["sha256sum", "--check", DIGEST], cwd=bundle.root, check=True, capture_output=True)


def test_chain_leads_from_the_data_to_every_engine(bundle: Bundle) -> None:
    chain = bundle.manifest.chain
    assert list(chain) == [
        "dataset",
        "checkpoint",
        "onnx",
        "engine:engines/cpu/onnxruntime/fp32.onnx",
        "engine:engines/cpu/openvino/fp32.xml",
    ]
    assert chain["onnx"] == hashlib.sha256((bundle.root / "model.onnx").read_bytes()).hexdigest()


def test_same_draft_gives_the_same_digest(tmp_path: Path) -> None:
    draft = spot_draft(tmp_path)
    assert write_bundle(tmp_path / "a", draft).digest == write_bundle(tmp_path / "b", draft).digest


def test_golden_vectors_come_back_and_both_engines_answer_them(bundle: Bundle) -> None:
    golden = golden_vectors(bundle)
    assert golden is not None
    expected = spot_outputs(golden.inputs)
    assert all(np.array_equal(golden.outputs[name], expected[name]) for name in expected)
    for engine in bundle.manifest.engines:
        session = open_session(check_engine(bundle, engine), engine.backend, threads=1)
        checked = check_golden(bundle, engine, session)
        assert checked is not None
        assert checked.differences["simcc_x"] < 1e-3
        session.close()


def test_engine_that_answers_otherwise_fails_the_golden_check(bundle: Bundle) -> None:
    def disturbed(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = spot_outputs(images)
        return {**outputs, "simcc_y": outputs["simcc_y"] + 0.25}

    session = FakeSession(spot_spec(), disturbed)
    with pytest.raises(EdgeposeError, match=r"simcc_y: .*0\.25.*at most 0\.001.*0\.25 would have passed") as caught:
        check_golden(bundle, bundle.manifest.engines[0], session)
    assert caught.value.exit_code == 5


def test_bundle_without_golden_vectors_or_engines_is_a_bundle(tmp_path: Path) -> None:
    draft = dataclasses.replace(spot_draft(tmp_path), golden=None, engines=())
    bundle = write_bundle(tmp_path / "out", draft)
    assert verify_bundle(bundle.root).manifest.engines == ()
    assert golden_vectors(bundle) is None


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=50, deadline=None)
@given(name=st.text(max_size=20), reports=st.dictionaries(st.text(max_size=8), json_values, max_size=3))
def test_manifest_survives_json(name: str, reports: dict[str, Any]) -> None:
    manifest = Manifest(
        edgepose_version="1",
        name=name,
        spec=spot_spec(),
        model="model.onnx",
        engines=(),
        chain={},
        reports=reports,
        golden=None,
        files={},
    )
    assert msgspec.json.decode(json_bytes(manifest), type=Manifest) == manifest


# Changes are noticed


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_anywhere_is_noticed(bundle: Bundle, name: str, position: float) -> None:
    flip_a_byte(bundle.root / name, position)
    with pytest.raises(IntegrityError) as caught:
        verify_bundle(bundle.root)
    assert caught.value.exit_code == 8
    assert (MANIFEST if name == DIGEST else name) in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(FILES) - {MANIFEST}))
def test_missing_file_is_noticed(bundle: Bundle, name: str) -> None:
    (bundle.root / name).unlink()
    with pytest.raises(IntegrityError, match=name):
        verify_bundle(bundle.root)


def test_added_file_is_noticed(bundle: Bundle) -> None:
    (bundle.root / "engines" / "extra.bin").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"engines/extra\.bin"):
        verify_bundle(bundle.root)


def test_file_replaced_by_a_link_to_elsewhere_is_noticed(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.root / "model.onnx").rename(tmp_path / "elsewhere.onnx")
    (bundle.root / "model.onnx").symlink_to(tmp_path / "elsewhere.onnx")
    with pytest.raises(IntegrityError, match="a link to"):
        verify_bundle(bundle.root)


def test_linked_directory_is_noticed(bundle: Bundle, tmp_path: Path) -> None:
    (bundle.root / "more").symlink_to(tmp_path)
    with pytest.raises(IntegrityError, match="more: found a file that the manifest does not list"):
        verify_bundle(bundle.root)


def test_all_faults_are_counted(bundle: Bundle) -> None:
    flip_a_byte(bundle.root / "model.onnx")
    (bundle.root / "golden/inputs.npy").unlink()
    with pytest.raises(IntegrityError, match="and 1 more fault"):
        verify_bundle(bundle.root)


def test_engine_is_checked_with_all_its_files(bundle: Bundle) -> None:
    openvino = bundle.manifest.engines[1]
    assert check_engine(bundle, openvino) == bundle.root / "engines/cpu/openvino/fp32.xml"
    flip_a_byte(bundle.root / "engines/cpu/openvino/fp32.bin")
    with pytest.raises(IntegrityError, match=r"fp32\.bin"):
        check_engine(bundle, openvino)
    check_engine(bundle, bundle.manifest.engines[0])


def test_chain_that_is_not_that_of_the_files_is_noticed(bundle: Bundle) -> None:
    forge(bundle, chain={**bundle.manifest.chain, "onnx": "0" * 64})
    with pytest.raises(IntegrityError, match="link 'onnx'"):
        verify_bundle(bundle.root)


def test_pickled_array_is_not_loaded(bundle: Bundle) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("unpickled",))

    content = pickle.dumps(Bomb())
    (bundle.root / "golden/inputs.npy").write_bytes(content)
    files = {**bundle.manifest.files, "golden/inputs.npy": hashlib.sha256(content).hexdigest()}
    with pytest.raises(IntegrityError, match="unreadable arrays"):
        golden_vectors(read_bundle(forge(bundle, files=files)))


# What is no bundle, or one of another time


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda path: None, "no such directory"),
        (lambda path: path.write_bytes(b"PK"), "a file"),
        (lambda path: path.mkdir(), "no manifest.json in it"),
    ],
)
def test_what_is_no_bundle_is_said(tmp_path: Path, make: Any, found: str) -> None:
    make(tmp_path / "x.bundle")
    with pytest.raises(BadInput, match=f"found {found}, expected an edgepose bundle") as caught:
        read_bundle(tmp_path / "x.bundle")
    assert caught.value.exit_code == 2


def test_newer_schema_asks_for_an_update(bundle: Bundle) -> None:
    forge(bundle, schema_version=2, novelty={"unheard": "of"})
    with pytest.raises(BadInput, match="schema version 2, expected at most 1; update edgepose"):
        read_bundle(bundle.root)


def test_unknown_field_is_named(bundle: Bundle) -> None:
    with pytest.raises(BadInput, match="unknown field `novelty`"):
        read_bundle(forge(bundle, novelty=1))


def test_field_of_the_wrong_type_is_named(bundle: Bundle) -> None:
    with pytest.raises(BadInput, match=r"\$\.engines"):
        read_bundle(forge(bundle, engines="all"))


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "a//x", "a\\x", "C:x", "", ".", MANIFEST, "a/"])
def test_name_that_leaves_the_bundle_is_refused(bundle: Bundle, name: str) -> None:
    with pytest.raises(IntegrityError, match="the file name"):
        read_bundle(forge(bundle, files={**bundle.manifest.files, name: "0" * 64}))


def test_engine_without_a_hash_is_refused(bundle: Bundle) -> None:
    engine = msgspec.to_builtins(bundle.manifest.engines[0])
    for change in ({"path": "../x"}, {"files": ["../x"], "path": "../x"}, {"path": "model.onnx"}):
        with pytest.raises(IntegrityError, match="without a hash"):
            read_bundle(forge(bundle, engines=[{**engine, **change}]))


# Writing that fails


def below(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def test_written_bundle_is_never_overwritten(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already there"):
        write_bundle(bundle.root, spot_draft(tmp_path))
    assert verify_bundle(bundle.root).digest == bundle.digest


def test_bundle_replaces_a_bundle_when_asked(bundle: Bundle, tmp_path: Path) -> None:
    draft = dataclasses.replace(spot_draft(tmp_path), name="second")
    assert write_bundle(bundle.root, draft, replace=True).manifest.name == "second"
    assert verify_bundle(bundle.root).manifest.name == "second"


def test_foreign_directory_and_bundle_with_foreign_files_are_not_replaced(bundle: Bundle, tmp_path: Path) -> None:
    draft = spot_draft(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_bytes(b"")
    (bundle.root / "notes.txt").write_bytes(b"")
    for out in (tmp_path / "mine", bundle.root):
        before = below(out)
        with pytest.raises(UsageError, match="did not write"):
            write_bundle(out, draft, replace=True)
        assert below(out) == before


@pytest.mark.parametrize("name", ["../x", "/x", "a\\b", ""])
def test_draft_with_an_unsafe_name_is_refused(tmp_path: Path, name: str) -> None:
    draft = spot_draft(tmp_path)
    engine = dataclasses.replace(draft.engines[0], files={name: b"x"}, main=name)
    before = below(tmp_path)
    with pytest.raises(SpecError, match="the file name"):
        write_bundle(tmp_path / "out", dataclasses.replace(draft, engines=(engine,)))
    assert below(tmp_path) == before


def test_draft_with_two_files_of_one_name_is_refused(tmp_path: Path) -> None:
    draft = spot_draft(tmp_path)
    with pytest.raises(SpecError, match=r"two files named engines/cpu/onnxruntime/fp32\.onnx"):
        write_bundle(tmp_path / "out", dataclasses.replace(draft, engines=draft.engines[:1] * 2))


def test_draft_whose_main_file_is_not_among_its_files_is_refused(tmp_path: Path) -> None:
    draft = spot_draft(tmp_path)
    engine = dataclasses.replace(draft.engines[0], main="absent.onnx")
    before = below(tmp_path)
    with pytest.raises(SpecError, match=r"absent\.onnx"):
        write_bundle(tmp_path / "out", dataclasses.replace(draft, engines=(engine,)))
    assert below(tmp_path) == before


class InterruptedFiles(Mapping[str, Content]):
    """Files whose reading the user interrupts after the first."""

    def __getitem__(self, name: str) -> Content:
        return b"first"

    def __iter__(self) -> Iterator[str]:
        yield "first"
        raise KeyboardInterrupt

    def __len__(self) -> int:
        return 2


def test_interrupted_bundle_leaves_nothing(tmp_path: Path) -> None:
    draft = spot_draft(tmp_path)
    engine = dataclasses.replace(draft.engines[0], files=InterruptedFiles())
    before = below(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tmp_path / "deep" / "out", dataclasses.replace(draft, engines=(engine,)))
    assert below(tmp_path) == before


def test_disk_that_is_full_leaves_nothing_and_exits_6(tmp_path: Path) -> None:
    code = (
        "import dataclasses, pathlib, resource, sys; from tests.tiny_network import spot_draft\n"
        "from edgepose.bundle import write_bundle; from edgepose.errors import EdgeposeError\n"
        "work = pathlib.Path(sys.argv[1]); draft = spot_draft(work)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (16384, 16384))\n"
        "try: write_bundle(work / 'deep' / 'out', draft)\n"
        "except EdgeposeError as err: print(err); sys.exit(err.exit_code)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == StorageError.exit_code == 6, result.stderr
    assert "limit on the size" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"spots.onnx", "spots.xml", "spots.bin"}
