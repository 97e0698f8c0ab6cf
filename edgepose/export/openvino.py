"""ONNX → OpenVINO IR, and what OpenVINO's kernels really do.

Invariant: the IR holds the ONNX file's numbers: float weights are not compressed to 16 bits, int8 weights stay int8.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino
from numpy.typing import NDArray

from edgepose.errors import OnnxError
from edgepose.export.int8_share import Int8Share, Kernel
from edgepose.runtime.openvino import shared_core
from edgepose.storage import storage_faults_at

_HEAVY = ("Convolution", "GroupConvolution", "ConvolutionBackpropData", "GroupConvolutionBackpropData", "MatMul")
_INTEGER_TYPES = ("u8", "i8")


def openvino_from_onnx(
    path: str | os.PathLike[str], out_dir: str | os.PathLike[str], *, name: str = "model"
) -> tuple[Path, Path]:
    """Converts to `<name>.xml` and `<name>.bin` in `out_dir`; files of these names are replaced.

    Returns:
        Paths of the .xml, to hand to the runtime, and the .bin.

    Raises:
        OnnxError: OpenVINO cannot read the file.
        StorageError: Disk full, read-only or no permission.
    """
    out = Path(out_dir)
    model = _read(Path(path))
    with storage_faults_at(out):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".openvino-") as folder:
            xml = Path(folder, f"{name}.xml")
            _save(model, xml, where=str(path))
            _read(xml)  # a truncated file is noticed here, not on the device
            # The weights first: an .xml never stands there without them.
            for suffix in (".bin", ".xml"):
                xml.with_suffix(suffix).replace(out / f"{name}{suffix}")
    return out / f"{name}.xml", out / f"{name}.bin"


def int8_share_openvino(path: str | os.PathLike[str]) -> Int8Share:
    """Which convolutions and matrix products OpenVINO executes in integers, from its compiled graph.

    Raises:
        OnnxError: OpenVINO cannot read or compile the file.
    """
    model = _read(Path(path))
    model.reshape({port: _at_batch_one(port) for port in model.inputs})
    macs = {node.get_friendly_name(): _macs(node) for node in model.get_ordered_ops() if node.get_type_name() in _HEAVY}
    try:
        compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    except RuntimeError as err:
        raise OnnxError(str(path), found=f"OpenVINO cannot compile it: {_gist(err)}") from err
    kernels = []
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        # A product whose integer form needed rewriting keeps its name as a prefix only.
        originals = {name.partition("/Dequantization")[0] for name in _text(info, "originalLayersNames").split(",")}
        for name in sorted(originals & set(macs)):
            precision = _text(info, "runtimePrecision")
            kernel = f"{_text(info, 'layerType')} {_text(info, 'primitiveType')}"
            kernels.append(Kernel(name, kernel, precision in _INTEGER_TYPES, macs.pop(name)))
    # Whatever is named by no executed node was not counted above; taking it for integer would flatter.
    kernels += [Kernel(name, "not found in the compiled graph", integer=False, macs=n) for name, n in macs.items()]
    return Int8Share(backend="openvino", kernels=tuple(kernels))


def values_openvino(
    path: str | os.PathLike[str], names: Sequence[str], feeds: Mapping[str, NDArray[Any]], *, precision: str = "f32"
) -> dict[str, NDArray[Any]]:
    """Values inside a network, by their names in the file, as OpenVINO's optimised engine computes them.

    Args:
        path: An .onnx or .xml file.
        names: Which values.
        feeds: Inputs by name.
        precision: OpenVINO's name of the arithmetic of what is not quantised.

    Raises:
        OnnxError: OpenVINO cannot read or compile the file, or has no such value.
    """
    model = _read(Path(path))
    there = {name for port in model.outputs for name in port.get_names()}
    try:
        model.add_outputs([name for name in names if name not in there])
        compiled = shared_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": precision})
        request = compiled.create_infer_request()
        request.infer(dict(feeds))
        return {name: np.array(request.get_tensor(name).data) for name in names}
    except RuntimeError as err:
        raise OnnxError(str(path), found=f"OpenVINO cannot run it: {_gist(err)}") from err


def _read(path: Path) -> openvino.Model:
    try:
        return shared_core().read_model(str(path))
    except RuntimeError as err:
        found = "no such file" if not path.is_file() else f"OpenVINO refuses it: {_gist(err)}"
        raise OnnxError(str(path), found=found, expected="an ONNX or OpenVINO model") from err


def _save(model: openvino.Model, xml: Path, *, where: str) -> None:
    try:
        openvino.save_model(model, str(xml), compress_to_fp16=False)
    except RuntimeError as err:
        # OpenVINO says nothing of errno; probing with a write of our own gives the real reason, if it is the disk.
        with xml.with_suffix(".probe").open("wb") as probe:
            probe.write(b"\0" * (1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
        raise OnnxError(where, found=f"OpenVINO cannot write it: {_gist(err)}") from err


def _at_batch_one(port: Any) -> openvino.PartialShape:
    return openvino.PartialShape([1 if size.is_dynamic else size.get_length() for size in port.partial_shape])


def _macs(node: Any) -> int:
    """Multiplications of one operator of a model with static shapes."""
    first, weight = (tuple(node.input_value(i).get_shape()) for i in (0, 1))
    output = int(np.prod(tuple(node.output(0).get_shape())))
    match node.get_type_name():
        case "Convolution":  # weight: outputs, inputs, …
            return output * int(np.prod(weight[1:]))
        case "GroupConvolution":  # weight: groups, outputs, inputs, …
            return output * int(np.prod(weight[2:]))
        case "ConvolutionBackpropData":
            return int(np.prod(first)) * int(np.prod(weight[1:]))
        case "GroupConvolutionBackpropData":
            return int(np.prod(first)) * int(np.prod(weight[2:]))
        case _:
            return output * int(first[-2] if node.get_attributes().get("transpose_a") else first[-1])


def _text(info: Any, key: str) -> str:
    return str(info[key].astype(str)) if key in info else ""


def _gist(err: RuntimeError) -> str:
    """The last line that says something; the ones before it tell where in OpenVINO's sources it was thrown."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    return lines[-1] if lines else type(err).__name__
