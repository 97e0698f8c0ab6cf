"""The spot network of `fakes` as real files: ONNX, OpenVINO IR, and a bundle that holds both.

Invariant: it computes exactly `fakes.spot_outputs`, so that every backend's answer is known beforehand.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgepose.bundle import DIGEST, MANIFEST, Bundle, BundleDraft, EngineDraft, GoldenDraft, write_bundle
from edgepose.pose.codec import decode
from edgepose.storage import json_bytes
from edgepose.telemetry import block_telemetry
from tests.fakes import HEIGHT, WIDTH, spot_outputs, spot_spec


def spot_onnx() -> bytes:
    """Conv that picks blue and red, then sums over rows and over columns."""
    pick = np.zeros((2, 3, 1, 1), np.float32)
    pick[0, 0] = pick[1, 2] = 1
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["images", "pick"], ["planes"]),
            helper.make_node("ReduceSum", ["planes", "rows"], ["simcc_x"], keepdims=0),
            helper.make_node("ReduceSum", ["planes", "columns"], ["simcc_y"], keepdims=0),
        ],
        "spots",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, HEIGHT, WIDTH])],
        [
            helper.make_tensor_value_info("simcc_x", TensorProto.FLOAT, ["batch", 2, WIDTH]),
            helper.make_tensor_value_info("simcc_y", TensorProto.FLOAT, ["batch", 2, HEIGHT]),
        ],
        [
            numpy_helper.from_array(pick, "pick"),
            numpy_helper.from_array(np.array([2], np.int64), "rows"),
            numpy_helper.from_array(np.array([3], np.int64), "columns"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def spot_ir(folder: Path) -> Path:
    """Writes spots.xml and spots.bin into `folder`."""
    block_telemetry()
    import openvino

    from edgepose.runtime.openvino import shared_core

    source = folder / "spots.onnx"
    source.write_bytes(spot_onnx())
    openvino.save_model(shared_core().read_model(source), folder / "spots.xml", compress_to_fp16=False)
    return folder / "spots.xml"


def spot_draft(folder: Path) -> BundleDraft:
    """A draft with one engine per backend and golden vectors; `folder` receives the intermediate files."""
    xml = spot_ir(folder)
    images = np.random.default_rng(0).random((3, 3, HEIGHT, WIDTH), np.float32)
    outputs = spot_outputs(images)
    keypoints, _ = decode(outputs, spot_spec().decoder)
    tolerances = {"simcc_x": 1e-3, "simcc_y": 1e-3, "keypoints_px": 0.05}
    return BundleDraft(
        name="spots",
        spec=spot_spec(),
        onnx=spot_onnx(),
        engines=(
            EngineDraft(
                target="cpu",
                backend="onnxruntime",
                precision="fp32",
                dialect="float",
                files={"fp32.onnx": spot_onnx()},
                main="fp32.onnx",
                builder="onnx",
                threads=1,
                tolerances=tolerances,
            ),
            EngineDraft(
                target="cpu",
                backend="openvino",
                precision="fp32",
                dialect="float",
                files={"fp32.xml": xml, "fp32.bin": xml.with_suffix(".bin")},
                main="fp32.xml",
                builder="openvino",
                threads=1,
                tolerances=tolerances,
            ),
        ),
        chain={"dataset": "d" * 64, "checkpoint": "c" * 64},
        reports={"export": {"largest_difference": np.float32(0.5), "shape": np.array([1, 2])}},
        golden=GoldenDraft(images, outputs, keypoints),
    )


def spot_bundle(folder: Path) -> Bundle:
    """Writes spots.bundle into `folder`."""
    return write_bundle(folder / "spots.bundle", spot_draft(folder))


def pair_of_bundles(folder: Path, good: str, bigger: str) -> None:
    """The bundle of `spot_bundle`, and one like it whose engine has 4 KiB more, under these names."""
    spot_bundle(folder).root.rename(folder / good)
    parts = folder / "parts"
    parts.mkdir()
    draft = spot_draft(parts)
    first = draft.engines[0]
    grown = replace(first, files={**first.files, "cache.bin": bytes(4096)})
    write_bundle(folder / bigger, replace(draft, name="bigger", engines=(grown,)))


def flip_a_byte(path: Path, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 0x01
    path.write_bytes(content)


def forge(bundle: Bundle, **changes: Any) -> Path:
    """Changes fields of the manifest and makes its digest fit: what a foreign or newer tool could have written."""
    manifest = {**msgspec.json.decode((bundle.root / MANIFEST).read_bytes()), **changes}
    raw = json_bytes(manifest)
    (bundle.root / MANIFEST).write_bytes(raw)
    (bundle.root / DIGEST).write_text(f"{hashlib.sha256(raw).hexdigest()}  {MANIFEST}\n", encoding="ascii")
    return bundle.root
