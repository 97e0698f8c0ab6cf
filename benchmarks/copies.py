"""Copies of a bundle that are worse on purpose: less accurate, or slower.

Invariant: a copy is a real bundle, its engines built by the builders that the compiler uses; nothing in it pretends.
The slow copy answers exactly what the original answers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from edgepose.bundle import Bundle, BundleDraft, EngineDraft, GoldenDraft, golden_vectors, write_bundle
from edgepose.errors import EdgeposeError
from edgepose.export.openvino import openvino_from_onnx
from edgepose.export.ort import int8_share_ort, ort_from_onnx
from edgepose.pose.codec import decode
from edgepose.runtime import open_session
from edgepose.spec import Backend

_SPARE = 16  # channels of the inserted convolutions: the width that ONNX Runtime's float kernels are blocked for
_STRIDE = (
    4  # of the first inserted convolution, so that one further convolution costs little and many can be counted out
)


def rebuilt(base: Bundle, network: Path, out: Path, *, reason: str) -> Bundle:
    """Writes a bundle like `base` around another network.

    Args:
        base: The bundle whose specification, targets and golden inputs are taken.
        network: The ONNX file, with the inputs and outputs of the original.
        out: Directory of the new bundle.
        reason: Noted in its reports.
    """
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".copy-") as folder:
        engines = []
        for engine in base.manifest.engines:
            files = _engine_files(network, engine.backend, Path(folder, engine.backend))
            tolerances = base.manifest.golden.tolerances.get(engine.path, {}) if base.manifest.golden else {}
            engines.append(
                EngineDraft(
                    target=engine.target,
                    backend=engine.backend,
                    precision=engine.precision,
                    dialect=engine.dialect,
                    files={file.name: file for file in files},
                    main=files[0].name,
                    builder=engine.builder,
                    threads=engine.threads,
                    tolerances=tolerances,
                )
            )
        draft = BundleDraft(
            name=out.stem,
            spec=base.manifest.spec,
            onnx=network,
            engines=tuple(engines),
            chain={name: link for name, link in base.manifest.chain.items() if name != "onnx" and ":" not in name},
            reports={"copy": {"of": base.digest, "reason": reason}},
            golden=_golden(base, network),
        )
        return write_bundle(out, draft)


def _engine_files(network: Path, backend: Backend, folder: Path) -> tuple[Path, ...]:
    """The files of an engine, the one that the runtime is handed first."""
    folder.mkdir()
    if backend == "onnxruntime":
        return (ort_from_onnx(network, folder / "model.onnx"),)
    return openvino_from_onnx(network, folder)


def _golden(base: Bundle, network: Path) -> GoldenDraft | None:
    vectors = golden_vectors(base)
    if vectors is None:
        return None
    outputs = answers(base, network, vectors.inputs)
    return GoldenDraft(vectors.inputs, outputs, decode(outputs, base.manifest.spec.decoder)[0])


def answers(base: Bundle, network: Path, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """What a network says to (N, 3, h, w) float32 images, in ONNX Runtime."""
    session = open_session(network, "onnxruntime", threads=1, precision="int8")
    try:
        return dict(session.infer({base.manifest.spec.inputs[0].name: images}))
    finally:
        session.close()


# ---------------------------------------------------------------------------------------------------- less accurate


def disturb(network: Path, sigma: float, out: Path) -> int:
    """Writes a copy of an ONNX file with noise on all its weights.

    Args:
        network: The file; weights may be int8 codes or float32.
        sigma: Standard deviation of the noise relative to that of each weight tensor. The noise itself is the same for
            every sigma, so that the damage grows with it.
        out: Where the copy goes.

    Returns:
        How many weight tensors were changed.
    """
    model = onnx.load(network)
    generator = np.random.default_rng(0)
    changed = 0
    for tensor in model.graph.initializer:
        weights = numpy_helper.to_array(tensor)
        if weights.ndim < 2 or weights.dtype not in (np.int8, np.float32):
            continue
        values = weights.astype(np.float64)
        values += sigma * values.std() * generator.standard_normal(weights.shape)
        if weights.dtype == np.int8:
            top = np.abs(weights.astype(np.int16)).max()  # 63 where the processor needs 7-bit weights
            values = np.clip(np.round(values), -top, top)
        tensor.CopyFrom(numpy_helper.from_array(values.astype(weights.dtype), tensor.name))
        changed += 1
    onnx.save(model, out)
    return changed


# ------------------------------------------------------------------------------------------------------------- slower


def burden(network: Path, convolutions: int, out: Path, *, stride: int = _STRIDE) -> None:
    """Writes a copy of an ONNX file that also runs a chain of convolutions on its input.

    The chain's mean is multiplied by 1e-30 and added to the first output: far below the last bit of any answer, but no
    optimiser may drop it, as it is neither zero nor constant.

    Args:
        network: The file; its input is (N, 3, h, w) float32.
        convolutions: How many 3 x 3 convolutions follow the first one.
        stride: Of the first one: the larger, the less each of the others costs.
        out: Where the copy goes.
    """
    model = onnx.load(network)
    graph = model.graph
    generator = np.random.default_rng(0)

    def constant(name: str, values: NDArray[Any]) -> str:
        graph.initializer.append(numpy_helper.from_array(values, f"burden_{name}"))
        return f"burden_{name}"

    def convolution(source: str, number: int, inputs: int, kernel: int, stride: int) -> str:
        # He's scale keeps the chain's values near one however long it is.
        shape = (_SPARE, inputs, kernel, kernel)
        weights = generator.standard_normal(shape) * np.sqrt(2 / (inputs * kernel * kernel))
        name = constant(f"weight_{number}", weights.astype(np.float32))
        pads = [kernel // 2] * 4
        graph.node.append(
            helper.make_node(
                "Conv", [source, name], [f"burden_conv_{number}"], f"burden_conv_{number}",
                kernel_shape=[kernel, kernel], strides=[stride, stride], pads=pads,
            )
        )  # fmt: skip
        graph.node.append(helper.make_node("Relu", [f"burden_conv_{number}"], [f"burden_relu_{number}"]))
        return f"burden_relu_{number}"

    source = convolution(graph.input[0].name, 0, 3, 5, stride)
    for number in range(1, convolutions + 1):
        source = convolution(source, number, _SPARE, 3, 1)
    output = graph.output[0]
    rank = len(output.type.tensor_type.shape.dim)
    axes = constant("axes", np.array([1, 2, 3], np.int64))
    shape = constant("shape", np.array([-1] + [1] * (rank - 1), np.int64))
    tiny = constant("tiny", np.array(1e-30, np.float32))
    graph.node.append(helper.make_node("ReduceMean", [source, axes], ["burden_mean"], keepdims=0))
    graph.node.append(helper.make_node("Reshape", ["burden_mean", shape], ["burden_shaped"]))
    graph.node.append(helper.make_node("Mul", ["burden_shaped", tiny], ["burden_share"]))
    _rename(graph, output.name, "unburdened")
    graph.node.append(helper.make_node("Add", ["unburdened", "burden_share"], [output.name]))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, out)


def _rename(graph: onnx.GraphProto, name: str, new: str) -> None:
    """Gives a value another name wherever nodes make or read it; the graph's output keeps the old one."""
    for node in graph.node:
        for names in (node.input, node.output):
            for index, value in enumerate(names):
                if value == name:
                    names[index] = new


def check_burdened(base: Bundle, original: Path, copy: Path, convolutions: int) -> int:
    """Makes sure that a burdened copy says the same and really executes its convolutions.

    Returns:
        How many kernels ONNX Runtime executes more than for the original.

    Raises:
        EdgeposeError: It says something else, or ONNX Runtime has optimised convolutions away.
    """
    vectors = golden_vectors(base)
    if vectors is None:
        raise EdgeposeError(f"bundle {base.root}", found="no golden vectors", expected="inputs to compare answers on")
    before, after = (answers(base, path, vectors.inputs) for path in (original, copy))
    if any(not np.array_equal(before[name], after[name]) for name in before):
        raise EdgeposeError("burdened copy", found="other answers than the original's", expected="the same bits")
    extra = len(int8_share_ort(copy).kernels) - len(int8_share_ort(original).kernels)
    if extra != convolutions + 1:
        raise EdgeposeError("burdened copy", found=f"{extra} more kernels", expected=f"{convolutions + 1}")
    return extra
