"""ONNX → what ONNX Runtime executes, and what its kernels really do.

Invariant: the engine is the ONNX file itself, byte for byte.

ONNX Runtime can save the graph it has optimised, but such a file holds layouts and kernels of the machine and version
that made it; optimising again while loading costs some 50 ms and is right everywhere.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from edgepose.errors import OnnxError
from edgepose.export.int8_reasons import origin
from edgepose.export.int8_share import Int8Share, Kernel
from edgepose.runtime.ort import OrtSession
from edgepose.storage import atomic_write

_INTEGER = frozenset({"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "ConvInteger", "MatMulInteger",
                      "DynamicQuantizeMatMul"})  # fmt: skip
_FLOAT = frozenset({"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"})
_WEIGHT_PORT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}


def ort_from_onnx(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> Path:
    """Copies an ONNX file to where the engine goes, after ONNX Runtime has accepted it.

    Raises:
        OnnxError: ONNX Runtime refuses the file.
        StorageError: Disk full, read-only or no permission.
    """
    OrtSession(Path(path), threads=1).close()
    atomic_write(out, Path(path).read_bytes())
    return Path(out)


def int8_share_ort(path: str | os.PathLike[str]) -> Int8Share:
    """Which convolutions and matrix products ONNX Runtime executes in integers, from a profile of one inference.

    Raises:
        OnnxError: ONNX Runtime refuses the file.
    """
    with tempfile.TemporaryDirectory(prefix="edgepose-") as folder:
        optimised = Path(folder, "optimised.onnx")
        events = _profile(Path(path), optimised, Path(folder, "profile"))
        graph = onnx.load(optimised).graph
    weights = _weight_shapes(graph)
    nodes = {node.name: node for node in graph.node}
    kernels = []
    for event in events:
        operator = event["args"]["op_name"]
        if operator not in _INTEGER | _FLOAT:
            continue
        name = event["name"].removesuffix("_kernel_time")
        node = nodes.get(name)
        if node is None:
            raise OnnxError(str(path), found=f"kernel {name} in the profile only", expected="a node of that name")
        port = _WEIGHT_PORT.get(operator, 1)
        inputs = [_shape(entry) for entry in event["args"]["input_type_shape"]]
        output = _shape(event["args"]["output_type_shape"][0])
        macs = _macs(operator, weights.get(node.input[port]), inputs[0], output)
        kernels.append(Kernel(name=name, operator=operator, integer=operator in _INTEGER, macs=macs))
    return Int8Share(backend="onnxruntime", kernels=tuple(kernels))


def kernel_times_ms(path: str | os.PathLike[str], *, runs: int = 20) -> dict[str, float]:
    """How long ONNX Runtime's convolutions and matrix products take, one thread, batch 1.

    Returns:
        The fastest of several runs by node of the file, milliseconds: other work on the machine only ever adds to it.
        Kernels whose node is not known are left out.

    Raises:
        OnnxError: ONNX Runtime refuses the file.
    """
    graph = tuple(ir.load(Path(path)).graph)
    with tempfile.TemporaryDirectory(prefix="edgepose-") as folder:
        events = _profile(Path(path), Path(folder, "optimised.onnx"), Path(folder, "profile"), runs=runs)
    fastest: dict[str, float] = {}
    for event in events:
        if event["args"]["op_name"] in _INTEGER | _FLOAT:
            node = origin(event["name"].removesuffix("_kernel_time"), graph)
            fastest[node] = min(fastest.get(node, float("inf")), event["dur"] / 1000)
    fastest.pop("", None)
    return fastest


def values_ort(
    path: str | os.PathLike[str], names: Sequence[str], feeds: Mapping[str, NDArray[Any]], *, optimise: bool
) -> dict[str, NDArray[Any]]:
    """Values inside a network, by their names in the file.

    Args:
        path: The .onnx file.
        names: Which values.
        feeds: Inputs by name.
        optimise: Whether the graph is optimised as in an engine; False computes node by node what the file says.

    Raises:
        OnnxError: ONNX Runtime refuses the file.
    """
    model = onnx.load(path)
    outputs = {value.name for value in model.graph.output}
    model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in outputs)
    with tempfile.TemporaryDirectory(prefix="edgepose-") as folder:
        onnx.save(model, Path(folder, "open.onnx"))
        session = OrtSession(Path(folder, "open.onnx"), threads=1, optimise=optimise)
        try:
            found = session.infer(feeds)
        finally:
            session.close()
    return {name: found[name] for name in names}


def _profile(path: Path, optimised: Path, prefix: Path, *, runs: int = 1) -> list[dict[str, Any]]:
    """Kernel events of inferences at batch 1 on zeros; also saves the optimised graph, which has the weights."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(prefix)
    options.optimized_model_filepath = str(optimised)
    OrtSession(path, threads=1).close()  # its errors name the file
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {}
    for value in session.get_inputs():
        shape = tuple(size if isinstance(size, int) else 1 for size in value.shape)
        feeds[value.name] = np.zeros(shape, np.uint8 if value.type == "tensor(uint8)" else np.float32)
    for _ in range(runs):
        session.run(None, feeds)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]


def _weight_shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...]]:
    """Shapes of initialisers, and of what dequantises them where ONNX Runtime formed no integer kernel."""
    shapes = {initialiser.name: tuple(initialiser.dims) for initialiser in graph.initializer}
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            shapes[node.output[0]] = shapes[node.input[0]]
    return shapes


def _shape(entry: dict[str, list[int]]) -> tuple[int, ...]:
    """From {"uint8": [1, 3, 160, 160]}."""
    return tuple(next(iter(entry.values()), []))


def _macs(operator: str, weight: tuple[int, ...] | None, first: tuple[int, ...], output: tuple[int, ...]) -> int:
    if operator == "ConvTranspose":
        return int(np.prod(first)) * int(np.prod((weight or (1,))[1:]))
    if "Conv" in operator:
        return int(np.prod(output)) * int(np.prod((weight or (1,))[1:]))
    return int(np.prod(output)) * int(first[-1])
