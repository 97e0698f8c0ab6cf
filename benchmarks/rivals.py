"""What other tools make of the same ONNX file and the same calibration images, each by its own documented way.

Invariant: a rival sees what this project sees, no less: the float network with batch normalisation folded, and the very
images in the very order. A rival whose file a runtime refuses is kept, with the reason, and takes no part there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from edgepose.errors import EdgeposeError
from edgepose.host import fingerprint, weight_bits
from edgepose.spec import Backend
from edgepose.stages.cache import StageKey, StageResult, run_stage

Images = NDArray[np.float32]

NNCF, QUANTIZE_STATIC = "NNCF", "quantize_static"
_TOOLS = ("nncf", "onnxruntime", "onnx", "openvino")
_CHUNK = 10  # images whose intermediate tensors ONNX Runtime's histograms hold in memory at once


@dataclass(frozen=True, slots=True)
class Rival:
    """A tool with its settings.

    Attributes:
        tool: Whose work it is.
        name: What the settings are called.
        source: What the tool is handed: OpenVINO's model of the file, or the ONNX file.
        settings: Its settings, by the tool's own names.
    """

    tool: Literal["NNCF", "quantize_static"]
    name: str
    source: Literal["openvino", "onnx"]
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"{self.tool}, {self.name}"

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Who can read the file that the tool writes."""
        return ("openvino",) if self.source == "openvino" else ("onnxruntime", "openvino")


_BEST: dict[str, Any] = {"per_channel": True, "activation_type": "QUInt8", "preprocessed": True}
"""What ONNX Runtime's own documentation recommends for x86 with VNNI: unsigned activations, signed weights."""

RIVALS: tuple[Rival, ...] = (
    Rival("NNCF", "defaults, on OpenVINO", "openvino"),
    Rival("NNCF", "mixed preset, on OpenVINO", "openvino", {"preset": "mixed"}),
    Rival("NNCF", "defaults, on ONNX", "onnx"),
    Rival("quantize_static", "defaults", "onnx"),
    Rival("quantize_static", "U8S8 per channel, min-max", "onnx", {**_BEST, "calibrate_method": "MinMax"}),
    Rival(
        "quantize_static",
        "U8S8 per channel, moving average",
        "onnx",
        {**_BEST, "calibrate_method": "MinMax", "extra_options": {"CalibMovingAverage": True}},
    ),
    Rival("quantize_static", "U8S8 per channel, entropy", "onnx", {**_BEST, "calibrate_method": "Entropy"}),
    Rival(
        "quantize_static",
        "U8S8 per channel, percentile 99.99",
        "onnx",
        {**_BEST, "calibrate_method": "Percentile", "extra_options": {"CalibPercentile": 99.99}},
    ),
)


@dataclass(frozen=True, slots=True)
class Made:
    """What came of a rival.

    Attributes:
        rival: Who.
        files: The file to hand to each runtime that reads it.
        refused: Runtimes that do not, and why.
        seconds: How long the tool took.
    """

    rival: Rival
    files: dict[Backend, Path]
    refused: dict[Backend, str]
    seconds: float


def made(rival: Rival, network: Path, images: Images) -> Made:
    """A rival's quantised network, from the cache where it was made before.

    Args:
        rival: Tool and settings.
        network: The float network, ONNX.
        images: (N, 3, h, w) float32, normalised: what to calibrate on.
    """
    inputs = {"network": digest_of(network), "images": hashlib.sha256(images.tobytes()).hexdigest()}
    config = [rival.tool, rival.source, rival.settings, weight_bits(fingerprint())[0]]

    def work(folder: Path) -> dict[str, Any]:
        return _attempt(rival, network, images, folder)

    result = run_stage(StageKey("rival", {**inputs, "host": fingerprint().digest}, config, _TOOLS), work)
    return Made(rival, _files(rival, result), result.report["refused"], result.seconds)


def digest_of(path: Path) -> str:
    """sha256 of a network's file and, of OpenVINO's, of the weights beside it."""
    digest = hashlib.sha256(path.read_bytes())
    if path.suffix == ".xml":
        digest.update(path.with_suffix(".bin").read_bytes())
    return digest.hexdigest()


def _files(rival: Rival, result: StageResult) -> dict[Backend, Path]:
    path = result.path / _file_name(rival)
    return {backend: path for backend in rival.backends if backend not in result.report["refused"]}


def _file_name(rival: Rival) -> str:
    return "model.xml" if rival.source == "openvino" else "model.onnx"


def _attempt(rival: Rival, network: Path, images: Images, folder: Path) -> dict[str, Any]:
    """Makes the file and finds out who reads it; whatever a foreign tool raises is its answer."""
    from edgepose.compress.hooks import quiet

    out = folder / _file_name(rival)
    try:
        with quiet():
            _maker(rival)(network, images, rival.settings, out)
    except Exception as err:  # noqa: BLE001 - the tools are not ours, and a row that says so is the result
        text = f"{type(err).__name__}: {err}".splitlines()[0][:300]
        return {"refused": dict.fromkeys(rival.backends, f"{rival.tool} fails: {text}")}
    return {"refused": {backend: why for backend in rival.backends if (why := _refusal(out, backend, images))}}


def _refusal(path: Path, backend: Backend, images: Images) -> str:
    """Why a runtime does not execute a file; empty if it does."""
    from edgepose.runtime import open_session

    try:
        session = open_session(path, backend, threads=1, precision="int8")
        try:
            session.infer({session.inputs[0].name: images[:1]})
        finally:
            session.close()
    except EdgeposeError as err:
        return str(err)
    return ""


Maker = Callable[[Path, Images, dict[str, Any], Path], None]


def _maker(rival: Rival) -> Maker:
    if rival.tool == QUANTIZE_STATIC:
        return _quantize_static
    return _nncf_openvino if rival.source == "openvino" else _nncf_onnx


def _nncf_openvino(network: Path, images: Images, settings: dict[str, Any], out: Path) -> None:
    """`nncf.quantize` on OpenVINO's own model."""
    import nncf
    import openvino

    from edgepose.runtime.openvino import shared_core

    model = shared_core().read_model(str(network))
    quantised = nncf.quantize(model, nncf.Dataset(list(images[:, None])), **_nncf_settings(settings, images))
    openvino.save_model(quantised, str(out), compress_to_fp16=False)


def _nncf_onnx(network: Path, images: Images, settings: dict[str, Any], out: Path) -> None:
    """`nncf.quantize` on the ONNX file."""
    import nncf
    import onnx

    model = onnx.load(network)
    name = model.graph.input[0].name
    data = nncf.Dataset([{name: image} for image in images[:, None]])
    onnx.save(nncf.quantize(model, data, **_nncf_settings(settings, images)), out)


def _nncf_settings(settings: dict[str, Any], images: Images) -> dict[str, Any]:
    import nncf

    presets = {"preset": nncf.QuantizationPreset(settings["preset"])} if "preset" in settings else {}
    return {"subset_size": len(images), **presets}


def _quantize_static(network: Path, images: Images, settings: dict[str, Any], out: Path) -> None:
    """`onnxruntime.quantization.quantize_static`."""
    from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    keywords = dict(settings)
    source = network
    if keywords.pop("preprocessed", False):
        source = out.with_name("preprocessed.onnx")
        quant_pre_process(str(network), str(source), skip_symbolic_shape=True)  # which is for transformers
    if "activation_type" in keywords:
        keywords["activation_type"] = QuantType[keywords["activation_type"]]
        keywords["reduce_range"] = weight_bits(fingerprint())[0] == 7  # else its sums saturate, as ours would
    method = CalibrationMethod[keywords.get("calibrate_method", "MinMax")]
    options = dict(keywords.pop("extra_options", {}))
    if method is not CalibrationMethod.MinMax:
        options["CalibStridedMinMax"] = max(n for n in range(1, _CHUNK + 1) if len(images) % n == 0)
    keywords |= {"calibrate_method": method, "extra_options": options}
    quantize_static(str(source), str(out), _Reader(source, images), **keywords)
    if source != network:
        source.unlink()


class _Reader:
    """A CalibrationDataReader: ONNX Runtime asks for nothing but these methods."""

    def __init__(self, network: Path, images: Images) -> None:
        import onnx

        self._name = onnx.load(network, load_external_data=False).graph.input[0].name
        self._images = images
        self.set_range(0, len(images))

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """The images that are handed out next."""
        self._left = iter(self._images[start_index:end_index, None])

    def get_next(self) -> dict[str, Images] | None:
        """The next image as a feed; None after the last."""
        image = next(self._left, None)
        return None if image is None else {self._name: image}
